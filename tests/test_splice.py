"""Sizes spliced into a shape with `*`: one graph for several numbers of axes, or a refusal."""

# ruff: noqa: RUF005 - sizes joined with `+` are what is tested

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bypass_fx
from bypass_fx.passes.errors import SurgeryError, UntraceableError
from bypass_fx.passes.splice import spliced
from bypass_fx.passes.trace import Tracing
from bypass_fx.surgery import delta_of


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.matmul(q, k.transpose(-2, -1)) * 0.5
    return torch.matmul(F.softmax(weights, dim=-1), v).transpose(-3, -2).contiguous()


class Spliced(nn.Module):
    """Attention in the manner of today's language models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head_dim = 4
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        input_shape = x.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q, k, v = (each(x).view(hidden_shape).transpose(-3, -2) for each in (self.q_proj, self.k_proj, self.v_proj))
        out = mixed(q, k, v).reshape(*input_shape, -1).contiguous()
        return self.o_proj(out)  # type: ignore[no-any-return]


class OwnShapes(Spliced):
    """The same, each value split by its own shape, in other ways of writing it."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (2, 4)).transpose(-3, -2)
        k, v = self.k_proj(x), self.v_proj(x)
        k = k.reshape([*k.shape[:-1], 2, 4]).transpose(-3, -2)
        v = v.view(*v.size()[:-1], 2, 4).transpose(-3, -2)
        out = mixed(q, k, v)
        return self.o_proj(out.reshape((*out.shape[:-2], 8)))  # type: ignore[no-any-return]


class Grouped(Spliced):
    """Half as many heads of keys and values as of queries, each repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(8, 4), nn.Linear(8, 4)

    def repeated(self, x: Tensor) -> Tensor:
        batch, heads, length, channels = x.shape
        return x[:, :, None].expand(batch, heads, 2, length, channels).reshape(batch, heads * 2, length, channels)

    def forward(self, x: Tensor) -> Tensor:
        input_shape = x.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        q, k, v = (each(x).view(hidden_shape).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
        out = mixed(q, self.repeated(k), self.repeated(v)).reshape(*input_shape, -1).contiguous()
        return self.o_proj(out)  # type: ignore[no-any-return]


class Classic(Spliced):
    """Attention in the manner of the first language models: sizes joined with `+`, a softmax made on the spot."""

    def split(self, x: Tensor) -> Tensor:
        parts = x.size()[:-1] + (2, self.head_dim)
        return x.view(*parts).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q_proj(x)), self.split(self.k_proj(x)), self.split(self.v_proj(x))
        weights = nn.Softmax(dim=-1)(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim))
        out = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return self.o_proj(out.view(*(out.size()[:-2] + (8,))))  # type: ignore[no-any-return]


class Own(nn.Module):
    """W and A, for forwards that are tried."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)


def net(body: Any) -> Own:
    return type("Tried", (Own,), {"forward": body})()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *itertools.product([Spliced, OwnShapes], [(5, 8), (2, 5, 8), (2, 3, 5, 8)]),
        (Grouped, (2, 5, 8)),
        (Classic, (2, 5, 8)),
    ],
)
def test_attention_with_spliced_shapes_is_a_site_and_exact(kind: type[Spliced], shape: tuple[int, ...]) -> None:
    net, x = kind(), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(net)
    (site,) = bypass_fx.plan(net, mode="strict")
    assert (site.activation, site.constraint, site.width) == ("attention", "folded", 8)
    assert site.first is not None and site.second is not None
    assert (site.first.name, site.second.name) == ("v_proj", "o_proj")
    bypass_fx.extend(net, mode="strict")
    out, before = net(x), plain(x)
    assert torch.equal(out, before)
    out.square().mean().backward()
    before.square().mean().backward()
    extended = dict(net.named_parameters())
    for name, parameter in plain.named_parameters():
        one, two = extended[name].grad, parameter.grad
        assert one is not None and two is not None and torch.equal(one, two), name


@pytest.mark.parametrize("kind", [Spliced, OwnShapes, Grouped, Classic])
def test_it_comes_back_with_d_not_zero(kind: type[Spliced]) -> None:
    net, x = kind().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    (site,) = bypass_fx.plan(net, mode="strict")
    bypass_fx.extend(net, mode="strict")
    before = net(x)
    with torch.no_grad():
        delta_of(net, site).normal_()
        assert not torch.allclose(net(x), before)
        net.v_proj.weight.zero_()  # A D W_V = 0
    extended = net(x)
    bypass_fx.contract(net)
    assert type(net) is kind and torch.allclose(net(x), extended)


def test_a_run_on_more_axes_than_were_tried_is_refused() -> None:
    net = Spliced()
    bypass_fx.extend(net, mode="strict")
    net(torch.randn(1, 1, 2, 5, 8))
    with pytest.raises(SurgeryError, match="takes 1 to 4 of the axes"):
        net(torch.randn(1, 1, 1, 2, 5, 8))


def test_a_splice_compiles_in_one_graph() -> None:
    net, x = Spliced(), torch.randn(2, 5, 8)
    bypass_fx.extend(net, mode="strict")
    assert torch.allclose(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))


def sizes_of(s: Any, x: Any) -> Any:
    return s.a(x).view(torch.Size((*x.shape[:-1], 8)))


def loops(s: Any, x: Any) -> Any:
    out = s.a(x)
    for size in x.shape[:-1]:
        out = out * size
    return out


def counts_in_vain(s: Any, x: Any) -> Any:
    if len((*x.shape[:-1], 1)) > 9:  # in no trace: a run must not go on unseen either
        return s.a(x) * 2
    return s.a(x)


def counts_beside_a_splice(s: Any, x: Any) -> Any:
    n = len(x.shape)  # another part than is spliced: the check of that one does not bound it
    first = (*x.shape[:1], -1)
    return s.a(x).view(first) if n > 9 else s.a(x).reshape(first)


def counts_what_it_splices(s: Any, x: Any) -> Any:
    shape = (*x.shape[:-1], 8)
    return s.a(x).view(shape) * len(shape)


def two_sizes(s: Any, x: Any) -> Any:
    y = s.a(x).squeeze()
    one, two = x.shape[:-1], y.shape[:-1]  # both checked, each by itself
    return y.view(*one, -1) * (2 if len(one) == len(two) else 3) + y.view(*two, -1)


DEPENDS = "by the number of axes"


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda s, x: s.a(x) * len((*x.shape[:-1], 1)), DEPENDS),
        (lambda s, x: s.a(x) * (*x.shape[:-1], 1)[0], "one by one to mul"),
        (lambda s, x: s.a(x) * (*x.shape[:-1], 1)[-2], "one by one to mul"),
        (lambda s, x: s.a(x) * (*x.shape[:-1], 3)[2], "one by one to mul|IndexError"),
        (lambda s, x: s.a(x) * (*x.shape[:-1], 1).index(1), "one by one to eq"),
        (lambda s, x: s.a(x) * sum(x.shape[:-1]), "one by one to add"),
        (lambda s, x: s.a(x) * {(*x.shape,): 2}.get((3, 4), 1), "as a key"),
        (lambda s, x: s.a(x) if (*x.shape[:-1], 1) == (3, 1) else x, "one by one to eq|other modules|number of axes"),
        (lambda s, x: s.a(x) if 3 in (*x.shape[:-1], 1) else x, "one by one to eq|other modules"),
        (lambda s, x: s.a(x) * len(f"{(*x.shape[:-1], 1)}"), "makes a text"),
        (lambda s, x: s.a(x) if isinstance((*x.shape[:-1], 1)[0], int) else x, "Python type"),
        (lambda s, x: s.a(x).view((*x.shape, 2)[1:]), DEPENDS),
        (lambda s, x: s.a(x).view(tuple(reversed([*x.shape[:-1], 8]))), "takes an item"),
        (lambda s, x: s.a(x).transpose(*x.shape[:-1]), "one by one"),
        (lambda s, x: s.a(s.b(s.a(x), (*x.shape[:-1], 1))), "TypeError|to a module"),
        (lambda s, x: s.a(x).view(*x.shape[-2:2], -1), "runs over the items"),
        (lambda s, x: s.a(x).view(*x.shape[::2], -1), "runs over the items"),
        (lambda s, x: s.a(x).view(*x.shape[: x.shape[0]], -1), "runs over the items"),
        (sizes_of, "takes an iterable of|needs the number"),
        (loops, "one by one to mul"),
        (counts_in_vain, DEPENDS),
        (counts_what_it_splices, DEPENDS),
        (lambda s, x: [s.a(x).view(*s.a(x).squeeze().shape[:-1], 8) for _ in range(4)], "items of 4 sizes"),
        (lambda s, x: s.a(x) * sum(x.shape[:-1] + (1,)), "one by one to add"),
        (lambda s, x: s.a(x).view(*(x + x)), "runs over the items|needs the number"),
        (lambda s, x: s.a(x) * len((*x.sizes, 1)), "runs over the items|no attribute"),
    ],
)
def test_what_depends_on_the_number_of_axes_is_refused(body: Any, why: str) -> None:
    with pytest.raises(UntraceableError, match=why):
        Tracing(net(body)).trace("")


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.b(F.relu(s.a(x))) * len(x.shape),
        lambda s, x: s.b(F.relu(s.a(x))) * len(x.shape[:-1] + (1,)),
        lambda s, x: counts_beside_a_splice(s, F.relu(s.b(F.relu(s.a(x))))),
        lambda s, x: two_sizes(s, F.relu(s.b(F.relu(s.a(x))))),
        lambda s, x: s.b(F.relu(s.a(x if len(x.shape) > 3 else x[None]))),
    ],
)
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (2, 1, 3, 4), (1, 2, 1, 3, 4)])
def test_a_number_of_axes_may_be_counted_in_each_call(body: Any, shape: tuple[int, ...]) -> None:
    model, x = net(body), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = model(x)
    assert torch.equal(bypass_fx.extend(model, mode="all")(x), before)


def unpacks(s: Any, x: Any) -> Any:
    *batch, channels = x.shape
    return s.a(x).view(*batch, 2, channels)


def takes_some(s: Any, x: Any) -> Any:
    sizes = [*x.shape]
    return s.a(x).view(*sizes[:-1], 2, sizes[-1])


def extends_a_list(s: Any, x: Any) -> Any:
    shape = list(x.shape[:-1])
    shape.append(8)
    return s.a(x).new_zeros(size=shape) + s.a(x)


def four_of_one_rank(s: Any, x: Any) -> Any:
    y = F.gelu(s.a(x).contiguous())
    z = s.b(y)
    return [s.a(x).view(*each.shape[:-1], 2, 4) for each in (x, y, z, z.clone())]


@pytest.mark.parametrize(
    "body",
    [
        lambda s, x: s.a(x).view(*x.shape[:-1], 2, 4),
        lambda s, x: torch.zeros(*x.shape[:-1], 8) + s.a(x),
        lambda s, x: s.a(x).reshape((2, 4, *x.shape[:-1])),
        lambda s, x: s.a(x).expand(*x.shape[:-1], 8) * math.prod(x.shape),
        lambda s, x: (s.a(x), (*x.shape[:-1], 1)),
        lambda s, x: s.a(x).view(*(x.shape[:-1] + (2, 4))),
        lambda s, x: s.a(x).view(*(x.size()[:-1] + torch.Size((2,)) + (4,))),
        lambda s, x: s.a(x).expand(*((1,) + x.shape[:-1] + (8,))),
        lambda s, x: torch.zeros(*(x.shape[:-1] + s.a(x).shape[-1:])) + s.a(x),
        four_of_one_rank,
        extends_a_list,
        unpacks,
    ],
)
def test_a_graph_with_a_splice_does_what_the_forward_does(body: Any) -> None:
    own = net(body)
    graph = torch.fx.GraphModule(own, Tracing(own).trace("").graph)
    for shape in ((3, 4), (2, 3, 4), (2, 1, 3, 4), (1, 2, 1, 3, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), own(x), rtol=0, atol=0)


def test_items_that_are_a_part_of_their_run_are_refused() -> None:
    with pytest.raises(UntraceableError, match="takes an item"):
        Tracing(net(takes_some)).trace("")


def test_a_splice_keeps_what_it_is_spliced_into() -> None:
    assert spliced([torch.Size([2, 7]), 8], ((0, 1, 4),)) == [2, 7, 8]
    with pytest.raises(SurgeryError, match="got the size"):
        spliced((torch.Size([2, 7]), 8), ((0, 3, 4),))
    with pytest.raises(SurgeryError, match="got the size"):
        spliced(([2, 7], 8), ((0, 1, 4),))


class Cut(nn.Module):
    """A list of the parts of a value, to which children add theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(16, 4), nn.Linear(4, 2)
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.a(x).chunk(2, -1))
        parts.extend(each(parts[-1]) for each in self.more)
        first, *rest = self.a(x).split([4, 4], dim=-1)
        count = len(rest) * len(self.a(x).chunk(2, -1))
        return self.c(torch.relu(self.b(torch.cat(parts, -1)))) + first[..., :count]  # type: ignore[no-any-return]


def test_the_parts_of_a_value_can_be_counted_and_listed() -> None:
    net, x = Cut(), torch.randn(3, 4)
    before = net(x)
    bypass_fx.extend(net, mode="strict")
    assert [site.constraint for site in bypass_fx.sites(net)] == ["folded"]
    assert torch.equal(net(x), before)


def chunks_counted(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.more[1](torch.relu(self.more[0](x)))
    return y / len(y.chunk(4))


def chunks_by_name(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.more[1](torch.relu(self.more[0](x)))
    first, *rest = [part * 2 for part in y.chunk(dim=1, chunks=2)]
    return first + rest[0] / len(torch.chunk(dim=-1, chunks=4, input=y))


@pytest.mark.parametrize("body", [chunks_counted, chunks_by_name])
def test_chunks_of_rows_may_be_fewer_than_asked_for_and_are_counted_in_each_call(body: Any) -> None:
    net = type("Own", (Cut,), {"forward": body})()
    inputs = torch.randn(5, 4), torch.randn(3, 4), torch.randn(4, 4)  # chunk(4) makes three parts of five rows
    before = [net(x) for x in inputs]
    bypass_fx.extend(net, mode="strict")
    assert [site.constraint for site in bypass_fx.sites(net)] == ["folded"]
    for x, y in zip(inputs, before, strict=True):
        assert torch.equal(net(x), y)


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary embeddings by complex numbers, as the first Llama has them."""
    turned = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    axes = turned.ndim
    shape = [size if i in (1, axes - 1) else 1 for i, size in enumerate(turned.shape)]
    return torch.view_as_real(turned * turns.view(*shape)).flatten(3).type_as(x)


class Rotary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (each(x).view(batch, tokens, 2, 4) for each in (self.q, self.k, self.v))
        if q.dim() != 4:
            raise ValueError("the view says it")
        q, k = (rotated(each, turns).transpose(1, 2) for each in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


def test_axes_that_the_graph_tells_are_counted_and_taken_one_by_one() -> None:
    model = Rotary()
    calls = [(torch.randn(batch, tokens, 8), torch.randn(tokens, 2).to(torch.complex64)) for batch, tokens in SHAPES]
    before = [model(*call) for call in calls]
    bypass_fx.extend(model)
    assert [site.activation for site in bypass_fx.sites(model)] == ["attention"]
    assert all(torch.equal(model(*call), out) for call, out in zip(calls, before, strict=True))
    with torch.no_grad():
        delta_of(model, bypass_fx.sites(model)[0]).fill_(0.5)
    assert not torch.allclose(model(*calls[0]), before[0])


SHAPES = [(2, 5), (3, 4), (1, 1)]
