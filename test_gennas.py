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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import gennas
import search_spaces
from gennas import (Noise, Regression, RnnRegression, RnnTask, Scorer, Settings, Signal, Stage, Task, Trained,
                    task_digest, task_from_json, task_to_json)
from search_spaces import NB101, NB201, NBNLP, CellNet, Cells, Genotype, NB101Cell, NBMacro, Vertex

torch.set_num_threads(1)
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"  # recorded accuracies and images; the tests that want them skip without
RICH = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
DEAD = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
FREQUENCIES = (.05, .1, .12, .2, .22, .3, .33, .4, .41, .45)
ARCHS = list(itertools.product(NB201.OPS, repeat=6))
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs what the benchmarks recorded")
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


SMALL_TASK = Task(Noise("uniform", 0.1), tuple(Stage(5, (signal,)) for signal in (
    Signal("sin1d", 1.0, True, FREQUENCIES), Signal("gdot", 2.0, False, density=0.4), Signal("resize", 1.5))))
SMALL_RNN_TASK = RnnTask(Noise("uniform", 0.1), 7, *[(Signal("dot", 1.0, True, density=0.5),)] * 2)
images = functools.partial(gennas.synthetic_images, seed=0, batch=16)


def parse(*texts: str) -> list[Any]:
    return [TINY.parse(text) for text in texts]


def labels_file(path: Path, space: Any, archs: Sequence) -> Path:
    """Each more accurate than the one before."""
    path.write_text(json.dumps([[space.format(arch), float(i)] for i, arch in enumerate(archs)]))
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line here, which must end with this status -> stdout, stderr; its nb201 is tiny."""
    monkeypatch.setitem(search_spaces.SPACES, "nb201", lambda **sizes: NB201(**sizes | {"width": 4, "cells": 1}))

    def call(*words, status: int = 0) -> tuple[str, str]:
        try:
            code = gennas.main(["--space", "nb201", "--steps", "2", "--workers", "1", *map(str, words)]) or 0
        except SystemExit as stop:
            code = stop.code
        assert code == status, capsys.readouterr().err
        return capsys.readouterr()
    return call


@pytest.fixture
def result(run):
    """Runs a command line that must succeed -> what --json says, without the seconds."""
    return lambda *words: timeless(run(*words, "--json")[0])


@pytest.fixture
def refused(run):
    """Runs a command line that must end with exit status 2 and one line, which has the wanted words."""
    def call(wanted: Sequence[str], *words) -> None:
        stdout, stderr = run(*words, status=2)
        assert stdout == "" and stderr.count("\n") == 1, stderr
        assert len(stderr) < 400 and all(text in stderr for text in wanted), stderr
    return call


def timeless(stdout: str) -> dict[str, Any]:
    return {name: value for name, value in json.loads(stdout.splitlines()[-1]).items() if name != "seconds"}


# ----------------------------------------------------------------------------------------------- signal bases
@pytest.mark.parametrize("basis, waves", [
    (gennas.sin1d, [(f, 0) for f in FREQUENCIES] + [(0, f) for f in FREQUENCIES]),
    (gennas.sin2d, [(sign * f, g) for sign in (1, -1) for f in FREQUENCIES for g in FREQUENCIES])])
def test_waves(basis, waves):
    """Of 32 maps of each wave some are drawn, without replacement; positions count from 1."""
    rng, maps = rng_of(1), basis(rng_of(1), (2, 20, 8, 6), FREQUENCIES)
    keys, phases = torch.rand(2, 32 * len(waves), generator=rng), torch.rand(2, 20, 1, 1, generator=rng)
    fy, fx = torch.tensor(waves)[keys.argsort(descending=True)[:, :20] // 32].movedim(-1, 0)[..., None, None]
    y, x = torch.arange(1, 9)[:, None], torch.arange(1, 7)
    assert_close(maps, torch.sin(2 * math.pi * (fy * y + fx * x + phases)))


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
    rows, columns = ([3, 2, 1, 0, *range(n), *range(n - 1, n - 5, -1)] for n in (8, 6))  # d c b a | a b c d | d c b a
    mirrored = gennas.dot(rng_of(5), shape, density, least=1)[:, :, rows][..., columns]
    gaussian = torch.exp(-torch.arange(-4, 5) ** 2 / 2)
    blurred = F.conv2d(mirrored.view(6, 1, 16, 14), gaussian.outer(gaussian)[None, None]).view(shape)
    assert_close(gennas.gdot(rng_of(5), shape, density), blurred / blurred.abs().amax((2, 3), keepdim=True))


def test_resize():
    small, colours = images()[:, :, ::4, ::4], torch.randint(0, 3, (7,), generator=rng_of(2))
    expected = 2 * (small[:, colours] - small.min()) / (small.max() - small.min()) - 1
    torch.testing.assert_close(gennas.resize(rng_of(2), (16, 7, 8, 8), images()), expected, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------------- task
def test_targets_are_sums_of_signals_that_do_not_depend_on_each_other():
    def targets(*stages: tuple[Signal, ...], seed: int = 4) -> list[Tensor]:
        return Task(SMALL_TASK.noise, tuple(Stage(5, signals) for signals in stages)).draw(images(), seed)

    own, shared = Signal("sin1d", 0.5, True, FREQUENCIES), Signal("dot", 2.0, False, density=0.5)
    both, first, none = targets((own, shared), (own,), ())
    assert both.shape == (16, 5, 8, 8) and not none.any()
    torch.testing.assert_close(targets((shared, own))[0], both)  # they do not depend on their place either
    rest = both - targets((own,))[0]
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    assert set(rest.abs().round(decimals=4).unique().tolist()) == {0, 2}
    assert not torch.equal(first[0], first[1]) and first.abs().max() <= 0.5
    assert not torch.equal(first, targets((own,))[0]) and not torch.equal(both, targets((own, shared), seed=5)[0])


def test_tasks_read_back_what_they_write():
    """And whatever the order of fields and the weights, equal signals have equal digests."""
    for name, known in gennas.TASKS.items():
        assert task_from_json(task_to_json(known)) == known == gennas.read_task(name), name
        assert all(target.isfinite().all() and target.std() > 0 for target in known.draw(images(), 0)), name
    weighted = replace(SMALL_TASK, weights={"log params": -1.0, "log loss": 2.0})
    assert task_from_json(task_to_json(weighted)) == weighted != SMALL_TASK
    data = json.loads(task_to_json(weighted).replace("1.0", "1").replace("2.0", "2"))
    data["stages"][0]["signals"][0] = dict(reversed(data["stages"][0]["signals"][0].items()))
    other = task_from_json(json.dumps(dict(reversed(data.items()))))
    assert other == weighted and task_digest(other) == task_digest(SMALL_TASK)
    assert task_digest(replace(SMALL_TASK, noise=Noise("uniform", 0.2))) != task_digest(other)


@pytest.mark.parametrize("place, value", [
    ("", []), ("", None), ("", {}), ("", [*range(100_000)]), (".surplus", 1), (".stages.0.surplus", 1), (".stages", []),
    (".noise", None), (".noise.kind", "pink"), (".noise.level", -1), (".noise.level", math.nan), (".stages.0", 3),
    *[(".stages.0.channels", value) for value in (0, 641, 8.0)], (".stages.0.signals", None), (".stages.0.signals", {}),
    (".stages.0.signals.0", "dot"), *[(".stages.0.signals.0.basis", value) for value in ("cos", [])],
    *[(".stages.0.signals.0.level", value) for value in ("1", None, -1)],
    *[(".stages.0.signals.0.frequencies", value) for value in ([0.1] * 9, [0.1] * 9 + [0.5], [], ["x"] * 10, None)],
    (".stages.0.signals.0.density", 0.5), (".stages.1.signals.0.density", 1.01),
    (".stages.0.signals.0.per_sample", "false"), (".stages.2.signals", [{"basis": "resize", "level": 1.0}] * 2),
    *[(".weights", value) for value in ({"loss": 1.0}, {"log loss": math.inf}, [1])],
], ids=lambda value: str(value)[:40])
def test_a_task_with_something_wrong(place, value):
    data = {"task": json.loads(task_to_json(SMALL_TASK))}
    *path, name = [int(step) if step.isdecimal() else step for step in f"task{place}".split(".")]
    functools.reduce(lambda part, step: part[step], path, data)[name] = value
    with pytest.raises(ValueError, match="^task: (?!.*not supported).{,240}$"):  # in our words, not Python's
        task_from_json(json.dumps(data["task"]))


# ----------------------------------------------------------------------------------------------------- images
def test_synthetic_images():
    a = images()
    assert a.shape == (16, 3, 32, 32) and torch.equal(a, images()) and not torch.equal(a, images(seed=1))
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
    mine = Scorer(TINY, steps=2, images=str(tmp_path / "a.npy"))
    assert mine(parse(RICH)) != scores_of(RICH) and mine.made_with()["images"].startswith("sha256 ")


# ------------------------------------------------------------------------------------------------- regression
class Linear:
    """A space whose taps are a 1x1 convolution of the image at three sides, to check the training by hand; the taps of
    "bad" are infinite, those of "constant" constant; "fails" cannot be built."""
    name, key, format = "linear", *[staticmethod(lambda arch: arch)] * 2
    sides, width, change = (32, 16, 8), 2, staticmethod(lambda taps: taps)

    def build(self, arch):
        if arch == "fails":
            raise ValueError("cannot be built")
        body = nn.Conv2d(3, self.width, 1)
        nn.init.constant_(body.bias, math.inf if arch == "bad" else 0)
        if arch == "constant":
            nn.init.zeros_(body.weight)
        body.forward = lambda x, conv=body.forward: self.change([F.interpolate(conv(x), size=n) for n in self.sides])
        return body


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_regression_by_hand(kind):
    """Three steps and the final loss written out: noise, heads, loss, momentum, weight decay."""
    task = replace(SMALL_TASK, noise=Noise(kind, 0.3))
    trained = Regression(task, images(), Settings(steps=3), seed=7)(Linear(), "a")
    with torch.random.fork_rng():
        torch.manual_seed(gennas.seed_of("weights", "linear", "a", 7))
        body = Linear().build("a")
        heads = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 5, 1)) for _ in range(3))
    parameters = [*body.parameters(), *heads.parameters()]
    velocity, expected = [torch.zeros_like(p) for p in parameters], []
    rng = rng_of(gennas.seed_of("noise", "linear", "a", 7))
    for step in range(4):
        noise = torch.empty(16, 3, 32, 32).to(memory_format=torch.channels_last)
        noise = noise.uniform_(-1, 1, generator=rng) if kind == "uniform" else noise.normal_(generator=rng)
        tap = body(images() + 0.3 * noise)[2]  # all three, resized
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
    """It depends neither on the order nor on the state of the global generators; threads take turns."""
    other = "[[4],[2,3],[0,1,3]]"
    torch.manual_seed(1)
    a, b = scores_of(RICH, other)
    torch.manual_seed(2)
    assert scores_of(other, RICH) == [b, a] and a != b
    assert scores_of(RICH, seed=1) != [a]
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: scores_of(RICH), range(8))] == [[a]] * 8


STATES = (torch.get_num_threads, torch.get_default_dtype, torch.get_default_device, torch.is_grad_enabled,
          torch.get_float32_matmul_precision, torch.is_inference_mode_enabled, lambda: torch.is_autocast_enabled("cpu"),
          lambda: torch.backends.cudnn.deterministic, lambda: torch.get_rng_state().tolist())


@pytest.mark.parametrize("setting, value, usual", [
    (lambda on, mode=torch.inference_mode(): mode.__enter__() if on else mode.__exit__(None, None, None), True, False),
    (torch.set_grad_enabled, False, True), (functools.partial(torch.set_autocast_enabled, "cpu"), True, False),
    (torch.set_default_dtype, torch.float64, torch.float32), (torch.set_default_dtype, torch.bfloat16, torch.float32),
    (torch.set_default_device, "meta", None), (torch.set_num_threads, 4, 1),
    (torch.set_float32_matmul_precision, "medium", "highest")])
def test_what_the_caller_has_set_changes_no_score(setting, value, usual):
    """It is put back, and the scorer that was made meanwhile can be used afterwards."""
    space, archs = NB201(cells=1), parse(RICH, "[[3],[3,2],[1,4,3]]")
    expected = Scorer(space, steps=1)(archs)
    setting(value)
    try:
        before, scorer = [state() for state in STATES], Scorer(space, steps=1)
        scores = scorer(archs[:1])
        assert [state() for state in STATES] == before
    finally:
        setting(usual)
    assert scores + scorer(archs[1:]) == expected


@pytest.mark.parametrize("n, c", [(40, 7), (12, 30), (9, 9), (16, 1)])
def test_ridge_loss(n, c):
    """Both forms give the loss of the normal equations' head, and the gradient of all of it differentiated."""
    features = torch.randn(n, c, generator=rng_of(n), dtype=torch.double, requires_grad=True)
    target = torch.randn(n, 5, generator=rng_of(c), dtype=torch.double)
    target -= target.mean(0)
    f = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-5).sqrt()
    head = torch.linalg.solve(f.T @ f + 0.3 * n * torch.eye(c, dtype=torch.double), f.T @ target)
    losses = gennas.ridge_loss(features, target, 0.3), F.mse_loss(f @ head, target) + 0.3 * head.square().sum() / 5
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, features)[0] for loss in losses))


@pytest.mark.parametrize("side", [1, 3, 8, 16])
@pytest.mark.parametrize("arch, width", [("a", 3), ("a", 300), ("constant", 3)])
def test_solved_heads_of_a_network(side, arch, width):
    """A tap that is smaller than the target has the target's means to regress; of a constant tap all of it is left."""
    space, task = Linear(), replace(SMALL_TASK, noise=Noise("uniform", 0))
    space.sides, space.width = [side] * 3, width
    body, small, expected = space.build(arch), min(side, 8), 0
    space.build = lambda arch: body
    trained = Regression(task, images(), Settings(steps=0, batch=4, ridge=0.1))(space, arch)
    for weight, tap, target in zip((0.25, 0.5, 1), body(images()[:4]), task.draw(images()[:4], 0, 4, 8)):
        maps = F.interpolate(tap, size=small), F.adaptive_avg_pool2d(target, small)
        f, y = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in maps)
        expected += weight * gennas.ridge_loss(f, y - y.mean(0), 0.1).item()
    assert trained.loss == pytest.approx(expected, rel=1e-4) and [len(curve) for curve in trained.losses] == [1, 1, 1]


def test_a_stage_that_does_not_count_and_small_images():
    settings = Settings(steps=4, ridge=0.1, batch=4, side=16, stage_weights=(0, 2, 0))
    regression = Regression(SMALL_TASK, images(), settings)
    none, curve, nothing = (trained := regression(TINY, *parse(RICH))).losses
    assert none == nothing == [] and len(curve) == 5 and trained.loss == pytest.approx(2 * curve[-1])
    plain = F.interpolate(images()[:4], size=16, mode="bilinear", antialias=True)
    assert torch.equal(regression.input, plain.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_other_than_three_square_maps_of_the_same_sides_are_refused(ridge):
    space, regression = Linear(), Regression(SMALL_TASK, images(), Settings(steps=0, ridge=ridge))
    for change, came in [(lambda taps: taps[0], "a tensor"), (lambda taps: taps + taps[:2], r"\[\(.*"),
                         (lambda taps: dict(zip("abc", taps)), "a dict"),  # of create_feature_extractor
                         (lambda taps: [tap.flatten(2).mT for tap in taps], r"\[\(\d+, 1024, 2\).*"),  # tokens
                         (lambda taps: [tap.movedim(1, 3) for tap in taps], r"\[\(\d+, 32, 32, 2\).*"),
                         (lambda taps: [tap[..., ::2, ::2] for tap in taps], r"\[\(\d+, 2, 16, 16\).*")]:
        space.change = change
        with pytest.raises(ValueError, match=rf"feature maps: expected three \(B, C, H, H\), .*, not {came}"):
            regression(space, "a")
        regression(Linear(), "a")


def test_no_step_waits_for_the_device():
    for ridge in (None, 0.1):
        calls = []
        for steps in (1, 3):
            with torch.profiler.profile() as profile:
                Regression(SMALL_TASK, images(), Settings(steps=steps, ridge=ridge))(TINY, *parse(RICH))
            counts = {event.key: event.count for event in profile.key_averages()}
            assert counts["aten::convolution_backward"] % steps == 0
            calls.append([counts.get(name, 0) for name in ("aten::item", "aten::_local_scalar_dense")])
        assert calls[0] == calls[1]  # of each step none


# ------------------------------------------------------------------------------------------------------ score
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
    x = rng.permuted(np.tile([[-1.5], [-1], [-0.5], [0.5], [1], [1.5]], (5, 2)), axis=0)  # of median 0, deviation 1
    x[x.argmax(0), [0, 1]] = 9, 7
    networks = [Trained(math.exp(a), [[], [math.exp(2 * b), 1.0]], 7) for a, b in x]
    x = x.clip(max=4)  # as far as one network counts
    x -= x.mean(0)
    values = list(-2 * x[:, 0] + 0.5 * x[:, 1] + rng.normal(size=30))
    y = gennas.ranks(np.negative(values))
    y = (y - y.mean()) / y.std()

    def fit(rows) -> np.ndarray:
        """Slopes and intercept of a ridge regression; the intercept bears no penalty."""
        a = np.c_[x, np.ones(30)][rows]
        return np.linalg.inv(a.T @ a + np.diag([0, 20, 0])) @ a.T @ y[rows]

    weights, rho = gennas.fit_weights(networks, values)
    assert list(weights) == ["log loss", "log loss 2 before"]  # the others are constant or absent
    np.testing.assert_allclose(list(weights.values()), fit(slice(None))[:2] / [1, 2], rtol=1e-3)
    left_out = [-np.array([*x[i], 1]) @ fit(np.arange(30) != i) for i in range(30)]
    assert rho == pytest.approx(gennas.spearman(left_out, values)) and rho > 0.6
    diverged = [*networks, Trained(math.nan, [[], [math.nan] * 2], 7)]
    assert gennas.fit_weights(diverged, [*values, -99.0])[1] > gennas.fit_weights(diverged, [*values, 99.0])[1]
    assert math.isnan(gennas.fit_weights(networks[:2], values[:2])[1])


# ------------------------------------------------------------------------------------------- rank correlation
def test_rank_correlations_by_definition_and_the_interval():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 15), rng.integers(0, 6, 15)  # many ties
        place_a, place_b = ([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v] for v in (a, b))
        assert gennas.spearman(a, b) == pytest.approx(np.corrcoef(place_a, place_b)[0, 1])
        x, y = (np.sign(np.subtract.outer(v, v)).ravel() for v in (a, b))  # of each pair its order
        assert gennas.kendall(a, b) == pytest.approx(x @ y / math.sqrt((x @ x) * (y @ y)))
    for statistic in (gennas.spearman, gennas.kendall):
        assert statistic([1, 2, 3], [10, 20, 30]) == pytest.approx(1) == statistic([1, 2, -math.inf], [2, 3, 1])
        for undefined in ([1, 1, 1], [math.nan, 2, 3]):
            assert math.isnan(statistic(undefined, [3, 1, 2])) and math.isnan(statistic([3, 1, 2], undefined))
    values, noise = np.random.default_rng(1).normal(size=(2, 100))
    low, high = gennas.spearman_interval(values + noise, values)
    assert low < gennas.spearman(values + noise, values) < high  # by theory 4 (1 - rho^2) / 10 apart
    assert 0.05 < high - low < 0.35 and gennas.spearman_interval(values, values) == pytest.approx((1, 1))
    assert all(map(math.isnan, gennas.spearman_interval(values[:9], values[:9])))  # which tell nothing of others


# -------------------------------------------------------------------------------------------------- evolution
@pytest.mark.parametrize("batch, places, queues, found, sizes", [
    # 1 2 3: of 1, 2 the better is 2 -> 12; 2 3 12: of 2, 12: 12 -> 22; 3 12 22: of 12, 22: 22 -> 32; 12 22 32: 22 -> 32
    (1, [(0, 1), (0, 2), (1, 2), (0, 1)], [[1, 2, 3], [2, 3, 12], [3, 12, 22], [12, 22, 32]],
     [1, 2, 3, 12, 22, 32, 32], [3, 1, 1, 1, 1]),
    (2, [(0, 1), (1, 2), (0, 1)], [[1, 2, 3], [1, 2, 3], [3, 12, 13]], [1, 2, 3, 12, 13, 22], [3, 2, 1]),
])
def test_evolution_by_hand(batch, places, queues, found, sizes):
    """Population 3, tournament 2; candidates are numbers, a child is its parent + 10, the loss the distance to 25."""
    initial, scripted, asked, seen = iter([1, 2, 3]), iter(places), [], []

    def sample(queue, count):
        seen.append([candidate for candidate, _ in queue])
        return [queue[place] for place in next(scripted)][:count]

    history = gennas.regularized_evolution(
        lambda rng: next(initial), lambda parent, rng: parent + 10,
        lambda candidates: asked.append(len(candidates)) or [abs(candidate - 25) for candidate in candidates],
        SimpleNamespace(sample=sample), population=3, tournament=2, cycles=len(places), batch=batch)
    assert seen == queues and asked == sizes
    assert history == [(candidate, abs(candidate - 25)) for candidate in found]


def test_finale_by_hand():
    """The old scores choose who is scored anew, each network once; the new ones alone rank them."""
    drawn, asked = iter("aBcbDA"), []
    old, new = dict(a=3.0, b=2.0, c=9.0, d=4.0), dict(b=7.0, a=math.inf, d=6.0)
    history, best = gennas.search_architecture(
        lambda rng: next(drawn), None, str.lower, lambda archs: [old[arch.lower()] for arch in archs],
        lambda archs: asked.append(archs) or [new[arch.lower()] for arch in archs], random.Random(0), finalists=3,
        population=6, cycles=0)
    assert [arch for arch, _ in history] == [*"aBcbDA"] and asked == [["B", "a", "D"]]
    assert best == [("D", 6), ("B", 7), ("a", math.inf)]


@pytest.mark.parametrize("kind, draw, mutate", [
    (Task, gennas.random_task, gennas.mutate_task), (RnnTask, gennas.random_rnn_task, gennas.mutate_rnn_task)])
def test_random_and_mutated_tasks(kind, draw, mutate):
    """Draws are valid and read back; each field has the chances of the paper's task space; mutation redraws a fifth."""
    def fields(task: Any) -> list:
        """What a mutation draws again: noise, channels, of each part each basis."""
        parts = [{signal.basis: signal for signal in signals} for signals, _ in task.parts(1, 1).values()]
        return [task.noise, *([stage.channels for stage in task.stages] if kind is Task else [task.dimension]),
                *[part.get(basis) for part in parts for basis in gennas.BASES if kind is Task or basis != "resize"]]

    rng = random.Random(0)
    tasks = [draw(rng) for _ in range(1000)]
    children = [mutate(parent, rng) for parent in tasks]
    assert all(task_from_json(task_to_json(task)) == task and type(task) is kind for task in tasks + children)
    for values, redrawn in zip(zip(*map(fields, tasks)), zip(*map(fields, children))):
        assert 110 < sum(old != new for old, new in zip(values, redrawn)) < 260  # equal ones may be drawn again
        signals = [value for value in values if isinstance(value, Signal)]
        if not signals:
            assert set(values) in (set(range(16, 97, 16)), {
                Noise(noise, level / 10) for noise in ("gaussian", "uniform") for level in range(10)})
            continue
        assert 430 < len(signals) < 570 and {signal.level for signal in signals} == {n / 10 for n in range(5, 30)}
        own = [signal.per_sample for signal in signals if signal.per_sample is not None]
        assert all(own) if kind is RnnTask or not own else 0.4 < sum(own) / len(own) < 0.6
        f = [f for signal in signals for f in signal.frequencies or ()]
        assert not f or 0.23 < sum(f) / len(f) < 0.27 and min(f) < 0.02 and max(f) > 0.48
    assert all(child != parent for child, parent in zip(children, tasks))


# ----------------------------------------------------------------------------------------------------- scorer
def test_each_network_is_trained_once(monkeypatch):
    twin, same, other = parse("|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|skip_connect~2|",
                              "|nor_conv_3x3~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|", RICH)
    calls, drawn, draw = [], [], Regression.draw_tensors
    monkeypatch.setattr(Regression, "__call__", lambda self, space, arch: calls.append((self.task, self.seed, arch)) or
                        Trained(float(len(calls)), [[1.0]], 1))
    monkeypatch.setattr(Regression, "draw_tensors", lambda self, images: drawn.append(self.seed) or draw(self, images))
    scorer, combo = Scorer(TINY, seeds=2), gennas.COMBO
    logs = np.log([1 + 1e-9, 2, 3, 4])
    assert scorer([twin, same, other]) == pytest.approx([logs[:2].mean(), logs[:2].mean(), logs[2:].mean()])
    assert [seed for _, seed, _ in calls] == [0, 1, 0, 1] and {arch for *_, arch in calls[:2]} <= {twin, same}
    assert scorer([other, other]) == pytest.approx([logs[2:].mean()] * 2) and len(calls) == 4
    assert scorer([other], combo) == pytest.approx([np.log([5, 6]).mean()]) and calls[-1][0] == combo
    weighted = replace(combo, weights={"log loss": -3.0})  # needs no training
    assert scorer([other], weighted) == pytest.approx([-3 * np.log([5, 6]).mean()]) and len(calls) == 6
    assert [trained.loss for trained in scorer.trained(other, combo)] == [5, 6] and scorer([]) == []
    for arch in (twin, other):
        scorer([arch], seeds=range(9, 49))
    assert drawn == [0, 1, 0, 1, *range(9, 49)]  # targets are drawn once for a task and a seed


def test_what_is_done_is_recorded_before_an_error_is_raised(monkeypatch):
    """Here the pool is done with all items before the first result is asked for, and one rank has them all."""
    class Pool(ThreadPoolExecutor):
        def submit(self, work, item) -> Future:
            wait([future := super().submit(lambda: next(scorer.train_here([item])))])
            return future

    monkeypatch.setattr(gennas, "distributed", SimpleNamespace(
        get_rank=lambda: 0, get_world_size=lambda: 1, broadcast_object_list=lambda values: None,
        gather_object=lambda share, shares: shares.append(share) or shares.pop(0)))
    good = [*map(str, range(7))]
    for train in (functools.partial(gennas.train_in_pool, Pool()), lambda items: gennas.train_in_ranks(scorer, items)):
        scorer, scorer.train = Scorer(Linear(), steps=0), train
        with pytest.raises(ValueError, match="cannot be built"):
            scorer([*good, "fails"])
        assert sorted(key for *_, key in scorer.record.known) == good


def test_weights_and_presets():
    """All weights of a preset hold for the family's own task and steps; else the loss and the size count. With a
    recurrent network the loss counts alone."""
    assert all({*preset.weights} <= {*gennas.TERMS} for table in gennas.PRESETS.values() for preset in table.values())
    assert Scorer("darts", "paper").own_task == "darts" and Scorer("nb201", "paper").settings == Settings()
    scorer, size = Scorer("nb201"), {"log loss": 1.0, "log params": -0.07}
    scorer.preset = scorer.preset._replace(weights=size | {"log loss 2 before": 0.5})
    assert scorer.weights(scorer.task) == scorer.preset.weights and scorer.weights(gennas.COMBO) == size
    assert scorer.weights(replace(gennas.COMBO, weights={"log loss": 2.0})) == {"log loss": 2.0}
    scorer.settings = replace(scorer.settings, steps=3)
    assert scorer.weights(scorer.task) == size
    Named = type("Named", (NB201,), {"name": "resnet"})  # a space of one's own, whatever its name
    assert Scorer(Named()).preset == gennas.PRESETS["fast"][""]
    recurrent = Scorer(type("Recurrent", (NBNLP,), {})())
    assert recurrent.weights(recurrent.task) == {"log loss": 1.0} and recurrent.preset == Scorer(Named()).preset


def test_a_diverged_network_is_the_last(tmp_path):
    """Trained, then read from its record, which is JSON, without NaN and infinity."""
    for _ in range(2):
        good, bad = Scorer(Linear(), steps=2, out=str(tmp_path / "out.jsonl"))(["good", "bad"])
        assert math.isfinite(good) and bad == math.inf and gennas.spearman([-good, -bad], [2, 1]) > 0.99
        text = (tmp_path / "out.jsonl").read_text()
        assert text.count("\n") == 3 and "null" in text and "NaN" not in text and "Infinity" not in text


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, found in ((None, ["cuda:0", "cuda:1"]), ("cuda", ["cuda:0", "cuda:1"]), ("cuda:1", ["cuda:1"])):
        assert gennas.find_devices(name) == found and set(gennas.find_devices("cpu")) == {"cpu"}
    with pytest.raises(ValueError, match="--device: expected cpu or cuda:0 or cuda:1, not 'cuda:2'"):
        gennas.find_devices("cuda:2")


# ----------------------------------------------------------------------------------------------------- record
def recorded(out: Path) -> dict[tuple, list]:
    """The trainings of a file, each of which must stand there once."""
    lines = [json.loads(line) for line in out.read_text().split("\n")[1:] if line]
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
    task.write_text(task_to_json(replace(gennas.TASKS["nb101"], weights={"log params": 1.0})))
    weighted = result(*command, "--task", task)["results"]
    params = sum(p.numel() for p in TINY.build(*parse(RICH)).parameters())
    assert weighted[0]["score"] == pytest.approx(math.log(params))
    assert out.read_text() == content
    result(*command, "--seeds", 3)
    assert len(recorded(out)) == 6
    out.write_text(out.read_text()[:-9])
    stderr = run(*command, "--seeds", 3)[-1]
    assert "incomplete last line is dropped" in stderr and len(recorded(out)) == 6
    head, *lines = (content := out.read_text()).splitlines(keepends=True)
    for number, changed in ((8, [head, *lines, head, *lines]), (3, [head, lines[0], lines[1][:-1], *lines[2:]]),
                            (2, [head, lines[0][:-9] + "\n", *lines[1:]])):
        out.write_text("".join(changed))  # two files joined, two trainings on a line, a torn line
        refused([f"out.jsonl, line {number}: not a training"], *command)
    out.write_text(content.replace("\n", "\n\n"))
    assert result(*command, "--seeds", 3) and len(recorded(out)) == 6
    for option, value, named in (("--steps", 1, "steps"), ("--task", "combo", "task"), ("--preset", "paper", "sizes")):
        refused([f"out.jsonl: it has {named} ", "another --out file"], *command, option, value)
    for foreign in ("my notes\n", out.read_text().split("\n")[0]):  # and a line of settings that is torn
        (tmp_path / "notes.txt").write_text(foreign)
        refused(["notes.txt: the first line", "another --out file"], *command[:-1], tmp_path / "notes.txt")
        assert (tmp_path / "notes.txt").read_text() == foreign and len(recorded(out)) == 6


# ----------------------------------------------------------------------------------------------- command line
def plot_to(path: Path) -> tuple:
    """The words that ask for a plot, where there is what draws it."""
    return ("--plot", path) if importlib.util.find_spec("matplotlib") else ()


def test_search(run, result, tmp_path):
    """The finale has seeds of its own, as many as the search; without it the answer is what the search found."""
    out, plot = tmp_path / "out.jsonl", plot_to(tmp_path / "search.png")
    settings = "--steps", 0, "--seed", 4, "--seeds", 3
    command = "--population", 4, "--tournament", 2, "--cycles", 3, *settings, "--finalists", 3
    found = result(*command, "--out", out, *plot)
    finalists, unique = found["finalists"], found["unique"]
    assert found.keys() == set("mode space task preset images arch score params evaluated unique finalists".split())
    assert found["evaluated"] == 7 >= unique and result(*command) == found and finalists[0].items() <= found.items()
    assert found["params"] == NB201().params(NB201().parse(found["arch"]))
    assert result(*command, "--seed", 5)["score"] != found["score"]
    assert not plot or plot[1].stat().st_size > 5000
    lines = run(*command)[0].splitlines()
    assert found["arch"] == lines[0] and found["arch"] in lines[5] and len(lines) == 5 + 3
    assert finalists == sorted(finalists, key=lambda finalist: finalist["score"]) and len(finalists) == 3
    again = result("--mode", "score", *[one["arch"] for one in finalists], *settings, "--seed", 1_000_012)
    assert [one["score"] for one in again["results"]] == [one["score"] for one in finalists]

    assert Counter(seed for _, seed, _ in recorded(out)) == {
        **dict.fromkeys((4, 5, 6), unique), **dict.fromkeys(range(1_000_012, 1_000_015), 3)}
    archs = {json.loads(line)["arch"] for line in out.read_text().splitlines()[1:]}
    plain = result(*command[:-1], 0, "--out", out)
    scored = result("--mode", "score", *archs, *settings)["results"]
    assert plain["score"] == min(one["score"] for one in scored) and plain["finalists"] == []
    assert len(result(*command[:-2])["finalists"]) == min(10, unique)


def test_search_within_limits(result, monkeypatch, tmp_path):
    """Where all mutants exceed a limit, a random network takes the child's place."""
    command = "--population", 3, "--tournament", 2, "--cycles", 1, "--steps", 0, "--finalists", 0
    monkeypatch.setattr(NB201, "mutate", lambda self, arch, rng: ("nor_conv_3x3",) * 6)
    for name, limit in (("params", 600_000), ("flops", 200_000_000)):
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
    assert first.keys() == {"arch", "score", "params", "seconds"} and third["params"] == NB201().params(*parse(DEAD))


def test_correlate(result, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(NB201, "params", lambda self, arch: arch.count("nor_conv_3x3"))
    archs = random.Random(7).sample(ARCHS, 120)
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
    refused(["scores of 2 networks are all the same"], "--mode", "correlate", "--labels", labels, "--quiet")


def test_search_task(run, result, tmp_path):
    """What it tells of the task that it found is what `correlate` says of it, on labels that it did not see."""
    archs = random.Random(1).sample(ARCHS, 16)
    labels, out = labels_file(tmp_path / "all.json", TINY, [*archs[:8], archs[0], *archs]), tmp_path / "out.jsonl"
    command = "--mode", "search-task", "--labels", labels, "--limit", 9, "--steps", 0
    found = result(*command, "--population", 5, "--tournament", 2, "--cycles", 2, "--out", out,
                   *plot_to(tmp_path / "x.png"))
    seen, tasks = {TINY.key(arch) for arch in archs[:8]}, {task for task, *_ in recorded(out)}
    assert found["evaluated"] == 7 == len(tasks) and found["n"] == len(seen)
    assert tasks > {task_digest(task) for task in gennas.TASKS.values() if isinstance(task, Task)}

    unseen = [[TINY.format(arch), 9 + i] for i, arch in enumerate(archs) if TINY.key(arch) not in seen]
    for name, content in {"task": found["task"], "rest": unseen}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    again = result("--mode", "correlate", "--labels", tmp_path / "rest.json", "--task", tmp_path / "task.json",
                   "--steps", 0)
    assert found["spearman_held_out"] == pytest.approx(again["spearman"]) and found["n_held_out"] == again["n"]

    command += "--task", "combo", "--cycles", 0
    fitted = result(*command)
    stdout, stderr = run(*command, "--quiet")
    task = task_from_json(stdout)  # the file of a task
    assert "by the weights as they were, since fitted ones reach -0." in stderr
    assert f"; {fitted['spearman_held_out']:.3f} on {found['n_held_out']} others" in stderr
    assert json.loads(task_to_json(task)) == fitted["task"] and fitted["evaluated"] == 1
    assert task_digest(task) == task_digest(gennas.COMBO)

    steps = "--steps", gennas.PRESETS["fast"]["nb201"].settings.steps  # the preset's weights hold: none beats them here
    scored = result("--mode", "score", *map(TINY.format, archs[:8]), *steps)["results"]
    labels.write_text(json.dumps([[one["arch"], -one["score"]] for one in scored]))
    kept = result("--mode", "search-task", "--labels", labels, "--task", "nb101", "--cycles", 0, *steps)
    assert kept["spearman"] == pytest.approx(1) and "weights" not in kept["task"]


def test_show(run, refused, monkeypatch, tmp_path):
    stdout, stderr = run("--mode", "show", "--task", "darts", *plot_to(tmp_path / "task.png"))
    assert task_from_json(stdout) == gennas.TASKS["darts"]
    assert "gennas: score = +1 log loss -0.07 log params; the weights were chosen on labels\n" in stderr
    assert not plot_to(tmp_path) or (tmp_path / "task.png").stat().st_size > 5000
    monkeypatch.setattr(gennas, "find_spec", lambda name: None)
    refused(["pip install matplotlib"], "--mode", "show", "--plot", "x.png")


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    for name, content in {"text.json": "words", "text.npz": "words", "task.json": task_to_json(SMALL_TASK).replace(
            "0.1", "99", 1), "other.json": json.dumps([[RICH, 1], ["21012", 2]])}.items():
        (folder / name).write_text(content)
    noise = np.random.default_rng(0).random((20, 32, 32, 3))
    for name, array in {"grey": noise[..., 0], "few": noise[:3], "range": noise * 255, "flat": noise * [0, 1, 1],
                        "nan": noise + [0, 0, math.nan]}.items():
        np.save(folder / f"{name}.npy", array)
    torch.save(noise, folder / "x.pt")
    return folder


@pytest.mark.parametrize("words, wanted", [  # words of the command line, what the message must say
    ("--space nb999", ["nb999", "nb201"]), ("--nonsense", ["nonsense"]), ("--steps -1", ["steps", "from 0 up"]),
    ("--seeds 0", ["1 up"]), ("--population 5 --tournament 10", ["tournament 10", "at most the population, 5"]),
    ("abc", ["ARCH belongs to --mode score"]), ("--limit 3", ["limit belongs to --mode correlate or search-task"]),
    ("--space nb101 --mode search-task", ["--labels FILE is needed", "nb101 has no labels of its own"]),
    ("--mode score", ["--mode score needs an ARCH"]), ("--mode score abc", ["abc", "nb201", "nor_conv_3x3"]),
    ("--mode correlate --limit 1", ["1 labels", "two different values"]), ("--task guess", ["guess", "combo"]),
    ("--mode correlate --labels absent.json", ["absent.json", "No such file"]),
    ("--mode correlate --labels other.json", ["other.json, entry 1", "nb201"]), ("--task text.json", ["text.json"]),
    ("--task task.json", ["task.json", "level", "0 to 10", "99"]), ("--task nlp", ["nlp", "one like nb101"]),
    ("--images grey.npy", ["grey.npy", "(20, 32, 32)"]), ("--images few.npy", ["few.npy", "at least 8"]),
    ("--images range.npy", ["values from 0", "to 254", "from 0 to 1"]), ("--images flat.npy", ["same everywhere"]),
    ("--images text.npz", ["images text.npz"]), ("--images x.pt", ["x.pt: shape"]), ("--images nan.npy", ["from nan"]),
    ("--space nbnlp --max-flops 9", ["nbnlp counts no operations"]), ("--device cuda", ["no GPU here", "cuda"]),
    ("--max-params 9", ["none of 60 random networks is within --max-params 9"]), ("--out .", ["directory"]),
    ("--plot absent/x.png", ["absent/x.png", "No such file"]), ("--plot x.docx", ["docx", "png"]),
    ("--plot x.svg --out x.svg", ["x.svg", "another than --out"]),
], ids=str)
def test_errors_are_one_line_and_exit_2(refused, wrong_files, monkeypatch, words, wanted):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(wrong_files)
    refused(wanted, *shlex.split(words))


@pytest.mark.parametrize("right, wrong, wanted", [  # a line of the README's space, what stands there, what is told
    ("class Plain", "class Fancy", "no 'Plain' in"), ("class Plain:", "class Plain:\n    task = 'guess'", "guess"),
    ("return self.format(arch)", "return arch", "key: expected a string"), ("def params", "def size", "has no method"),
    ("self.format(arch)", "'same'", "mutate returned"), ("i = rng.randrange(3)", "return arch", "mutate returned"),
    ('",".join', '"7,7,".join', "in mine.py, line 30\n"), ("i = rng.randrange(3)", "raise ValueError", "ValueError()"),
    ("first, second, third = arch", "raise ValueError('deep')", "deep, in mine.py, line 21\n"),
    ("class Plain:", "class Plain:\n    labels = [('1,3,5', 1), ('1,3,7', 2)]", "(expected 3), in mine.py, line 22\n"),
    ("Stages(", "Stages(nn.Sequential(nn.Threshold(1e9, float('inf'))), ", "networks diverged")], ids=str)
def test_a_wrong_space_is_told_in_one_line(refused, tmp_path, right, wrong, wanted):
    (tmp_path / "mine.py").write_text(PLAIN.replace(right, wrong))
    refused([wanted], "--space", tmp_path / "mine.py:Plain", "--quiet", *(
        ["--mode", "correlate"] if "labels" in wrong else ["--population", 3, "--cycles", 0]))


# ---------------------------------------------------------------------- search spaces: what their tests share
norm = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)  # a fresh one in training
average = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)


def conv_norm(x: Tensor, layer: nn.Module, **options: int) -> Tensor:
    """The first convolution of `layer`, then a fresh batch norm."""
    weight = next(module for module in layer.modules() if isinstance(module, nn.Conv2d)).weight
    return norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2, **options))


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
DARTS_NET = {"genotype": eval(DARTS)._asdict(), "width": 16, "depth": 20, "aux": False}
SKIPS = [("skip_connect", 1)] * 8
CHAIN = tuple(("skip_connect", i // 2) for i in range(10))  # of five nodes, of which the last two feed no other
MATRIX, CELL_OPS = [[0, 1, 1], [0, 0, 1], [0, 0, 0]], ["input", "maxpool3x3", "output"]
FULL = [[int(j > i) for j in range(7)] for i in range(7)]


# ------------------------------------------------------------------------------------------------ every space
@pytest.mark.parametrize("name", search_spaces.SPACES)
def test_every_space(name):
    """Round trip, mutation; of a small one three taps at 32, 16 and 8, or a sequence; a step of a regression."""
    space, rng, recurrent = search_spaces.get(name), random.Random(8), name == "nbnlp"
    assert space.name == name and space.task in gennas.TASKS
    for _ in range(12):
        arch = space.random(rng)
        assert hash(arch) is not None and space.parse(space.format(arch)) == arch
        child = space.mutate(arch, rng)
        assert space.key(child) != space.key(arch) and space.parse(space.format(child)) == child
        assert not recurrent or space.valid(child)
    space = search_spaces.get(name, **{"widths": (6, 8, 6)} if recurrent else {
        "width": 6} if name.startswith("nb") else {"shrink": 8})
    if not name.startswith("nb"):
        arch = arch._replace(**{"depth": 4} if isinstance(space, Cells) else {"ds": (1,) * 5})
    x = torch.randn(2, 5, 6) if recurrent else torch.randn(2, 3, 32, 32)
    outputs, sides = space.build(arch)(x), [16, 8, 4] if name == "resnet-in" else [32, 16, 8]  # the last three stages'
    assert outputs.shape == x.shape if recurrent else [tap.shape[2:] for tap in outputs] == [(n, n) for n in sides]
    kind, task = (RnnRegression, SMALL_RNN_TASK) if recurrent else (Regression, SMALL_TASK)
    regression = kind(task, images(batch=4), Settings(steps=1, batch=4))
    trained = regression(space, arch)
    assert [len(curve) for curve in trained.losses] == [2] * (1 if recurrent else 3)
    assert np.isfinite(trained.losses).all() and trained == regression(space, arch) and trained.params > 0


@pytest.mark.parametrize("name, spellings", {
    "nb201": [RICH, f"\n {RICH[:20]}\n{RICH[20:]} ", "[[3],[2,4],[1,3,2]]", "[[3], [2, 4],\n[1, 3, 2]]", f'"{RICH}"',
              f"Structure(4 nodes with {RICH})", f"12:30 best arch is [{RICH}]"],
    "nb101": [json.dumps([MATRIX, CELL_OPS]), str((MATRIX, CELL_OPS)), json.dumps({"matrix": MATRIX, "ops": CELL_OPS}),
              f"{{'module_adjacency': array({MATRIX}, dtype=int8), 'module_operations': {CELL_OPS}}}",
              f"[np.array({MATRIX}), ['input', np.str_('maxpool3x3'), 'output']]"],
    "nbmacro": ["01201201", "[0, 1, 2, 0, 1, 2, 0, 1]", "'01201201'"],
    "darts": [DARTS, json.dumps(DARTS_NET | {"width": 16.0}), f"DARTS_V2 = {DARTS}\n", f"01/02 genotype = {DARTS}",
              f"Genotype({NORMAL}, range(2, 6), {REDUCE}, list(range(2, 6)))", DARTS.replace(NORMAL, NESTED),
              re.sub(r"'(\w+)', (\d)", r"np.str_('\1'), np.int64(\2)", DARTS),
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
    *[("nb201", f"{RICH}{end} 91.2", "text after the architecture: '91.2'") for end in ("", ")")],
    ("nb201", RICH[:-2], "|nor_conv_3x3~0|+|"),
    ("nb201", RICH.replace("nor_conv_1x1", "noise"), "op 'noise'"), ("nb201", "[[1],[2,3],[1,2,5]]", "op '5'"),
    ("nb101", [FULL, ["input", *["maxpool3x3"] * 5, "output"]], "21 edges, at most 9"),
    ("nb101", [MATRIX, ["input", "noise", "output"]], "op 'noise'"), ("nb101", [[], ["input"]], "1 vertices"),
    ("nb101", [[[0, 0], [0, 0]], ["input", "output"]], "no path"), ("nb101", "[[[0, 1], [0, 0]], [", "no closing"),
    ("nb101", [[[0, 1], [1, 0]], ["input", "output"]], "value 1 in row 1, column 0, expected one of 0"),
    ("nb101", [MATRIX, CELL_OPS[1:]], "expected 2 x 2"), ("nb101", [MATRIX, ["input"] * 3], "'input' to 'input'"),
    ("nbmacro", "", "0 digits"), ("nbmacro", "0120120", "7 digits, expected 8"), ("nbmacro", "01201203", "digit '3'"),
    ("nbmacro", "01201201 91.2", "text after the architecture: '91.2'"), ("darts", "Genotype()", "no 'normal'"),
    ("darts", DARTS.replace("skip_connect', 2", "noise', 2"), "op 'noise' in reduce"),
    ("darts", DARTS.replace("dil_conv_3x3', 2", "dil_conv_3x3', 5"), "input 5 of node 5 in normal, expected one of 0"),
    ("enas", str(Genotype(CHAIN, (2, 3, 4, 5, 6), CHAIN, (5, 6))), "normal_concat [2, 3, 4, 5, 6], expected [5, 6]"),
    ("darts", DARTS.replace("[2, 3, 4, 5]", "range(print(1))"), "neither JSON nor Python: 'print(1)'"),
    ("pnas", DARTS, "8 (op, input) in normal, expected 10"), ("darts-in", DARTS_NET | {"width": 36}, "width 36"),
    ("darts-fix", DARTS_NET | {"depth": 8}, "depth 8, expected one of 20"), ("resnet", NET | {"ss": [1]}, "ss [1]"),
    ("resnext-a", NET, "block_type 'res_basic_block'"), ("resnext-a", BOTTLENECKS | {"ds": [1, 2]}, "2 ds, expected 4"),
    ("resnext-a", BOTTLENECKS | {"ws": [8, 48, 32, 32]}, "ws 48 of stage 1, expected one of (16, "),
    ("resnext-a", BOTTLENECKS | {"ws": [1, 16, 32, 32]}, "ws 1 of stage 0"),
    ("resnext-a", BOTTLENECKS | {"bot_muls": [math.nan, 0.5, 0.5, 1]}, "bot_muls nan of the stem"),
    *[("nbnlp", RECIPE | change, wrong) for change, wrong in [
        (recipe(h_new_3="activation_tanh node_1"), "h_new_3"), (recipe(node_1="linear x x"), "inputs x, x of node_1"),
        (recipe(x="linear x h_prev_1"), "node 'x'"), (recipe(node_3="activation_sigm x"), "input 'x' of node_3"),
        (recipe(node_2="linear h_prev_0 node_3"), "cycle"), (recipe(node_3="noise node_2"), "op 'noise' of node_3"),
        (recipe(node_4="elementwise_prod node_3 h_prev_2"), "input 'h_prev_2' of node_4")]],
], ids=lambda value: str(value)[:20])
def test_a_refusal_names_what_is_wrong(name, text, wrong):
    space = search_spaces.get(name)
    with pytest.raises(ValueError) as error:
        space.parse(text) if isinstance(text, str) else parsed(space, text)
    told, _, expected = str(error.value).partition("; expected ")
    assert told.startswith(f"not a network of {name}: ") and wrong in told and expected == space.spelling


def test_canonical_graph_is_independent_of_the_order():
    """Random graphs larger than any cell, their vertices and summands shuffled; one that is too regular is refused."""
    rng = random.Random(5)
    for _ in range(200):
        n = rng.randint(3, 9)
        ops = ["input", *rng.choices("ab", k=n - 1), "output"]
        inputs = [[], *(rng.choices(range(i), k=rng.randint(1, 2)) for i in range(1, n)), rng.choices(range(n), k=2)]
        results, shuffled = [], [0]
        while len(shuffled) <= n:  # another topological order, the output last
            free = [i for i in range(1, n) if i not in shuffled and set(inputs[i]) <= set(shuffled)]
            shuffled.append(rng.choice(free or [n]))
        for order in (range(n + 1), shuffled):
            sums = [[order.index(j) for j in rng.sample(inputs[i], len(inputs[i]))] for i in order]
            graph = tuple(Vertex(ops[i], tuple(places)) for i, places in zip(order, sums))
            results.append(search_spaces.canonical(graph))
        assert results[0] == results[1]
        assert all(j < i for i, vertex in enumerate(results[0]) for j in vertex.inputs)  # topological
        assert sorted(vertex.op for vertex in results[0]) == sorted(ops)
    chains = [Vertex("a", (0,)) for _ in range(8)] + [Vertex("b", (i,)) for i in range(1, 9)]
    with pytest.raises(ValueError, match="18 vertices is too regular"):
        search_spaces.canonical((Vertex("input"), *chains, Vertex("output", tuple(range(9, 17)))))


# ---------------------------------------------------------------------------------------------- NAS-Bench-201
def test_nb201_counts_and_equal_keys():
    """As many networks as isomorphism classes; equal keys have equal losses."""
    assert len(classes()) == 5425
    regression = Regression(SMALL_TASK, images(), Settings(steps=2))
    for archs in random.Random(6).sample([archs for archs in classes().values() if len(archs) > 1], 8):
        assert regression(TINY, archs[0]) == regression(TINY, archs[-1])


def test_nb201_network_against_its_definition():
    """Weights are matched by operation, so a cell has each convolution at most once; taps of a dead one are zero."""
    dead = TINY.build(*parse(DEAD))(torch.ones(2, 3, 32, 32))
    assert [(*tap.shape, tap.any().item()) for tap in dead] == [(2, 4 << i, 32 >> i, 32 >> i, False) for i in range(3)]
    archs = [arch for arch in random.Random(4).sample(ARCHS, 200) if TINY.graph(arch)[-1].inputs
             and arch.count("nor_conv_1x1") <= 1 and arch.count("nor_conv_3x3") <= 1]
    for seed, arch in enumerate(archs[:24]):
        x, network = torch.randn(2, 3, 32, 32, generator=rng_of(seed)), TINY.build(arch).train()
        for i, (((entry, cell),), tap) in enumerate(zip(network, network(x))):
            if i == 0:
                x = conv_norm(x, entry)
            else:
                (first, second), shortcut = entry
                deep = conv_norm(F.relu(conv_norm(F.relu(x), first, stride=2)), second)
                x = deep + F.conv2d(F.avg_pool2d(x, 2), shortcut[1].weight)
            assert not any(m.affine or m.track_running_stats for m in cell.modules() if isinstance(m, nn.BatchNorm2d))
            built = {op: module for (op, _), module in zip(TINY.graph(arch)[1:], cell.ops)}  # no dead ones
            nodes = [x, 0 * x, 0 * x, 0 * x]
            for (source, target), op in zip(TINY.EDGES, arch):
                if op in built or op == "skip_connect":
                    y = nodes[source]
                    y = y if "skip" in op else average(y) if "pool" in op else conv_norm(F.relu(y), built[op])
                    nodes[target] = nodes[target] + y
            x = nodes[3]
            assert_close(tap, x)


# ------------------------------------------------------------------- NAS-Bench-101, -Macro and the NDS spaces
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
    assert NBMacro().key("01001020") == NBMacro().key("01010002") != NBMacro().key("01100020")


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


def test_darts_keys_and_dead_cells():
    space, rng = Cells("darts"), random.Random(10)
    for _ in range(30):
        arch = space.random(rng)
        normal, reduce, key = list(arch.genotype.normal), arch.genotype.reduce, space.key(arch)
        for i in range(0, 8, 2):  # the two pairs of a node are unordered, and the source of a zero does not matter
            pairs = [(op, rng.randrange(2 + i // 2) if op == "none" else source) for op, source in normal[i:i + 2]]
            normal[i:i + 2] = rng.sample(pairs, 2)
        assert space.key(cell_net(space, normal, reduce, arch.width, arch.depth)) == key
        assert space.key(arch._replace(width=arch.width * 2)) != key != space.key(arch._replace(depth=arch.depth + 1))
    pairs = [("sep_conv_3x3", 0), ("none", 1)] * 4  # only the cell before the last: every other cell reaches no tap
    for space in (space, Cells("darts", all_blocks=True)):
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
    assert last.params(arch) == every.params(arch)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        last.build(arch, whole=True).eval()(torch.empty(1, 3, last.side, last.side))
    assert counter.get_total_flops() == last.flops(arch) == every.flops(arch)


# ---------------------------------------------------------------------------------------------- NAS-Bench-NLP
def test_recipe_keys():
    text, key = json.dumps(RECIPE), NBNLP().key(parsed(NBNLP(), RECIPE))
    dead = RECIPE | recipe(h_new_2="activation_sigm node_5", node_5="linear x h_prev_2")
    for same in (json.dumps(dict(reversed(RECIPE.items()))), json.dumps(dead),
                 text.replace("node_1", "node_9").replace("node_3", "node_1"), text.replace("node_4", "h_new_1_part1"),
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

    def linear(*values: Tensor) -> Tensor:
        i = next(i for i, vertex in enumerate(graph) if vertex.op == "linear" and len(vertex.inputs) == len(values))
        return sum(v @ layer.weights[f"{i} {j}"].T for j, v in zip(graph[i].inputs, values)) + layer.biases[str(i)]

    h0, h1 = torch.zeros(3, 4), torch.zeros(3, 4)
    for t in range(6):
        h1 = torch.tanh(linear(x[:, t], h1))
        gate = torch.sigmoid(linear(x[:, t], h0, h1))
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


# ------------------------------------------------------------------------------------------ counts and labels
@pytest.mark.parametrize("name, arch, params", [
    ("nb101", [[[0, 1, 0, 0, 1], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0] * 5],
               ["input", "conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3", "output"]], 12_088_970),
    ("nb201", RICH, 615_386), ("nbmacro", "10011002", 1_434_890), ("nbnlp", RECIPE, 8_333_200),
    ("darts", Cells("darts").format(cell_net(Cells("darts"), [("sep_conv_3x3", 1)] + SKIPS[1:], SKIPS, 16, 4)), 99_610),
    ("resnext-a", BOTTLENECKS | {"ws": [16, 64, 128, 16], "ds": [1, 16, 1, 4], "num_gs": [1, 2, 1, 2],
                                 "bot_muls": [0.0, 0.25, 0.25, 0.25]}, 83_002)], ids=str)
def test_params(name, arch, params):
    """As the benchmarks recorded them; those of RICH, RECIPE and darts were counted by hand."""
    space = search_spaces.get(name)
    assert space.params(space.parse(arch) if isinstance(arch, str) else parsed(space, arch)) == params


@needs_shared
@pytest.mark.parametrize("name, file, arch, params", [
    ("nb201", "nb201_params.json", 0, 1), ("nb101", "nb101_params.json", 0, 1),
    ("nbmacro", "nbmacro_params.json", 0, 1), ("nbnlp", "nbnlp", "recepie", "num_params"),
    ("darts-in", "nds/DARTS_in.json", "net", "params"), ("pnas-in", "nds/PNAS_in.json", "net", "params"),
    ("resnext-a-in", "nds/ResNeXt-A_in.json", "net", "params"), ("resnet", "nds/ResNet_reruns.json", "net", "params")])
def test_params_as_recorded(name, file, arch, params):
    """On every 20th record, exactly; those of nb201 were recorded in hundreds."""
    space, path = search_spaces.get(name), SHARED / "labels" / file
    content = [json.loads(log.read_text()) for log in sorted(path.glob("*.json"))] or json.loads(path.read_text())
    records = (content["top"] + content["mid"] if isinstance(content, dict) else content)[::20]
    assert len(records) > 5
    for record in records:
        text = record[arch] if isinstance(record[arch], str) else json.dumps(record[arch])
        assert round(space.params(space.parse(text)), -2 if name == "nb201" else 0) == record[params], text


def test_labels_files(tmp_path):
    entries, path = [[json.dumps(RECIPE), 1], [RECIPE, 2.5]], tmp_path / "labels.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_text(json.dumps(entries), encoding)
        assert search_spaces.load_labels(NBNLP(), path) == [(parsed(NBNLP(), RECIPE), value) for value in (1, 2.5)]
    for content, wrong in [("words", "no JSON list"), ("{}", "no JSON list of [architecture, value]: {}"),
                           ("[]", "no JSON list"), (json.dumps([NET]), "entry 0: {"), ("[[[1], 2, 3]]", "entry 0: ["),
                           (json.dumps([*entries, [RECIPE, math.nan]]), "entry 2: value NaN, expected a number"),
                           (json.dumps([*entries, ["x", 1]]), "entry 2: not a network of nbnlp"),
                           (json.dumps([[RECIPE, "high"]]), 'entry 0: value "high"')]:
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(wrong)) as error:
            search_spaces.load_labels(NBNLP(), path)
        assert str(error.value).startswith(f"labels {path}")


@needs_shared
def test_tasks_and_labels_as_recorded():
    authors = json.loads((SHARED / "published_tasks.json").read_text())
    assert {name: json.loads(task_to_json(task)) for name, task in gennas.TASKS.items()} == authors
    recorded = dict(search_spaces.load_labels(NB201(), SHARED / "labels" / "nb201_cifar10.json")[:600])
    assert all(recorded[arch] == value for arch, value in NB201().labels)
    assert sorted(value for _, value in NB201().labels) == sorted(recorded.values())[15::30]


# --------------------------------------------------------------------------------------------- README, copies
def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


COMMANDS = {command.replace("$seed", "0"): None for command in re.findall(
    r"python (gennas\.py.*?)(?= +#| > | \| |;|$)", "\n".join([*readme_blocks("sh"), gennas.__doc__]), re.M)}
PLAIN, = [block for block in readme_blocks("python") if "class Plain" in block]  # a space of one's own


def test_each_file_alone(tmp_path, monkeypatch):
    """gennas.py scores an object with a space's methods; search_spaces.py builds a network. Importing does nothing."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("gennas", "search_spaces", "matplotlib"):  # none of which can be imported
        monkeypatch.setitem(sys.modules, name, None)
    states, alone = [[state() for state in STATES], random.getstate()], []
    for name in ("gennas", "search_spaces"):
        shutil.copy(HERE / f"{name}.py", tmp_path / f"{name}_alone.py")
        alone.append(importlib.import_module(f"{name}_alone"))
    assert [[state() for state in STATES], random.getstate()] == states
    assert alone[0].Scorer(Linear(), steps=2)(["a"]) == Scorer(Linear(), steps=2)(["a"])
    space = alone[1].get("nb201")
    assert len(space.build(space.random(random.Random(0)))(torch.zeros(2, 3, 32, 32))) == 3


def test_the_core_alone(tmp_path, monkeypatch):
    """The lines above the banner need none of those below: they score two cells, search among ten, and for a task."""
    (tmp_path / "core.py").write_text((HERE / "gennas.py").read_text().split("\n# =====")[0])
    monkeypatch.syspath_prepend(tmp_path)
    core = importlib.import_module("core")
    for settings in (core.Settings(steps=2, side=16), core.Settings(steps=2, side=16, ridge=1.0)):
        regression = core.Regression(core.COMBO, core.synthetic_images(0, 16), settings)
        there = Regression(gennas.COMBO, images(), settings)
        for arch in parse(RICH, DEAD):
            assert regression(TINY, arch) == there(TINY, arch)

    def evaluate(archs) -> list[float]:
        return [core.score({"log loss": 1}, regression(TINY, arch)) for arch in archs]

    history, best = core.search_architecture(TINY.random, TINY.mutate, TINY.key, evaluate, evaluate, random.Random(0),
                                             finalists=3, population=5, tournament=2, cycles=5)
    assert len(history) == 10 and best == sorted(core.distinct(history, TINY.key), key=lambda pair: pair[1])[:3]
    assert len(core.search_task([], lambda task: task.noise.level, random.Random(0), population=3, tournament=2)) == 403


def test_readme_space(refused, monkeypatch, capsys, tmp_path):
    """The README's example of a space of one's own, with workers, a record and progress on a terminal. It may import
    what stands beside it, and its record is not continued with another file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    (tmp_path / "beside.py").touch()
    (tmp_path / "my_space.py").write_text(PLAIN.replace("\n", "\nimport beside\n", 1))
    name, out = f"{tmp_path / 'my_space.py'}:Plain", tmp_path / "out.jsonl"
    archs = [(1, 3, 5), (7, 1, 1), (1, 3, 5), (5, 5, 5)]
    scores = [Scorer(name, steps=1, workers=workers, out=out, progress=True)(archs) for workers in (2, 1)]
    assert scores == [Scorer(name, steps=1)(archs)] * 2 and len(recorded(out)) == 3
    first, *_, last = capsys.readouterr().err.split("\033[K\r")  # each replaces the one before
    assert re.fullmatch(r"[12]/4  \d+\.\d\d/s  \d+ s left", first) and last == ""
    (tmp_path / "my_space.py").write_text(PLAIN)
    refused(["out.jsonl: it has file "], "--space", name, "--steps", 1, "--out", out)


@pytest.mark.parametrize("code", [block for block in readme_blocks("python") if "class Plain" not in block])
def test_readme_python(code, tmp_path, monkeypatch):
    """Each block runs, here on stand-ins for the benchmarks' packages and files, and what it writes is read."""
    monkeypatch.chdir(tmp_path)
    nats = type("Nats", (list,), {
        "arch": lambda self, i: NB201().format(self[i]), "query_index_by_arch": lambda self, arch: 7,
        "get_more_info": lambda self, i, data, hp, is_random: {"test-accuracy": 80 + i / 1000}})(ARCHS)
    cells, runs = [NB101().random(random.Random(seed)) for seed in range(600)], [{"final_test_accuracy": 0.92}] * 3
    nasbench = SimpleNamespace(hash_iterator=lambda: map(str, range(600)), get_metrics_from_hash=lambda name: ({
        "module_adjacency": np.array(cells[int(name)].matrix), "module_operations": cells[int(name)].ops}, {108: runs}))
    monkeypatch.setitem(sys.modules, "nats_bench", SimpleNamespace(create=lambda *_, **__: nats))
    monkeypatch.setitem(sys.modules, "nasbench", SimpleNamespace(api=SimpleNamespace(NASBench=lambda path: nasbench)))
    digits = map("".join, itertools.product("012", repeat=8))
    log = {"recepie": json.dumps(RECIPE), "status": "OK", "val_losses": [math.nan, -9.0, -8.0]}
    record = {"net": DARTS_NET | {"width": 32, "depth": 14}, "test_ep_top1": [50.0, 7.5]}
    Path("train_logs_single_run").mkdir()
    for file, content in {"nas-bench-macro_cifar10": {arch: {"mean_acc": 91} for arch in digits}, "DARTS_in": [record],
                          "train_logs_single_run/a": log, "train_logs_single_run/b": log | {"status": "loss is nan!"},
                          "train_logs_single_run/c": log | {"val_losses": []}}.items():
        Path(f"{file}.json").write_text(json.dumps(content))
    Path("data_batch_1").write_bytes(pickle.dumps({b"data": np.arange(20 * 3072, dtype=np.uint8).reshape(20, 3072)}, 2))
    for family in ("nb201", ""):
        monkeypatch.setitem(gennas.PRESETS["fast"], family, gennas.Preset(Settings(steps=0), {"width": 4, "cells": 1}))
    for file in ("nb201.json", "unseen.json"):
        labels_file(Path(file), NB201(), [cells[0] for cells in list(classes().values())[:6]])
    Path("found.jsonl").write_text(json.dumps({"arch": RICH}) + "\n")
    exec(code, {"api": nats})
    for file in re.findall(r'open\("(\S+).json", "w"\)', code):
        labels = search_spaces.load_labels(search_spaces.get(file.replace("unseen", "nb201")), f"{file}.json")
        assert len(labels) == {"nb201": 1000, "nb101": 500, "nbmacro": 500, "unseen": 3}.get(file, 1)
        assert all(0.9 < value < 100 for _, value in labels)
    for file in tmp_path.glob("*.npy"):
        assert gennas.read_images(str(file), 16).shape == (16, 3, 32, 32)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_commands(run, tmp_path, monkeypatch, command):
    """Each command that the README shows runs, on the tiny space; files that it reads are made here."""
    monkeypatch.chdir(tmp_path)
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    for file in ("nb201.json", "unseen.json"):
        labels_file(Path(file), NB201(), ARCHS[::2602])
    Path("my_task.json").write_text(task_to_json(SMALL_TASK))
    Path("my_space.py").write_text(PLAIN)
    Path("my_labels.json").write_text(json.dumps([["1,3,5", 1], ["3,3,3", 2], ["7,5,1", 3], ["1,1,7", 4]]))
    np.save("my_images.npy", np.random.default_rng(0).random((16, 32, 32, 3)))
    words = shlex.split(command)[1:]
    searches = "--mode" not in words or "search-task" in words
    run(*words, *searches * ["--population", "3", "--cycles", "2"], "--steps", "1")


# ---------------------------------------------------------------------------------------------- whole processes
SEARCH = ["--space", "nb201", "--steps", 1, "--population", 6, "--tournament", 2, "--cycles", 4, "--batch", 2,
          "--finalists", 3, "--json"]


def start_process(*words, torchrun: bool = False) -> subprocess.Popen:
    """The command line in a process of its own, or in two ranks."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] * torchrun
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


def search_without_workers(out: Path) -> tuple[dict, dict]:
    """Run SEARCH -> its result and its record."""
    process = start_process(*SEARCH, "--workers", 1, "--out", out)
    return timeless(process.communicate(timeout=60)[0]), recorded(out)


@functools.cache
def undisturbed(folder: Path) -> tuple[dict, dict]:
    found, known = search_without_workers(folder / "undisturbed.jsonl")
    assert found["evaluated"] == 10 and len(known) == found["unique"] + 2 * len(found["finalists"])
    return found, known


def resume(folder: Path) -> None:
    """A run that is killed, as it starts or later, leaves no process, and the same command goes on where it stopped."""
    if not Path("/proc/self/task").exists():
        pytest.skip("looks into Linux's /proc")
    out = folder / "killed.jsonl"
    for victim, lines, status in (("main", 0, -os_signal.SIGKILL), ("worker", 4, 1), ("main", 8, -os_signal.SIGKILL)):
        process = start_process(*SEARCH, "--workers", 2, "--out", out)
        assert wait_for(lambda: len(children(process)) == 2 and out.read_bytes().count(b"\n") >= lines)
        os.kill(process.pid if victim == "main" else children(process)[0], os_signal.SIGKILL)
        stderr = process.communicate(timeout=20)[1]  # waits for all that hold the two pipes, as workers do
        assert process.returncode == status and ("Traceback" not in stderr or lines == 0)  # of a worker as it starts
        assert victim == "main" or "a worker died" in stderr.splitlines()[-1]
        assert lines <= len(known := recorded(out)) + 1 and known.items() < undisturbed(folder)[1].items()
    assert search_without_workers(out) == undisturbed(folder)


def cancel(folder: Path) -> None:
    """After Ctrl-C no network is begun but those that the workers have in hand; all 400 would take some 40 s."""
    out = folder / "interrupted.jsonl"
    process = start_process("--space", "nb201", "--population", 400, "--cycles", 0, "--workers", 2, "--out", out)
    assert wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 2)
    process.send_signal(os_signal.SIGINT)
    stderr = process.communicate(timeout=20)[1]  # as above
    assert process.returncode == 130 and "interrupted; what was trained is in" in stderr and "Traceback" not in stderr
    assert len(recorded(out)) < 100


def distribute(folder: Path) -> None:
    """Two ranks give the result of one process, and rank 0 alone writes; wrong input is one line and ends both."""
    right = start_process(*SEARCH, "--out", out := folder / "ranks.jsonl", torchrun=True)
    wrong = start_process("--space", "nb201", "--mode", "score", "x", torchrun=True)
    stdout, stderr = right.communicate(timeout=120)
    assert (timeless(stdout), recorded(out)) == undisturbed(folder), stderr
    stdout, stderr = wrong.communicate(timeout=60)
    assert wrong.returncode == 1 and stdout == "" and stderr.count("gennas: error: not a network of nb201") == 1


@pytest.fixture(scope="session", autouse=True)
def processes(request, tmp_path_factory):
    """The works of test_processes, as futures. They run in a thread beside all other tests, since most of their time
    goes into importing torch."""
    asked = [item.callspec.params["work"] for item in request.session.items if item.originalname == "test_processes"]
    folder = tmp_path_factory.mktemp("processes")
    with ThreadPoolExecutor(1) as pool:
        yield {work: pool.submit(work, folder) for work in asked}


@pytest.mark.parametrize("work", [resume, cancel, distribute])
def test_processes(processes, work):
    processes[work].result()
