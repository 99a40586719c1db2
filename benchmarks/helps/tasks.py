"""The tasks: test functions and spirals for small dense networks, the digits, text for a transformer, and CIFAR-10."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from math import pi
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bypass_fx import data
from bypass_fx.models import Fit, TwoConvTwoDense

Pair = tuple[Tensor, Tensor]
DATA_SEED = 1  # the points and texts are the same for every seed of a task


@dataclass(frozen=True, slots=True)
class Examples:
    """What is trained on and what is tested on; `kind` is "regression" or "classification"."""

    train: Pair
    test: Pair
    kind: str
    outputs: int

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        """Mean squared error, or cross-entropy over the last axis; 0-dim."""
        x, y = batch
        if self.kind == "regression":
            return F.mse_loss(model(x), y)
        return F.cross_entropy(model(x).flatten(0, -2), y.flatten())

    def accuracy(self, model: nn.Module, batch: Pair) -> Tensor:
        """The share of right classes, 0-dim."""
        x, y = batch
        right: Tensor = model(x).argmax(-1) == y
        return right.float().mean()


def _levy(x: Tensor) -> Tensor:
    w = 1 + (x - 1) / 4
    first, last = w[:, :1], w[:, 1:]
    waves = (first - 1).square() * (1 + 10 * (pi * first + 1).sin().square())
    ends: Tensor = (pi * first).sin().square() + (last - 1).square() * (1 + (2 * pi * last).sin().square())
    return waves + ends


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # on [points, 2], and half the side of its square
    "eggholder": (data.eggholder, 250.0),
    "ackley": (
        lambda x: (
            -20 * (-0.2 * x.square().mean(1, keepdim=True).sqrt()).exp()
            - (2 * pi * x).cos().mean(1, keepdim=True).exp()
        ),
        2.0,
    ),
    "rastrigin": (lambda x: (x.square() - 10 * (2 * pi * x).cos()).sum(1, keepdim=True), 1.5),
    "schwefel": (lambda x: -(x * x.abs().sqrt().sin()).sum(1, keepdim=True), 250.0),
    "levy": (_levy, 4.0),
    "himmelblau": (
        lambda x: (x[:, :1].square() + x[:, 1:] - 11).square() + (x[:, :1] + x[:, 1:].square() - 7).square(),
        4.0,
    ),
    "rosenbrock": (
        lambda x: ((1 - x[:, :1]).square() + 100 * (x[:, 1:] - x[:, :1].square()).square()).log1p(),  # its logarithm
        2.0,
    ),
    "drop-wave": (
        lambda x: -(1 + (12 * x.norm(dim=1, keepdim=True)).cos()) / (x.square().sum(1, keepdim=True) / 2 + 2),
        1.0,
    ),
    "styblinski-tang": (lambda x: (x**4 - 16 * x.square() + 5 * x).sum(1, keepdim=True) / 2, 4.0),
    "camel": (
        lambda x: (
            2 * x[:, :1].square()
            - 1.05 * x[:, :1] ** 4
            + x[:, :1] ** 6 / 6
            + x.prod(1, keepdim=True)
            + x[:, 1:].square()
        ),
        2.0,
    ),
    "griewank": (lambda x: x.square().sum(1, keepdim=True) / 4000 - x[:, :1].cos() * (x[:, 1:] / 2**0.5).cos(), 6.0),
}


def function(name: str, points: int) -> Examples:
    """A test function at uniform points of its square; inputs and values normalised by those of the training set."""
    of, side = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(DATA_SEED)
    train, test = (torch.rand(number, 2, generator=generator) * 2 * side - side for number in (points, 1000))
    mean, spread = of(train).mean(), of(train).std()
    pairs = [(x / (side / 3**0.5), (of(x) - mean) / spread) for x in (train, test)]
    return Examples(pairs[0], pairs[1], "regression", 1)


def spirals(points: int) -> Examples:
    """Three arms that wind around each other, with a little noise."""
    generator = torch.Generator().manual_seed(DATA_SEED)

    def drawn(number: int) -> Pair:
        y = torch.arange(number) % 3
        radius = torch.rand(number, generator=generator)
        angle = 2 * pi * (y / 3 + radius) + 0.15 * torch.randn(number, generator=generator)
        return 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1), y

    return Examples(drawn(points), drawn(1000), "classification", 3)


def checkerboard(points: int, squares: int) -> Examples:
    """Points of a board with so many squares a side, and the colour of each one's square."""
    generator = torch.Generator().manual_seed(DATA_SEED)

    def drawn(number: int) -> Pair:
        x = squares * torch.rand(number, 2, generator=generator)
        return (2 * x / squares - 1) * 3**0.5, x.floor().sum(1).long() % 2

    return Examples(drawn(points), drawn(1000), "classification", 2)


def rings(points: int, count: int) -> Examples:
    """Points of a disc, and which of two colours the ring has that each lies in; so many rings, the colours alternating."""
    generator = torch.Generator().manual_seed(DATA_SEED)

    def drawn(number: int) -> Pair:
        radius, angle = torch.rand(number, generator=generator), 2 * pi * torch.rand(number, generator=generator)
        return 2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1), (count * radius).long() % 2

    return Examples(drawn(points), drawn(1000), "classification", 2)


def friedman(points: int) -> Examples:
    """10 sin(π x₁x₂) + 20 (x₃ − ½)² + 10 x₄ + 5 x₅ with noise, and five more inputs that do nothing; normalised."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = torch.rand(points + 1000, 10, generator=generator)
    waves = 10 * (pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5).square()
    y = (waves + 10 * x[:, 3] + 5 * x[:, 4] + torch.randn(len(x), generator=generator)).unsqueeze(1)
    x, y = (2 * x - 1) * 3**0.5, (y - y.mean()) / y.std()
    return Examples((x[:points], y[:points]), (x[points:], y[points:]), "regression", 1)


def diabetes() -> Examples:
    """How diabetes went on within a year, by ten measurements of 442 patients, as scikit-learn ships it; normalised."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(values, dtype=torch.float32) for values in load_diabetes(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(DATA_SEED))
    x, y = (x / x.std(0))[order], ((y - y.mean()) / y.std()).unsqueeze(1)[order]
    return Examples((x[:300], y[:300]), (x[300:], y[300:]), "regression", 1)


def digits(side: int = 0) -> Examples:
    """The digits as vectors of 64, or as images of one channel and that side."""
    loaded = data.load("digits", vectors=True)
    pairs = []
    for part in (loaded.train, loaded.test):
        assert isinstance(part, TensorDataset)
        x, y = part.tensors
        pairs.append((F.interpolate(x.view(-1, 1, 8, 8), size=(side, side), mode="bilinear") if side else x, y))
    return Examples(pairs[0], pairs[1], "classification", 10)


def text(characters: int, context: int) -> Examples:
    """The Python standard library's own source, as windows of characters and the characters that follow each."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    source = "".join((folder / name).read_text() for name in ("ast.py", "difflib.py", "textwrap.py", "heapq.py"))
    known = sorted({character for character in source if character.isascii()})
    codes = torch.tensor([known.index(character) for character in source if character.isascii()])
    pairs = []
    for first in (0, characters):
        part = codes[first : first + characters + 1]
        x, y = (part[shift : shift + characters].unfold(0, context, context) for shift in (0, 1))
        pairs.append((x.contiguous(), y.contiguous()))
    return Examples(pairs[0], pairs[1], "classification", len(known))


def cifar10(folder: str) -> Examples:
    """CIFAR-10 from a folder."""
    loaded = data.load(f"cifar10:{folder}")
    pairs = []
    for part in (loaded.train, loaded.test):
        assert isinstance(part, TensorDataset)
        x, y = part.tensors
        pairs.append((data.prepare(x), y))
    return Examples(pairs[0], pairs[1], "classification", 10)


def dense(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str) -> nn.Module:
    """Linear layers with an activation after each but the last."""
    layers: list[nn.Module] = []
    for a, b in pairwise((inputs, *hidden)):
        layers += [nn.Linear(a, b), getattr(nn, activation)()]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], outputs))


def resnet18(channels: int, width: int, outputs: int) -> nn.Module:
    """ResNet-18 with `width` channels in its first stage, and the stem of timm's "d" for small images."""
    import timm

    widths = (width, 2 * width, 4 * width, 8 * width)
    return timm.create_model(
        "resnet18d",
        in_chans=channels,
        num_classes=outputs,
        channels=widths,
        stem_width=width // 2,
        zero_init_last=False,
    )


class Block(nn.Module):
    """A causal transformer block, normalised before its attention and before its dense part."""

    mask: Tensor

    def __init__(self, context: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.register_buffer("mask", torch.full((context, context), -1e9).triu(1), persistent=False)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.act, self.fc2 = nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, width], the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = q @ k.transpose(-2, -1) * (width // self.heads) ** -0.5
        mixed = (scores + self.mask[:tokens, :tokens]).softmax(-1) @ v  # written out, for vmap
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        out: Tensor = x + self.fc2(self.act(self.fc1(self.norm2(x))))
        return out


class Transformer(nn.Module):
    """Characters to the logits of the next ones, [batch, tokens] → [batch, tokens, characters]."""

    def __init__(self, characters: int, context: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(context, width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, [batch, tokens, characters]."""
        logits: Tensor = self.head(self.norm(self.blocks(self.embed(x) + self.position)))
        return logits


@dataclass(frozen=True, slots=True)
class Task:
    """A row of the protocol: data and net with their arguments, and how it is trained.

    `batch` is 0 where every step takes the whole set; `at_once` as for `Replicas`. All arms take `steps` after θ*,
    which lies `train1` steps after the start. The training loss is taken `looks` times before θ* and after
    it. Where `arms` are named, only those race.
    """

    name: str
    half: str
    data: Mapping[str, Any]
    net: Mapping[str, Any]
    lr: float
    batch: int
    train1: int
    steps: int
    seeds: int
    at_once: int | None = None
    looks: int = 40
    arms: Sequence[str] = ()

    def examples(self) -> Examples:
        """The data."""
        made: dict[str, Callable[..., Examples]] = {
            "function": function, "spirals": spirals, "checkerboard": checkerboard, "rings": rings, "friedman": friedman,
            "diabetes": diabetes, "digits": digits, "text": text, "cifar10": cifar10,
        }  # fmt: skip
        kind, arguments = _named(self.data)
        return made[kind](**arguments)

    def build(self, examples: Examples) -> nn.Module:
        """A new net for the data, as torch's generator stands."""
        kind, arguments = _named(self.net)
        x = examples.train[0]
        if kind == "dense":
            return dense(x.shape[1], tuple(arguments["hidden"]), examples.outputs, arguments["activation"])
        if kind == "2c2d":
            return TwoConvTwoDense(Fit(tuple(x.shape[1:]), examples.outputs))
        if kind == "resnet18":
            return resnet18(x.shape[1], arguments["width"], examples.outputs)
        return Transformer(examples.outputs, x.shape[1], **arguments)


def _named(given: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return given["kind"], {key: value for key, value in given.items() if key != "kind"}


def minibatches(examples: Examples, size: int, seeds: list[int], copies: int, first: int) -> Iterator[Pair]:
    """The minibatches from step `first` on: of a seed always the same, whatever else is trained beside it.

    Args:
        examples: what to draw from.
        size: examples of a minibatch.
        seeds: each draws on its own, without replacement in an epoch.
        copies: how often the block of seeds stands in a batch, for so many arms.
        first: steps to leave out.

    Returns:
        x and y, [copies · seeds, size, …].
    """
    x, y = examples.train
    per_epoch = len(x) // size
    for step in count(first):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == first:
            generators = [torch.Generator().manual_seed(1_000_003 * seed + epoch) for seed in seeds]
            order = torch.stack([torch.randperm(len(x), generator=generator) for generator in generators])
        chosen = order[:, place * size : (place + 1) * size].repeat(copies, 1)
        yield x[chosen], y[chosen]
