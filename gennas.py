"""GenNAS: score a neural architecture without labels, by how well it regresses synthetic signals after a few steps.

Li, Hao, Li, Xiong, Chen: Generic Neural Architecture Search via Regression (NeurIPS 2021, arXiv 2108.01899).

From top to bottom: the signal bases; the task, which mix of signals the three stages of a network must reproduce, and the
space of tasks; the images; the regression, whose loss is the score. Then what scores many networks, each once: the record,
the progress, the workers, the scorer. Then the search, rank correlations, pictures, and the command line with its modes.

    python gennas.py --space nb201                                  # search an architecture
    python gennas.py --space nb201 --mode score ARCH [ARCH ...]     # score given ones
    python gennas.py --space nb201 --mode correlate --labels FILE   # rank correlation with recorded accuracies
    python gennas.py --space nb201 --mode search-task               # search a task, on labelled architectures
    python gennas.py --space nb201 --mode show --plot FILE.png      # draw the task's signals
"""
from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import random
import signal as process_signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

try:
    import search_spaces
except ModuleNotFoundError as error:  # a copy of this file alone: it scores any object that has a search space's methods
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
    count = max(least, math.floor(density * H * W))
    shuffled = torch.rand(B, C, H * W, generator=rng).argsort(-1)
    signs = 2 * torch.randint(0, 2, (B, C, H * W), generator=rng) - 1
    return torch.where(shuffled < count, signs, 0).float().view(shape)


def gdot(rng: torch.Generator, shape: Shape, density: float) -> Tensor:
    """Dots smoothed by a gaussian of sigma 1, divided by the map's largest absolute value."""
    smooth = blur_matrix(shape[2]) @ dot(rng, shape, density, least=1) @ blur_matrix(shape[3]).T
    return smooth / smooth.abs().amax((2, 3), keepdim=True)


def blur_matrix(size: int, radius: int = 4) -> Tensor:
    """(size, size): convolution with a gaussian of sigma 1, cut at `radius`, the border mirrored with its edge repeated."""
    gaussian = np.exp(-np.arange(-radius, radius + 1) ** 2 / 2)
    mirrored = np.pad(np.eye(size), ((radius, radius), (0, 0)), mode="symmetric")
    rows = np.lib.stride_tricks.sliding_window_view(mirrored, 2 * radius + 1, axis=0)  # (size, size, taps)
    return torch.from_numpy(rows @ (gaussian / gaussian.sum())).float()


def resize(rng: torch.Generator, shape: Shape, images: Tensor) -> Tensor:
    """The images (B, 3, h, w) themselves, made H x W and scaled to [-1, 1] as a whole; each map one random colour."""
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
def is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


MAX_CHANNELS = 2 * 10 * MAPS_PER_WAVE  # sin1d has this many maps to draw from
LIST = "a list of objects", lambda v: isinstance(v, list) and all(isinstance(s, dict) for s in v)
# field of a task -> what is right, in words and as a test
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "noise": ("an object with kind and level", lambda v: isinstance(v, dict)),
    "kind": ("uniform or gaussian", lambda v: v in ("uniform", "gaussian")),
    "stages": ("a list of three objects", lambda v: isinstance(v, list) and len(v) == 3),
    "channels": (f"a whole number from 1 to {MAX_CHANNELS}", lambda v: type(v) is int and 1 <= v <= MAX_CHANNELS),
    "signals": LIST, "input": LIST, "target": LIST,
    "basis": (f"one of {', '.join(BASES)}", lambda v: isinstance(v, str) and v in BASES),
    "level": ("a number from 0 to 10", lambda v: is_number(v, 0, 10)),
    "frequencies": ("a list of 10 numbers above 0 and below 0.5", lambda v: isinstance(v, list) and len(v) == 10
                    and all(is_number(f, 0, 0.5) and f not in (0, 0.5) for f in v)),
    "density": ("a number from 0 to 1", lambda v: is_number(v, 0, 1)),
    "per_sample": ("true or false", lambda v: isinstance(v, bool)),
    "dimension": ("a whole number from 1 to 1024", lambda v: type(v) is int and 1 <= v <= 1024),
}


def check(part: Any, names: tuple[str, ...], where: str) -> None:
    """ValueError, with the place, unless `part` is a dict of exactly these fields, each as RULES says."""
    if not isinstance(part, dict) or set(part) != set(names):
        found = ", ".join(map(str, part)) if isinstance(part, dict) else repr(part)
        raise ValueError(f"{where}: right is an object with {', '.join(names)}, not {found}")
    for name in names:
        words, test = RULES[name]
        if not test(part[name]):
            raise ValueError(f"{where}.{name}: right is {words}, not {json.dumps(part[name])[:60]}")


class JsonTask:
    """What the tasks of CNNs and of recurrent networks share: to and from JSON, and the drawing of signals."""

    @classmethod
    def from_json(cls, text: str) -> Any:
        """A Task or a RnnTask, as the text has it. ValueError names a field that is absent, unknown or out of its range."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"task: not JSON ({error})") from None
        kind = RnnTask if isinstance(data, dict) and "dimension" in data else Task
        check(data, tuple(field.name for field in fields(kind)), "task")
        return kind(**data)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def digest(self) -> str:
        """What names the task in a record."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def draw(self, images: Tensor | None, seed: int, batch: int = 16, size: int = 8) -> list[Tensor]:
        """The tensors (batch, C, H, W) of all parts, from (task, images, seed) alone: the three targets of a CNN, or the
        input and the target of a recurrent network."""
        return [part.total(images, seed) for part in self.parts(batch, size)]

    def check_fields(self) -> None:
        check(vars(self), tuple(vars(self)), "task")
        check(self.noise, ("kind", "level"), "task.noise")

    def check_signals(self, signals: list[dict[str, Any]], where: str) -> None:
        for j, signal in enumerate(signals):
            check({"basis": signal.get("basis")}, ("basis",), f"{where}[{j}]")
            check(signal, ("basis", "level", *BASES[signal["basis"]][1]), f"{where}[{j}]")


@dataclass(frozen=True)
class Task(JsonTask):
    """What a CNN must regress, and the noise on its input. ValueError names a field that is out of its range.

    noise: {"kind": "uniform" | "gaussian", "level": a}. stages: for each of the three taps {"channels": C, "signals":
    [...]}, a signal being {"basis": ..., "level": ..., and the fields that BASES lists for it}. Frequencies are in cycles
    per position; with `per_sample` each image has maps of its own, else all share the same.
    """
    noise: dict[str, Any]
    stages: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self.check_fields()
        for i, stage in enumerate(self.stages):
            check(stage, ("channels", "signals"), f"task.stages[{i}]")
            self.check_signals(stage["signals"], f"task.stages[{i}].signals")

    def parts(self, batch: int, size: int) -> list[Part]:
        """The target of each stage."""
        return [Part("target", i, stage["signals"], (batch, stage["channels"], size, size)) for i, stage in enumerate(self.stages)]


@dataclass(frozen=True)
class RnnTask(JsonTask):
    """What a recurrent network must make of what: the signals of `input` and of `target`, sequences of `dimension` numbers."""
    noise: dict[str, Any]
    dimension: int
    input: list[dict[str, Any]]
    target: list[dict[str, Any]]

    def __post_init__(self) -> None:
        self.check_fields()
        for name in ("input", "target"):
            self.check_signals(getattr(self, name), f"task.{name}")
            if not all(signal.get("per_sample") for signal in getattr(self, name)):
                raise ValueError(f"task.{name}: right are signals other than resize with per_sample true")

    def parts(self, batch: int, size: int) -> list[Part]:
        """The input and the target: for each sequence one map, y its time and x its feature."""
        return [Part(name, 0, getattr(self, name), (batch, 1, size, self.dimension)) for name in ("input", "target")]


class Part(NamedTuple):
    """One tensor of signals that a task draws: what it is called, its signals and its shape."""
    name: str
    number: int
    signals: list[dict[str, Any]]
    shape: Shape

    def maps(self, j: int, images: Tensor | None, seed: int) -> Tensor:
        """The maps (B, C, H, W) of signal j before its level, drawn from a generator of its own; (1, C, H, W) if all images
        share them."""
        basis, names = BASES[self.signals[j]["basis"]]
        values, shape = {name: self.signals[j][name] for name in names}, self.shape
        if "per_sample" not in values:
            values["images"] = images
        elif not values.pop("per_sample"):
            shape = (1, *shape[1:])
        return basis(torch.Generator().manual_seed(seed_of(self.name, self.number, j, seed)), shape, **values)

    def total(self, images: Tensor | None, seed: int) -> Tensor:
        """The sum over signals of level * maps, (B, C, H, W); zero without signals."""
        maps = (signal["level"] * self.maps(j, images, seed) for j, signal in enumerate(self.signals))
        return sum(maps, start=torch.zeros(self.shape))


def stage(channels: int, *signals: dict[str, Any]) -> dict[str, Any]:
    return {"channels": channels, "signals": list(signals)}


# The authors' tasks: combo, nlp-combo and nlp-single are made by hand, the others are what their task search found on the space of that name. The found-
# ones are what the search of this file found there on 20 labels, by the commands that the README gives.
MEDIUM = [.125, .15, .175, .2, .225, .25, .275, .3, .325, .35]
HIGH = [.375, .3875, .4, .4125, .425, .4375, .45, .4625, .475, .4875]
TASKS = {
    "combo": Task(dict(kind="gaussian", level=0.0), [
        stage(64, dict(basis="sin1d", level=1.0, frequencies=HIGH, per_sample=True),
                  dict(basis="sin2d", level=1.0, frequencies=HIGH, per_sample=True),
                  dict(basis="dot", level=1.0, density=1.0, per_sample=True)),
        stage(64, dict(basis="sin1d", level=1.0, frequencies=HIGH, per_sample=True),
                  dict(basis="sin2d", level=1.0, frequencies=MEDIUM, per_sample=True),
                  dict(basis="resize", level=1.0)),
        stage(64, dict(basis="sin1d", level=1.0, frequencies=HIGH, per_sample=True),
                  dict(basis="dot", level=1.0, density=1.0, per_sample=True),
                  dict(basis="resize", level=1.0)),
    ]),
    "nb101": Task(dict(kind="uniform", level=0.1), [
        stage(64, dict(basis="sin2d", level=1.1, frequencies=[.0143, .0169, .0149, .0204, .0229, .0172, .0156, .0192, .0155, .0146], per_sample=True)),
        stage(48, dict(basis="sin1d", level=1.8, frequencies=[.2991, .306, .3038, .288, .2934, .2961, .3059, .2929, .3056, .2959], per_sample=True),
                  dict(basis="sin2d", level=2.9, frequencies=[.3798, .3818, .3583, .3276, .2649, .2808, .4205, .3414, .3036, .4203], per_sample=True),
                  dict(basis="gdot", level=1.1, density=0.578125, per_sample=True),
                  dict(basis="resize", level=2.4)),
        stage(16, dict(basis="sin1d", level=1.5, frequencies=[.1539, .1057, .1066, .1576, .1337, .1051, .1319, .1318, .1028, .1094], per_sample=False),
                  dict(basis="sin2d", level=0.9, frequencies=[.1979, .2031, .1034, .2048, .1357, .2091, .2454, .0864, .1352, .1453], per_sample=False),
                  dict(basis="gdot", level=2.1, density=0.4375, per_sample=False),
                  dict(basis="resize", level=2.2)),
    ]),
    "darts": Task(dict(kind="gaussian", level=0.2), [
        stage(80, dict(basis="gdot", level=1.6, density=0.5, per_sample=True),
                  dict(basis="resize", level=1.3)),
        stage(32, dict(basis="dot", level=2.2, density=0.71875, per_sample=True),
                  dict(basis="gdot", level=1.0, density=0.609375, per_sample=False),
                  dict(basis="resize", level=2.1)),
        stage(80, dict(basis="gdot", level=1.7, density=0.5625, per_sample=True),
                  dict(basis="resize", level=0.5)),
    ]),
    "resnet": Task(dict(kind="gaussian", level=0.9), [
        stage(16, dict(basis="sin1d", level=1.1, frequencies=[.3792, .3348, .3835, .2973, .3064, .3438, .2157, .3374, .3203, .2363], per_sample=False),
                  dict(basis="dot", level=0.5, density=0.09375, per_sample=False)),
        stage(16, dict(basis="sin2d", level=1.2, frequencies=[.1185, .2206, .0596, .2331, .2272, .2653, .1877, .1083, .1095, .0563], per_sample=True),
                  dict(basis="dot", level=2.9, density=0.3125, per_sample=True),
                  dict(basis="resize", level=2.3)),
        stage(32, dict(basis="sin2d", level=1.8, frequencies=[.3785, .3794, .3447, .2706, .2607, .3945, .2793, .3832, .3228, .3014], per_sample=True),
                  dict(basis="gdot", level=2.1, density=0.5, per_sample=False)),
    ]),
    "found-nb101": Task(dict(kind="gaussian", level=0.2), [
        stage(80, dict(basis="sin1d", level=0.8, frequencies=[.2712, .2637, .3085, .3141, .2379, .3487, .2378, .2616, .2465, .2434], per_sample=True),
                  dict(basis="gdot", level=1.1, density=0.5865, per_sample=True)),
        stage(48),
        stage(80, dict(basis="sin2d", level=2.7, frequencies=[.2349, .2342, .2136, .2178, .2373, .2334, .2082, .2224, .1957, .1992], per_sample=True),
                  dict(basis="resize", level=1.9)),
    ]),
    "found-nb201": Task(dict(kind="gaussian", level=0.1), [
        stage(96, dict(basis="sin2d", level=1.6, frequencies=[.1929, .2084, .1714, .2396, .1934, .2487, .2229, .1848, .2271, .2353], per_sample=True),
                  dict(basis="dot", level=0.5, density=0.0012, per_sample=True),
                  dict(basis="resize", level=0.9)),
        stage(32, dict(basis="sin1d", level=2.0, frequencies=[.358, .3585, .3626, .3659, .3361, .3554, .3419, .3605, .3458, .3503], per_sample=True),
                  dict(basis="sin2d", level=1.1, frequencies=[.2054, .3601, .3148, .2119, .2307, .1134, .2055, .2905, .3013, .384], per_sample=False),
                  dict(basis="gdot", level=1.7, density=0.7694, per_sample=False),
                  dict(basis="resize", level=0.8)),
        stage(64, dict(basis="sin1d", level=1.9, frequencies=[.2412, .1738, .0822, .0528, .2561, .4088, .2613, .1265, .3324, .2627], per_sample=False),
                  dict(basis="sin2d", level=1.5, frequencies=[.0409, .0627, .0388, .1, .0899, .0421, .0893, .1079, .0827, .0746], per_sample=False),
                  dict(basis="dot", level=2.5, density=0.9885, per_sample=False)),
    ]),
    "nlp": RnnTask(dict(kind="uniform", level=0.6), 48, [
        dict(basis="sin2d", level=2.6, frequencies=[.1955, .2282, .1843, .2073, .2208, .1345, .1703, .223, .1903, .1915], per_sample=True)], [
        dict(basis="sin2d", level=0.8, frequencies=[.1722, .1701, .1686, .1655, .1647, .1702, .1642, .1771, .1712, .1723], per_sample=True),
        dict(basis="gdot", level=0.7, density=0.8626, per_sample=True)]),
    "nlp-combo": RnnTask(dict(kind="uniform", level=0.0), 64, *[[
        dict(basis="sin1d", level=1.0, frequencies=MEDIUM, per_sample=True),
        dict(basis="sin2d", level=1.0, frequencies=MEDIUM, per_sample=True)]] * 2),
    "nlp-single": RnnTask(dict(kind="uniform", level=0.0), 64, *[[dict(basis="dot", level=1.0, density=1.0, per_sample=True)]] * 2),
    "found-nlp": RnnTask(dict(kind="gaussian", level=0.1), 80, [], [
        dict(basis="dot", level=2.8, density=0.4558, per_sample=True),
        dict(basis="gdot", level=0.7, density=0.1026, per_sample=True)]),
}


# ---------------------------------------------------------------------------------------- the space of tasks (paper, 3.4)
WIDTHS = range(16, 97, 16)  # channels of a stage, numbers of a sequence
# field of a signal -> its draw; rounded, so that a task is what its JSON says
DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "frequencies": lambda rng: random_band(rng.uniform(0, 0.5), rng.uniform(0, 0.5), rng),
    "density": lambda rng: round(rng.random(), 4),
    "per_sample": lambda rng: rng.random() < 0.5,
}


def random_band(low: float, high: float, rng: random.Random) -> list[float]:
    return [min(max(round(rng.uniform(low, high), 4), 0.0001), 0.4999) for _ in range(10)]


def random_signals(rng: random.Random, bases: Iterable[str], **fixed: Any) -> list[dict[str, Any]]:
    """Each basis with chance 1/2, of any level and form; `fixed` are fields that are not drawn."""
    return [{"basis": basis, "level": rng.randint(5, 29) / 10, **{name: DRAWS[name](rng) for name in BASES[basis][1]}, **fixed}
            for basis in bases if rng.random() < 0.5]


def random_task(rng: random.Random, kind: type[Task | RnnTask] = Task) -> Task | RnnTask:
    """A draw from the space of tasks of a kind."""
    noise = {"kind": rng.choice(("gaussian", "uniform")), "level": rng.randint(0, 9) / 10}
    if kind is Task:
        return Task(noise, [stage(rng.choice(WIDTHS), *random_signals(rng, BASES)) for _ in range(3)])
    bases = [basis for basis in BASES if basis != "resize"]
    return RnnTask(noise, rng.choice(WIDTHS), *[random_signals(rng, bases, per_sample=True) for _ in range(2)])


def mutate_task(task: Task | RnnTask, rng: random.Random) -> Task | RnnTask:
    """Another task: with chance 0.2 each, the noise, the channels of a stage and the signal of a basis are drawn again."""
    other = random_task(rng, type(task))

    def pick(old: Any, new: Any) -> Any:
        return new if rng.random() < 0.2 else old

    def pick_signals(old: list, new: list) -> list:
        by_basis = [{signal["basis"]: signal for signal in signals} for signals in (old, new)]
        return [signal for basis in BASES if (signal := pick(*[signals.get(basis) for signals in by_basis]))]

    noise = pick(task.noise, other.noise)
    if isinstance(task, Task):
        child = Task(noise, [stage(pick(a["channels"], b["channels"]), *pick_signals(a["signals"], b["signals"]))
                             for a, b in zip(task.stages, other.stages)])
    else:
        child = RnnTask(noise, pick(task.dimension, other.dimension), pick_signals(task.input, other.input),
                        pick_signals(task.target, other.target))
    return child if child != task else mutate_task(task, rng)


# ----------------------------------------------------------------------------------------------------------- images
CIFAR = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)  # channel means and standard deviations of 0..255 values
IMAGENET16 = (122.68, 116.66, 104.01), (63.22, 61.26, 65.09)
STATISTICS = {3 * 32 * 32: CIFAR, 3 * 16 * 16: IMAGENET16}  # by the length of a row of a pickled batch
PIXELS = "uint8", "float16", "float32", "float64"
BATCHES = "data_batch_1", "train", "train_data_batch_1"  # the first training file of CIFAR-10, CIFAR-100, ImageNet16


def load_images(source: str, seed: int, count: int = 16) -> tuple[Tensor, str]:
    """The first `count` images, normalised, (count, 3, 32, 32), and a line that says which they are.

    `source`: "synthetic", or the path of a CIFAR-10/100 or ImageNet16-120 python batch or of its folder, or of a
    .npy/.npz array (N, H, W, 3) or (N, 3, H, W), uint8 or float in [0, 1]. ValueError for any other content.
    """
    if source == "synthetic":
        images = synthetic_images(torch.Generator().manual_seed(seed_of("images", seed)), count)
        return normalise(images), "synthetic (1/f noise)"
    path = Path(source)
    if path.is_dir():
        path = next((path / name for name in BATCHES if (path / name).is_file()), None)
        if path is None:
            raise ValueError(f"images {source}: the folder has none of {', '.join(BATCHES)}")
    try:
        array, statistics = read_array(path) if path.suffix in (".npy", ".npz") else read_batch(path)
        images = torch.from_numpy(np.ascontiguousarray(array[:count]))
        if len(images) < count:
            raise ValueError(f"{len(images)} images, {count} are needed")
        digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:12]
        images = images.float() / (1 if images.is_floating_point() else 255)
        if not 0 <= images.min() <= images.max() <= 1:  # false for NaN as well
            raise ValueError("float values outside of [0, 1]")
        images = resized(normalise(images, statistics), 32)
    except OSError:
        raise
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"images {path}: {type(error).__name__}: {error}; right is a CIFAR-10/100 or ImageNet16 python batch, its "
                         "folder, or a .npy or .npz array (N, H, W, 3) or (N, 3, H, W), uint8 or float in [0, 1]") from None
    return images, f"{path.name} (first {count}, sha256 {digest})"


def resized(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) -> (B, 3, side, side): larger by nearest, smaller without aliasing."""
    smaller = side < images.shape[2]
    return F.interpolate(images, size=side, mode="bilinear" if smaller else "nearest", antialias=smaller)


def normalise(images: Tensor, statistics: Any = None) -> Tensor:
    """(B, 3, H, W) in [0, 1] less the channel means, over the standard deviations; by default those of the images."""
    if statistics:
        mean, std = torch.tensor(statistics)[:, :, None, None] / 255
    else:
        std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    if not std.min() > 0:
        raise ValueError("a colour channel is the same everywhere")
    return (images - mean) / std


def synthetic_images(rng: torch.Generator, count: int) -> Tensor:
    """Noise with the 1/f amplitude spectrum of natural images, nine tenths of its variance shared by the three colours."""
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).clamp(min=1 / 32)  # (32, 17)
    maps = torch.fft.irfft2(torch.fft.rfft2(torch.randn(count, 4, 32, 32, generator=rng)) / frequency)
    return 0.9 ** 0.5 * maps[:, :1] + 0.1 ** 0.5 * maps[:, 1:]


def read_array(path: Path) -> tuple[np.ndarray, None]:
    """The images of a .npy or .npz file as (N, 3, H, W), to be normalised by the statistics of those that are used."""
    with open(path, "rb") as file:
        content = np.load(file, allow_pickle=False)
        arrays = [content] if isinstance(content, np.ndarray) else [content[name] for name in content.files]
    images = max(arrays, key=np.ndim)
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]) or images.dtype.name not in PIXELS:
        raise ValueError(f"{images.dtype.name} array of shape {images.shape}")
    return (images.transpose(0, 3, 1, 2) if images.shape[3] == 3 else images), None


def read_batch(path: Path) -> tuple[np.ndarray, Any]:
    """The images of a pickled batch as (N, 3, H, W), and the statistics of their data set."""
    with open(path, "rb") as file:
        batch = ArrayUnpickler(file, encoding="bytes").load()
    data = batch[b"data"] if b"data" in batch else batch["data"]
    if data.dtype != np.uint8 or data.shape[1] not in STATISTICS:
        raise ValueError(f"pixels of type {data.dtype} in rows of {data.shape[1]}")
    side = math.isqrt(data.shape[1] // 3)
    return data.reshape(-1, 3, side, side), STATISTICS[data.shape[1]]


class ArrayUnpickler(pickle.Unpickler):
    """Admits arrays, bytes, strings, numbers, lists and dicts; a pickle that names anything else is refused."""
    ADMITTED = {
        "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,
        "numpy.core.multiarray._reconstruct": np.empty(0).__reduce__()[0],
        "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
        "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # how Python 3 writes bytes for Python 2
    }

    def find_class(self, module: str, name: str) -> Any:
        asked = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if asked not in self.ADMITTED:
            raise pickle.UnpicklingError(f"the pickle asks for {asked}")
        return self.ADMITTED[asked]


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
    stage_weights: tuple[float, ...] = (0.25, 0.5, 1.0)
    batch: int = 16  # images or sequences
    side: int = 32  # of the images
    size: int = 8  # side of the targets, length of the sequences
    batch_statistics: bool = False  # in eval() too, the network (not its heads) normalises by the batch at hand
    log_score: bool = False  # the score is the weighted sum of the stages' log(1 + loss), not of their losses


# `fast`: small images make a step cheap and rank NAS-Bench-101 better. The running statistics of batch norm lag behind for
# some 70 steps, in deep networks more; without them fewer steps will do.
PRESETS = {"paper": Settings(), "fast": Settings(steps=72, batch=8, side=16, batch_statistics=True, log_score=True)}
# preset -> family of spaces -> the settings and the network's sizes that are other ones there
EXCEPTIONS: dict[str, dict[str, tuple[dict[str, int], dict[str, int]]]] = {
    "paper": {"nbnlp": ({}, {"reservoir": True})},
    "fast": {
        "nb201": ({"steps": 44, "side": 32}, {"width": 4, "cells": 3}),
        "nbnlp": ({}, {"reservoir": True}),
        **dict.fromkeys(("darts", "enas", "pnas", "nasnet", "amoeba"), ({"steps": 32}, {})),
        **dict.fromkeys(("resnet", "resnext"), ({"steps": 24}, {})),
    },
}


class Heads(nn.Module):
    """A network's three taps, each resized and sent through batch norm and a 1x1 convolution to its target's channels."""

    def __init__(self, body: nn.Module, images: Tensor, targets: list[Tensor]):
        super().__init__()
        self.body, self.size = body.eval(), targets[0].shape[2:]
        with torch.no_grad():
            widths = [tap.shape[1] for tap in body(images[:2])]  # one image has no batch statistics where maps are of one pixel
        if len(widths) != len(targets):
            raise ValueError(f"the network gives {len(widths)} feature maps; right are {len(targets)}, one for each target")
        self.heads = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(w), nn.Conv2d(w, t.shape[1], 1)) for w, t in zip(widths, targets))

    def forward(self, images: Tensor) -> list[Tensor]:  # (B, 3, H, W) -> three (B, C, size, size)
        return [head(F.interpolate(tap, size=self.size)) for head, tap in zip(self.heads, self.body(images))]


class EncoderDecoder(nn.Module):
    """A recurrent network between a linear encoder and a linear decoder."""

    def __init__(self, body: nn.Module, sequences: Tensor, targets: list[Tensor]):
        super().__init__()
        self.body = body
        self.encoder, self.decoder = nn.Linear(sequences.shape[2], body.width), nn.Linear(body.width, targets[0].shape[2])
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, sequences: Tensor) -> list[Tensor]:  # (B, T, D) -> one (B, T, D)
        return [self.decoder(self.body(self.encoder(sequences)))]


def without_running_statistics(body: nn.Module) -> None:
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = module.num_batches_tracked = None


def sgd(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    matrices, vectors = ([p for p in network.parameters() if (p.ndim > 1) == big] for big in (True, False))
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors}]
    return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, fused=True)


def adam(network: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.Adam(network.parameters(), settings.rnn_learning_rate, weight_decay=settings.rnn_weight_decay, fused=True)


class Regression:
    """The regression of one task on one batch of images, the same targets for every architecture (paper, 3.1).

    `regression(space, arch)` trains the network and returns its losses at all steps and, last, what eval() mode gives
    after them: the score, lower is better. It is a pure function of (space, space.key(arch), task, images, settings, seed)
    and the kind of device: weights, noise and dropout are seeded by space, key and seed, and the state of the global
    generators is put back. `images`: as `load_images` gives them, the first settings.batch are taken and made settings.side
    pixels wide; None for a recurrent task, whose input is a signal.
    """
    KINDS: dict[type, tuple[Callable, Callable]] = {Task: (Heads, sgd), RnnTask: (EncoderDecoder, adam)}

    def __init__(self, task: Task | RnnTask, images: Tensor | None, settings: Settings = PRESETS["paper"], seed: int = 0,
                 device: str | torch.device = "cpu"):
        self.task, self.settings, self.seed, self.device = task, settings, seed, torch.device(device)
        if images is not None:
            images = resized(images[:settings.batch], settings.side)
        signals = task.draw(images, seed, settings.batch, settings.size)
        tensors = [x[:, 0] for x in signals] if isinstance(task, RnnTask) else [images, *signals]
        self.inputs, *self.targets = map(self.place, tensors)
        self.stage_weights = torch.tensor(settings.stage_weights[-len(self.targets):], device=self.device)
        self.wrap, self.optimizer = self.KINDS[type(task)]

    def place(self, x: Tensor) -> Tensor:
        return x.to(self.device, memory_format=torch.channels_last if x.ndim == 4 else torch.preserve_format)

    def __call__(self, space: Any, arch: Any) -> list[float]:
        settings = self.settings
        purpose = getattr(space, "name", type(space).__name__), space.key(arch), self.seed

        def stage_losses() -> Tensor:
            outputs = network(self.inputs + self.noise())
            return torch.stack([F.mse_loss(output, target) for output, target in zip(outputs, self.targets)])

        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed_of("weights", *purpose))
            body = space.build(arch)  # on the CPU: equal weights on all devices
            if settings.batch_statistics:
                without_running_statistics(body)
            network = self.wrap(body, self.inputs.cpu(), self.targets)
            network = network.to(self.device, memory_format=torch.channels_last).train()
            optimizer = self.optimizer(network, settings)
            torch.manual_seed(seed_of("noise", *purpose))
            losses = []  # stay on the device until the end: no step waits for it
            for _ in range(settings.steps):
                loss = self.stage_weights @ stage_losses()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            network.eval()
            with torch.no_grad():
                final = stage_losses()
            losses.append(self.stage_weights @ (final.log1p() if settings.log_score else final))
            return torch.stack(losses).tolist()

    def noise(self) -> Tensor:
        kind, level = self.task.noise["kind"], self.task.noise["level"]
        draw = torch.empty_like(self.inputs)
        return (draw.uniform_(-1, 1) if kind == "uniform" else draw.normal_()).mul_(level)


# --------------------------------------------------------------------------------------------------- scores, once each
class Score(NamedTuple):
    key: str
    arch: str
    loss: float | None  # None: diverged
    seconds: float

    @property
    def rank_by(self) -> float:
        return math.inf if self.loss is None else self.loss


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
            raise ValueError(f"{path}: another run is writing to it; right is another --out file") from None
        self.file.seek(0)
        lines = self.file.read().splitlines(keepends=True)
        header = {"settings": made_with}
        if json.dumps(header).encode().startswith(b"".join(lines)):  # new, or torn in its first line
            self.file.truncate(0)
            self.write(header)
        else:
            self.compare(lines[0], json.loads(json.dumps(made_with)))
            self.read(lines)

    def compare(self, header: bytes, settings: dict[str, Any]) -> None:
        try:
            made_with = dict(json.loads(header)["settings"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: exists and holds no scores; right is another --out file") from None
        for name in {**settings, **made_with}:
            if settings.get(name) != made_with.get(name):
                raise ValueError(f"{self.path}: made with {name} {json.dumps(made_with.get(name))}, this run has "
                                 f"{json.dumps(settings.get(name))}; right are the same settings or another --out file")

    def read(self, lines: list[bytes]) -> None:
        end = len(lines[0])
        for number, line in enumerate(lines[1:], start=2):
            try:
                score = Score(**json.loads(line)) if line.endswith(b"\n") else None
                self.known[str(score.key)] = score._replace(loss=score.loss and float(score.loss), seconds=float(score.seconds))
            except (ValueError, TypeError, AttributeError):
                score = None
            if score:
                end += len(line)
            elif number < len(lines):
                raise ValueError(f"{self.path}, line {number}: not a score; right is another --out file")
            else:
                print(f"gennas: {self.path}: the torn last line is dropped", file=sys.stderr)
                self.file.truncate(end)

    def add(self, score: Score) -> None:
        if self.file:
            self.write(score._asdict())
        self.known[score.key] = score

    def write(self, line: dict[str, Any]) -> None:
        try:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None


class Progress:
    """Tells on stderr how far a run is: rewrites a line on a terminal, writes one every ten seconds elsewhere."""

    def __init__(self, total: int, quiet: bool = False):
        self.total, self.quiet, self.done, self.replayed = total, quiet, 0, 0
        self.start, self.told, self.open = time.monotonic(), -math.inf, False
        self.best: tuple[float, str] = (math.inf, "")

    def note(self, loss: float, what: str) -> None:
        """`what` is the best so far if its loss is the lowest."""
        self.best = min(self.best, (loss, what), key=lambda pair: pair[0])

    def update(self, trained: bool) -> None:
        self.done += 1
        if not trained and self.replayed == self.done - 1:  # the rate counts from the first network that had to be trained
            self.replayed, self.start = self.done, time.monotonic()
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if self.quiet or not (terminal or self.done == self.total or now - self.told >= 10):
            return
        self.told = now
        rate = (self.done - self.replayed) / max(now - self.start, 1e-9)
        left = f"{(self.total - self.done) / rate:.0f} s left" if rate else "replayed"
        line = "  ".join([f"{self.done}/{self.total}", f"{rate:.2f}/s", left, *self.leader()])
        line = line[:(os.get_terminal_size(sys.stderr.fileno()).columns if terminal else 200) - 1]
        self.open = terminal and self.done < self.total
        print(f"\r\x1b[K{line}" if terminal else line, end="" if self.open else "\n", file=sys.stderr, flush=True)

    def leader(self) -> list[str]:
        """The best so far, if there is one."""
        loss, what = self.best
        return [f"best {show_loss(loss)} {what}"] if what else []


class WorkersFailed(Exception):
    """A process that shares the work of the run has ended before the run, or does other work."""


class Workers:
    """The processes that share the work of a run. Each runs the same program; this one is number `rank`.

    They meet at a `torch.distributed` store: whoever is free takes the next item of a list, so that none waits for the
    slowest, and all read all results. With one process the store is its own memory. Under torchrun the processes and the
    store are torchrun's; `start` makes the same on one machine.
    """

    def __init__(self, store: Any = None, rank: int = 0):
        self.store, self.rank, self.children, self.lists = store or distributed.HashStore(), rank, [], 0

    @classmethod
    def join(cls) -> Workers:
        """Those that torchrun has started; else a single one."""
        if not distributed.is_torchelastic_launched():
            return cls()
        store, rank, _ = next(distributed.rendezvous("env://", timeout=timedelta(minutes=5)))
        return cls(distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store), rank)  # torchrun's store outlives a restart

    def start(self, count: int, argv: list[str]) -> None:
        """Run this program with `argv` in count - 1 more processes, by the environment that torchrun would give them."""
        if count == 1:
            return
        server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.store = distributed.PrefixStore("0", server)
        for rank in range(1, count):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": server.port,
                           "TORCHELASTIC_RUN_ID": "gennas", "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": True}
            self.children.append(subprocess.Popen([sys.executable, __file__, *argv], stdin=subprocess.DEVNULL, start_new_session=True,
                                                  env=os.environ | {name: str(value) for name, value in environment.items()}))

    def stop(self) -> None:
        for child in self.children:
            child.kill()

    def check_children(self) -> None:
        for rank, child in enumerate(self.children, start=1):
            if child.poll():  # None while it runs, 0 when it is through
                raise WorkersFailed(f"worker {rank} of {len(self.children) + 1} died (exit status {child.returncode})")

    def share(self, name: str, value: Any = None) -> Any:
        """What rank 0 gives, on all ranks; anything that JSON has."""
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
        return json.loads(self.store.get(name))

    def map(self, work: Callable[[Any], Any], items: list[Any], done: Callable[[Any], None]) -> None:
        """`work` on every item, in whichever process is free; `done` with every result (what JSON has), in all processes,
        in the order in which they come and while this process works on. All processes must give the same items in the
        same order. What is a ValueError in one is one in all. WorkersFailed once its results are all in."""
        self.lists += 1
        taken, finished, stopped = f"{self.lists} taken", f"{self.lists} finished", threading.Event()

        def outcome(item: Any) -> dict[str, Any]:
            try:
                return {"result": work(item)}
            except ValueError as error:
                return {"error": str(error)}

        def collect() -> None:
            over = False
            for number in range(1, len(items) + 1):
                while not self.store.check([f"{finished} {number}"]):
                    if over:
                        return
                    over = stopped.wait(0.01)  # and look once more
                told = json.loads(self.store.get(f"{finished} {number}"))
                if "error" in told:
                    raise ValueError(told["error"])
                done(told["result"])

        with ThreadPoolExecutor(1) as thread:
            collecting = thread.submit(collect)
            try:
                while not collecting.done() and (number := self.store.add(taken, 1)) <= len(items):
                    self.check_children()
                    result = json.dumps(outcome(items[number - 1]))
                    self.store.set(f"{finished} {self.store.add(finished, 1)}", result)
                while not collecting.done():
                    self.check_children()
                    time.sleep(0.01)
            finally:
                stopped.set()
        collecting.result()  # raises what `done` has raised


class Scorer:
    """Losses of architectures of a space under tasks: scorer(tasks, archs) -> a list for each task, of a loss for each
    architecture; infinite for a network that diverged. Each network is trained once on a task, by one of the workers:
    equal keys are one network, and what the record knows is not trained again. The `tag` tells its scores in the record from
    those of another scorer."""

    def __init__(self, space: Any, regression_of: Callable[[Task | RnnTask], Regression], record: Record | None = None,
                 progress: Progress | None = None, workers: Workers | None = None, tag: str = ""):
        self.space, self.regression_of, self.tag = space, regression_of, tag
        self.record, self.progress, self.workers = record or Record(), progress or Progress(0, quiet=True), workers or Workers()
        self.scores: dict[str, Score] = {}  # those that were asked for, by key
        self.drawn: tuple[Any, Any] = None, None  # the task trained last and its regression: its targets are not drawn again

    def key(self, task: Task | RnnTask, arch: Any) -> str:
        return f"{self.tag}{task.digest()} {self.space.key(arch)}"

    def __call__(self, tasks: list[Task | RnnTask], archs: list[Any], tell: Callable[[Score], None] | None = None) -> list[list[float]]:
        """`tell` is called with every score that enters `scores`; by default it notes the best."""
        tell = tell or (lambda score: self.progress.note(score.rank_by, score.arch))
        keys = [[self.key(task, arch) for arch in archs] for task in tasks]
        counts, unknown = Counter(sum(keys, [])), {}

        def enter(score: Score, trained: bool) -> None:
            self.scores[score.key] = score
            tell(score)
            for _ in range(counts[score.key]):
                self.progress.update(trained)

        def train(item: tuple[str, tuple[Task | RnnTask, Any]]) -> Score:
            key, (task, arch) = item
            start = time.perf_counter()
            if self.drawn[0] != task:
                self.drawn = task, self.regression_of(task)
            try:
                loss = self.drawn[1](self.space, arch)[-1]
            except ValueError as error:
                raise ValueError(f"{self.space.format(arch)}: {error}") from error
            return Score(key, self.space.format(arch), finite(loss), round(time.perf_counter() - start, 3))

        def receive(result: list[Any]) -> None:
            score = Score(*result)
            self.record.add(score)
            enter(score, trained=True)

        for task, row in zip(tasks, keys):
            for arch, key in zip(archs, row):
                if key not in self.record.known:
                    unknown.setdefault(key, (task, arch))
        for key in counts:
            if key not in unknown:
                enter(self.record.known[key], trained=False)
        if unknown:
            self.workers.map(train, list(unknown.items()), receive)
        if not counts.keys() <= self.scores.keys():
            raise WorkersFailed("workers ask for different architectures; right is a space whose methods depend on their arguments alone")
        return [[self.scores[key].rank_by for key in row] for row in keys]


# ------------------------------------------------------------------------------------- regularized evolution (aging)
def regularized_evolution(random: Callable, mutate: Callable, evaluate: Callable[[list], list[float]], rng: random.Random,
                          population: int = 50, tournament: int = 10, cycles: int = 400, batch: int = 1) -> list[tuple[Any, float]]:
    """Aging evolution (Real et al., AAAI 2019): all (candidate, loss) in the order in which they were evaluated.

    `random(rng)` draws a candidate, `mutate(candidate, rng)` a neighbour, `evaluate` gives a list's losses, lower is
    better. The queue starts with `population` random candidates; then, `cycles` times, the best of `tournament` of its
    members, drawn without replacement, is mutated, and the child takes the place of the oldest. `batch` children are
    made from the same queue before they enter it.
    """
    queue: deque[tuple[Any, float]] = deque(maxlen=population)  # appending to a full one drops its oldest
    history: list[tuple[Any, float]] = []

    def enter(candidates: list[Any]) -> None:
        scored = list(zip(candidates, evaluate(candidates)))
        queue.extend(scored)
        history.extend(scored)

    enter([random(rng) for _ in range(population)])
    while (left := population + cycles - len(history)) > 0:
        parents = [min(rng.sample(queue, tournament), key=lambda pair: pair[1]) for _ in range(min(batch, left))]
        enter([mutate(parent, rng) for parent, _ in parents])
    return history


# ------------------------------------------------------------------------------------------------- rank correlation
def ranks(values: Any) -> np.ndarray:
    """Ranks from 1 up; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: Any, b: Any) -> float:
    """Spearman's rho; NaN where one side is all ties."""
    a, b = ranks(a), ranks(b)
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else math.nan


def kendall(a: Any, b: Any) -> float:
    """Kendall's tau-b; NaN where one side is all ties."""
    a, b = ranks(a), ranks(b)
    concordant = sum(np.sign(x - a) @ np.sign(y - b) for x, y in zip(a, b))
    untied_a, untied_b = (len(r) ** 2 - sum(np.unique(r, return_counts=True)[1] ** 2) for r in (a, b))
    return float(concordant / math.sqrt(untied_a * untied_b)) if untied_a * untied_b else math.nan


def spearman_interval(a: Any, b: Any, resamples: int = 2000) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of Spearman's rho."""
    a, b = np.asarray(a), np.asarray(b)
    draws = np.random.default_rng(0).integers(len(a), size=(resamples, len(a)))
    rhos = [spearman(a[draw], b[draw]) for draw in draws]
    low, high = np.nanquantile(rhos, (0.025, 0.975)) if not np.isnan(rhos).all() else (math.nan, math.nan)
    return float(low), float(high)


# --------------------------------------------------------------------------------------------------------- pictures
def new_figure(rows: int, columns: int, **options: Any) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure  # the only use of a third package: when a plot is asked for
    figure = Figure(layout="constrained", **options)
    return figure, figure.subplots(rows, columns, squeeze=False)


def check_plot(path: str) -> None:
    """ValueError, before anything is computed, if no plot can be written to `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib; right is: pip install matplotlib") from None
    if Path(path).suffix not in (".png", ".pdf", ".svg") or not Path(path).parent.is_dir():
        raise ValueError(f"--plot {path}: right is a .png, .pdf or .svg file in a folder that exists")


def plot_signals(parts: list[Part], images: Tensor | None, seed: int, path: str, count: int = 4) -> None:
    """Each signal of each part, and their sum: `count` maps of the first image, then of the second; maps of as many
    sequences where a part has only one map for each."""
    rows = []
    for part in parts:
        name = f"{part.name} {part.number + 1}"
        rows += [(f"{name}\n{signal['level']} {signal['basis']}", part.maps(j, images, seed).expand(part.shape))
                 for j, signal in enumerate(part.signals)]
        rows.append((f"{name}\nsum", part.total(images, seed)))
    figure, axes = new_figure(len(rows), 2 * count, figsize=(2 + 1.6 * count, len(rows)))
    for (label, maps), line in zip(rows, axes):
        for column, ax in enumerate(line):
            sample, channel = divmod(column, min(count, maps.shape[1]))
            ax.imshow(maps[sample, channel].numpy(), cmap="RdBu_r", aspect="auto", vmin=-maps.abs().max(), vmax=maps.abs().max())
            ax.set(xticks=[], yticks=[])
            if ax in axes[0]:
                ax.set_title(f"sample {sample + 1}\nchannel {channel + 1}", fontsize=8)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=100)


def plot_correlation(losses: list[float], values: list[float], title: str, path: str) -> None:
    """As they are, and by rank, which is what Spearman's rho compares."""
    figure, ((plain, ranked),) = new_figure(1, 2, figsize=(9, 4))
    plain.scatter(losses, values, s=12)
    plain.set(xlabel="regression loss", ylabel="recorded value")
    ranked.scatter(ranks(losses), ranks(values), s=12)
    ranked.set(xlabel="rank by regression loss (1: lowest)", ylabel="rank by recorded value (1: lowest)")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def plot_curves(curves: list[list[float]], names: list[str], title: str, path: str) -> None:
    """The losses of networks over the steps of their training."""
    figure, ((ax,),) = new_figure(1, 1, figsize=(7, 4))
    for curve, name in zip(curves, names):
        ax.plot(range(1, len(curve) + 1), curve, label=name[:90] + "..." * (len(name) > 90))
    ax.set(xlabel="training step", ylabel="squared error, weighted over the stages", title=title)
    figure.legend(loc="outside lower center", fontsize=7)
    figure.savefig(path, dpi=100)


def plot_search(losses: list[float], name: str, title: str, path: str) -> None:
    figure, ((ax,),) = new_figure(1, 1, figsize=(5, 4))
    ax.plot(losses, ".", markersize=4, label="candidate")
    ax.plot(np.minimum.accumulate(losses), label="best so far")
    ax.set(xlabel="candidates evaluated", ylabel=name, title=title)
    ax.legend()
    figure.savefig(path, dpi=100)


# ----------------------------------------------------------------------------------------------------- command line
TRIES = 300


def within_limits(draw: Callable[..., Any], space: Any, args: argparse.Namespace) -> Callable[..., Any]:
    """`draw`, repeated until what it gives is within --max-params and --max-flops; ValueError after TRIES."""
    limits = [(count, most) for count, most in (("params", args.max_params), ("flops", args.max_flops)) if most]

    def redraw(*words: Any) -> Any:
        for _ in range(TRIES):
            arch = draw(*words)
            if all(getattr(space, count)(arch) <= most for count, most in limits):
                return arch
        raise ValueError(f"none of {TRIES} draws is within " + " and ".join(f"--max-{count} {most:,}" for count, most in limits)
                         + f"; the last has {getattr(space, limits[0][0])(arch):,} {limits[0][0]}")
    return redraw


def search(args: argparse.Namespace, scorer: Scorer, task: Task | RnnTask, labels: list) -> dict[str, Any]:
    space = scorer.space
    draws = [within_limits(draw, space, args) for draw in (space.random, space.mutate)]
    history = regularized_evolution(*draws, lambda archs: scorer([task], archs)[0], random.Random(args.seed),
                                    args.population, args.tournament, args.cycles, args.batch)
    arch, loss = min(history, key=lambda pair: pair[1])
    result = {"arch": space.format(arch), "loss": finite(loss), "params": space.params(arch),
              "evaluated": len(history), "unique": len(scorer.scores)}
    print(f"{result['arch']}\nloss {show_loss(loss)}, {result['params']:,} parameters; the best of {len(history)} evaluated "
          f"architectures, {len(scorer.scores)} different networks")
    if args.plot:
        plot_search([loss for _, loss in history], "regression loss", f"{args.space}, {len(history)} architectures", args.plot)
    return result


FINALISTS, JUDGES = 10, 2  # tasks, and seeds that choose among them


def search_task(args: argparse.Namespace, scorer: Scorer, task: Task | RnnTask, labels: list) -> dict[str, Any]:
    """Regularized evolution over tasks of the kind of `task`; with --task, the first population is this task and mutants of
    it. A task's loss is -rho on the first --limit labels; of the best few the answer is the best by other seeds of
    weights, noise and signals. Rho on the other labels tells whether the task that was found is good for more than these.

    The paper (3.4) takes |rho|, and the best of the search. A task that ranks backwards would then count as a good one, while
    an architecture search minimises its loss; and the best of many has had the luck of its seed.
    """
    searched, held_out = labels[:args.limit], labels[args.limit or len(labels):]
    start = [task] if args.task else []
    judges = [Scorer(scorer.space, partial(scorer.regression_of, seed=seed), scorer.record, scorer.progress, scorer.workers, f"seed {seed} ")
              for seed in range(args.seed + 1, args.seed + 1 + JUDGES)]

    def draw(rng: random.Random) -> Task | RnnTask:
        if start:
            return start.pop()
        return mutate_task(task, rng) if args.task else random_task(rng, type(task))

    def rhos(scorer: Scorer, tasks: list[Task | RnnTask], labels: list) -> list[float]:
        """Of each task; where rho is undefined it counts as 0."""
        archs, values = zip(*labels)
        rows = scorer(tasks, archs, tell=lambda score: None)
        return [finite(spearman([-loss for loss in row], values)) or 0.0 for row in rows]

    def evaluate(tasks: list[Task | RnnTask]) -> list[float]:
        losses = [-rho for rho in rhos(scorer, tasks, searched)]
        for candidate, loss in zip(tasks, losses):
            scorer.progress.note(loss, candidate.to_json())
        return losses

    history = regularized_evolution(draw, mutate_task, evaluate, random.Random(args.seed), args.population, args.tournament,
                                    args.cycles, args.batch)
    finalists = sorted(history, key=lambda pair: pair[1])[:FINALISTS]
    judged = np.mean([rhos(judge, [candidate for candidate, _ in finalists], searched) for judge in judges], axis=0)
    best, loss = finalists[judged.argmax()]
    found = {"n": len(searched), "spearman": -loss, "spearman_other_seeds": judged.max()}
    said = f"spearman {found['spearman']:.3f} on the {len(searched)} labels of the search, {judged.max():.3f} by other seeds"
    if held_out:
        found |= {"n_held_out": len(held_out), "spearman_held_out": rhos(scorer, [best], held_out)[0]}
        said += f", {found['spearman_held_out']:.3f} on {len(held_out)} others"
    print(best.to_json())
    if not args.quiet:
        print(f"gennas: {said}; the best of {len(history)} evaluated tasks", file=sys.stderr)
    if args.plot:
        plot_search([loss for _, loss in history], "- spearman", f"{args.space}, {len(history)} tasks", args.plot)
    return {"task": asdict(best), **found, "evaluated": len(history)}


def score(args: argparse.Namespace, scorer: Scorer, task: Task | RnnTask, labels: list) -> dict[str, Any]:
    space, results = scorer.space, []
    waiting = deque((arch, scorer.key(task, arch)) for arch, _ in labels)

    def tell(score: Score) -> None:
        """Print what is known, in the order in which it was asked for."""
        scorer.progress.note(score.rank_by, score.arch)
        while waiting and waiting[0][1] in scorer.scores:
            arch, key = waiting.popleft()
            known = scorer.scores[key]
            results.append({"arch": space.format(arch), "loss": known.loss, "params": space.params(arch), "seconds": known.seconds})
            print(f"{show_loss(known.rank_by):>9} {results[-1]['params']:>12,} {known.seconds:>8.2f}  {results[-1]['arch']}", flush=True)

    print(f"{'loss':>9} {'parameters':>12} {'seconds':>8}  architecture")
    scorer([task], [arch for arch, _ in labels], tell)
    if args.plot:  # the record keeps what a network ends with; how it came there is trained again
        if not args.quiet:
            print("gennas: trains them once more for the plot", file=sys.stderr)
        curves = [scorer.regression_of(task)(space, arch)[:-1] for arch, _ in labels]
        plot_curves(curves, [result["arch"] for result in results], f"{args.space}, task {args.task}", args.plot)
    return {"results": results}


def correlate(args: argparse.Namespace, scorer: Scorer, task: Task | RnnTask, labels: list) -> dict[str, Any]:
    archs, values = zip(*labels)
    losses, = scorer([task], archs)
    merits = [-loss for loss in losses]
    rho, tau, (low, high) = spearman(merits, values), kendall(merits, values), spearman_interval(merits, values)
    by_params = spearman([scorer.space.params(arch) for arch in archs], values)
    seconds = float(np.mean([scorer.scores[scorer.key(task, arch)].seconds for arch in archs]))
    summary = f"spearman {rho:.3f} [{low:.3f}, {high:.3f}], kendall {tau:.3f}, {len(labels)} architectures"
    print(f"{summary}\nthe parameter count alone: spearman {by_params:.3f}; diverged: {losses.count(math.inf)}; "
          f"{seconds:.2f} s a network")
    if args.plot:
        plot_correlation(losses, values, summary, args.plot)
    return {"n": len(labels), "spearman": finite(rho), "spearman_ci": [finite(low), finite(high)], "kendall": finite(tau),
            "spearman_params": finite(by_params), "seconds_per_arch": seconds}


def finite(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def show_loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "diverged"


def show(args: argparse.Namespace, scorer: Scorer, task: Task | RnnTask, labels: list) -> dict[str, Any]:
    print(task.to_json())
    if args.plot:
        regression = scorer.regression_of(task)
        settings = regression.settings
        plot_signals(task.parts(settings.batch, settings.size), regression.inputs.cpu(), args.seed, args.plot)
    return {"plot": args.plot}


MODES = {"search": search, "search-task": search_task, "score": score, "correlate": correlate, "show": show}
# option -> the modes that it belongs to, where it does not belong to all
BELONGS = {"arch": ("score",), "labels": ("correlate", "search-task"), "limit": ("correlate", "search-task"),
           "max_params": ("search",), "max_flops": ("search",),
           "out": ("search", "search-task", "score", "correlate"),
           **dict.fromkeys(("population", "tournament", "cycles", "batch"), ("search", "search-task"))}


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"gennas: error: {message}\n")


def parse_arguments(argv: list[str] | None) -> tuple[OneLineParser, argparse.Namespace]:
    def whole(low: int) -> Callable[[str], int]:
        def convert(text: str) -> int:
            if not text.isdecimal() or int(text) < low:
                raise argparse.ArgumentTypeError(f"right is a whole number from {low} up, not {text!r}")
            return int(text)
        return convert

    parser = OneLineParser(description="Score and search neural architectures by regression of synthetic signals.")
    option = parser.add_argument
    option("arch", nargs="*", metavar="ARCH", help="with --mode score: architectures in their benchmark's spelling; - reads stdin")
    option("--space", required=True, metavar="NAME", help=f"search space: {', '.join(search_spaces.SPACES)}, or FILE.py:CLASS")
    option("--mode", choices=MODES, default="search", help="search is the default; show draws the task's signals")
    option("--task", metavar="NAME|FILE.json", help=f"{', '.join(TASKS)}, or a file; default: the one of the space")
    option("--preset", choices=PRESETS, default="fast", help="how a network is trained (default fast)")
    option("--steps", type=whole(1), metavar="N", help="training steps, instead of the preset's")
    option("--images", default="synthetic", metavar="synthetic|PATH", help="CIFAR-10/100 or ImageNet16-120 python batches, .npz, .npy")
    option("--seed", type=whole(0), default=0, metavar="N", help="of images, targets, weights, noise and search (default 0)")
    option("--device", metavar="cpu|cuda[:N]|mps", help="default: cuda where there is one, else cpu")
    option("--population", type=whole(1), metavar="N", help="members of the queue (default 50)")
    option("--tournament", type=whole(1), metavar="N", help="members drawn, of which the best is mutated (default 10)")
    option("--cycles", type=whole(0), metavar="N", help="children after the first population (default 400)")
    option("--batch", type=whole(1), metavar="N", help="children made from the same queue (default 8, with --preset paper 1)")
    option("--max-params", type=whole(1), metavar="N", help="search among networks of at most N parameters")
    option("--max-flops", type=whole(1), metavar="N", help="and at most N floating-point operations an image (a multiply-add is two)")
    option("--labels", metavar="FILE|DIR", help="with --mode correlate or search-task: a JSON list of [architecture, value], higher = better, "
           "an NDS file, or a folder of NAS-Bench-NLP logs")
    option("--limit", type=whole(1), metavar="N", help="only the first N labels; search-task tests the task that it found on the others")
    option("--workers", type=whole(1), metavar="N", help="processes that train networks; default: one for each GPU, or for each CPU core")
    option("--out", metavar="FILE.jsonl", help="record of every score; the same command resumes from it")
    option("--plot", metavar="FILE.png", help="draw the result (needs matplotlib)")
    option("--json", action="store_true", help="the last line of stdout is one JSON object")
    option("--quiet", action="store_true", help="no progress on stderr")
    args = parser.parse_intermixed_args(argv)

    for name, modes in BELONGS.items():
        if getattr(args, name) not in (None, []) and args.mode not in modes:
            spelled = "ARCH" if name == "arch" else f"--{name.replace('_', '-')}"
            parser.error(f"{spelled} belongs to --mode {' or '.join(modes)}, not to --mode {args.mode}")
    if args.mode == "score" and not args.arch:
        parser.error("--mode score needs ARCH [ARCH ...]")
    args.population = args.population or 50
    args.cycles = 400 if args.cycles is None else args.cycles
    for name, default in (("tournament", 10), ("batch", 1 if args.preset == "paper" else 8)):
        value = getattr(args, name) or min(default, args.population)
        if value > args.population:
            parser.error(f"--{name} {value}: right is at most the population, {args.population}")
        setattr(args, name, value)
    return parser, args


def exceptions(name: str, preset: str) -> tuple[dict[str, int], dict[str, int]]:
    """What is other than in the preset for the space of a `--space` name: settings, and sizes of its networks."""
    return EXCEPTIONS[preset].get(name.split("-")[0], ({}, {})) if name in search_spaces.SPACES else ({}, {})


def own_file(name: str) -> str | None:
    """What names the content of FILE.py in a record, for a `--space` FILE.py:CLASS."""
    return None if name in search_spaces.SPACES else hashlib.sha256(Path(name.rpartition(":")[0]).read_bytes()).hexdigest()[:12]


def load_space(name: str, preset: str = "fast", steps: int | None = None) -> tuple[Any, Settings]:
    """The space of a `--space` name with networks of the preset's sizes, and how they are trained. ValueError as of
    `search_spaces.get`."""
    changes, sizes = exceptions(name, preset)
    return search_spaces.get(name, **sizes), replace(PRESETS[preset], **changes | ({"steps": steps} if steps else {}))


def read_task(name: str) -> Task | RnnTask:
    """A task of the table by its name, or one from a JSON file."""
    name = str(name)
    if name in TASKS:
        return TASKS[name]
    if not name.endswith(".json"):
        raise ValueError(f"unknown task {name!r}; right is one of {', '.join(TASKS)} or a FILE.json")
    try:
        return JsonTask.from_json(Path(name).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def load_task(args: argparse.Namespace, default: str) -> Task | RnnTask:
    """The task that was asked for, by default that of the space; ValueError if it is not of that one's kind."""
    task = read_task(args.task or default)
    if type(task) is not type(read_task(default)):
        raise ValueError(f"task {args.task} is not for {args.space}; right is one like {default}")
    if isinstance(task, RnnTask) and args.images != "synthetic":
        raise ValueError(f"--images {args.images}: {args.space} has none, its input is a signal of the task")
    return task


def default_workers(device: torch.device) -> int:
    """How many workers keep a machine busy: one for each GPU, or for each core that this process may use."""
    if device.type == "cpu":
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return torch.cuda.device_count() if device == torch.device("cuda") else 1


def find_device(name: str | None) -> torch.device:
    """The named device, by default a GPU if there is one; set up for speed and for equal results in equal runs."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: not available here ({str(error).splitlines()[0][:80]}); right is cpu, cuda, cuda:N or mps") from None
    if device == torch.device("cuda"):
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.set_num_threads(1)  # small maps gain nothing from more, and sums would depend on their number
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.deterministic = True
    return device


def load_archs(args: argparse.Namespace, space: Any) -> list[tuple[Any, Any]]:
    """What the mode is to score, as (arch, value); no value with --mode score, nothing in the other modes."""
    if args.mode in BELONGS["labels"]:
        labels = search_spaces.load_labels(space, args.labels) if args.labels else getattr(space, "labels", None)
        if labels is None:
            raise ValueError(f"--mode {args.mode} needs --labels FILE, as {args.space} has no labels of its own")
        try:
            labels = [(arch, float(value)) for arch, value in labels]
        except (TypeError, ValueError):
            raise ValueError(f"labels of {args.space}: right is [(arch, number)]") from None
        chosen = labels[:args.limit]
        if len(chosen) < 3:
            raise ValueError(f"--mode {args.mode}: right are at least 3 architectures, not {len(chosen)}")
        return labels if args.mode == "search-task" and len(labels) - len(chosen) >= 3 else chosen
    texts = sys.stdin.read().splitlines() if args.arch == ["-"] else args.arch
    archs = [(space.parse(text), None) for text in texts if text.strip()]
    if args.mode == "score" and not archs:
        raise ValueError("--mode score: no architecture; right are some on the command line, or - and one a line on stdin")
    return archs


def prepare(args: argparse.Namespace, workers: Workers, argv: list[str]) -> tuple[Scorer, Task | RnnTask, list[tuple[Any, Any]]]:
    """The scorer, and the task and the architectures that the mode is given. ValueError or OSError for wrong input.

    Rank 0 alone reads architectures and known scores, starts the other workers where --workers asks for them, and tells
    them what it has read.
    """
    told = workers.share("input") if workers.rank else None
    if args.plot:
        check_plot(args.plot)
    space, settings = load_space(args.space, args.preset, args.steps)
    if args.max_flops and not getattr(space, "flops", None):
        raise ValueError(f"--max-flops: {args.space} does not count operations; right is --max-params")
    default = getattr(space, "task", "nb101")
    task = load_task(args, default)
    if args.mode != "search-task":  # which starts from none unless it is told to
        args.task = args.task or default
    labels = [(space.parse(arch), value) for arch, value in told["labels"]] if told else load_archs(args, space)
    device = find_device(args.device)
    images, args.images = (None, "none") if isinstance(task, RnnTask) else load_images(args.images, args.seed, settings.batch)
    made_with = {"space": args.space, "file": own_file(args.space), "sizes": exceptions(args.space, args.preset)[1],
                 "task": None if args.mode == "search-task" else asdict(task), "images": args.images, **asdict(settings),
                 "seed": args.seed, "device": device.type}
    if not told:
        record = Record(args.out, made_with)
        evaluated, chosen = args.population + args.cycles, len(labels[:args.limit])
        judged = JUDGES * min(FINALISTS, evaluated)
        total = {"search": evaluated, "search-task": (evaluated + judged) * chosen + len(labels) - chosen}.get(args.mode, len(labels))
        progress = Progress(total, args.quiet or args.mode == "show")
        if not args.quiet:
            start = f"task {args.task}, " if args.task else ""
            print(f"gennas: {args.mode} {args.space}, {start}{settings.steps} steps, images {args.images}, on {device}", file=sys.stderr)
        workers.start(min(args.workers or default_workers(device), total) if args.mode != "show" else 1, argv)
        workers.share("input", {"made with": json.dumps(made_with), "labels": [(space.format(arch), value) for arch, value in labels],
                                "known": list(record.known.values())})
    elif told["made with"] == json.dumps(made_with):
        record, progress = Record(), Progress(0, quiet=True)
        record.known = {score.key: score for score in (Score(*line) for line in told["known"])}
    else:
        raise ValueError(f"worker {workers.rank} has another task, other images, another FILE.py or another kind of device than worker 0; right are the same")
    regression = partial(Regression, images=images, settings=settings, seed=args.seed, device=device)
    return Scorer(space, regression, record, progress, workers), task, labels


def run(parser: OneLineParser, args: argparse.Namespace, workers: Workers, argv: list[str]) -> None:
    """One mode, from its input to its result; whatever is wrong becomes a line and an exit status."""
    start, scorer = time.perf_counter(), None

    def end(status: int, message: str) -> None:
        """Say what is wrong and what is known so far; below the progress line, if that is still open."""
        if scorer and scorer.record.known:
            message += f"; {len(scorer.record.known)} networks are scored" + bool(args.out) * f" and kept in {args.out}"
            message = "; ".join([message, *scorer.progress.leader()])
        parser.exit(status, "\n" * bool(scorer and scorer.progress.open) + f"gennas: {message}\n")

    try:
        scorer, task, labels = prepare(args, workers, argv)
        result = MODES[args.mode](args, scorer, task, labels)
        if args.json:
            print(json.dumps({"mode": args.mode, "space": args.space, "task": args.task, **result, "preset": args.preset, "images": args.images,
                              "seconds": round(time.perf_counter() - start, 3)}))
        sys.stdout.flush()
    except (KeyboardInterrupt, ValueError) as error:
        if workers.rank and scorer:  # all ranks have come to it; rank 0 says it
            parser.exit()
        end(*(130, "interrupted") if isinstance(error, KeyboardInterrupt) else (2, f"error: {error}"))
    except WorkersFailed as error:
        end(1, f"error: {error}")
    except OSError as error:
        end(1 if scorer else 2, f"error: {error.filename or 'stdout'}: {error.strerror or error}")


def main(argv: list[str] | None = None) -> None:
    if search_spaces is None:
        sys.exit("gennas: error: the command line needs search_spaces.py; right is both files in one folder")
    parser, args = parse_arguments(argv)
    workers = Workers.join()
    if workers.rank:
        sys.stdout, args.plot, args.quiet = open(os.devnull, "w"), None, True
    elif distributed.is_torchelastic_launched():
        if args.workers:
            parser.error("--workers is for one machine without torchrun; right is torchrun --nproc-per-node N")
        args.workers = 1  # this one; torchrun has started the others
    try:
        run(parser, args, workers, sys.argv[1:] if argv is None else argv)
    except distributed.DistError:
        parser.exit(1, f"gennas: error: worker {workers.rank} has lost the others and ends\n")
    finally:
        workers.stop()


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":  # as Ctrl-C: the workers end with the run
        process_signal.signal(process_signal.SIGTERM, process_signal.default_int_handler)
    main()
