"""Tests of gennas and search_spaces on tiny networks: few channels, one cell a stage, a few steps. Where a number is
checked, it is computed here a second time, by the plainest means."""
from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal as os_signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gennas
import search_spaces
from gennas import (Noise, Record, Regression, RnnTask, Scorer, Settings, Signal, Stage, Task, Trained,
                    regularized_evolution)
from search_spaces import NB101, NB201, NBNLP, CellNet, Cells, Genotype, NB101Cell, NBMacro, Residual, Vertex

torch.set_num_threads(1)
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"  # recorded accuracies and images; the tests that want them skip without
RICH = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
DEAD = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
FREQUENCIES = (.05, .1, .12, .2, .22, .3, .33, .4, .41, .45)
ARCHS = list(itertools.product(NB201.OPS, repeat=6))
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs what the benchmarks recorded")
on_linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into Linux's /proc")
TINY = NB201(width=4, cells=1)
assert_close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


@functools.cache
def classes() -> dict[str, list[tuple[str, ...]]]:
    """All cells of NAS-Bench-201 by their key."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for arch in ARCHS:
        found.setdefault(NB201().key(arch), []).append(arch)
    return found


def rng_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_task(*stages: tuple[Signal, ...], noise: float = 0.1) -> Task:
    return Task(Noise("uniform", noise), tuple(Stage(5, signals) for signals in stages))


def small_task() -> Task:
    return make_task((Signal("sin1d", 1.0, True, FREQUENCIES),), (Signal("gdot", 2.0, False, density=0.4),),
                     (Signal("resize", 1.5),))


def small_rnn_task() -> RnnTask:
    dots = Signal("dot", 1.0, True, density=0.5),
    return RnnTask(Noise("uniform", 0.1), 7, dots, dots)


def images(seed: int = 0) -> Tensor:
    return gennas.synthetic_images(seed, 16)


def parse(*texts: str) -> list[Any]:
    return [TINY.parse(text) for text in texts]


def labels_file(path: Path, space: Any, archs: Sequence) -> Path:
    """Each more accurate than the one before."""
    path.write_text(json.dumps([[space.format(arch), float(i)] for i, arch in enumerate(archs)]))
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line in this process -> (exit status, stdout, stderr); its nb201 has 4 channels, one cell."""
    monkeypatch.setitem(search_spaces.SPACES, "nb201", lambda **sizes: NB201(**sizes | {"width": 4, "cells": 1}))

    def call(*words) -> tuple[int, str, str]:
        status = 0
        try:
            gennas.main(["--space", "nb201", "--steps", "2", "--workers", "1", *map(str, words)])
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def result(run):
    """Runs a command line that must succeed -> what --json says, without the seconds."""
    def call(*words) -> dict[str, Any]:
        status, stdout, stderr = run(*words, "--json")
        assert status == 0, stderr
        return timeless(stdout)
    return call


@pytest.fixture
def refused(run):
    """Runs a command line that must end with exit status 2 and one line, which has the wanted words."""
    def call(wanted: Sequence[str], *words) -> None:
        status, stdout, stderr = run(*words)
        assert status == 2 and stdout == "" and stderr.count("\n") == 1, stderr
        assert len(stderr) < 400 and all(text in stderr for text in wanted), stderr
    return call


def timeless(stdout: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(stdout.splitlines()[-1]).items() if name != "seconds"}


# ----------------------------------------------------------------------------------------------------- signal bases
@pytest.mark.parametrize("basis, waves", [
    (gennas.sin1d, [(f, 0) for f in FREQUENCIES] + [(0, f) for f in FREQUENCIES]),
    (gennas.sin2d, [(sign * f, g) for sign in (1, -1) for f in FREQUENCIES for g in FREQUENCIES])])
def test_waves(basis, waves):
    """Of 32 maps of each wave some are drawn, without replacement; positions count from 1."""
    rng, maps = rng_of(1), basis(rng_of(1), (2, 20, 8, 6), FREQUENCIES)
    keys, phases = torch.rand(2, 32 * len(waves), generator=rng), torch.rand(2, 20, 1, 1, generator=rng)
    y, x = torch.arange(1, 9)[:, None], torch.arange(1, 7)
    for b, c in itertools.product(range(2), range(20)):
        fy, fx = waves[keys[b].argsort(descending=True)[c] // 32]
        assert_close(maps[b, c], torch.sin(2 * math.pi * (fy * y + fx * x + phases[b, c])))


@pytest.mark.parametrize("density, count", [(0, 0), (0.01, 0), (0.1, 4), (0.578125, 27), (1, 48)])
def test_dot(density, count):
    maps = gennas.dot(rng_of(3), (4, 50, 8, 6), density)
    assert ((maps != 0).sum((2, 3)) == count).all() and set(maps.unique().tolist()) <= {-1, 0, 1}
    if count:  # signs and places are even: 200 maps, four standard deviations
        assert abs(maps.sum()) < 4 * math.sqrt(200 * count)
        assert ((maps != 0).float().mean((0, 1)) - count / 48).abs().max() < 4 * math.sqrt(0.25 / 200)


@pytest.mark.parametrize("density", [0, 0.3])
def test_gdot(density):
    shape = 2, 3, 8, 6
    dots, maps = gennas.dot(rng_of(5), shape, density, least=1), gennas.gdot(rng_of(5), shape, density)
    weights = torch.tensor([math.exp(-d * d / 2) for d in range(-4, 5)])
    rows, columns = ([3, 2, 1, 0, *range(n), *range(n - 1, n - 5, -1)] for n in (8, 6))  # d c b a | a b c d | d c b a
    for b, c in itertools.product(range(2), range(3)):
        mirrored = dots[b, c][rows][:, columns]
        blurred = torch.tensor([[weights @ mirrored[y:y + 9, x:x + 9] @ weights for x in range(6)] for y in range(8)])
        assert_close(maps[b, c], blurred / blurred.abs().max())


def test_resize():
    maps = gennas.resize(rng_of(2), (16, 7, 8, 8), images())
    colours = torch.randint(0, 3, (7,), generator=rng_of(2)).tolist()
    small = images()[:, :, ::4, ::4]
    for c, colour in enumerate(colours):
        expected = 2 * (small[:, colour] - small.min()) / (small.max() - small.min()) - 1
        torch.testing.assert_close(maps[:, c], expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------------- task
def test_targets_are_sums_of_signals_that_do_not_depend_on_each_other():
    own, shared = Signal("sin1d", 0.5, True, FREQUENCIES), Signal("dot", 2.0, False, density=0.5)
    both, first, none = make_task((own, shared), (own,), ()).draw(images(), 4)
    assert both.shape == (16, 5, 8, 8) and not none.any()
    for order in ((own, shared), (shared, own)):  # and not on their place
        torch.testing.assert_close(make_task(order, (), ()).draw(images(), 4)[0], both)
    rest = both - make_task((own,), (), ()).draw(images(), 4)[0]
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    assert set(rest.abs().round(decimals=4).unique().tolist()) == {0, 2}
    assert not torch.equal(first[0], first[1]) and first.abs().max() <= 0.5
    assert not torch.equal(first, make_task((own,), (), ()).draw(images(), 4)[0])
    assert not torch.equal(both, make_task((own, shared), (), ()).draw(images(), 5)[0])


def test_tasks_read_back_what_they_write():
    """And whatever the order of fields and the weights, equal signals have equal digests."""
    for name, known in gennas.TASKS.items():
        assert gennas.task_from_json(known.to_json()) == known == gennas.read_task(name), name
        assert all(target.isfinite().all() and target.std() > 0 for target in known.draw(images(), 0)), name
    weighted = replace(small_task(), weights={"log params": -1.0, "log loss": 2.0})
    assert gennas.task_from_json(weighted.to_json()) == weighted != small_task()
    data = json.loads(weighted.to_json().replace("1.0", "1").replace("2.0", "2"))
    data["stages"][0]["signals"][0] = dict(reversed(data["stages"][0]["signals"][0].items()))
    other = gennas.task_from_json(json.dumps(dict(reversed(data.items()))))
    assert other == weighted and other.digest() == small_task().digest()
    assert replace(small_task(), noise=Noise("uniform", 0.2)).digest() != other.digest()


@needs_shared
def test_tasks_as_published():
    authors = json.loads((SHARED / "published_tasks.json").read_text())
    assert authors.keys() == gennas.TASKS.keys()
    for name, data in authors.items():
        assert json.loads(gennas.TASKS[name].to_json()) == data, name
        assert gennas.task_from_json(json.dumps(data)) == gennas.TASKS[name], name


@pytest.mark.parametrize("place, value", [
    ("noise", None), ("noise.kind", "pink"), ("noise.level", -1), ("noise.level", math.nan), ("stages", []),
    ("stages.0", 3), ("stages.0.channels", 0), ("stages.0.channels", 641), ("stages.0.channels", 8.0),
    ("stages.0.signals", None), ("stages.0.signals.0", "dot"), ("stages.0.signals.0.basis", "cos"),
    ("stages.0.signals.0.basis", []), ("stages.0.signals.0.level", "1"), ("stages.0.signals.0.level", None),
    ("stages.0.signals.0.frequencies", [0.1] * 9), ("stages.0.signals.0.frequencies.3", 0.5),
    ("stages.0.signals.0.frequencies", None), ("stages.1.signals.0.density", 1.01),
    ("stages.0.signals.0.density", 0.5), ("stages.2.signals", [{"basis": "resize", "level": 1.0}] * 2), ("surplus", 1),
    ("stages.0.surplus", 1), ("stages.0.signals", {}), ("stages.0.signals.0.per_sample", "false"),
    ("weights", {"loss": 1.0}), ("weights", {"log loss": math.inf}), ("weights", [1]),
], ids=str)
def test_a_task_field_out_of_range(place, value):
    data = json.loads(small_task().to_json())
    *path, name = [int(step) if step.isdecimal() else step for step in place.split(".")]
    functools.reduce(lambda part, step: part[step], path, data)[name] = value
    with pytest.raises(ValueError, match="^task: "):
        gennas.task_from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["nonsense", "[1, 2]", "null", "{}", json.dumps(list(range(100_000)))])
def test_tasks_that_are_none(text):
    with pytest.raises(ValueError, match="^task: .{,240}$"):
        gennas.task_from_json(text)


# ----------------------------------------------------------------------------------------------------------- images
def test_synthetic_images():
    a = images()
    assert a.shape == (16, 3, 32, 32) and torch.equal(a, images(0)) and not torch.equal(a, images(1))
    assert a.mean((0, 2, 3)).abs().max() < 1e-5 and (a.std((0, 2, 3)) - 1).abs().max() < 1e-5
    many = gennas.synthetic_images(0, 400)
    amplitude = torch.fft.fft2(many).abs().square().mean((0, 1)).sqrt()[0]  # along x
    assert (amplitude[1] / amplitude[2:9]).numpy() == pytest.approx(np.arange(2, 9), rel=0.15)
    red, green = many[:, 0].flatten(), many[:, 1].flatten()
    assert torch.corrcoef(torch.stack([red, green]))[0, 1] == pytest.approx(0.9, abs=0.02)


def test_images_from_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", y=np.arange(16), x=pixels, z=pixels[:2])
    for name, version in {"a": pixels, "b": pixels.transpose(0, 3, 1, 2), "c": pixels / 255,
                          "e": (pixels / 255).astype(">f4")}.items():
        np.save(tmp_path / f"{name}.npy", version)
    used = pixels[:16] / 255
    expected = (used - used.mean((0, 1, 2))) / used.std((0, 1, 2), ddof=1)
    for name in ("a.npy", "b.npy", "c.npy", "d.npz", "e.npy"):
        loaded = gennas.read_images(str(tmp_path / name), 16)
        assert loaded.shape == (16, 3, 32, 32)  # larger by nearest
        np.testing.assert_allclose(loaded[:, :, ::2, 1::2], expected.transpose(0, 3, 1, 2), atol=1e-4, err_msg=name)


# ------------------------------------------------------------------------------------------------------- regression
class Linear:
    """A space of one network whose taps are 1x1 convolutions of the image, to check the training by hand; the network
    "bad" gives infinite maps."""
    name, key, format, params, parse = "linear", *[staticmethod(lambda arch: arch)] * 4

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return [self.mix(x), self.mix(x)[:, :, ::2, ::2], self.mix(x)[:, :, ::4, ::4]]

    def build(self, arch):
        body = self.Body()
        if arch == "bad":
            nn.init.constant_(body.mix.bias, math.inf)
        return body


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_regression_by_hand(kind):
    """Three steps and the final loss written out: noise, heads, loss, momentum, weight decay."""
    task = replace(small_task(), noise=Noise(kind, 0.3))
    trained = Regression(task, images(), Settings(steps=3), seed=7)(Linear(), "a")
    with torch.random.fork_rng():
        torch.manual_seed(gennas.seed_of("weights", "linear", "a", 7))
        body = Linear.Body()
        heads = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 5, 1)) for _ in range(3))
    parameters = [*body.parameters(), *heads.parameters()]
    velocity, expected = [torch.zeros_like(p) for p in parameters], []
    rng = rng_of(gennas.seed_of("noise", "linear", "a", 7))
    for step in range(4):
        noise = torch.empty(16, 3, 32, 32).to(memory_format=torch.channels_last)
        noise = noise.uniform_(-1, 1, generator=rng) if kind == "uniform" else noise.normal_(generator=rng)
        tap = body.mix(images() + 0.3 * noise)[:, :, ::4, ::4]  # all three, resized
        heads.train(step < 3)  # the last pass uses running statistics
        stages = [((head(tap) - target) ** 2).mean() for head, target in zip(heads, task.draw(images(), 7))]
        loss = 0.25 * stages[0] + 0.5 * stages[1] + stages[2]
        expected.append([stage.item() for stage in stages])
        with torch.no_grad():
            for p, g, v in zip(parameters, torch.autograd.grad(loss, parameters), velocity):
                v.mul_(0.9).add_(g + 4e-5 * p if p.ndim > 1 else g)
                p.sub_(0.1 * v)
    np.testing.assert_allclose(np.transpose(trained.losses), expected, rtol=1e-4)
    assert trained.loss == pytest.approx(loss.item(), rel=1e-4) and trained.params == 8


def scores_of(*texts: str, seed: int = 0) -> list[float]:
    return Scorer(TINY, steps=2, seed=seed)(parse(*texts))


def test_score_is_pure():
    """Independent of order, of the global generators, which it leaves alone, and of the process."""
    def state() -> tuple:
        return torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.get_rng_state().tolist()

    other = "[[4],[2,3],[0,1,3]]"
    torch.manual_seed(1)
    before = state()
    a, b = scores_of(RICH, other)
    assert state() == before
    torch.manual_seed(2)
    assert scores_of(other, RICH) == [b, a] and a != b
    assert scores_of(RICH, seed=1) != [a]
    code = f"import test_gennas as t; print(t.scores_of({RICH!r}))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert json.loads(fresh.stdout) == [a]


def test_equal_keys_equal_losses():
    regression = Regression(small_task(), images(), Settings(steps=2))
    for archs in random.Random(6).sample([archs for archs in classes().values() if len(archs) > 1], 8):
        assert regression(TINY, archs[0]) == regression(TINY, archs[-1])


def plain_ridge(features: np.ndarray, target: np.ndarray, ridge: float) -> float:
    """By numpy's least squares, on the features with sqrt(ridge N) I below them, and below the target zeros."""
    n, c = features.shape
    features = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-5)
    below = np.vstack([features, math.sqrt(ridge * n) * np.eye(c)]), np.vstack([target, np.zeros((c, target.shape[1]))])
    head = np.linalg.lstsq(*below, rcond=None)[0]
    return ((features @ head - target) ** 2).mean() + ridge * (head ** 2).sum() / target.shape[1]


@pytest.mark.parametrize("n, c", [(40, 7), (12, 30), (9, 9), (16, 1)])
def test_ridge_loss(n, c):
    """The two forms are the best head's loss; the gradient is that of the solution differentiated throughout."""
    features = torch.randn(n, c, generator=rng_of(n), dtype=torch.double, requires_grad=True)
    target = torch.randn(n, 5, generator=rng_of(c), dtype=torch.double)
    target -= target.mean(0)
    loss = gennas.ridge_loss(features, target, 0.3)
    assert loss.item() == pytest.approx(plain_ridge(features.detach().numpy(), target.numpy(), 0.3), rel=1e-9)
    f = F.batch_norm(features, None, None, training=True)
    head = torch.linalg.solve(f.T @ f + 0.3 * n * torch.eye(c), f.T @ target)
    whole = F.mse_loss(f @ head, target) + 0.3 * head.square().sum() / 5
    assert_close(*(torch.autograd.grad(x, features)[0] for x in (loss, whole)))


class Taps(nn.Module):
    """A network whose taps are its images, resized, with the channels repeated and scaled."""

    def __init__(self, side: int, repeats: int, scale: float):
        super().__init__()
        self.side, self.repeats = side, repeats
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.scale * F.interpolate(x, size=self.side).repeat(1, self.repeats, 1, 1)] * 3


@pytest.mark.parametrize("side", [1, 3, 8, 16])
@pytest.mark.parametrize("repeats, scale", [(1, 1.0), (300, 1.0), (1, 0.0)])
def test_solved_heads_of_a_network(side, repeats, scale):
    """A tap that is smaller than the target has the target's means to regress; of a zero tap all of it is left."""
    space = Linear()
    space.build = lambda arch: Taps(side, repeats, scale)
    task = replace(small_task(), noise=Noise("uniform", 0))
    trained = Regression(task, images(), Settings(steps=0, batch=4, ridge=0.1))(space, "a")
    small, expected = min(side, 8), 0
    for weight, target in zip((0.25, 0.5, 1), task.draw(images()[:4], 0, 4, 8)):
        f = scale * F.interpolate(F.interpolate(images()[:4], size=side), size=small).repeat(1, repeats, 1, 1)
        f, y = (x.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for x in (f, F.adaptive_avg_pool2d(target, small)))
        expected += weight * plain_ridge(f, y - y.mean(0), 0.1)
    assert trained.loss == pytest.approx(expected, rel=1e-4) and [len(curve) for curve in trained.losses] == [1, 1, 1]


@pytest.mark.parametrize("space, task", [(TINY, small_task()), (NBNLP((8, 9, 9, 8), True), small_rnn_task())])
def test_solved_heads_train_the_network(space, task):
    settings = Settings(steps=20, ridge=0.1, rnn_learning_rate=0.005)
    task = replace(task, noise=Noise("uniform", 0))
    trained = Regression(task, images(), settings)(space, space.random(random.Random(4)))
    first, *_, last, _ = np.sum(trained.losses, axis=0)
    assert last < 0.995 * first


def test_a_stage_that_does_not_count_and_small_images():
    settings = Settings(steps=4, ridge=0.1, batch=4, side=16, stage_weights=(0.0, 2.0, 0.0))
    regression = Regression(small_task(), images(), settings)
    none, curve, nothing = (trained := regression(TINY, *parse(RICH))).losses
    assert none == nothing == [] and len(curve) == 5 and trained.loss == pytest.approx(2 * curve[-1])
    plain = F.interpolate(images()[:4], size=16, mode="bilinear", antialias=True)
    assert torch.equal(regression.input, plain.to(memory_format=torch.channels_last))


def test_no_step_waits_for_the_device():
    for ridge in (None, 0.1):
        calls = []
        for steps in (2, 5):
            with torch.profiler.profile() as profile:
                Regression(small_task(), images(), Settings(steps=steps, ridge=ridge))(TINY, *parse(RICH))
            counts = {event.key: event.count for event in profile.key_averages()}
            assert counts["aten::convolution_backward"] % steps == 0
            calls.append([counts.get(name, 0) for name in ("aten::item", "aten::_local_scalar_dense")])
        assert calls[0] == calls[1]  # of each step none


# ------------------------------------------------------------------------------------------------------------ score
def test_score_by_weights():
    trained = Trained(3.0, [[], [2.0, 4.0], [math.e, 5.0, 0.0]], 100)
    for weights, expected in [
            ({"log loss": 1}, math.log(3)), ({"log loss": -2.0, "log params": 1.0}, math.log(100) - 2 * math.log(3)),
            ({"log loss 3 before": 1.0, "log loss 2 before": 2.0}, 1 + 2 * math.log(2)),
            ({"log loss 2 after": 3.0}, 3 * math.log(4)), ({"log loss 3 after": 1.0}, math.log(1e-9)),
            ({"log loss 1 before": 5.0, "log params": 1.0}, math.log(100))]:  # a stage without a loss counts 0
        assert gennas.score(weights, trained) == pytest.approx(expected, abs=1e-8)
    for loss in (math.nan, math.inf):
        assert gennas.score({"log params": 1}, trained._replace(loss=loss)) == math.inf
    assert gennas.score({"log params": 1}, Trained(1.0, [[1.0]], 0)) == 0


def test_fit_weights():
    """By the normal equations, and each left-out prediction by a fit without it; a diverged network is the last."""
    rng = np.random.default_rng(0)
    logs = rng.normal(size=(30, 2))
    networks = [Trained(math.exp(a), [[], [math.exp(b), 1.0]], 7) for a, b in logs]
    values = list(-2 * logs[:, 0] + 0.5 * logs[:, 1] + rng.normal(size=30))
    x = logs - np.median(logs, 0)
    typical = np.median(abs(x), 0)
    x = np.clip(x / typical, -4, 4)
    x = x - x.mean(0)
    y = gennas.ranks([-value for value in values])
    y = (y - y.mean()) / y.std()

    def fit(rows) -> np.ndarray:
        return np.linalg.inv(x[rows].T @ x[rows] + np.diag([0, 20])) @ x[rows].T @ y[rows]

    weights, rho = gennas.fit_weights(networks, values)
    assert list(weights) == ["log loss", "log loss 2 before"]  # the others are constant or absent
    np.testing.assert_allclose(list(weights.values()), fit(slice(None)) / typical, rtol=1e-3)
    left_out = [-x[i] @ fit(np.arange(30) != i) for i in range(30)]
    assert rho == pytest.approx(gennas.spearman(left_out, values), abs=0.002)
    scores = [gennas.score(weights, trained) for trained in networks]
    assert gennas.spearman([-value for value in scores], values) > rho > 0.6

    diverged = [*networks, Trained(math.nan, [[], [math.nan] * 2], 7)]
    assert gennas.fit_weights(diverged, [*values, -99.0])[1] > gennas.fit_weights(diverged, [*values, 99.0])[1]
    assert math.isnan(gennas.fit_weights(networks[:2], values[:2])[1])


# ------------------------------------------------------------------------------------------------- rank correlation
def test_rank_correlations_by_definition():
    rng = np.random.default_rng(0)
    pairs = list(itertools.combinations(range(15), 2))
    for _ in range(20):
        a, b = rng.integers(0, 6, 15), rng.integers(0, 6, 15)  # many ties
        place_a, place_b = ([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v] for v in (a, b))
        assert gennas.spearman(a, b) == pytest.approx(np.corrcoef(place_a, place_b)[0, 1])
        concordance = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs)
        untied = [sum(v[i] != v[j] for i, j in pairs) for v in (a, b)]
        assert gennas.kendall(a, b) == pytest.approx(concordance / math.sqrt(untied[0] * untied[1]))
    for statistic in (gennas.spearman, gennas.kendall):
        assert statistic([1, 2, 3], [10, 20, 30]) == pytest.approx(1) == statistic([1, 2, -math.inf], [2, 3, 1])
        for undefined in ([1, 1, 1], [math.nan, 2, 3]):
            assert math.isnan(statistic(undefined, [3, 1, 2])) and math.isnan(statistic([3, 1, 2], undefined))


def test_bootstrap_interval():
    values, noise = np.random.default_rng(1).normal(size=(2, 100))
    low, high = gennas.spearman_interval(values + noise, values)
    assert low < gennas.spearman(values + noise, values) < high  # by theory 4 (1 - rho^2) / 10 apart
    assert 0.05 < high - low < 0.35 and gennas.spearman_interval(values, values) == pytest.approx((1, 1))
    assert all(map(math.isnan, gennas.spearman_interval(values[:9], values[:9])))  # which tell nothing of others


# -------------------------------------------------------------------------------------------------------- evolution
class ScriptedRng:
    """`sample` returns the members of the queue at the scripted places."""

    def __init__(self, places):
        self.places, self.queues = iter(places), []

    def sample(self, queue, count):
        self.queues.append([candidate for candidate, _ in queue])
        return [queue[place] for place in next(self.places)][:count]


@pytest.mark.parametrize("batch, places, queues, found, sizes", [
    # 1 2 3: of 1, 2 the better is 2 -> 12; 2 3 12: of 2, 12: 12 -> 22; 3 12 22: of 12, 22: 22 -> 32; 12 22 32: 22 -> 32
    (1, [(0, 1), (0, 2), (1, 2), (0, 1)], [[1, 2, 3], [2, 3, 12], [3, 12, 22], [12, 22, 32]],
     [1, 2, 3, 12, 22, 32, 32], [3, 1, 1, 1, 1]),
    (2, [(0, 1), (1, 2), (0, 1)], [[1, 2, 3], [1, 2, 3], [3, 12, 13]], [1, 2, 3, 12, 13, 22], [3, 2, 1]),
])
def test_evolution_by_hand(batch, places, queues, found, sizes):
    """Population 3, tournament 2; candidates are numbers, a child is its parent + 10, the loss the distance to 25."""
    initial, rng, asked = iter([1, 2, 3]), ScriptedRng(places), []

    def evaluate(candidates: list[int]) -> list[int]:
        asked.append(len(candidates))
        return [abs(candidate - 25) for candidate in candidates]

    history = regularized_evolution(lambda rng: next(initial), lambda parent, rng: parent + 10, evaluate, rng,
                                    population=3, tournament=2, cycles=len(places), batch=batch)
    assert rng.queues == queues and asked == sizes
    assert history == [(candidate, abs(candidate - 25)) for candidate in found]


def test_finale_by_hand():
    """The old scores choose who is trained again, each network once; the new ones alone rank them."""
    asked, history = [], [("a", 3.0), ("B", 2.0), ("c", 9.0), ("b", 2.0), ("D", 4.0), ("A", 3.0)]

    def evaluate(archs: list[str]) -> list[float]:
        asked.append(archs)
        return [{"B": 7.0, "a": math.inf, "D": 6.0}[arch] for arch in archs]

    assert gennas.finale(history, str.lower, evaluate, 3) == [("D", 6), ("B", 7), ("a", math.inf)]
    assert asked == [["B", "a", "D"]]


@pytest.mark.parametrize("kind", [Task, RnnTask])
def test_random_and_mutated_tasks(kind):
    """Draws are valid and read back; each field has the chances of the paper's task space; mutation redraws a fifth."""
    rng = random.Random(0)
    tasks = [gennas.random_task(rng, kind) for _ in range(1000)]
    children = [gennas.mutate_task(parent, rng) for parent in tasks]
    assert all(child != parent for child, parent in zip(children, tasks))
    assert all(gennas.task_from_json(task.to_json()) == task and type(task) is kind for task in tasks + children)
    assert {(task.noise.kind, task.noise.level) for task in tasks} == {
        (noise, level / 10) for noise in ("gaussian", "uniform") for level in range(10)}

    def fields(task: Any) -> dict:
        """What a mutation draws again, of a stage or a sequence: the channels, and each basis."""
        parts = [(stage.channels, stage.signals) for stage in task.stages] if kind is Task else [
            (task.dimension, task.input), (task.dimension, task.target)]
        return {(i, basis): next((s for s in signals if s.basis == basis), None) if basis else channels
                for i, (channels, signals) in enumerate(parts) for basis in ("", *gennas.BASES)}

    drawn, redrawn = list(map(fields, tasks)), list(map(fields, children))
    signals = [value for values in drawn for value in values.values() if isinstance(value, Signal)]
    assert {signal.level for signal in signals} == {level / 10 for level in range(5, 30)}
    own = [signal.per_sample for signal in signals if signal.per_sample is not None]
    assert all(own) if kind is RnnTask else 0.45 < sum(own) / len(own) < 0.55
    frequencies = [f for signal in signals for f in signal.frequencies or ()]
    assert 0.24 < sum(frequencies) / len(frequencies) < 0.26 and min(frequencies) < 0.02 and max(frequencies) > 0.48
    for field in drawn[0]:
        values = [values[field] for values in drawn]
        changed = sum(old != new[field] for old, new in zip(values, redrawn))
        if kind is RnnTask and field[1] == "resize":
            assert values == [None] * 1000
        else:  # of the redrawn fifth some are equal, as those that are absent before and after
            assert 110 < changed < 225 and (430 < values.count(None) < 570 or set(values) == set(range(16, 97, 16)))


def test_search_task_by_hand():
    """The known tasks come first; fitness is maximised."""
    start, fitness = [gennas.TASKS["combo"], gennas.TASKS["nb101"]], {}
    history = gennas.search_task(start, functools.partial(gennas.random_task, kind=Task),
                                 lambda task: fitness.setdefault(task, len(fitness)), random.Random(0),
                                 population=4, tournament=2, cycles=6)
    assert [task for task, _ in history[:2]] == start and history == [(task, -fit) for task, fit in fitness.items()]
    assert len(history) == 10


# ----------------------------------------------------------------------------------------------------------- scorer
def test_each_network_is_trained_once(monkeypatch):
    twin, same, other = parse("|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|skip_connect~2|",
                              "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|", RICH)
    calls = []
    monkeypatch.setattr(Regression, "__call__", lambda self, space, arch: calls.append((self.task, self.seed, arch)) or
                        Trained(float(len(calls)), [[1.0]], 1))
    scorer, combo = Scorer(TINY, seeds=2), gennas.COMBO
    logs = np.log([1 + 1e-9, 2, 3, 4])
    assert scorer([twin, same, other]) == pytest.approx([logs[:2].mean(), logs[:2].mean(), logs[2:].mean()])
    assert [seed for _, seed, _ in calls] == [0, 1, 0, 1] and {arch for *_, arch in calls[:2]} <= {twin, same}
    assert scorer([other, other]) == pytest.approx([logs[2:].mean()] * 2) and len(calls) == 4
    assert scorer([other], combo) == pytest.approx([np.log([5, 6]).mean()]) and calls[-1][0] == combo
    weighted = replace(combo, weights={"log loss": -3.0})  # needs no training
    assert scorer([other], weighted) == pytest.approx([-3 * np.log([5, 6]).mean()]) and len(calls) == 6
    assert [trained.loss for trained in scorer.trained(other, combo)] == [5, 6] and scorer([]) == []


def test_the_mean_of_seeds_and_what_an_image_does(tmp_path):
    archs = parse(RICH, "[[4],[2,3],[0,1,3]]")
    single = [Scorer(TINY, steps=2, seed=seed)(archs) for seed in (3, 4)]
    np.testing.assert_allclose(Scorer(TINY, steps=2, seed=3, seeds=2)(archs), np.mean(single, 0), rtol=1e-12)
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((16, 3, 32, 32)))
    mine = Scorer(TINY, steps=2, seed=3, images=str(tmp_path / "mine.npy"))
    assert mine(archs) != single[0] and mine.made_with()["images"].startswith("sha256 ")


def test_weights_and_presets():
    """All weights of a preset hold for the family's own task and steps; else the loss and the size count."""
    families = {name.removesuffix("-in").removesuffix("-fix") for name in search_spaces.SPACES}
    for name, presets in gennas.PRESETS.items():
        assert set(presets) <= families | {""}
        assert all((preset.settings.ridge is None) == (name == "paper") for preset in presets.values())
        assert all(set(preset.weights) <= set(gennas.TERMS) for preset in presets.values())
    assert Scorer("darts", "paper").own_task == "darts" and Scorer("nb201", "paper").settings == Settings()
    scorer, size = Scorer("nb201"), {"log loss": 1.0, "log params": -0.07}
    scorer.preset = scorer.preset._replace(weights=size | {"log loss 2 before": 0.5})
    assert scorer.weights(scorer.task) == scorer.preset.weights and scorer.weights(gennas.COMBO) == size
    assert scorer.weights(replace(gennas.COMBO, weights={"log loss": 2.0})) == {"log loss": 2.0}
    scorer.settings = replace(scorer.settings, steps=3)
    assert scorer.weights(scorer.task) == size


def test_a_diverged_network_is_the_last():
    scorer = Scorer(Linear(), steps=2)
    good, bad = scorer(["good", "bad"])
    assert math.isfinite(good) and bad == math.inf and gennas.spearman([-good, -bad], [2, 1]) > 0.99


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [gennas.find_devices(name) for name in (None, "cuda", "cuda:1", "cpu")]
    assert found[:3] == [["cuda:0", "cuda:1"], ["cuda:0", "cuda:1"], ["cuda:1"]] and set(found[3]) == {"cpu"}
    with pytest.raises(ValueError, match="--device: expected cpu or cuda:0 or cuda:1, not 'cuda:2'"):
        gennas.find_devices("cuda:2")


# ----------------------------------------------------------------------------------------------- record and workers
SEARCH = ["--space", "nb201", "--steps", 1, "--population", 6, "--tournament", 2, "--cycles", 8, "--batch", 3, "--json"]


def recorded(out: Path) -> dict[tuple, list]:
    """The trainings of a file, each of which must stand there once."""
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    known = {(line["task"], line["seed"], line["key"]): line["losses"] for line in lines}
    assert len(known) == len(lines)
    return known


def test_record(run, result, refused, tmp_path):
    """The same command trains nothing anew; other seeds and weights add lines or none; other settings are refused."""
    out = tmp_path / "out.jsonl"
    command = "--mode", "score", RICH, DEAD, "--out", out
    first = result(*command)
    content = out.read_text()
    assert result(*command) == first and out.read_text() == content and len(recorded(out)) == 2
    task = tmp_path / "task.json"
    task.write_text(replace(gennas.TASKS["nb101"], weights={"log params": 1.0}).to_json())
    weighted = result(*command, "--task", task)["results"]
    assert weighted[0]["loss"] == pytest.approx(math.log(sum(p.numel() for p in TINY.build(*parse(RICH)).parameters())))
    assert out.read_text() == content
    result(*command, "--seeds", 3)
    assert len(recorded(out)) == 6
    out.write_text(out.read_text()[:-9])
    stderr = run(*command, "--seeds", 3)[-1]
    assert "torn last line is dropped" in stderr and len(recorded(out)) == 6
    for option, value, named in (("--steps", 1, "steps"), ("--task", "combo", "task"), ("--preset", "paper", "sizes")):
        refused([f"out.jsonl: {named} of this run", "another --out file"], *command, option, value)
    for foreign in ("my notes\n", out.read_text().split("\n")[0]):  # and a line of settings that is torn
        (tmp_path / "notes.txt").write_text(foreign)
        refused(["notes.txt: first line", "another --out file"], *command[:-1], tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == foreign and len(recorded(out)) == 6


def test_a_diverged_network_in_a_record(tmp_path):
    record, name = Record(str(tmp_path / "out.jsonl"), {}), ("task", 0, "key")
    record.add(name, "arch", Trained(math.nan, [[], [1.0, math.inf]], 7, 0.5))
    assert "NaN" not in (text := (tmp_path / "out.jsonl").read_text()) and "Infinity" not in text
    read = Record(str(tmp_path / "out.jsonl"), {}).known[name]
    assert read == Trained(math.inf, [[], [1.0, None]], 7, 0.5) and gennas.score({"log loss": 1}, read) == math.inf


def start_process(*words, torchrun: str | None = None) -> subprocess.Popen:
    """The command line in a process of its own, or under torchrun with such options."""
    launcher = [] if torchrun is None else ["-m", "torch.distributed.run", *torchrun.split()]
    return subprocess.Popen([sys.executable, *launcher, HERE / "gennas.py", *map(str, words)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


def children(process: subprocess.Popen) -> list[int]:
    """Those that run Python's own code for workers; the tracker of shared resources is no worker."""
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def is_alive(pid: int) -> bool:
    """And no zombie, which waits for its parent's parent."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split(") ")[1][0] != "Z"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, dict]:
    """Result and record of SEARCH in this process alone."""
    found = search_here(out := tmp_path_factory.mktemp("search") / "out.jsonl")
    assert found["evaluated"] == 14 and len(recorded(out)) == found["unique"] + 2 * len(found["finalists"])
    return found, recorded(out)


def search_here(out: Path, space: str = "nb201") -> dict[str, Any]:
    with redirect_stdout(io.StringIO()) as stdout:
        gennas.main([*map(str, SEARCH), "--space", space, "--workers", "1", "--out", str(out)])
    return timeless(stdout.getvalue())


@on_linux
@pytest.mark.parametrize("victim, status", [("main", -os_signal.SIGKILL), ("worker", 1)])
def test_search_resumes(tmp_path, undisturbed, victim, status):
    """A run that is killed in its middle leaves no process; the same command trains the rest and ends alike."""
    out = tmp_path / "out.jsonl"
    process = start_process(*SEARCH, "--workers", 2, "--out", out)
    assert wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 4)
    workers = children(process)
    os.kill(process.pid if victim == "main" else workers[0], os_signal.SIGKILL)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == status and len(workers) == 2 and "Traceback" not in stderr
    assert wait_for(lambda: not any(map(is_alive, workers)), 2)
    assert victim == "main" or "a worker died" in stderr.splitlines()[-1]
    assert 3 <= len(recorded(out)) < len(undisturbed[1])
    assert search_here(out) == undisturbed[0] and recorded(out) == undisturbed[1]


@on_linux
def test_ctrl_c_cancels_what_is_left(tmp_path):
    """Of 400 networks, some 40 s of training, none is begun after those that the two workers have in hand."""
    out = tmp_path / "out.jsonl"
    process = start_process("--space", "nb201", "--population", 400, "--cycles", 0, "--workers", 2, "--out", out)
    assert wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 4)
    workers = children(process)
    process.send_signal(os_signal.SIGINT)
    stderr = process.communicate(timeout=12)[1]
    assert process.returncode == 130 and "interrupted; what was trained is in" in stderr and "Traceback" not in stderr
    assert wait_for(lambda: not any(map(is_alive, workers)), 2) and len(recorded(out)) < 100


@on_linux
def test_no_orphans_of_a_run_that_is_killed_as_it_starts():
    process = start_process(*SEARCH, "--workers", 3)
    assert wait_for(lambda: len(children(process)) == 3)
    workers = children(process)
    process.kill()
    process.communicate(timeout=20)  # which waits for all that hold the two pipes
    assert wait_for(lambda: not any(map(is_alive, workers)), 5)


def test_torchrun(tmp_path, undisturbed):
    """Two ranks give the result of one process, and rank 0 alone writes; wrong input is one line and ends both."""
    out = tmp_path / "out.jsonl"
    process = start_process(*SEARCH, "--out", out, torchrun="--standalone --nproc-per-node 2")
    stdout, stderr = process.communicate(timeout=120)
    assert timeless(stdout) == undisturbed[0] and recorded(out) == undisturbed[1], stderr
    process = start_process("--space", "nb201", "--mode", "score", "x", torchrun="--standalone --nproc-per-node 2")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1 and stdout == "" and stderr.count("gennas: error: not a network of nb201") == 1


# ----------------------------------------------------------------------------------------------------- command line
def plot_to(path: Path) -> tuple:
    """The words that ask for a plot, where there is what draws it."""
    return ("--plot", path) if importlib.util.find_spec("matplotlib") else ()


def test_search(run, result, tmp_path):
    command = "--population", 4, "--tournament", 2, "--cycles", 4, "--batch", 2, *plot_to(tmp_path / "search.png")
    found = result(*command)
    assert found.keys() == set("mode space task preset images arch loss params evaluated unique finalists".split())
    assert found["evaluated"] == 8 >= found["unique"] and result(*command) == found
    assert found["params"] == NB201().params(NB201().parse(found["arch"]))
    assert result(*command, "--seed", 1)["loss"] != found["loss"]
    assert not plot_to(tmp_path) or (tmp_path / "search.png").stat().st_size > 5000
    lines = run(*command)[1].splitlines()
    assert found["arch"] == lines[0] and found["arch"] in lines[5] and len(lines) == 5 + found["unique"]


def test_finalists(result, tmp_path):
    """They are ranked by two seeds that the search did not use; without them the answer is what the search found."""
    out = tmp_path / "out.jsonl"
    command = "--population", 5, "--tournament", 2, "--cycles", 4, "--steps", 1, "--seeds", 2, "--out", out
    found = result(*command, "--finalists", 3)
    finalists = found["finalists"]
    assert found["arch"] == finalists[0]["arch"] and finalists[0].items() <= found.items()
    assert finalists == sorted(finalists, key=lambda finalist: finalist["loss"]) and len(finalists) == 3
    again = result("--mode", "score", *[one["arch"] for one in finalists], "--steps", 1, "--seed", 2, "--seeds", 2)
    assert [one["loss"] for one in again["results"]] == [one["loss"] for one in finalists]

    seeds = Counter(seed for _, seed, _ in recorded(out))
    assert seeds == {0: found["unique"], 1: found["unique"], 2: 3, 3: 3}
    plain, archs = result(*command, "--finalists", 0), {json.loads(line)["arch"] for line in open(out).readlines()[1:]}
    scored = result("--mode", "score", *archs, "--steps", 1, "--seeds", 2)["results"]
    assert plain["loss"] == min(one["loss"] for one in scored) and plain["finalists"] == []
    assert len(result(*command)["finalists"]) == min(10, found["unique"])


def test_search_within_limits(result, tmp_path):
    command = "--population", 4, "--tournament", 2, "--cycles", 2, "--steps", 0
    for name, limit in (("params", 600_000), ("flops", 150_000_000)):
        result(*command, f"--max-{name}", limit, "--out", tmp_path / name)
        archs = [json.loads(line)["arch"] for line in (tmp_path / name).read_text().splitlines()[1:]]
        assert max(getattr(NB201(), name)(NB201().parse(arch)) for arch in archs) <= limit


def test_recurrent_command_line(result, monkeypatch):
    monkeypatch.setitem(search_spaces.SPACES, "nbnlp", lambda **sizes: NBNLP((6, 8, 6), reservoir=True))
    found = result("--space", "nbnlp", "--population", 3, "--cycles", 3)
    assert NBNLP().params(NBNLP().parse(found["arch"])) == found["params"] and found["task"] == "nlp"


def test_score_from_stdin(result, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{RICH}\n\n[[3],[2,4],[1,3,2]]\n{DEAD}"))
    first, second, third = result("--mode", "score", "-", *plot_to(tmp_path / "losses.png"))["results"]
    assert first["arch"] == second["arch"] == RICH and first == second != third
    assert first.keys() == {"arch", "loss", "params", "seconds"} and third["params"] == NB201().params(*parse(DEAD))


def test_correlate(result, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(NB201, "params", lambda self, arch: arch.count("nor_conv_3x3"))
    rng = random.Random(7)
    archs = [TINY.random(rng) for _ in range(120)]
    labels = labels_file(tmp_path / "labels.json", TINY, archs)
    command = "--mode", "correlate", "--labels", labels, "--steps", 0, *plot_to(tmp_path / "c.svg")
    found, n = result(*command, "--limit", 100), range(100)
    scores = [-value for value in Scorer(TINY, steps=0)(archs[:100])]
    assert found["n"] == 100 and found["seconds_per_arch"] > 0
    for name, expected in [("spearman", gennas.spearman(scores, n)), ("kendall", gennas.kendall(scores, n)),
                           ("spearman_ci", gennas.spearman_interval(scores, n)),
                           ("spearman_params", gennas.spearman([TINY.params(arch) for arch in archs[:100]], n)),
                           ("spearman_best_tenth", gennas.spearman(scores[90:], range(10)))]:
        assert found[name] == pytest.approx(expected), name
    few = result(*command, "--limit", 9)
    assert few["spearman_ci"] == [None, None] and few["spearman_best_tenth"] is None
    assert result("--mode", "correlate")["n"] == 20  # the labels that nb201 brings
    labels.write_text(json.dumps([[TINY.format(archs[0]), 1], [TINY.format(archs[0]), 2]]))
    refused(["scores of 2 networks", "different ones"], "--mode", "correlate", "--labels", labels, "--quiet")


def test_search_task(run, result, tmp_path):
    """What it tells of the task that it found is what `correlate` says of it, on labels that it did not see."""
    rng = random.Random(1)
    archs = [TINY.random(rng) for _ in range(24)]
    labels, out = labels_file(tmp_path / "all.json", TINY, [*archs[:12], archs[0], *archs]), tmp_path / "out.jsonl"
    command = "--mode", "search-task", "--labels", labels, "--limit", 13, "--steps", 1
    found = result(*command, "--population", 5, "--tournament", 2, "--cycles", 2, "--out", out,
                   *plot_to(tmp_path / "x.png"))
    seen, tasks = {TINY.key(arch) for arch in archs[:12]}, {task for task, *_ in recorded(out)}
    assert found["evaluated"] == 7 == len(tasks) and found["n"] == len(seen)
    assert tasks > {task.digest() for task in gennas.TASKS.values() if isinstance(task, Task)}

    unseen = [[TINY.format(arch), 13 + i] for i, arch in enumerate(archs) if TINY.key(arch) not in seen]
    for name, content in {"task": found["task"], "rest": unseen}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    again = result("--mode", "correlate", "--labels", tmp_path / "rest.json", "--task", tmp_path / "task.json",
                   "--steps", 1)
    assert found["spearman_held_out"] == pytest.approx(again["spearman"]) and found["n_held_out"] == again["n"]

    command += "--task", "combo", "--cycles", 0
    fitted = result(*command)
    task = gennas.task_from_json(run(*command, "--quiet")[1])  # stdout is the file of a task
    assert json.loads(task.to_json()) == fitted["task"] and fitted["evaluated"] == 1
    assert task.digest() == gennas.COMBO.digest()

    steps = "--steps", gennas.PRESETS["fast"]["nb201"].settings.steps  # the preset's weights hold: none beats them here
    scored = result("--mode", "score", *map(TINY.format, archs[:8]), *steps)["results"]
    labels.write_text(json.dumps([[one["arch"], -one["loss"]] for one in scored]))
    kept = result("--mode", "search-task", "--labels", labels, "--task", "nb101", "--cycles", 0, *steps)
    assert kept["spearman"] == pytest.approx(1) and "weights" not in kept["task"]


def test_show(run, tmp_path):
    for name in ("combo", "darts"):
        status, stdout, stderr = run("--mode", "show", "--task", name, *plot_to(tmp_path / f"{name}.png"))
        assert status == 0 and gennas.task_from_json(stdout) == gennas.TASKS[name]
        assert "gennas: score = +1 log loss -0.07 log params; the weights were chosen on labels\n" in stderr
        assert not plot_to(tmp_path) or (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "mine.py").write_text("""from test_gennas import Linear
class Bad(Linear):
    params, random, mutate = (lambda self, arch: 10), *[lambda *_: "bad"] * 2
""")
    for name in ("text.txt", "text.json", "text.npz"):
        (folder / name).write_text("plain words")
    task = json.loads(small_task().to_json())
    task["noise"]["level"] = 99
    for name, content in {"object": {}, "other": [[RICH, 1], ["21012", 2]], "value": [[RICH, "high"]], "task": task,
                          "equal": [[RICH, 1], [DEAD, 1]]}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    noise = np.random.default_rng(0).random((20, 32, 32, 3))
    arrays = {"grey": noise[..., 0], "few": noise[:3], "range": noise * 255, "flat": noise * [0, 1, 1]}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("words, wanted", [  # words of the command line, what the message must say
    ("--space nb999", ["nb999", "nb201"]), ("--mode paint", ["paint", "search"]), ("--preset slow", ["slow", "paper"]),
    ("--steps -1", ["steps", "from 0 up"]), ("--population x", ["population", "int"]), ("--seeds 0", ["seeds", "1 up"]),
    ("--population 5 --tournament 10", ["tournament 10", "at most the population, 5"]), ("--nonsense", ["nonsense"]),
    ("--batch 51", ["batch 51", "at most the population, 50"]),
    ("abc", ["ARCH belongs to --mode score"]), ("--limit 3", ["limit belongs to --mode correlate or search-task"]),
    ("--mode search-task --max-params 9", ["max-params belongs to --mode search,"]),
    ("--mode search-task --seeds 2", ["seeds belongs to"]), ("--mode show --out x.jsonl", ["out belongs to"]),
    ("--space nb101 --mode search-task", ["--labels", "nb101 has no labels of its own"]),
    ("--mode score", ["--mode score: expected ARCH"]), ("--mode score abc", ["abc", "nb201", "nor_conv_3x3"]),
    ("--mode correlate --limit 1", ["1 labels", "different ones"]),
    ("--mode correlate --labels equal.json", ["2 labels", "different ones"]),
    ("--mode correlate --labels absent.json", ["absent.json", "No such file"]),
    ("--mode correlate --labels text.txt", ["text.txt", "no JSON list"]),
    ("--mode correlate --labels object.json", ["object.json", "[architecture, value]"]),
    ("--mode correlate --labels other.json", ["other.json, entry 1", "nb201"]),
    ("--mode correlate --labels value.json", ["value.json", 'value "high"']), ("--task guess", ["guess", "combo"]),
    ("--task absent.json", ["absent.json", "No such file"]), ("--task text.json", ["text.json", "task"]),
    ("--task task.json", ["task.json", "level", "0 to 10", "99"]), ("--task nlp", ["nlp", "one like nb101"]),
    ("--images absent.npz", ["absent.npz", "No such file"]), ("--images text.npz", ["text.npz", "expected"]),
    ("--images grey.npy", ["grey.npy", "(20, 32, 32)"]), ("--images few.npy", ["few.npy", "at least 8"]),
    ("--images range.npy", ["range.npy", "from 0 to 1"]), ("--images flat.npy", ["flat.npy", "same everywhere"]),
    ("--device abacus", ["abacus", "cpu"]),
    ("--space mine.py:Bad --max-params 9", ["none of 500 draws is within --max-params 9"]),
    ("--space nbnlp --task combo", ["task: expected one like nlp"]),
    ("--space nbnlp --max-flops 9", ["--max-flops", "--max-params, as nbnlp counts"]),
    ("--space mine.py:Bad --quiet", ["scores of 1 networks: expected a finite one"]),
    ("--out absent/x.jsonl", ["absent/x.jsonl", "No such file"]), ("--out empty", ["empty"]),
    ("--plot absent/x.png", ["absent/x.png"]), ("--plot x.docx", ["docx", "png"]),
    ("--plot x.svg --out x.svg", ["x.svg", "another than --out"]),
], ids=str)
def test_errors_are_one_line_and_exit_2(refused, wrong_files, monkeypatch, words, wanted):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(wrong_files)
    refused(wanted, *shlex.split(words))


def test_plot_without_matplotlib(refused, monkeypatch):
    monkeypatch.setattr(gennas, "find_spec", lambda name: None)
    refused(["pip install matplotlib"], "--mode", "show", "--plot", "x.png")


# --------------------------------------------------------------------------- search spaces: what their tests share
def norm(x: Tensor) -> Tensor:
    """A fresh batch norm in training."""
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()


def conv_norm(x: Tensor, layer: nn.Module, **options: int) -> Tensor:
    """The first convolution of `layer`, then a fresh batch norm."""
    weight = next(module for module in layer.modules() if isinstance(module, nn.Conv2d)).weight
    return norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2, **options))


def average(x: Tensor) -> Tensor:
    """A 3x3 average pool that does not count the padding."""
    return F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)


def another_order(inputs: Sequence[Sequence[int]], rng: random.Random) -> list[int]:
    """A random topological order of vertices with these inputs; the first stays first, the last last."""
    order, last = [0], len(inputs) - 1
    while len(order) < last:
        order.append(rng.choice([i for i in range(1, last) if i not in order and set(inputs[i]) <= set(order)]))
    return [*order, last]


def parsed(space: Any, value: Any) -> Any:
    return space.parse(json.dumps(value))


def cell_net(space: Cells, normal: Sequence, reduce: Sequence, width: int, depth: int) -> CellNet:
    return CellNet(space.genotype(tuple(normal), tuple(reduce)), width, depth)


def recipe(**nodes: str) -> dict[str, dict]:
    """A recurrent cell, of which each node is written as its operation and inputs."""
    words = {name: text.split() for name, text in nodes.items()}
    return {name: {"op": op, "input": inputs} for name, (op, *inputs) in words.items()}


RECIPE = recipe(h_new_1="activation_tanh node_1", node_1="linear x h_prev_1", node_2="linear h_prev_0 h_new_1 x",
                node_3="activation_sigm node_2", h_new_0="blend node_3 node_4 h_new_1",
                node_4="elementwise_prod node_3 h_new_1")
NET = {"block_type": "res_basic_block", "ds": [1, 2, 1, 1], "ws": [16, 16, 24, 32], "ss": [1, 1, 2, 2], "bot_muls": [],
       "num_gs": []}
BOTTLENECKS = NET | {"block_type": "res_bottleneck_block", "ds": [1, 1, 2, 1], "ws": [8, 16, 32, 32],
                     "bot_muls": [1, 0.5, 0.25, 1], "num_gs": [1, 2, 1, 4]}
NORMAL = ("[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), "
          "('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)]")
REDUCE = ("[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
          "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)]")
DARTS = f"Genotype(normal={NORMAL}, normal_concat=[2, 3, 4, 5], reduce={REDUCE}, reduce_concat=[2, 3, 4, 5])"
NESTED = re.sub(r"(\(\S+ \d\), \(\S+ \d\))", r"[\1]", NORMAL)
DARTS_NET = {"genotype": {"normal": eval(NORMAL), "normal_concat": [2, 3, 4, 5], "reduce": eval(REDUCE),
                          "reduce_concat": [2, 3, 4, 5]}, "width": 16, "depth": 20, "aux": False}
CHAIN = tuple(("skip_connect", i // 2) for i in range(10))  # of five nodes, of which the last two feed no other
MATRIX, CELL_OPS = [[0, 1, 1], [0, 0, 1], [0, 0, 0]], ["input", "maxpool3x3", "output"]
FULL = [[int(j > i) for j in range(7)] for i in range(7)]


# -------------------------------------------------------------------------------------------------- every space
def small_space(name: str) -> tuple[Any, Any]:
    """A space and an architecture of it, small enough to run in a test."""
    sizes = {"nb101": {"width": 6, "cells": 1}, "nb201": {"width": 4, "cells": 1}, "nbmacro": {"width": 2},
             "nbnlp": {"widths": (6, 8, 6)}}
    space = search_spaces.get(name, **sizes.get(name, {}))
    arch = space.random(random.Random(8))
    if isinstance(space, Cells):
        arch = arch._replace(width=4, depth=4)
    elif isinstance(space, Residual):
        stages = len(arch.ds)
        arch = arch._replace(ds=(1,) * stages, ws=(16,) * stages, num_gs=(2,) * len(arch.num_gs))
    return space, arch


@pytest.mark.parametrize("name", search_spaces.SPACES)
def test_every_space(name):
    """Round trip, mutation, three taps at 32, 16 and 8, or a sequence; two steps of a regression."""
    space, rng = search_spaces.get(name), random.Random(8)
    assert space.name == name and space.task in gennas.TASKS
    for _ in range(12):
        arch = space.random(rng)
        assert hash(arch) is not None and space.parse(space.format(arch)) == arch
        child = space.mutate(arch, rng)
        assert space.key(child) != space.key(arch) and space.parse(space.format(child)) == child
        assert name != "nbnlp" or space.valid(child)
    space, arch = small_space(name)
    if name == "nbnlp":
        assert space.build(arch)(torch.randn(2, 5, 6)).shape == (2, 5, 6)
    else:
        sides = [16, 8, 4] if name == "resnet-in" else [32, 16, 8]  # of four stages the last three are tapped
        taps = space.build(arch)(torch.randn(2, 3, 32, 32))
        assert [tap.shape[2:] for tap in taps] == [(side, side) for side in sides]
    regression = Regression(*((small_rnn_task(), None) if name == "nbnlp" else (small_task(), images())), Settings(2))
    trained = regression(space, arch)
    assert [len(curve) for curve in trained.losses] == [3] * (1 if name == "nbnlp" else 3)
    assert np.isfinite(trained.losses).all() and trained == regression(space, arch) and trained.params > 0


@pytest.mark.parametrize("name, spellings", {
    "nb201": [RICH, f"\n {RICH[:20]}\n{RICH[20:]} ", "[[3],[2,4],[1,3,2]]", "[[3], [2, 4],\n[1, 3, 2]]", f'"{RICH}"'],
    "nb101": [json.dumps([MATRIX, CELL_OPS]), str((MATRIX, CELL_OPS)), json.dumps({"matrix": MATRIX, "ops": CELL_OPS}),
              f"{{'module_adjacency': array({MATRIX}, dtype=int8), 'module_operations': {CELL_OPS}}}"],
    "nbmacro": ["01201201", "[0, 1, 2, 0, 1, 2, 0, 1]", "'01201201'"],
    "darts": [DARTS, json.dumps(DARTS_NET | {"width": 16.0}), f"DARTS_V2 = {DARTS}\n", f"01/02 genotype = {DARTS}",
              f"Genotype({NORMAL}, range(2, 6), {REDUCE}, list(range(2, 6)))", DARTS.replace(NORMAL, NESTED),
              DARTS.replace("normal_concat=[2, 3, 4, 5]", "normal_concat=range(2,6)")],
    "darts-fix-in": [DARTS, json.dumps(DARTS_NET | {"width": 32, "depth": 22})],
    "resnext-a": [json.dumps(BOTTLENECKS | {"bot_muls": [stem, 0.5, 0.25, 1]}) for stem in (1, 0.0, 7)],
    "resnet": [json.dumps(NET), json.dumps(NET | {"bot_muls": [0.0] * 4})],
    "nbnlp": [json.dumps(RECIPE), json.dumps({"recepie": json.dumps(RECIPE), "val_losses": [math.nan]}), str(RECIPE)],
}.items())
def test_what_people_paste(name, spellings):
    space = search_spaces.get(name)
    assert len({space.key(space.parse(text)) for text in spellings}) == 1
    arch, *others = map(space.parse, spellings)
    assert name.startswith("res") or {arch} == set(others)  # but for unused fields
    assert name != "darts-fix-in" or eval(space.format(arch)) == arch.genotype


@pytest.mark.parametrize("name, text, wrong", [
    *[(name, text, text) for name in ("nb201", "nb101", "darts", "resnet", "nbnlp") for text in ("", "nonsense", "3")],
    ("nb201", "|", "'|'"), ("nb201", RICH + " 91.2", "text after the architecture: '91.2'"),
    ("nb201", RICH.replace("nor_conv_1x1", "noise"), "op 'noise'"), ("nb201", "[[1],[2,3],[1,2,5]]", "op '5'"),
    ("nb201", RICH.replace("~2", "~1"), "|nor_conv_3x3~0|+|"), ("nb201", "[[1],[2,3],[1,2]]", "[[1],[2,3],[1,2]]"),
    ("nb101", json.dumps([FULL, ["input", *["maxpool3x3"] * 5, "output"]]), "21 edges, at most 9"),
    ("nb101", json.dumps([MATRIX, ["input", "noise", "output"]]), "op 'noise'"), 
    ("nb101", "[[[0, 1], [0, 0]], 3]", "[[[0, 1]"),
    ("nb101", json.dumps([[[0, 0], [0, 0]], ["input", "output"]]), "no path"),
    ("nb101", json.dumps([[[0, 1], [1, 0]], ["input", "output"]]), "value 1 in row 1, column 0, expected 0"),
    ("nb101", json.dumps([MATRIX, CELL_OPS[1:]]), "matrix of 3 rows, expected 2 x 2"),
    ("nb101", json.dumps([MATRIX, ["input"] * 3]), "ops from 'input' to 'input'"),
    ("nb101", json.dumps([[], ["input"]]), "1 vertices"), ("nb101", json.dumps([MATRIX, CELL_OPS])[:-1], "no closing"),
    ("nbmacro", "", "0 digits"), ("nbmacro", "0120120", "7 digits, expected 8"), ("nbmacro", "01201203", "digit '3'"),
    ("nbmacro", "01201201 91.2", "text after the architecture: '91.2'"), ("nbmacro", "[10, 1]", "digit '10'"),
    ("darts", DARTS + " 91.2", "text after the architecture: '91.2'"), ("darts", "Genotype()", "no 'normal'"),
    ("darts", DARTS.replace("skip_connect', 2", "noise', 2"), "op 'noise' in reduce"),
    ("darts", DARTS.replace("dil_conv_3x3', 2", "dil_conv_3x3', 5"), "input 5 of node 5 in normal, expected one of 0"),
    ("darts", DARTS.replace("concat=[2, 3, 4, 5]", "concat=[2, 3]"), "normal_concat [2, 3], expected [2, 3, 4, 5]"),
    ("enas", str(Genotype(CHAIN, (2, 3, 4, 5, 6), CHAIN, (5, 6))), "normal_concat [2, 3, 4, 5, 6], expected [5, 6]"),
    ("darts", DARTS.replace("[2, 3, 4, 5]", "range(print(1))"), "neither JSON nor Python: 'print(1)'"),
    ("pnas", DARTS, "8 (op, input) in normal, expected 10"), ("darts", '{"width": 16, "depth": 20}', "no 'genotype'"),
    ("darts-in", json.dumps(DARTS_NET | {"width": 36}), "width 36, expected one of 32, 48, 64, 80, 96"),
    ("darts-fix", json.dumps(DARTS_NET | {"depth": 8}), "depth 8, expected one of 20"),
    ("resnext-a", json.dumps(NET), "block_type 'res_basic_block'"), ("resnet", json.dumps(NET | {"ss": [1]}), "ss [1]"),
    *[("resnext-a", json.dumps(BOTTLENECKS | {field: values}), wrong) for field, values, wrong in [
        ("ws", [8, 48, 32, 32], "ws 48 of stage 1, expected one of (16, "), ("ws", [1, 16, 32, 32], "ws 1 of stage 0"),
        ("ds", [1, 2], "2 ds, expected 4"), ("bot_muls", [math.nan, 0.5, 0.5, 1], "bot_muls nan of the stem"),
        ("num_gs", [-1, 1, 1, 1], "num_gs -1 of the stem, expected a number >= 0")]],
    *[("nbnlp", json.dumps(RECIPE | change), wrong) for change, wrong in [
        (recipe(h_new_3="activation_tanh node_1"), "h_new_3"), (recipe(node_1="linear x x"), "inputs x, x of node_1"),
        (recipe(x="linear x h_prev_1"), "node 'x'"), (recipe(node_3="activation_sigm x"), "input 'x' of node_3"),
        (recipe(node_2="linear h_prev_0 node_3"), "cycle"), (recipe(node_3="noise node_2"), "op 'noise' of node_3"),
        (recipe(node_4="elementwise_prod node_3 h_prev_2"), "input 'h_prev_2' of node_4")]],
], ids=lambda value: value[:20])
def test_a_refusal_names_what_is_wrong(name, text, wrong):
    space = search_spaces.get(name)
    with pytest.raises(ValueError) as error:
        space.parse(text)
    told, _, expected = str(error.value).partition("; expected ")
    assert told.startswith(f"not a network of {name}: ") and wrong in told and expected == space.spelling


def test_canonical_graph_is_independent_of_the_order():
    """Random graphs larger than any cell, their vertices and summands shuffled; one that is too regular is refused."""
    rng = random.Random(5)
    for _ in range(200):
        size = rng.randint(3, 9)
        ops = ["input", *rng.choices("ab", k=size - 1), "output"]
        inputs = [rng.choices(range(i), k=rng.randint(1, 2)) for i in range(1, size)]
        inputs = [[], *inputs, rng.choices(range(size), k=2)]
        results = []
        for order in (range(size + 1), another_order(inputs, rng)):
            sums = [[order.index(j) for j in rng.sample(inputs[i], len(inputs[i]))] for i in order]
            graph = tuple(Vertex(ops[i], tuple(places)) for i, places in zip(order, sums))
            results.append(search_spaces.canonical(graph))
        assert results[0] == results[1]
        assert all(j < i for i, vertex in enumerate(results[0]) for j in vertex.inputs)  # topological
        assert sorted(vertex.op for vertex in results[0]) == sorted(ops)
    chains = [Vertex("a", (0,)) for _ in range(8)] + [Vertex("b", (i,)) for i in range(1, 9)]
    with pytest.raises(ValueError, match="18 vertices is too regular"):
        search_spaces.canonical((Vertex("input"), *chains, Vertex("output", tuple(range(9, 17)))))


# ---------------------------------------------------------------------------------------------------- NAS-Bench-201
def test_nb201_has_as_many_networks_as_isomorphism_classes():
    assert len(classes()) == 5425


def test_nb201_network_against_its_definition():
    """Weights are matched by operation, so a cell has each convolution at most once; taps of a dead one are zero."""
    archs = [arch for arch in random.Random(4).sample(ARCHS, 200)
             if arch.count("nor_conv_1x1") <= 1 and arch.count("nor_conv_3x3") <= 1][:24]
    for seed, arch in enumerate([*archs, *parse(DEAD)]):
        x = torch.randn(2, 3, 32, 32, generator=rng_of(seed))
        network = TINY.build(arch).train()
        taps = network(x)
        assert [tuple(tap.shape) for tap in taps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)]
        if not TINY.graph(arch)[-1].inputs:
            assert not any(tap.any() for tap in taps)
            continue
        for ((entry, cell),), tap in zip(network, taps):
            if tap is taps[0]:
                x = conv_norm(x, entry)
            else:
                (first, second), shortcut = entry
                deep = conv_norm(F.relu(conv_norm(F.relu(x), first, stride=2)), second)
                x = deep + F.conv2d(F.avg_pool2d(x, 2), shortcut[1].weight)
            built = {op: module for (op, _), module in zip(TINY.graph(arch)[1:], cell.ops)}  # no dead ones
            norms = [module for module in cell.modules() if isinstance(module, nn.BatchNorm2d)]
            assert not any(module.affine or module.track_running_stats for module in norms)
            nodes = [x, 0 * x, 0 * x, 0 * x]
            for (i, j), op in zip(TINY.EDGES, arch):
                if op == "skip_connect":
                    nodes[j] = nodes[j] + nodes[i]
                elif op == "avg_pool_3x3":
                    nodes[j] = nodes[j] + average(nodes[i])
                elif op in built:
                    nodes[j] = nodes[j] + conv_norm(F.relu(nodes[i]), built[op])
            x = nodes[3]
            assert_close(tap, x)


# --------------------------------------------------------------------------- NAS-Bench-101, -Macro and the NDS spaces
def test_nb101_counts():
    """All cells of 2 to 5 vertices that use all of them: as many differ as NAS-Bench-101 itself counts."""
    space, counts = NB101(), []
    for n in range(2, 6):
        keys = set()
        for bits in itertools.product((0, 1), repeat=n * (n - 1) // 2):
            edges = dict(zip(itertools.combinations(range(n), 2), bits))
            matrix = tuple(tuple(edges.get((i, j), 0) for j in range(n)) for i in range(n))
            cells = [NB101Cell(matrix, ("input", *ops, "output")) for ops in itertools.product(NB101.OPS, repeat=n - 2)]
            if len(space.graph(cells[0])) == n and 0 < space.edges(cells[0]) < 10:
                keys.update(map(space.key, cells))
        counts.append(len(keys))
    assert counts == [1, 6, 84, 2441]


def test_nb101_and_macro_keys():
    assert NBMacro().key("01001020") == NBMacro().key("01010002") != NBMacro().key("01100020")
    space, rng = NB101(), random.Random(9)
    for _ in range(300):
        matrix, ops = arch = space.random(rng)
        order = another_order([[i for i in range(7) if matrix[i][j]] for j in range(7)], rng)
        twin = NB101Cell(tuple(tuple(matrix[i][j] for j in order) for i in order), tuple(ops[i] for i in order))
        assert space.key(twin) == space.key(arch)


def test_nb101_mutations_and_initial_weights():
    """Of 21 possible edges three flip on average, of 5 operations one; but the child must be valid."""
    space, rng = NB101(), random.Random(0)
    parents = [space.random(rng) for _ in range(300)]
    children = [space.mutate(parent, rng) for parent in parents]
    edges, ops = (np.mean([(np.array(a[field]) != np.array(b[field])).sum() for a, b in zip(parents, children)])
                  for field in (0, 1))
    assert 1.8 < edges < 3.3 and 0.8 < ops < 1.2
    for space in (space, search_spaces.get("resnext-a")):
        for module in space.build(space.random(random.Random(0))).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 3000:
                scale = module.kernel_size[0] ** 2 * module.out_channels / 2
                assert module.weight.var().item() * scale == pytest.approx(1, rel=0.15)


def test_nb101_cell_by_hand():
    """Input to 1 and 3 and the output, 1 to 2 and the output, 2 and 3 to the output: 7 channels divided as 3, 2, 2."""
    matrix = ((0, 1, 0, 1, 1), (0, 0, 1, 0, 1), (0, 0, 0, 0, 1), (0, 0, 0, 0, 1), (0,) * 5)
    arch = NB101Cell(matrix, ("input", "conv3x3-bn-relu", "maxpool3x3", "conv1x1-bn-relu", "output"))
    cell = search_spaces.NB101Block(NB101().graph(arch, whole=True), 4, 7).train()
    x = torch.randn(2, 4, 8, 8, generator=rng_of(0))
    projected = {j: F.relu(conv_norm(x, cell.projections[j])) for j in (1, 3, 4)}
    one = F.relu(conv_norm(projected[1], cell.ops[0]))
    two = F.max_pool2d(one[:, :2], 3, 1, 1)
    three = F.relu(conv_norm(projected[3], cell.ops[2]))
    assert (one.shape[1], two.shape[1], three.shape[1]) == (3, 2, 2)
    assert_close(cell(x), torch.cat([one, two, three], 1) + projected[4])


def plain_bottleneck(x: Tensor, body: nn.Module, skip: nn.Module, stride: int = 1, groups: int = 1) -> Tensor:
    narrow, middle, wide = body
    y = F.relu(conv_norm(F.relu(conv_norm(x, narrow)), middle, stride=stride, groups=groups))
    return conv_norm(y, wide) + (x if isinstance(skip, nn.Identity) else conv_norm(x, skip, stride=stride))


def test_bottlenecks_by_hand():
    """A layer of NAS-Bench-Macro, and a whole residual network with its stem."""
    block = NBMacro().layer("2", 3, 3, 1).train()
    assert block[0][1][0].weight.shape == (18, 1, 5, 5)
    x = torch.randn(2, 3, 8, 8, generator=rng_of(4))
    assert_close(block(x), plain_bottleneck(x, *block, groups=18))
    space = search_spaces.get("resnext-a")
    first, second, third = network = space.build(parsed(space, BOTTLENECKS)).train()
    x = torch.randn(2, 3, 32, 32, generator=rng_of(3))
    taps = network(x)
    x = plain_bottleneck(F.relu(conv_norm(x, first[0][0])), *first[0][1], groups=2)
    assert_close(taps[0], x, atol=1e-3, rtol=1e-3)
    x = plain_bottleneck(F.relu(plain_bottleneck(F.relu(x), *second[0][1], stride=2)), *second[1][1])
    assert_close(taps[1], x, atol=1e-3, rtol=1e-3)
    assert_close(taps[2], plain_bottleneck(F.relu(x), *third[0][1], stride=2, groups=4), atol=1e-3, rtol=1e-3)


def test_darts_cell_by_hand():
    """A reduction cell, every node written out; the last is zero."""
    def halved(x: Tensor, reduction: nn.Module) -> Tensor:
        even, odd = (F.conv2d(F.relu(x)[:, :, i::2, i::2], half.weight) for i, half in enumerate(reduction.halves))
        return norm(torch.cat([even, odd], 1))

    def separable(x: Tensor, layer: nn.Module, **options: int) -> Tensor:
        depthwise, pointwise = layer[1:3]
        return conv_norm(F.conv2d(F.relu(x), depthwise.weight, groups=4, **options), pointwise)

    pairs = (("sep_conv_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 1), ("dil_conv_5x5", 2), ("avg_pool_3x3", 3),
             ("skip_connect", 2), ("none", 0), ("none", 4))
    _, graph = Cells("darts").graphs(cell_net(Cells("darts"), pairs, pairs, 4, 3))
    cell = search_spaces.TwoInputCell(graph, 6, 5, 4, reduction_prev=True, reduction=True).train()
    before, last = (torch.randn(2, c, side, side, generator=rng_of(c)) for c, side in ((6, 16), (5, 8)))
    op = {vertex.op: module for vertex, module in zip(graph[2:], cell.ops)}
    a, b = halved(before, cell.preprocess[0]), conv_norm(F.relu(last), cell.preprocess[1])
    first, second = op["sep_conv_3x3"]
    two = separable(separable(a, first, stride=2, padding=1), second, padding=1) + F.max_pool2d(b, 3, 2, 1)
    three = halved(b, op["skip_connect"]) + separable(two, op["dil_conv_5x5"][0], padding=4, dilation=2)
    parts = cell(before, last).split(4, 1)
    for node in (two, three, average(three) + two, 0 * two):  # the canonical order is not that of the genotype
        assert any(torch.allclose(node, part, atol=1e-4) for part in parts)


def test_darts_keys():
    space, rng = Cells("darts"), random.Random(10)
    for _ in range(30):
        arch = space.random(rng)
        normal, reduce, key = list(arch.genotype.normal), arch.genotype.reduce, space.key(arch)
        for i in range(0, 8, 2):  # the two pairs of a node are unordered, and the source of a zero does not matter
            pairs = [(op, rng.randrange(2 + i // 2) if op == "none" else source) for op, source in normal[i:i + 2]]
            normal[i:i + 2] = rng.sample(pairs, 2)
        assert space.key(cell_net(space, normal, reduce, arch.width, arch.depth)) == key
        if all(source != 2 for _, source in normal[2:4]):  # nodes 2 and 3 change places
            later = [(op, {2: 3, 3: 2}.get(source, source)) for op, source in normal[4:]]
            swapped = [*normal[2:4], *normal[:2], *later]
            assert space.key(cell_net(space, swapped, reduce, arch.width, arch.depth)) == key
        assert space.key(arch._replace(width=arch.width * 2)) != key != space.key(arch._replace(depth=arch.depth + 1))


def test_taps_have_no_dead_cells():
    """Where cells read only the one before the last, every other one reaches no tap: heads do not read it."""
    pairs = [("sep_conv_3x3", 0), ("none", 1)] * 4
    for space in (Cells("darts"), Cells("darts", all_blocks=True)):
        network = space.build(cell_net(space, pairs, pairs, 4, 6))  # reductions at 2 and 4, taps after 1, 3 and 5
        assert [tap.shape[1] for tap in network(torch.randn(2, 3, 16, 16))] == [16, 32, 64]


@pytest.mark.parametrize("name", ["nb101", "nb201", "nbmacro", "pnas-in", "amoeba", "resnet", "resnext-b-in"])
def test_taps_of_all_blocks(name):
    """The last block's maps end such a tap, before them stand those of the others, in the order in which they run."""
    sizes = {"width": 8} if name.startswith("nb") else {"shrink": 8}
    last, every = (search_spaces.get(name, all_blocks=flag, **sizes) for flag in (False, True))
    arch, taps = last.random(random.Random(0)), []
    for space in (last, every):
        torch.manual_seed(0)
        taps.append(space.build(arch).train()(torch.randn(2, 3, 16, 16, generator=rng_of(3))))
    for one, more in zip(*taps):
        assert one.shape[2:] == more.shape[2:] and one.shape[1] <= more.shape[1]
        assert torch.equal(one, more[:, -one.shape[1]:])
    assert name != "nb201" or [more.shape[1] for more in taps[1]] == [40, 80, 160]
    assert last.params(arch) == every.params(arch) and last.flops(arch) == every.flops(arch)


# ---------------------------------------------------------------------------------------------------- NAS-Bench-NLP
def test_recipe_keys():
    text, key = json.dumps(RECIPE), NBNLP().key(parsed(NBNLP(), RECIPE))
    dead = RECIPE | recipe(h_new_2="activation_sigm node_5", node_5="linear x h_prev_2")
    for same in (json.dumps(dict(reversed(RECIPE.items()))), json.dumps(dead),
                 text.replace("node_1", "node_9").replace("node_3", "node_1"),
                 text.replace('"h_prev_0", "h_new_1", "x"', '"x", "h_prev_0", "h_new_1"')):
        assert NBNLP().key(NBNLP().parse(same)) == key
    assert NBNLP().key(NBNLP().parse(text.replace('"node_4", "h_new_1"', '"h_new_1", "node_4"'))) != key  # a blend
    assert len(NBNLP().build(parsed(NBNLP(), dead))[0].weights) == 5
    alive = dead | recipe(node_6="elementwise_sum node_4 h_new_2", h_new_0="blend node_3 node_6 h_new_1")
    swapped = re.sub(r"h_(new|prev)_([12])", lambda m: f"h_{m[1]}_{3 - int(m[2])}", json.dumps(alive))
    assert NBNLP().key(parsed(NBNLP(), alive)) == NBNLP().key(NBNLP().parse(swapped)) != key


def test_recurrent_layer_by_hand():
    graph = NBNLP().graph(parsed(NBNLP(), RECIPE))
    layer = search_spaces.RecurrentLayer(graph, False, 5, 4, 0.1).eval()
    x = torch.randn(3, 6, 5, generator=rng_of(5))
    linear = [i for i, vertex in enumerate(graph) if vertex.op == "linear"]
    short, wide = sorted(linear, key=lambda i: len(graph[i].inputs))
    state1 = next(i for i in graph[short].inputs if i)  # the place of h_prev_1
    state0 = 3 - state1
    new1, = set(graph[wide].inputs) - {0, state0}  # the place of h_new_1

    def linear_of(i: int, values: dict[int, Tensor]) -> Tensor:
        return sum(value @ layer.weights[f"{i} {j}"].T for j, value in values.items()) + layer.biases[str(i)]

    h0, h1 = torch.zeros(3, 4), torch.zeros(3, 4)
    for t in range(6):
        h1 = torch.tanh(linear_of(short, {0: x[:, t], state1: h1}))
        gate = torch.sigmoid(linear_of(wide, {0: x[:, t], state0: h0, new1: h1}))
        h0 = gate * (gate * h1) + (1 - gate) * h1
        assert_close(layer(x)[:, t], h0, atol=1e-5, rtol=1e-5)


def test_dropout_and_reservoir():
    """One mask over time; in a reservoir training leaves the recurrent matrices as they were drawn."""
    trained, outputs = {}, []
    for reservoir in (False, True):
        space = NBNLP((6, 8, 6), reservoir)
        torch.manual_seed(0)
        network = space.build(space.random(random.Random(3))).train()
        outputs.append(network(torch.ones(2, 3, 6)))
        outputs[-1].square().mean().backward()
        trained[reservoir] = {name for name, p in network.named_parameters() if p.grad is not None}
    recurrent = {name for name in trained[False] if ".weights." in name and not name.endswith(" 0")}
    assert torch.equal(*outputs) and ((outputs[0] == 0).all(1) == (outputs[0] == 0).any(1)).all()
    assert recurrent and trained[True] == trained[False] - recurrent
    assert [layer.drop for layer in NBNLP().build(parsed(NBNLP(), RECIPE))] == [0.25, 0.25, 0.1]


# -------------------------------------------------------------------------------------------- counts and labels
def conv_params(*convolutions: tuple[int, int, int]) -> int:
    """Of convolutions (c_in, c_out, kernel), each with a batch norm."""
    return sum(c_in * c_out * kernel ** 2 + 2 * c_out for c_in, c_out, kernel in convolutions)


def test_params_by_hand():
    kernels = [int(op[-1]) for op in parse(RICH)[0] if "conv" in op]
    total = conv_params((3, 16, 3), *[(c, c, k) for c in (16, 32, 64) for k in kernels for _ in range(5)])
    for c in (32, 64):  # the residual blocks
        total += conv_params((c // 2, c, 3), (c, c, 3)) + c // 2 * c
    assert NB201().params(parse(RICH)[0]) == total + 2 * 64 + 65 * 10

    total = conv_params(
        (3, 32, 3), (32, 64, 1), (64, 192, 1), (1, 192, 3), (192, 64, 1),  # the stem; layers 0 and 1
        (64, 128, 1), (128, 768, 1), (1, 768, 5), (768, 128, 1), (128, 256, 1), (256, 1280, 1))  # 2, 3 and 5; the tail
    assert NBMacro().params("01020000") == total + 1281 * 10

    layers = sum(5 * h * h + 2 * h + 2 * (i - h) * h for i, h in ((400, 600), (600, 600), (600, 400)))
    assert NBNLP().params(parsed(NBNLP(), RECIPE)) == 4_010_000 + layers

    skips = [("skip_connect", 1)] * 8
    arch = cell_net(Cells("darts"), [("sep_conv_3x3", 1), *skips[1:]], skips, 8, 4)
    total = conv_params(
        (3, 24, 3), (24, 8, 1), (24, 8, 1), *[(1, 8, 3), (8, 8, 1)] * 2,  # the stem and cell 0
        (24, 16, 1), (32, 16, 1), *[(16, 16, 1)] * 8,  # cell 1, a reduction
        (32, 32, 1), (64, 32, 1), *[(32, 32, 1)] * 8,  # cell 2, a reduction after a reduction
        (64, 32, 1), (128, 32, 1), *[(1, 32, 3), (32, 32, 1)] * 2)  # cell 3, after a reduction
    without_norm = 2 * (2 * 8 + 2 * 32)  # a depthwise convolution has none
    assert Cells("darts").params(arch) == total - without_norm + 129 * 10

    space = search_spaces.get("resnext-a")  # as the authors of NDS recorded it, the stem's bottleneck 0
    net = {"ws": [16, 64, 128, 16], "ds": [1, 16, 1, 4], "num_gs": [1, 2, 1, 2], "bot_muls": [0.0, 0.25, 0.25, 0.25]}
    assert space.params(parsed(space, BOTTLENECKS | net)) == 83_002


@needs_shared
@pytest.mark.parametrize("name, file, arch, params", [
    ("nb201", "nb201_params.json", 0, 1), ("nb101", "nb101_params.json", 0, 1),
    ("nbmacro", "nbmacro_params.json", 0, 1), ("nbnlp", "nbnlp", "recepie", "num_params"),
    ("darts-in", "nds/DARTS_in.json", "net", "params"), ("pnas-in", "nds/PNAS_in.json", "net", "params"),
    ("resnext-a-in", "nds/ResNeXt-A_in.json", "net", "params"), ("resnet", "nds/ResNet_reruns.json", "net", "params")])
def test_params_as_recorded(name, file, arch, params):
    """On every 20th record, exactly; of nb201 on all, which were recorded in hundreds."""
    space, path = search_spaces.get(name), SHARED / "labels" / file
    step, digits = (1, -2) if name == "nb201" else (20, 0)
    content = [json.loads(log.read_text()) for log in sorted(path.glob("*.json"))] or json.loads(path.read_text())
    records = (content["top"] + content["mid"] if isinstance(content, dict) else content)[::step]
    assert len(records) > 5
    for record in records:
        text = record[arch] if isinstance(record[arch], str) else json.dumps(record[arch])
        assert round(space.params(space.parse(text)), digits) == record[params], text


def test_flops_by_hand():
    """Torch counts convolutions and the linear layer, a multiply-add as two."""
    dead = 640 + 32 * 32 * 3 * 16 * 9
    for c, side in ((32, 16), (64, 8)):
        dead += side * side * (c // 2 * c * 9 + c * c * 9 + c // 2 * c)
    convolutions = 5 * 9 * sum(c * c * side * side for c, side in ((16, 32), (32, 16), (64, 8)))
    assert NB201().flops(NB201().parse(DEAD)) == 2 * dead
    assert NB201().flops(NB201().parse("[[3],[0,0],[0,0,0]]")) == 2 * (dead + convolutions)


def test_labels_files(tmp_path):
    entries, path = [[json.dumps(RECIPE), 1], [RECIPE, 2.5]], tmp_path / "labels.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(json.dumps(entries), encoding)
        assert search_spaces.load_labels(NBNLP(), path) == [(parsed(NBNLP(), RECIPE), value) for value in (1, 2.5)]
    for content, wrong in [("words", "no JSON list"), ("{}", "no JSON list of [architecture, value]: {}"),
                           ("[]", "no JSON list"), (json.dumps([NET]), "entry 0 is {"), ("[[[1], 2, 3]]", "entry 0 is"),
                           (json.dumps([*entries, [RECIPE, math.nan]]), "value NaN in entry 2, expected a number"),
                           (json.dumps([*entries, ["x", 1]]), "entry 2: not a network of nbnlp"),
                           (json.dumps([[RECIPE, "high"]]), 'value "high" in entry 0')]:
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(wrong)) as error:
            search_spaces.load_labels(NBNLP(), path)
        assert str(error.value).startswith(f"labels {path}")


@needs_shared
def test_built_in_labels_as_recorded():
    recorded = dict(search_spaces.load_labels(NB201(), SHARED / "labels" / "nb201_cifar10.json")[:600])
    assert all(recorded[arch] == value for arch, value in NB201().labels)
    assert sorted(value for _, value in NB201().labels) == sorted(recorded.values())[15::30]


# ----------------------------------------------------------------------------------------------------- README, copies
def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def readme_commands() -> list[str]:
    lines = [line for block in readme_blocks("sh") for line in block.splitlines()]
    return [re.split(" #| > | \\| |;", line.split("python ", 1)[1])[0].strip() for line in lines
            if "python gennas.py" in line]


def plain_space() -> str:
    """The README's example of a space of one's own."""
    example, = [block for block in readme_blocks("python") if "class Plain" in block]
    return example


def test_each_file_alone(tmp_path):
    """search_spaces.py builds a network; gennas.py scores an object with a space's methods. Importing does nothing."""
    for name, code, printed in (("search_spaces", """
space = search_spaces.get("nb201")
print(len(space.build(space.random(random.Random(0)))(torch.zeros(2, 3, 32, 32))))""", "3\n"), ("gennas", """
class Space:
    key = format = str
    def build(self, arch):
        body = torch.nn.Conv2d(3, arch, 3)
        body.forward = lambda x, conv=body.forward: [conv(x)] * 3
        return body
print(len(gennas.Scorer(Space(), steps=2)([4, 5])))""", "2\n")):
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
        state = "[*torch.get_rng_state(), random.getstate(), torch.get_num_threads(), 'matplotlib' in sys.modules]"
        code = f"import random, sys, torch\nbefore = {state}\nimport {name}\nassert {state} == before{code}"
        process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / name, capture_output=True, text=True)
        assert (process.stdout, process.stderr) == (printed, "")


def test_readme_space(tmp_path):
    """The README's example of a space of one's own: with three workers the result is that of one process."""
    (tmp_path / "my_space.py").write_text(plain_space())
    name, outs = f"{tmp_path / 'my_space.py'}:Plain", (tmp_path / "1.jsonl", tmp_path / "3.jsonl")
    process = start_process(*SEARCH, "--space", name, "--workers", 3, "--quiet", "--out", outs[1])
    stdout, stderr = process.communicate(timeout=120)
    assert stderr == "" and (found := timeless(stdout)) == search_here(outs[0], name) and found["evaluated"] == 14
    assert recorded(outs[0]) == recorded(outs[1])
    space, rng = search_spaces.get(name), random.Random(0)
    assert space.params(space.parse(found["arch"])) == found["params"]
    for arch in [space.random(rng) for _ in range(20)]:
        assert space.parse(space.format(arch)) == arch and space.key(space.mutate(arch, rng)) != space.key(arch)


@pytest.mark.parametrize("right, wrong, wanted", [
    ("class Plain", "class Fancy", "no 'Plain' in"),
    ("class Plain:", "class Plain:\n    task = 'guess'", "guess"),
    ("enumerate(arch)", "enumerate(arch[:1])", "feature maps: expected 3, not 1"),
    ("i = rng.randrange(3)", "raise ValueError('no neighbour')", "no neighbour"),
])
def test_own_space_with_a_mistake(refused, tmp_path, right, wrong, wanted):
    (tmp_path / "mine.py").write_text(plain_space().replace(right, wrong))
    refused([wanted], "--space", f"{tmp_path / 'mine.py'}:Plain", "--population", 8, "--quiet")


def test_own_space_with_labels_and_its_file_in_the_record(result, refused, tmp_path):
    labels = "    labels = [(((1, 8), (3, 8), (k, 8)), n) for n, k in enumerate((1, 3, 5))]\n"
    file, out = tmp_path / "mine.py", tmp_path / "out.jsonl"
    file.write_text(plain_space().replace("1 if i == 0 else 2", "4") + labels)  # maps of 16 pixels, 4, 1
    command = "--space", f"{file}:Plain", "--mode", "correlate", "--out", out
    assert result(*command) == result(*command) and result(*command)["n"] == 3
    file.write_text(file.read_text() + "\n")
    refused(["out.jsonl: file of this run"], *command)


@pytest.mark.parametrize("code", [block for block in readme_blocks("python") if "class Plain" not in block])
def test_readme_python(code, tmp_path, monkeypatch):
    """Each recipe runs, here on stand-ins for the benchmarks' packages and files, and what it writes is read."""
    monkeypatch.chdir(tmp_path)
    nats = {"arch": lambda self, i: NB201().format(self[i]),
            "get_more_info": lambda self, i, data, hp, is_random: {"test-accuracy": 80 + i / 1000, "test-loss": 9.0}}
    cells, runs = [NB101().random(random.Random(seed)) for seed in range(600)], [{"final_test_accuracy": 0.92}] * 3
    nasbench = SimpleNamespace(hash_iterator=lambda: map(str, range(600)), get_metrics_from_hash=lambda name: ({
        "module_adjacency": np.array(cells[int(name)].matrix), "module_operations": cells[int(name)].ops}, {108: runs}))
    for name, package in {"nats_bench": {"create": lambda *_, **__: type("Nats", (list,), nats)(ARCHS)},
                          "nasbench": {"api": SimpleNamespace(NASBench=lambda path: nasbench)}}.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**package))
    digits = map("".join, itertools.product("012", repeat=8))
    log = {"recepie": json.dumps(RECIPE), "status": "OK", "val_losses": [math.nan, -9.0, -8.0]}
    record = {"net": DARTS_NET | {"width": 32, "depth": 14}, "test_ep_top1": [50.0, 7.5]}
    Path("train_logs_single_run").mkdir()
    for file, content in {"nas-bench-macro_cifar10": {arch: {"mean_acc": 91} for arch in digits}, "DARTS_in": [record],
                          "train_logs_single_run/a": log, "train_logs_single_run/b": log | {"status": "loss is nan!"},
                          "train_logs_single_run/c": log | {"val_losses": []}}.items():
        Path(f"{file}.json").write_text(json.dumps(content))
    Path("data_batch_1").write_bytes(pickle.dumps({b"data": np.arange(20 * 3072, dtype=np.uint8).reshape(20, 3072)}, 2))
    monkeypatch.setitem(gennas.PRESETS["fast"], "nb201", gennas.Preset(Settings(steps=1), {"width": 4, "cells": 1}))
    exec(code, {})
    for file in re.findall(r'open\("(\S+).json", "w"\)', code):
        labels = search_spaces.load_labels(search_spaces.get(file), f"{file}.json")
        assert len(labels) == {"nb201": 1000, "nb101": 500, "nbmacro": 500}.get(file, 1)
        assert all(0.9 < value < 100 for _, value in labels)
    for file in tmp_path.glob("*.npy"):
        assert gennas.read_images(str(file), 16).shape == (16, 3, 32, 32)


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands(run, tmp_path, monkeypatch, command):
    """Each command that the README shows runs, on the tiny space; files that it reads are made here."""
    monkeypatch.chdir(tmp_path)
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    rng = random.Random(0)
    for space in (NB201(), NB101()):
        labels_file(Path(f"{space.name}.json"), space, [space.random(rng) for _ in range(12)])
    Path("my_task.json").write_text(small_task().to_json())
    Path("my_space.py").write_text(plain_space())
    Path("figures").mkdir()
    np.save("my_images.npy", np.random.default_rng(0).random((16, 32, 32, 3)))
    words = shlex.split(command)[1:]
    searches = "--mode" not in words or "search-task" in words
    status, _, stderr = run(*words, *searches * ["--population", "3", "--cycles", "2"], "--steps", "1")
    assert status == 0, stderr
