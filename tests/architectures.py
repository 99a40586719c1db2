"""Generated architectures: nets drawn by hypothesis, from the ways in which people write activations and affine maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.attentions import ATTENTIONS

FUNCTIONAL = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "hardswish": F.hardswish, "leaky_relu": F.leaky_relu,
    "elu": F.elu, "mish": F.mish, "softplus": F.softplus, "sigmoid": torch.sigmoid, "relu6": F.relu6, "selu": F.selu,
    "celu": F.celu, "hardtanh": F.hardtanh, "softsign": F.softsign, "logsigmoid": F.logsigmoid, "tanhshrink": F.tanhshrink,
    "hardsigmoid": F.hardsigmoid, "softshrink": F.softshrink, "hardshrink": F.hardshrink,
}  # fmt: skip
MODULES = {
    "relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "hardswish": nn.Hardswish, "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU, "elu": nn.ELU, "mish": nn.Mish, "softplus": nn.Softplus, "sigmoid": nn.Sigmoid, "relu6": nn.ReLU6,
    "selu": nn.SELU, "celu": nn.CELU, "hardtanh": nn.Hardtanh, "softsign": nn.Softsign, "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink, "hardsigmoid": nn.Hardsigmoid, "softshrink": nn.Softshrink, "hardshrink": nn.Hardshrink,
    "rrelu": nn.RReLU, "threshold": lambda: nn.Threshold(0.1, 0.0),
}  # fmt: skip
IN_PLACE = {
    "relu": nn.ReLU, "silu": nn.SiLU, "hardswish": nn.Hardswish, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "mish": nn.Mish,
    "relu6": nn.ReLU6, "selu": nn.SELU, "celu": nn.CELU, "hardtanh": nn.Hardtanh, "hardsigmoid": nn.Hardsigmoid,
}  # fmt: skip
PADDINGS = ["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True)
class Act:
    """How an activation is written: which, and in which style."""

    name: str
    style: str  # "module", "functional", "in_place", "method", "shared"


@dataclass(frozen=True)
class Block:
    """W → σ → A inside one owner, with what may stand around and between."""

    kind: str  # "linear", "conv", "depthwise"
    act: Act
    hidden: int
    residual: bool = False
    bias: tuple[bool, bool] = (True, True)
    dropout: float = 0.0
    norm: bool = False
    padding: str = "zeros"
    pad: bool = True
    groups: int = 1
    functional: bool = False
    twice: bool = False


class GeneratedBlock(nn.Module):
    """A block of `channels` channels in and out."""

    def __init__(self, spec: Block, channels: int, shared: nn.Module) -> None:
        super().__init__()
        self.spec_residual, self.functional, self.twice = spec.residual, spec.functional, spec.twice
        self.style, self.dropout = spec.act.style, spec.dropout
        first, second = spec.bias
        if spec.kind == "linear":
            self.first: nn.Module = nn.Linear(channels, spec.hidden, bias=first)
            self.second: nn.Module = nn.Linear(spec.hidden, channels, bias=second)
            self.norm: nn.Module | None = nn.LayerNorm(channels) if spec.norm else None
        else:
            groups = channels if spec.kind == "depthwise" else spec.groups
            pad = {"padding": 1 if spec.pad else 0, "padding_mode": spec.padding}
            self.first = nn.Conv2d(channels, spec.hidden, 3, padding=1, groups=groups, bias=first)
            self.second = nn.Conv2d(spec.hidden, channels, 3, groups=groups, bias=second, **pad)  # type: ignore[arg-type]
            self.norm = nn.BatchNorm2d(spec.hidden) if spec.norm else None
        self.kind = spec.kind
        self.act: Any
        if spec.act.style == "shared":
            self.act = shared
        elif spec.act.style == "module":
            self.act = MODULES[spec.act.name]()
        elif spec.act.style == "in_place":
            self.act = IN_PLACE[spec.act.name](inplace=True)
        else:
            self.function = FUNCTIONAL[spec.act.name]

    def activate(self, x: Tensor) -> Tensor:
        if self.style == "functional":
            return self.function(x)
        if self.style == "method":
            return x.relu()
        return self.act(x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if self.kind == "linear" and self.norm is not None:
            y = self.norm(y)
        y = (
            F.linear(y, self.first.weight, self.first.bias)
            if self.functional and self.kind == "linear"
            else self.first(y)
        )
        if self.kind != "linear" and self.norm is not None:
            y = self.norm(y)
        y = self.activate(y)
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        y = self.second(y)
        if self.spec_residual and y.shape is not None:
            y = self.activate(x + y) if self.twice else x + y
        return y


class SelfAttention(nn.Module):
    """Attention over the tokens of the input, with a residual sum: something between the blocks that mixes positions."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unsqueeze(0)
        return (tokens + self.attention(tokens)).squeeze(0)  # type: ignore[no-any-return]


class GeneratedNet(nn.Module):
    """Blocks in a row, then a head; one ReLU module is shared by all blocks that ask for it.

    `form` is how the net talks to its caller: "plain" (one tensor in, one out), "pair" (two in, two out), "dict" (a dict
    in and out), or "repeat" (the blocks are called twice).
    """

    def __init__(self, blocks: tuple[Block, ...], channels: int = 4, form: str = "plain", attention: str = "") -> None:
        super().__init__()
        self.shared = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(*(GeneratedBlock(spec, channels, self.shared) for spec in blocks))
        self.convolutional, self.form = blocks[0].kind != "linear", form
        if attention and not self.convolutional:
            self.blocks.append(SelfAttention(ATTENTIONS[attention](channels)))
        self.fc1 = nn.Linear(channels, 6)
        self.fc2 = nn.Linear(6, 3)

    def forward(self, x: Any, y: Tensor | None = None) -> Any:
        if self.form == "dict":
            return {"logits": self.head(self.blocks(x["input"])), "given": x["input"] * 2}
        z = self.blocks(x)
        if self.form == "pair" and y is not None:
            return self.head(z + y), z
        if self.form == "repeat" and z.dim is not None:
            z = self.blocks(z)
        return self.head(z)

    def head(self, x: Tensor) -> Tensor:
        if self.convolutional:
            x = x.mean((2, 3))
        return self.fc2(torch.tanh(self.fc1(x)))  # type: ignore[no-any-return]

    def example(self, dtype: torch.dtype = torch.float32) -> Tensor:
        shape = (3, 4, 15, 15) if self.convolutional else (5, 4)
        return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)

    def arguments(self, x: Tensor) -> tuple[Any, ...]:
        """The arguments of the forward that carry x."""
        if self.form == "dict":
            return ({"input": x.clone()},)
        return (
            (x.clone(), x[:, :, :1, :1].clone() if self.convolutional else x.clone())
            if self.form == "pair"
            else (x.clone(),)
        )


@st.composite
def acts(draw: st.DrawFn) -> Act:
    style = draw(st.sampled_from(["module", "functional", "in_place", "method", "shared"]))
    names = {"module": sorted(MODULES), "functional": sorted(FUNCTIONAL), "in_place": sorted(IN_PLACE)}.get(
        style, ["relu"]
    )
    return Act(draw(st.sampled_from(names)), style)


@st.composite
def blocks(draw: st.DrawFn, kind: str) -> Block:
    pad = draw(st.booleans())
    return Block(
        kind=kind,
        act=draw(acts()),
        hidden=draw(st.sampled_from([4, 8])) if kind == "depthwise" else draw(st.sampled_from([2, 6, 8])),
        residual=draw(st.booleans()) and pad,
        bias=(draw(st.booleans()), draw(st.booleans())),
        dropout=draw(st.sampled_from([0.0, 0.0, 0.3])),
        norm=draw(st.booleans()),
        padding=draw(st.sampled_from(PADDINGS)),
        pad=pad,
        groups=draw(st.sampled_from([1, 2])) if kind == "conv" else 1,
        functional=draw(st.booleans()),
        twice=draw(st.booleans()),
    )


@st.composite
def nets(draw: st.DrawFn) -> GeneratedNet:
    """A net with one to three blocks of one kind; its weights follow from a drawn seed."""
    kind = draw(st.sampled_from(["linear", "conv", "depthwise"]))
    specs = tuple(draw(st.lists(blocks(kind), min_size=1, max_size=3)))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    form = draw(st.sampled_from(["plain", "pair", "dict", "repeat"]))
    net = GeneratedNet(specs, form=form, attention=draw(st.sampled_from(["", *ATTENTIONS])))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after some training
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.normal_(module.bias, std=0.3)
    return net


def run(net: GeneratedNet, x: Tensor, train: bool) -> Tensor:
    """The net's first output under a fixed seed; its buffers stay as they were."""
    net.train(train)
    kept = [
        (module, name, buffer.clone())
        for module in net.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    torch.manual_seed(11)
    result = net(*net.arguments(x))
    for module, name, buffer in kept:  # a new tensor: the old one may be held for backward
        module._buffers[name] = buffer
    result = result["logits"] if isinstance(result, dict) else result
    return result[0] if isinstance(result, tuple) else result
