# SPDX-License-Identifier: MIT
"""GenNAS: score a neural architecture without labels, by how well it learns to regress synthetic signals.

    python gennas.py --space nb201                                      # search for a good cell
    python gennas.py --space nb201 --mode score "[[3],[3,2],[1,4,3]]"   # score one cell; a lower score is better
    python gennas.py --space nb201 --mode correlate                     # compare scores with recorded accuracies
    python gennas.py --space nb201 --mode show --preset paper           # print a task and the formula of the score

Li, Hao, Li, Xiong, Chen: Generic Neural Architecture Search via Regression (NeurIPS 2021, arXiv 2108.01899). The
default, `--preset fast`, is not the paper's setting. A score needs no labels, but the constants of the default were
chosen on labels (see PRESETS). `--preset paper` is the paper's setting.

1. A task defines a target for each of the three stages of a network. Each target is a sum of synthetic signals.
2. The network is trained for a few steps to regress the targets from one batch of images.
3. The score is the log of the final loss; most presets add other terms. Lower is better.
4. Regularized evolution searches for the architecture with the best score or, given labels, for the best task.

Begin with `Regression.__call__`, which takes one network from its construction to its losses. The lines above the
banner are the core, the method for convolutional networks. They also run copied alone (`Regression` explains `space`):

    regression = Regression(COMBO, synthetic_images(seed=0, batch=16))
    print(score({"log loss": 1}, regression(space, arch)))

The lines below the banner serve the core: rank correlation, presets, recurrent networks, the authors' tasks, `Scorer`
(the class to use from Python), the record of a run, workers, pictures, modes and the command line.
"""
from __future__ import annotations

import hashlib
import json
import math
import random
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Settings:
    """The settings of a training. The defaults are the paper's."""
    steps: int = 100  # number of training steps; with 0 the untrained network is scored
    learning_rate: float = 0.1  # learning rate of SGD, which stays constant
    momentum: float = 0.9  # momentum of SGD
    weight_decay: float = 4e-5  # weight decay of SGD; biases and batch norms have none
    rnn_learning_rate: float = 1e-3  # learning rate of Adam, which trains recurrent networks
    rnn_weight_decay: float = 1.2e-6  # weight decay of Adam, on all parameters
    stage_weights: tuple[float, ...] = (0.25, 0.5, 1.0)  # weights of the stages' losses; a stage of weight 0 is skipped
    batch: int = 16  # number of images, or of sequences
    side: int = 32  # height and width of the images, in pixels
    size: int = 8  # height and width of the targets, in pixels; for sequences, the number of time steps
    ridge: float | None = None  # None: SGD trains the heads; a number: solved heads, with this ridge penalty


# ---------------------------------------------------------------------------------- signal bases (paper, 3.2)
# A basis draws C maps for each of B images: a tensor (B, C, H, W). All its random numbers come from `rng`, a
# generator on the CPU, so that the signals are equal on all devices. Positions y and x count from 1.
Shape = tuple[int, int, int, int]  # B, C, H, W


def sin1d(rng: torch.Generator, shape: Shape, frequencies: Iterable[float]) -> Tensor:
    """Draw waves along y, sin(2 pi f y + phi), or along x. A frequency f is in cycles per position."""
    f = torch.tensor(tuple(frequencies))
    return sinusoids(rng, shape, torch.cat([f, 0 * f]), torch.cat([0 * f, f]))


def sin2d(rng: torch.Generator, shape: Shape, frequencies: Iterable[float]) -> Tensor:
    """Draw waves sin(2 pi (f y + g x) + phi) or sin(2 pi (-f y + g x) + phi), f, g being any two frequencies."""
    f = torch.tensor(tuple(frequencies))
    f, g = torch.cartesian_prod(f, f).T
    return sinusoids(rng, shape, torch.cat([f, -f]), torch.cat([g, g]))


def sinusoids(rng: torch.Generator, shape: Shape, fy: Tensor, fx: Tensor, copies: int = 32) -> Tensor:
    """Draw maps sin(2 pi (fy y + fx x) + phi) from a pool that has each wave (fy, fx) 32 times, without replacement.

    The authors make half of the maps cosines; since phi is uniform in (0, 2 pi), these are sines, too.
    """
    B, C, H, W = shape
    drawn = torch.rand(B, len(fy) * copies, generator=rng).topk(C).indices  # (B, C), places in the pool
    wave = (drawn // copies)[..., None, None]  # (B, C, 1, 1)
    phase = 2 * math.pi * torch.rand(B, C, 1, 1, generator=rng)
    y, x = torch.arange(1, H + 1)[:, None], torch.arange(1, W + 1)
    return torch.sin(2 * math.pi * (fy[wave] * y + fx[wave] * x) + phase)


def dot(rng: torch.Generator, shape: Shape, density: float, least: int = 0) -> Tensor:
    """Set max(least, floor(density H W)) random positions of each map to +1 or -1, and the others to 0."""
    B, C, H, W = shape
    dots = max(least, math.floor(density * H * W))
    order = torch.rand(B, C, H * W, generator=rng).argsort(-1)  # random permutations
    signs = 2 * torch.randint(0, 2, (B, C, H * W), generator=rng) - 1
    return torch.where(order < dots, signs, 0).float().view(shape)


def gdot(rng: torch.Generator, shape: Shape, density: float) -> Tensor:
    """Smooth dots (at least one) with a gaussian of sigma 1, and divide each map by its largest absolute value."""
    smooth = blur_matrix(shape[2]) @ dot(rng, shape, density, least=1) @ blur_matrix(shape[3]).T
    return smooth / smooth.abs().amax((2, 3), keepdim=True)


def blur_matrix(size: int, radius: int = 4) -> Tensor:
    """Return the matrix (size, size) of a convolution with a gaussian of sigma 1. The border is mirrored."""
    gaussian = np.exp(-np.arange(-radius, radius + 1) ** 2 / 2)
    mirrored = np.pad(np.eye(size), ((radius, radius), (0, 0)), mode="symmetric")  # (size + 2 radius, size)
    windows = np.lib.stride_tricks.sliding_window_view(mirrored, 2 * radius + 1, axis=0)  # (size, size, 2 radius + 1)
    return torch.from_numpy(windows @ (gaussian / gaussian.sum())).float()


def resize(rng: torch.Generator, shape: Shape, images: Tensor) -> Tensor:
    """Shrink the images (B, 3, h, w) to H x W (nearest), scale the batch to [-1, 1], draw a colour for each map."""
    small = F.interpolate(images, size=shape[2:])
    low, high = small.aminmax()
    colours = torch.randint(0, 3, (shape[1],), generator=rng)  # (C,), the same for all images
    return (2 * (small - low) / (high - low) - 1)[:, colours]


# basis -> its function, and the fields of `Signal` that it has; the first one is the function's last argument
BASES: dict[str, tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    "sin1d": (sin1d, ("frequencies", "per_sample")),
    "sin2d": (sin2d, ("frequencies", "per_sample")),
    "dot": (dot, ("density", "per_sample")),
    "gdot": (gdot, ("density", "per_sample")),
    "resize": (resize, ()),  # here, the images are the last argument
}


# ------------------------------------------------------------------------------------------ task (paper, 3.3)
def seed_of(*purpose: Any) -> int:
    """Return a seed that is a hash of the purpose, equal in all processes and on all machines."""
    return int(hashlib.sha256(json.dumps(purpose).encode()).hexdigest()[:8], 16)


@dataclass(frozen=True)
class Signal:
    """One summand of a target: `level` times the maps of a basis."""
    basis: str  # a name of BASES
    level: float  # 0 to 10
    per_sample: bool | None = None  # whether each image has its own maps or all share theirs; None only with resize
    frequencies: tuple[float, ...] | None = None  # only with sin1d and sin2d: ten, above 0 and below 0.5
    density: float | None = None  # only with dot and gdot: the share of positions that are dots, 0 to 1

    def maps(self, shape: Shape, images: Tensor | None, name: str, seed: int) -> Tensor:
        """Draw the maps (B, C, H, W), or (1, C, H, W) if all images share them, for the target of that name. The name,
        the seed and the basis seed the generator, so that adding a signal does not change the others."""
        rng = torch.Generator("cpu").manual_seed(seed_of(name, seed, self.basis))
        function, fields = BASES[self.basis]
        argument = getattr(self, fields[0]) if fields else images
        return function(rng, shape if self.per_sample else (1, *shape[1:]), argument)


@dataclass(frozen=True)
class Noise:
    """The noise on the input, drawn afresh for every pass."""
    kind: str  # "uniform" in [-level, level], or "gaussian" with standard deviation `level`
    level: float  # 0 to 10


@dataclass(frozen=True)
class Stage:
    """The target of one stage. Each of its channels is a sum of signals."""
    channels: int  # 1 to 640, as sin1d draws from 20 waves, 32 times each
    signals: tuple[Signal, ...]  # no basis twice


@dataclass(frozen=True)
class Task:
    """A task: what a network must regress at the ends of its three stages, and the noise on its input."""
    noise: Noise
    stages: tuple[Stage, ...]
    weights: dict[str, float] | None = None  # weights of the `score` that come with the task

    def parts(self, batch: int, size: int) -> dict[str, tuple[tuple[Signal, ...], Shape]]:
        """Return a dict from the name of each target to its signals and its shape."""
        return {f"target {number}": (stage.signals, (batch, stage.channels, size, size))
                for number, stage in enumerate(self.stages, start=1)}

    def draw(self, images: Tensor | None, seed: int, batch: int = 16, size: int = 8) -> list[Tensor]:
        """Draw the targets (batch, channels, size, size). They are the same for all architectures."""
        targets = []
        for name, (signals, shape) in self.parts(batch, size).items():
            maps = [signal.level * signal.maps(shape, images, name, seed) for signal in signals]
            targets.append(sum(maps, torch.zeros(shape)))
        return targets


MEDIUM = (.125, .15, .175, .2, .225, .25, .275, .3, .325, .35)
HIGH = (.375, .3875, .4, .4125, .425, .4375, .45, .4625, .475, .4875)
COMBO = Task(Noise("gaussian", 0.0), (  # an example: the task that the authors made by hand
    Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("sin2d", 1.0, True, HIGH),
               Signal("dot", 1.0, True, density=1.0))),
    Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("sin2d", 1.0, True, MEDIUM), Signal("resize", 1.0))),
    Stage(64, (Signal("sin1d", 1.0, True, HIGH), Signal("dot", 1.0, True, density=1.0), Signal("resize", 1.0)))))


# ----------------------------------------------------------------------------------------------------- images
def synthetic_images(seed: int, batch: int) -> Tensor:
    """Draw images (B, 3, 32, 32): noise with the 1/f spectrum of natural images. Not in the paper."""
    with isolated(), torch.device("cpu"):
        rng = torch.Generator("cpu").manual_seed(seed_of("images", seed))
        frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32)).clamp(min=1 / 32)
        spectrum = torch.fft.rfft2(torch.randn(batch, 4, 32, 32, generator=rng)) / frequency  # (B, 4, 32, 17)
        maps = torch.fft.irfft2(spectrum)  # (B, 4, 32, 32): one map for all colours, then one for each
        return normalised(0.9 ** 0.5 * maps[:, :1] + 0.1 ** 0.5 * maps[:, 1:])  # .9 and .1 of the variance


def normalised(images: Tensor) -> Tensor:
    """Return the images (B, 3, H, W) with mean 0 and standard deviation 1 in each colour."""
    std, mean = torch.std_mean(images, (0, 2, 3), keepdim=True)
    return (images - mean) / std


def resized(images: Tensor, side: int) -> Tensor:
    """Return the images (B, 3, H, W) as (B, 3, side, side): nearest if enlarged, antialiased bilinear if shrunk."""
    shrink = side < max(images.shape[2:])
    return F.interpolate(images, size=side, mode="bilinear" if shrink else "nearest", antialias=shrink)


# ------------------------------------------------------------------------------------ regression (paper, 3.1)
LOCK = threading.RLock()  # held by the thread that is isolated


@contextmanager
def isolated(device: torch.device = torch.device("cpu")) -> Iterator[None]:
    """Set the global state of PyTorch that a training depends on, and put back what was there.

    Inside, gradients are on, inference mode and autocast are off, the default dtype is float32, matrix products have
    full precision, the CPU uses one thread, and cuDNN is deterministic. Only one thread of a process can be inside.
    """
    with (LOCK, torch.inference_mode(False),  # which turns gradients on, too
          torch.autocast("cpu", enabled=False), torch.autocast(device.type, enabled=False),
          torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True),  # only in convolutions
          torch.random.fork_rng([device] if device.type == "cuda" else [])):
        threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_num_threads(1)  # more do not speed up small maps, and they would change the order of sums
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)


class Trained(NamedTuple):
    """The result of a training."""
    loss: float  # weighted sum of the stages' losses after the last step; not finite if the network diverged
    losses: list[list[float]]  # of each stage that counts: before each step and, in eval() mode, after the last
    params: int  # number of parameters of the network that was trained, without heads
    seconds: float = 0.0  # duration of the training, if `Scorer` measured it


def rows(x: Tensor) -> Tensor:
    """Return maps (B, C, H, W) as rows (B H W, C), one for each position, or sequences (B, T, D) as (B T, D)."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).flatten(0, -2)


def ridge_loss(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Return the mean squared error of the best linear head for these features, plus its ridge penalty.

    That is the minimum over W of mean((X W - Y)^2) + ridge |W|^2 / K. X are the features (N, C), standardised here, and
    Y is the target (N, K), centred here. The best head is W = (X'X + ridge N I)^-1 X'Y = X'(XX' + ridge N I)^-1 Y; the
    second form is used if C > N, as its system is smaller then. W minimises the loss, so the gradient can take it as a
    constant (Golub and Pereyra, 1973). Not in the paper.
    """
    features = F.batch_norm(features, None, None, training=True)  # (N, C)
    target = target - target.mean(0)  # (N, K)
    n, channels = features.shape
    with torch.no_grad():
        wide = channels > n
        gram = features @ features.T if wide else features.T @ features  # (N, N) or (C, C)
        gram.diagonal().add_(ridge * n)
        factor = torch.linalg.cholesky_ex(gram).L  # unlike `cholesky`, it does not make the host wait for a GPU
        head = torch.linalg.solve_triangular(factor, target if wide else features.T @ target, upper=False)
        head = torch.linalg.solve_triangular(factor.T, head, upper=True)  # (N, K) or (C, K)
        head = features.T @ head if wide else head  # (C, K)
    return F.mse_loss(features @ head, target) + ridge * head.square().sum() / target.shape[1]


class Regression:
    """Trains networks to regress one task from one batch of images (paper, 3.1).

    `regression(space, arch)` trains a network and returns its losses. `space.build(arch)` must return a new network,
    images (B, 3, H, W) -> three feature maps; `space.key(arch)` must return a string, equal for equal networks.

    The losses depend on (space, key, task, images, settings, seed) and the kind of device alone, not on what the
    calling program has set (see `isolated`). But no other thread may draw from PyTorch's global generator meanwhile.

    The paper trains a linear head on each stage along with the network. With settings.ridge, every step solves for the
    best heads instead. The loss then measures the features, not the progress of the heads.
    """

    def __init__(self, task: Any, images: Tensor, settings: Settings = Settings(), seed: int = 0, device: str = "cpu"):
        self.task, self.settings, self.seed, self.device = task, settings, seed, torch.device(device)
        self.stages = [stage for stage, weight in enumerate(settings.stage_weights) if weight]  # those with a weight
        self.sides: list[int] = []  # the sides of the first network's taps
        with isolated(self.device), torch.device("cpu"):
            self.input, *self.targets = [x.to(self.device) for x in self.draw_tensors(images)]
            self.stage_weights = torch.tensor(settings.stage_weights).float()[self.stages].to(self.device)

    def __call__(self, space: Any, arch: Any) -> Trained:
        steps, ridge, losses_by_step = self.settings.steps, self.settings.ridge, []
        identity = getattr(space, "name", type(space).__name__), space.key(arch), self.seed

        with isolated(self.device):
            # 1. Build the network and its heads. The CPU draws the parameters, so that they are equal on all devices.
            self.seed_generators("weights", *identity)
            with torch.device("cpu"):
                body = space.build(arch)
                params = sum(parameter.numel() for parameter in body.parameters())
                network = self.with_heads(body).to(self.device, memory_format=torch.channels_last).train()
            body, *heads = network  # heads is empty if ridge is set
            optimizer = self.optimizer(network)
            self.seed_generators("noise", *identity)

            for step in range(steps + 1):
                training = step < steps
                if not training:  # the last pass only evaluates
                    network.eval()
                with torch.set_grad_enabled(training):
                    # 2. Pass the images, with fresh noise, through the network. A tap is the feature map of a stage.
                    noise = torch.empty_like(self.input)  # (B, 3, H, W)
                    noise = noise.uniform_(-1, 1) if self.task.noise.kind == "uniform" else noise.normal_()
                    taps = self.taps(body, self.input + noise.mul_(self.task.noise.level))  # three of (B, C, h, w)

                    # 3. Compare each stage with its target, through its trained head or through the best head.
                    losses = []
                    for stage in self.stages:
                        tap, target = self.match_sizes(stage, taps[stage])  # (B, C, h, w), (B, K, h, w)
                        if ridge is None:
                            losses.append(F.mse_loss(heads[stage](tap), target))
                        else:
                            losses.append(ridge_loss(rows(tap), rows(target), ridge))
                    loss = self.stage_weights @ torch.stack(losses)
                losses_by_step.append(torch.stack([*losses, loss]).detach())  # .item() would wait for the GPU

                # 4. Take a training step. The last pass and a dead network have no gradient.
                if loss.requires_grad:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

            *curves, total = torch.stack(losses_by_step).T.tolist()  # steps + 1 numbers each
        curve_of = dict(zip(self.stages, curves))
        return Trained(total[-1], [curve_of.get(stage, []) for stage in range(len(self.targets))], params)

    def draw_tensors(self, images: Tensor) -> list[Tensor]:
        """Return the input, the first B images as (B, 3, side, side), and three targets (B, K, size, size)."""
        images = resized(images[:self.settings.batch], self.settings.side)
        targets = self.task.draw(images, self.seed, self.settings.batch, self.settings.size)
        return [x.to(memory_format=torch.channels_last) for x in (images, *targets)]

    def seed_generators(self, *purpose: Any) -> None:
        """Seed the global generators of the CPU and of this device alone."""
        torch.default_generator.manual_seed(seed_of(*purpose))
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed_of(*purpose))

    def with_heads(self, body: nn.Module) -> nn.ModuleList:
        """Return the network and, if they are trained, the heads of its stages: batch norm and a 1x1 convolution."""
        if self.settings.ridge is not None:
            torch.func.replace_all_batch_norm_modules_(body)  # no running statistics: always those of the batch
            return nn.ModuleList([body])
        with torch.no_grad():  # two images, as a batch norm without running statistics needs more than one
            widths = [tap.shape[1] for tap in self.taps(body.eval(), self.input[:2].cpu())]
        heads = [nn.Sequential(nn.BatchNorm2d(width), nn.Conv2d(width, target.shape[1], 1))
                 for width, target in zip(widths, self.targets)]
        return nn.ModuleList([body, *heads])

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        parameters, settings = list(network.parameters()), self.settings
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
                  {"params": [p for p in parameters if p.ndim <= 1]}]  # biases and batch norms
        return torch.optim.SGD(groups, settings.learning_rate, settings.momentum, fused=True)

    def taps(self, body: nn.Module, images: Tensor) -> list[Tensor]:
        """Return the network's three taps (B, C, h, h). ValueError if it returns anything else, or if the sides differ
        from those of the first network."""
        taps = body(images)
        shapes = [tuple(tap.shape) for tap in taps] if isinstance(taps, (list, tuple)) else []
        sides = [shape[2] for shape in shapes if len(shape) == 4 and shape[2] == shape[3]]
        if not len(shapes) == len(sides) == len(self.targets) or sides != (self.sides or sides):
            came = shapes or f"a {type(taps).__name__.lower()}"
            raise ValueError(f"feature maps: expected three (B, C, H, H), with the same H in all networks, not {came}")
        self.sides = sides
        return taps

    def match_sizes(self, stage: int, tap: Tensor) -> tuple[Tensor, Tensor]:
        """Return a tap (square) and its target at the same size. The tap is resized to the target (nearest).

        With solved heads, a tap that is smaller than the target stays as it is, and the target is averaged to its size.
        This changes the scale of the loss, so the taps of all architectures must have the same sizes.
        """
        target, size = self.targets[stage], self.settings.size
        if self.settings.ridge is None or tap.shape[2] > size:
            tap = F.interpolate(tap, size=size)
        elif tap.shape[2] < size:
            target = F.adaptive_avg_pool2d(target, tap.shape[2:])
        return tap, target


# ------------------------------------------------------------------------------------------------------ score
def terms(trained: Trained) -> dict[str, float]:
    """Return the terms of a score: the log of the loss and, not in the paper, those of the number of parameters and of
    each stage's loss before and after training."""
    values = {"log loss": math.log(trained.loss + 1e-9), "log params": math.log(max(trained.params, 1))}
    for stage, losses in enumerate(trained.losses, start=1):
        if losses:
            values[f"log loss {stage} before"] = math.log(losses[0] + 1e-9)
            values[f"log loss {stage} after"] = math.log(losses[-1] + 1e-9)
    return values


def score(weights: dict[str, float], trained: Trained) -> float:
    """Return the weighted sum of the terms; lower is better. The paper's weights are {"log loss": 1}.

    A term that the training lacks counts as 0. The score of a network that diverged is infinity.
    """
    if not math.isfinite(trained.loss):
        return math.inf
    values = terms(trained)
    return sum(weight * values.get(term, 0) for term, weight in weights.items())


# ------------------------------------------------------------------------------ regularized evolution (aging)
Scored = list[tuple[Any, float]]  # pairs (candidate, score)


def regularized_evolution(draw: Callable, mutate: Callable, evaluate: Callable[[list], list[float]], rng: random.Random,
                          population: int = 50, tournament: int = 10, cycles: int = 400, batch: int = 1) -> Scored:
    """Run an aging evolution (Real et al., AAAI 2019). Return all candidates with their scores, as they came.

    `draw(rng)` returns a candidate, `mutate(candidate, rng)` a neighbour of it, `evaluate(candidates)` their scores; a
    lower score is better. A queue starts with `population` drawn candidates. Then, `cycles` times, the best of
    `tournament` random members is mutated and its child replaces the oldest one; `batch` children enter at a time.
    """
    queue: deque[tuple[Any, float]] = deque(maxlen=population)  # when it is full, it drops its oldest member
    history: Scored = []
    candidates = [draw(rng) for _ in range(population)]
    while candidates:
        evaluated = list(zip(candidates, evaluate(candidates)))
        queue.extend(evaluated)
        history.extend(evaluated)

        children = min(batch, population + cycles - len(history))  # 0 at the end
        parents = [min(rng.sample(queue, tournament), key=lambda pair: pair[1])[0] for _ in range(children)]
        candidates = [mutate(parent, rng) for parent in parents]
    return history


def search_architecture(draw: Callable, mutate: Callable, key: Callable[[Any], str], evaluate: Callable,
                        evaluate_anew: Callable, rng: random.Random, finalists: int = 10, **evolution: int
                        ) -> tuple[Scored, Scored]:
    """Search for the architecture with the best score. Return the history of a regularized evolution, and its finale.

    In the finale (not in the paper), `evaluate_anew` scores the best `finalists` different networks again, with seeds
    that the evolution did not use. The new scores alone rank them, best first: the best of hundreds of scores is partly
    luck, due to the initial parameters and the images.
    """
    history = regularized_evolution(draw, mutate, evaluate, rng, **evolution)
    ranking = sorted(distinct(history, key), key=lambda pair: pair[1])
    archs = [arch for arch, _ in ranking[:finalists]]
    return history, sorted(zip(archs, evaluate_anew(archs)), key=lambda pair: pair[1])


def distinct(pairs: Iterable[tuple[Any, Any]], key: Callable[[Any], str]) -> list[tuple[Any, Any]]:
    """Return the first pair (architecture, value) of each key. Architectures with equal keys are the same network."""
    first: dict[str, tuple[Any, Any]] = {}
    for pair in pairs:
        first.setdefault(key(pair[0]), pair)
    return list(first.values())


def random_noise(rng: random.Random) -> Noise:
    return Noise(rng.choice(("gaussian", "uniform")), rng.randint(0, 9) / 10)


def random_signals(rng: random.Random, bases: Iterable[str], **fixed: Any) -> tuple[Signal, ...]:
    """Draw a signal of each basis with chance 1/2. Its fields are random, except those that are `fixed`."""
    signals = []
    for basis in [basis for basis in bases if rng.random() < 0.5]:
        low, high = rng.uniform(0, 0.5), rng.uniform(0, 0.5)
        frequencies = tuple(min(max(round(rng.uniform(low, high), 4), 1e-4), 0.4999) for _ in range(10))
        drawn = {"frequencies": frequencies, "density": round(rng.random(), 4), "per_sample": rng.random() < 0.5}
        own = {name: drawn[name] for name in BASES[basis][1]}
        signals.append(Signal(basis, rng.randint(5, 29) / 10, **own | fixed))
    return tuple(signals)


def random_task(rng: random.Random) -> Task:
    """Draw a task from the paper's search space (paper, 3.4)."""
    noise = random_noise(rng)
    return Task(noise, tuple(Stage(rng.choice(range(16, 97, 16)), random_signals(rng, BASES)) for _ in range(3)))


def mutate_task(task: Task, rng: random.Random) -> Task:
    """Return another task: noise, channels of a stage and signals of a basis are redrawn with chance 0.2 each."""
    other = random_task(rng)
    noise = pick(task.noise, other.noise, rng)
    stages = tuple(Stage(pick(old.channels, new.channels, rng), pick_signals(old.signals, new.signals, rng))
                   for old, new in zip(task.stages, other.stages))
    return Task(noise, stages) if (noise, stages) != (task.noise, task.stages) else mutate_task(task, rng)


def pick(old: Any, new: Any, rng: random.Random) -> Any:
    return new if rng.random() < 0.2 else old


def pick_signals(old: tuple[Signal, ...], new: tuple[Signal, ...], rng: random.Random) -> tuple[Signal, ...]:
    """Pick the old or the new signal of each basis; either may be missing."""
    olds, news = ({signal.basis: signal for signal in signals} for signals in (old, new))
    picked = [pick(olds.get(basis), news.get(basis), rng) for basis in BASES]
    return tuple(signal for signal in picked if signal)


def search_task(start: list[Task], fitness: Callable[[Task], float], rng: random.Random,
                draw: Callable = random_task, mutate: Callable = mutate_task, **evolution: int) -> Scored:
    """Search for the task with the highest fitness (paper, 3.4). Return all tasks with -fitness, as they came.

    The first population begins with the tasks of `start`; its other members are drawn. The paper's fitness is |rho| of
    losses and some 20 accuracies. Use rho of the negated losses, as the search for an architecture prefers low losses.
    """
    first = deque(start)
    return regularized_evolution(lambda rng: first.popleft() if first else draw(rng), mutate,
                                 lambda tasks: [-fitness(task) for task in tasks], rng, **evolution)


# ============================================================================================================
# The core ends here. What follows serves it.
# ============================================================================================================
import argparse
import multiprocessing
import os
import signal as os_signal
import sys
import time
import traceback
import zipfile
from collections import Counter
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from torch import distributed


def check(condition: bool, wrong: str, value: Any = None, expected: str = "") -> None:
    """Raise ValueError unless the condition holds. The message tells what is wrong and what is expected."""
    if not condition:
        raise ValueError(f"{wrong}: expected {expected}, not {value!r:.80}" if expected else wrong)


# ------------------------------------------------------------------------------------------ rank correlation
def ranks(values: Any) -> np.ndarray:
    """Return the ranks, from 1 up. Equal values share their mean rank; if any value is NaN, all ranks are NaN."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.where(np.isnan(values).any(), math.nan, (np.cumsum(counts) - (counts - 1) / 2)[place])


def spearman(a: Any, b: Any) -> float:
    """Return Spearman's rho; NaN if all values of one side are equal, or one is NaN."""
    a, b = ranks(a), ranks(b)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else math.nan


def kendall(a: Any, b: Any) -> float:
    """Return Kendall's tau-b; NaN if all values of one side are equal, or one is NaN."""
    a, b = ranks(a), ranks(b)
    concordance = untied_a = untied_b = 0  # over all ordered pairs
    for u, v in zip(a, b):
        x, y = np.sign(a - u), np.sign(b - v)
        concordance, untied_a, untied_b = concordance + x @ y, untied_a + x @ x, untied_b + y @ y
    return float(concordance / math.sqrt(untied_a * untied_b)) if untied_a * untied_b else math.nan


def spearman_interval(a: Any, b: Any, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of rho; NaN for fewer than 10 pairs."""
    a, b = np.asarray(a), np.asarray(b)
    if len(a) < 10:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(a), size=(resamples, len(a)))
    return tuple(np.nanquantile([spearman(a[sample], b[sample]) for sample in drawn], (0.025, 0.975)).tolist())


# --------------------------------------------------------------------------------------------------- presets
class Preset(NamedTuple):
    """How the networks of a family of spaces are trained and scored."""
    settings: Settings
    sizes: dict[str, Any] = {}  # keyword arguments of the space's class in search_spaces
    weights: dict[str, float] = {"log loss": 1.0}  # weights of the score; these are the paper's
    task: str | None = None  # a name of TASKS; None: the task that the space names


# The constants of "fast" were chosen on labels: on 150 to 300 networks each of nb101, nb201, nbmacro and nbnlp, and on
# 70 to 120 networks each of three NDS spaces (NDS: the last eight families). The README has the effect of each change.
FAST = Settings(steps=16, learning_rate=1.0, rnn_learning_rate=0.005, side=16, ridge=1.0)
WITH_SIZE = {"log loss": 1.0, "log params": -0.03}  # of two networks with the same loss, the larger one is better
WITH_STAGES = {"log loss": 1.0, "log loss 1 after": 1.0, "log loss 2 after": 1.0, "log params": -0.03}
CELLS = Preset(replace(FAST, steps=6), {"shrink": 4, "all_blocks": True}, WITH_STAGES | {"log params": -0.06}, "combo")
RESIDUAL = Preset(replace(FAST, steps=2), {"all_blocks": True}, WITH_SIZE, "combo")

# preset -> family of spaces (the space's name without -fix and -in) -> how its networks are trained and scored;
# "" stands for all other spaces, and for spaces of your own
PRESETS: dict[str, dict[str, Preset]] = {
    "paper": {"": Preset(Settings()), "nbnlp": Preset(Settings(), {"reservoir": True})},
    "fast": {
        # These weights do well on all of six benchmarks, each trained with these settings and heads on all blocks.
        "": Preset(FAST, weights=WITH_STAGES),
        # In nb101 and nb201 a low loss of stage 1 goes with a low accuracy, so stage 1 has weight 0.
        "nb101": Preset(replace(FAST, stage_weights=(0.0, 0.5, 1.0)), {"cells": 2, "all_blocks": True},
                        {"log loss": 1.0, "log loss 2 after": 1.0}),
        # Five cells a stage, as in the benchmark, and a high loss of stage 3 before training tell the best cells apart.
        "nb201": Preset(replace(FAST, steps=10, learning_rate=0.3, batch=8, side=24, stage_weights=(0.0, 0.5, 1.0)),
                        {"width": 8, "cells": 5, "all_blocks": True},
                        {"log loss": 1.0, "log params": -0.07, "log loss 3 before": -0.15}),
        # Here deep networks are more accurate, but after few steps their losses are higher: the loss ranks backwards.
        "nbmacro": Preset(replace(FAST, steps=8, learning_rate=0.3, batch=32), {"width": 8}, {
            "log loss": 1.0, "log loss 1 after": 7.0, "log loss 2 after": -1.4, "log loss 3 before": -0.2}, "combo"),
        "nbnlp": Preset(replace(FAST, steps=72, batch=32, size=4),
                        {"reservoir": True, "widths": (100, 150, 150, 100)}),
        **dict.fromkeys(("darts", "enas", "pnas", "nasnet", "amoeba"), CELLS),
        **dict.fromkeys(("resnet", "resnext-a"), RESIDUAL),
        "resnext-b": RESIDUAL._replace(sizes={"shrink": 4, "all_blocks": True}),
    },
}


def fit_weights(networks: list[Trained], values: list[float], penalty: float = 20) -> tuple[dict[str, float], float]:
    """Return the weights of a score that ranks networks by their values (higher is better), and its rho.

    Not in the paper. A ridge regression predicts the ranks from the terms. Rho is Spearman's of the leave-one-out
    predictions, or NaN if fewer than three networks converged. The weight of the log loss bears no penalty; those of
    the other terms shrink to 0, so that with few labels the score is mostly the loss. Terms are divided by their median
    absolute deviation and clipped to 4, or else a few networks that hardly train would decide the weights.
    """
    converged = [i for i, trained in enumerate(networks) if math.isfinite(trained.loss)]
    if len(converged) < 3:
        return {"log loss": 1.0}, math.nan
    table = [terms(networks[i]) for i in converged]
    x = np.array([list(row.values()) for row in table])  # (n, terms)
    x = x - np.median(x, 0)
    deviation = np.median(abs(x), 0)
    varied, names = deviation > 1e-5, list(table[0])
    x = np.clip(x[:, varied] / deviation[varied], -4, 4)
    x, y = x - x.mean(0), ranks(-np.array(values)[converged])
    y = (y - y.mean()) / y.std()

    penalties = np.array([1e-6 if name == "log loss" else penalty for name in names])  # not 0: it must be invertible
    solution = np.linalg.solve(x.T @ x + np.diag(penalties[varied]), x.T)  # (terms, n)
    fitted = solution @ y
    leverage = (x * solution.T).sum(1) + 1 / len(y)  # the diagonal of the hat matrix; 1 / n is the intercept's
    left_out = np.full(len(networks), math.inf)  # leave-one-out scores; networks that diverged rank last
    left_out[converged] = y - (y - x @ fitted) / (1 - leverage)
    weights = zip(np.array(names)[varied].tolist(), fitted / deviation[varied])
    return {name: float(f"{weight:.4g}") for name, weight in weights}, spearman(-left_out, values)


# ---------------------------------------------------------------------------------------- recurrent networks
@dataclass(frozen=True)
class RnnTask:
    """A task of a recurrent network: it must turn one sequence of signals into another (paper, 3.3).

    A sequence is a map of height T and width D: y is the time step, and x is the index of one of its D features.
    """
    noise: Noise
    dimension: int  # D, 1 to 1024
    input: tuple[Signal, ...]  # here and in the target, all signals are per_sample
    target: tuple[Signal, ...]
    weights: dict[str, float] | None = None  # as in `Task`

    def parts(self, batch: int, size: int) -> dict[str, tuple[tuple[Signal, ...], Shape]]:
        """Return the signals and the shape of input and target, by name."""
        shape = batch, 1, size, self.dimension
        return {"input": (self.input, shape), "target": (self.target, shape)}

    draw = Task.draw


def random_rnn_task(rng: random.Random) -> RnnTask:
    bases = [basis for basis in BASES if basis != "resize"]
    return RnnTask(random_noise(rng), rng.choice(range(16, 97, 16)),
                   random_signals(rng, bases, per_sample=True), random_signals(rng, bases, per_sample=True))


def mutate_rnn_task(task: RnnTask, rng: random.Random) -> RnnTask:
    """Return another task: the noise, the dimension and each signal are redrawn with chance 0.2 each."""
    other = random_rnn_task(rng)
    child = RnnTask(pick(task.noise, other.noise, rng), pick(task.dimension, other.dimension, rng),
                    pick_signals(task.input, other.input, rng), pick_signals(task.target, other.target, rng))
    return child if child != replace(task, weights=None) else mutate_rnn_task(task, rng)


class RnnRegression(Regression):
    """The regression of a recurrent network, sequences (B, T, width) -> (B, T, width), which is one stage."""

    def __init__(self, task: RnnTask, images: Any = None, settings: Settings = Settings(), *args: Any):
        super().__init__(task, images, replace(settings, stage_weights=settings.stage_weights[-1:]), *args)

    def draw_tensors(self, images: Any) -> list[Tensor]:
        """Return the input and the target, sequences (B, T, D)."""
        return [maps[:, 0] for maps in self.task.draw(None, self.seed, self.settings.batch, self.settings.size)]

    def with_heads(self, body: nn.Module) -> nn.ModuleList:
        """Return the network behind an encoder and, if heads are trained, the decoder, which is the head."""
        encoder, heads = nn.Linear(self.task.dimension, body.width), []
        if self.settings.ridge is None:
            heads = [nn.Linear(body.width, self.task.dimension)]
            nn.init.zeros_(heads[0].bias)
        for layer in (encoder, *heads):
            nn.init.uniform_(layer.weight, -0.1, 0.1)
        return nn.ModuleList([nn.Sequential(encoder, body), *heads])

    def optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), self.settings.rnn_learning_rate,
                                weight_decay=self.settings.rnn_weight_decay, fused=True)

    def taps(self, body: nn.Module, sequences: Tensor) -> list[Tensor]:
        return [body(sequences)]

    def match_sizes(self, stage: int, tap: Tensor) -> tuple[Tensor, Tensor]:
        return tap, self.targets[stage]


# ----------------------------------------------------------------------------------------------------- tasks
AnyTask = Task | RnnTask

# The tasks that the authors released. They made combo, nlp-combo and nlp-single by hand. Their task search found nb101,
# darts and resnet on the spaces of these names, and nlp on nbnlp.
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
TERMS = tuple(terms(Trained(1.0, [[1.0]] * 3, 1)))  # the names of all terms


def read_task(task: AnyTask | str) -> AnyTask:
    """Return a task of TASKS by its name, a task from a JSON file, or the task itself."""
    if isinstance(task, AnyTask):
        return task
    if task in TASKS:
        return TASKS[task]
    check(task.endswith(".json"), "task", task, f"one of {', '.join(TASKS)} or a FILE.json")
    return task_from_json(Path(task).read_bytes(), f"task {task}")


def task_to_json(task: AnyTask) -> str:
    return json.dumps(asdict(task, dict_factory=lambda pairs: {k: v for k, v in pairs if v is not None}))


def task_digest(task: AnyTask) -> str:
    """Return a hash of the task without its score weights; 1 and 1.0 hash alike."""
    numbers = json.loads(task_to_json(replace(task, weights=None)), parse_int=float)
    return digest_of(json.dumps(numbers).encode())


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def task_from_json(text: str | bytes, name: str = "task") -> AnyTask:
    """Return the task that `task_to_json` wrote. ValueError if a field is missing, unknown or out of range."""
    try:
        task = json.loads(text, object_hook=part_from_json)
        check_task(task)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from None
    return task


def part_from_json(values: dict[str, Any]) -> Any:
    """Return the part of a task that has these fields. One field tells its class; a dict without it stays a dict."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    kinds = {"basis": Signal, "kind": Noise, "channels": Stage, "stages": Task, "dimension": RnnTask}
    return next((kind(**values) for field, kind in kinds.items() if field in values), values)


def check_task(task: Any) -> None:
    """Raise ValueError if a task has a value that no task can have."""
    check(isinstance(task, AnyTask), "JSON", task, "an object with stages, or with dimension, input and target")
    check(isinstance(task.noise, Noise), "noise", task.noise, "a kind and a level")
    check(task.noise.kind in ("uniform", "gaussian"), "kind", task.noise.kind, "uniform or gaussian")
    check_number("level", task.noise.level, 10)
    for term, weight in (task.weights or {}).items():
        check(term in TERMS and abs(weight) < math.inf, "weights", {term: weight}, f"numbers for {', '.join(TERMS)}")

    counts = [("dimension", task.dimension, 1024)] if isinstance(task, RnnTask) else []
    if isinstance(task, Task):
        check([type(stage) for stage in task.stages] == [Stage] * 3, "stages", task.stages, "three stages")
        counts = [("channels", stage.channels, 640) for stage in task.stages]
    for name, count, limit in counts:
        check(type(count) is int and 1 <= count <= limit, name, count, f"a whole number from 1 to {limit}")

    for signals, _ in task.parts(1, 1).values():
        check(type(signals) is tuple and {*map(type, signals)} <= {Signal}, "signals", signals, "a list of signals")
        check(len({signal.basis for signal in signals}) == len(signals), "signals", signals, "each basis at most once")
        for signal in signals:
            check(signal.basis in BASES, "basis", signal.basis, f"one of {', '.join(BASES)}")
            given = tuple(name for name in ("frequencies", "density", "per_sample") if vars(signal)[name] is not None)
            check(given == BASES[signal.basis][1], f"fields of {signal.basis}", given, f"{BASES[signal.basis][1]}")
            allowed = (None, True, False) if isinstance(task, Task) else (True,)
            check(signal.per_sample in allowed, "per_sample", signal.per_sample, f"one of {allowed}")
            f = (0.1,) * 10 if signal.frequencies is None else signal.frequencies
            fits = len(f) == 10 and all(isinstance(value, float) and 0 < value < 0.5 for value in f)
            check(fits, "frequencies", f, "10 numbers above 0 and below 0.5")
            check_number("density", signal.density or 0, 1)
            check_number("level", signal.level, 10)


def check_number(name: str, value: Any, limit: float) -> None:
    check(isinstance(value, (int, float)) and 0 <= value <= limit, name, value, f"a number from 0 to {limit}")


# ---------------------------------------------------------------------------------------------------- scorer
Run = tuple[str, int, str]  # identifies a training run: the task's digest, the seed, the network's key
Item = tuple[Run, AnyTask, Any]  # a run that is to be done, its task, its architecture
Result = tuple[Run, Trained]


class Scorer:
    """Scores architectures of one space: `scorer(archs)` returns a list of numbers; lower is better.

    A network is trained once for each task and seed. Architectures with equal keys are the same network.

    space: a `--space` name, or an object with `build`, `key` and `format`.
    preset, steps: a name of PRESETS, and a number of training steps to replace the preset's.
    task: a name of TASKS, a FILE.json or a task. The default is the task of the preset, or else of the space.
    images: "synthetic", or the path of a file for `read_images`.
    seed, seeds: the seeds are seed, ..., seed + seeds - 1. A score is the mean over them. A seed determines synthetic
        images, targets, parameters and noise.
    device: the default is the first GPU, or the CPU if there is none.
    out: a file that records the training runs. Another Scorer with the same settings goes on from it. Of a space that
        is an object, it does not notice changes.
    workers: the number of processes that train. If there are GPUs and no `device` is given, they use all of them.
    progress: whether to print to stderr how many runs are done.
    """

    def __init__(self, space: Any, preset: str = "fast", task: AnyTask | str | None = None, images: str = "synthetic",
                 seed: int = 0, device: str | None = None, steps: int | None = None, seeds: int = 1,
                 out: str | None = None, workers: int = 1, progress: bool = False):
        options, devices = {"space": space, "preset": preset, "images": images, "steps": steps}, find_devices(device)
        self.name = space if isinstance(space, str) else getattr(space, "name", type(space).__name__)
        own = not isinstance(space, str) and type(space).__module__ != "search_spaces"
        family = "" if own else self.name.removesuffix("-in").removesuffix("-fix")
        self.preset = PRESETS[preset].get(family, PRESETS[preset][""])
        self.settings = self.preset.settings if steps is None else replace(self.preset.settings, steps=steps)
        if isinstance(space, str):
            import search_spaces  # not at the top, so that this file alone can score spaces that are objects
            space = search_spaces.get(space, **self.preset.sizes)
        self.space, self.seeds, self.device = space, range(seed, seed + seeds), devices[0]

        self.own_task = self.preset.task or getattr(space, "task", "nb101")
        self.task = read_task(task or self.own_task)
        check(type(self.task) is type(read_task(self.own_task)), "task", task, f"one like {self.own_task}")
        self.images = None if images == "synthetic" else read_images(images, self.settings.batch)
        self.images_name = images if self.images is None else f"sha256 {digest_of(self.images.numpy().tobytes())}"
        self.cached_task, self.regressions = self.task, {}  # the regressions of this task, by seed
        self.record, self.progress = Record(out, self.made_with(self.task) if out else None), Progress(not progress)
        self.pool = make_pool(options, workers, devices) if workers > 1 else None
        self.train = partial(train_in_pool, self.pool) if self.pool else self.train_here

    def __call__(self, archs: list[Any], task: AnyTask | None = None, seeds: range | None = None) -> list[float]:
        """Return the scores. `task` and `seeds` replace the scorer's own."""
        task, seeds, known = task or self.task, seeds or self.seeds, self.record.known
        keys, digest = [self.space.key(arch) for arch in archs], task_digest(task)
        check(all(isinstance(key, str) for key in keys), "keys", keys, "strings")
        arch_of = dict(zip(keys, archs))
        asked = Counter((digest, seed, key) for key in keys for seed in seeds)  # runs, and how often each is asked for

        if self.progress.done + asked.total() > self.progress.total:  # from Python, each call is counted anew
            self.progress = Progress(self.progress.quiet, asked.total())
        self.progress.advance(sum(asked[run] for run in asked if run in known))
        items = [(run, task, arch_of[run[2]]) for run in asked if run not in known]
        train = self.train if len(items) > 1 else self.train_here
        for run, trained in train(items):
            self.record.add(run, self.space.format(arch_of[run[2]]), trained)
            self.progress.advance(asked[run], new=1)

        weights = self.weights(task)
        return [sum(score(weights, known[digest, seed, key]) for seed in seeds) / len(seeds) for key in keys]

    def train_here(self, items: list[Item]) -> Iterator[Result]:
        """Train the items in this process."""
        for run, task, arch in items:
            regression = self.regression(task, run[1])
            start = time.perf_counter()
            trained = regression(self.space, arch)
            yield run, trained._replace(seconds=round(time.perf_counter() - start, 3))

    def regression(self, task: AnyTask, seed: int) -> Regression:
        """Return the regression of a task and a seed. Those of the last task are cached."""
        if task != self.cached_task:
            self.cached_task, self.regressions = task, {}
        if seed not in self.regressions:
            images = synthetic_images(seed, self.settings.batch) if self.images is None else self.images
            kind = Regression if isinstance(task, Task) else RnnRegression
            self.regressions[seed] = kind(task, images, self.settings, seed, self.device)
        return self.regressions[seed]

    def trained(self, arch: Any, task: AnyTask | None = None) -> list[Trained]:
        """Return the training runs of an architecture that was scored, one for each seed of the scorer."""
        return [self.record.known[task_digest(task or self.task), seed, self.space.key(arch)] for seed in self.seeds]

    def weights(self, task: AnyTask) -> dict[str, float]:
        """Return the score weights of a task: its own, or else those of the preset. Recurrent networks are scored by
        the loss alone. With another task or number of steps than the preset's, only the weights of "log loss" and
        "log params" are kept, as single stages differ then."""
        weights = {"log loss": 1.0} if isinstance(task, RnnTask) else self.preset.weights
        if task != read_task(self.own_task) or self.settings != self.preset.settings:
            weights = {term: weights[term] for term in ("log loss", "log params") if term in weights}
        return task.weights or weights

    def made_with(self, task: AnyTask | None = None) -> dict[str, Any]:
        """Return the settings that all runs of a record share, with the task if all have the same. The round trip
        through JSON makes tuples lists."""
        path = self.name.rpartition(":")[0]  # of a FILE.py:CLASS
        return json.loads(json.dumps({
            "losses": RECORD_VERSION, "space": self.name, "file": path and digest_of(Path(path).read_bytes()),
            "images": self.images_name, "device": torch.device(self.device).type, "sizes": self.preset.sizes,
            **asdict(self.settings), "task": task and json.loads(task_to_json(replace(task, weights=None)))}))


def read_images(path: str, batch: int) -> Tensor:
    """Return the first images of a .npy file, or of the first 4-dimensional array of a .npz file, normalised, as
    (batch, 3, 32, 32). ValueError unless the array is uint8, or float in [0, 1], and (N, H, W, 3) or (N, 3, H, W)."""
    try:
        array = np.load(path, mmap_mode="r")  # a .npy is mapped, not read; pickles are refused
        if isinstance(array, np.lib.npyio.NpzFile):
            array = next((array[name] for name in array.files if np.ndim(array[name]) == 4), np.empty(0))
        fits = array.ndim == 4 and 3 in (array.shape[1], array.shape[3]) and len(array) >= batch
        check(fits, "shape", array.shape, f"(N, H, W, 3) or (N, 3, H, W), N at least {batch}")
        values = np.array(array[:batch], np.float32) / np.float32(255 if array.dtype == np.uint8 else 1)
        low, high = values.min(), values.max()
        check(bool(0 <= low <= high <= 1), f"values from {low:g} to {high:g}; expected uint8, or float from 0 to 1")
        with isolated(), torch.device("cpu"):
            images = torch.from_numpy(values)
            images = images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images
            check(bool(images.std((0, 2, 3)).min() > 0), "one of the colours is the same everywhere")
            return resized(normalised(images), 32)
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"images {path}: {error}") from None


# --------------------------------------------------------------------------------------- record and progress
RECORD_VERSION = 6  # increased when the same settings give other losses or lines; no record mixes two versions


class Record:
    """The training runs that are known, and their file. Its first line has the settings, each other line one run.

    A line is flushed as soon as its run is done. If the file exists, its runs are read, so that a program goes on where
    it stopped; an incomplete last line is dropped with a warning. ValueError if the file was made with other settings
    or is no record; then it is not changed.
    """

    def __init__(self, path: str | None = None, settings: dict[str, Any] | None = None):
        self.known: dict[Run, Trained] = {}
        self.file = open(path, "a+b") if path else None
        content = Path(path).read_bytes() if path else b""
        if not content:
            return self.write({"settings": settings})
        *lines, torn = content.split(b"\n")
        is_record = lines != [] and lines[0].startswith(b'{"settings": {') and lines[0].endswith(b"}}")
        check(is_record, f"{path}: the first line has no settings; use another --out file")
        made_with = json.loads(lines[0])["settings"]
        for name in settings | made_with:
            mine, other = settings.get(name), made_with.get(name)
            check(mine == other, f"{path}: it has {name} {other!r:.80}, not {mine!r:.80}; use another --out file")
        for number, line in enumerate(lines[1:], start=2):
            try:
                if line.strip():
                    task, seed, key, _, loss, *rest = json.loads(line).values()
                    self.known[task, seed, key] = Trained(math.inf if loss is None else loss, *rest)
            except (AttributeError, TypeError, ValueError):
                raise ValueError(f"{path}, line {number}: not a training") from None
        if torn:
            print(f"gennas: {path}: the incomplete last line is dropped", file=sys.stderr)
            self.file.truncate(len(content) - len(torn))

    def add(self, run: Run, arch: str, trained: Trained) -> None:
        self.known[run] = trained
        losses = [[finite(loss) for loss in curve] for curve in trained.losses]
        line = dict(zip(("task", "seed", "key"), run)) | {"arch": arch} | trained._asdict()
        self.write(line | {"loss": finite(trained.loss), "losses": losses})

    def write(self, line: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps(line).encode() + b"\n")
            self.file.flush()


def finite(value: float) -> float | None:
    """Return the number, or None for infinity and NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


class Progress:
    """Prints to stderr how many of `total` runs are done, unless it is `quiet`. On a terminal, one line is rewritten;
    elsewhere, a line is printed every ten seconds."""

    def __init__(self, quiet: bool, total: int = 0):
        self.quiet, self.terminal, self.total, self.done, self.new = quiet, sys.stderr.isatty(), total, 0, 0
        self.start = self.shown = time.monotonic()

    def advance(self, count: int, new: int = 0) -> None:
        self.done, self.new, now = self.done + count, self.new + new, time.monotonic()
        last = self.terminal and self.done == self.total  # then the line is erased
        if not self.quiet and (last or now - self.shown >= (0.2 if self.terminal else 10)):
            self.shown, rate = now, max(self.new, 1) / max(now - self.start, 0.001)
            left = (self.total - self.done) / rate
            text = "" if last else f"{self.done}/{self.total}  {rate:.2f}/s  {left:.0f} s left"
            print(text, end="\033[K\r" if self.terminal else "\n", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------- workers
def find_devices(name: Any) -> list[str]:
    """Return the devices of a `--device` option, one for each worker. ValueError if this machine has no such device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus, cpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())], ["cpu"] * cores
    devices = {None: gpus or cpus, "cpu": cpus, "cuda": gpus, **{gpu: [gpu] for gpu in gpus}}
    name = name and str(name)  # it may be a torch.device
    check(bool(devices.get(name)), "--device", name, " or ".join(["cpu", *gpus]) if gpus else "cpu (no GPU here)")
    return devices[name]


def start_worker(options: dict[str, Any], devices: Any) -> None:
    """Prepare a process of the pool: it gets a Scorer and a device, and ends when its parent process is gone."""
    global worker
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    worker = Scorer(**options, device=devices.get())


def make_pool(options: dict[str, Any], workers: int, devices: list[str]) -> ProcessPoolExecutor:
    """Return a pool of processes on this machine. The devices are dealt out to them in turn."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    for number in range(workers):
        queue.put(devices[number % len(devices)])
    return ProcessPoolExecutor(workers, context, start_worker, (options, queue))


def work(item: Item) -> Result:
    return next(worker.train_here([item]))


def train_in_pool(pool: ProcessPoolExecutor, items: list[Item]) -> Iterator[Result]:
    """Train the items in a pool of processes on this machine. The processes start with the first call. If an item
    fails, yield the results of all others that are done, then raise the error."""
    handler = os_signal.signal(os_signal.SIGINT, os_signal.SIG_IGN)  # processes that start now ignore Ctrl-C, too
    try:
        waiting = {pool.submit(work, item) for item in items}
    finally:
        os_signal.signal(os_signal.SIGINT, handler)
    for future in as_completed(waiting):
        waiting.remove(future)
        if future.exception():
            yield from [other.result() for other in waiting if other.done() and not other.exception()]
            raise future.exception()
        yield future.result()


def train_in_ranks(scorer: Scorer, items: list[Item]) -> Iterator[Result]:
    """Train the items in all ranks of torchrun, on one machine or several; this is called in rank 0."""
    for chunk in chunks(items, 8 * distributed.get_world_size()):
        yield from train_share(scorer, broadcast(chunk))


def train_share(scorer: Scorer, items: list[Item]) -> Iterator[Result]:
    """Train this rank's share of a chunk. In rank 0, yield the results of all ranks, then raise the first error."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    results, error = [], None
    try:
        for result in scorer.train_here(items[rank::world]):
            results.append(result)
    except Exception as raised:
        error, raised.trace = raised, traceback.format_exc()  # pickled, an error has no traceback
    shares = [None] * world if rank == 0 else None
    distributed.gather_object((results, error), shares)
    if rank == 0:
        for results, _ in shares:
            yield from results
        errors = [error for _, error in shares if error]
        if errors:
            raise errors[0]


def serve(scorer: Scorer) -> None:
    """Train shares in a rank other than 0. ValueError if its settings differ from those of rank 0."""
    os_signal.signal(os_signal.SIGINT, os_signal.SIG_DFL)  # Python could not handle Ctrl-C during a broadcast
    mine, settings = scorer.made_with(), broadcast() or {}
    for name in settings:
        check(mine[name] == settings[name], f"{name} of a rank", mine[name], f"{settings[name]!r:.80} as in rank 0")
    while settings and (items := broadcast()):
        list(train_share(scorer, items))


def broadcast(value: Any = None) -> Any:
    """Return the value of rank 0 in all ranks: first the settings, then chunks of items, at the end None."""
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def chunks(items: list, size: int) -> Iterator[list]:
    return (items[start:start + size] for start in range(0, len(items), size))


# -------------------------------------------------------------------------------------------------- pictures
def plot_signals(scorer: Scorer, path: str, count: int = 8) -> None:
    """Draw a row for each signal of a task and for each sum: maps of the first image, or the first sequences."""
    from matplotlib.figure import Figure
    task, settings, seed, lines = scorer.task, scorer.settings, scorer.seeds[0], []
    images = scorer.regression(task, seed).input.cpu()
    totals = task.draw(images, seed, settings.batch, settings.size)
    for (name, (signals, shape)), total in zip(task.parts(settings.batch, settings.size).items(), totals):
        for signal in signals:
            maps = signal.maps(shape, images, name, seed).expand(shape)
            lines.append((f"{name}\n{signal.level} {signal.basis}", maps))
        lines.append((f"{name}\nsum", total))

    figure = Figure(layout="constrained", figsize=(2 + 0.8 * count, len(lines)))
    for (label, maps), axes in zip(lines, figure.subplots(len(lines), count)):
        limit = maps.abs().max()
        for ax, values in zip(axes, maps.flatten(0, 1).numpy()):
            ax.imshow(values, cmap="RdBu_r", aspect="auto", vmin=-limit, vmax=limit)
            ax.set(xticks=[], yticks=[])
        axes[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=100)


def plot_lines(path: str, labels: tuple[str, str], *lines: tuple[str, Any, Any, str], title: str = "") -> None:
    """Draw lines or dots, each (name, x, y, style)."""
    from matplotlib.figure import Figure
    figure = Figure(layout="constrained", figsize=(5.5, 4))
    ax = figure.subplots()
    for name, x, y, style in lines:
        ax.plot(x, y, style, markersize=4, label=name)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.set_title(title, fontsize=8)
    if len(lines) > 1:
        figure.legend(fontsize=7, loc="outside lower center")
    figure.savefig(path, dpi=100)


def plot_history(path: str, history: Scored, label: str, title: str = "") -> None:
    """Draw the scores of an evolution and the best so far."""
    scores, numbers = [value for _, value in history], range(1, len(history) + 1)
    plot_lines(path, ("candidates evaluated", label), ("candidate", numbers, scores, "."),
               ("best so far", numbers, np.minimum.accumulate(scores), "-"), title=title)


# ----------------------------------------------------------------------------------------------------- modes
# A mode checks its input, calls `begin` if it trains, prints its result, and returns the fields for --json.
def first_look(space: Any) -> None:
    """Raise ValueError if a space of one's own lacks a method, or if one fails on a random architecture."""
    for method in ("random", "mutate", "build", "key", "parse", "format", "params"):
        check(hasattr(space, method), f"the space has no method {method}")
    arch = space.random(random.Random(0))
    key, count, text = space.key(arch), space.params(arch), space.format(arch)
    check(isinstance(key, str), "key", key, "a string")
    check(isinstance(count, (int, float, np.integer)), "params", count, "a number")
    check(space.key(space.mutate(arch, random.Random(0))) != key, f"mutate returned the same key, {key!r:.80}")
    check(space.key(space.parse(text)) == key, f"parse reads {text!r:.80}, which format wrote, as another network")


def begin(scorer: Scorer, args: argparse.Namespace, runs: int) -> None:
    """Open the record, and print what begins."""
    task = None if args.mode == "search-task" else scorer.task
    scorer.record = Record(args.out, scorer.made_with(task))
    scorer.progress = Progress(args.quiet, runs)
    if not args.quiet:
        print(f"gennas: {args.mode} {scorer.name}, {f'task {args.task or scorer.own_task}, ' if task else ''}images "
              f"{scorer.images_name}, on {scorer.device}; at most {runs} trainings of {scorer.settings.steps} steps",
              file=sys.stderr)


def result_of(space: Any, arch: Any, value: float) -> dict[str, Any]:
    return {"arch": space.format(arch), "score": finite(value), "params": int(space.params(arch))}


def run_search(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Search for the architecture with the best score."""
    space, limits = scorer.space, {"params": args.max_params, "flops": args.max_flops}
    limits = {name: limit for name, limit in limits.items() if limit}
    counted = "flops" not in limits or bool(getattr(space, "flops", None))
    check(counted, f"--max-flops: {scorer.name} counts no operations; use --max-params")
    draw, mutate = partial(draw_within, limits, space, None), partial(draw_within, limits, space)
    draw(random.Random(args.seed), tries=60)  # fail soon if nothing is within the limits

    finalists = args.finalists or 1  # without a finale, the best network keeps the score that it has
    # Searches that differ in --seed alone share no seed of their finales. No search uses these before its finale.
    count = max(args.seeds, 2)
    seeds = range(10**6 + count * args.seed, 10**6 + count * (args.seed + 1)) if args.finalists else scorer.seeds
    begin(scorer, args, (args.population + args.cycles) * args.seeds + finalists * len(seeds))
    history, best = search_architecture(draw, mutate, space.key, scorer, partial(scorer, seeds=seeds),
                                        random.Random(args.seed), finalists, **args.evolution)
    unique = len(distinct(history, space.key))
    check(best[0][1] < math.inf, f"all {unique} networks diverged")

    results = [result_of(space, arch, value) for arch, value in best]
    print(f"{results[0]['arch']}\nscore {best[0][1]:.4f}{' in the finale' if args.finalists else ''}, "
          f"{results[0]['params']:,} parameters; {len(history)} evaluated architectures, {unique} different networks")
    if args.finalists:
        print(f"\nFinale, by seeds {seeds[0]} to {seeds[-1]}:\nrank     score   parameters  architecture")
    for rank, (result, (_, value)) in enumerate(zip(results[:args.finalists], best), start=1):
        print("{:>4} {:>9.4f} {params:>12,}  {arch}".format(rank, value, **result))
    if args.plot:
        plot_history(args.plot, history, "score")
    return results[0] | {"evaluated": len(history), "unique": unique, "finalists": results[:args.finalists]}


def draw_within(limits: dict[str, int], space: Any, parent: Any, rng: random.Random, tries: int = 500) -> Any:
    """Return a mutant of the parent or, if the parent is None or none of its mutants is within the limits, a random
    architecture. The limits, such as {"params": 1_000_000}, are those of the benchmark's own network."""
    methods = [space.random] if parent is None else [partial(space.mutate, parent), space.random]
    for arch in (method(rng) for method in methods for _ in range(tries)):
        if all(getattr(space, name)(arch) <= limit for name, limit in limits.items()):
            return arch
    words = " and ".join(f"--max-{name} {limit:,}" for name, limit in limits.items())
    raise ValueError(f"none of {tries} random networks is within {words}; expected a wider limit")


def run_score(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Score given architectures."""
    texts, space = sys.stdin.read().splitlines() if args.arch == ["-"] else args.arch, scorer.space
    archs = [space.parse(text) for text in texts if text.strip()]
    check(bool(archs), "--mode score needs an ARCH, or - and one a line on stdin")

    begin(scorer, args, len(archs) * args.seeds)
    print(f"{'score':>9} {'parameters':>12} {'seconds':>8}  architecture")
    results, lines = [], {}
    for chunk in chunks(archs, 8 * args.workers):
        for arch, value in zip(chunk, scorer(chunk)):
            trained = scorer.trained(arch)
            seconds = round(sum(run.seconds for run in trained), 3)
            results.append(result_of(space, arch, value) | {"seconds": seconds})
            print("{:>9.4f} {params:>12,} {seconds:>8.2f}  {arch}".format(value, **results[-1]), flush=True)
            losses = np.array(trained[0].losses[-1], float)
            lines[space.key(arch)] = results[-1]["arch"][:70], range(len(losses)), losses, "-"
    if args.plot:
        plot_lines(args.plot, ("training steps", "loss of the last stage"), *lines.values())
    return {"results": results}


def read_labels(scorer: Scorer, args: argparse.Namespace) -> tuple[list, list]:
    """Return the first --limit labels (architecture, value), and the others whose networks are not among these."""
    import search_spaces
    space = scorer.space
    labels = search_spaces.load_labels(space, args.labels) if args.labels else getattr(space, "labels", None)
    check(bool(labels), f"--labels FILE is needed, as {scorer.name} has no labels of its own")
    first, others = labels[:args.limit], labels[args.limit or len(labels):]
    check(len({value for _, value in first}) > 1, f"{len(first)} labels: expected at least two different values")
    seen = {space.key(arch) for arch, _ in first}
    return first, [(arch, value) for arch, value in others if space.key(arch) not in seen]


def run_correlate(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Compare the ranking by score with the ranking by recorded values."""
    archs, values = zip(*read_labels(scorer, args)[0])
    begin(scorer, args, len(archs) * args.seeds)
    scores, values = np.array(scorer(list(archs))), np.array(values)
    rho, tau, interval = (statistic(-scores, values) for statistic in (spearman, kendall, spearman_interval))
    check(not math.isnan(rho), f"the scores of {len(archs)} networks are all the same, {scores[0]}")
    by_params = spearman([scorer.space.params(arch) for arch in archs], values)
    best = values >= np.quantile(values, 0.9)  # a search must choose among these
    in_best = spearman(-scores[best], values[best]) if best.sum() >= 10 else math.nan
    seconds = sum(run.seconds for arch in archs for run in scorer.trained(arch)) / len(archs)

    summary = "spearman {:.3f} [{:.3f}, {:.3f}], kendall {:.3f}, {} networks".format(rho, *interval, tau, len(archs))
    print(f"{summary}\nthe parameter count alone: spearman {by_params:.3f}\namong the best tenth by recorded value: "
          f"spearman {in_best:.3f}\ndiverged: {np.isinf(scores).sum()}; {seconds:.2f} s a network")
    if args.plot:
        plot_lines(args.plot, ("score", "recorded value"), ("", scores, values, "."), title=summary)
    return {"n": len(archs), "spearman": rho, "spearman_ci": list(map(finite, interval)), "kendall": tau,
            "spearman_params": finite(by_params), "spearman_best_tenth": finite(in_best), "seconds_per_arch": seconds}


def run_search_task(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Search for the task whose scores rank labelled architectures best, and fit its score weights to the labels."""
    labels, others = read_labels(scorer, args)
    labels, kind = distinct(labels, scorer.space.key), type(scorer.task)
    draw, mutate = (random_task, mutate_task) if kind is Task else (random_rnn_task, mutate_rnn_task)
    start = [task for task in TASKS.values() if type(task) is kind]
    if args.task:  # the search starts with this task and its mutants
        start, draw = [scorer.task], partial(mutate, scorer.task)

    begin(scorer, args, (args.population + args.cycles) * len(labels) + len(others))
    history = search_task(start, partial(rho_of, scorer, labels), random.Random(args.seed), draw, mutate,
                          **args.evolution)
    task, value = min(history, key=lambda pair: pair[1])
    weights, rho = fit_weights([scorer.trained(arch, task)[0] for arch, _ in labels], [value for _, value in labels])
    if rho > -value:
        task, how = replace(task, weights=weights), "by fitted weights and leave-one-out"
    else:
        how, rho = f"by the weights as they were, since fitted ones reach {rho:.3f} by leave-one-out", -value

    print(task_to_json(task))
    result = {"task": json.loads(task_to_json(task)), "n": len(labels), "spearman": rho, "evaluated": len(history)}
    summary = f"spearman {rho:.3f} on {len(labels)} networks, {how}"
    if len({value for _, value in others}) > 1:
        result |= {"n_held_out": len(others), "spearman_held_out": rho_of(scorer, others, task)}
        summary += f"; {result['spearman_held_out']:.3f} on {len(others)} others, held out"
    print(f"gennas: {summary}; the best of {len(history)} tasks", file=sys.stderr)
    if args.plot:
        plot_history(args.plot, history, "- rho", summary)
    return result


def rho_of(scorer: Scorer, labels: list, task: AnyTask) -> float:
    """Return Spearman's rho between a task's negated scores and labels (architecture, value), or 0 if undefined."""
    archs, values = zip(*labels)
    return float(np.nan_to_num(spearman(-np.array(scorer(list(archs), task)), values)))


def run_show(scorer: Scorer, args: argparse.Namespace) -> dict[str, Any]:
    """Print a task as JSON and the formula of its score; with --plot, draw its signals."""
    formula = " ".join(f"{weight:+g} {term}" for term, weight in scorer.weights(scorer.task).items())
    chosen = "" if scorer.task.weights or formula == "+1 log loss" else "; the weights were chosen on labels"
    print(f"gennas: score = {formula}{chosen}", file=sys.stderr)
    print(task_to_json(scorer.task))
    if args.plot:
        plot_signals(scorer, args.plot)
    return {}


# ---------------------------------------------------------------------------------------------- command line
MODES = {"search": run_search, "score": run_score, "correlate": run_correlate, "search-task": run_search_task,
         "show": run_show}
SEARCHES, LABELLED, SCORES = ("search", "search-task"), ("correlate", "search-task"), ("search", "score", "correlate")
OPTIONS = {  # name -> what it takes (N: a whole number), the modes that it belongs to, help with the default
    "task": ("NAME|FILE.json", MODES, "what a network must regress (the task of preset or space)"),
    "steps": ("N", MODES, "number of training steps; 0 trains nothing (the preset's)"),
    "images": ("synthetic|FILE", MODES, "a .npy or .npz, (N, H, W, 3) or (N, 3, H, W), uint8 or in [0, 1] (synthetic)"),
    "seed": ("N", MODES, "seed of images, signals, parameters, noise and search (0)"),
    "seeds": ("N", SCORES, "the score is the mean over N seeds, from --seed up (1)"),
    "device": ("cpu|cuda[:N]", MODES, "device that trains (cuda if there is one)"),
    "population": ("N", SEARCHES, "size of the queue (50; search-task 10, with --preset paper 50)"),
    "tournament": ("N", SEARCHES, "size of the tournament that selects a parent (10; search-task 5, with paper 10)"),
    "cycles": ("N", SEARCHES, "number of children after the first population (400; search-task 20, with paper 400)"),
    "batch": ("N", SEARCHES, "number of children made before they enter the queue (16; search-task and paper 1)"),
    "finalists": ("N", ("search",), "number of the best that are trained again with two new seeds (10; paper 0)"),
    "max-params": ("N", ("search",), "largest number of parameters of the benchmark's full network"),
    "max-flops": ("N", ("search",), "and of its operations for one image; a multiply-add is two"),
    "labels": ("FILE", LABELLED, "a JSON list of [architecture, value]; a higher value is better"),
    "limit": ("N", LABELLED, "use the first N labels; search-task tests its result on the others"),
    "workers": ("N", MODES, "number of processes that train (one for each GPU, or for each CPU core)"),
    "out": ("FILE.jsonl", (*SCORES, "search-task"), "record of all training runs; the same command resumes from it"),
    "plot": ("FILE.png", MODES, "save a figure of the result; needs matplotlib"),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    import search_spaces
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Defaults are in parentheses.")
    parser.error = lambda message: parser.exit(2, f"gennas: error: {message}\n")
    option = parser.add_argument
    option("arch", nargs="*", metavar="ARCH", help="architecture to score, as its benchmark writes it; - reads stdin")
    option("--space", required=True, metavar="NAME", help=f"{', '.join(search_spaces.SPACES)}, or FILE.py:CLASS")
    option("--mode", choices=MODES, default="search", help="what to do (search)")
    option("--preset", choices=PRESETS, default="fast", help="how networks are trained and scored (fast)")
    option("--json", action="store_true", help="print one JSON object as the last line")
    option("--quiet", action="store_true", help="print no progress")
    for name, (metavar, _, text) in OPTIONS.items():
        option(f"--{name}", metavar=metavar, type=int if metavar == "N" else str, help=text)
    args = parser.parse_intermixed_args(argv)

    if args.arch and args.mode != "score":
        parser.error(f"ARCH belongs to --mode score, not to --mode {args.mode}")
    for name, (metavar, modes, _) in OPTIONS.items():
        value = getattr(args, name.replace("-", "_"))
        least = 0 if name in ("steps", "seed", "cycles", "finalists") else 1
        if value is not None and args.mode not in modes:
            parser.error(f"--{name} belongs to --mode {' or '.join(modes)}, not to --mode {args.mode}")
        if value is not None and metavar == "N" and value < least:
            parser.error(f"--{name} {value}: expected a whole number from {least} up")

    defaults = {"images": "synthetic", "seed": 0, "seeds": 1, "finalists": 10, "population": 50, "tournament": 10,
                "cycles": 400, "batch": 16}
    if args.preset == "paper":
        defaults |= {"finalists": 0, "batch": 1}
    elif args.mode == "search-task":
        defaults |= {"population": 10, "tournament": 5, "cycles": 20, "batch": 1}
    if args.mode == "search-task" and args.task and args.cycles == 0:
        defaults["population"] = 1  # only the weights of this task are fitted
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, min(value, args.population) if name in ("tournament", "batch") else value)
        if name in ("tournament", "batch") and getattr(args, name) > args.population:
            parser.error(f"--{name} {getattr(args, name)}: expected at most the population, {args.population}")
    args.evolution = {name: getattr(args, name) for name in ("population", "tournament", "cycles", "batch")}
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Wrong input gives one line on stderr and an exit status."""
    global pool  # this reference keeps the pool until its thread, whose own is weak, has cancelled items after Ctrl-C
    clock, args, pool, status, message = time.perf_counter(), parse_arguments(argv), None, 0, ""
    kept = f"what was trained is in {args.out}; the same command resumes" if args.out else "nothing is kept (no --out)"
    try:
        if torchrun := "TORCHELASTIC_RUN_ID" in os.environ:
            distributed.init_process_group("gloo", timeout=timedelta(days=99))
        devices, device = find_devices(args.device), args.device
        args.workers = args.workers or len(devices)
        if torchrun:
            device = devices[int(os.environ["LOCAL_RANK"]) % len(devices)]
        options = {name: getattr(args, name) for name in ("space", "preset", "images", "seed", "steps", "seeds")}
        if torchrun and distributed.get_rank():  # items bring their task, so this rank needs no task file
            return serve(Scorer(**options, device=device))
        scorer = Scorer(**options, task=args.task, device=device, workers=1 if torchrun else args.workers)
        pool = scorer.pool
        first_look(scorer.space)
        if args.plot:  # fail before anything is computed
            check(find_spec("matplotlib") is not None, "--plot needs matplotlib: pip install matplotlib")
            fits = Path(args.plot).suffix in (".png", ".pdf", ".svg") and args.plot != args.out
            check(fits, "--plot", args.plot, "a .png, .pdf or .svg file, and another than --out")
            open(args.plot, "ab").close()
        if torchrun:
            broadcast(scorer.made_with())
            scorer.train = partial(train_in_ranks, scorer)
        result = MODES[args.mode](scorer, args)
    except KeyboardInterrupt:
        status, message = 130, f"interrupted; {kept}"
    except BrokenExecutor:
        status, message = 1, f"error: a worker died; {kept}"
    except (OSError, ValueError) as error:
        status, message, file = 2, f"error: {str(error) or repr(error)}", Path(args.space.rpartition(":")[0]).resolve()
        trace = getattr(error, "trace", "".join(traceback.format_exception(error)))
        _, passed, after = trace.rpartition(f'"{file}", line ')
        if passed:  # the last line of FILE.py that the error passed, in this process or in another
            message += f", in {file.name}, line {after.partition(',')[0]}"
    finally:
        if pool:
            pool.shutdown(wait=status != 130, cancel_futures=True)  # after Ctrl-C, do not wait for workers
    if torchrun and status != 130:
        broadcast()
    if status:
        print(f"gennas: {message}", file=sys.stderr)
        sys.exit(status)
    if args.json:
        about = {"mode": args.mode, "space": args.space, "task": args.task or scorer.own_task, **result}
        print(json.dumps(about | {"preset": args.preset, "images": scorer.images_name,
                                  "seconds": round(time.perf_counter() - clock, 3)}))


if __name__ == "__main__":
    main()
