"""Users whose inputs are vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import user


@user((5, 3), (5, 3))
class NeRF(nn.Module):
    """Positional encoding, and the input concatenated again half way."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bands", 2.0 ** torch.arange(4))
        self.skips = [2]
        self.pts = nn.ModuleList([nn.Linear(27, 16)] + [nn.Linear(16 + 27 * (i in self.skips), 16) for i in (1, 2, 3)])
        self.alpha, self.feature = nn.Linear(16, 1), nn.Linear(16, 16)
        self.views, self.rgb = nn.Linear(16 + 27, 8), nn.Linear(8, 3)

    def encode(self, x: Tensor) -> Tensor:
        angles = (x[..., None] * self.bands).flatten(-2)
        return torch.cat([x, angles.sin(), angles.cos()], -1)

    def forward(self, points: Tensor, directions: Tensor) -> Tensor:
        p = h = self.encode(points)
        for i, layer in enumerate(self.pts):
            h = F.relu(layer(h))
            if i + 1 in self.skips:
                h = torch.cat([p, h], -1)
        alpha = F.softplus(self.alpha(h))
        h = F.relu(self.views(torch.cat([self.feature(h), self.encode(directions)], -1)))
        return torch.cat([torch.sigmoid(self.rgb(h)), alpha], -1)


class Sine(nn.Module):
    """SIREN's activation, in a module with its weights."""

    def __init__(self, cin: int, cout: int, omega: float = 30.0) -> None:
        super().__init__()
        self.omega, self.linear = omega, nn.Linear(cin, cout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.omega * self.linear(x))


@user((4, 2))
class Siren(nn.Module):
    """Sine layers and a tanh at the end; coordinates get a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Sine(2, 16), Sine(16, 16), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, coords: Tensor) -> dict[str, Tensor]:
        coords = coords.clone().requires_grad_(True)
        return {"model_in": coords, "model_out": self.net(coords)}


@user((6, 4))
class GraphNet(nn.Module):
    """Messages along edges, summed by scatter; the edges are a buffer."""

    class Layer(nn.Module):
        """One round of messages."""

        def __init__(self) -> None:
            super().__init__()
            self.message, self.update = nn.Linear(8, 8), nn.Linear(12, 4)
            self.aggregate = {"add": torch.Tensor.index_add}

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            source, target = edges[0], edges[1]
            m = F.elu(self.message(torch.cat([x[source], x[target]], -1)))
            total = torch.zeros(x.size(0), 8, dtype=x.dtype).index_add_(0, target, m)
            return x + torch.tanh(self.update(torch.cat([x, total], -1)))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("edges", torch.tensor([[0, 1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, 0, 3]]))
        self.layers = nn.ModuleList([self.Layer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.edges)
        return x.mean(0)


@user((6, 4))
class RealNVP(nn.Module):
    """Coupling layers with a mask buffer, and a direction chosen by a method's argument."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([[0.0, 1, 0, 1], [1, 0, 1, 0]]))
        make = lambda last: nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 4), *last)  # noqa: E731
        self.s, self.t = (nn.ModuleList([make(last()) for _ in range(2)]) for last in (lambda: [nn.Tanh()], list))

    def inverse(self, z: Tensor) -> Tensor:
        for i in range(len(self.t)):
            kept = z * self.mask[i]
            z = kept + (1 - self.mask[i]) * (z * torch.exp(self.s[i](kept)) + self.t[i](kept))
        return z

    def forward(self, x: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        if reverse:
            return self.inverse(x), x.new_zeros(x.shape[0])
        log_det = x.new_zeros(x.shape[0])
        for i in reversed(range(len(self.t))):
            kept = self.mask[i] * x
            s, t = self.s[i](kept) * (1 - self.mask[i]), self.t[i](kept) * (1 - self.mask[i])
            x = (1 - self.mask[i]) * (x - t) * torch.exp(-s) + kept
            log_det = log_det - s.sum(1)
        return x, log_det


@user((4, 3))
class NeuralOde(nn.Module):
    """A solver that takes the right-hand side as a function; the step is refined while the error is large."""

    class Field(nn.Module):
        """dx/dt, counting its own calls as such code does."""

        def __init__(self) -> None:
            super().__init__()
            self.nfe, self.fc1, self.fc2, self.act = 0, nn.Linear(4, 8), nn.Linear(8, 3), nn.Softplus()

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            self.nfe += 1
            return self.fc2(self.act(self.fc1(torch.cat([x, t.expand(x.shape[0], 1)], 1))))  # type: ignore[no-any-return]

    def __init__(self) -> None:
        super().__init__()
        self.field = self.Field()

    def forward(self, x: Tensor) -> Tensor:
        t, h = torch.zeros(1), 0.5
        while float(t) < 1:
            k1 = self.field(t, x)
            k2 = self.field(t + h, x + h * k1)
            if float((k1 - k2).detach().abs().max()) * h > 5 and h > 0.1:
                h /= 2
                continue
            x, t = x + h * (k1 + k2) / 2, t + h
        return x


@user((4, 12))
class SparseAutoencoder(nn.Module):
    """Tied decoder, a bias taken off first, top-k as a callable held beside a ReLU; losses in a NamedTuple."""

    class Out(NamedTuple):
        """What it returns."""

        decoded: Tensor
        latents: Tensor
        loss: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.pre_bias, self.latent_bias = nn.Parameter(torch.zeros(12)), nn.Parameter(torch.zeros(24))
        self.encoder, self.activation = nn.Linear(12, 24, bias=False), nn.ReLU()
        self.postact: Callable[[Tensor], Tensor] = torch.relu

    def forward(self, x: Tensor) -> Out:
        z = self.encoder(x - self.pre_bias) + self.latent_bias
        values, index = torch.topk(self.postact(z), 6, dim=-1)
        latents = torch.zeros_like(z).scatter(-1, index, values)
        decoded = self.activation(latents) @ self.encoder.weight + self.pre_bias
        return self.Out(decoded, latents, (decoded - x).pow(2).mean())


@user((3, 6))
class Maml(nn.Module):
    """A functional inner step: torch.func.functional_call on its own child with fast weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        fast = {name: p - 0.1 * p.sign() for name, p in self.net.named_parameters() if not name.startswith("delta")}
        return torch.func.functional_call(self.net, fast, (x,))  # type: ignore[no-any-return]


@user((4, 5))
class VariationalAutoencoder(nn.Module):
    """Reparametrised in training mode, the mean in eval mode; a class attribute holds the nonlinearity."""

    nonlinearity = staticmethod(F.leaky_relu)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.mu, self.logvar = nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.fc3, self.fc4 = nn.Linear(2, 8), nn.Linear(8, 5)

    def reparametrise(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if self.training:
            return mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
        return mu

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.nonlinearity(self.fc1(x), 0.1)
        mu, logvar = self.mu(h), self.logvar(h)
        z = self.reparametrise(mu, logvar)
        return torch.sigmoid(self.fc4(self.nonlinearity(self.fc3(z)))), mu, logvar
