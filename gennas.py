# SPDX-License-Identifier: MIT
"""GenNAS: score a neural architecture without labels, by how well it regresses synthetic signals after a few steps.

Li, Hao, Li, Xiong, Chen: Generic Neural Architecture Search via Regression (NeurIPS 2021, arXiv 2108.01899).

1. A task says which mix of synthetic signals a network's three stages must reproduce, given one batch of images.
2. The network is trained on it for a few steps; what it does not reproduce is its loss.
3. The log of the loss is its score (the preset "fast" adds other terms, see PRESETS): the lower, the better.
4. Regularized evolution searches the architecture of the best score, or, on labelled architectures, the best task. What
   it finds is trained again with fresh seeds: the finale.

Above the banner stands the method, in the order in which it runs: signal bases, task, images, regression, score, rank
correlation, evolution. Below it stands what runs it: `Scorer`, the way in from Python; record, workers, pictures; the
command line (`python gennas.py --help`); the authors' tasks.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import zipfile
from collections import Counter, deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    """The settings of a training. The defaults are the paper's; the preset "fast" differs, see PRESETS."""
    steps: int = 100  # of training; after 0 the untrained network is scored
    learning_rate: float = 0.1  # of SGD, constant
    momentum: float = 0.9
    weight_decay: float = 4e-5  # on parameters of more than one dimension
    rnn_learning_rate: float = 1e-3  # of Adam; the benchmark's own
    rnn_weight_decay: float = 1.2e-6  # on all parameters
    stage_weights: tuple[float, ...] = (0.25, 0.5, 1.0)  # of the stages in the loss; one of weight 0 is not trained
    batch: int = 16  # images or sequences
    side: int = 32  # of the images, in pixels
    size: int = 8  # side of the targets, length of the sequences
    ridge: float | None = None  # penalty of solved heads; None: the heads are trained, as the network is


class Preset(NamedTuple):
    """The way in which the networks of a family of spaces are trained and scored."""
    settings: Settings
    sizes: dict[str, Any] = {}  # of the network that is trained: arguments of the space's class in search_spaces
    weights: dict[str, float] = {"log loss": 1.0}  # of the terms of a score; all but this default were chosen on labels
    task: str | None = None  # None: the space's own


FAST = Settings(steps=16, learning_rate=1.0, rnn_learning_rate=0.005, side=16, ridge=1.0)
WITH_SIZE = {"log loss": 1.0, "log params": -0.03}  # not in the paper: at an equal loss the larger network is better
CELLS = Preset(replace(FAST, steps=6), {"shrink": 4, "all_blocks": True}, WITH_SIZE, "combo")
RESIDUAL = Preset(replace(FAST, steps=2), {"all_blocks": True}, WITH_SIZE, "combo")
# preset -> family of spaces -> how it is scored; "": families that are not named, and spaces of your own
PRESETS: dict[str, dict[str, Preset]] = {
    "paper": {"": Preset(Settings()), "nbnlp": Preset(Settings(), {"reservoir": True})},
    "fast": {
        "": Preset(FAST),
        # stage 1 ranks nb101 and nb201 backwards
        "nb101": Preset(replace(FAST, stage_weights=(0.0, 0.5, 1.0)), {"cells": 2, "all_blocks": True},
                        {"log loss": 1.0, "log loss 2 after": 1.0}),
        # five cells a stage, as in the benchmark, and how far stage 3 has come from "before" tell the best apart
        "nb201": Preset(replace(FAST, steps=10, learning_rate=0.3, batch=8, side=24, stage_weights=(0.0, 0.5, 1.0)),
                        {"width": 8, "cells": 5, "all_blocks": True},
                        {"log loss": 1.0, "log params": -0.07, "log loss 3 before": -0.15}),
        # here depth is good, and early losses punish it: the loss alone ranks backwards
        "nbmacro": Preset(replace(FAST, steps=8, learning_rate=0.3, batch=32), {"width": 8}, {
            "log loss": 1.0, "log loss 1 after": 7.0, "log loss 2 after": -1.4, "log loss 3 before": -0.2}, "combo"),
        "nbnlp": Preset(replace(FAST, steps=72, batch=32, size=4), {"reservoir": True, "widths": (100, 150, 150, 100)}),
        **dict.fromkeys(("darts", "enas", "pnas", "nasnet", "amoeba"), CELLS),
        **dict.fromkeys(("resnet", "resnext-a"), RESIDUAL),
        "resnext-b": RESIDUAL._replace(sizes={"shrink": 4, "all_blocks": True}),
    },
}


# ----------------------------------------------------------------------------------------- signal bases (paper, 3.2)
# Each function returns C maps for each of B images, a tensor (B, C, H, W), drawn from the generator `rng` (a CPU one,
# so that all devices regress the same signals). Positions count from 1 along both axes.
Shape = tuple[int, int, int, int]
MAPS_PER_WAVE = 32


def sin1d(rng: torch.Generator, shape: Shape, frequencies: Iterable[float]) -> Tensor:
    """Draw waves sin(2 pi f y + phi) and sin(2 pi f x + phi)."""
    f = torch.tensor(tuple(frequencies))
    return sinusoids(rng, shape, torch.cat([f, 0 * f]), torch.cat([0 * f, f]))


def sin2d(rng: torch.Generator, shape: Shape, frequencies: Iterable[float]) -> Tensor:
    """Draw waves sin(2 pi f y + 2 pi g x + phi) and their mirror images in y, for all ordered pairs f, g."""
    f, g = torch.cartesian_prod(*[torch.tensor(tuple(frequencies))] * 2).T
    return sinusoids(rng, shape, torch.cat([f, -f]), torch.cat([g, g]))


def sinusoids(rng: torch.Generator, shape: Shape, fy: Tensor, fx: Tensor) -> Tensor:
    """Draw C of the maps sin(2 pi (fy y + fx x) + phi), at most 32 of each wave (fy, fx) for an image. The authors draw
    half of them as cosines, which are sines too, since phi ~ U(0, 2 pi)."""
    B, C, H, W = shape
    maps = torch.rand(B, len(fy) * MAPS_PER_WAVE, generator=rng).topk(C).indices  # (B, C)
    wave = (maps // MAPS_PER_WAVE)[..., None, None]
    phase = 2 * math.pi * torch.rand(B, C, 1, 1, generator=rng)
    y, x = torch.arange(1, H + 1)[:, None], torch.arange(1, W + 1)
    return torch.sin(2 * math.pi * (fy[wave] * y + fx[wave] * x) + phase)


def dot(rng: torch.Generator, shape: Shape, density: float, least: int = 0) -> Tensor:
    """Set floor(density H W) positions, at least `least`, to +1 or -1; the others are 0."""
    B, C, H, W = shape
    dots = max(least, math.floor(density * H * W))
    shuffled = torch.rand(B, C, H * W, generator=rng).argsort(-1)
    signs = 2 * torch.randint(0, 2, (B, C, H * W), generator=rng) - 1
    return torch.where(shuffled < dots, signs, 0).float().view(shape)


def gdot(rng: torch.Generator, shape: Shape, density: float) -> Tensor:
    """Smooth dots by a gaussian of sigma 1, and divide by the map's largest absolute value."""
    smooth = blur_matrix(shape[2]) @ dot(rng, shape, density, least=1) @ blur_matrix(shape[3]).T
    return smooth / smooth.abs().amax((2, 3), keepdim=True)


def blur_matrix(size: int, radius: int = 4) -> Tensor:
    """Return the convolution with a gaussian, cut at `radius`, its border mirrored, as a matrix (size, size)."""
    gaussian = np.exp(-np.arange(-radius, radius + 1) ** 2 / 2)
    mirrored = np.pad(np.eye(size), ((radius, radius), (0, 0)), mode="symmetric")
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, 2 * radius + 1, axis=0)  # (size, size, 2 radius + 1)
    return torch.from_numpy(windows @ (gaussian / gaussian.sum())).float()


def resize(rng: torch.Generator, shape: Shape, images: Tensor) -> Tensor:
    """Make the images (B, 3, h, w) H x W, scaled to [-1, 1] as a whole; each map is one random colour."""
    small = F.interpolate(images, size=shape[2:])
    low, high = small.aminmax()
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
def check(right: bool, name: str, value: Any, expected: str) -> None:
    """Raise ValueError, which names what is wrong and what would be right, unless it is right."""
    if not right:
        raise ValueError(f"{name}: expected {expected}, not {value!r:.80}")


def seed_of(*purpose: Any) -> int:
    """Return a seed that depends on what it is for and on nothing else: not on order, process or machine."""
    return int(digest_of(json.dumps(purpose).encode())[:8], 16)


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


@dataclass(frozen=True)
class Signal:
    """A summand of a target: `level` (0 to 10) times maps of a basis."""
    basis: str
    level: float
    per_sample: bool | None = None  # whether each image has maps of its own or all share theirs; not of resize
    frequencies: tuple[float, ...] | None = None  # of sin1d and sin2d: 10, in cycles per position, inside of (0, 0.5)
    density: float | None = None  # of dot and gdot: the share of positions, 0 to 1

    def __post_init__(self) -> None:
        check(self.basis in BASES, "basis", self.basis, f"one of {', '.join(BASES)}")
        check(0 <= self.level <= 10, "level", self.level, "a number from 0 to 10")
        own = tuple(name for name in ("frequencies", "density", "per_sample") if getattr(self, name) is not None)
        check(own == BASES[self.basis][1], f"fields of a {self.basis}", own, f"{BASES[self.basis][1]}")
        f = (0.1,) * 10 if self.frequencies is None else self.frequencies
        check(len(f) == 10 and 0 < min(f) and max(f) < 0.5, "frequencies", f, "10 numbers above 0 and below 0.5")
        check(0 <= (self.density or 0) <= 1, "density", self.density, "a number from 0 to 1")
        check(self.per_sample in (None, True, False), "per_sample", self.per_sample, "true or false")

    def maps(self, shape: Shape, images: Tensor | None, *purpose: Any) -> Tensor:
        """Draw the maps, (B, C, H, W), or (1, C, H, W) if all images share them, from a generator that the purpose and
        the basis seed, so that no other signal matters."""
        rng = torch.Generator().manual_seed(seed_of(*purpose, self.basis))
        draw, fields = BASES[self.basis]
        return draw(rng, shape if self.per_sample else (1, *shape[1:]), getattr(self, fields[0]) if fields else images)


@dataclass(frozen=True)
class Noise:
    """The noise on the input of every pass: uniform in [-level, level], or gaussian times the level (0 to 10)."""
    kind: str
    level: float

    def __post_init__(self) -> None:
        check(self.kind in ("uniform", "gaussian"), "kind", self.kind, "uniform or gaussian")
        check(0 <= self.level <= 10, "level", self.level, "a number from 0 to 10")


@dataclass(frozen=True)
class Stage:
    """The target of one tap: `channels` (1 to 640, so many maps has sin1d) sums of signals."""
    channels: int
    signals: tuple[Signal, ...]

    def __post_init__(self) -> None:
        check(type(self.channels) is int and 1 <= self.channels <= 640, "channels", self.channels, "1 to 640")
        right = type(self.signals) is tuple and len({s.basis for s in self.signals}) == len(self.signals)
        check(right, "signals", self.signals, "a list of signals, no basis twice")


@dataclass(frozen=True)
class AnyTask:
    """A task of either kind of network, which says what `parts` it has: tensors, and the signals of each."""
    noise: Noise
    weights: dict[str, float] | None = field(default=None, hash=False, kw_only=True)  # of a score's terms, see TERMS

    def __post_init__(self) -> None:
        check(isinstance(self.noise, Noise), "noise", self.noise, "a kind and a level")
        if self.weights is not None:
            right = set(self.weights) <= set(TERMS) and all(abs(w) < math.inf for w in self.weights.values())
            check(right, "weights", self.weights, f"numbers by term, of {', '.join(TERMS)}")

    def draw(self, images: Tensor | None, seed: int, batch: int = 16, size: int = 8) -> list[Tensor]:
        """Draw the tensors (B, C, H, W) of all parts, sums of level * maps, from (task, images, seed) alone."""
        return [sum((signal.level * signal.maps(shape, images, name, seed) for signal in signals), torch.zeros(shape))
                for name, (signals, shape) in self.parts(batch, size).items()]

    def to_json(self) -> str:
        return json.dumps(asdict(self, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None}))

    def digest(self) -> str:
        """Return what names the signals in a record, whatever their weights, a level of 1 being one of 1.0."""
        numbers = json.loads(replace(self, weights=None).to_json(), parse_int=float)
        return digest_of(json.dumps(numbers).encode())


@dataclass(frozen=True)
class Task(AnyTask):
    """A task: what a CNN must regress at its three taps, and the noise on its input."""
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check([type(stage) for stage in self.stages] == [Stage] * 3, "stages", self.stages, "three")

    def parts(self, batch: int, size: int) -> dict[str, tuple[tuple[Signal, ...], Shape]]:
        """Return, by the name of a tensor, the signals that it sums, and its shape."""
        return {f"target {number}": (stage.signals, (batch, stage.channels, size, size))
                for number, stage in enumerate(self.stages, start=1)}


@dataclass(frozen=True)
class RnnTask(AnyTask):
    """A task: what a recurrent network must make of what, sequences of `dimension` (1 to 1024) numbers. A sequence is
    one map; y is its time, x its feature."""
    dimension: int
    input: tuple[Signal, ...]
    target: tuple[Signal, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check(type(self.dimension) is int and 1 <= self.dimension <= 1024, "dimension", self.dimension, "1 to 1024")
        check(all(s.per_sample for s in self.input + self.target), "per_sample", False, "true in all signals")

    def parts(self, batch: int, size: int) -> dict[str, tuple[tuple[Signal, ...], Shape]]:
        return {name: (getattr(self, name), (batch, 1, size, self.dimension)) for name in ("input", "target")}


MEDIUM = (.125, .15, .175, .2, .225, .25, .275, .3, .325, .35)
HIGH = (.375, .3875, .4, .4125, .425, .4375, .45, .4625, .475, .4875)
COMBO = Task(Noise("gaussian", 0.0), (  # the authors' task that is made by hand; TASKS, at the end, has the others
    Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("sin2d", 1.0, True, HIGH),
               Signal("dot", 1.0, True, density=1.0))),
    Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("sin2d", 1.0, True, MEDIUM), Signal("resize", 1.0))),
    Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("dot", 1.0, True, density=1.0), Signal("resize", 1.0)))))


def task_from_json(text: str | bytes, name: str = "task") -> AnyTask:
    """Return the task that `to_json` wrote. ValueError tells what is absent, unknown or out of range."""
    try:
        task = json.loads(text, object_hook=part_from_json)
        check(isinstance(task, AnyTask), "JSON", task, "an object with stages, or with dimension, input and target")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    return task


def part_from_json(values: dict[str, Any]) -> Any:
    """Return the part of a task that has such fields; the weights stay a dict."""
    kinds = {"basis": Signal, "kind": Noise, "channels": Stage, "stages": Task, "dimension": RnnTask}
    kind = next((kind for name, kind in kinds.items() if name in values), dict)
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# ----------------------------------------------------------------------------------------------------------- images
def synthetic_images(seed: int, batch: int) -> Tensor:
    """Draw (B, 3, 32, 32): noise with the 1/f spectrum of natural images, 0.9 of its variance common to the colours."""
    rng = torch.Generator().manual_seed(seed_of("images", seed))
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).clamp(min=1 / 32)  # (32, 17)
    maps = torch.fft.irfft2(torch.fft.rfft2(torch.randn(batch, 4, 32, 32, generator=rng)) / frequency)
    return normalised(0.9 ** 0.5 * maps[:, :1] + 0.1 ** 0.5 * maps[:, 1:])


def read_images(path: str, batch: int) -> Tensor:
    """Return the first images of a .npy, or of an .npz's first array of four dimensions, normalised, (B, 3, 32, 32).
    ValueError unless it is uint8, or float in [0, 1], (N, H, W, 3) or (N, 3, H, W)."""
    try:
        array = np.load(path, mmap_mode="r")  # a .npy is mapped, not read; pickles are refused
        if isinstance(array, np.lib.npyio.NpzFile):
            array = next((array[name] for name in array.files if array[name].ndim == 4), np.empty(0))
        right = array.ndim == 4 and 3 in (array.shape[1], array.shape[3]) and len(array) >= batch
        check(right, "shape", array.shape, f"(N, H, W, 3) or (N, 3, H, W), N at least {batch}")
        images = torch.from_numpy(np.array(array[:batch], np.float32)) / (255 if array.dtype == np.uint8 else 1)
        check(bool(0 <= images.min() <= images.max() <= 1), "values", array.dtype.name, "uint8, or float from 0 to 1")
        return resized(normalised(images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images), 32)
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"images {path}: {error}; expected a .npy or .npz array") from None


def normalised(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) less the mean of each colour, over its standard deviation."""
    std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    check(bool(std.min() > 0), "colours", "one that is the same everywhere", "varied ones")
    return (images - mean) / std


def resized(images: Tensor, side: int) -> Tensor:
    """Return (B, 3, H, W) as (B, 3, side, side): larger by nearest, smaller without aliasing."""
    smaller = side < max(images.shape[2:])
    return F.interpolate(images, size=side, mode="bilinear" if smaller else "nearest", antialias=smaller)


# ------------------------------------------------------------------------------------------ regression (paper, 3.1)
class Trained(NamedTuple):
    """The result of a training."""
    loss: float  # after the last step, weighted over the stages; not finite: it diverged
    losses: list[list[float]]  # of each stage, steps + 1: before each step and, in eval() mode, after the last
    params: int  # of the network that was trained, without heads
    seconds: float = 0.0  # as a Scorer measures them


def rows(x: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as (B H W, C), a row for each position, or sequences (B, T, C) as (B T, C)."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(0, -2)


def ridge_loss(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Return the mean squared error of the linear head that is best for these features, and its penalty.

    That is the minimum over W of mean((F W - Y)^2) + ridge |W|^2 / T, for features F (N, C), which are standardised
    here, and a target Y (N, T) of mean 0. W = (F'F + ridge N I)^-1 F'Y = F'(FF' + ridge N I)^-1 Y, in the smaller form.
    That W depends on F adds nothing to the gradient, at its minimum (variable projection: Golub and Pereyra, 1973).
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


class Regression:
    """The regression of one task on one batch of images, the same targets for every architecture (paper, 3.1).

    `regression(space, arch)` trains the network and returns its losses, a pure function of (space, space.key(arch),
    task, images, settings, seed) and the kind of device. The state of the global generators is put back. `images`,
    (B, 3, H, W), are made settings.side pixels wide; a recurrent task needs none, its input is a signal.

    The paper trains a linear head on each tap along with the network. With settings.ridge the heads are solved for
    instead, exactly and at every step: the loss tells from the first step on what the features are good for, not how
    far the heads have come. Then batch norm is by the batch at hand throughout.
    """

    def __init__(self, task: AnyTask, images: Tensor | None, settings: Settings = Settings(), seed: int = 0,
                 device: str = "cpu"):
        self.task, self.settings, self.seed, self.device = task, settings, seed, torch.device(device)
        if isinstance(task, RnnTask):
            tensors = [maps[:, 0] for maps in task.draw(None, seed, settings.batch, settings.size)]  # (B, T, D)
        else:
            images = resized(images[:settings.batch], settings.side)
            tensors = [images, *task.draw(images, seed, settings.batch, settings.size)]
        layouts = [torch.channels_last if x.ndim == 4 else torch.preserve_format for x in tensors]
        self.input, *self.targets = [x.to(self.device, memory_format=layout) for x, layout in zip(tensors, layouts)]
        stage_weights = settings.stage_weights[-len(self.targets):]  # a recurrent network has one stage, the last
        self.stages = [stage for stage, weight in enumerate(stage_weights) if weight]  # those that count
        self.stage_weights = torch.tensor(stage_weights, device=self.device)[self.stages]
        self.target_rows: dict[tuple[int, ...], Tensor] = {}  # made once for a stage and the sides of its tap

    def __call__(self, space: Any, arch: Any) -> Trained:
        purpose = getattr(space, "name", type(space).__name__), space.key(arch), self.seed
        steps, ridge, history = self.settings.steps, self.settings.ridge, []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # 1. the network, its parameters drawn on the CPU, so that they are equal on all devices
            self.seed_generators("weights", *purpose)
            body = space.build(arch)
            params = sum(parameter.numel() for parameter in body.parameters())
            network = self.with_heads(body).to(self.device, memory_format=torch.channels_last)
            optimizer = self.optimizer(network)
            body, *heads = network
            self.seed_generators("noise", *purpose)

            for step in range(steps + 1):
                if step in (0, steps):  # the last pass only evaluates
                    network.train(step < steps)
                with torch.set_grad_enabled(step < steps):
                    # 2. what the stages make of the input with fresh noise
                    noise = torch.empty_like(self.input)
                    noise = noise.uniform_(-1, 1) if self.task.noise.kind == "uniform" else noise.normal_()
                    taps = body(self.input + noise.mul_(self.task.noise.level))
                    taps = [taps] if isinstance(self.task, RnnTask) else taps
                    check(len(taps) == len(self.targets), "feature maps", len(taps), f"{len(self.targets)}")

                    # 3. the loss of each stage that counts: of its trained head, or of the best head for these features
                    losses = torch.stack([
                        F.mse_loss(heads[stage](taps[stage]), self.targets[stage]) if ridge is None
                        else ridge_loss(*self.matched(stage, taps[stage]), ridge) for stage in self.stages])
                    loss = self.stage_weights @ losses
                history.append(losses.detach())  # stays on the device until the end: no step waits for it

                # 4. a step of SGD or Adam; a dead network learns nothing
                if loss.requires_grad:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

            table = torch.stack(history)  # (steps + 1, stages that count)
            curves = dict(zip(self.stages, table.T.tolist()))
            return Trained((table @ self.stage_weights).tolist()[-1],
                           [curves.get(stage, []) for stage in range(len(self.targets))], params)

    def seed_generators(self, *purpose: Any) -> None:
        """Seed the CPU's generator and that of this device, and no other, as `torch.manual_seed` would."""
        torch.default_generator.manual_seed(seed_of(*purpose))
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed_of(*purpose))

    def with_heads(self, body: nn.Module) -> nn.ModuleList:
        """Return the network as it is trained, then its heads if these are trained; the global generator draws them."""
        if isinstance(self.task, RnnTask):  # (B, T, D) -> encoder, (B, T, width) -> body; the head is the decoder
            sizes = [(self.task.dimension, body.width), (body.width, self.task.dimension)]
            encoder, *heads = [nn.Linear(*size) for size in sizes[:2 if self.settings.ridge is None else 1]]
            for layer in (encoder, *heads):
                nn.init.uniform_(layer.weight, -0.1, 0.1)
            for layer in heads:
                nn.init.zeros_(layer.bias)
            return nn.ModuleList([nn.Sequential(encoder, body), *heads])
        if self.settings.ridge is not None:
            torch.func.replace_all_batch_norm_modules_(body)  # by those without running statistics
            return nn.ModuleList([body])
        with torch.no_grad():  # of two images, because some batch norms use the batch's own statistics in eval() too
            widths = [tap.shape[1] for tap in body.eval()(self.input[:2].cpu())]
        return nn.ModuleList([body, *(
            nn.Sequential(nn.Upsample(target.shape[2:]), nn.BatchNorm2d(width), nn.Conv2d(width, target.shape[1], 1))
            for width, target in zip(widths, self.targets, strict=True))])

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        parameters, settings = list(network.parameters()), self.settings
        if isinstance(self.task, RnnTask):
            return torch.optim.Adam(parameters, settings.rnn_learning_rate, weight_decay=settings.rnn_weight_decay,
                                    fused=True)
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
                  {"params": [p for p in parameters if p.ndim <= 1]}]
        return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, fused=True)

    def matched(self, stage: int, tap: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features (N, C) of a tap, and the target (N, T), of mean 0, that they must become. A larger tap is
        resized. A smaller one is compared with the target's means over its pixels, as no head can tell the rest; so
        taps should have the same size for all architectures."""
        target = self.targets[stage]
        if tap.ndim == 4 and tap.shape[2] > target.shape[2]:
            tap = F.interpolate(tap, size=target.shape[2:])
        sides = stage, *tap.shape[2:]
        if sides not in self.target_rows:
            wanted = rows(F.adaptive_avg_pool2d(target, tap.shape[2:]) if tap.ndim == 4 else target)
            self.target_rows[sides] = wanted - wanted.mean(0)
        return rows(tap), self.target_rows[sides]


# ------------------------------------------------------------------------------------------------------------ score
def terms(trained: Trained) -> dict[str, float]:
    """Return what a score may be made of: logs of the loss, of the size, of each stage's loss before and after."""
    values = {"log loss": math.log(trained.loss + 1e-9), "log params": math.log(max(trained.params, 1))}
    for stage, curve in enumerate(trained.losses, start=1):
        if curve:
            values[f"log loss {stage} before"] = math.log(curve[0] + 1e-9)
            values[f"log loss {stage} after"] = math.log(curve[-1] + 1e-9)
    return values


TERMS = tuple(terms(Trained(1.0, [[1.0]] * 3, 1)))


def score(weights: dict[str, float], trained: Trained) -> float:
    """Return the weighted sum of terms, lower is better: infinity for a network that diverged. {"log loss": 1} are the
    paper's weights. A term that the training lacks counts 0."""
    if not math.isfinite(trained.loss):
        return math.inf
    values = terms(trained)
    return sum(weight * values.get(term, 0) for term, weight in weights.items())


def fit_weights(networks: list[Trained], values: list[float], penalty: float = 20) -> tuple[dict[str, float], float]:
    """Return weights that rank labelled networks as their values, higher is better, do; and rho, by leave-one-out.

    Not in the paper. A ridge regression of the standardised ranks on the terms, in closed form. The log of the loss is
    free, the penalty draws the other terms to 0, so that few labels leave mostly the loss. Terms are measured in median
    absolute deviations and cut at four, or the few networks that hardly train would decide the weights of all others.
    """
    converged = [i for i, trained in enumerate(networks) if math.isfinite(trained.loss)]
    if len(converged) < 3:
        return {"log loss": 1.0}, math.nan
    table = [terms(networks[i]) for i in converged]
    x = np.array([list(row.values()) for row in table])  # (n, terms)
    x = x - np.median(x, 0)
    typical = np.median(abs(x), 0)
    varied, names = typical > 1e-5, list(table[0])
    x = np.clip(x[:, varied] / typical[varied], -4, 4)
    x, y = x - x.mean(0), ranks(-np.array(values)[converged])
    y = (y - y.mean()) / y.std()

    penalties = np.array([1e-6 if name == "log loss" else penalty for name in names])  # not 0: it must be regular
    solution = np.linalg.solve(x.T @ x + np.diag(penalties[varied]), x.T)  # (terms, n)
    fitted, leverage = solution @ y, (x * solution.T).sum(1)  # the latter is the diagonal of the hat matrix
    left_out = np.full(len(networks), math.inf)  # scores by leave-one-out; a diverged network stays the last
    left_out[converged] = y - (y - x @ fitted) / (1 - leverage)
    weights = zip(np.array(names)[varied].tolist(), fitted / typical[varied])
    return {name: float(f"{weight:.4g}") for name, weight in weights}, spearman(-left_out, values)


# ------------------------------------------------------------------------------------------------- rank correlation
def ranks(values: Any) -> np.ndarray:
    """Return ranks from 1 up; equal values share the mean of theirs. If one is NaN, all ranks are."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.where(np.isnan(values).any(), math.nan, (np.cumsum(counts) - (counts - 1) / 2)[place])


def spearman(a: Any, b: Any) -> float:
    """Return Spearman's rho; NaN where one side is all ties or has a NaN."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def kendall(a: Any, b: Any) -> float:
    """Return Kendall's tau-b; NaN where one side is all ties or has a NaN."""
    a, b = ranks(a), ranks(b)
    orders = ((np.sign(a - u), np.sign(b - v)) for u, v in zip(a, b))  # of one pair with all
    in_order, untied_a, untied_b = sum(np.array([x @ y, x @ x, y @ y]) for x, y in orders)
    return float(in_order / math.sqrt(untied_a * untied_b)) if untied_a * untied_b else math.nan


def spearman_interval(a: Any, b: Any, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of rho; NaN for less than 10 pairs, which tell nothing of others."""
    a, b = np.asarray(a), np.asarray(b)
    if len(a) < 10:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(a), size=(resamples, len(a)))
    return tuple(np.nanquantile([spearman(a[places], b[places]) for places in drawn], (0.025, 0.975)).tolist())


# ------------------------------------------------------------------------------------- regularized evolution (aging)
def regularized_evolution(draw: Callable, mutate: Callable, evaluate: Callable[[list], list[float]], rng: random.Random,
                          population: int = 50, tournament: int = 10, cycles: int = 400, batch: int = 1,
                          ) -> list[tuple[Any, float]]:
    """Return all (candidate, score) of an aging evolution (Real et al., AAAI 2019), in the order of their evaluation.

    `draw(rng)` gives a candidate, `mutate(candidate, rng)` a neighbour, `evaluate` a list's scores, lower is better.
    The queue starts with `population` drawn candidates; then, `cycles` times, the best of `tournament` of its members
    is mutated, and the child takes the place of the oldest. `batch` children are made before they enter the queue.
    """
    queue: deque[tuple[Any, float]] = deque(maxlen=population)  # appending to a full one drops its oldest
    history: list[tuple[Any, float]] = []
    candidates = [draw(rng) for _ in range(population)]
    while candidates:
        evaluated = list(zip(candidates, evaluate(candidates)))
        queue.extend(evaluated)
        history.extend(evaluated)

        children = min(batch, population + cycles - len(history))
        parents = [min(rng.sample(queue, tournament), key=lambda pair: pair[1])[0] for _ in range(children)]
        candidates = [mutate(parent, rng) for parent in parents]
    return history


def finale(history: list[tuple[Any, float]], key: Callable, evaluate: Callable, finalists: int = 10) -> list[tuple]:
    """Score the best different networks of an evolution anew, and return all (architecture, new score), best first.

    Not in the paper. What is on top after hundreds of draws stands there partly by luck of its parameters and images.
    So `evaluate` should use seeds that the evolution did not; the old scores no longer count.
    """
    networks = {key(arch): (arch, value) for arch, value in reversed(history)}
    archs = [arch for arch, _ in sorted(networks.values(), key=lambda pair: pair[1])[:finalists]]
    return sorted(zip(archs, evaluate(archs)), key=lambda pair: pair[1])


def draw_within(limits: dict[str, int], space: Any, draw: Callable, *given: Any) -> Any:
    """Return draw(*given), repeated until the benchmark's own network is within limits, {"params": most, ...}."""
    for arch in (draw(*given) for _ in range(500)):
        if all(getattr(space, name)(arch) <= most for name, most in limits.items()):
            return arch
    words = " and ".join(f"--max-{name} {most:,}" for name, most in limits.items())
    raise ValueError(f"none of 500 draws is within {words}; expected a wider limit")


CHANNELS = range(16, 97, 16)  # of a stage, numbers of a sequence


def random_signals(rng: random.Random, bases: Iterable[str], **fixed: Any) -> tuple[Signal, ...]:
    """Draw each basis with chance 1/2, of any level and form, rounded as JSON has it; `fixed` fields are not drawn."""
    signals = []
    for basis in [basis for basis in bases if rng.random() < 0.5]:
        low, high = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        frequencies = tuple(min(max(round(rng.uniform(low, high), 4), 1e-4), 0.4999) for _ in range(10))
        drawn = {"frequencies": frequencies, "density": round(rng.random(), 4), "per_sample": rng.random() < 0.5}
        own = {name: drawn[name] for name in BASES[basis][1]}
        signals.append(Signal(basis, rng.randint(5, 29) / 10, **own | fixed))
    return tuple(signals)


def random_task(rng: random.Random, kind: type[AnyTask]) -> AnyTask:
    """Draw from the space of tasks (paper, 3.4) of a kind, Task or RnnTask."""
    noise = Noise(rng.choice(("gaussian", "uniform")), rng.randint(0, 9) / 10)
    if kind is Task:
        return Task(noise, tuple(Stage(rng.choice(CHANNELS), random_signals(rng, BASES)) for _ in range(3)))
    bases = [basis for basis in BASES if basis != "resize"]
    return RnnTask(noise, rng.choice(CHANNELS), *[random_signals(rng, bases, per_sample=True) for _ in range(2)])


def mutate_task(task: AnyTask, rng: random.Random) -> AnyTask:
    """Draw another task: with chance 0.2 each, the noise, a stage's channels and a basis' signal are drawn again."""
    other = random_task(rng, type(task))
    noise = pick(task.noise, other.noise, rng)
    if isinstance(task, Task):
        child = Task(noise, tuple(Stage(pick(a.channels, b.channels, rng), pick_signals(a.signals, b.signals, rng))
                                  for a, b in zip(task.stages, other.stages)))
    else:
        child = RnnTask(noise, pick(task.dimension, other.dimension, rng), pick_signals(task.input, other.input, rng),
                        pick_signals(task.target, other.target, rng))
    return child if child != replace(task, weights=None) else mutate_task(task, rng)


def pick(old: Any, new: Any, rng: random.Random) -> Any:
    return new if rng.random() < 0.2 else old


def pick_signals(old: tuple[Signal, ...], new: tuple[Signal, ...], rng: random.Random) -> tuple[Signal, ...]:
    olds, news = ({signal.basis: signal for signal in signals} for signals in (old, new))
    picked = [pick(olds.get(basis), news.get(basis), rng) for basis in BASES]
    return tuple(signal for signal in picked if signal)


def search_task(start: list[AnyTask], draw: Callable[[random.Random], AnyTask], fitness: Callable[[AnyTask], float],
                rng: random.Random, **evolution: int) -> list[tuple[AnyTask, float]]:
    """Search a task (paper, 3.4) and return all (task, -fitness); the first are those of `start`, then `draw(rng)`. The
    paper's fitness is |rho| of the loss with some 20 labels; but a search minimises the score, so keep rho's sign."""
    first = deque(start)
    return regularized_evolution(lambda rng: first.popleft() if first else draw(rng), mutate_task,
                                 lambda tasks: [-fitness(task) for task in tasks], rng, **evolution)


# ===================================================================================================================
# What stands above is the method. What follows runs it.
# ===================================================================================================================
# ----------------------------------------------------------------------------------------------------------- scorer
Name = tuple[str, int, str]  # of a training: the task's digest, the seed, the network's key
Item = tuple[Name, AnyTask, Any]  # a training to be done: its name, the task, the architecture


class Scorer:
    """Scores of architectures of a space: `scorer(archs)` returns a list of numbers, lower is better.

    Each network is trained once for a task and a seed; equal keys are one network. Nothing else in the process changes.

    space: a name of `search_spaces`; FILE.py:CLASS; or an object, as it is, with random, mutate, build, key, format.
    preset, steps: a name of PRESETS, and a number of training steps in the place of its own.
    task: a name of TASKS, a FILE.json or a task; by default that of the preset or of the space.
    images: "synthetic", or the path of a file for `read_images`.
    seed, seeds: the score is the mean over seed, ..., seed + seeds - 1, of images, targets, parameters and noise.
    device: by default a GPU if there is one.
    """

    def __init__(self, space: Any, preset: str = "fast", task: AnyTask | str | None = None, images: str = "synthetic",
                 seed: int = 0, device: str | None = None, steps: int | None = None, seeds: int = 1):
        self.name = space if isinstance(space, str) else getattr(space, "name", type(space).__name__)
        family = self.name.removesuffix("-in").removesuffix("-fix")
        self.preset = PRESETS[preset].get(family, PRESETS[preset][""])
        self.settings = self.preset.settings if steps is None else replace(self.preset.settings, steps=steps)
        if isinstance(space, str):
            import search_spaces  # not at the top: a copy of this file alone scores objects
            space = search_spaces.get(space, **self.preset.sizes)
        self.space, self.seeds, self.device = space, range(seed, seed + seeds), device or find_devices(None)[0]

        self.own_task = self.preset.task or getattr(space, "task", "nb101")
        self.task = read_task(task or self.own_task)
        check(type(self.task) is type(read_task(self.own_task)), "task", task, f"one like {self.own_task}")
        self.images = None if images == "synthetic" else read_images(images, self.settings.batch)
        self.images_name = images if self.images is None else f"sha256 {digest_of(self.images.numpy().tobytes())}"
        self.record, self.progress = Record(), Progress()
        self.workers: Callable[[list[Item]], Iterable[tuple[Name, Trained]]] = self.map  # or what else trains

    def __call__(self, archs: list[Any], task: AnyTask | None = None, seeds: range | None = None) -> list[float]:
        """Return the scores, by another task or by the mean over other seeds if given."""
        task, seeds, known = task or self.task, seeds or self.seeds, self.record.known
        keys, digest = [self.space.key(arch) for arch in archs], task.digest()
        arch_of = dict(zip(keys, archs))
        asked = Counter((digest, seed, key) for key in keys for seed in seeds)  # trainings, and how often each

        self.progress.advance(sum(asked[name] for name in asked if name in known))
        items = [(name, task, arch_of[name[2]]) for name in asked if name not in known]  # those to be done
        for name, trained in (self.workers if len(items) > 1 else self.map)(items):
            self.record.add(name, self.space.format(arch_of[name[2]]), trained)
            self.progress.advance(asked[name], new=1)

        weights = self.weights(task)
        return [sum(score(weights, known[digest, seed, key]) for seed in seeds) / len(seeds) for key in keys]

    def map(self, items: list[Item]) -> Iterator[tuple[Name, Trained]]:
        """Train each in this process; workers do the same in others."""
        for name, task, arch in items:
            regression = self.regression(task, name[1])
            start = time.perf_counter()
            trained = regression(self.space, arch)
            yield name, trained._replace(seconds=round(time.perf_counter() - start, 3))

    @lru_cache(maxsize=32)
    def regression(self, task: AnyTask, seed: int) -> Regression:
        images = synthetic_images(seed, self.settings.batch) if self.images is None else self.images
        return Regression(task, images, self.settings, seed, self.device)

    def trained(self, arch: Any, task: AnyTask | None = None) -> list[Trained]:
        """Return what the trainings gave, one for each of its own seeds, of an architecture that was scored."""
        return [self.record.known[(task or self.task).digest(), seed, self.space.key(arch)] for seed in self.seeds]

    def weights(self, task: AnyTask) -> dict[str, float]:
        """Return a score's weights: the task's own; for the preset's task and steps the preset's; else of two terms."""
        weights = self.preset.weights
        if task != read_task(self.own_task) or self.settings != self.preset.settings:
            weights = {term: weights[term] for term in ("log loss", "log params") if term in weights}
        return task.weights or weights

    def made_with(self) -> dict[str, Any]:
        """Return all that a training depends on beside its name, as a record has it."""
        path = self.name.rpartition(":")[0]  # of a FILE.py:CLASS
        return json.loads(json.dumps({
            "losses": LOSSES, "space": self.name, "file": path and digest_of(Path(path).read_bytes()),
            "images": self.images_name, "device": torch.device(self.device).type, "sizes": self.preset.sizes,
            **asdict(self.settings)}))


# ----------------------------------------------------------------------------------------------- record and progress
LOSSES = 6  # raised when the same settings give other losses or other lines than before: no record mixes them


class Record:
    """The trainings that are known, by name, and their file: a line of settings, then one each, flushed as it is made.

    An existing file is read, so that a run goes on where it stopped; a torn last line is dropped with a warning.
    ValueError if it holds something else or was made with other settings: then it stays as it is.
    """

    def __init__(self, path: str | None = None, settings: dict[str, Any] | None = None):
        self.known: dict[Name, Trained] = {}
        self.file = open(path, "a+b") if path else None
        content = Path(path).read_bytes() if path else b""
        if not content:
            return self.write({"settings": settings})
        *lines, torn = content.split(b"\n")
        right = content[:14] == b'{"settings": {' and len(lines) > 0
        check(right, f"{path}: first line", content[:30], "a line of settings, or another --out file")
        made_with = json.loads(lines[0])["settings"]
        for name in settings | made_with:
            check(settings.get(name) == made_with.get(name), f"{path}: {name} of this run", settings.get(name),
                  f"{made_with.get(name)!r:.80} as there, or another --out file")
        for task, seed, key, _, loss, *rest in (json.loads(line).values() for line in lines[1:]):
            self.known[task, seed, key] = Trained(math.inf if loss is None else loss, *rest)
        if torn:
            print(f"gennas: {path}: the torn last line is dropped", file=sys.stderr)
            self.file.truncate(len(content) - len(torn))

    def add(self, name: Name, arch: str, trained: Trained) -> None:
        self.known[name] = trained
        losses = [[finite(loss) for loss in curve] for curve in trained.losses]
        line = trained._replace(loss=finite(trained.loss), losses=losses)._asdict()
        self.write({**dict(zip(("task", "seed", "key"), name)), "arch": arch, **line})

    def write(self, line: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


class Progress:
    """The progress of a run of `total` trainings: a line on stderr every ten seconds; none if the total is 0."""

    def __init__(self, total: int = 0):
        self.total, self.done, self.new = total, 0, 0
        self.start = self.shown = time.monotonic()

    def advance(self, count: int, new: int = 0) -> None:
        self.done, self.new, now = self.done + count, self.new + new, time.monotonic()
        if self.total and now - self.shown >= 10:
            self.shown, rate = now, max(self.new, 1) / (now - self.start)
            left = (self.total - self.done) / rate
            print(f"{self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- workers
def find_devices(name: str | None) -> list[str]:
    """Return the devices that `--device` means, one for each worker; ValueError for one that is not here."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus, cpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())], ["cpu"] * cores
    devices = {None: gpus or cpus, "cpu": cpus, "cuda": gpus, **{gpu: [gpu] for gpu in gpus}}
    check(bool(devices.get(name)), "--device", name, " or ".join(["cpu", *gpus]))
    return devices[name]


def set_up_process() -> None:
    """Make this process fast, and equal runs equal; for the command line and its workers alone."""
    torch.set_num_threads(1)  # small maps gain nothing from more, and sums would depend on their number
    torch.backends.cudnn.allow_tf32 = True  # of convolutions; the equations of solved heads need all their digits
    torch.backends.cudnn.deterministic = True


def start_worker(options: dict[str, Any], devices: Any) -> None:
    """Begin a process that trains, with a Scorer and a device of its own, until its parent is gone."""
    global worker
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    set_up_process()
    worker = Scorer(**options, device=devices.get())


def work(item: Item) -> tuple[Name, Trained]:
    return next(worker.map([item]))


def pool_map(pool: ProcessPoolExecutor, items: list[Item]) -> Iterator[tuple[Name, Trained]]:
    """Train on this machine, in the processes of a pool; they start when they are first needed."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: Ctrl-C is for this process alone
    futures = [pool.submit(work, item) for item in items]
    signal.signal(signal.SIGINT, handler)
    return (future.result() for future in as_completed(futures))


def torchrun_map(scorer: Scorer, items: list[Item]) -> Iterator[tuple[Name, Trained]]:
    """Train in all ranks of torchrun, on one machine or several; this is rank 0."""
    chunk = 8 * distributed.get_world_size()
    for start in range(0, len(items), chunk):
        yield from train_share(scorer, broadcast(items[start:start + chunk]))


def train_share(scorer: Scorer, items: list[Item]) -> Iterator[tuple[Name, Trained]]:
    """Train this rank's share of a chunk; give, in rank 0, what all trained, and raise what one of them raised."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    shares = [None] * world if rank == 0 else None
    try:
        share: Any = list(scorer.map(items[rank::world]))
    except Exception as error:
        share = error
    distributed.gather_object(share, shares)
    for share in sorted(shares or [], key=lambda share: isinstance(share, Exception)):  # what was trained comes first
        if isinstance(share, Exception):
            raise share
        yield from share


def serve(scorer: Scorer) -> None:
    """Train shares in another rank than 0. ValueError if this one would train otherwise than rank 0."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a broadcast waits where Python handles no signal
    mine, settings = scorer.made_with(), broadcast() or {}
    for name in settings:
        check(mine[name] == settings[name], f"{name} of a rank", mine[name], f"{settings[name]!r:.80} as in rank 0")
    while settings and (items := broadcast()):
        list(train_share(scorer, items))


def broadcast(value: Any = None) -> Any:
    """Send from rank 0, receive in the others: the settings, then chunks, and None, which ends them."""
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


# --------------------------------------------------------------------------------------------------------- pictures
def plot_signals(scorer: Scorer, path: str, count: int = 8) -> None:
    """Draw each signal of each part of a task, and their sum: maps of the first image, or one each of sequences."""
    from matplotlib.figure import Figure
    task, settings, seed, lines = scorer.task, scorer.settings, scorer.seeds[0], []
    images = scorer.regression(task, seed).input.cpu()
    totals = task.draw(images, seed, settings.batch, settings.size)
    for (name, (signals, shape)), total in zip(task.parts(settings.batch, settings.size).items(), totals):
        lines += [(f"{name}\n{signal.level} {signal.basis}", signal.maps(shape, images, name, seed).expand(shape))
                  for signal in signals]
        lines.append((f"{name}\nsum", total))

    figure = Figure(layout="constrained", figsize=(2 + 0.8 * count, len(lines)))
    for (label, maps), axes in zip(lines, figure.subplots(len(lines), count)):
        most = maps.abs().max()
        for ax, values in zip(axes, maps.flatten(0, 1).numpy()):
            ax.imshow(values, cmap="RdBu_r", aspect="auto", vmin=-most, vmax=most)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=100)


def plot_lines(path: str, labels: tuple[str, str], *lines: tuple[str, Any, Any, str], title: str = "") -> None:
    """Draw lines or dots, each (name, x, y, style)."""
    from matplotlib.figure import Figure  # the only use of a third package: when a plot is asked for
    figure = Figure(layout="constrained", figsize=(5.5, 4))
    ax = figure.subplots()
    for name, x, y, style in lines:
        ax.plot(x, y, style, markersize=4, label=name)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_title(title, fontsize=8)
    if len(lines) > 1:
        figure.legend(fontsize=7, loc="outside lower center")
    figure.savefig(path, dpi=100)


def plot_history(path: str, history: list[tuple[Any, float]], label: str, title: str = "") -> None:
    """Draw the scores of an evolution and the best so far."""
    scores, numbers = [value for _, value in history], range(1, len(history) + 1)
    plot_lines(path, ("candidates evaluated", label), ("candidate", numbers, scores, "."),
               ("best so far", numbers, np.minimum.accumulate(scores), "-"), title=title)


# ------------------------------------------------------------------------------------------------------------- modes
# Each mode reads its input, begins, prints its result, and returns what --json adds to it.
def begin(scorer: Scorer, args: argparse.Namespace, trainings: int) -> None:
    """Open the record and tell what is run, now that all input is known to be right."""
    task = None if args.mode == "search-task" else json.loads(replace(scorer.task, weights=None).to_json())
    scorer.record = Record(args.out, scorer.made_with() | {"task": task})
    if not args.quiet:
        scorer.progress = Progress(trainings)
        print(f"gennas: {args.mode} {scorer.name}, {f'task {args.task or scorer.own_task}, ' if task else ''}"
              f"{scorer.settings.steps} steps, images {scorer.images_name}, on {scorer.device}", file=sys.stderr)


def run_search(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Search an architecture."""
    space, limits = scorer.space, {"params": args.max_params, "flops": args.max_flops}
    limits = {name: most for name, most in limits.items() if most}
    check("flops" not in limits or bool(getattr(space, "flops", None)), "--max-flops", args.max_flops,
          f"--max-params, as {scorer.name} counts no operations")
    draw, mutate = (partial(draw_within, limits, space, method) for method in (space.random, space.mutate))
    draw(random.Random(args.seed))  # limits that nothing meets are told before anything is trained

    # without a finale the best is scored by the search's own seeds, which costs nothing
    seeds = range(scorer.seeds.stop, scorer.seeds.stop + 2) if args.finalists else scorer.seeds
    begin(scorer, args, (args.population + args.cycles) * args.seeds + (args.finalists or 1) * len(seeds))
    history = regularized_evolution(draw, mutate, scorer, random.Random(args.seed), **args.evolution)
    best = finale(history, space.key, partial(scorer, seeds=seeds), args.finalists or 1)
    unique = len({space.key(arch) for arch, _ in history})
    check(best[0][1] < math.inf, f"scores of {unique} networks", best[0][1], "a finite one: all diverged")

    results = [{"arch": space.format(arch), "loss": finite(value), "params": int(space.params(arch))}
               for arch, value in best]
    print(f"{results[0]['arch']}\nscore {best[0][1]:.4f}{' in the finale' * bool(args.finalists)}, "
          f"{results[0]['params']:,} parameters; {len(history)} evaluated architectures, {unique} different networks")
    if args.finalists:
        print(f"\nFinale, by seeds {seeds[0]} and {seeds[1]}:\nrank     score   parameters  architecture")
    for rank, (result, (_, value)) in enumerate(zip(results[:args.finalists], best), start=1):
        print("{:>4} {:>9.4f} {params:>12,}  {arch}".format(rank, value, **result))
    if args.plot:
        plot_history(args.plot, history, "score")
    return results[0] | {"evaluated": len(history), "unique": unique, "finalists": results[:args.finalists]}


def run_score(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Score given architectures."""
    texts, space = sys.stdin.read().splitlines() if args.arch == ["-"] else args.arch, scorer.space
    archs = [space.parse(text) for text in texts if text.strip()]
    check(bool(archs), "--mode score", args.arch, "ARCH [ARCH ...], or - and one a line on stdin")

    begin(scorer, args, len(archs) * args.seeds)
    print(f"{'score':>9} {'parameters':>12} {'seconds':>8}  architecture")
    results, chunk = [], 8 * args.workers
    for some in (archs[start:start + chunk] for start in range(0, len(archs), chunk)):
        for arch, value in zip(some, scorer(some)):
            seconds = round(sum(trained.seconds for trained in scorer.trained(arch)), 3)
            results.append({"arch": space.format(arch), "loss": finite(value), "params": int(space.params(arch)),
                            "seconds": seconds})
            print("{:>9.4f} {params:>12,} {seconds:>8.2f}  {arch}".format(value, **results[-1]), flush=True)
    if args.plot:
        curves = {space.key(arch): (space.format(arch)[:70], scorer.trained(arch)[0].losses[-1]) for arch in archs}
        plot_lines(args.plot, ("training steps", "loss of the last stage"), *(
            (text, range(len(losses)), np.array(losses, float), "-") for text, losses in curves.values()))
    return {"results": results}


def load_labels(scorer: Scorer, args: argparse.Namespace) -> tuple[list, list]:
    """Return the first --limit labels, (architecture, value), and those of the others that are of no equal network."""
    import search_spaces
    space = scorer.space
    labels = search_spaces.load_labels(space, args.labels) if args.labels else getattr(space, "labels", None)
    check(bool(labels), "--labels", args.labels, f"a FILE, as {scorer.name} has no labels of its own")
    first, rest = labels[:args.limit], labels[args.limit or len(labels):]
    check(len({value for _, value in first}) > 1, f"values of {len(first)} labels", first[0][1], "different ones")
    seen = {space.key(arch) for arch, _ in first}
    return first, [(arch, value) for arch, value in rest if space.key(arch) not in seen]


def run_correlate(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Compare the ranking by score with that by recorded values."""
    archs, values = zip(*load_labels(scorer, args)[0])
    begin(scorer, args, len(archs) * args.seeds)
    scores, values = np.array(scorer(list(archs))), np.array(values)
    rho, tau, interval = (statistic(-scores, values) for statistic in (spearman, kendall, spearman_interval))
    check(not math.isnan(rho), f"scores of {len(archs)} networks", scores[0], "different ones")
    by_params = spearman([scorer.space.params(arch) for arch in archs], values)
    best = values >= np.quantile(values, 0.9)  # a search lives among these
    in_best = spearman(-scores[best], values[best]) if best.sum() >= 10 else math.nan
    seconds = sum(trained.seconds for arch in archs for trained in scorer.trained(arch)) / len(archs)

    summary = "spearman {:.3f} [{:.3f}, {:.3f}], kendall {:.3f}, {} networks".format(rho, *interval, tau, len(archs))
    print(f"{summary}\nthe parameter count alone: spearman {by_params:.3f}\namong the best tenth by recorded value: "
          f"spearman {in_best:.3f}\ndiverged: {np.isinf(scores).sum()}; {seconds:.2f} s a network")
    if args.plot:
        plot_lines(args.plot, ("score", "recorded value"), ("", scores, values, "."), title=summary)
    return {"n": len(archs), "spearman": rho, "spearman_ci": list(map(finite, interval)), "kendall": tau,
            "spearman_params": finite(by_params), "spearman_best_tenth": finite(in_best), "seconds_per_arch": seconds}


def run_search_task(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Search a task whose score ranks labelled architectures, and fit the weights of its score to them."""
    labels, others = load_labels(scorer, args)
    labels = list({scorer.space.key(arch): (arch, value) for arch, value in reversed(labels)}.values())
    start = [scorer.task] if args.task else [task for task in TASKS.values() if type(task) is type(scorer.task)]
    draw = partial(mutate_task, scorer.task) if args.task else partial(random_task, kind=type(scorer.task))

    begin(scorer, args, (args.population + args.cycles) * len(labels) + len(others))
    history = search_task(start, draw, partial(rho_of, scorer, labels), random.Random(args.seed), **args.evolution)
    task, rho = max(((task, -value) for task, value in history), key=lambda pair: pair[1])
    weights, rho_left_out = fit_weights([scorer.trained(arch, task)[0] for arch, _ in labels],
                                        [value for _, value in labels])
    if fitted := rho_left_out > rho:
        task, rho = replace(task, weights=weights), rho_left_out

    print(task.to_json())
    result = {"task": json.loads(task.to_json()), "n": len(labels), "spearman": rho, "evaluated": len(history)}
    summary = f"spearman {rho:.3f} on {len(labels)} networks{', leave-one-out, by fitted weights' * fitted}"
    if len({value for _, value in others}) > 1:
        result |= {"n_held_out": len(others), "spearman_held_out": rho_of(scorer, others, task)}
        summary += f"; {result['spearman_held_out']:.3f} on {len(others)} others"
    print(f"gennas: {summary}; the best of {len(history)} tasks", file=sys.stderr)
    if args.plot:
        plot_history(args.plot, history, "- rho", summary)
    return result


def rho_of(scorer: Scorer, labels: list, task: AnyTask) -> float:
    """Return rho of a task's score, its sign turned, with labels (architecture, value); an undefined one counts 0."""
    archs, values = zip(*labels)
    return float(np.nan_to_num(spearman(-np.array(scorer(list(archs), task)), values)))


def run_show(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Show a task as JSON, the formula of its score and, with --plot, its signals."""
    formula = " ".join(f"{weight:+g} {term}" for term, weight in scorer.weights(scorer.task).items())
    chosen = "" if scorer.task.weights or formula == "+1 log loss" else "; the weights were chosen on labels"
    print(f"gennas: score = {formula}{chosen}", file=sys.stderr)
    print(scorer.task.to_json())
    if args.plot:
        plot_signals(scorer, args.plot)
    return {}


# ------------------------------------------------------------------------------------------------------ command line
MODES = {"search": run_search, "score": run_score, "correlate": run_correlate, "search-task": run_search_task,
         "show": run_show}
SEARCHES, LABELLED, SCORES = ("search", "search-task"), ("correlate", "search-task"), ("search", "score", "correlate")
OPTIONS = {  # name -> what it takes (N: a whole number), the modes that it belongs to, help
    "task": ("NAME|FILE.json", MODES, "what a network must regress; default: the task of the space"),
    "steps": ("N", MODES, "training steps, instead of the preset's; 0 trains nothing"),
    "images": ("synthetic|FILE", MODES, "a .npy or .npz array (N, H, W, 3) or (N, 3, H, W), uint8 or in [0, 1]"),
    "seed": ("N", MODES, "of images, signals, parameters, noise and search (0)"),
    "seeds": ("N", SCORES, "the score is the mean over so many seeds, from --seed up (1)"),
    "device": ("cpu|cuda[:N]", MODES, "default: cuda where there is one"),
    "population": ("N", SEARCHES, "members of the queue (50; of tasks 10, with --preset paper 50)"),
    "tournament": ("N", SEARCHES, "members drawn, of which the best is mutated (10; of tasks 5, paper 10)"),
    "cycles": ("N", SEARCHES, "children after the first queue (400; of tasks 20, paper 400)"),
    "batch": ("N", SEARCHES, "children made from the same queue (16; of tasks 1, paper 1)"),
    "finalists": ("N", ("search",), "the best of a search, trained again with two fresh seeds; 0: none (10; paper 0)"),
    "max-params": ("N", ("search",), "search among networks of at most N parameters"),
    "max-flops": ("N", ("search",), "and of at most N operations an image; a multiply-add is two"),
    "labels": ("FILE", LABELLED, "a JSON list of [architecture, value], higher = better"),
    "limit": ("N", LABELLED, "only the first N labels; search-task tests what it finds on the others"),
    "workers": ("N", MODES, "processes that train; default: one for each GPU, or for each CPU core"),
    "out": ("FILE.jsonl", (*SCORES, "search-task"), "record of every training; the same command resumes from it"),
    "plot": ("FILE.png", MODES, "draw the result (needs matplotlib)"),
}


def fail(status: int, message: str) -> Any:
    print(f"gennas: {message}", file=sys.stderr)
    sys.exit(status)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    import search_spaces
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: fail(2, f"error: {message}")
    option, defaults = parser.add_argument, {"images": "synthetic", "seed": 0, "seeds": 1}
    option("arch", nargs="*", metavar="ARCH", help="to score, in their benchmark's spelling; - reads stdin, one a line")
    option("--space", required=True, metavar="NAME", help=f"{', '.join(search_spaces.SPACES)}, or FILE.py:CLASS")
    option("--mode", choices=MODES, default="search", help="search is the default")
    option("--preset", choices=PRESETS, default="fast", help="how a network is trained (fast)")
    option("--json", action="store_true", help="the last line of stdout is one JSON object")
    option("--quiet", action="store_true", help="no progress on stderr")
    for name, (metavar, _, text) in OPTIONS.items():
        option(f"--{name}", metavar=metavar, type=int if metavar == "N" else str, default=defaults.get(name), help=text)
    args = parser.parse_intermixed_args(argv)

    if args.arch and args.mode != "score":
        parser.error(f"ARCH belongs to --mode score, not to --mode {args.mode}")
    for name, (metavar, modes, _) in OPTIONS.items():
        value, least = getattr(args, name.replace("-", "_")), int(name not in ("steps", "seed", "cycles", "finalists"))
        if value != defaults.get(name) and args.mode not in modes:
            parser.error(f"--{name} belongs to --mode {' or '.join(modes)}, not to --mode {args.mode}")
        if metavar == "N" and value is not None and value < least:
            parser.error(f"--{name} {value}: expected a whole number from {least} up")

    fast, tasks = args.preset == "fast", args.mode == "search-task"
    population, tournament, cycles, batch = (10, 5, 20, 1) if fast and tasks else (50, 10, 400, 16 if fast else 1)
    if tasks and args.task and args.cycles == 0:
        population = 1  # no search: the weights of that task are fitted
    args.population = args.population or population
    args.tournament = args.tournament or min(tournament, args.population)
    args.batch = args.batch or min(batch, args.population)
    args.cycles = cycles if args.cycles is None else args.cycles
    args.finalists = 10 * fast if args.finalists is None else args.finalists
    args.evolution = {name: getattr(args, name) for name in ("population", "tournament", "cycles", "batch")}
    for name in ("tournament", "batch"):
        if getattr(args, name) > args.population:
            parser.error(f"--{name} {getattr(args, name)}: expected at most the population, {args.population}")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line. What is wrong becomes one line on stderr and an exit status."""
    global pool  # it would else be gone before its thread, which holds it weakly, has cancelled what is left
    clock, args, pool, wrong = time.perf_counter(), parse_arguments(argv), None, None
    kept = f"; what was trained is in {args.out}, the same command goes on from there" if args.out else ""
    set_up_process()
    try:
        if torchrun := "TORCHELASTIC_RUN_ID" in os.environ:
            distributed.init_process_group("gloo", timeout=timedelta(days=99))
        devices = find_devices(args.device)
        options = {name: getattr(args, name) for name in ("space", "preset", "images", "seed", "steps", "seeds")}
        if torchrun and distributed.get_rank():  # which needs no files of tasks and labels
            return serve(Scorer(**options, device=devices[int(os.environ["LOCAL_RANK"]) % len(devices)]))
        scorer = Scorer(**options, task=args.task, device=devices[0])
        if args.plot:  # what is wrong with it is told before anything is computed
            check(find_spec("matplotlib") is not None, "--plot", "here", "matplotlib, from: pip install matplotlib")
            right = Path(args.plot).suffix in (".png", ".pdf", ".svg") and args.plot != args.out
            check(right, "--plot", args.plot, "a .png, .pdf or .svg file, and another than --out")
            open(args.plot, "ab").close()
        args.workers = args.workers or len(devices)
        if torchrun:
            broadcast(scorer.made_with())
            scorer.workers = partial(torchrun_map, scorer)
        elif args.workers > 1:
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            for rank in range(args.workers):
                queue.put(devices[rank % len(devices)])
            pool = ProcessPoolExecutor(args.workers, context, start_worker, (options, queue))
            scorer.workers = partial(pool_map, pool)
        result = MODES[args.mode](scorer, args)
    except KeyboardInterrupt:
        fail(130, f"interrupted{kept}")
    except BrokenExecutor:
        fail(1, f"error: a worker died{kept}")
    except (OSError, ValueError) as error:
        wrong = str(error)
    finally:
        if pool:
            pool.shutdown(wait=sys.exc_info()[0] is None, cancel_futures=True)  # after Ctrl-C no worker is waited for
    if torchrun:
        broadcast()
    if wrong:
        fail(2, f"error: {wrong}")
    if args.json:
        about = {"mode": args.mode, "space": args.space, "task": args.task or scorer.own_task, **result}
        print(json.dumps(about | {"preset": args.preset, "images": scorer.images_name,
                                  "seconds": round(time.perf_counter() - clock, 3)}))


# ------------------------------------------------------------------------------------------------------------ tasks
# As released by the authors. combo, nlp-combo and nlp-single are made by hand, the others are what their task search
# found on the space of that name.
TASKS: dict[str, AnyTask] = {
    "combo": COMBO,
    "nb101": Task(Noise("uniform", 0.1), (
        Stage(64, (
            Signal("sin2d", 1.1, True, (.0143, .0169, .0149, .0204, .0229, .0172, .0156, .0192, .0155, .0146)),)),
        Stage(48, (Signal("sin1d", 1.8, True, (.2991, .306, .3038, .288, .2934, .2961, .3059, .2929, .3056, .2959)),
                   Signal("sin2d", 2.9, True, (.3798, .3818, .3583, .3276, .2649, .2808, .4205, .3414, .3036, .4203)),
                   Signal("gdot", 1.1, True, density=0.578125), Signal("resize", 2.4))),
        Stage(16, (Signal("sin1d", 1.5, False, (.1539, .1057, .1066, .1576, .1337, .1051, .1319, .1318, .1028, .1094)),
                   Signal("sin2d", 0.9, False, (.1979, .2031, .1034, .2048, .1357, .2091, .2454, .0864, .1352, .1453)),
                   Signal("gdot", 2.1, False, density=0.4375), Signal("resize", 2.2))))),
    "darts": Task(Noise("gaussian", 0.2), (
        Stage(80, (Signal("gdot", 1.6, True, density=0.5), Signal("resize", 1.3))),
        Stage(32, (Signal("dot", 2.2, True, density=0.71875), Signal("gdot", 1.0, False, density=0.609375),
                   Signal("resize", 2.1))),
        Stage(80, (Signal("gdot", 1.7, True, density=0.5625), Signal("resize", 0.5))))),
    "resnet": Task(Noise("gaussian", 0.9), (
        Stage(16, (Signal("sin1d", 1.1, False, (.3792, .3348, .3835, .2973, .3064, .3438, .2157, .3374, .3203, .2363)),
                   Signal("dot", 0.5, False, density=0.09375))),
        Stage(16, (Signal("sin2d", 1.2, True, (.1185, .2206, .0596, .2331, .2272, .2653, .1877, .1083, .1095, .0563)),
                   Signal("dot", 2.9, True, density=0.3125), Signal("resize", 2.3))),
        Stage(32, (Signal("sin2d", 1.8, True, (.3785, .3794, .3447, .2706, .2607, .3945, .2793, .3832, .3228, .3014)),
                   Signal("gdot", 2.1, False, density=0.5))))),
    "nlp": RnnTask(Noise("uniform", 0.6), 48, (
        Signal("sin2d", 2.6, True, (.1955, .2282, .1843, .2073, .2208, .1345, .1703, .223, .1903, .1915)),), (
        Signal("sin2d", 0.8, True, (.1722, .1701, .1686, .1655, .1647, .1702, .1642, .1771, .1712, .1723)),
        Signal("gdot", 0.7, True, density=0.8626))),
    "nlp-combo": RnnTask(Noise("uniform", 0.0), 64, *[
        (Signal("sin1d", 1.0, True, MEDIUM), Signal("sin2d", 1.0, True, MEDIUM))] * 2),
    "nlp-single": RnnTask(Noise("uniform", 0.0), 64, *[(Signal("dot", 1.0, True, density=1.0),)] * 2),
}


def read_task(task: AnyTask | str) -> AnyTask:
    """Return a task of TASKS by its name, one from a JSON file, or the task itself."""
    if isinstance(task, AnyTask) or task in TASKS:
        return TASKS.get(task, task)
    check(task.endswith(".json"), "task", task, f"one of {', '.join(TASKS)} or a FILE.json")
    return task_from_json(Path(task).read_bytes(), f"task {task}")


if __name__ == "__main__":
    main()
