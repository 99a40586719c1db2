"""Users whose inputs are sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from .registry import user


@user((2, 5, 8))
class MixtureOfExperts(nn.Module):
    """Routing by indices: a loop over experts that a graph can't hold; the activation is a callable of the expert."""

    class Expert(nn.Module):
        """A gated expert whose dtype branch does not trace."""

        def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False), nn.Linear(8, 16)
            self.act_fn = act

        def forward(self, x: Tensor) -> Tensor:
            h = self.act_fn(self.w1(x)) * self.w3(x)
            if h.dtype != self.w2.weight.dtype:
                h = h.to(self.w2.weight.dtype)
            return self.w2(h)  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        acts = [F.silu, F.gelu, functools.partial(F.gelu, approximate="tanh"), torch.tanh]
        self.gate, self.experts = nn.Linear(8, 4, bias=False), nn.ModuleList(map(self.Expert, acts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, dim = x.shape
        flat = x.reshape(-1, dim)
        logits = self.gate(flat)
        weights, chosen = torch.topk(logits.softmax(-1), 2)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            out.index_add_(0, token, expert(flat[token]) * weights[token, slot, None])
        return out.reshape(batch, length, dim), logits


@user((2, 1, 24))
class WaveNet(nn.Module):
    """Dilated causal convolutions with tanh and sigmoid gates, residual and skip outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.filters = nn.ModuleList([nn.Conv1d(8, 8, 2, dilation=2**i) for i in range(3)])
        self.gates = nn.ModuleList([nn.Conv1d(8, 8, 2, dilation=2**i) for i in range(3)])
        self.residuals = nn.ModuleList([nn.Conv1d(8, 8, 1) for _ in range(3)])
        self.skips = nn.ModuleList([nn.Conv1d(8, 8, 1) for _ in range(3)])
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(8, 8, 1), nn.ReLU(), nn.Conv1d(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skip = self.start(x), 0
        for f, g, r, s in zip(self.filters, self.gates, self.residuals, self.skips, strict=True):
            h = torch.tanh(f(x)) * torch.sigmoid(g(x))
            skip = s(h)[..., -10:] + skip
            x = r(h) + x[..., -h.shape[-1] :]
        return self.end(skip)  # type: ignore[no-any-return]


class Chomp(nn.Module):
    """Cuts the padding at the end."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, : -self.size].contiguous()


@user((2, 3, 12))
class TemporalConvNet(nn.Module):
    """Weight norm, chomp, dropout, and one ReLU called on the sum."""

    class Block(nn.Module):
        """The sequential `net` shares its modules with attributes of the block."""

        def __init__(self, cin: int, cout: int, dilation: int) -> None:
            super().__init__()
            wn = parametrizations.weight_norm
            self.conv1 = wn(nn.Conv1d(cin, cout, 3, padding=2 * dilation, dilation=dilation))
            self.conv2 = wn(nn.Conv1d(cout, cout, 3, padding=2 * dilation, dilation=dilation))
            self.chomp1, self.chomp2, self.relu1, self.relu2 = (
                Chomp(2 * dilation),
                Chomp(2 * dilation),
                nn.ReLU(),
                nn.ReLU(),
            )
            self.dropout = nn.Dropout(0.1)
            self.net = nn.Sequential(
                self.conv1, self.chomp1, self.relu1, self.dropout, self.conv2, self.chomp2, self.relu2, self.dropout
            )
            self.downsample = nn.Conv1d(cin, cout, 1) if cin != cout else None
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            out = self.net(x)
            return self.relu(out + (x if self.downsample is None else self.downsample(x)))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(self.Block(3, 8, 1), self.Block(8, 8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)[:, :, -1]  # type: ignore[no-any-return]


@user((2, 6, 8))
class Mamba(nn.Module):
    """Selective scan: a loop over time by shape, SiLU gates, softplus of the step."""

    def __init__(self) -> None:
        super().__init__()
        self.d, self.n = 16, 4
        self.in_proj, self.conv = nn.Linear(8, 32, bias=False), nn.Conv1d(16, 16, 3, groups=16, padding=2)
        self.x_proj, self.dt_proj = nn.Linear(16, 9, bias=False), nn.Linear(1, 16)
        self.A_log, self.D = nn.Parameter(torch.rand(16, 4)), nn.Parameter(torch.ones(16))
        self.out_proj, self.activation = nn.Linear(16, 8, bias=False), "silu"
        self.act = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        x = self.act(self.conv(x.transpose(1, 2))[..., : hidden.shape[1]]).transpose(1, 2)
        dt, b, c = torch.split(self.x_proj(x), [1, self.n, self.n], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        a = torch.exp(dt[..., None] * -torch.exp(self.A_log.float()))
        state, outs = torch.zeros(x.shape[0], self.d, self.n), []
        for i in range(x.shape[1]):
            state = a[:, i] * state + (dt[:, i, :, None] * b[:, i, None]) * x[:, i, :, None]
            outs.append((state * c[:, i, None]).sum(-1))
        y = torch.stack(outs, 1) + x * self.D
        return self.out_proj(y * F.silu(z))  # type: ignore[no-any-return]


@user((2, 5, 8))
class Rwkv(nn.Module):
    """Token shift, squared ReLU, sigmoid receptance; a state dict handed through the blocks."""

    class ChannelMix(nn.Module):
        """relu squared, gated."""

        def __init__(self) -> None:
            super().__init__()
            self.time_shift = nn.ZeroPad2d((0, 0, 1, -1))
            self.mix = nn.Parameter(torch.rand(1, 1, 8))
            self.key, self.receptance, self.value = (nn.Linear(*s, bias=False) for s in ((8, 16), (8, 8), (16, 8)))

        def forward(self, x: Tensor, state: dict[str, Any]) -> Tensor:
            shifted = self.time_shift(x)
            k = torch.square(torch.relu(self.key(x * self.mix + shifted * (1 - self.mix))))
            scale = state["scale"] if state["rescale"] else 1.0
            return torch.sigmoid(self.receptance(x)) * self.value(k) * scale

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(2)])
        self.mixes = nn.ModuleList([self.ChannelMix() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for i, (norm, mix) in enumerate(zip(self.norms, self.mixes, strict=True)):
            x = x + mix(norm(x), {"scale": 0.5, "rescale": i > 0, "first": x})
        return x


@user((3, 5, 6))
class RecurrentPolicy(nn.Module):
    """Encoder, LSTM, GRU cell in a loop, and two heads over one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.lstm = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.LSTM(8, 8, batch_first=True)
        self.cell, self.policy, self.value = nn.GRUCell(8, 8), nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Any, Tensor, Tensor]:
        h, state = self.lstm(self.encoder(x), state)
        out = h.new_zeros(h.shape[0], 8)
        for step in h.unbind(1):
            out = self.cell(step, out)
        out = F.elu(out)
        return torch.distributions.Categorical(logits=self.policy(out)).logits, self.value(out), state[0]


@user((2, 7))
class LanguageModel(nn.Module):
    """Token indices made of the input, rotary caches filled on first use, causal mask of -inf, tied head, checkpoints."""

    class Block(nn.Module):
        """Pre-norm attention and a gated MLP."""

        def __init__(self) -> None:
            super().__init__()
            self.n1, self.n2, self.qkv, self.out = nn.RMSNorm(8), nn.RMSNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.act_fn = {"swish": F.silu, "gelu": F.gelu}["swish"]
            self._cached: Tensor | None = None

        def angles(self, length: int) -> Tensor:
            if self._cached is None or len(self._cached) < length:
                self._cached = torch.outer(torch.arange(length).float(), 1 / 10 ** torch.arange(8).float())
            return self._cached[:length]

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.qkv(self.n1(x)).chunk(3, -1)
            angles = self.angles(x.shape[1])
            q, k = q * angles.cos(), k * angles.cos()
            x = x + self.out((q @ k.mT / 3 + mask).softmax(-1) @ v)
            h = self.n2(x)
            return x + self.down(self.act_fn(self.gate(h)) * self.up(h))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, 8), nn.ModuleList([self.Block() for _ in range(2)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.gradient_checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.abs().mul(3).long().clamp(max=10)
        h = self.embed(tokens)
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                h = checkpoint(block, h, mask, use_reentrant=False)
            else:
                h = block(h, mask)
        return self.head(h)  # type: ignore[no-any-return]


@user((2, 4, 16))
class EarlyExit(nn.Module):
    """Leaves when it is sure, so its forward has no graph; what it calls is held in a tuple and as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.activation, self.squash = functools.partial(F.leaky_relu, negative_slope=0.2), lambda z: torch.tanh(z) * 2

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.activation(layer(x))
            if float(x.detach().abs().max()) > 1e6:
                return x
        return self.squash(x)  # type: ignore[no-any-return]
