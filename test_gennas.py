"""Tests of gennas on tiny networks: few channels, one cell a stage, a few steps. Where a number is checked, it is
computed here a second time, by the plainest means."""
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
import socket
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Sequence
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gennas
import search_spaces
from gennas import (Noise, Regression, RnnTask, Scorer, Settings, Signal, Stage, Task, Trainer, Weight,
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


def images(seed: int = 0) -> torch.Tensor:
    return gennas.load_images("synthetic", seed)[0]


@pytest.fixture
def tiny(monkeypatch):
    """The space that the command line calls nb201, with 4 channels and one cell a stage."""
    monkeypatch.setitem(search_spaces.SPACES, "nb201", lambda **sizes: NB201(**sizes | {"width": 4, "cells": 1}))


@pytest.fixture
def run(capsys, tiny):
    """Runs a command line in this process -> (exit status, stdout, stderr)."""
    def call(*words) -> tuple[int, str, str]:
        try:
            gennas.main(["--space", "nb201", "--steps", "2", "--workers", "1", *map(str, words)])
            status = 0
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()
    return call


def start_process(*words, torchrun: str | None = None, **options) -> subprocess.Popen:
    """The command line in a process of its own, or under torchrun with such options."""
    launcher = [] if torchrun is None else ["-m", "torch.distributed.run", *torchrun.split()]
    options = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    return subprocess.Popen([sys.executable, *launcher, HERE / "gennas.py", *map(str, words)], **options)


def run_process(*words, **options) -> tuple[int, str, str]:
    process = start_process(*words, **options)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


@pytest.fixture
def refused(run):
    """Runs a command line that must end with exit status 2 and one line, which has the wanted words."""
    def call(wanted: str, *words) -> None:
        status, _, stderr = run(*words)
        assert status == 2 and wanted in stderr and stderr.count("\n") == 1, stderr
    return call


def plot_to(path: Path) -> tuple:
    """The words that ask for a plot, where there is what draws it."""
    return ("--plot", path) if importlib.util.find_spec("matplotlib") else ()


def labels_file(path: Path, space: Any, archs: Sequence) -> Path:
    """Each more accurate than the one before."""
    path.write_text(json.dumps([[space.format(arch), float(i)] for i, arch in enumerate(archs)]))
    return path


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


def timeless(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "seconds"}


# ----------------------------------------------------------------------------------------------------- signal bases
def plain_waves(fy: list[float], fx: list[float], shape, seed: int) -> np.ndarray:
    B, C, H, W = shape
    rng = rng_of(seed)
    keys = torch.rand(B, 32 * len(fy), generator=rng)
    phases = torch.rand(B, C, generator=rng)
    out = np.zeros(shape)
    for b in range(B):
        order = sorted(range(keys.shape[1]), key=lambda m: -keys[b, m])[:C]
        for (c, m), y, x in itertools.product(enumerate(order), range(H), range(W)):
            angle = fy[m // 32] * (y + 1) + fx[m // 32] * (x + 1) + float(phases[b, c])
            out[b, c, y, x] = math.sin(2 * math.pi * angle)
    return out


def test_waves():
    zeros, fs = [0] * 10, list(FREQUENCIES)
    expected = plain_waves(fs + zeros, zeros + fs, (2, 20, 8, 6), seed=1)
    np.testing.assert_allclose(gennas.sin1d(rng_of(1), (2, 20, 8, 6), FREQUENCIES), expected, atol=2e-5)
    first = [f for f in fs for _ in fs]
    expected = plain_waves(first + [-f for f in first], fs * 20, (2, 20, 8, 6), seed=1)
    np.testing.assert_allclose(gennas.sin2d(rng_of(1), (2, 20, 8, 6), FREQUENCIES), expected, atol=2e-5)


def test_sin1d_draws_all_640_maps_without_replacement():
    maps = gennas.sin1d(rng_of(0), (1, 640, 8, 8), FREQUENCIES)[0].double()
    along_y = (maps.std(2) < 1e-4).all(1)
    assert along_y.sum() == (maps.std(1) < 1e-4).all(1).sum() == 320
    # s(y + 1) + s(y - 1) = 2 cos(2 pi f) s(y) tells the frequency
    profiles = torch.where(along_y[:, None], maps[:, :, 0], maps[:, 0, :])
    middle = profiles[:, 1:-1]
    ratio = ((profiles[:, 2:] + profiles[:, :-2]) * middle).sum(1) / (2 * middle ** 2).sum(1)
    found = torch.arccos(ratio.clamp(-1, 1)) / (2 * math.pi)
    nearest = (found[:, None] - torch.tensor(FREQUENCIES)).abs().argmin(1)
    assert torch.bincount(nearest).tolist() == [64] * 10


@pytest.mark.parametrize("density, count", [(0, 0), (0.01, 0), (0.1, 4), (0.578125, 27), (1, 48)])
def test_dot(density, count):
    maps = gennas.dot(rng_of(3), (4, 50, 8, 6), density)
    assert ((maps != 0).sum((2, 3)) == count).all() and set(maps.unique().tolist()) <= {-1, 0, 1}
    if count:  # signs and places are even: 200 maps, four standard deviations
        assert abs(maps.sum()) < 4 * math.sqrt(200 * count)
        assert ((maps != 0).float().mean((0, 1)) - count / 48).abs().max() < 4 * math.sqrt(0.25 / 200)


@pytest.mark.parametrize("density", [0, 0.3])
def test_gdot(density):
    dots = gennas.dot(rng_of(5), (2, 3, 8, 6), density, least=1).numpy()
    weights = [math.exp(-d * d / 2) for d in range(-4, 5)]

    def mirrored(i: int, n: int) -> int:  # d c b a | a b c d | d c b a
        while not 0 <= i < n:
            i = -1 - i if i < 0 else 2 * n - 1 - i
        return i

    for b, c in itertools.product(range(2), range(3)):
        blurred = np.zeros((8, 6))
        for y, x, dy, dx in itertools.product(range(8), range(6), range(-4, 5), range(-4, 5)):
            value = dots[b, c, mirrored(y + dy, 8), mirrored(x + dx, 6)]
            blurred[y, x] += weights[dy + 4] * weights[dx + 4] * value
        actual = gennas.gdot(rng_of(5), (2, 3, 8, 6), density)[b, c]
        np.testing.assert_allclose(actual, blurred / np.abs(blurred).max(), atol=1e-5)


def test_resize():
    pictures = images()
    maps = gennas.resize(rng_of(2), (16, 7, 8, 8), pictures)
    colours = torch.randint(0, 3, (7,), generator=rng_of(2)).tolist()
    small = pictures[:, :, ::4, ::4]
    for c, colour in enumerate(colours):
        expected = 2 * (small[:, colour] - small.min()) / (small.max() - small.min()) - 1
        torch.testing.assert_close(maps[:, c], expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="the same everywhere"):
        gennas.resize(rng_of(2), (16, 7, 8, 8), torch.ones(16, 3, 32, 32))


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


def test_published_tasks():
    for name, known in gennas.TASKS.items():
        assert gennas.task_from_json(known.to_json()) == known, name
        assert all(target.isfinite().all() and target.std() > 0 for target in known.draw(images(), 0)), name


@needs_shared
def test_tasks_as_published():
    authors = json.loads((SHARED / "published_tasks.json").read_text())
    assert authors.keys() <= gennas.TASKS.keys()
    for name, data in authors.items():
        known = gennas.TASKS[name]
        assert json.loads(known.to_json()) == data | {"weights": [{"term": "loss", "weight": 1}]}, name
        assert gennas.task_from_json(json.dumps(data)) == known, name


def test_equal_tasks_have_equal_digests():
    text = small_task().to_json()
    data = json.loads(text.replace("1.0", "1").replace("2.0", "2"))
    data["stages"][0]["signals"][0] = dict(reversed(data["stages"][0]["signals"][0].items()))
    other = gennas.task_from_json(json.dumps(dict(reversed(data.items()))))
    assert other == small_task() and other.digest() == small_task().digest() and other.to_json() != text
    assert replace(small_task(), noise=Noise("uniform", 0.2)).digest() != other.digest()
    weighted = replace(small_task(), weights=(Weight("log params", -1.0), Weight("loss", 2.0)))
    assert weighted.digest() != other.digest() and weighted.unweighted() == other
    assert gennas.task_from_json(weighted.to_json()) == weighted


WRONG_TASKS = [  # where, what
    ("noise", None), ("noise", []), ("noise.kind", "pink"), ("noise.kind", ["uniform"]), ("noise.level", -1),
    ("noise.level", True), ("noise.level", math.nan), ("noise.level", 10 ** 400), ("stages", []), ("stages", {}),
    ("stages.0", 3), ("stages.0.channels", 0), ("stages.0.channels", 641), ("stages.0.channels", 8.0),
    ("stages.0.signals", None), ("stages.0.signals", {"basis": "resize", "level": 1.0}),
    ("stages.0.signals.0", "dot"), ("stages.0.signals.0", []), ("stages.0.signals.0.basis", "cos"),
    ("stages.0.signals.0.basis", []), ("stages.0.signals.0.level", "1"), ("stages.0.signals.0.level", None),
    ("stages.0.signals.0.frequencies", [0.1] * 9), ("stages.0.signals.0.frequencies.3", 0.5),
    ("stages.0.signals.0.frequencies.3", [0.4]), ("stages.0.signals.0.frequencies", None),
    ("stages.0.signals.0.per_sample", 1), ("stages.1.signals.0.density", 1.01), ("stages.0.signals.0.density", 0.5),
    ("stages.2.signals", [{"basis": "resize", "level": 1.0}] * 2), ("surplus", 1), ("stages.0.surplus", 1),
    ("weights", []), ("weights", {"loss": 1.0}), ("weights.0", 1), ("weights.0.term", "log loss 4 at 1"),
    ("weights.0.term", []), ("weights.0.weight", "1"), ("weights.0.weight", math.inf), ("weights.0.weight", True),
    ("weights.0.surplus", 1),
]


@pytest.mark.parametrize("place, value", WRONG_TASKS, ids=str)
def test_a_task_field_out_of_range(place, value):
    data = json.loads(small_task().to_json())
    *path, name = [int(step) if step.isdecimal() else step for step in place.split(".")]
    functools.reduce(lambda part, step: part[step], path, data)[name] = value
    with pytest.raises(ValueError, match="^task.*: expected ") as error:
        gennas.task_from_json(json.dumps(data))
    if "surplus" not in place:
        assert re.sub(r"\.(\d)", r"[\1]", place).startswith(re.split("task.|:", str(error.value))[1])


def test_tasks_that_python_makes_wrongly():
    for words in (("cos", 1.0), ("dot", 1.0, True), ("dot", 1.0, True, FREQUENCIES), ("resize", 1.0, False)):
        with pytest.raises(ValueError, match="expected"):
            Signal(*words)
    with pytest.raises(ValueError, match="input: expected .* per_sample true"):
        replace(small_rnn_task(), input=(Signal("resize", 1.0),))
    deep = small_task().to_json().replace("0.1", "[" * 600 + "]" * 600)
    for text in ("[" * 100_000, deep, "nonsense", "[1, 2]", "null", json.dumps(list(range(100_000)))):
        with pytest.raises(ValueError, match="^task: ") as error:
            gennas.task_from_json(text)
        assert len(str(error.value)) < 200


# ----------------------------------------------------------------------------------------------------------- images
def test_synthetic_images():
    a, name = gennas.load_images("synthetic", 0)
    assert a.shape == (16, 3, 32, 32) and "synthetic" in name
    assert torch.equal(a, images(0)) and not torch.equal(a, images(1))
    assert a.mean((0, 2, 3)).abs().max() < 1e-5 and (a.std((0, 2, 3)) - 1).abs().max() < 1e-5
    many = gennas.synthetic_images(rng_of(0), 400)
    amplitude = torch.fft.fft2(many).abs().square().mean((0, 1)).sqrt()[0]  # along x
    assert (amplitude[1] / amplitude[2:9]).numpy() == pytest.approx(np.arange(2, 9), rel=0.15)
    red, green = many[:, 0].flatten(), many[:, 1].flatten()
    assert torch.corrcoef(torch.stack([red, green]))[0, 1] == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("name, folder, protocol", [
    *[("data_batch_1", True, protocol) for protocol in range(6)], ("data_batch_1", False, 2), ("train", True, 2)])
def test_cifar_batches(tmp_path, name, folder, protocol):
    data = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    content = {b"batch_label": b"training", b"fine_labels": np.arange(20), b"data": data, b"filenames": [b"F"] * 20}
    (tmp_path / name).write_bytes(pickle.dumps(content, protocol))
    loaded, _ = gennas.load_images(str(tmp_path if folder else tmp_path / name), 0)
    expected = (data[2, 1 * 1024 + 5 * 32 + 7] - 123.0) / 62.1  # image 2, green, row 5, column 7
    assert loaded.shape == (16, 3, 32, 32) and loaded[2, 1, 5, 7] == pytest.approx(expected, abs=1e-5)


def test_imagenet16_batch(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (20, 768), dtype=np.uint8)
    content = {"data": data, "labels": [np.int64(1)] * 20, "mean": np.zeros(768)}
    (tmp_path / "train_data_batch_1").write_bytes(pickle.dumps(content, 2))
    loaded, _ = gennas.load_images(str(tmp_path), 0)
    expected = (data[3, 2 * 256 + 5 * 16 + 7] - 104.01) / 65.09
    assert loaded.shape == (16, 3, 32, 32)
    assert loaded[3, 2, 10, 14] == loaded[3, 2, 11, 15] == pytest.approx(expected, abs=1e-5)


def test_arrays(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", y=np.arange(16), x=pixels)
    floats = pixels / 255
    versions = {"a": pixels, "b": pixels.transpose(0, 3, 1, 2), "c": floats, "e": floats.astype(">f4")}
    for name, version in versions.items():
        np.save(tmp_path / f"{name}.npy", version)
    plain = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2), ddof=1)
    for name in ("a.npy", "b.npy", "c.npy", "e.npy", "d.npz"):
        loaded, _ = gennas.load_images(str(tmp_path / name), 0)
        np.testing.assert_allclose(loaded, plain.transpose(0, 3, 1, 2), atol=1e-4)


class Calls:
    """A pickle of it calls `function` with `words`, then gives the result `state`."""

    def __init__(self, function, words: tuple, state=None):
        self.reduced = function, words, state

    def __reduce__(self):
        return self.reduced


def array_of(shape, data, kind="u1", fortran=False, dtype_state=(3, "|", None, None, None, -1, -1, 0)) -> Calls:
    """What makes an array of whatever state."""
    reconstruct, words, _ = np.empty(0, np.uint8).__reduce__()
    return Calls(reconstruct, words, (1, shape, Calls(np.dtype, (kind, False, True), dtype_state), fortran, data))


PIXELS = b"x" * 16 * 3072
HOSTILE = {
    "calls": Calls(os.system, ("touch here",)), "evaluates": b"cbuiltins\neval\n(S'1'\ntR.",
    "another type": array_of((16, 3072), PIXELS, "i1"), "an offset": array_of((16, 3072), PIXELS, "V3072"),
    "too short": array_of((16, 3072), PIXELS[:100]), "negative": array_of((-16, -3072), PIXELS),
    "no shape": array_of((((16,),),), PIXELS), "columns first": array_of((16, 3072), PIXELS, fortran=True),
    "columns first, protocol 5": pickle.dumps({b"data": np.asfortranarray(np.zeros((16, 3072), np.uint8))}, 5),
    "a class": b"cnumpy\nndarray\n.", "nothing": b"N.", "torn": pickle.dumps({b"data": np.zeros(9)})[:50],
    # {(((...),),): 1}: to hash so deep a nest of tuples exhausts the stack; and a memo of gigabytes
    "deep": b"\x80\x02})" + 300_000 * pickle.TUPLE1 + b"K\x01s.", "a large memo": b"Nr\xff\xff\xff\x7f.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_and_makes_nothing(tmp_path, monkeypatch, name):
    content = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pickle, "Unpickler", None)
    (tmp_path / "data_batch_1").write_bytes(
        content if isinstance(content, bytes) else pickle.dumps({b"data": content}, 2))
    with pytest.raises(ValueError, match="no plain array of uint8|pickle exhausted|expected .* bytes"):
        gennas.load_images(str(tmp_path), 0)
    assert not (tmp_path / "here").exists()


def test_what_is_good_of_a_hostile_pickle_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {b"x": Calls(os.system, ("touch here",)), b"data": np.frombuffer(PIXELS, np.uint8).reshape(16, 3072)}
    content[b"data"] = content[b"data"] + np.arange(3072, dtype=np.uint8)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps(content))  # nothing is called
    assert gennas.load_images(str(tmp_path), 0)[0].shape == (16, 3, 32, 32) and not (tmp_path / "here").exists()


def test_images_are_read_within_bounds(tmp_path, monkeypatch):
    """Of a large .npy only what is used; a .npz that unpacks to more than it should is refused before that."""
    large = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, (2 ** 20, 32, 32, 3))  # 3 GB, mostly a hole
    large[:16] = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3))
    del large
    np.savez_compressed(tmp_path / "b.npz", np.zeros((400, 32, 32, 3), np.uint8))
    read = Mock(side_effect=np.array)
    monkeypatch.setattr(np, "array", read)
    gennas.load_images(str(tmp_path / "a.npy"), 0, count=8)
    assert [call.args[0].shape for call in read.call_args_list] == [(8, 3, 32, 32)]
    monkeypatch.setattr(gennas, "MOST_BYTES", 150_000)  # less than 16 of them fill as floats
    with pytest.raises(ValueError, match="16 are needed, of a usual size"):
        gennas.load_images(str(tmp_path / "a.npy"), 0)
    monkeypatch.setattr(gennas, "MOST_BYTES", 10 ** 6)
    with pytest.raises(ValueError, match=r"unpacks to 1,228,\d+ bytes, at most 1,000,000 are read"):
        gennas.load_images(str(tmp_path / "b.npz"), 0)
    (tmp_path / "data_batch_1").write_bytes(bytes(10 ** 6 + 1))
    with pytest.raises(ValueError, match="more than 1,000,000 bytes"):
        gennas.load_images(str(tmp_path / "data_batch_1"), 0)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        gennas.load_images(str(tmp_path / "pipe"), 0)


# --------------------------------------------------------------------------- search spaces: what their tests share
assert_close = functools.partial(torch.testing.assert_close, atol=1e-4, rtol=1e-4)


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
IMAGENET = BOTTLENECKS | {"ss": [8, 1, 2, 2]}
DARTS = (  # the authors' own cell, as their code spells it
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=range(2, 6), "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])")
REFUSED = "", "[]", "{}", "null", "[[[0, 1], [0, 0]], 3]", '{"net": 1}', "Genotype()", "x(1)", "3", "[" * 100_000
REFUSED_IN = {  # in one space, besides
    "nb201": ["|", "nor_conv_3x3", RICH[:-1], RICH + "|", RICH.replace("~2", "~1"), RICH.replace("1x1", "5x5"), "12",
              "[[1],[2,3],[1,2,5]]", "[[1],[2,3],[1,2]]", "[[1],[2,3],[1,2,-1]]", "[[1],[2,3],[1,2,true]]"],
    "nb101": ['[[[0, 0], [0, 0]], ["input", "output"]]'],  # no path
    "darts": ["-" * 20_000 + "1", f"Genotype(normal=[], normal_concat=range({10 ** 30}), reduce=[], reduce_concat=[])"],
    "darts-fix": [DARTS.replace("range(2, 6)", "[2, 3]"), DARTS.replace("range(2, 6)", "range(print(1))"),
                  DARTS.replace("conv_3x3', 2", "conv_3x3', 5"), DARTS.replace("skip", "hop"),
                  DARTS.replace("Genotype", "print")],
    "resnext-a-in": [json.dumps(IMAGENET | change) for change in (
        {"ws": [1, 16, 16, 16]}, {"ws": [10 ** 400, 16, 16, 16]}, {"num_gs": [10 ** 50, 1, 1, 1]},
        {"bot_muls": [1e308, 1.0, 1.0, 1.0]}, {"bot_muls": [-3.5, 1.0, 1.0, 1.0]})],
    "nbnlp": [json.dumps(RECIPE | change) for change in (
        recipe(h_new_3="activation_tanh node_1"), recipe(node_1="linear x x"), recipe(x="linear x h_prev_1"),
        recipe(node_3="activation_sigm x"), recipe(node_2="linear h_prev_0 node_3"), recipe(node_3="relu node_2"),
        recipe(node_4="elementwise_prod node_3 h_prev_2"))],
}


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
    """Round trip, mutation, what is refused, and three taps at 32, 16 and 8, or a sequence."""
    space, rng = search_spaces.get(name), random.Random(8)
    assert space.name == name and space.task in gennas.TASKS
    for _ in range(12):
        arch = space.random(rng)
        assert hash(arch) is not None and space.parse(space.format(arch)) == arch
        child = space.mutate(arch, rng)
        assert space.key(child) != space.key(arch) and space.parse(space.format(child)) == child
    for text in (*REFUSED, *REFUSED_IN.get(name, ())):
        with pytest.raises(ValueError, match=f"not a network of {name}: .*expected"):
            pytest.fail(f"read {text[:200]!r} as {space.parse(text)}")
    space, arch = small_space(name)
    if name == "nbnlp":
        assert space.build(arch)(torch.randn(2, 5, 6)).shape == (2, 5, 6)
    else:
        sides = [16, 8, 4] if name == "resnet-in" else [32, 16, 8]  # of four stages the last three are tapped
        taps = space.build(arch)(torch.randn(2, 3, 32, 32))
        assert [tap.shape[2:] for tap in taps] == [(side, side) for side in sides]


@pytest.mark.parametrize("name", search_spaces.SPACES)
def test_every_space_regresses(name):
    task = (small_rnn_task(), None) if name == "nbnlp" else (small_task(), images())
    regression = Regression(*task, Settings(steps=2))
    trained = regression(*small_space(name))
    stages = 1 if name == "nbnlp" else 3
    assert [len(row) for row in trained.losses] == [stages] * 3 and np.isfinite(trained.losses).all()
    assert trained == regression(*small_space(name)) and trained.params > 0


def test_odd_but_legal():
    lonely = parsed(NBNLP(), recipe(h_new_0="linear x h_prev_0"))
    assert NBNLP().params(lonely)
    with pytest.raises(ValueError, match="no neighbour was found"):
        NBNLP().mutate(lonely, random.Random(0))


def test_canonical_graph_is_independent_of_the_order():
    """Random graphs larger than any cell, their vertices and summands shuffled."""
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


# ---------------------------------------------------------------------------------------------------- NAS-Bench-201
def plain_key(arch: tuple[str, ...]) -> list[str]:
    """The terms that a cell sums, its operations numbered in the way, among all ways, that spells them smallest."""
    ops = dict(zip(NB201.EDGES, arch))

    def terms(node: int, number: dict[tuple[int, int], str]) -> list[str]:
        found = [] if node else ["x"]
        for source in range(node):
            edge, below = (source, node), terms(source, number)
            if ops[edge] == "skip_connect":
                found += below
            elif ops[edge] != "none" and below:
                found.append(f"{ops[edge]} {number[edge]} of ({' + '.join(below)})")
        return sorted(found)

    return min(terms(3, dict(zip(ops, numbers))) for numbers in itertools.permutations("123456"))


def test_nb201_keys_are_isomorphism_classes():
    assert len(classes()) == 5425
    space, rng = NB201(), random.Random(0)
    sample = rng.sample(ARCHS, 120) + [a for a in ARCHS if a.count("none") + a.count("skip_connect") >= 5][::7]
    for _ in range(20):  # and whole classes, where equal keys are to be found
        sample += classes()[space.key(rng.choice(ARCHS))][:3]
    both = Counter((space.key(arch), *plain_key(arch)) for arch in set(sample))
    assert len(both) == len({key for key, *_ in both}) == len({tuple(plain) for _, *plain in both})
    assert sum(math.comb(size, 2) for size in both.values()) > 50  # pairs with equal keys


def test_nb201_draws_spellings_and_neighbours():
    space, rng = NB201(), random.Random(1)
    for _ in range(200):
        arch = space.random(rng)
        numbers = [space.OPS.index(op) for op in arch]
        assert space.parse(space.format(arch)) == parsed(space, [numbers[:1], numbers[1:3], numbers[3:]]) == arch
        child = space.mutate(arch, rng)
        assert sum(a != b for a, b in zip(arch, child)) == 1 and set(child) <= set(space.OPS)
        assert space.key(child) != space.key(arch)
    assert sum(space.random(rng).count("none") for _ in range(2000)) / 12000 == pytest.approx(0.2, abs=0.015)


def test_nb201_network_against_its_definition():
    """Weights are matched by operation, so the cells have each convolution at most once."""
    space = NB201(width=4, cells=1)
    archs = [arch for arch in random.Random(4).sample(ARCHS, 200) if space.graph(arch)[-1].inputs
             and arch.count("nor_conv_1x1") <= 1 and arch.count("nor_conv_3x3") <= 1]
    assert len(archs) >= 25
    for seed, arch in enumerate(archs[:25]):
        network = space.build(arch).train()
        x = torch.randn(2, 3, 32, 32, generator=rng_of(seed))
        taps = network(x)
        assert [tuple(tap.shape) for tap in taps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)]
        for ((entry, cell),), tap in zip(network, taps):
            if tap is taps[0]:
                x = conv_norm(x, entry)
            else:
                (first, second), shortcut = entry
                deep = conv_norm(F.relu(conv_norm(F.relu(x), first, stride=2)), second)
                x = deep + F.conv2d(F.avg_pool2d(x, 2), shortcut[1].weight)
            built = {op: module for (op, _), module in zip(cell.places, cell.ops)}
            nodes = [x, 0 * x, 0 * x, 0 * x]
            for (i, j), op in zip(space.EDGES, arch):
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
            if len(space.graph(cells[0])) == n and space.valid(cells[0]):
                keys.update(map(space.key, cells))
        counts.append(len(keys))
    assert counts == [1, 6, 84, 2441]


def test_nb101_and_macro_keys():
    assert NBMacro().key("01001020") == NBMacro().key("01010002") != NBMacro().key("01100020")
    space, rng = NB101(), random.Random(9)
    for _ in range(1000):
        matrix, ops = arch = space.random(rng)
        order = another_order([[i for i in range(7) if matrix[i][j]] for j in range(7)], rng)
        twin = NB101Cell(tuple(tuple(matrix[i][j] for j in order) for i in order), tuple(ops[i] for i in order))
        assert space.key(twin) == space.key(arch)


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
    """A reduction cell, every node written out."""
    def halved(x: Tensor, reduction: nn.Module) -> Tensor:
        even, odd = (F.conv2d(F.relu(x)[:, :, i::2, i::2], half.weight) for i, half in enumerate(reduction.halves))
        return norm(torch.cat([even, odd], 1))

    def separable(x: Tensor, layer: nn.Module, **options: int) -> Tensor:
        depthwise, pointwise = layer[1:3]
        return conv_norm(F.conv2d(F.relu(x), depthwise.weight, groups=4, **options), pointwise)

    space = Cells("darts")
    pairs = (("sep_conv_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("none", 0), ("skip_connect", 1),
             ("dil_conv_5x5", 3), ("avg_pool_3x3", 3), ("none", 4))
    _, graph = space.graphs(cell_net(space, pairs, pairs, 4, 3))
    cell = search_spaces.TwoInputCell(graph, 6, 5, 4, last_reduced=True, reduction=True, whole=False).train()
    before, last = (torch.randn(2, c, side, side, generator=rng_of(c)) for c, side in ((6, 16), (5, 8)))
    op = {vertex.op: module for vertex, module in zip(graph[2:], cell.ops)}
    a, b = halved(before, cell.prepare[0]), conv_norm(F.relu(last), cell.prepare[1])
    first, second = op["sep_conv_3x3"]
    two = separable(separable(a, first, stride=2, padding=1), second, padding=1) + F.max_pool2d(b, 3, 2, 1)
    three = two
    four = halved(b, op["skip_connect"]) + separable(three, op["dil_conv_5x5"], padding=4, dilation=2)
    five = average(three)
    parts = cell(before, last, torch.zeros(2, 4, 4, 4)).split(4, 1)
    for node in (two, three, four, five):  # the canonical order of nodes is not that of the genotype
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


def test_darts_key_of_a_convolution_of_nothing():
    """Whichever it is, a bias is left of it: of a separable one too, as training does not move its inner batch norm."""
    space, keys = Cells("darts"), {}
    for op in ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "max_pool_3x3"):
        pairs = [("none", 0), ("none", 1), (op, 2), *[("skip_connect", 1)] * 5]
        keys[op] = space.key(cell_net(space, pairs, pairs, 16, 8))
    assert keys["sep_conv_3x3"] == keys["sep_conv_5x5"] == keys["dil_conv_3x3"] != keys["max_pool_3x3"]
    pools = set()
    for op in ("skip_connect", "max_pool_3x3", "avg_pool_3x3"):  # of a constant
        pairs = [("none", 0), ("none", 1), ("sep_conv_3x3", 2), ("none", 0), (op, 3), *[("skip_connect", 1)] * 3]
        pools.add(space.key(cell_net(space, pairs, pairs, 16, 8)))
    assert len(pools) == 1
    convolution = search_spaces.OPS["sep_conv_3x3"](4, 1)
    inner, last = convolution[0][-1].bias, convolution[1][-1].bias
    optimizer = torch.optim.SGD(convolution.parameters(), 0.1, momentum=0.9, weight_decay=1e-3)
    zeros, target = torch.zeros(2, 4, 8, 8), torch.randn(2, 4, 8, 8, generator=rng_of(0))
    for _ in range(5):
        optimizer.zero_grad()
        (convolution(zeros) - target).square().mean().backward()
        optimizer.step()
        assert not inner.grad.any() and last.all()
        assert_close(convolution(zeros), last.view(1, 4, 1, 1).expand(2, 4, 8, 8))


def test_pointwise_is_a_convolution():
    x = torch.randn(2, 6, 9, 8, generator=rng_of(0)).to(memory_format=torch.channels_last)
    for stride in (1, 2):
        module = search_spaces.conv(6, 5, 1, stride)
        assert_close(module(x), F.conv2d(x, module.weight, stride=stride))


def test_equal_operations_on_a_node_are_one_call():
    """Two 3x3 convolutions and two pools of the input: each pair one module, the output the sum by hand."""
    arch = NB201().parse("|nor_conv_3x3~0|+|nor_conv_3x3~0|none~1|+|avg_pool_3x3~0|skip_connect~1|avg_pool_3x3~2|")
    cell = NB201(width=4, cells=1).build(arch)[0][0][1].train()
    x = torch.randn(2, 4, 8, 8, generator=rng_of(1))
    convs = [op for (name, _), op in zip(cell.places, cell.ops) if name == "nor_conv_3x3"]
    assert len(convs) == 1 and convs[0][1].weight.shape[0] == 8
    one, two = norm(F.conv2d(F.relu(x), convs[0][1].weight, padding=1)).chunk(2, 1)
    outputs = [average(x) + a + average(b) for a, b in ((one, two), (two, one))]  # which is which, the key decides
    assert any(torch.allclose(cell(x), output, atol=1e-4) for output in outputs)


@pytest.mark.parametrize("name", ["nb101", "nb201", "nbmacro", "pnas-in", "amoeba", "resnet", "resnext-b-in"])
def test_taps_of_all_blocks(name):
    """The last block's maps end such a tap, before them stand those of the others, in the order in which they run."""
    sizes = {"width": 8} if name.startswith("nb") else {"shrink": 8}
    last, every = (search_spaces.get(name, all_blocks=flag, **sizes) for flag in (False, True))
    for seed in range(3):
        arch, taps = last.random(random.Random(seed)), []
        for space in (last, every):
            torch.manual_seed(0)
            network = space.build(arch).train()
            taps.append(network(torch.randn(2, 3, 16, 16, generator=rng_of(3))))
        for one, more in zip(*taps):
            assert one.shape[2:] == more.shape[2:] and one.shape[1] <= more.shape[1]
            assert torch.equal(one, more[:, -one.shape[1]:])
        if name == "nb201":
            assert [more.shape[1] for more in taps[1]] == [40, 80, 160]
        assert last.params(arch) == every.params(arch)
        assert last.flops is None or last.flops(arch) == every.flops(arch)


def test_nothing_dead_is_built():
    space = NB201(width=4, cells=1)
    cell = space.build(space.parse("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|nor_conv_3x3~0|none~1|none~2|"))[0][0][1]
    assert [type(op) for op in cell.ops] == [nn.Sequential]  # one convolution
    taps = space.build(space.parse(DEAD))(torch.randn(2, 3, 32, 32))
    assert [tuple(tap.shape) for tap in taps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)]
    assert not any(tap.any() for tap in taps)
    # Of cells that read only the one before the last every other one is dead, here the reduction cells among them.
    space, pairs = Cells("pnas"), [("sep_conv_3x3", 0)] * 10
    alive = cell_net(space, pairs, pairs, 4, 6)  # reductions at 2 and 4, taps after 1, 3 and 5
    cells = space.build(alive).cells
    assert [cell is None for cell in cells] == [True, False] * 3
    assert all([module is None for module in cell.prepare] == [False, True] for cell in cells if cell)
    assert space.key(alive) == space.key(cell_net(space, pairs, [("max_pool_3x3", 0), *pairs[1:]], 4, 6))
    # Of cells that read nothing only the tapped ones are left, and they are the same at any depth.
    space, nothing = Cells("darts", imagenet=True), [("none", 0)] * 8
    dead = [cell_net(space, nothing, nothing, 32, depth) for depth in (6, 10)]
    alive = [cell_net(space, pairs[:8], nothing, 32, depth) for depth in (6, 10)]
    assert space.key(dead[0]) == space.key(dead[1]) and len({space.key(arch) for arch in dead + alive}) == 3
    assert len({sum(p.numel() for p in space.build(arch).parameters()) for arch in dead}) == 1


def test_genotype_text():
    space = search_spaces.get("darts-fix")
    arch = space.parse(DARTS)
    assert eval(space.format(arch), {"Genotype": Genotype}) == arch.genotype
    assert space.parse(space.format(arch)) == space.parse(DARTS.replace("range(2, 6)", "[5, 3, 4, 2]")) == arch


# ---------------------------------------------------------------------------------------------------- NAS-Bench-NLP
def recipe_key(nodes: dict[str, dict] | str) -> str:
    return NBNLP().key(NBNLP().parse(nodes if isinstance(nodes, str) else json.dumps(nodes)))


def test_recipe_keys():
    text, key = json.dumps(RECIPE), recipe_key(RECIPE)
    assert recipe_key(dict(reversed(RECIPE.items()))) == key
    assert recipe_key(text.replace("node_1", "node_9").replace("node_3", "node_1")) == key
    assert recipe_key(text.replace('"h_prev_0", "h_new_1", "x"', '"x", "h_prev_0", "h_new_1"')) == key
    assert recipe_key(text.replace('"node_4", "h_new_1"', '"h_new_1", "node_4"')) != key  # a blend is ordered
    dead = RECIPE | recipe(h_new_2="activation_sigm node_5", node_5="linear x h_prev_2")
    assert recipe_key(dead) == key and len(NBNLP().build(parsed(NBNLP(), dead)).layers[0].weights) == 5
    alive = dead | recipe(node_6="elementwise_sum node_4 h_new_2", h_new_0="blend node_3 node_6 h_new_1")
    swapped = re.sub(r"h_(new|prev)_([12])", lambda m: f"h_{m[1]}_{3 - int(m[2])}", json.dumps(alive))
    assert recipe_key(alive) == recipe_key(swapped) != key


def summed_chains(rng: random.Random, last: str) -> dict[str, dict]:
    """16 chains, equal but for the activation of the last, summed in pairs of pairs; names and order are random."""
    names = ["", "h_new_0", *rng.sample([f"node_{i}" for i in range(46)], 46)]
    nodes = {names[i]: f"elementwise_sum {names[2 * i]} {names[2 * i + 1]}" for i in range(1, 16)}
    nodes |= {names[i]: f"activation_tanh {names[16 + i]}" for i in range(16, 32)}
    nodes |= {names[i]: "linear x h_prev_0" for i in range(32, 48)} | {names[31]: f"{last} {names[47]}"}
    return recipe(**dict(rng.sample(list(nodes.items()), 47)))


def test_key_of_a_symmetric_recipe():
    """2 ** 15 orders of its nodes are alike, which a key must not try one by one."""
    rng, start = random.Random(0), time.perf_counter()
    key = recipe_key(summed_chains(rng, "activation_tanh"))
    assert time.perf_counter() - start < 5
    assert recipe_key(summed_chains(rng, "activation_tanh")) == key
    assert recipe_key(summed_chains(rng, "activation_sigm")) != key


def test_recurrent_layer_by_hand():
    space = NBNLP()
    graph = space.graph(parsed(space, RECIPE))
    layer = search_spaces.RecurrentLayer(graph, 5, 4).eval()
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


def test_reservoir():
    """The same network, of which training leaves the recurrent matrices as they were drawn."""
    trained, outputs = {}, []
    for reservoir in (False, True):
        space = NBNLP((6, 8, 6), reservoir)
        torch.manual_seed(0)
        network = space.build(space.random(random.Random(3)))
        before = {name: p.clone() for name, p in network.named_parameters()}
        outputs.append(network.eval()(torch.ones(2, 3, 6)).detach())
        optimizer = torch.optim.Adam(network.train().parameters())
        network(torch.ones(2, 3, 6)).square().mean().backward()
        optimizer.step()
        trained[reservoir] = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    recurrent = {name for name in before if ".weights." in name and not name.endswith(" 0")}
    assert torch.equal(*outputs)
    assert recurrent and recurrent <= trained[False] and trained[True] == trained[False] - recurrent


# -------------------------------------------------------------------------------------------- counts and labels
def conv_params(*convolutions: tuple[int, int, int]) -> int:
    """Of convolutions (c_in, c_out, kernel), each with a batch norm."""
    return sum(c_in * c_out * kernel ** 2 + 2 * c_out for c_in, c_out, kernel in convolutions)


def test_params_by_hand():
    for arch in random.Random(3).sample(ARCHS, 20):
        kernels = [int(op[-1]) for op in arch if "conv" in op]
        total = conv_params((3, 16, 3), *[(c, c, k) for c in (16, 32, 64) for k in kernels for _ in range(5)])
        for c in (32, 64):  # the residual blocks
            total += conv_params((c // 2, c, 3), (c, c, 3)) + c // 2 * c
        assert NB201().params(arch) == total + 2 * 64 + 65 * 10

    total = conv_params(
        (3, 32, 3), (32, 64, 1), (64, 192, 1), (1, 192, 3), (192, 64, 1),  # the stem; layers 0 and 1
        (64, 128, 1), (128, 768, 1), (1, 768, 5), (768, 128, 1), (128, 256, 1), (256, 1280, 1))  # 2, 3 and 5; the tail
    assert NBMacro().params("01020000") == total + 1281 * 10

    cell = parsed(NB101(), [[[0, 1, 1], [0, 0, 1], [0, 0, 0]], ["input", "conv3x3-bn-relu", "output"]])
    blocks = [(128, 128)] * 3 + [(128, 256)] + [(256, 256)] * 2 + [(256, 512)] + [(512, 512)] * 2
    total = conv_params((3, 128, 3)) + sum(conv_params((i, c, 1), (i, c, 1), (c, c, 3)) for i, c in blocks)
    assert NB101().params(cell) == total + 513 * 10

    blocks = (16, 16, 3), (16, 24, 3), (24, 24, 3), (16, 24, 1), (24, 32, 3), (32, 32, 3), (24, 32, 1)
    resnet = search_spaces.get("resnet")
    assert resnet.params(parsed(resnet, NET)) == conv_params((3, 16, 3), *[(16, 16, 3)] * 3, *blocks) + 33 * 10

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


def test_an_architecture_is_counted_once(monkeypatch):
    classifier = Mock(wraps=search_spaces.Classifier)  # a benchmark's own network
    monkeypatch.setattr(search_spaces, "Classifier", classifier)
    skips, spaces = [("skip_connect", 1)] * 8, (Cells("darts"), Cells("darts", imagenet=True))
    arch = cell_net(spaces[0], skips, skips, 32, 4)  # the same value in both spaces, but not the same network
    counts = [(space.params(arch), space.flops(arch)) for _ in range(3) for space in spaces]
    assert counts[:2] * 3 == counts and len(set(counts[0] + counts[1])) == 4
    assert 2 <= classifier.call_count <= 4  # at most once for each of the four numbers


def test_labels_of_every_kind(tmp_path, capsys):
    record = {"net": NET, "params": 1, "test_ep_top1": [50.0, 7.5]}
    log = {"recepie": json.dumps(RECIPE), "status": "OK", "val_losses": [6.0, math.nan, 5.5, 5.6]}
    files = {"nds.json": {"top": [record], "mid": [record | {"test_ep_top1": [9]}]},
             "list.json": [[RECIPE, 1], [log, 2], [json.dumps(RECIPE), 3]],
             "logs/b.json": log, "logs/a.json": log | {"val_losses": [7.0]},
             "logs/c.json": log | {"status": "loss is nan!"}, "logs/d.json": log | {"val_losses": []}}
    for folder in ("logs", "empty"):
        (tmp_path / folder).mkdir()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name, space, values in (("nds.json", "resnet", [92.5, 91]), ("logs", "nbnlp", [-7, -5.5]),
                                ("list.json", "nbnlp", [1, 2, 3])):
        labels = search_spaces.load_labels(search_spaces.get(space), tmp_path / name)
        assert [value for _, value in labels] == values
        assert all(space_arch in (parsed(search_spaces.get(space), NET if space == "resnet" else RECIPE),)
                   for space_arch, _ in labels)
    assert "2 of 4 runs failed" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no entry"):
        search_spaces.load_labels(NBNLP(), tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------- regression
class Linear:
    """A space of one network whose taps are 1x1 convolutions of the image, to check the training by hand; the network
    "bad" gives infinite maps."""
    name = "linear"

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return [self.mix(x), self.mix(x)[:, :, ::2, ::2], self.mix(x)[:, :, ::4, ::4]]

    def key(self, arch):
        return arch

    format = params = parse = key

    def build(self, arch):
        body = self.Body()
        if arch == "bad":
            nn.init.constant_(body.mix.bias, math.inf)
        return body


def trainer_for(space, settings: Settings | None = None, regression=None, seed: int = 0) -> Trainer:
    """A Trainer of an object that is a space, on small inputs; `regression(task, seed)` in the place of its own."""
    trainer = Trainer.__new__(Trainer)
    trainer.name, trainer.space, trainer.seed = "mine", space, seed

    def made(task: str, seed: int):
        if regression:
            return regression(gennas.task_from_json(task), seed)
        return Regression(gennas.task_from_json(task), images(), settings or Settings(steps=2), seed)

    trainer.regression = functools.cache(made)
    return trainer


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_regression_by_hand(kind):
    """Three steps and the final loss, every formula written out: noise, batch norm, loss, momentum, weight decay."""
    hand_task = replace(small_task(), noise=Noise(kind, 0.3))
    trained = Regression(hand_task, images(), Settings(steps=3), seed=7)(Linear(), "a")
    with torch.random.fork_rng():
        torch.manual_seed(gennas.seed_of("weights", "linear", "a", 7))
        body = Linear.Body()
        heads = [(nn.BatchNorm2d(2), nn.Conv2d(2, 5, 1))[1] for _ in range(3)]
    w, b = body.mix.weight, body.mix.bias
    leaves = [w, b]
    for head in heads:
        leaves += [head.weight, head.bias, torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)]
    velocity = [torch.zeros_like(p) for p in leaves]
    running = [[torch.zeros(2), torch.ones(2)] for _ in heads]
    wanted = hand_task.draw(images(), 7)
    rng = rng_of(gennas.seed_of("noise", "linear", "a", 7))
    expected = []
    for step in range(4):
        noise = torch.empty(16, 3, 32, 32).to(memory_format=torch.channels_last)
        noise = noise.uniform_(-1, 1, generator=rng) if kind == "uniform" else noise.normal_(generator=rng)
        noisy = images() + 0.3 * noise
        stages = []
        for i, target in enumerate(wanted):
            tap = torch.einsum("oi,bihw->bohw", w[:, :, 0, 0], noisy) + b[:, None, None]
            tap = tap[:, :, ::4, ::4]
            hw, hb, gamma, beta = leaves[2 + 4 * i: 6 + 4 * i]
            mean, var = running[i] if step == 3 else (tap.mean((0, 2, 3)), tap.var((0, 2, 3), unbiased=False))
            if step < 3:
                running[i][0] = 0.9 * running[i][0] + 0.1 * mean.detach()
                running[i][1] = 0.9 * running[i][1] + 0.1 * tap.var((0, 2, 3)).detach()
            tap = (tap - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
            tap = tap * gamma[:, None, None] + beta[:, None, None]
            output = torch.einsum("oi,bihw->bohw", hw[:, :, 0, 0], tap) + hb[:, None, None]
            stages.append(((output - target) ** 2).sum() / target.numel())
        loss = 0.25 * stages[0] + 0.5 * stages[1] + stages[2]
        expected.append([stage.item() for stage in stages])
        gradients = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            for p, g, v in zip(leaves, gradients, velocity):
                v.mul_(0.9).add_(g + 4e-5 * p if p.ndim > 1 else g)
                p.sub_(0.1 * v)
    np.testing.assert_allclose(trained.losses, expected, rtol=1e-4)
    assert trained.loss == pytest.approx(loss.item(), rel=1e-4) and trained.params == w.numel() + b.numel()


def losses_of(*texts: str, seed: int = 0) -> list[float]:
    space = NB201(width=4, cells=1)
    return Scorer(trainer_for(space, seed=seed))([small_task()], [space.parse(text) for text in texts])[0]


def test_score_is_pure():
    """Independent of order, of the global generators, which it leaves alone, and of the process."""
    other = "[[4],[2,3],[0,1,3]]"
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b = losses_of(RICH, other)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert losses_of(other, RICH) == [b, a] and a != b
    assert losses_of(RICH, seed=1) != [a]
    code = f"import test_gennas as t; print(t.losses_of({RICH!r}))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert json.loads(fresh.stdout) == [a]


def test_score_is_pure_whatever_the_space_does(run, tmp_path):
    """`params` draws from the global generator, while others train: the score is that of the network trained alone."""
    file, out = tmp_path / "mine.py", tmp_path / "out.jsonl"
    file.write_text("import time, torch\n" + plain_space().replace(
        "        return sum(p", "        time.sleep(0.1)\n        torch.rand(1000)\n        return sum(p"))
    name = f"{file}:Plain"
    archs = [f"[[{kernel}, {channels}], [1, 8], [1, 8]]" for kernel in (1, 3) for channels in (8, 16, 32)]
    command = "--space", name, "--steps", 9, "--mode", "score", *archs, "--json", "--quiet"
    results = last_json(run(*command, "--out", out)[1])["results"]
    trainer = Trainer(name, steps=9)
    alone = [trainer.regression(gennas.TASKS["nb101"].to_json(), 0)(trainer.space, trainer.space.parse(arch)).loss
             for arch in archs]
    assert [result["loss"] for result in results] == alone == list(recorded(out).values())


def test_only_the_generators_of_the_device_are_touched(monkeypatch):
    fork = Mock(side_effect=torch.random.fork_rng)
    monkeypatch.setattr(torch.random, "fork_rng", fork)
    for module in (torch.cuda, torch.mps):
        monkeypatch.setattr(module, "manual_seed", Mock(side_effect=AssertionError))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", Mock(side_effect=AssertionError))
    losses_of(RICH)
    assert [call.args for call in fork.call_args_list] == [([],)]
    states = Mock(get_rng_state=Mock(return_value="before"))
    monkeypatch.setattr(torch, "mps", states)
    with pytest.raises(ArithmeticError), gennas.generators_kept(torch.device("mps")):
        raise ArithmeticError
    states.set_rng_state.assert_called_once_with("before")


def test_equal_keys_equal_scores():
    space, rng = NB201(width=4, cells=1), random.Random(6)
    regression = Regression(small_task(), images(), Settings(steps=2))
    for archs in rng.sample([archs for archs in classes().values() if len(archs) > 1], 8):
        assert regression(space, archs[0]) == regression(space, archs[-1])


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
    single = gennas.ridge_loss(features.detach().float(), target.float(), 1e-3)
    assert single.item() == pytest.approx(plain_ridge(features.detach().numpy(), target.numpy(), 1e-3), rel=1e-3)


class Taps(nn.Module):
    """A network whose taps are its images, resized, with the channels repeated and scaled."""

    def __init__(self, side: int, repeats: int, scale: float):
        super().__init__()
        self.side, self.repeats = side, repeats
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.scale * F.interpolate(x, size=self.side).repeat(1, self.repeats, 1, 1)] * 3


@pytest.mark.parametrize("side", [1, 3, 4, 8, 16])
@pytest.mark.parametrize("repeats, scale", [(1, 1.0), (300, 1.0), (1, 0.0)])
def test_solved_heads_of_a_network(side, repeats, scale):
    """A tap that is smaller than the target has the target's means to regress; of a zero tap all of it is left."""
    space = Linear()
    space.build = lambda arch: Taps(side, repeats, scale)
    task = replace(small_task(), noise=Noise("uniform", 0))
    reg = Regression(task, images(), Settings(steps=0, batch=4, ridge=0.1))
    trained = reg(space, "a")
    small = min(side, 8)
    expected = 0
    for weight, target in zip((0.25, 0.5, 1), task.draw(images()[:4], 0, 4, 8)):
        f = scale * F.interpolate(F.interpolate(images()[:4], size=side), size=small).repeat(1, repeats, 1, 1)
        f, y = (x.permute(0, 2, 3, 1).flatten(0, 2).double().numpy() for x in (f, F.adaptive_avg_pool2d(target, small)))
        expected += weight * plain_ridge(f, y - y.mean(0), 0.1)
    assert trained.loss == pytest.approx(expected, rel=1e-4) and len(trained.losses) == 1
    assert len(Regression(task, images(), Settings(steps=2, batch=4, ridge=0.1))(space, "a").losses) == 3


@pytest.mark.parametrize("space, task", [(NB201(4, 1), small_task()), (NBNLP((8, 9, 9, 8), True), small_rnn_task())])
def test_solved_heads_train_the_network(space, task):
    arch, pictures = space.random(random.Random(4)), images() if isinstance(task, Task) else None
    settings = Settings(steps=20, ridge=0.1, rnn_learning_rate=0.005)
    trained = Regression(replace(task, noise=Noise("uniform", 0)), pictures, settings)(space, arch)
    first, *_, last, _ = np.sum(trained.losses, axis=1)
    assert last < 0.995 * first


def test_stages_that_do_not_count():
    """They have no loss and do not train; their terms count nothing in a score."""
    space, settings = NB201(4, 1), Settings(steps=4, ridge=0.1, stage_weights=(0.0, 2.0, 0.0))
    trained = Regression(small_task(), images(), settings)(space, space.parse(RICH))
    losses = np.array(trained.losses)
    assert np.isnan(losses[:, [0, 2]]).all() and trained.loss == pytest.approx(2 * losses[-1, 1])
    logs = {f"log loss 2 at {share}": math.log(losses[step, 1]) for share, step in (("0", 0), ("0.25", 1), ("0.5", 2),
                                                                                   ("1", 4))}
    expected = {"loss": trained.loss, "log params": math.log(trained.params)} | logs
    assert gennas.terms(trained) == pytest.approx(expected)
    assert gennas.score([Weight("log loss 1 at 0", 5.0), Weight("loss", 2.0)], trained) == 2 * trained.loss


def test_score_by_weights():
    trained = gennas.Trained(3.0, [[1.0, 2.0, math.e], [1.0, 2.0, 0.0], [1.0, math.inf, 0.5]], 100)
    assert set(gennas.terms(trained)) <= set(gennas.TERMS)
    for weights, expected in [
            (gennas.PAPER, 3), ([Weight("loss", -2.0)], -6),
            ([Weight("log params", 1.0)], math.log(100)),
            ([Weight("log params", 1.0), Weight("log loss 2 at 1", 1.0)], math.log(100)),  # infinite: no term
            ([Weight("log loss 3 at 0", 1.0), Weight("log loss 2 at 0", 2.0)], 1 + 2 * math.log(2)),
            ([Weight("log loss 3 at 0.25", 1.0)], math.log(1e-9)),
            ([Weight("log loss 3 at 1", 3.0)], 3 * math.log(0.5))]:
        assert gennas.score(weights, trained) == pytest.approx(expected, abs=1e-8)
    for loss in (None, math.nan, math.inf):
        assert gennas.score(gennas.PAPER, trained._replace(loss=loss)) == math.inf
    with pytest.raises(ValueError, match="expected some of loss, log params, "):
        gennas.score([Weight("log loss 2 at 1", 1.0)], trained)


def test_regression_takes_as_many_and_as_small_images_as_the_settings_say():
    reg = Regression(small_task(), images(), Settings(batch=4, side=16))
    assert reg.inputs.shape == (4, 3, 16, 16) and reg.targets[0].shape == (4, 5, 8, 8)
    plain = F.interpolate(images()[:4], size=16, mode="bilinear", antialias=True)
    assert torch.equal(reg.inputs, plain.to(memory_format=torch.channels_last))
    assert not torch.equal(plain, images()[:4, :, ::2, ::2])
    big = gennas.resized(images()[:1, :, :4, :4], 8)
    assert torch.equal(big, images()[:1, :, :4, :4].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("space, preset, steps, side, width", [
    ("nb201", "paper", 100, 32, 16), ("nb201", "fast", 12, 24, 8)])
def test_presets_in_a_space(space, preset, steps, side, width):
    trainer = Trainer(space, preset)
    assert (trainer.settings.steps, trainer.settings.side) == (steps, side)
    assert Trainer(space, preset, 0).settings == replace(trainer.settings, steps=0)
    assert trainer.space.build(trainer.space.parse(RICH))[0][0][0][0].out_channels == width


def test_presets_name_families():
    families = {name.removesuffix("-in").removesuffix("-fix") for name in search_spaces.SPACES}
    for name, presets in gennas.PRESETS.items():
        assert set(presets) <= families | set(search_spaces.SPACES) | {""}
        assert all((preset.settings.ridge is None) == (name == "paper") for preset in presets.values())
    assert gennas.Trainer("darts", "paper").task_name == "darts" and set(gennas.PRESETS["fast"]) >= families
    names = {space: gennas.Trainer(space).task_name for space in ("darts", "pnas-in", "nbnlp", *gennas.FITTED)}
    assert names == {"darts": "combo", "pnas-in": "pnas-in-fitted", "nbnlp": "nlp"} | {
        space: f"{space}-fitted" for space in gennas.FITTED}
    assert Trainer("nb201", steps=12).task_name == "nb201-fitted"  # fitted for these steps and no other preset
    assert Trainer("nb201", steps=6).task_name == Trainer("nb201", "paper").task_name == "nb101"
    terms = [weight.term for weight in gennas.TASKS["nb201-fitted"].weights]
    assert terms == [term for term in gennas.TERMS if not term.startswith("log loss 1")]  # stage 1 has no loss there
    assert all(len(weights) == len(gennas.TERMS) for weights in gennas.FITTED.values())


def test_devices(monkeypatch):
    """Each worker has the GPU that falls to it, and none is touched to find it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    found = [gennas.find_device(name, rank=3) for name in (None, "cuda", "cuda:0", "cpu")]
    assert [(device.type, device.index) for device in found] == [("cuda", 1), ("cuda", 1), ("cuda", 0), ("cpu", 0)]
    for name in ("cuda:2", "cuda:x", "mps:1", "hpu", "privateuseone", "meta", "a\nb"):
        with pytest.raises(ValueError, match="not available here; expected cpu, cuda"):
            gennas.find_device(name)


def test_no_step_waits_for_the_device():
    space = NB201(width=4, cells=1)
    for ridge, convolutions in ((None, 14), (0.1, 11)):  # those of 1x1 but the heads are matrix products
        regression = Regression(small_task(), images(), Settings(steps=3, ridge=ridge))
        with torch.profiler.profile() as profile:
            regression(space, space.parse(RICH))
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["aten::convolution_backward"] == 3 * convolutions
        assert not {"aten::item", "aten::_local_scalar_dense"} & calls.keys()


def test_diverged_networks_rank_last_and_are_marked():
    scorer = Scorer(trainer_for(Linear()))
    (good, bad), = scorer([small_task()], ["good", "bad"])
    score = scorer.scores[scorer.keys(small_task(), ["bad"])[0]]
    assert math.isfinite(good) and bad == math.inf and score.loss is None and score.losses == [[None] * 3] * 3
    assert gennas.spearman([-good, -bad, -math.inf], [3, 2, 1]) == pytest.approx(3 / math.sqrt(12))
    assert gennas.show_loss(bad) == "diverged" and gennas.finite(bad) is None


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
    assert math.isnan(gennas.spearman([1, 1, 1], [1, 2, 3])) and math.isnan(gennas.kendall([1, 2, 3], [4, 4, 4]))
    assert gennas.spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1) == gennas.kendall([1, 2, 3], [10, 20, 30])


def test_bootstrap_intervals():
    rng = np.random.default_rng(1)
    values = rng.normal(size=100)
    noise = rng.normal(size=100)
    a, b = values + noise, values + 1.2 * noise  # b is worse, for the same networks mostly
    low, high = gennas.spearman_interval(a, values)
    assert low < gennas.spearman(a, values) < high
    assert 0.05 < high - low < 0.35  # by the normal theory about 4 (1 - rho^2) / 10
    assert gennas.spearman_interval(a, a) == pytest.approx((1, 1))
    difference, least, most = gennas.spearman_difference(a, b, values)
    assert difference == gennas.spearman(a, values) - gennas.spearman(b, values)
    assert 0 < least < difference < most and most - least < (high - low) / 2  # paired, that is
    assert gennas.spearman_difference(a, a, values) == (0, 0, 0)
    assert gennas.spearman_difference(b, a, values)[0] == -difference
    assert all(map(math.isnan, gennas.spearman_interval(a[:9], values[:9])))  # three in order tell nothing of a fourth
    assert not any(map(math.isnan, gennas.spearman_interval(a[:10], values[:10])))


# ------------------------------------------------------------------------------------------------------- task search
def genes(any_task) -> dict[str, object]:
    """The fields that a mutation draws again, by name."""
    data = json.loads(any_task.to_json())
    parts = data.pop("stages", None) or [{"signals": data.pop(name)} for name in ("input", "target")]
    for i, part in enumerate(parts):
        bases = [signal["basis"] for signal in part["signals"]]
        assert bases == [basis for basis in gennas.BASES if basis in bases]
        data |= {f"{basis} {i}": None for basis in gennas.BASES}
        data |= {f"{signal['basis']} {i}": signal for signal in part["signals"]}
        data |= {f"channels {i}": part["channels"]} if "channels" in part else {}
    return data


@pytest.mark.parametrize("kind, fields", [(Task, 20), (RnnTask, 13)])
def test_random_and_mutated_tasks(kind, fields):
    """Draws are valid, print and read back; each field has the chances of the paper's task space; mutation redraws a
    fifth."""
    rng = random.Random(0)
    tasks = [gennas.random_task(rng, kind) for _ in range(1000)]
    children = [gennas.mutate_task(parent, rng) for parent in tasks]
    for any_task in tasks + children:
        assert type(any_task) is kind and gennas.task_from_json(any_task.to_json()) == any_task
    drawn, redrawn = [genes(any_task) for any_task in tasks], [genes(any_task) for any_task in children]
    assert {len(values) for values in drawn} == {fields}
    assert {(values["noise"]["kind"], values["noise"]["level"]) for values in drawn} == {
        (noise, level / 10) for noise in ("gaussian", "uniform") for level in range(10)}
    signals = [value for values in drawn for value in values.values() if isinstance(value, dict) and "basis" in value]
    assert {signal["level"] for signal in signals} == {level / 10 for level in range(5, 30)}
    own = [signal["per_sample"] for signal in signals if "per_sample" in signal]
    assert all(own) if kind is RnnTask else 0.45 < sum(own) / len(own) < 0.55
    frequencies = [f for signal in signals for f in signal.get("frequencies", ())]
    assert 0.24 < sum(frequencies) / len(frequencies) < 0.26 and min(frequencies) < 0.02 and max(frequencies) > 0.48
    for name in drawn[0].keys() - {"noise", "weights"}:
        values = [d[name] for d in drawn]
        if name.startswith(("channels", "dimension")):
            assert set(values) == set(range(16, 97, 16))
            continue
        absent = sum(value is None for value in values)
        assert absent == 1000 if kind is RnnTask and "resize" in name else 430 < absent < 570
        changed = sum(old != new for old, new in zip(values, (d[name] for d in redrawn)))
        if absent < 1000:  # of the redrawn three quarters differ: not those that are absent before and after
            assert 110 < changed < 225  # more than 150, as a child that changes in nothing is drawn again
    assert all(child != parent for child, parent in zip(children, tasks))


SEARCH_TASK = "--mode", "search-task", "--population", 4, "--tournament", 2, "--cycles", 5, "--batch", 2, "--steps", 1


def test_search_task(run, tmp_path):
    """What it reports of the found task is what `correlate` says of it; every task on every architecture is trained
    once."""
    rng = random.Random(1)
    archs = [NB201().random(rng) for _ in range(9)]
    labels, rest = (labels_file(tmp_path / f"{len(part)}.json", NB201(), part) for part in (archs, archs[5:]))
    found, out = tmp_path / "found.json", tmp_path / "out.jsonl"
    command = *SEARCH_TASK, "--labels", labels, "--limit", 5
    status, stdout, stderr = run(*command, "--json", "--out", out)
    result = last_json(stdout)
    assert status == 0 and result["mode"] == "search-task"
    assert (result["evaluated"], result["n"], result["n_held_out"]) == (9, 5, 4)
    assert f"spearman {result['spearman']:.3f} on the 5 labels of the search" in stderr
    assert f"{result['spearman_held_out']:.3f} on 4 others" in stderr and "49/49" in stderr
    losses = recorded(out)
    counts = Counter(tuple(key.split()[:2]) for key in losses)  # the digest of a task
    assert sorted(counts.values()) == [5] * 8 + [9]  # 9 tasks on 5, the found one on 4 more

    found.write_text(run(*command, "--quiet")[1])  # without --json, what it prints is a task file
    assert json.loads(found.read_text()) == result["task"]
    words = "--mode", "correlate", "--labels", rest, "--task", found, "--json", "--steps", 1
    assert last_json(run(*words)[1])["spearman"] == pytest.approx(result["spearman_held_out"])
    task = gennas.task_from_json(found.read_text())
    found.write_text(task.unweighted().to_json())
    words = "--mode", "correlate", "--labels", labels, "--limit", 5, "--task", found, "--json", "--steps", 1
    by_paper = last_json(run(*words)[1])["spearman"]
    assert result["spearman"] > by_paper if result["fitted"] else result["spearman"] == pytest.approx(by_paper)

    lines = out.read_bytes().splitlines(keepends=True)  # killed, and continued
    out.write_bytes(b"".join(lines[:17]) + lines[17][:9])
    again = last_json(run(*command, "--json", "--out", out)[1])
    assert timeless(again) == timeless(result) and recorded(out) == losses


def test_search_task_in_several_spaces(run, tmp_path, monkeypatch):
    """Rho on the others is the mean over the spaces; one record holds both spaces, and resumes."""
    monkeypatch.setitem(search_spaces.SPACES, "nbmacro", lambda **sizes: NBMacro(width=4))
    files, rng = [], random.Random(3)
    for space in (NB201(), NBMacro()):
        archs = list({space.key(arch): arch for arch in (space.random(rng) for _ in range(7))}.values())
        files.append(labels_file(tmp_path / f"{space.name}.json", space, archs))
    out = tmp_path / "out.jsonl"
    spaces = "--space", "nb201", "nbmacro", "--labels", *files
    command = *SEARCH_TASK, *spaces, "--limit", 4, "--json", "--out", out
    status, stdout, stderr = run(*command)
    result = last_json(stdout)
    assert status == 0 and result["space"] == ["nb201", "nbmacro"] and (result["n"], result["n_held_out"]) == (8, 6)
    lines = out.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 9 * 8 + 6 and set(json.loads(lines[0])["settings"]) == {"nb201", "nbmacro", "task"}
    out.write_bytes(b"".join(lines[:30]))
    assert timeless(last_json(run(*command)[1])) == timeless(result)
    task = tmp_path / "task.json"
    task.write_text(json.dumps(result["task"]))
    rhos = []
    for space, file in zip(spaces[1:3], files):
        (rest := tmp_path / f"rest_{space}.json").write_text(json.dumps(json.loads(file.read_text())[4:]))
        words = "--mode", "correlate", "--space", space, "--labels", rest, "--task", task, "--steps", 1, "--json"
        rhos.append(last_json(run(*words)[1])["spearman"])
    assert result["spearman_held_out"] == pytest.approx(sum(rhos) / 2)
    assert run("--mode", "score", "--space", "nb201", RICH)[0] == 0  # an architecture behind the space is none


def rig(monkeypatch, merit) -> list[Task]:
    """In place of a training, `merit(task, arch)` is the loss; the tasks that are asked for, in order."""
    asked = []

    def regression(self, task: str, seed: int):
        asked.append(gennas.task_from_json(task))
        return lambda space, arch: gennas.Trained(merit(asked[-1], arch), [[1.0, 1.0, 1.0]], 1)

    monkeypatch.setattr(Trainer, "regression", regression)
    return asked


def test_search_task_from_a_task(run, monkeypatch):
    """The first population is the given task and mutants of it, else the known tasks and random ones; of a given task
    and no cycles it is this alone."""
    asked, rng = rig(monkeypatch, lambda task, arch: 1.0), random.Random(0)
    command = "--mode", "search-task", "--limit", 3, "--cycles", 0, "--json"
    run(*command, "--task", "darts", "--population", 3)
    assert asked[:9:3] == [gennas.TASKS["darts"], *[gennas.mutate_task(gennas.TASKS["darts"], rng) for _ in range(2)]]
    asked.clear()
    known = list(dict.fromkeys(task.unweighted() for task in gennas.TASKS.values() if isinstance(task, Task)))
    run(*command, "--population", len(known) + 1)
    assert asked[:3 * len(known) + 3:3] == [*known, gennas.random_task(random.Random(0), Task)]
    asked.clear()
    assert last_json(run(*command, "--task", "darts")[1])["evaluated"] == 1 and set(asked) == {gennas.TASKS["darts"]}


def test_worth_of_labels(run, tmp_path):
    """Ten labels of ten are what the weights were fitted to; of five there are no ten."""
    command = "--mode", "search-task", "--task", "nb101", "--cycles", 0, "--json", *plot_to(tmp_path / "x.png")
    result = last_json(run(*command, "--limit", 10)[1])
    task = replace(gennas.task_from_json(json.dumps(result["task"])), weights=gennas.PAPER)
    trained, = Scorer(Trainer("nb201", steps=2)).train([task], [arch for arch, _ in NB201().labels])
    pairs = [(known, value) for known, (_, value) in zip(trained, NB201().labels)]
    weights = gennas.fit_weights([pairs[:10]])
    scores = [[gennas.score(weights, known) for known, _ in pairs[10:]]]
    assert result["spearman_held_out_by_labels"] == {"10": pytest.approx(gennas.mean_rho(scores, [pairs[10:]]))}
    assert result["n_held_out"] == 10 and last_json(run(*command, "--limit", 5)[1])["spearman_held_out_by_labels"] == {}


def test_search_task_prefers_what_correlates(run, monkeypatch):
    """The found task is the one whose losses rank the built-in labels best, the most accurate network lowest; where it
    ranks them backwards, fitted weights turn it round."""
    accuracy = dict(NB201().labels)

    def merit(task: Task, arch) -> float:
        sign = 1 if task.noise.level == 0 else -1  # without noise it ranks backwards, and clearly
        return sign * accuracy[arch] + random.Random(str(arch)).gauss(0, 5 + 20 * task.noise.level)

    asked = rig(monkeypatch, merit)
    result = last_json(run("--mode", "search-task", "--population", 10, "--cycles", 20, "--json")[1])
    tasks = [gennas.task_from_json(text) for text in dict.fromkeys(task.to_json() for task in asked)]
    rhos = {task: gennas.spearman([-merit(task, arch) for arch in accuracy], list(accuracy.values())) for task in tasks}
    assert min(rhos.values()) < -0.4 and result["n"] == 20 and "n_held_out" not in result
    found = gennas.task_from_json(json.dumps(result["task"]))
    assert result["spearman"] >= max(rhos.values()) and result["fitted"] == (found.weights != gennas.PAPER)
    backwards = min(tasks, key=rhos.get)
    turned, = gennas.fit_weights([[(gennas.Trained(merit(backwards, arch), [[1.0]], 1), value)
                                   for arch, value in accuracy.items()]])
    assert turned.term == "loss" and turned.weight < 0


def plain_fit(x: np.ndarray, loss_column: int, values: Sequence[float]) -> np.ndarray:
    """Scores of the rows by weights fitted to them, by numpy's least squares on the rows and, below, the penalty."""
    middle = np.median(x, 0)
    spread = np.median(abs(x - middle), 0)
    z = np.clip((x - middle) / spread, -4, 4)
    place = np.argsort(np.argsort([-value for value in values]))
    wanted = (place - place.mean()) / place.std()
    penalty = np.diag([math.sqrt(1e-6 if column == loss_column else 20) for column in range(x.shape[1])])
    centred = z - z.mean(0)
    below = np.vstack([centred, penalty]), np.r_[wanted, np.zeros(len(penalty))]
    return x / spread @ np.linalg.lstsq(*below, rcond=None)[0]


def drawn_networks(rng: np.random.Generator, n: int, level: float = 0.0) -> list[tuple[gennas.Trained, float]]:
    quality = rng.normal(size=n)
    noise = rng.normal(size=(n, 4)) * 0.3
    trained = [gennas.Trained(math.exp(-q + e[0] + level), [[math.exp(q + e[1]), math.exp(e[2])]] * 2,
                              int(1e4 * math.exp(q + e[3]))) for q, e in zip(quality, noise)]
    return list(zip(trained, quality.tolist()))


def test_fit_weights():
    """One space by hand; a diverged network is left out; of several spaces, their levels and sizes do not matter."""
    space = drawn_networks(np.random.default_rng(0), 30)
    trained, values = zip(*space)
    weights = gennas.fit_weights([space])
    assert weights == gennas.fit_weights([[*space, (trained[0]._replace(loss=math.nan), 9.0)]])
    x = np.array([list(gennas.terms(each).values()) for each in trained])
    scores = [gennas.score(weights, each) for each in trained]
    difference = np.array(scores) - plain_fit(x, 0, values)
    assert np.ptp(difference) < 1e-3 and gennas.spearman([-x for x in scores], values) > 0.9
    assert {weight.term for weight in weights} == set(gennas.terms(trained[0]))
    other = drawn_networks(np.random.default_rng(1), 90, level=3.0)
    both = gennas.fit_weights([space, other])
    for part in (space, other):
        assert gennas.mean_rho([[gennas.score(both, each) for each, _ in part]], [part]) > 0.9
    thrice = gennas.fit_weights([space * 3, other])
    assert [weight.weight for weight in thrice] == pytest.approx([weight.weight for weight in both], rel=0.2, abs=0.2)
    lacking = [(each._replace(losses=[[math.nan, *row[1:]] for row in each.losses]), value) for each, value in other]
    few, many = ({each.term: abs(each.weight) for each in gennas.fit_weights([space, rest])}
                 for rest in (lacking[:29], other))
    assert all(few[term] < 3 * max(size, 0.3) for term, size in many.items())  # a term that only one space has
    assert gennas.fit_weights([space[:2]]) == gennas.fit_weights([[]]) == gennas.PAPER
    assert gennas.fit_weights([[(trained[0], value) for value in values]]) == gennas.PAPER  # all equal
    most = [(trained[0]._replace(loss=loss), value)  # equal up to a few
            for loss, value in zip((1.0, 1.0, 1.0, 1.0, 2.0, 3.0), (9, 9, 9, 9, 5, 1))]
    weight, = gennas.fit_weights([most])
    assert weight.term == "loss" and weight.weight > 0


def test_judge():
    """The merit of fitted weights is on networks that they were not fitted on; the paper's stay where they rank better.
    """
    rng = np.random.default_rng(2)
    drawn = drawn_networks(rng, 40)
    folds = [list(range(10)) * 4]
    for sign in (1, -1):  # by the loss alone the right order, then the reverse
        space = [(each, sign * value) for each, value in drawn]
        merit, weights = gennas.judge([space], folds)
        apart = [None] * 40
        for fold in range(10):
            rest = [pair for i, pair in enumerate(space) if i % 10 != fold]
            fitted = gennas.fit_weights([rest])
            level = np.mean([gennas.score(fitted, each) for each, _ in rest])
            for i in range(fold, 40, 10):
                apart[i] = level - gennas.score(fitted, space[i][0])
        assert merit == pytest.approx(gennas.spearman(apart, [value for _, value in space]))
        assert weights == gennas.fit_weights([space])
    merit, weights = gennas.judge([[(each, value) for (each, _), value in zip(drawn, rng.normal(size=40))]], folds)
    assert abs(merit) < 0.5
    assert gennas.judge([[(each, -each.loss) for each, _ in drawn]], folds) == (1.0, gennas.PAPER)


def test_built_in_labels():
    space = NB201()
    archs, values = zip(*space.labels)
    assert len({space.key(arch) for arch in archs}) == 20
    assert [sum(value > other for other in values[:10]) for value in values[:10]] == list(range(10))  # in any half even


@needs_shared
def test_built_in_labels_as_recorded():
    space = NB201()
    known = dict(search_spaces.load_labels(space, SHARED / "labels" / "nb201_cifar10.json")[:600])
    assert all(known[arch] == value for arch, value in space.labels)
    assert sorted(value for _, value in space.labels) == sorted(known.values())[15::30]


# ------------------------------------------------------------------------------------------------ the record, workers
SEARCH = ["--space", "nb201", "--steps", 1, "--population", 6, "--tournament", 2, "--cycles", 8, "--batch", 3, "--json"]


def recorded(out: Path) -> dict[str, float]:
    """By key, of a file with one line for each."""
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    losses = {line["key"]: line["loss"] for line in lines}
    assert len(losses) == len(lines)
    return losses


def wait_for(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


def has_scores(out: Path) -> bool:
    return out.exists() and out.read_bytes().count(b"\n") >= 4


def children(process: subprocess.Popen) -> list[int]:
    """Those that run Python's own code for workers; the tracker of shared resources is no worker."""
    def is_worker(child: str) -> bool:
        return b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()

    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in listed if is_worker(child)]


def is_alive(pid: int) -> bool:
    """And no zombie, which waits for its parent's parent."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split(") ")[1][0] != "Z"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, dict]:
    """Result and losses of SEARCH with one worker."""
    out = tmp_path_factory.mktemp("search") / "scores.jsonl"
    status, stdout, stderr = run_process(*SEARCH, "--workers", 1, "--out", out)
    assert status == 0, stderr
    result, losses = timeless(last_json(stdout)), recorded(out)
    assert result["evaluated"] == 14 and len(losses) == result["unique"]
    return result, losses


@on_linux
@pytest.mark.parametrize("victim, number, status", [
    ("main", os_signal.SIGKILL, -os_signal.SIGKILL), ("main", os_signal.SIGHUP, 130), ("worker", os_signal.SIGKILL, 1)])
def test_search_resumes_after_kill(tmp_path, undisturbed, victim, number, status):
    """A run of which a process is killed in its middle, or that is told to end, leaves no process; continued by the
    same command it ends as the undisturbed one."""
    out, command = tmp_path / "scores.jsonl", [*SEARCH, "--workers", 2, "--out", tmp_path / "scores.jsonl"]
    process = start_process(*command)
    assert wait_for(lambda: has_scores(out))
    workers = children(process)
    os.kill(process.pid if victim == "main" else workers[0], number)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == status and len(workers) == 2 and "Traceback" not in stderr
    assert wait_for(lambda: not any(map(is_alive, workers)), 2)
    if status > 0:
        assert ("error: a worker died (exit status -9); " if victim == "worker" else "interrupted; ") in stderr
        assert f"{len(recorded(out))} networks are scored and kept in {out}; best " in stderr
    assert 3 <= len(recorded(out)) < len(undisturbed[1])
    status, stdout, _ = run_process(*command)
    assert timeless(last_json(stdout)) == undisturbed[0] and recorded(out) == undisturbed[1]


@on_linux
@pytest.mark.parametrize("delay", [0.1, 0.8])
def test_no_orphans_of_a_run_that_is_killed_as_it_starts(delay):
    process = start_process(*SEARCH, "--workers", 3)
    assert wait_for(lambda: len(children(process)) == 3)
    time.sleep(delay)
    workers = children(process)
    process.kill()
    stdout, stderr = process.communicate(timeout=10)  # which waits for all that hold the two pipes
    assert not any(map(is_alive, workers)) and stdout == "" and "Traceback" not in stderr


@on_linux
def test_nothing_listens_on_one_machine(tmp_path, undisturbed):
    """And with three workers the result is that of one."""
    out = tmp_path / "scores.jsonl"
    process = start_process(*SEARCH, "--workers", 3, "--out", out)
    assert wait_for(lambda: has_scores(out))
    pids = [process.pid, *children(process)]
    sockets = {os.readlink(file) for pid in pids for file in Path(f"/proc/{pid}/fd").iterdir() if file.exists()}
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            assert f"socket:[{line.split()[9]}]" not in sockets
    stdout, _ = process.communicate(timeout=60)
    assert timeless(last_json(stdout)) == undisturbed[0] and recorded(out) == undisturbed[1]


def test_two_nodes_under_torchrun(tmp_path, undisturbed):
    """Two launchers that meet on the loopback address; only the first node keeps the scores and writes its results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = f"--nnodes 2 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port} --node-rank"
    nodes = [start_process(*SEARCH, "--out", tmp_path / f"{node}.jsonl", torchrun=f"{meeting} {node}")
             for node in (0, 1)]
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert timeless(last_json(outputs[0][0])) == undisturbed[0] and outputs[1][0] == ""
    assert recorded(tmp_path / "0.jsonl") == undisturbed[1] and not (tmp_path / "1.jsonl").exists()


def test_wrong_input_under_torchrun():
    """Ends at once, though the others wait for items."""
    process = start_process("--space", "nb201", "--mode", "score", "nope", torchrun="--standalone --nproc-per-node 2")
    _, stderr = process.communicate(timeout=25)  # torchrun gives processes 30 s to end, then kills them
    assert process.returncode == 1 and stderr.count("gennas: error: not a network of nb201") == 1


@on_linux
def test_torchrun_restarts_dead_workers(tmp_path, undisturbed):
    out = tmp_path / "scores.jsonl"
    launcher = start_process(*SEARCH, "--out", out, torchrun="--standalone --nproc-per-node 2 --max-restarts 3")
    assert wait_for(lambda: has_scores(out))
    listed = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(listed[-1]), os_signal.SIGKILL)
    stdout, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, stderr
    assert timeless(last_json(stdout)) == undisturbed[0] and recorded(out) == undisturbed[1]
    assert stderr.count("gennas: search nb201") == 2  # it did start anew


def test_torchrun_processes_share_a_list(monkeypatch):
    """Two, here in turns at one store: each item is trained once, all results come to the first."""
    store, worked = torch.distributed.HashStore(), []
    monkeypatch.setattr(torch.distributed, "rendezvous", lambda *_, **__: iter([(store, int(os.environ["RANK"]), 2)]))
    monkeypatch.setattr(gennas, "make_trainers", lambda *words: {
        "mine": Mock(made_with={"images": "mine"}, side_effect=train)})
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    processes: list[gennas.Torchrun] = []

    def train(work: tuple[str, int]):
        item = work[1]
        worked.append(item)
        if item == 1:  # while the first trains, the second takes the next
            processes[1].train(json.loads(processes[1].store.get(f"item {processes[1].store.add('drawn', 1)}")))
        if item == 9:
            raise ValueError("item 9 is wrong")
        return made(item), 0.5

    def made(item: int) -> gennas.Trained:
        return gennas.Trained(float(item), [[math.nan, 1.0]], 7)

    def names(*items: int) -> list[tuple[str, int]]:
        return [("mine", item) for item in items]

    for rank in ("0", "1"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        processes.append(gennas.Torchrun(()))
    first, second = processes
    results = sorted(first.map(names(1, 2, 3)))
    assert repr(results) == repr([(place, made(place + 1), 0.5) for place in range(3)]) and worked == [1, 2, 3]
    assert repr(list(first.map(names(4)))) == repr([(0, made(4), 0.5)])
    with pytest.raises(ValueError, match="item 9"):
        list(first.map(names(9)))
    for number in range(6, 9):
        first.store.set(f"item {number}", "null")
    first.store.set("made with", '{"images": "yours"}')
    second.serve()
    assert "other images" in gennas.attempt(second.trainers, names(1)[0])[1]
    first.end()  # which has waited for the second


def test_processes_end_with_an_error():
    """And give no result of the list before to the next. Here they are started by another thread than the first."""
    with ThreadPoolExecutor(1) as thread:
        workers = thread.submit(gennas.Processes, 2, (["nb201"], "fast", 1, "synthetic", 0, "cpu")).result()
    item = "nb201", gennas.TASKS["nb101"].to_json(), 0
    archs = [NB201().format(NB201().random(random.Random(seed))) for seed in range(3)]
    assert sorted(place for place, *_ in workers.map([(*item, arch) for arch in archs])) == [0, 1, 2]
    with pytest.raises(ValueError, match="^wrong: not a network of nb201"):
        list(workers.map([(*item, "wrong"), *[(*item, arch) for arch in archs]]))
    with pytest.raises(ChildProcessError, match="exit status -9"):
        list(workers.map([(*item, arch) for arch in archs]))
    assert wait_for(lambda: not any(worker.is_alive() for worker in workers.workers.values()))


def test_record(run, refused, tmp_path):
    out = tmp_path / "scores.jsonl"
    command = "--mode", "score", RICH, DEAD, "--out", out, "--json"
    first = run(*command)
    whole = out.read_text()
    assert first[0] == 0 and len(whole.splitlines()) == 3
    assert last_json(run(*command)[1])["results"] == last_json(first[1])["results"] and out.read_text() == whole

    out.write_text(whole[:-20])  # torn: the last network is scored again
    status, stdout, stderr = run(*command)
    assert status == 0 and "torn last line is dropped" in stderr

    def scores() -> list[dict]:
        return [timeless(json.loads(line)) for line in out.read_text().splitlines()]

    expected = [timeless(json.loads(line)) for line in whole.splitlines()]
    assert scores() == expected
    out.write_text(whole[:100])  # torn in the settings
    assert run(*command)[0] == 0 and scores() == expected
    for change, word in ((("--steps", 3), "steps"), (("--seed", 1), "seed"), (("--task", "combo"), "task")):
        refused(f"made with {word}", *command, *change)
    assert scores() == expected
    damaged = b"\r".join(whole.encode().rsplit(b"\n", 2))  # no line's end, and nothing is cut off
    out.write_bytes(damaged + b"\n")
    refused("expected another --out file", *command)
    assert out.read_bytes() == damaged + b"\n"
    foreign = tmp_path / "letter.txt"
    foreign.write_text("Dear reader")
    refused("holds no scores", "--mode", "score", RICH, "--out", foreign)
    assert foreign.read_text() == "Dear reader"


GOOD_SCORE = {"key": "k", "arch": "a", "loss": 1.0, "params": 9, "seconds": 1.0, "losses": [[1.0, None, 2.0]]}


@pytest.mark.parametrize("line", [
    "{}", '""', "[]", "[" * 1000 + "]" * 1000, "null", json.dumps(GOOD_SCORE | {"more": 1}),
    *[json.dumps(GOOD_SCORE | change) for change in (
        {"loss": math.nan}, {"loss": True}, {"loss": "1"}, {"loss": 10 ** 400}, {"loss": -1.0}, {"seconds": None},
        {"key": 1}, {"arch": None}, {"params": 1.5}, {"losses": [[True]]}, {"losses": [1.0]}, {"losses": None},
        {"losses": []}, {"losses": [[]]}, {"losses": [{}]}, {"losses": [[1.0], [1.0, 2.0, 3.0]]})]],
    ids=lambda line: line[:70])
def test_a_record_with_a_line_that_is_no_score(tmp_path, line):
    out, header = tmp_path / "scores.jsonl", json.dumps({"settings": {"steps": 2}})
    out.write_text(f"{header}\n{json.dumps(GOOD_SCORE)}\n")
    record = gennas.Record(str(out), {"steps": 2})
    assert record.known == {"k": gennas.Score(**GOOD_SCORE)}
    record.file.close()
    for content, wanted in ((f"{header}\n{line}\n", "line 2: not a score; expected another"),
                            (f"{line}\n", "exists and holds no scores")):
        out.write_text(content)
        with pytest.raises(ValueError, match=wanted):
            gennas.Record(str(out), {"steps": 2})


def test_a_second_writer_is_refused(run, refused, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "scores.jsonl"
    assert run("--mode", "score", RICH, "--out", out)[0] == 0
    settings = json.loads(out.read_text().splitlines()[0])["settings"]
    record = gennas.Record(str(out), settings)
    refused("another run is writing", "--mode", "score", RICH, "--out", out)
    record.file.close()
    assert run("--mode", "score", RICH, "--out", out)[0] == 0


def test_each_network_is_trained_once():
    space, calls = NB201(width=4, cells=1), []

    def regression(task: Task, seed: int):
        return lambda space, arch: calls.append((task, arch)) or gennas.Trained(len(calls), [[1.0]], 1)

    scorer = Scorer(trainer_for(space, regression=regression))
    twin = space.parse("|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|skip_connect~2|")
    other = space.parse("|nor_conv_3x3~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|")
    first, second = small_task(), gennas.TASKS["combo"]
    assert scorer([first], [twin, other, twin]) == [[1, 1, 1]] and len(calls) == 1
    assert scorer([second, first, second], [other, twin]) == [[2, 2], [1, 1], [2, 2]]
    assert [task for task, _ in calls] == [first, second] and len(scorer.scores) == 2
    weighted = replace(first, weights=(Weight("loss", -3.0),))  # other weights need no training
    assert scorer([weighted, first], [other]) == [[-3], [1]] and len(calls) == 2


# ----------------------------------------------------------------------------------------------------- command line
def test_search(run, tmp_path):
    plot = tmp_path / "search.png"
    command = "--population", 4, "--tournament", 2, "--cycles", 4, "--batch", 2, "--json", *plot_to(plot)
    status, stdout, stderr = run(*command)
    result = last_json(stdout)
    assert status == 0 and plot.exists() == bool(plot_to(plot))
    assert set("mode space task preset arch loss params evaluated unique seconds".split()) <= result.keys()
    assert result["evaluated"] == 8 >= result["unique"]
    assert result["params"] == NB201().params(NB201().parse(result["arch"]))
    assert "8/8" in stderr and "best" in stderr and result["arch"] in stdout.splitlines()[0]
    assert timeless(last_json(run(*command)[1])) == timeless(result)
    assert last_json(run(*command, "--seed", 1)[1])["loss"] != result["loss"]


def test_search_within_limits(run, refused, tmp_path):
    command = "--population", 4, "--tournament", 2, "--cycles", 2, "--steps", 1, "--json", "--out"

    def counts(name: str, *words) -> list[int]:
        assert run(*command, tmp_path / name, *words)[0] == 0
        archs = [json.loads(line)["arch"] for line in (tmp_path / name).read_text().splitlines()[1:]]
        return [getattr(NB201(), name[:name.index(".")])(NB201().parse(arch)) for arch in archs]

    for count, limit in (("params", 600_000), ("flops", 150_000_000)):
        assert max(counts(f"{count}.limited", f"--max-{count}", limit)) <= limit < max(counts(f"{count}.free"))
    refused("0 of 50 draws are within --max-params 1,000; the nearest has 7",
            *command, tmp_path / "none", "--max-params", 1000)
    assert not (tmp_path / "none").exists()


def test_limits_that_few_meet():
    """Three draws in a hundred; and none, though near."""
    space = Mock(params=float)
    for seed in range(20):
        draw, = gennas.within_limits([lambda rng: rng.randrange(1, 101)], space, {"params": 3, "flops": None})
        rng = random.Random(seed)
        assert all(draw(rng) <= 3 for _ in range(30))
    draw, = gennas.within_limits([lambda rng: 8], space, {"params": 4, "flops": None})
    with pytest.raises(ValueError, match="0 of 300 draws .* the nearest has 2.0 times"):
        draw(None)


def test_recurrent_command_line(run, refused, monkeypatch):
    monkeypatch.setitem(search_spaces.SPACES, "nbnlp", lambda **sizes: NBNLP((6, 8, 6), reservoir=True))
    base = ["--space", "nbnlp", "--json"]
    result = last_json(run(*base, "--population", 3, "--tournament", 2, "--cycles", 3)[1])
    assert NBNLP().params(NBNLP().parse(result["arch"])) == result["params"]
    assert result["task"] == "nlp" and result["images"] == "none"
    for words, wanted in ((["--task", "combo"], "expected one like nlp"), (["--max-flops", "9"], "does not count"),
                        (["--images", "x.npy"], "its input is a signal")):
        refused(wanted, *base, *words)


def test_score(run, tmp_path, monkeypatch):
    """From stdin; the loss curve is of the same training, also where the record knows it."""
    drawn, trained = Mock(side_effect=gennas.plot_lines), Mock(side_effect=Regression.__call__, autospec=True)
    monkeypatch.setattr(gennas, "plot_lines", drawn)
    monkeypatch.setattr(Regression, "__call__", lambda *words: trained(*words))
    out, results = tmp_path / "scores.jsonl", []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{RICH}\n\n[[3],[2,4],[1,3,2]]\n{DEAD}"))
        words = ("--mode", "score", "-", "--task", "nb101", "--quiet", *plot_to(tmp_path / "x.png"), "--out", out,
                 "--json")
        status, stdout, stderr = run(*words)
        assert status == 0 and stderr == ""
        results.append(last_json(stdout)["results"])
    first, second, third = results[0]
    assert first["arch"] == second["arch"] == RICH and first == second != third and results[0] == results[1]
    assert first.keys() == {"arch", "loss", "params", "seconds"}
    assert trained.call_count == 2
    for call in drawn.call_args_list:
        (name, steps, losses, _), (other, *_) = call.args[2][2]
        assert (name, other) == (gennas.shortened(RICH, 70), DEAD) and list(steps) == [0, 1, 2]
        assert len(losses) == 3 and losses[-1] == pytest.approx(first["loss"])


def test_correlate(run, tmp_path, monkeypatch):
    rng = random.Random(7)
    archs = [NB201().random(rng) for _ in range(6)]
    labels = labels_file(tmp_path / "labels.json", NB201(), archs)
    drawn = Mock(side_effect=gennas.plot_lines)
    monkeypatch.setattr(gennas, "plot_lines", drawn)
    words = "--mode", "correlate", "--labels", labels, "--limit", 5, "--json", *plot_to(tmp_path / "c.svg")
    result = last_json((stdout := run(*words)[1]))
    for call in drawn.call_args_list:  # rho of the loss after each step; the last is the score
        (_, steps, rhos, _), = call.args[4][2]
        assert list(steps) == [0, 1, 2] and rhos[-1] == pytest.approx(result["spearman"])
    assert set("mode space task n spearman spearman_ci kendall seconds_per_arch seconds".split()) <= result.keys()
    scored = last_json(run("--mode", "score", *map(NB201().format, archs[:5]), "--json")[1])["results"]
    merits = [-entry["loss"] for entry in scored]
    assert result["n"] == 5 and result["spearman"] == pytest.approx(gennas.spearman(merits, range(5)))
    assert result["kendall"] == pytest.approx(gennas.kendall(merits, range(5)))
    assert "(no interval below 10 architectures)" in stdout and result["spearman_ci"] == [None, None]
    result = last_json(run("--mode", "correlate", "--json", "--limit", 10)[1])  # with the labels that nb201 brings
    archs, values = zip(*NB201().labels[:10])
    scored = last_json(run("--mode", "score", *map(NB201().format, archs), "--json")[1])["results"]
    merits = [-entry["loss"] for entry in scored]
    assert result["spearman"] == gennas.spearman(merits, values)
    assert result["spearman_ci"] == list(gennas.spearman_interval(merits, values))


class Known(Linear):
    """Architectures are their own losses as text; what comes after a letter is another spelling of the same network."""

    def key(self, arch):
        return arch.split("x")[0]

    def params(self, arch):
        return len(arch)


def test_correlate_names_the_networks_furthest_off(capsys):
    """Each once, by its worst place; among fifty, the best fifth are ten."""
    space = Known()
    trainer = trainer_for(space, regression=lambda task, seed: lambda space, arch: gennas.Trained(
        float(space.key(arch)), [[1.0]], 1))
    labels = [(f"{place}", -float(place)) for place in range(50)]
    labels[7] = "7", -49.5  # the last by label
    labels += [("3x", -3.0), ("30x", 100.0), ("nan", -60.0)]
    result = gennas.run_correlate(Scorer(trainer), small_task(), labels, None)
    furthest = [(network["arch"], network["rank_by_score"], network["rank_by_label"]) for network in result["furthest"]]
    by_loss = gennas.ranks([float(space.key(arch)) if arch != "nan" else 1e9 for arch, _ in labels])[[7, 51]]
    assert sorted(furthest[:2]) == sorted([("7", by_loss[0], 52.0), ("30x", by_loss[1], 1.0)])
    assert len(furthest) == 5 and len({space.key(arch) for arch, *_ in furthest}) == 5
    best = sorted(labels, key=lambda pair: -pair[1])[:11]
    assert result["spearman_best_fifth"] == pytest.approx(
        gennas.spearman([-float(space.key(arch)) for arch, _ in best], [value for _, value in best]))
    ten = [0, -1, -2, -3, -3, -4, -5, -6, -49.5, -8]
    assert result["mean_of_ten_best"] == pytest.approx(np.mean(ten))
    assert "furthest off" in capsys.readouterr().out


def test_show(run, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("combo", "darts"):
        status, stdout, _ = run("--mode", "show", "--task", name, "--plot", tmp_path / f"{name}.png")
        assert status == 0 and gennas.task_from_json(stdout) == gennas.TASKS[name]
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_task_file_is_a_task(run, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(gennas.TASKS["combo"].to_json())
    command = "--mode", "score", RICH, "--json", "--task"
    mine, combo, darts = (last_json(run(*command, name)[1])["results"][0]["loss"] for name in (file, "combo", "darts"))
    assert mine == combo != darts


@pytest.fixture(scope="module")
def wrong_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "folder.png").mkdir()
    for name in ("text.txt", "text.json", "text.npz"):
        (folder / name).write_text("plain words")
    task, terms = (json.loads(small_task().to_json()) for _ in range(2))
    task["noise"]["level"] = 99
    terms["weights"] = [{"term": "log loss 1 at 0", "weight": 1}]  # of a stage that has no loss in nb201
    for name, content in {"object": {}, "other": [[RICH, 1], ["21012", 2], [DEAD, 3]], "value": [[RICH, "high"]],
                          "two": [[RICH, 1], [DEAD, 2]], "task": task, "terms": terms}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    noise = np.random.default_rng(0).random((20, 32, 32, 3))
    for name, array in {"grey": noise[..., 0], "few": noise[:3], "range": noise * 255, "flat": 0 * noise,
                        "long": (noise * 255).astype(np.int64)}.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "exits.py").write_text("import sys\nsys.exit()")
    (folder / "talks.py").write_text("raise ImportError('two\\nlines' + 500_000 * 'x')")
    (folder / "task.py").write_text("class Own:\n    task = 'a\\nb'\n    " + "\n    ".join(
        f"def {name}(self, *_): ..." for name in search_spaces.METHODS))
    return folder


WRONG = [  # words of the command line, what the message must say
    ("--space nb999", "nb999", "nb201"), ("--mode paint", "paint", "search"), ("--preset slow", "slow", "paper"),
    ("--steps -1", "steps", "expected"), ("--steps 99999999999999999999", "steps", "from 0 up"),
    ("--population x", "population", "whole number"),
    ("--population 5 --tournament 10", "tournament 10", "at most the population"),
    ("--batch 51", "batch 51", "at most the population"), ("--seed -1", "seed"), ("--nonsense", "nonsense"),
    (f"'{RICH}'", "ARCH belongs to --mode score"), ("--limit 3", "limit belongs to --mode correlate or search-task"),
    ("--mode search-task --max-params 9", "max-params belongs to --mode search"),
    ("--mode search-task --limit 2", "at least 3"),
    ("--mode search-task --space nb201 nbmacro --labels two.json", "expected one for each --space, 2"),
    ("--mode search-task --space nb201 nb201", "expected each once"),
    ("--mode search-task --space nb201 nbnlp --labels two.json two.json", "is not for nbnlp"),
    ("--mode correlate --space nb201 nbmacro", "several belong to --mode search-task"),
    ("--task terms.json --steps 1 --quiet", "weights: expected some of loss, log params, log loss 2 at 0"),
    ("--space nb101 --mode search-task", "needs --labels", "nb101 has no labels of its own"),
    ("--mode score", "needs ARCH"), ("--mode score abc", "abc", "nb201", "nor_conv_3x3"),
    ("--space nb101 --mode correlate", "needs --labels", "nb101 has no labels of its own"),
    ("--mode correlate --limit 2", "at least 3"),
    ("--mode correlate --cycles 0", "--cycles belongs to --mode search or search-task"),
    ("--mode show --out x.jsonl", "--out belongs to", "not to --mode show"),
    ("--mode correlate --labels absent.json", "absent.json", "No such file"),
    ("--mode correlate --labels text.txt", "text.txt", "not JSON"),
    ("--mode correlate --labels object.json", "object.json", "[architecture, number]"),
    ("--mode correlate --labels other.json", "other.json, entry 1", "nb201"),
    ("--mode correlate --labels value.json", "value.json, entry 0", "number"),
    ("--mode correlate --labels two.json", "at least 3"), ("--task guess", "guess", "combo"),
    ("--task absent.json", "absent.json", "No such file"), ("--task text.json", "text.json", "not JSON"),
    ("--task task.json", "task.json", "task.noise.level", "0 to 10", "99"),
    ("--images absent.npz", "absent.npz", "No such file"),
    ("--images text.npz", "text.npz", "expected"), ("--images text.txt", "text.txt", "python batch"),
    ("--images grey.npy", "grey.npy", "(20, 32, 32)"), ("--images few.npy", "few.npy", "3 images, 16 are needed"),
    ("--images range.npy", "range.npy", "[0, 1]"), ("--images flat.npy", "flat.npy", "same everywhere"),
    ("--images long.npy", "long.npy", "int64"), ("--images empty", "empty", "data_batch_1"),
    ("--device abacus", "abacus"), *[("--device cuda", "cuda")] * (not torch.cuda.is_available()),
    ("--device 'c\npu'", "not available here"), ("--out absent/x.jsonl", "absent/x.jsonl", "No such file"),
    ("--out empty", "empty", "regular file"), ("--plot absent/x.png", "absent/x.png", "folder"),
    ("--plot x.docx", "x.docx", ".png"), ("--plot folder.png", "folder.png", "a regular file"),
    ("--plot same.png --out same.png", "same.png", "another than --out"), ("--device cpu:", "cpu:", "cuda:N"),
    ("--max-params 1", "0 of 50 draws"),
    (f"--plot {'x' * 300}.png", "File name too long"),
    ("--space exits.py:Own", "exits.py", "SystemExit"), ("--space talks.py:Own", "ImportError", "two lines"),
    ("--space task.py:Own", "unknown task", "combo"), (f"--task '{'x' * 500_000}'", "unknown task", "FILE.json"),
    ("--space 'a\nb'", "unknown space"), ("--mode score '" + "[" * 100_000 + "'", "not a network of nb201"),
]


@pytest.mark.parametrize("words, wanted", [(words, wanted) for words, *wanted in WRONG], ids=lambda v: str(v)[:40])
def test_errors_are_one_line_and_exit_2(run, wrong_files, monkeypatch, words, wanted):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(wrong_files)
    status, stdout, stderr = run(*shlex.split(words))
    assert status == 2 and stdout == "" and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    assert len(stderr) < 450 and all(text in stderr for text in wanted), stderr


def test_plot_without_matplotlib(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused("pip install matplotlib", "--mode", "show", "--plot", "x.png")


def test_interrupt_says_what_is_known(run, monkeypatch):
    real, calls = Regression.__call__, []

    def interrupted(self, space, arch):
        calls.append(arch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, space, arch)

    monkeypatch.setattr(Regression, "__call__", interrupted)
    status, _, stderr = run()
    assert status == 130 and "interrupted; 2 networks are scored; best " in stderr


def test_what_is_known_is_told_whole(capsys):
    with pytest.raises(SystemExit):
        gennas.fail(1, 900 * "x", 900 * "y")
    stderr = capsys.readouterr().err
    assert stderr.endswith(900 * "y" + "\n") and 900 * "x" not in stderr and stderr.count("\n") == 1


@pytest.mark.parametrize("delay", [0.3, 0.9, 3])
def test_ctrl_c_at_any_time_and_twice(delay):
    """While torch is loaded, and in a run."""
    process = start_process("--space", "nb201", "--workers", 1)
    time.sleep(delay)
    process.send_signal(os_signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(os_signal.SIGINT)
    stdout, stderr = process.communicate(timeout=20)
    # a signal that comes while Python ends is the system's to handle: 130 in a shell too
    assert process.returncode in (130, -os_signal.SIGINT) and stdout == "" and "Traceback" not in stderr, stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("redirection, status, wanted", [
    ("> /dev/full", 1, "gennas: error: stdout: No space left on device; 3 networks are scored"),
    ("2> /dev/full", 0, ""), ("< /dev/null >&-", 0, ""), ("2>&-", 0, ""), ("<&-", 0, ""),
    ("<&- >&- 2>&- --out out.jsonl", 0, ""), ("--mode score - <&-", 2, "needs ARCH"),
    ("--mode show > /dev/full", 1, "gennas: error: stdout: No space left on device\n"),
    (f"--mode score '{RICH}' '{DEAD}' | head -n 1", 1, "gennas: error: stdout: Broken pipe")])
def test_streams_that_cannot_be_written_or_read(tmp_path, redirection, status, wanted):
    """Of a buffered stdout, as it is without PYTHONUNBUFFERED."""
    words = "--space nb201 --steps 1" + " --population 3 --cycles 0" * ("--mode" not in redirection)
    command = f"{shlex.quote(sys.executable)} {HERE / 'gennas.py'} {words} --workers 1 --quiet {redirection}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.run(["bash", "-c", command + "; exit ${PIPESTATUS[0]}"], cwd=tmp_path, env=environment,
                             capture_output=True, text=True)
    assert process.returncode == status and wanted in process.stderr, process.stderr
    assert process.stderr.count("\n") == bool(wanted)
    if "--out" in redirection:  # no stream has written into it
        assert len(recorded(tmp_path / "out.jsonl")) == 3


def test_importing_does_nothing():
    code = """
import random, sys, torch
before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
import gennas, search_spaces
assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (random.getstate(), torch.get_num_threads())
assert "matplotlib" not in sys.modules
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


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
    """search_spaces.py builds a network; gennas.py scores an object with a space's methods, its command line says what
    it lacks."""
    alone = tmp_path / "spaces"
    alone.mkdir()
    shutil.copy(HERE / "gennas.py", tmp_path)
    shutil.copy(HERE / "search_spaces.py", alone)
    code = """
import random, torch, search_spaces
space = search_spaces.get("nb201")
print(len(space.build(space.random(random.Random(0)))(torch.zeros(2, 3, 32, 32))))
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=alone, capture_output=True, text=True).stdout == "3\n"
    code = """
import torch, gennas
class Space:
    key = str
    def build(self, arch):
        body = torch.nn.Conv2d(3, arch, 3)
        body.forward = lambda x, conv=body.forward: [conv(x)] * 3
        return body
images, _ = gennas.load_images("synthetic", 0)
print(len(gennas.Regression(gennas.TASKS["combo"], images, gennas.Settings(steps=2))(Space(), 4)))
gennas.main(["--space", "nb201"])
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == "3\n"
    assert process.stderr == ("gennas: error: the command line needs search_spaces.py; expected both files in one "
                              "folder\n")


def test_readme_space(tmp_path):
    """The README's example of a space of one's own, whole and with several workers; then with a mistake."""
    example = plain_space()
    assert example.count("\n") <= 40
    (tmp_path / "my_space.py").write_text(example)
    (tmp_path / "flat.py").write_text(example.replace("enumerate(arch)", "enumerate(arch[:1])"))
    command = [*SEARCH[2:], "--workers", 2, "--quiet", "--space"]
    status, stdout, stderr = run_process(*command, "my_space.py:Plain", cwd=tmp_path)
    assert status == 0, stderr
    result, space = last_json(stdout), search_spaces.get(f"{tmp_path / 'my_space.py'}:Plain")
    assert result["evaluated"] == 14 and space.params(space.parse(result["arch"])) == result["params"]
    rng = random.Random(0)
    for arch in [space.random(rng) for _ in range(20)]:
        assert space.parse(space.format(arch)) == arch and space.key(space.mutate(arch, rng)) != space.key(arch)
    status, _, stderr = run_process(*command, "flat.py:Plain", cwd=tmp_path)  # met in training, by two workers
    assert status == 2 and "expected 3 feature maps" in stderr and stderr.count("\n") == 1, stderr


@pytest.mark.parametrize("right, wrong, wanted", [
    ("def mutate", "def change", ["has no mutate"]), ("class Plain", "class Fancy", ["no attribute 'Plain'"]),
    ("class Plain:", "class Plain:\n    task = 'guess'", ["unknown task 'guess'", "combo"]),
    ("enumerate(arch)", "enumerate(arch[:1])", ["expected 3 feature maps, one for each target, not 1"]),
    ("widths[i + 1], kernel", "widths[i] + 1, kernel", ["RuntimeError: "]),
    ("return self.format(arch)", "return arch.key\n", ["AttributeError: "]),
    ("return self.format(arch)", "raise SystemExit\n", ["SystemExit:"]),
    ("widths = [3", "raise SystemExit\n        widths = [3", ["SystemExit:"]),
    ("return sum(p", "raise OSError('no such thing')\n        return sum(p", ["no such thing"]),
    ("return sum(p", "return float('nan') + sum(p", ["NaN"]),
    ("i = rng.randrange(3)", "raise ValueError('no neighbour')", ["no neighbour; ", " networks are scored; best "]),
])
def test_own_space_with_a_mistake(run, tmp_path, right, wrong, wanted):
    (tmp_path / "mine.py").write_text(plain_space().replace(right, wrong))
    status, stdout, stderr = run("--space", f"{tmp_path / 'mine.py'}:Plain", "--population", 8, "--quiet")
    assert status in (1, 2) and stderr.count("\n") == 1 and "stdout" not in stderr, stderr
    assert all(words in stderr for words in wanted), stderr


@pytest.mark.parametrize("value, status", [("np.float32(n)", 0), ("float('nan')", 2), ("'high'", 2), ("None", 2)])
def test_labels_of_an_own_space(run, tmp_path, value, status):
    labels = f"    labels = [(((1, 8), (3, 8), (k, 8)), {value}) for n, k in enumerate((1, 3, 5))]\n"
    (tmp_path / "mine.py").write_text("import numpy as np\n" + plain_space() + labels)
    found, _, stderr = run("--space", f"{tmp_path / 'mine.py'}:Plain", "--mode", "correlate", "--quiet")
    assert found == status and stderr.count("\n") == bool(status), stderr
    assert not status or "[(arch, number)]" in stderr


def test_own_space_with_maps_of_one_pixel_and_its_file_in_the_record(run, refused, tmp_path):
    file, out = tmp_path / "mine.py", tmp_path / "out.jsonl"
    file.write_text(plain_space().replace("1 if i == 0 else 2", "4"))  # 16 pixels, 4, 1, 1
    command = "--space", f"{file}:Plain", "--population", 3, "--cycles", 1, "--out", out
    assert run(*command)[0] == run(*command)[0] == 0
    file.write_text(file.read_text() + "\n")
    refused("made with file", *command)


class Nats:
    """What NATS-Bench's `create` gives, with records of its kind."""

    def __init__(self, file_path_or_dict, search_space, fast_mode=False, verbose=True):
        assert search_space == "tss"

    def __len__(self):
        return len(ARCHS)

    def arch(self, index: int) -> str:
        return NB201().format(ARCHS[index])

    def get_more_info(self, index, dataset, iepoch=None, hp="12", is_random=True) -> dict[str, float]:
        assert (dataset, hp, is_random) == ("cifar10", "200", False)
        return {"train-loss": 9.0, "test-loss": 9.0, "test-accuracy": 80 + index / 1000}


class Nasbench:
    """NAS-Bench-101's `api.NASBench`."""

    def __init__(self, dataset_file, seed=None):
        self.cells = {f"{seed:032x}": NB101().random(random.Random(seed)) for seed in range(600)}

    def hash_iterator(self):
        return self.cells.keys()

    def get_metrics_from_hash(self, module_hash) -> tuple[dict, dict]:
        cell = self.cells[module_hash]
        fixed = {"module_adjacency": np.array(cell.matrix, np.int8), "module_operations": list(cell.ops)}
        run = {"final_validation_accuracy": 0.0, "final_training_time": 9.0}
        return fixed, {108: [run | {"final_test_accuracy": accuracy} for accuracy in (.91, .92, .93)], 4: [run]}


def benchmarks(monkeypatch) -> None:
    """Stands in for the benchmarks' packages; writes NAS-Bench-Macro's file."""
    for name, package in (("nats_bench", SimpleNamespace(create=Nats)),
                          ("nasbench", SimpleNamespace(api=SimpleNamespace(NASBench=Nasbench)))):
        monkeypatch.setitem(sys.modules, name, package)
    digits = map("".join, itertools.product("012", repeat=8))
    Path("nas-bench-macro_cifar10.json").write_text(json.dumps(
        {arch: {"test_acc": [90, 91, 92], "mean_acc": 91, "std": 1, "params": 1, "flops": 1} for arch in digits}))


@pytest.mark.parametrize("code", [block for block in readme_blocks("python") if "class Plain" not in block])
def test_readme_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    benchmarks(monkeypatch)
    for presets in gennas.PRESETS.values():
        for family, preset in presets.items():
            monkeypatch.setitem(presets, family, preset._replace(settings=replace(preset.settings, steps=1)))
    monkeypatch.setitem(gennas.PRESETS["fast"], "nb201",
                        gennas.PRESETS["fast"]["nb201"]._replace(sizes={"width": 4, "cells": 1}))
    labels_file(Path("nb201.json"), NB201(), [NB201().random(random.Random(seed)) for seed in range(12)])
    exec(code, {})
    for file in re.findall(r'open\("(\w+).json", "w"\)', code):  # the labels that it writes
        labels = search_spaces.load_labels(search_spaces.get(file), f"{file}.json")
        assert len(labels) in (500, 1000) and all(0.9 < value < 100 for _, value in labels)


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands(run, tmp_path, monkeypatch, command):
    """Each command that the README shows runs, on the tiny space; files that it reads are made here."""
    monkeypatch.chdir(tmp_path)
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    cells = {"nb201": [RICH, DEAD, "[[3],[0,0],[1,0,0]]"],
             "nb101": [NB101().format(NB101().random(random.Random(seed))) for seed in range(3)]}
    for space, archs in cells.items():
        for name in (space, f"{space}_unseen"):
            Path(f"{name}.json").write_text(json.dumps(list(zip(archs, range(3)))))
    Path("my_task.json").write_text(small_task().to_json())
    Path("my_space.py").write_text(plain_space())
    Path("figures").mkdir()
    np.save("my_images.npy", np.random.default_rng(0).random((16, 32, 32, 3)))
    words = shlex.split(command.replace("$steps", "1"))[1:]
    searches = "--mode" not in words or "search-task" in words
    assert run(*words, *searches * ["--population", "3", "--cycles", "2"], "--steps", "1")[0] == 0
