# SPDX-License-Identifier: MIT
"""GenNAS: score a neural architecture without labels, by how well it regresses synthetic signals after a few steps.

Li, Hao, Li, Xiong, Chen: Generic Neural Architecture Search via Regression (NeurIPS 2021, arXiv 2108.01899).

In the order in which it runs: signal bases; the task, which mix of signals a network's three stages must reproduce;
images; the regression, whose losses make the score; regularized evolution of architectures; of tasks, with the weights
of their losses; rank correlation. That is the method. Below the banner stands what it takes to run it, as `python
gennas.py --space nb201`, or --help; there the method's limits, generators and checks of a task are too, and the tasks.
"""
from __future__ import annotations

import os
import signal as os_signal

if __name__ == "__main__" and os_signal.getsignal(os_signal.SIGINT) != os_signal.SIG_IGN:
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_DFL)  # while torch is loaded Ctrl-C ends it without a traceback

import argparse
import hashlib
import itertools
import json
import math
import pickletools
import random
import reprlib
import sys
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import lru_cache
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

try:
    import search_spaces
except ModuleNotFoundError as error:  # a copy of this file alone scores any object that has a search space's methods
    if error.name != "search_spaces":
        raise
    search_spaces = None
try:
    import fcntl
except ImportError:  # not on Windows: there a record is not guarded against a second writer
    fcntl = None


def seed_of(*purpose: Any) -> int:
    """A seed that depends on what it is for and on nothing else: not on order, process or machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(purpose).encode()).digest()[:4], "big")


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


# ----------------------------------------------------------------------------------------- signal bases (paper, 3.2)
# Each returns C maps for each of B images, a tensor (B, C, H, W), drawn from the generator `rng` (a CPU one, so that
# all devices regress the same signals). Positions count from 1 along both axes.
Shape = tuple[int, int, int, int]
MAPS_PER_WAVE = 32


def sin1d(rng: torch.Generator, shape: Shape, frequencies: Iterable[float]) -> Tensor:
    """Waves sin(2 pi f y + phi) and sin(2 pi f x + phi)."""
    f = torch.tensor(tuple(frequencies))
    return sinusoids(rng, shape, torch.cat([f, 0 * f]), torch.cat([0 * f, f]))


def sin2d(rng: torch.Generator, shape: Shape, frequencies: Iterable[float]) -> Tensor:
    """Waves sin(2 pi f y + 2 pi g x + phi) and their mirror images in y, for all ordered pairs f, g of frequencies."""
    f, g = torch.cartesian_prod(*[torch.tensor(tuple(frequencies))] * 2).T
    return sinusoids(rng, shape, torch.cat([f, -f]), torch.cat([g, g]))


def sinusoids(rng: torch.Generator, shape: Shape, fy: Tensor, fx: Tensor) -> Tensor:
    """C of the maps sin(2 pi (fy y + fx x) + phi), an image's maps of each wave (fy, fx) at most 32.

    A cosine is a sine with another phase; as phi ~ U(0, 2 pi), the authors' half sines and half cosines are all sines.
    """
    B, C, H, W = shape
    maps = torch.rand(B, len(fy) * MAPS_PER_WAVE, generator=rng).topk(C).indices  # (B, C)
    wave = (maps // MAPS_PER_WAVE)[..., None, None]
    phase = 2 * math.pi * torch.rand(B, C, 1, 1, generator=rng)
    y, x = torch.arange(1, H + 1)[:, None], torch.arange(1, W + 1)
    return torch.sin(2 * math.pi * (fy[wave] * y + fx[wave] * x) + phase)


def dot(rng: torch.Generator, shape: Shape, density: float, least: int = 0) -> Tensor:
    """floor(density H W) positions, at least `least`, are +1 or -1; the others 0."""
    B, C, H, W = shape
    dots = max(least, math.floor(density * H * W))
    shuffled = torch.rand(B, C, H * W, generator=rng).argsort(-1)
    signs = 2 * torch.randint(0, 2, (B, C, H * W), generator=rng) - 1
    return torch.where(shuffled < dots, signs, 0).float().view(shape)


def gdot(rng: torch.Generator, shape: Shape, density: float) -> Tensor:
    """Dots smoothed by a gaussian of sigma 1, divided by the map's largest absolute value."""
    smooth = blur_matrix(shape[2]) @ dot(rng, shape, density, least=1) @ blur_matrix(shape[3]).T
    return smooth / smooth.abs().amax((2, 3), keepdim=True)


def blur_matrix(size: int, radius: int = 4) -> Tensor:
    """(size, size): convolution with a gaussian of sigma 1, cut at `radius`, the border mirrored, its edge repeated."""
    gaussian = np.exp(-np.arange(-radius, radius + 1) ** 2 / 2)
    mirrored = np.pad(np.eye(size), ((radius, radius), (0, 0)), mode="symmetric")
    rows = np.lib.stride_tricks.sliding_window_view(mirrored, 2 * radius + 1, axis=0)  # (size, size, taps)
    return torch.from_numpy(rows @ (gaussian / gaussian.sum())).float()


def resize(rng: torch.Generator, shape: Shape, images: Tensor) -> Tensor:
    """The images (B, 3, h, w) themselves, made H x W and scaled to [-1, 1] as a whole; each map one random colour."""
    small = F.interpolate(images, size=shape[2:])
    low, high = small.aminmax()
    if low == high:
        raise ValueError("resize: made small, the images are the same everywhere")
    return (2 * (small - low) / (high - low) - 1)[:, torch.randint(0, 3, (shape[1],), generator=rng)]


# basis -> its function, and the fields that a signal of it has besides its level
BASES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "sin1d": (sin1d, ("frequencies", "per_sample")),
    "sin2d": (sin2d, ("frequencies", "per_sample")),
    "dot": (dot, ("density", "per_sample")),
    "gdot": (gdot, ("density", "per_sample")),
    "resize": (resize, ()),
}


# -------------------------------------------------------------------------------------------------- task (paper, 3.3)
class Checked:
    """A part of a task; ValueError, as it is made, names a field that is out of its range."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Signal(Checked):
    """`level` (0 to 10) times maps of a basis.

    per_sample: whether each image has maps of its own or all share the same; not of resize. frequencies: of sin1d and
    sin2d, 10 in cycles per position, above 0 and below 0.5. density: of dot and gdot, the share of positions, 0 to 1.
    """
    basis: str
    level: float
    per_sample: bool | None = None  # None: a field that the basis does not have
    frequencies: tuple[float, ...] | None = None
    density: float | None = None

    def maps(self, shape: Shape, images: Tensor | None, *purpose: Any) -> Tensor:
        """Before the level, (B, C, H, W), or (1, C, H, W) if all images share them; from a generator that the basis and
        the purpose seed, so that no other signal matters."""
        rng = torch.Generator().manual_seed(seed_of(*purpose, self.basis))
        if self.basis == "resize":
            return resize(rng, shape, images)
        draw, (own, _) = BASES[self.basis]
        return draw(rng, shape if self.per_sample else (1, *shape[1:]), getattr(self, own))


@dataclass(frozen=True)
class Noise(Checked):
    """What is added to the input in every pass: "uniform" in [-level, level], "gaussian" times the level (0 to 10)."""
    kind: str
    level: float


@dataclass(frozen=True)
class Stage(Checked):
    """What the maps of one tap must become: `channels` (1 to 640) sums of signals, each basis at most once."""
    channels: int
    signals: tuple[Signal, ...]


Parts = dict[str, tuple[tuple[Signal, ...], Shape]]  # name of a tensor -> the signals that it sums, and its shape


@dataclass(frozen=True)
class Weight(Checked):
    """A summand of a score: `weight` times what `term` names (see `terms`). The paper's score, and the default, is
    PAPER: the loss after the last step and no other term."""
    term: str
    weight: float


class AnyTask(Checked):
    """What the tasks of CNNs and of recurrent networks, which say what `parts` they have, share."""

    def unweighted(self) -> AnyTask:
        """The same signals with the paper's weights: what a network is trained on does not depend on the weights."""
        return replace(self, weights=PAPER)

    def draw(self, images: Tensor | None, seed: int, batch: int = 16, size: int = 8) -> list[Tensor]:
        """The tensors (B, C, H, W) of all parts, from (task, images, seed) alone: sums of level * maps."""
        return [sum((signal.level * signal.maps(shape, images, name, seed) for signal in signals), torch.zeros(shape))
                for name, (signals, shape) in self.parts(batch, size).items()]

    def to_json(self) -> str:
        return json.dumps(asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None}))

    def digest(self) -> str:
        """What names the task in a record: equal tasks have equal digests, a level may be 1 or 1.0."""
        numbers = dict.fromkeys(("parse_int", "parse_float"), lambda text: float(text) + 0.0)  # -0.0 is 0.0 too
        return digest_of(json.dumps(json.loads(self.to_json(), **numbers)).encode())


@dataclass(frozen=True)
class Task(AnyTask):
    """What a CNN must regress at its three taps, the noise on its input, and how its losses become the score."""
    noise: Noise
    stages: tuple[Stage, ...]
    weights: tuple[Weight, ...] = field(default_factory=lambda: PAPER)

    def parts(self, batch: int, size: int) -> Parts:
        return {f"target {number}": (stage.signals, (batch, stage.channels, size, size))
                for number, stage in enumerate(self.stages, start=1)}


@dataclass(frozen=True)
class RnnTask(AnyTask):
    """What a recurrent network must make of what: sequences of `dimension` numbers, each one map, y its time and x its
    feature."""
    noise: Noise
    dimension: int
    input: tuple[Signal, ...]
    target: tuple[Signal, ...]
    weights: tuple[Weight, ...] = field(default_factory=lambda: PAPER)

    def parts(self, batch: int, size: int) -> Parts:
        return {name: (getattr(self, name), (batch, 1, size, self.dimension)) for name in ("input", "target")}


# --------------------------------------------------------------------------------------- space of tasks (paper, 3.4)
WIDTHS = range(16, 97, 16)  # channels of a stage, numbers of a sequence
# field of a signal -> its draw; rounded, so that a task is what its JSON says
DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "frequencies": lambda rng: band(rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng),
    "density": lambda rng: round(rng.random(), 4),
    "per_sample": lambda rng: rng.random() < 0.5,
}


def band(low: float, high: float, rng: random.Random) -> tuple[float, ...]:
    return tuple(min(max(round(rng.uniform(low, high), 4), 0.0001), 0.4999) for _ in range(10))


def random_signals(rng: random.Random, bases: Iterable[str], **fixed: Any) -> tuple[Signal, ...]:
    """Each basis with chance 1/2, of any level and form; `fixed` are fields that are not drawn."""
    return tuple(Signal(basis, rng.randint(5, 29) / 10, **{name: DRAWS[name](rng) for name in BASES[basis][1]} | fixed)
                 for basis in bases if rng.random() < 0.5)


def random_task(rng: random.Random, kind: type[AnyTask]) -> AnyTask:
    """A draw from the space of tasks of a kind, Task or RnnTask."""
    noise = Noise(rng.choice(("gaussian", "uniform")), rng.randint(0, 9) / 10)
    if kind is Task:
        return Task(noise, tuple(Stage(rng.choice(WIDTHS), random_signals(rng, BASES)) for _ in range(3)))
    bases = [basis for basis in BASES if basis != "resize"]
    return RnnTask(noise, rng.choice(WIDTHS), *[random_signals(rng, bases, per_sample=True) for _ in range(2)])


def mutate_task(task: AnyTask, rng: random.Random) -> AnyTask:
    """Another task: with chance 0.2 each, the noise, a stage's channels and the signal of a basis are drawn again. Its
    weights are the paper's."""
    other = random_task(rng, type(task))

    def pick(old: Any, new: Any) -> Any:
        return new if rng.random() < 0.2 else old

    def pick_signals(old: tuple[Signal, ...], new: tuple[Signal, ...]) -> tuple[Signal, ...]:
        olds, news = ({signal.basis: signal for signal in signals} for signals in (old, new))
        picked = [pick(olds.get(basis), news.get(basis)) for basis in BASES]
        return tuple(signal for signal in picked if signal)

    noise = pick(task.noise, other.noise)
    if isinstance(task, Task):
        child = Task(noise, tuple(Stage(pick(a.channels, b.channels), pick_signals(a.signals, b.signals))
                                  for a, b in zip(task.stages, other.stages)))
    else:
        child = RnnTask(noise, pick(task.dimension, other.dimension), pick_signals(task.input, other.input),
                        pick_signals(task.target, other.target))
    return child if child != task.unweighted() else mutate_task(task, rng)


# ----------------------------------------------------------------------------------------------------------- images
def synthetic_images(rng: torch.Generator, batch: int) -> Tensor:
    """(B, 3, 32, 32): noise with the 1/f spectrum of natural images, 0.9 of its variance common to the colours."""
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).clamp(min=1 / 32)  # (32, 17)
    maps = torch.fft.irfft2(torch.fft.rfft2(torch.randn(batch, 4, 32, 32, generator=rng)) / frequency)
    return 0.9 ** 0.5 * maps[:, :1] + 0.1 ** 0.5 * maps[:, 1:]


def normalise(images: Tensor, statistics: Any = None) -> Tensor:
    """(B, 3, H, W) in [0, 1] less the channel means, over the standard deviations; by default those of the images."""
    if statistics:
        mean, std = torch.tensor(statistics)[:, :, None, None] / 255
    else:
        std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    if not std.min() > 0:
        raise ValueError("a colour channel is the same everywhere")
    return (images - mean) / std


def resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side): larger by nearest, smaller without aliasing."""
    smaller = side < max(images.shape[2:])
    return F.interpolate(images, size=side, mode="bilinear" if smaller else "nearest", antialias=smaller)


# ------------------------------------------------------------------------------------------ regression (paper, 3.1)
@dataclass(frozen=True)
class Settings:
    """How a network is trained. The defaults are the paper's, but for the learning rate of recurrent networks."""
    steps: int = 100
    learning_rate: float = 0.1  # constant
    momentum: float = 0.9
    weight_decay: float = 4e-5  # on parameters of more than one dimension
    rnn_learning_rate: float = 1e-3  # of the benchmark's own records
    rnn_weight_decay: float = 1.2e-6  # on all parameters
    stage_weights: tuple[float, ...] = (0.25, 0.5, 1.0)  # of the stages in the loss; one of weight 0 gets no loss
    batch: int = 16  # images or sequences
    side: int = 32  # of the images
    size: int = 8  # side of the targets, length of the sequences
    ridge: float | None = None  # the penalty of solved heads; None: the heads are trained, as the network is


class Trained(NamedTuple):
    """What the training of a network gives."""
    loss: float  # after the last step, weighted over the stages
    losses: list[list[float]]  # (steps + 1, stages): before each step and, in eval() mode, after the last; NaN: none
    params: int  # of the network that was trained, which may be smaller than the benchmark's; without heads


MOMENTS = 0.0, 0.25, 0.5, 1.0  # a score may read the losses after these shares of the steps; of 2, .25 is one too
TERMS = "loss", "log params", *(f"log loss {stage} at {moment:g}" for moment in MOMENTS for stage in (1, 2, 3))


def terms(trained: Trained) -> dict[str, float]:
    """What a score may be made of: the loss, the log of the parameter count, that of each stage's loss at MOMENTS."""
    steps, values = len(trained.losses) - 1, {"loss": trained.loss, "log params": math.log(max(trained.params, 1))}
    for moment in MOMENTS:
        for stage, loss in enumerate(trained.losses[math.floor(moment * steps + 0.5)], start=1):
            if loss is not None and math.isfinite(loss):
                values[f"log loss {stage} at {moment:g}"] = math.log(loss + 1e-9)  # of a stage without signals it is 0
    return values


def score(weights: Iterable[Weight], trained: Trained) -> float:
    """Lower is better; infinite for a network that diverged. A term that the training does not have, as of a stage
    without a loss, counts 0; ValueError if it has none of them."""
    if diverged(trained):
        return math.inf
    values = terms(trained)
    summands = [each.weight * values[each.term] for each in weights if each.term in values]
    if not summands:
        raise ValueError(f"weights: expected some of {', '.join(values)}")
    return sum(summands)


def diverged(trained: Trained) -> bool:
    return trained.loss is None or not math.isfinite(trained.loss)


def rows(x: Tensor) -> Tensor:
    """Maps (B, C, H, W) -> (B H W, C), a row for each position; sequences (B, T, C) -> (B T, C)."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(0, -2)


def ridge_loss(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """The mean squared error of the linear head that is best for these features, and its penalty: the minimum over W of
    mean((F W - Y)^2) + ridge |W|^2 / T, for features F (N, C), standardised here, and a target Y (N, T) of mean 0.

    W = (F'F + ridge N I)^-1 F'Y = F'(FF' + ridge N I)^-1 Y, solved for in the smaller form. Its dependence on F adds
    nothing to the gradient, for it is the minimum (variable projection: Golub and Pereyra, 1973).
    """
    features = F.batch_norm(features, None, None, training=True)
    n, channels = features.shape
    with torch.no_grad():
        wide = channels > n
        gram = features @ features.T if wide else features.T @ features
        gram.diagonal().add_(ridge * n)
        factor = torch.linalg.cholesky_ex(gram).L  # unlike `cholesky` and `cholesky_solve`, these let no host wait
        head = torch.linalg.solve_triangular(factor, target if wide else features.T @ target, upper=False)
        head = torch.linalg.solve_triangular(factor.T, head, upper=True)
        head = features.T @ head if wide else head
    return F.mse_loss(features @ head, target) + ridge * head.square().sum() / target.shape[1]


def check_taps(taps: list, targets: list) -> None:
    if len(taps) != len(targets):
        raise ValueError(f"expected {len(targets)} feature maps, one for each target, not {len(taps)}")


class TrainedHeads(nn.Module):
    """A network's three taps, each resized and sent through batch norm and a 1x1 convolution to a target's channels."""

    def __init__(self, body: nn.Module, images: Tensor, targets: list[Tensor]):
        super().__init__()
        self.body, self.size = body, targets[0].shape[2:]
        with torch.no_grad():  # of two images, because some batch norms use the batch's own statistics in eval() too
            widths = [tap.shape[1] for tap in body.eval()(images[:2])]
        check_taps(widths, targets)
        self.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, target.shape[1], 1))
                                   for width, target in zip(widths, targets))

    def forward(self, images: Tensor) -> list[Tensor]:  # (B, 3, H, W) -> three (B, C, size, size)
        return [head(F.interpolate(tap, size=self.size)) for head, tap in zip(self.heads, self.body(images))]


class Encoder(nn.Module):
    """A recurrent network behind a linear encoder; with a linear decoder, if that is trained too."""

    def __init__(self, body: nn.Module, dimension: int, decoder: bool):
        super().__init__()
        self.body = body
        self.encoder = nn.Linear(dimension, body.width)
        self.decoder = nn.Linear(body.width, dimension) if decoder else nn.Identity()
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        if decoder:
            nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
            nn.init.zeros_(self.decoder.bias)

    def forward(self, sequences: Tensor) -> list[Tensor]:  # (B, T, D) -> one (B, T, D), without decoder (B, T, width)
        return [self.decoder(self.body(self.encoder(sequences)))]


class Regression:
    """The regression of one task on one batch of images, the same targets for every architecture (paper, 3.1).

    `regression(space, arch)` trains the network and returns its losses at all steps and, last, in eval() mode after
    them; `score(task.weights, trained)` is the score, by default the last loss. It is a pure function of (space,
    space.key(arch), task, images, settings, seed) and the kind of device: weights, noise and dropout are seeded by
    space, key and seed, and the state of the global generators is put back. `images`: as `load_images` gives them, the
    first settings.batch are taken and made settings.side pixels wide; None for a recurrent task, whose input is a
    signal.

    The paper trains a linear head on each tap along with the network. With settings.ridge the heads are solved for
    instead, exactly and at every step, and only the network is trained: the loss tells from the first step on what the
    features are good for, not how far the heads have come. Then batch norm is by the batch at hand throughout.
    """
    def __init__(self, task: AnyTask, images: Tensor | None, settings: Settings = Settings(), seed: int = 0,
                 device: str | torch.device = "cpu"):
        self.task, self.settings, self.seed, self.device = task, settings, seed, torch.device(device)
        if images is not None:
            images = resized(images[:settings.batch], settings.side)
        drawn = task.draw(images, seed, settings.batch, settings.size)
        tensors = [x[:, 0] for x in drawn] if isinstance(task, RnnTask) else [images, *drawn]
        self.inputs, *self.targets = map(self.place, tensors)
        self.solved_for: dict[tuple[int, ...], Tensor] = {}  # stage, sides of its tap -> rows of the target, mean 0
        self.weights = settings.stage_weights[-len(self.targets):]  # a recurrent network has one stage, the last
        self.counting = [stage for stage, weight in enumerate(self.weights) if weight]
        self.counting_weights = torch.tensor(self.weights, device=self.device)[self.counting]

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device, memory_format=torch.channels_last if x.ndim == 4 else torch.preserve_format)

    def __call__(self, space: Any, arch: Any) -> Trained:
        purpose = getattr(space, "name", type(space).__name__), space.key(arch), self.seed
        with generators_kept(self.device):
            seed_generators(self.device, seed_of("weights", *purpose))
            body = space.build(arch)  # on the CPU: equal weights on all devices
            network = self.with_heads(body)
            params = sum(parameter.numel() for parameter in body.parameters())
            network = network.to(self.device, memory_format=torch.channels_last).train()
            optimizer = self.optimizer(network)
            seed_generators(self.device, seed_of("noise", *purpose))
            losses = []  # stay on the device until the end: no step waits for it
            for _ in range(self.settings.steps):
                stages = self.stage_losses(network)
                loss = self.counting_weights @ stages
                if loss.requires_grad:  # a dead network learns nothing
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                losses.append(stages.detach())
            network.eval()
            with torch.no_grad():
                losses.append(self.stage_losses(network))
            losses = torch.stack(losses)
            *_, loss = (losses @ self.counting_weights).tolist()
            table = torch.full((len(losses), len(self.weights)), math.nan)
            table[:, self.counting] = losses.cpu()
            return Trained(loss, table.tolist(), params)

    def with_heads(self, body: nn.Module) -> nn.Module:
        """The network as it is trained, its weights drawn by the global generator."""
        trained = self.settings.ridge is None
        if isinstance(self.task, RnnTask):
            return Encoder(body, self.task.dimension, decoder=trained)
        if trained:
            return TrainedHeads(body, self.inputs.cpu(), self.targets)
        torch.func.replace_all_batch_norm_modules_(body)  # by those without running statistics
        return body

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        settings, fused = self.settings, self.device.type != "mps"  # there it needs a new torch
        if isinstance(self.task, RnnTask):
            return torch.optim.Adam(network.parameters(), settings.rnn_learning_rate, fused=fused,
                                    weight_decay=settings.rnn_weight_decay)
        matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == big] for big in (True, False))
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors}]
        return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, fused=fused)

    def stage_losses(self, network: nn.Module) -> Tensor:
        """Of each tap whose loss counts, on the inputs with fresh noise."""
        outputs = network(self.inputs + self.noise())
        check_taps(outputs, self.targets)
        if self.settings.ridge is None:
            return torch.stack([F.mse_loss(outputs[stage], self.targets[stage]) for stage in self.counting])
        return torch.stack([self.solved_loss(stage, outputs[stage]) for stage in self.counting])

    def solved_loss(self, stage: int, features: Tensor) -> Tensor:
        """A tap larger than the target is resized. A smaller one is compared with the target's means over its pixels,
        as no head can tell the rest; so taps should have the same size for all architectures."""
        target = self.targets[stage]
        if target.ndim == 4 and features.shape[2] > target.shape[2]:
            features = F.interpolate(features, size=target.shape[2:])
        sides = stage, *features.shape[2:]
        if sides not in self.solved_for:
            maps = target.cpu()  # not all devices have this pool for all sizes
            wanted = rows(F.adaptive_avg_pool2d(maps, features.shape[2:]) if maps.ndim == 4 else maps)
            self.solved_for[sides] = (wanted - wanted.mean(0)).to(self.device)
        return ridge_loss(rows(features), self.solved_for[sides], self.settings.ridge)

    def noise(self) -> Tensor:
        noise, drawn = self.task.noise, torch.empty_like(self.inputs)
        return (drawn.uniform_(-1, 1) if noise.kind == "uniform" else drawn.normal_()).mul_(noise.level)


# ------------------------------------------------------------------------------------- regularized evolution (aging)
def regularized_evolution(draw: Callable, mutate: Callable, evaluate: Callable[[list], list[float]], rng: random.Random,
                          population: int = 50, tournament: int = 10, cycles: int = 400, batch: int = 1,
                          ) -> list[tuple[Any, float]]:
    """Aging evolution (Real et al., AAAI 2019): all (candidate, loss) in the order in which they were evaluated.

    `draw(rng)` gives a candidate, `mutate(candidate, rng)` a neighbour, `evaluate` a list's losses, lower is better.
    The queue starts with `population` drawn candidates; then, `cycles` times, the best of `tournament` of its members,
    drawn without replacement, is mutated, and the child takes the place of the oldest. `batch` children are made from
    the same queue before they enter it.
    """
    queue: deque[tuple[Any, float]] = deque(maxlen=population)  # appending to a full one drops its oldest
    history: list[tuple[Any, float]] = []

    def append(candidates: list[Any]) -> None:
        scored = list(zip(candidates, evaluate(candidates)))
        queue.extend(scored)
        history.extend(scored)

    append([draw(rng) for _ in range(population)])
    while (left := population + cycles - len(history)) > 0:
        parents = [min(rng.sample(queue, tournament), key=lambda pair: pair[1]) for _ in range(min(batch, left))]
        append([mutate(parent, rng) for parent, _ in parents])
    return history


def search(space: Any, evaluate: Callable[[list], list[float]], seed: int, limits: dict[str, int | None],
           **evolution: int) -> list[tuple[Any, float]]:
    """All (arch, loss) of a search of architectures (paper, 3.1), `evaluate` giving the losses of a list of them; among
    those within `limits`, {"params": most, "flops": most} of the benchmark's own network. ValueError if few are."""
    draw, mutate = within_limits((space.random, space.mutate), space, limits)
    return regularized_evolution(draw, mutate, evaluate, random.Random(seed), **evolution)


# ----------------------------------------------------------- weights of a score; search of tasks (paper, 3.3 and 3.4)
Labelled = list[tuple[Trained, float]]  # networks of a space, trained on one task, and their labels
PRIOR = 20  # the penalty of the ridge regression, a constant: it fades as labels come
REACH = 4  # typical deviations from the median of a space
FOLDS = 10


def fit_weights(spaces: list[Labelled]) -> tuple[Weight, ...]:
    """Weights that rank labelled networks of one or several spaces as their labels do (not in the paper).

    A ridge regression of the ranks within each space on the terms, in closed form. The loss is free, the other terms
    are drawn to 0 by PRIOR, so that few labels leave mostly the loss. In the fit a term reaches no further than REACH
    typical (median absolute) deviations from the median of its space, or the few networks that hardly train would
    decide the weights of all others. PAPER where less than three networks did not diverge, or all are equal.
    """
    deviations, wanted = [], []  # for each space: (n, terms), from their medians there; (n,), standardised ranks
    for space in spaces:
        known = [(terms(trained), value) for trained, value in space if not diverged(trained)]
        if len(known) < 3 or len({value for _, value in known}) == 1:
            continue
        x = np.array([[table.get(name, math.nan) for name in TERMS] for table, _ in known])
        absent = np.isnan(x).all(0)  # a stage that has no loss in this space
        deviations.append(x - np.nanmedian(np.where(absent, 0, x), 0))
        rank = ranks([-value for _, value in known])
        wanted.append((rank - rank.mean()) / rank.std())
    if not wanted:
        return PAPER
    everywhere = np.ma.masked_invalid(np.concatenate(deviations))
    typical = np.ma.median(abs(everywhere), 0).filled(0)
    typical = np.where(typical > 1e-5, typical, everywhere.std(0).filled(0))  # where most are equal
    varied = typical > 1e-5
    if not varied.any():
        return PAPER
    names, typical = np.array(TERMS)[varied], typical[varied]
    z = [np.nan_to_num(np.clip(x[:, varied] / typical, -REACH, REACH)) for x in deviations]
    shares = [math.sqrt(len(everywhere) / len(z) / len(x)) for x in z]  # all spaces count the same
    z = np.concatenate([(x - x.mean(0)) * share for x, share in zip(z, shares)])
    target = np.concatenate([rank * share for rank, share in zip(wanted, shares)])
    penalty = np.diag(np.where(names == "loss", 1e-6, PRIOR))  # not quite 0: the matrix must be regular
    weights = np.linalg.solve(z.T @ z + penalty, z.T @ target) / typical
    return tuple(Weight(str(name), float(f"{weight:.6g}")) for name, weight in zip(names, weights))


def mean_rho(scores: list[list[float]], spaces: list[Labelled]) -> float:
    """Over the spaces, of their rho of -score with the labels; one that is undefined counts as 0."""
    rhos = [spearman([-x for x in row], [value for _, value in space]) for row, space in zip(scores, spaces)]
    return float(np.mean(np.nan_to_num(rhos)))


def judge(spaces: list[Labelled], folds: list[list[int]]) -> tuple[float, tuple[Weight, ...]]:
    """The merit of a task, mean rho over the spaces, and the weights that give it: the paper's, or, if they rank
    better, fitted ones.

    The merit of fitted weights is found by cross-validation: `folds` gives each network of each space the number of
    its fold, and its score is by weights that were fitted on all other folds, less the mean score of these: the level
    of a score differs between fits.
    """
    merit = mean_rho([[score(PAPER, trained) for trained, _ in space] for space in spaces], spaces)
    scores = [[math.inf] * len(space) for space in spaces]
    for fold in set(itertools.chain(*folds)):
        others = [[pair for pair, own in zip(space, row) if own != fold] for space, row in zip(spaces, folds)]
        fitted = fit_weights(others)
        for space, row, rest, found in zip(spaces, folds, others, scores):
            level = np.mean([score(fitted, trained) for trained, _ in rest if not diverged(trained)] or [0.0])
            for place, (trained, _) in enumerate(space):
                if row[place] == fold:
                    found[place] = score(fitted, trained) - level
    by_fitted = mean_rho(scores, spaces)
    return (by_fitted, fit_weights(spaces)) if by_fitted > merit else (merit, PAPER)


def search_task(draw: Callable, assess: Callable[[list[AnyTask]], list[tuple[float, tuple[Weight, ...]]]],
                seed: int = 0, **evolution: int) -> tuple[AnyTask, float, list[tuple[AnyTask, float]]]:
    """Regularized evolution over tasks (paper, 3.4): the best task, its merit, and all (task, -merit). `draw(rng)`
    gives a task of the first population, `assess(tasks)` for each its merit and the weights that give it.

    The paper's merit is |rho| of the loss. But a task that ranks backwards would count as a good one while an
    architecture search minimises its loss; a fitted weight, which may be negative, makes use of such a task.
    """
    assessed: dict[AnyTask, tuple[float, tuple[Weight, ...]]] = {}

    def evaluate(tasks: list[AnyTask]) -> list[float]:
        assessed.update(zip(tasks, assess(tasks)))
        return [-assessed[task][0] for task in tasks]

    history = regularized_evolution(draw, mutate_task, evaluate, random.Random(seed), **evolution)
    best, loss = min(history, key=lambda pair: pair[1])
    return replace(best, weights=assessed[best][1]), -loss, history


# ------------------------------------------------------------------------------------------------- rank correlation
def ranks(values: Any) -> np.ndarray:
    """Ranks from 1 up; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: Any, b: Any) -> float:
    """Spearman's rho; NaN where one side is all ties."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def kendall(a: Any, b: Any) -> float:
    """Kendall's tau-b; NaN where one side is all ties."""
    a, b = ranks(a), ranks(b)

    def pairs(x: np.ndarray, y: np.ndarray) -> float:
        """Those in the same order less those in reverse order."""
        return sum(np.sign(x - u) @ np.sign(y - v) for u, v in zip(x, y))

    untied = pairs(a, a) * pairs(b, b)
    return float(pairs(a, b) / math.sqrt(untied)) if untied else math.nan


LEAST = 10  # networks for an interval: the bootstrap of a few knows nothing of the others


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, resamples: int = 2000) -> tuple[float, float]:
    """The 95% percentile interval of statistic(places), places 0 to n - 1 drawn with replacement; NaN for n < LEAST."""
    if n < LEAST:
        return math.nan, math.nan
    drawn = [statistic(places) for places in np.random.default_rng(0).integers(n, size=(resamples, n))]
    low, high = np.nanquantile(drawn, (0.025, 0.975)) if not np.isnan(drawn).all() else (math.nan, math.nan)
    return float(low), float(high)


def spearman_interval(a: Any, b: Any) -> tuple[float, float]:
    """The 95% interval of Spearman's rho of a with b."""
    a, b = np.asarray(a), np.asarray(b)
    return bootstrap(lambda places: spearman(a[places], b[places]), len(a))


def spearman_difference(a: Any, b: Any, values: Any) -> tuple[float, float, float]:
    """Rho of a with the values less rho of b with them, and its 95% interval: scores a and b of the same networks,
    drawn in pairs, so that what both owe to the networks at hand cancels."""
    a, b, values = map(np.asarray, (a, b, values))

    def difference(places: Any) -> float:
        return spearman(a[places], values[places]) - spearman(b[places], values[places])

    return difference(slice(None)), *bootstrap(difference, len(values))


# ===================================================================================================================
# What stands above is the method. What follows runs it: the authors' tasks, images and tasks from files, the record of
# scores and the progress, the processes that share the work, pictures, the command line with its modes.
# ===================================================================================================================


# ------------------------------------------------------------------------ tasks: what is expected of them, files, names
def is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def are(kind: type | tuple[type, ...], value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, kind) for item in value)


def are_signals(value: Any) -> bool:
    return are(Signal, value) and len({signal.basis for signal in value}) == len(value)


MAX_CHANNELS = 2 * 10 * MAPS_PER_WAVE  # sin1d has this many maps to draw from
# field of a part of a task -> what is expected, in words and as a test
EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "noise": ("an object with kind and level", lambda v: isinstance(v, Noise)),
    "kind": ("uniform or gaussian", lambda v: v in ("uniform", "gaussian")),
    "level": ("a number from 0 to 10", lambda v: is_number(v, 0, 10)),
    "stages": ("a list of three objects", lambda v: are(Stage, v) and len(v) == 3),
    "channels": (f"a whole number from 1 to {MAX_CHANNELS}", lambda v: type(v) is int and 1 <= v <= MAX_CHANNELS),
    "signals": ("a list of signals, each basis at most once", are_signals),
    "basis": (f"one of {', '.join(BASES)}", lambda v: isinstance(v, str) and v in BASES),
    "per_sample": ("true or false", lambda v: isinstance(v, bool)),
    "frequencies": ("10 numbers above 0 and below 0.5", lambda v: are((int, float), v) and len(v) == 10
                    and all(is_number(f, 0, 0.5) and f not in (0, 0.5) for f in v)),
    "density": ("a number from 0 to 1", lambda v: is_number(v, 0, 1)),
    "weights": ("a list of objects with term and weight", lambda v: are(Weight, v) and len(v) > 0),
    "term": (f"one of {', '.join(TERMS)}", lambda v: isinstance(v, str) and v in TERMS),
    "weight": ("a number from -1e9 to 1e9", lambda v: is_number(v, -1e9, 1e9)),
    "dimension": ("a whole number from 1 to 1024", lambda v: type(v) is int and 1 <= v <= 1024),
    **dict.fromkeys(("input", "target"), ("a list of signals with per_sample true, each basis at most once",
                                          lambda v: are_signals(v) and all(signal.per_sample for signal in v))),
}
PARTS_OF = {"noise": Noise, "stages": Stage, "signals": Signal, "input": Signal, "target": Signal,  # what a field holds
            "weights": Weight}


def check_fields(part: Any) -> None:
    """ValueError unless each field is as EXPECTED, and a signal has the fields that its basis needs and no others."""
    for name, default in ((each.name, each.default) for each in fields(part)):
        value, (words, is_right) = getattr(part, name), EXPECTED[name]
        if isinstance(part, Signal) and default is None and name not in BASES[part.basis][1]:
            words, is_right = f"none in a {part.basis}", lambda v: v is None
        if not is_right(value):
            raise ValueError(f"{name}: expected {words}, not {reprlib.repr(value)}")


def part_from(data: Any, kind: type | None, where: str) -> Any:
    """A part of a task, a number or a string from what JSON has for it; ValueError names the place of a mistake."""
    if isinstance(data, list):
        return tuple(part_from(item, kind, f"{where}[{number}]") for number, item in enumerate(data))
    if kind is None:
        return data
    names = [each.name for each in fields(kind)]
    needed = {each.name for each in fields(kind) if each.default is each.default_factory is MISSING}
    if not isinstance(data, dict) or not needed <= data.keys() <= set(names):
        raise ValueError(f"{where}: expected an object with {', '.join(names)}, not {reprlib.repr(data)}")
    values = {name: part_from(value, PARTS_OF.get(name), f"{where}.{name}") for name, value in data.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}.{error}") from None


def task_from_json(text: str) -> AnyTask:
    """A Task or a RnnTask, as `to_json` writes it. ValueError names a field that is absent, unknown or out of range."""
    try:
        data = json.loads(text)
        if isinstance(data, list):
            raise ValueError(f"task: expected an object, not {reprlib.repr(data)}")
        return part_from(data, RnnTask if isinstance(data, dict) and "dimension" in data else Task, "task")
    except json.JSONDecodeError as error:
        raise ValueError(f"task: not JSON ({error})") from None
    except RecursionError:
        raise ValueError("task: nested too deeply") from None


def read_task(name: str) -> AnyTask:
    """A task of TASKS by its name, or one from a JSON file."""
    if name in TASKS:
        return TASKS[name]
    if not str(name).endswith(".json"):
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASKS)} or a FILE.json")
    try:
        return task_from_json(Path(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


PAPER = (Weight("loss", 1.0),)
# The authors' tasks. combo, nlp-combo and nlp-single are made by hand, the others are what their task search found on
# the space of that name.
MEDIUM = (.125, .15, .175, .2, .225, .25, .275, .3, .325, .35)
HIGH = (.375, .3875, .4, .4125, .425, .4375, .45, .4625, .475, .4875)
TASKS: dict[str, AnyTask] = {
    "combo": Task(Noise("gaussian", 0.0), (
        Stage(64, (
            Signal("sin1d", 1.0, True, HIGH), Signal("sin2d", 1.0, True, HIGH),
            Signal("dot", 1.0, True, density=1.0))),
        Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("sin2d", 1.0, True, MEDIUM), Signal("resize", 1.0))),
        Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("dot", 1.0, True, density=1.0), Signal("resize", 1.0))),
    )),
    "nb101": Task(Noise("uniform", 0.1), (
        Stage(64, (
            Signal("sin2d", 1.1, True, (.0143, .0169, .0149, .0204, .0229, .0172, .0156, .0192, .0155, .0146)),)),
        Stage(48, (
            Signal("sin1d", 1.8, True, (.2991, .306, .3038, .288, .2934, .2961, .3059, .2929, .3056, .2959)),
            Signal("sin2d", 2.9, True, (.3798, .3818, .3583, .3276, .2649, .2808, .4205, .3414, .3036, .4203)),
            Signal("gdot", 1.1, True, density=0.578125), Signal("resize", 2.4))),
        Stage(16, (
            Signal("sin1d", 1.5, False, (.1539, .1057, .1066, .1576, .1337, .1051, .1319, .1318, .1028, .1094)),
            Signal("sin2d", 0.9, False, (.1979, .2031, .1034, .2048, .1357, .2091, .2454, .0864, .1352, .1453)),
            Signal("gdot", 2.1, False, density=0.4375), Signal("resize", 2.2))),
    )),
    "darts": Task(Noise("gaussian", 0.2), (
        Stage(80, (Signal("gdot", 1.6, True, density=0.5), Signal("resize", 1.3))),
        Stage(32, (
            Signal("dot", 2.2, True, density=0.71875), Signal("gdot", 1.0, False, density=0.609375),
            Signal("resize", 2.1))),
        Stage(80, (Signal("gdot", 1.7, True, density=0.5625), Signal("resize", 0.5))),
    )),
    "resnet": Task(Noise("gaussian", 0.9), (
        Stage(16, (
            Signal("sin1d", 1.1, False, (.3792, .3348, .3835, .2973, .3064, .3438, .2157, .3374, .3203, .2363)),
            Signal("dot", 0.5, False, density=0.09375))),
        Stage(16, (
            Signal("sin2d", 1.2, True, (.1185, .2206, .0596, .2331, .2272, .2653, .1877, .1083, .1095, .0563)),
            Signal("dot", 2.9, True, density=0.3125), Signal("resize", 2.3))),
        Stage(32, (
            Signal("sin2d", 1.8, True, (.3785, .3794, .3447, .2706, .2607, .3945, .2793, .3832, .3228, .3014)),
            Signal("gdot", 2.1, False, density=0.5))),
    )),
    "nlp": RnnTask(Noise("uniform", 0.6), 48, (
        Signal("sin2d", 2.6, True, (.1955, .2282, .1843, .2073, .2208, .1345, .1703, .223, .1903, .1915)),), (
        Signal("sin2d", 0.8, True, (.1722, .1701, .1686, .1655, .1647, .1702, .1642, .1771, .1712, .1723)),
        Signal("gdot", 0.7, True, density=0.8626))),
    "nlp-combo": RnnTask(Noise("uniform", 0.0), 64, (
        Signal("sin1d", 1.0, True, MEDIUM), Signal("sin2d", 1.0, True, MEDIUM)), (
        Signal("sin1d", 1.0, True, MEDIUM), Signal("sin2d", 1.0, True, MEDIUM))),
    "nlp-single": RnnTask(Noise("uniform", 0.0), 64, (
        Signal("dot", 1.0, True, density=1.0),), (
        Signal("dot", 1.0, True, density=1.0),)),
}
# space -> weights of the TERMS, in their order, for that space, the preset fast and its number of steps; such as
# `--mode search-task --task nb101 --cycles 0` fits, to the labels that the README's results name
FITTED: dict[str, tuple[float, ...]] = {
    "nb101": (2.59, -.0523, 0, 5.43, .312, 0, -4.51, -.191, 0, 17.6, .0957, 0, 7.09, .181),
    "nb201": (10.3, -.696, 0, -14.8, -.0676, 0, 7.9, .221, 0, 1.95, .37, 0, -2.34, -1.83),
    "darts-in": (4.02, -.435, .399, 3.4, .23, -.431, 1.17, -.0162, .373, .564, -.214, -1.42, 1.2, -.28),
    "pnas-in": (4.24, -.34, .568, 4.46, .536, 3.87, 6.25, -.409, 1.64, 5.59, -.71, -1.1, -4.21, .217),
    "resnext-a-in": (.94, -.295, .321, -.274, -.00101, 1.13, .214, .107, 1.13, .214, .107, .656, -.0912, .0114),
    "nbmacro": (21.7, -.499, 5.83, .933, -3.5, 7.54, -.561, -3.07, 7.43, -.638, -2.06, 5.56, -1.16, 2.58),
}
# the signals of nb101 serve everywhere but in nbmacro; there, the best of 100 random tasks by its own fitted weights
MACRO = Task(Noise("gaussian", 0.0), (
    Stage(16, (Signal("gdot", 2.3, False, density=0.8703),)),
    Stage(80, (Signal("resize", 1.4),)),
    Stage(32, (Signal("dot", 0.9, True, density=0.8759), Signal("resize", 2.4)))))
TASKS |= {f"{space}-fitted": replace(MACRO if space == "nbmacro" else TASKS["nb101"], weights=tuple(
    Weight(term, weight) for term, weight in zip(TERMS, weights) if weight)) for space, weights in FITTED.items()}


# ------------------------------------------------------------------------------------------------------- image files
CIFAR = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # channel means and standard deviations of 0..255 values
IMAGENET16 = (122.68, 116.66, 104.01), (63.22, 61.26, 65.09)
STATISTICS = {3 * 32 * 32: CIFAR, 3 * 16 * 16: IMAGENET16}  # by the length of a row of a pickled batch
PIXELS = "uint8", "float16", "float32", "float64"
BATCHES = "data_batch_1", "train", "train_data_batch_1"  # the first training file of CIFAR-10, CIFAR-100, ImageNet16
MOST_BYTES = 2 ** 30  # that a file may unpack to, and that the images in use may fill
MOST_WORDS = 5_000_000  # of a pickle: labels and names are some 100,000
IMAGE_FILES = ("a CIFAR-10/100 or ImageNet16 python batch, its folder, or a .npy or .npz array (N, H, W, 3) or "
               "(N, 3, H, W), uint8 or float in [0, 1]")


def load_images(source: str, seed: int, count: int = 16) -> tuple[Tensor, str]:
    """The first `count` images of "synthetic" or of the path of IMAGE_FILES, normalised, (count, 3, 32, 32), and a line
    that says which they are. ValueError for any other content."""
    if source == "synthetic":
        images = synthetic_images(torch.Generator().manual_seed(seed_of("images", seed)), count)
        return normalise(images), "synthetic (1/f noise)"
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in BATCHES if (path / name).is_file()), None)
        if path is None:
            raise ValueError(f"images {source}: the folder has none of {', '.join(BATCHES)}")
    path.stat()  # OSError if there is none
    if not path.is_file():
        raise ValueError(f"images {source}: not a regular file")
    try:
        array, statistics = read_array(path) if path.suffix in (".npy", ".npz") else read_batch(path)
        if len(array) < count or 4 * array[:count].size > MOST_BYTES:  # as float32
            raise ValueError(f"{len(array)} images, {count} are needed, of a usual size")
        images = torch.from_numpy(np.array(array[:count], array.dtype.newbyteorder("=")))
        name = f"{path.name} (first {count}, sha256 {digest_of(images.numpy().tobytes())})"
        images = images.float() / (1 if images.is_floating_point() else 255)
        if not 0 <= images.min() <= images.max() <= 1:  # false for NaN as well
            raise ValueError("float values outside of [0, 1]")
        return resized(normalise(images, statistics), 32), name
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"images {path}: {type(error).__name__}: {error}; expected {IMAGE_FILES}") from None


def read_array(path: Path) -> tuple[np.ndarray, None]:
    """The images of a .npy or .npz file as (N, 3, H, W), to be normalised by the statistics of those that are used."""
    images = np.load(path, mmap_mode="r", allow_pickle=False)  # a .npy is mapped, not read
    if not isinstance(images, np.ndarray):
        with images as content:
            unpacked = sum(member.file_size for member in content.zip.infolist())
            if unpacked > MOST_BYTES:
                raise ValueError(f"it unpacks to {unpacked:,} bytes, at most {MOST_BYTES:,} are read")
            images = max((content[name] for name in content.files), key=np.ndim)
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]) or images.dtype.name not in PIXELS:
        raise ValueError(f"{images.dtype.name} array of shape {images.shape}")
    return (images.transpose(0, 3, 1, 2) if images.shape[3] == 3 else images), None


def read_batch(path: Path) -> tuple[np.ndarray, Any]:
    """The images of a pickled batch as (N, 3, H, W), and the statistics of their data set.

    Nothing is unpickled, so nothing in the file can run, or make an array of what is not there: its opcodes are listed,
    and the longest string among their arguments is the pixels, if the others say that it is a plain uint8 array (N, D).
    """
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES:,} bytes")
    words: list[Any] = []
    for op, word, _ in pickletools.genops(path.read_bytes()):
        if word is not None and "PUT" not in op.name or op.name in ("NEWTRUE", "NEWFALSE"):
            words.append(op.name == "NEWTRUE" if word is None else word)
        if len(words) > MOST_WORDS:
            raise ValueError(f"more than {MOST_WORDS:,} words")
    texts = [word for word in words if isinstance(word, (str, bytes, bytearray))]
    text = max(texts, key=len, default="")
    pixels = text.encode("latin1") if isinstance(text, str) else text  # a str in protocols 0 to 2
    at = next((at for at, word in enumerate(words) if word is text), 0)
    flags = [word for word in words[max(at - 3, 0):at] if isinstance(word, bool)]  # or "F": in Fortran's order
    for row, statistics in STATISTICS.items():
        shape = len(pixels) // row, row
        starts = [place for place, pair in enumerate(zip(words, words[1:])) if pair == shape and type(pair[0]) is int]
        columns_first = True in flags or any(words[place + 2:place + 3] == ["F"] for place in starts)
        if starts and "u1" in texts and not columns_first and len(pixels) == math.prod(shape) > 0:
            side = math.isqrt(row // 3)
            return np.frombuffer(pixels, np.uint8).reshape(-1, 3, side, side), statistics
    raise ValueError("no plain array of uint8, (N, 3072) or (N, 768)")


# ------------------------------------------------------------------------------------------------ record and progress
SCORES = 4  # raised when the same settings give other scores than before, so that no record mixes them


class Score(NamedTuple):
    """A network under a task: what it was trained to (see Trained), whatever weights make the score of it."""
    key: str
    arch: str
    loss: float | None  # None: diverged
    params: int
    seconds: float
    losses: list[list[float | None]]


class Record:
    """The scores that are known, and their file: a line of settings, then a line per network, flushed as it is scored.

    Opening an existing file reads it, so that a run goes on where it stopped. A torn last line is dropped with a
    warning. ValueError if the file holds something else, was made with other settings, or another run writes to it.
    """

    def __init__(self, path: str | None = None, made_with: dict[str, Any] | None = None):
        self.known: dict[str, Score] = {}  # by key
        self.path, self.file = path, None
        if path is None:
            return
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError(f"{path}: not a regular file")
        self.file = open(path, "a+b")
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another run is writing to it; expected another --out file") from None
        self.file.seek(0)
        content, header = self.file.read(), {"settings": made_with}
        if not content or len(content) > 20 and json.dumps(header).encode().startswith(content):  # new, or torn there
            self.file.truncate(0)
            self.write(header)
            return
        *lines, torn = content.split(b"\n")
        self.compare(lines[0] if lines else torn, made_with)
        for number, line in enumerate(lines[1:], start=2):
            self.read(line, number)
        if torn:
            write_stderr(f"gennas: {path}: the torn last line is dropped\n")
            self.file.truncate(len(content) - len(torn))

    def compare(self, header: bytes, settings: dict[str, Any]) -> None:
        try:
            made_with = dict(json.loads(header)["settings"])
        except (KeyError, RecursionError, TypeError, ValueError):
            raise ValueError(f"{self.path}: exists and holds no scores; expected another --out file") from None
        for name in {**settings, **made_with}:
            old, new = made_with.get(name), settings.get(name)
            if old != new:
                raise ValueError(f"{self.path}: made with {name} {reprlib.repr(old)}, this run has {reprlib.repr(new)};"
                                 " expected the same settings or another --out file")

    def read(self, line: bytes, number: int) -> None:
        try:
            known = Score(**json.loads(line))
            losses = [x for x in (known.loss, *itertools.chain(*known.losses)) if x is not None]
            right = (are(str, known[:2]) and type(known.params) is int and are(list, tuple(known.losses))
                     and all(is_number(x, 0, 1e300) for x in (known.seconds, *losses))
                     and {len(row) for row in known.losses} in ({1}, {3}))  # stages
        except (RecursionError, TypeError, ValueError):
            right = False
        if not right:
            raise ValueError(f"{self.path}, line {number}: not a score; expected another --out file")
        self.known[known.key] = known

    def add(self, score: Score) -> None:
        if self.file:
            self.write(score._asdict())
        self.known[score.key] = score

    def write(self, line: dict[str, Any]) -> None:
        with errors_naming(self.path):
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


@contextmanager
def errors_naming(path: str) -> Iterator[None]:
    """An error in writing tells the file, as one in opening does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None


class Progress:
    """How far a run is, on stderr: a line that is rewritten on a terminal, one every ten seconds elsewhere."""

    def __init__(self, total: int = 0, quiet: bool = True):
        self.total, self.quiet, self.done, self.trained = total, quiet, 0, 0
        self.start, self.shown, self.open = time.monotonic(), -math.inf, False
        self.best: tuple[float, str] = (math.inf, "")

    def lead(self, loss: float, what: str) -> None:
        """`what` is the best so far if its loss is the lowest."""
        self.best = min(self.best, (loss, what))

    def leader(self) -> list[str]:
        return [f"best {self.best[1]}"] if self.best[1] else []

    def advance(self, trained: bool) -> None:
        """By one score, that of a network trained in this run or a known one."""
        self.done, self.trained = self.done + 1, self.trained + trained
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self.quiet or not (terminal or self.done == self.total or now - self.shown >= 10):
            return
        self.shown, self.open = now, terminal and self.done < self.total
        rate = self.trained / max(now - self.start, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "known"
        line = "  ".join([f"{self.done}/{self.total}", f"{rate:.2f}/s", left, *self.leader()])
        line = line[:(os.get_terminal_size(sys.stderr.fileno()).columns if terminal else 200) - 1]
        write_stderr((f"\r\x1b[K{line}" if terminal else line) + "\n" * (not self.open))


def print_line(text: str) -> None:
    with errors_naming("stdout"):
        print(text, flush=True)


def write_stderr(text: str) -> None:
    with suppress(OSError):  # a full disk under stderr ends no run
        sys.stderr.write(text)
        sys.stderr.flush()


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def show_loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


# ------------------------------------------------------------------------------------------ networks trained, once each
@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Puts the state of the CPU's and of the device's global generator back."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = torch.mps.get_rng_state() if device.type == "mps" else None
        try:
            yield
        finally:
            if state is not None:
                torch.mps.set_rng_state(state)


def seed_generators(device: torch.device, seed: int) -> None:
    """These two and no other, as `torch.manual_seed` would."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


TRIES = 50, 300  # draws for each that is within the limits: while all are beyond ten times a limit, and after that


def within_limits(draws: Iterable[Callable], space: Any, limits: dict[str, int | None]) -> list[Callable]:
    """The same draws, each repeated until what it gives is within the limits; ValueError if hardly any of them is."""
    limits = {name: most for name, most in limits.items() if most}
    tried, found, nearest = 0, 0, math.inf

    def limited(draw: Callable) -> Callable:
        def redraw(*given: Any) -> Any:
            nonlocal tried, found, nearest
            while tried < TRIES[nearest <= 10] * (1 + found):
                arch, tried = draw(*given), tried + 1
                excess = max((getattr(space, name)(arch) / most for name, most in limits.items()), default=0)
                nearest = min(nearest, excess)
                if excess <= 1:
                    found += 1
                    return arch
            limit = " and ".join(f"--max-{name} {most:,}" for name, most in limits.items())
            raise ValueError(f"{found} of {tried} draws are within {limit}; the nearest has {nearest:,.1f} times that")
        return redraw

    return [limited(draw) for draw in draws]


Item = tuple[str, str, int, str]  # what a worker is given: a space, a task as JSON, a seed, an architecture as text
Result = tuple[int, Trained, float]  # an item's place in its list, what its Regression gave, seconds


def find_device(name: str | None, rank: int = 0) -> torch.device:
    """The named device, by default a GPU if there is one; of `cuda` the GPU that falls to worker `rank`. Set up for
    speed and for equal results in equal runs."""
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    kind, colon, index = (("cuda" if counts["cuda"] else "cpu") if name is None else name).partition(":")
    if colon and not (index.isdecimal() and len(index) < 4) or int(index or 0) >= counts.get(kind, 0):
        raise ValueError(f"--device {name}: not available here; expected cpu, cuda, cuda:N or mps")
    torch.set_num_threads(1)  # small maps gain nothing from more, and sums would depend on their number
    torch.backends.cudnn.allow_tf32 = True  # of convolutions; the equations of solved heads need all their digits
    torch.backends.cudnn.deterministic = True
    return torch.device(kind, int(index or rank % counts[kind]))


class Preset(NamedTuple):
    settings: Settings
    sizes: dict[str, Any] = {}  # of the network that is trained, where they are not those of its class
    task: str | None = None  # by default the one of the space; with `fast` and its steps SPACE-fitted, if there is one


FAST = Settings(steps=16, learning_rate=1.0, rnn_learning_rate=0.003, side=16, ridge=1.0)
CELLS = Preset(replace(FAST, steps=6), {"shrink": 4, "all_blocks": True}, "combo")
RESIDUAL = Preset(replace(FAST, steps=2), {"all_blocks": True}, "combo")
# preset -> family of spaces -> how it is scored; "": those that are not named, and spaces of your own
PRESETS: dict[str, dict[str, Preset]] = {
    "paper": {"": Preset(Settings()), "nbnlp": Preset(Settings(), {"reservoir": True})},
    "fast": {
        "": Preset(FAST),
        # stage 1 ranks these two backwards
        "nb101": Preset(replace(FAST, stage_weights=(0.0, 0.5, 1.0)), {"cells": 2, "all_blocks": True}),
        # small networks are told apart better on larger images; a learning rate of 1 is too much for them
        "nb201": Preset(replace(FAST, steps=12, learning_rate=0.3, side=24, stage_weights=(0.0, 0.5, 1.0)),
                        {"width": 8, "cells": 2, "all_blocks": True}),
        "nbmacro": Preset(replace(FAST, steps=8, learning_rate=0.3, batch=32),
                          {"width": 8, "all_blocks": True}),
        "nbnlp": Preset(replace(FAST, steps=120), {"reservoir": True, "widths": (100, 150, 150, 100)}),
        **dict.fromkeys(("darts", "enas", "pnas", "nasnet", "amoeba"), CELLS),
        **dict.fromkeys(("resnet", "resnext-a"), RESIDUAL),
        "resnext-b": RESIDUAL._replace(sizes={"shrink": 4} | RESIDUAL.sizes),
    },
}


class Trainer:
    """Trains networks of a space by a preset: what each process of a run has. `space` and what follows are the words of
    the command line. ValueError or OSError if one of them is wrong."""

    def __init__(self, space: str, preset: str = "fast", steps: int | None = None, images: str = "synthetic",
                 seed: int = 0, device: str | None = None, rank: int = 0):
        family = space.removesuffix("-in").removesuffix("-fix") if space in search_spaces.SPACES else ""
        self.settings, sizes, task = PRESETS[preset].get(family) or PRESETS[preset][""]
        fitted = preset == "fast" and steps in (None, self.settings.steps) and space in FITTED
        if steps is not None:
            self.settings = replace(self.settings, steps=steps)
        self.name, self.space = space, search_spaces.get(space, **sizes)
        self.seed, self.device = seed, find_device(device, rank)
        self.task_name = f"{space}-fitted" if fitted else task or getattr(self.space, "task", "nb101")
        self.images, self.images_name = None, "none"
        if isinstance(read_task(self.task_name), Task):
            self.images, self.images_name = load_images(images, seed, self.settings.batch)
        elif images != "synthetic":
            raise ValueError(f"--images {images}: {space} has none, its input is a signal of the task")
        own = "" if space in search_spaces.SPACES else digest_of(Path(space.rpartition(":")[0]).read_bytes())
        made_with = {"scores": SCORES, "space": space, "file": own, "preset": preset, "seed": seed,
                     "images": self.images_name, "device": self.device.type, **asdict(self.settings)}
        self.made_with = json.loads(json.dumps(made_with))  # as what has been sent or recorded is

    @lru_cache(maxsize=1)  # the targets of the task trained last are not drawn again
    def regression(self, task: str, seed: int) -> Regression:
        return Regression(task_from_json(task), self.images, self.settings, seed, self.device)

    def __call__(self, item: Item) -> tuple[Trained, float]:
        """ValueError, with the architecture, whatever goes wrong: a space may be anybody's code."""
        _, task, seed, arch = item
        start = time.perf_counter()
        try:
            trained = self.regression(task, seed)(self.space, self.space.parse(arch))
        except (Exception, SystemExit) as error:
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{arch}: {name}{error}") from error
        return trained, round(time.perf_counter() - start, 3)

    def map(self, items: list[Item]) -> Iterator[Result]:
        """One worker, this process: the results as they are made. ValueError for wrong input."""
        return ((place, *self(item)) for place, item in enumerate(items))


def make_trainers(spaces: list[str], *words: Any) -> dict[str, Trainer] | str:
    """One for each space of a run, by its name, or what is wrong, for `attempt`."""
    try:
        return {space: Trainer(space, *words) for space in spaces}
    except (OSError, ValueError) as error:
        return str(error)


def made_with_all(trainers: dict[str, Trainer]) -> dict[str, Any]:
    """What a record says of the run."""
    made_with = {space: trainer.made_with for space, trainer in trainers.items()}
    return made_with if len(made_with) > 1 else next(iter(made_with.values()))


def attempt(trainers: dict[str, Trainer] | str, item: Item) -> tuple[Any, str | None]:
    """What a trainer gives, or what is wrong, with the item or with all of them: it can be sent to another process."""
    try:
        return (None, trainers) if isinstance(trainers, str) else (trainers[item[0]](item), None)
    except ValueError as error:
        return None, str(error)


def end_with_parent(parent: int) -> None:
    """Let this worker process end, whatever it does, as soon as the one that started it, of that number, is gone."""
    def watch() -> None:
        while parent == os.getppid():
            time.sleep(0.2)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


def serve(pipe: connection.Connection, words: tuple, parent: int) -> None:
    """What a worker process does: train what comes through the pipe, until that or its parent is gone."""
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)
    end_with_parent(parent)
    trainers = make_trainers(*words)
    with suppress(EOFError, OSError):
        while True:
            pipe.send(attempt(trainers, pipe.recv()))


class Processes:
    """Workers on this machine: spawned, each at the end of a pipe; whoever is free gets the next item. After an error
    they have ended."""

    def __init__(self, count: int, words: tuple):
        context, self.workers, handler = get_context("spawn"), {}, None
        with suppress(ValueError):  # in another thread than the first
            handler = os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)  # inherited: Ctrl-C is for this process
        try:
            for rank in range(count):
                pipe, theirs = context.Pipe()
                worker = context.Process(target=serve, args=(theirs, (*words, rank), os.getpid()), daemon=True)
                worker.start()
                self.workers[pipe] = worker
                theirs.close()
        finally:
            if handler is not None:
                os_signal.signal(os_signal.SIGINT, handler)

    def map(self, items: list[Item]) -> Iterator[Result]:
        waiting, idle, busy = deque(enumerate(items)), deque(self.workers), {}
        while waiting or busy:
            while waiting and idle:
                pipe = idle.popleft()
                busy[pipe], item = waiting.popleft()
                with suppress(OSError):  # of a dead worker, which `recv` meets
                    pipe.send(item)
            for pipe in connection.wait(busy):
                try:
                    result, error = pipe.recv()
                except (EOFError, OSError):
                    self.workers[pipe].join(1)
                    self.kill()
                    raise ChildProcessError(f"a worker died (exit status {self.workers[pipe].exitcode})") from None
                if error:
                    self.kill()
                    raise ValueError(error)
                idle.append(pipe)
                yield busy.pop(pipe), *result

    def kill(self) -> None:
        for worker in self.workers.values():
            worker.kill()


class Torchrun:
    """The processes that torchrun has started, on one machine or several, at its store. Process 0 puts items there and
    trains too, the others `serve`; whoever is free takes the next. The keys of the store:

    made with    what process 0 trains with; all others must have the same
    item N       [place, item] of the N-th item of the run; null: there will be no more
    drawn, done  how many items were taken, and how many have their result
    result N     [place, losses and seconds, error] of the N-th that was done
    """

    def __init__(self, words: tuple):
        store, self.rank, self.count = next(distributed.rendezvous("env://", timeout=timedelta(days=100)))
        self.store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)  # it outlives a restart
        self.trainers = make_trainers(*words, int(os.environ["LOCAL_RANK"]))
        self.put, self.mine = 0, 0  # items that are there; the one that this process has drawn

    def map(self, items: list[Item]) -> Iterator[Result]:
        first, self.put = self.put + 1, self.put + len(items)
        for place, item in enumerate(items):
            self.store.set(f"item {first + place}", json.dumps([place, item]))
        for number in range(first, self.put + 1):
            while not self.store.check([f"result {number}"]):
                self.mine = self.mine or self.store.add("drawn", 1)
                if self.mine > self.put:  # it is of the next list
                    time.sleep(0.01)
                else:
                    self.train(json.loads(self.store.get(f"item {self.mine}")))
            place, result, error = json.loads(self.store.get(f"result {number}"))
            if error:
                raise ValueError(error)
            yield place, Trained(*result[0]), result[1]

    def train(self, work: list) -> None:
        place, item = work
        outcome = json.dumps([place, *attempt(self.trainers, item)])
        self.store.set(f"result {self.store.add('done', 1)}", outcome)
        self.mine = 0

    def serve(self) -> None:
        made_with = json.loads(self.store.get("made with"))
        if not isinstance(self.trainers, str) and made_with_all(self.trainers) != made_with:
            self.trainers = (f"process {self.rank} has other images, another FILE.py or another kind of device than "
                             "process 0")
        while (work := json.loads(self.store.get(f"item {self.store.add('drawn', 1)}"))) is not None:  # waits for it
            self.train(work)
        self.store.add("ended", 1)

    def end(self) -> None:
        """Ends the others, and waits for that: the store may be this process's own."""
        for number in range(1, self.count + 1):
            self.store.set(f"item {self.put + number}", "null")
        while self.store.add("ended", 0) < self.count - 1:
            time.sleep(0.01)


class Scorer:
    """Scores of architectures of a space under tasks: scorer(tasks, archs) -> a list for each task, of a score for each
    architecture, lower is better; infinite for a network that diverged. Each network is trained once on the signals of
    a task, by one of the workers: equal keys are one network, and what the record knows is not trained again.
    `workers` has a `map` from items to results, as a Trainer has."""

    def __init__(self, trainer: Trainer, workers: Any = None, record: Record | None = None,
                 progress: Progress | None = None):
        self.trainer, self.space, self.seed, self.workers = trainer, trainer.space, trainer.seed, workers or trainer
        self.record, self.progress = record or Record(), progress or Progress()
        self.scores: dict[str, Score] = {}  # those that were asked for, by key

    def keys(self, task: AnyTask, archs: list[Any]) -> list[str]:
        """What names architectures under the signals of a task in the record."""
        start = f"{self.trainer.name} {task.unweighted().digest()}/{self.seed} "
        return [start + self.space.key(arch) for arch in archs]

    def __call__(self, tasks: list[AnyTask], archs: list[Any]) -> list[list[float]]:
        return [[score(task.weights, trained) for trained in row] for task, row in zip(tasks, self.train(tasks, archs))]

    def train(self, tasks: list[AnyTask], archs: list[Any], receive: Callable[[Score], None] | None = None,
              ) -> list[list[Score]]:
        """`receive` is called with each as soon as it is known; by default the best is noted for the progress."""
        keys = [self.keys(task, archs) for task in tasks]
        counts = Counter(itertools.chain.from_iterable(keys))
        texts = [task.unweighted().to_json() for task in tasks]
        weights = {key: task.weights for task, row in zip(tasks, keys) for key in row}
        unknown = {key: (text, arch) for text, row in zip(texts, keys) for key, arch in zip(row, archs)
                   if key not in self.record.known}

        def keep(known: Score, trained: bool) -> None:
            self.scores[known.key] = known
            if receive:
                receive(known)
            else:
                self.lead(weights[known.key], known)
            for _ in range(counts[known.key]):
                self.progress.advance(trained)

        for key in counts:
            if key not in unknown:
                keep(self.record.known[key], trained=False)
        names = list(unknown)
        items = [(self.trainer.name, text, self.seed, self.space.format(arch)) for text, arch in unknown.values()]
        for place, (loss, losses, params), seconds in self.workers.map(items):
            losses = [list(map(finite, row)) for row in losses]
            self.record.add(Score(names[place], items[place][-1], finite(loss), params, seconds, losses))
            keep(self.record.known[names[place]], trained=True)
        return [[self.scores[key] for key in row] for row in keys]

    def lead(self, weights: Iterable[Weight], known: Score) -> None:
        loss = score(weights, known)
        self.progress.lead(loss, f"{show_loss(loss)} {known.arch}")


# --------------------------------------------------------------------------------------------------------- pictures
def check_plot(path: str, out: str | None) -> None:
    """ValueError or OSError, before anything is computed, if no plot can be written to `path`, or `out` is there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib; expected: pip install matplotlib") from None
    if Path(path).suffix not in (".png", ".pdf", ".svg") or not Path(path).parent.is_dir():
        raise ValueError(f"--plot {path}: expected a .png, .pdf or .svg file in a folder that exists")
    if out and os.path.realpath(path) == os.path.realpath(out) or os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"--plot {path}: expected a regular file, and another than --out")
    absent = not os.path.lexists(path)
    open(path, "ab").close()
    if absent:
        os.unlink(path)


@contextmanager
def new_plot(path: str, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[np.ndarray]:
    """The axes of a figure, (rows, columns), which is saved at the end."""
    from matplotlib.figure import Figure  # the only use of a third package: when a plot is asked for
    figure = Figure(layout="constrained", **options)
    yield figure.subplots(rows, columns, squeeze=False)
    with errors_naming(path):
        figure.savefig(path, dpi=100)


def plot_signals(task: AnyTask, images: Tensor, seed: int, settings: Settings, path: str, count: int = 4) -> None:
    """Each signal of each part, and their sum: `count` maps of the first image, then of the second; maps of as many
    sequences where a part has only one map for each."""
    rows, last = [], 0
    totals = task.draw(images, seed, settings.batch, settings.size)
    for (name, (signals, shape)), total in zip(task.parts(settings.batch, settings.size).items(), totals):
        rows += [(f"{name}\n{signal.level} {signal.basis}", signal.maps(shape, images, name, seed).expand(shape))
                 for signal in signals]
        rows.append((f"{name}\nsum", total))
    with new_plot(path, len(rows), 2 * count, figsize=(2 + 1.6 * count, len(rows))) as axes:
        for (label, maps), line in zip(rows, axes):
            most, channels = maps.abs().max(), min(count, maps.shape[1])
            for column, ax in enumerate(line):
                sample, channel = divmod(column, channels)
                ax.imshow(maps[sample, channel].numpy(), cmap="RdBu_r", aspect="auto", vmin=-most, vmax=most)
                ax.set(xticks=[], yticks=[])
                if channels != last:
                    ax.set_title(f"sample {sample + 1}\nchannel {channel + 1}", fontsize=8)
            last = channels
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)


Panel = tuple[str, str, list[tuple[str, Any, Any, str]]]  # x label, y label, lines: name, x, y, style


def plot_lines(path: str, title: str, *panels: Panel) -> None:
    """Panels side by side; the names of lines are shown where there are several."""
    with new_plot(path, 1, len(panels), figsize=(1 + 4.5 * len(panels), 4)) as (axes,):
        for ax, (x_label, y_label, lines) in zip(axes, panels):
            for name, x, y, style in lines:
                ax.plot(x, y, style, markersize=4, label=name)
            ax.set(xlabel=x_label, ylabel=y_label)
            if len(lines) > 1:
                ax.legend(fontsize=7)
        axes[0].set_title(title, fontsize=9, loc="left", wrap=True)


# ------------------------------------------------------------------------------------------------------------- modes
Labels = list[tuple[Any, float]]  # architectures and their values


def named(task: AnyTask) -> str:
    """What its score is called, but for --json, where it is always loss."""
    return "loss" if task.weights == PAPER else "score"


# Each of these prints its result and returns what --json adds to it.
def run_search(scorer: Scorer, task: AnyTask, seed: int, limits: dict[str, int | None], evolution: dict[str, int],
               plot: str | None) -> dict[str, Any]:
    history = search(scorer.space, lambda archs: scorer([task], archs)[0], seed, limits, **evolution)
    arch, loss = min(history, key=lambda pair: pair[1])
    text, params = scorer.space.format(arch), int(scorer.space.params(arch))
    print_line(f"{text}\n{named(task)} {show_loss(loss)}, {params:,} parameters; the best of {len(history)} evaluated "
               f"architectures, {len(scorer.scores)} different networks")
    if plot:
        plot_lines(plot, "", search_panel(history, f"regression {named(task)}"))
    return {"arch": text, "loss": finite(loss), "params": params, "evaluated": len(history),
            "unique": len(scorer.scores)}


def search_panel(history: list[tuple[Any, float]], name: str) -> Panel:
    losses, numbers = [loss for _, loss in history], range(1, len(history) + 1)
    return "candidates evaluated", name, [
        ("candidate", numbers, losses, "."), ("best so far", numbers, np.minimum.accumulate(losses), "-")]


def run_score(scorer: Scorer, task: AnyTask, archs: list[Any], plot: str | None) -> dict[str, Any]:
    keys, results = scorer.keys(task, archs), []

    def print_known(known: Score) -> None:
        """In the order in which they were asked for."""
        scorer.lead(task.weights, known)
        while len(results) < len(keys) and keys[len(results)] in scorer.scores:
            arch, known = archs[len(results)], scorer.scores[keys[len(results)]]
            params, text, loss = int(scorer.space.params(arch)), scorer.space.format(arch), score(task.weights, known)
            results.append({"arch": text, "loss": finite(loss), "params": params, "seconds": known.seconds})
            print_line(f"{show_loss(loss):>9} {params:>12,} {known.seconds:>8.2f}  {text}")

    print_line(f"{named(task):>9} {'parameters':>12} {'seconds':>8}  architecture")
    trained, = scorer.train([task], archs, receive=print_known)
    if plot:
        plot_lines(plot, "", ("training steps", "squared error, weighted over the stages", [
            (shortened(known.arch, 70), range(len(known.losses)), curve(known, scorer.trainer.settings), "-")
            for known in {known.key: known for known in trained}.values()]))
    return {"results": results}


def curve(known: Score, settings: Settings) -> np.ndarray:
    """The loss at each step, (steps + 1,); NaN where it diverged."""
    losses = np.array(known.losses, float)  # (steps + 1, stages)
    weights = np.array(settings.stage_weights[-losses.shape[1]:])
    return losses[:, weights != 0] @ weights[weights != 0]


SHOWN = 5  # networks that a correlation names, those furthest off


def run_correlate(scorer: Scorer, task: AnyTask, labels: Labels, plot: str | None) -> dict[str, Any]:
    """A search lives among the best, so rho there, and what the best by score are worth, stand beside the whole rho."""
    archs, values = zip(*labels)
    trained, = scorer.train([task], archs)
    losses = [score(task.weights, known) for known in trained]
    merits = [-loss for loss in losses]
    rho, tau, (low, high) = spearman(merits, values), kendall(merits, values), spearman_interval(merits, values)
    by_params = spearman([int(scorer.space.params(arch)) for arch in archs], values)
    best = np.flatnonzero(values >= np.quantile(values, 0.8))
    among_best = spearman(np.take(merits, best), np.take(values, best)) if len(best) >= LEAST else math.nan
    ten_best = float(np.take(values, np.argsort(losses, kind="stable")[:10]).mean())
    seconds = float(np.mean([known.seconds for known in trained]))
    by_loss, by_label = ranks(losses), ranks([-value for value in values])  # 1: the best
    places: dict[str, int] = {}  # a network once, where it is furthest off
    for place in np.argsort(-abs(by_loss - by_label), kind="stable"):
        places.setdefault(trained[place].key, place)
    furthest = [{"arch": scorer.space.format(archs[place]), "rank_by_score": float(by_loss[place]),
                 "rank_by_label": float(by_label[place])} for place in list(places.values())[:SHOWN]]
    interval = f"[{low:.3f}, {high:.3f}]" if len(labels) >= LEAST else f"(no interval below {LEAST} architectures)"
    in_fifth = f"spearman {among_best:.3f}" if len(best) >= LEAST else f"fewer than {LEAST} architectures"
    summary = f"spearman {rho:.3f} {interval}, kendall {tau:.3f}, {len(labels)} architectures"
    print_line(f"{summary}\nthe parameter count alone: spearman {by_params:.3f}; diverged: {losses.count(math.inf)}; "
               f"{seconds:.2f} s a network\namong the best fifth by label: {in_fifth}; the ten best by "
               f"score: mean label {ten_best:.6g}\nfurthest off (rank by score, by label; 1 is the best):")
    for network in furthest:
        print_line(f"{network['rank_by_score']:>8g} {network['rank_by_label']:>8g}  {network['arch']}")
    if plot:  # as they are; by rank, which is what rho compares; and what fewer steps would do
        curves = np.array([curve(known, scorer.trainer.settings) for known in trained])  # (n, steps + 1)
        by_step = [spearman(-at_step, values) for at_step in np.nan_to_num(curves, nan=math.inf).T]
        plot_lines(plot, summary, (f"regression {named(task)}", "recorded value", [("", losses, values, ".")]),
                   (f"rank by regression {named(task)} (1: the best)", "rank by recorded value (1: the best)",
                    [("", by_loss, by_label, ".")]),
                   (f"training steps ({len(by_step) - 1} take {seconds:.2f} s a network)",
                    "rho of the loss with the recorded value", [("", range(len(by_step)), by_step, ".-")]))
    return {"n": len(labels), "spearman": finite(rho), "spearman_ci": [finite(low), finite(high)],
            "kendall": finite(tau), "spearman_params": finite(by_params), "spearman_best_fifth": finite(among_best),
            "mean_of_ten_best": finite(ten_best), "furthest": furthest, "seconds_per_arch": seconds}


DRAWINGS = 20  # of labels, to tell what so many are worth


def run_search_task(scorers: list[Scorer], kind: type[AnyTask], first: AnyTask | None, labels: list[Labels],
                    others: list[Labels], seed: int, evolution: dict[str, int], plot: str | None) -> dict[str, Any]:
    """On the labels of each scorer's space; rho on the others tells whether what was found is good for more than these.
    The first population starts with the known tasks or, with a `first` task, is that and mutants of it."""
    known = [task.unweighted() for task in ([first] if first else TASKS.values()) if isinstance(task, kind)]
    draws = iter(dict.fromkeys(known))
    keys = [[scorer.space.key(arch) for arch, _ in pairs] for scorer, pairs in zip(scorers, labels)]
    orders = [{key: place for place, key in enumerate(dict.fromkeys(row))} for row in keys]
    folds = [[order[key] % FOLDS for key in row] for order, row in zip(orders, keys)]  # equal networks are in one

    def draw(rng: random.Random) -> AnyTask:
        return next(draws, None) or (mutate_task(first, rng) if first else random_task(rng, kind))

    def train(tasks: list[AnyTask], labels: list[Labels]) -> list[list[Labelled]]:
        """For each task the networks of each space that has labels."""
        spaces = []
        for scorer, pairs in zip(scorers, labels):
            if pairs:
                archs, values = zip(*pairs)
                rows = scorer.train(tasks, archs, receive=lambda known: None)
                spaces.append([list(zip(row, values)) for row in rows])
        return list(zip(*spaces))

    networks: dict[AnyTask, list[Labelled]] = {}  # of the labels, by task

    def assess(tasks: list[AnyTask]) -> list[tuple[float, tuple[Weight, ...]]]:
        networks.update(zip(tasks, train(tasks, labels)))
        judged = [judge(networks[task], folds) for task in tasks]
        for task, (merit, weights) in zip(tasks, judged):
            scorers[0].progress.lead(-merit, f"rho {merit:.3f} {replace(task, weights=weights).to_json()}")
        return judged

    task, merit, history = search_task(draw, assess, seed, **evolution)
    n, fitted = sum(map(len, labels)), task.weights != PAPER
    result = {"task": json.loads(task.to_json()), "n": n, "spearman": merit, "fitted": fitted}
    summary = f"spearman {merit:.3f} on the {n} labels of the search{', by cross-validation' * fitted}"
    panels = [search_panel(history, "- rho")] * (len(history) > 1 or not any(others))
    if any(others):
        left, = train([task], others)
        known = [space for space, rest in zip(networks[task.unweighted()], others) if rest]

        def rho_of(weights: tuple[Weight, ...]) -> float:
            return mean_rho([[score(weights, trained) for trained, _ in space] for space in left], left)

        by_count = {}  # what labels are worth: rho with weights that are fitted to some of them
        for count in (10, 20, 40, 80, 160):
            if count <= min(map(len, known)):
                drawn = [[random.Random(draw).sample(space, count) for space in known] for draw in range(DRAWINGS)]
                by_count[count] = float(np.mean([rho_of(fit_weights(spaces)) for spaces in drawn]))
        rho, paper, n_left = rho_of(task.weights), rho_of(PAPER), sum(map(len, others))
        result |= {"n_held_out": n_left, "spearman_held_out": rho, "spearman_held_out_paper": paper,
                   "spearman_held_out_by_labels": by_count}
        summary += f", {rho:.3f} on {n_left} others" + f" ({paper:.3f} by the paper's weights)" * fitted
        panels.append((f"labels of each space; mean of {DRAWINGS} drawings", f"rho on the {n_left} others", [
            ("fitted weights", list(by_count), list(by_count.values()), "o-"),
            ("the paper's weights", list(by_count), [paper] * len(by_count), "-")]))
    print_line(task.to_json())
    if not scorers[0].progress.quiet:
        write_stderr(f"gennas: {summary}; the best of {len(history)} evaluated tasks\n")
    if plot:
        plot_lines(plot, summary, *panels)
    return result | {"evaluated": len(history)}


def run_show(trainer: Trainer, task: AnyTask, plot: str | None) -> dict[str, Any]:
    print_line(task.to_json())
    if plot:
        inputs = trainer.regression(task.to_json(), trainer.seed).inputs
        plot_signals(task, inputs.cpu(), trainer.seed, trainer.settings, plot)
    return {"plot": plot}


# ------------------------------------------------------------------------------------------------------ command line
MODES = "search", "search-task", "score", "correlate", "show"
EVOLUTIONS = {"search": (50, 10, 400), "search-task": (10, 5, 20)}  # mode -> population, tournament, cycles
# option -> the modes that it belongs to, where it does not belong to all
BELONGS = {"arch": ("score",), "labels": ("correlate", "search-task"), "limit": ("correlate", "search-task"),
           "max_params": ("search",), "max_flops": ("search",), "out": MODES[:4],
           **dict.fromkeys(("population", "tournament", "cycles", "batch"), ("search", "search-task"))}


def shortened(text: str, most: int = 400) -> str:
    """One line of at most `most` characters; where something is left out, it is the middle."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= most else f"{line[:most // 2]} ... {line[5 - most // 2:]}"


def fail(status: int, message: str, *known: str) -> Any:
    """Ends the run with one line: what is wrong, and what is known, which is not shortened."""
    write_stderr(f"gennas: {'; '.join([shortened(message), *known])}\n")
    sys.exit(status)


def whole(low: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text.isdecimal() or len(text) > 18 or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} up, not {reprlib.repr(text)}")
        return int(text)
    return convert


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Score and search neural architectures by regression of synthetic signals.")
    parser.error = lambda message: fail(2, f"error: {message}")
    option, number = parser.add_argument, {"type": whole(1), "metavar": "N"}
    option("arch", nargs="*", metavar="ARCH", help="to score, in their benchmark's spelling; - reads stdin, one a line")
    option("--space", required=True, nargs="+", metavar="NAME",
           help=f"{', '.join(search_spaces.SPACES)}, or FILE.py:CLASS; several with --mode search-task")
    option("--mode", choices=MODES, default="search", help="search is the default; show draws the task's signals")
    option("--task", metavar="NAME|FILE.json", help=f"{', '.join(TASKS)}, or a file; default: that of the space")
    option("--preset", choices=PRESETS, default="fast", help="how a network is trained (default fast)")
    option("--steps", type=whole(0), metavar="N", help="training steps, instead of the preset's; 0 trains nothing")
    option("--images", default="synthetic", metavar="synthetic|PATH", help=IMAGE_FILES)
    option("--seed", type=whole(0), default=0, metavar="N", help="of images, signals, weights, noise, search (0)")
    option("--device", metavar="cpu|cuda[:N]|mps", help="default: cuda where there is one, else cpu")
    defaults = [f"(default {of_archs}, of tasks with --preset fast {of_tasks})"
                for of_archs, of_tasks in zip(*EVOLUTIONS.values())]
    option("--population", **number, help=f"members of the queue {defaults[0]}")
    option("--tournament", **number, help=f"members drawn, of which the best is mutated {defaults[1]}")
    option("--cycles", type=whole(0), metavar="N", help=f"children after the first queue {defaults[2]}")
    option("--batch", **number, help="children made from the same queue (default 8, with --preset paper 1)")
    option("--max-params", **number, help="search among networks of at most N parameters")
    option("--max-flops", **number, help="and of at most N operations an image; a multiply-add is two")
    option("--labels", nargs="+", metavar="FILE|DIR", help="with --mode correlate or search-task: a JSON list of "
           "[architecture, value], higher = better, an NDS file, or a folder of NAS-Bench-NLP logs; one for each space")
    option("--limit", **number, help="only the first N labels; search-task tests what it finds on the others")
    option("--workers", **number, help="processes that train; default: one for each GPU, or for each CPU core")
    option("--out", metavar="FILE.jsonl", help="record of every score; the same command resumes from it")
    option("--plot", metavar="FILE.png", help="draw the result (needs matplotlib)")
    option("--json", action="store_true", help="the last line of stdout is one JSON object")
    option("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_intermixed_args(argv)
    if args.mode == "score" and not args.arch:  # --space NAME ARCH ...
        args.space, args.arch = args.space[:1], args.space[1:]
    if args.mode != "search-task" and len(args.space) > 1:
        parser.error(f"--space {' '.join(args.space)}: expected one, several belong to --mode search-task")
    if args.labels and len(args.labels) != len(args.space):
        parser.error(f"--labels {' '.join(args.labels)}: expected one for each --space, {len(args.space)}")
    if len(set(args.space)) < len(args.space):
        parser.error(f"--space {' '.join(args.space)}: expected each once")
    for name, modes in BELONGS.items():
        if getattr(args, name) not in (parser.get_default(name), []) and args.mode not in modes:
            spelled = "ARCH" if name == "arch" else f"--{name.replace('_', '-')}"
            parser.error(f"{spelled} belongs to --mode {' or '.join(modes)}, not to --mode {args.mode}")
    return args


def load_labels(args: argparse.Namespace, trainer: Trainer) -> Labels:
    """All labels of the space's file, or those of the space itself; ValueError unless --limit leaves three or more."""
    if args.labels is not None:
        labels = search_spaces.load_labels(trainer.space, args.labels[args.space.index(trainer.name)])
    else:
        labels = getattr(trainer.space, "labels", None)
    if labels is None:
        raise ValueError(f"--mode {args.mode} needs --labels FILE, as {trainer.name} has no labels of its own")
    try:
        labels = [(arch, float(value)) for arch, value in labels]
        right = all(math.isfinite(value) for _, value in labels)
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ValueError(f"labels of {trainer.name}: expected [(arch, number)]")
    if len(labels[:args.limit]) < 3:
        raise ValueError(f"--mode {args.mode}: expected at least 3 architectures, not {len(labels[:args.limit])}")
    return labels


def split_labels(args: argparse.Namespace, trainer: Trainer) -> tuple[Labels, Labels]:
    """The first --limit labels, and those of the others that are of no equal network; none if these are two or less."""
    labels = load_labels(args, trainer)
    first = labels[:args.limit]
    seen = {trainer.space.key(arch) for arch, _ in first}
    others = [(arch, value) for arch, value in labels[len(first):] if trainer.space.key(arch) not in seen]
    return first, others if len(others) > 2 else []


def evolution_of(args: argparse.Namespace) -> dict[str, int]:
    """What `regularized_evolution` is given."""
    alike = args.preset == "paper" and args.mode == "search-task"  # the paper searches tasks as it does architectures
    population, tournament, cycles = EVOLUTIONS.get("search" if alike else args.mode, (1, 1, 0))
    cycles = cycles if args.cycles is None else args.cycles
    if args.mode == "search-task" and args.task and not cycles:  # no search: the weights of this task are fitted
        population = 1
    population = args.population or population
    evolution = {"population": population, "cycles": cycles}
    for option, default in (("tournament", tournament), ("batch", 1 if args.preset == "paper" else 8)):
        evolution[option] = getattr(args, option) or min(default, population)
        if evolution[option] > population:
            raise ValueError(f"--{option} {evolution[option]}: expected at most the population, {population}")
    return evolution


def run(args: argparse.Namespace, torchrun: Torchrun | None, words: tuple, started: list[Scorer]) -> None:
    """The mode, from its input to its result. Its scorers enter `started` before the first network is trained."""
    clock = time.perf_counter()
    if args.plot is not None:
        check_plot(args.plot, args.out)
    if torchrun and args.workers:
        raise ValueError("--workers is for one machine without torchrun; expected torchrun --nproc-per-node N")
    evolution = evolution_of(args)
    spaces = args.space
    trainers = torchrun.trainers if torchrun else {space: Trainer(space, *words[1:]) for space in spaces}
    trainer = trainers[spaces[0]]
    images = " and ".join(dict.fromkeys(each.images_name for each in trainers.values()))
    name = trainer.task_name if args.task is None else args.task
    task = read_task(name)
    for each in trainers.values():
        if (each.images is None) != isinstance(task, RnnTask):
            raise ValueError(f"task {name} is not for {each.name}; expected one like {each.task_name}")

    def start(total: int) -> list[Scorer]:
        """One for each space, for so many scores, once the input is known to be right."""
        asked = None if args.mode == "search-task" else json.loads(task.unweighted().to_json())
        record = Record(args.out, made_with_all(trainers) | {"task": asked})
        if not args.quiet:
            about = f"task {name}, " if asked or args.task else ""
            steps = " and ".join(dict.fromkeys(str(each.settings.steps) for each in trainers.values()))
            write_stderr(f"gennas: {args.mode} {' '.join(spaces)}, {about}{steps} steps, images {images}, on "
                         f"{trainer.device.type}\n")
        if trainer.device.type == "cpu":  # a worker keeps a core or a GPU busy
            useful = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        else:
            useful = torch.cuda.device_count() if args.device in (None, "cuda") else 1
        count = min(args.workers or useful, total)
        workers = torchrun or (Processes(count, words) if count > 1 else None)
        progress = Progress(total, args.quiet)
        started.extend(Scorer(each, workers, record, progress) for each in trainers.values())
        return started

    candidates = evolution["population"] + evolution["cycles"]
    match args.mode:
        case "search":
            limits = {"params": args.max_params, "flops": args.max_flops}
            if args.max_flops and not getattr(trainer.space, "flops", None):
                raise ValueError(f"--max-flops: {trainer.name} does not count operations; expected --max-params")
            # one draw first: limits that nothing meets are told before anything is started
            within_limits([trainer.space.random], trainer.space, limits)[0](random.Random(args.seed))
            result = run_search(*start(candidates), task, args.seed, limits, evolution, args.plot)
        case "search-task":
            labels, others = zip(*(split_labels(args, each) for each in trainers.values()))
            scorers = start(candidates * sum(map(len, labels)) + sum(map(len, others)))
            first = task if args.task else None
            result = run_search_task(scorers, type(task), first, labels, others, args.seed, evolution, args.plot)
        case "correlate":
            labels = load_labels(args, trainer)[:args.limit]
            result = run_correlate(*start(len(labels)), task, labels, args.plot)
        case "score":
            texts = sys.stdin.read().splitlines() if args.arch == ["-"] else args.arch
            archs = [trainer.space.parse(text) for text in texts if text.strip()]
            if not archs:
                raise ValueError("--mode score needs ARCH [ARCH ...]; expected some, or - and one a line on stdin")
            result = run_score(*start(len(archs)), task, archs, args.plot)
        case "show":
            result = run_show(trainer, task, args.plot)
    if args.json:
        asked = spaces if len(spaces) > 1 else trainer.name
        about = {"mode": args.mode, "space": asked, "task": name, **result, "preset": args.preset}
        seconds = round(time.perf_counter() - clock, 3)
        print_line(json.dumps(about | {"images": images, "seconds": seconds}))


def main(argv: list[str] | None = None) -> None:
    """The command line. Whatever is wrong becomes one line on stderr and an exit status."""
    while (closed := os.open(os.devnull, os.O_RDWR)) < 3:  # a standard stream: no file opened later may take its place
        pass
    os.close(closed)
    sys.stdin, sys.stdout, sys.stderr = (stream or open(os.devnull, "r+")
                                         for stream in (sys.stdin, sys.stdout, sys.stderr))
    if search_spaces is None:
        fail(1, "error: the command line needs search_spaces.py; expected both files in one folder")
    args = parse_arguments(argv)
    words = args.space, args.preset, args.steps, args.images, args.seed, args.device
    torchrun, started = None, []

    def end(status: int, message: str) -> None:
        """With what is known so far, below the progress line, if that is still open."""
        known = []
        for scorer in started[:1]:  # they share record and progress
            if scorer.record.known:
                kept = f" and kept in {args.out}" if args.out else ""
                known = [f"{len(scorer.record.known)} networks are scored{kept}", *scorer.progress.leader()]
            write_stderr("\n" * scorer.progress.open)
        fail(status, message, *known)

    try:
        if distributed.is_available() and distributed.is_torchelastic_launched():
            torchrun = Torchrun(words)
            if torchrun.rank:
                handle_endings(os_signal.SIG_DFL)  # `serve` waits where Python handles no signal
                return torchrun.serve()
            if isinstance(torchrun.trainers, str):
                raise ValueError(torchrun.trainers)
            torchrun.store.set("made with", json.dumps(made_with_all(torchrun.trainers)))
        run(args, torchrun, words, started)
        if torchrun:
            torchrun.end()
    except KeyboardInterrupt:
        end(130, "interrupted")
    except ValueError as error:
        end(2, f"error: {error}")
    except (ChildProcessError, getattr(distributed, "DistError", ChildProcessError)) as error:
        end(1, f"error: {error}")
    except OSError as error:
        in_output = error.filename == "stdout"
        if in_output:  # what it still holds would fail once more when Python ends
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        end(1 if started or in_output else 2, f"error: {what}")
    except (Exception, SystemExit) as error:
        if set(args.space) <= set(search_spaces.SPACES):
            raise
        end(2, f"error: {' '.join(args.space)}: {type(error).__name__}: {error}")  # its methods can raise anything


ENDINGS = [getattr(os_signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(os_signal, name)]


def handle_endings(handler: Any) -> None:
    """Of the signals that end a run, but for those that are ignored, as nohup sets it."""
    for number in ENDINGS:
        if os_signal.getsignal(number) != os_signal.SIG_IGN:
            os_signal.signal(number, handler)


def interrupt(*_: Any) -> None:
    """Ends a run in order, with what it has; one more signal ends it at once."""
    handle_endings(os_signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    handle_endings(interrupt)
    try:
        main()
    finally:
        handle_endings(os_signal.SIG_DFL)  # there is nothing left to say
