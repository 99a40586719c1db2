"""Rewriting torch.nn.MultiheadAttention at its source text: ψ around the two calls that mix the values.

The texts of its forward and of the function under it are taken from the torch that is installed, so nothing of torch is
written again. In inference torch runs one fused kernel that hides the values: there, what D adds is projected beside it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import PlanError

_MIXING = "_mixing"  # the name of the rewritten function under the forward


@cache
def multihead_source(delta: str) -> tuple[str, dict[str, Any]]:
    """The text of both functions, for a module that holds its δ under the name `delta`, and what its names mean.

    Raises:
        PlanError: this version of torch mixes its values in another way.
    """
    forward, mixing = _Forward(delta), _Mixing()
    scope: dict[str, Any] = {}
    texts: list[str] = []
    for called, rewriting in ((F.multi_head_attention_forward, mixing), (nn.MultiheadAttention.forward, forward)):
        function = inspect.unwrap(called)
        tree = rewriting.visit(ast.parse(textwrap.dedent(inspect.getsource(function))))
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        scope |= {name: function.__globals__[name] for name in named if name in function.__globals__}
        texts.append(ast.unparse(ast.fix_missing_locations(tree)) + "\n")
    if (mixing.wrapped, forward.mixes, forward.fused) != (2, 2, 1):
        raise PlanError(
            f"torch {torch.__version__} computes MultiheadAttention in an unknown way; leave it out with select"
        )
    return "\n\n".join(texts), {**scope, "_beside": _beside}


def _beside(
    result: tuple[Tensor, Tensor | None], value: Tensor, module: nn.MultiheadAttention, delta: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The fused kernel's result with A D V added, V being projected once more: (batch, tokens, channels)."""
    added = [_projected(part, module, delta) for part in value.unbind()] if value.is_nested else []
    beside = torch.nested.as_nested_tensor(added) if value.is_nested else _projected(value, module, delta)
    return result[0] + beside, result[1]


def _projected(value: Tensor, module: nn.MultiheadAttention, delta: Tensor) -> Tensor:
    """A D V."""
    width = module.embed_dim
    bias = None if module.in_proj_bias is None else module.in_proj_bias[2 * width :]
    v = F.linear(value, module.in_proj_weight[2 * width :], bias)
    return F.linear(v * delta.to(v.dtype), module.out_proj.weight)


class _Mixing(ast.NodeTransformer):
    """F.multi_head_attention_forward with two more arguments, and ψ around the calls that take v."""

    def __init__(self) -> None:
        self.wrapped = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        _plain(node)
        node.name = _MIXING
        node.args.args = [ast.arg("_delta"), ast.arg("_view"), *node.args.args]
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        asks = isinstance(node.test, ast.Call) and ast.unparse(node.test.func) == "has_torch_function"
        return None if asks else self.generic_visit(node)  # it would call torch's own function again

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        takes_v = any(isinstance(argument, ast.Name) and argument.id == "v" for argument in node.args)
        if not takes_v or ast.unparse(node.func) not in ("scaled_dot_product_attention", "torch.bmm"):
            return node
        self.wrapped += 1
        return _call("_psi", node, *map(_name, ("v", "_delta", "_view")))


class _Forward(ast.NodeTransformer):
    """nn.MultiheadAttention.forward, calling the rewritten function."""

    def __init__(self, delta: str) -> None:
        self.delta = f"self.{delta}"
        self.mixes = self.fused = 0

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        _plain(node)
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called == "F.multi_head_attention_forward":
            self.mixes += 1
            view = "(self.num_heads, 1, self.head_dim)"
            return ast.Call(_name(_MIXING), [_name(self.delta), _name(view), *node.args], node.keywords)
        if called == "torch._native_multi_head_attention":
            self.fused += 1
            return _call("_beside", node, *map(_name, ("value", "self", self.delta)))
        return node


def _plain(node: ast.FunctionDef) -> None:
    """Without annotations, whose names would have to be known."""
    node.returns, node.decorator_list = None, []
    for argument in (*node.args.args, *node.args.kwonlyargs):
        argument.annotation = None


def _call(function: str, *args: ast.expr) -> ast.Call:
    return ast.Call(_name(function), list(args), [])


def _name(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body
