"""Tests of gennas on tiny networks: few channels, one cell a stage, a few steps. Where a number is checked, it is
computed here a second time, by the plainest means."""
from __future__ import annotations

import functools
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gennas
import search_spaces
from gennas import Regression, RnnTask, Scorer, Settings, Task, regularized_evolution
from search_spaces import NB101, NB201, NBNLP, CellNet, Cells, Genotype, NB101Cell, NBMacro, Residual, Vertex

torch.set_num_threads(1)
HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"  # recorded accuracies and images; the tests that want them skip without
RICH = "|nor_conv_3x3~0|+|nor_conv_1x1~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_1x1~2|"
DEAD = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
FREQUENCIES = [.05, .1, .12, .2, .22, .3, .33, .4, .41, .45]
ARCHS = list(itertools.product(NB201.OPS, repeat=6))


@functools.cache
def classes() -> dict[str, list[tuple[str, ...]]]:
    """All cells of NAS-Bench-201 by their key."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for arch in ARCHS:
        found.setdefault(NB201().key(arch), []).append(arch)
    return found


def rng_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task(*stages: list[dict], noise: float = 0.1, channels: int = 5) -> Task:
    return Task({"kind": "uniform", "level": noise}, [{"channels": channels, "signals": signals} for signals in stages])


def targets(any_task, seed: int) -> list[torch.Tensor]:
    return any_task.draw(images(), seed)


def small_task() -> Task:
    return task([{"basis": "sin1d", "level": 1.0, "frequencies": FREQUENCIES, "per_sample": True}],
                [{"basis": "gdot", "level": 2.0, "density": 0.4, "per_sample": False}], [{"basis": "resize", "level": 1.5}])


def images(seed: int = 0) -> torch.Tensor:
    return gennas.load_images("synthetic", seed)[0]


@pytest.fixture
def tiny(monkeypatch):
    """The space that the command line calls nb201, with 4 channels and one cell a stage."""
    monkeypatch.setitem(search_spaces.SPACES, "nb201", lambda **sizes: NB201(width=4, cells=1))


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


def last_json(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------- signal bases
def plain_waves(fy: list[float], fx: list[float], shape, seed: int) -> np.ndarray:
    B, C, H, W = shape
    rng = rng_of(seed)
    keys = torch.rand(B, 32 * len(fy), generator=rng)
    phases = torch.rand(B, C, generator=rng)
    out = np.zeros(shape)
    for b in range(B):
        order = sorted(range(keys.shape[1]), key=lambda m: -keys[b, m])[:C]
        for c, m in enumerate(order):
            for y in range(H):
                for x in range(W):
                    out[b, c, y, x] = math.sin(2 * math.pi * (fy[m // 32] * (y + 1) + fx[m // 32] * (x + 1) + float(phases[b, c])))
    return out


def test_sin1d():
    expected = plain_waves(FREQUENCIES + [0] * 10, [0] * 10 + FREQUENCIES, (2, 20, 8, 6), seed=1)
    np.testing.assert_allclose(gennas.sin1d(rng_of(1), (2, 20, 8, 6), FREQUENCIES), expected, atol=2e-5)


def test_sin2d():
    f, g = [f for f in FREQUENCIES for _ in FREQUENCIES], FREQUENCIES * 10
    expected = plain_waves(f + [-f for f in f], g + g, (2, 20, 8, 6), seed=1)
    np.testing.assert_allclose(gennas.sin2d(rng_of(1), (2, 20, 8, 6), FREQUENCIES), expected, atol=2e-5)


def test_sin1d_draws_all_640_maps_without_replacement():
    maps = gennas.sin1d(rng_of(0), (1, 640, 8, 8), FREQUENCIES)[0].double()
    along_y = (maps.std(2) < 1e-4).all(1)
    assert along_y.sum() == (maps.std(1) < 1e-4).all(1).sum() == 320
    # s(y + 1) + s(y - 1) = 2 cos(2 pi f) s(y) tells the frequency
    profiles = torch.where(along_y[:, None], maps[:, :, 0], maps[:, 0, :])
    ratio = ((profiles[:, 2:] + profiles[:, :-2]) * profiles[:, 1:-1]).sum(1) / (2 * profiles[:, 1:-1] ** 2).sum(1)
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
            blurred[y, x] += weights[dy + 4] * weights[dx + 4] * dots[b, c, mirrored(y + dy, 8), mirrored(x + dx, 6)]
        actual = gennas.gdot(rng_of(5), (2, 3, 8, 6), density)[b, c]
        np.testing.assert_allclose(actual, blurred / np.abs(blurred).max(), atol=1e-5)


def test_resize():
    pictures = images()
    maps = gennas.resize(rng_of(2), (16, 7, 8, 8), pictures)
    colours = torch.randint(0, 3, (7,), generator=rng_of(2)).tolist()
    low, high = pictures[:, :, ::4, ::4].min(), pictures[:, :, ::4, ::4].max()
    for b, c, y, x in itertools.product(range(16), range(7), range(8), range(8)):
        assert maps[b, c, y, x] == pytest.approx(2 * float((pictures[b, colours[c], 4 * y, 4 * x] - low) / (high - low)) - 1, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------- task
def test_targets_are_sums_of_signals():
    one = {"basis": "sin1d", "level": 0.5, "frequencies": FREQUENCIES, "per_sample": True}
    shared = {"basis": "dot", "level": 2.0, "density": 0.5, "per_sample": False}
    both, first, none = targets(task([one, shared], [one], []), 4)
    assert both.shape == (16, 5, 8, 8) and not none.any()
    rest = both - targets(task([one], [], []), 4)[0]
    torch.testing.assert_close(rest, rest[:1].expand_as(rest))
    assert set(rest.abs().round(decimals=4).unique().tolist()) == {0, 2}
    assert not torch.equal(first[0], first[1]) and first.abs().max() <= 0.5
    assert not torch.equal(both, targets(task([one, shared], [], []), 5)[0])


def test_published_tasks():
    published = {name: known for name, known in gennas.TASKS.items() if not name.startswith("found-")}
    for name, known in gennas.TASKS.items():
        assert Task.from_json(known.to_json()) == known, name
        assert all(t.isfinite().all() and (t.std() > 0 or name not in published) for t in targets(known, 0)), name
    if SHARED.exists():
        authors = json.loads((SHARED / "published_tasks.json").read_text())
        for name, known in published.items():
            assert json.loads(known.to_json()) == authors[name], name


@pytest.mark.parametrize("path, value", [
    (["noise"], None), (["noise", "kind"], "pink"), (["noise", "kind"], ["uniform"]), (["noise", "level"], -1),
    (["noise", "level"], True), (["noise", "level"], math.nan), (["stages"], []), (["stages", 0], 3),
    (["stages", 0, "channels"], 0), (["stages", 0, "channels"], 641), (["stages", 0, "channels"], 8.0),
    (["stages", 0, "signals"], None), (["stages", 0, "signals", 0], "dot"), (["stages", 0, "signals", 0, "basis"], "cos"),
    (["stages", 0, "signals", 0, "basis"], []), (["stages", 0, "signals", 0, "level"], "1"),
    (["stages", 0, "signals", 0, "frequencies"], [0.1] * 9), (["stages", 0, "signals", 0, "frequencies", 3], 0.5),
    (["stages", 0, "signals", 0, "per_sample"], 1), (["stages", 1, "signals", 0, "density"], 1.01),
    (["stages", 0, "signals", 0, "density"], 0.5), (["surplus"], 1),
])
def test_a_task_field_out_of_range(path, value):
    data = json.loads(small_task().to_json())
    part = data
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape("task") + ".*right is"):
        Task.from_json(json.dumps(data))


# ----------------------------------------------------------------------------------------------------------- images
def write_pickle(path: Path, data: dict) -> None:
    with open(path, "wb") as file:
        pickle.dump(data, file, protocol=2)


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


@pytest.mark.parametrize("layout", ["cifar10 file", "cifar10 folder", "cifar100 folder"])
def test_cifar_batches(tmp_path, layout):
    data = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    name = "train" if "100" in layout else "data_batch_1"
    write_pickle(tmp_path / name, {b"data": data, b"fine_labels": list(range(20)), b"batch_label": b"training"})
    loaded, _ = gennas.load_images(str(tmp_path / name if "file" in layout else tmp_path), 0)
    expected = (data[2, 1 * 1024 + 5 * 32 + 7] - 123.0) / 62.1  # image 2, green, row 5, column 7
    assert loaded.shape == (16, 3, 32, 32) and loaded[2, 1, 5, 7] == pytest.approx(expected, abs=1e-5)


def test_imagenet16_batch(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (20, 768), dtype=np.uint8)
    write_pickle(tmp_path / "train_data_batch_1", {"data": data, "labels": [1] * 20, "mean": np.zeros(768)})
    loaded, _ = gennas.load_images(str(tmp_path), 0)
    expected = (data[3, 2 * 256 + 5 * 16 + 7] - 104.01) / 65.09
    assert loaded.shape == (16, 3, 32, 32) and loaded[3, 2, 10, 14] == loaded[3, 2, 11, 15] == pytest.approx(expected, abs=1e-5)


def test_arrays(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    versions = {"a.npy": pixels, "b.npy": pixels.transpose(0, 3, 1, 2), "c.npy": pixels / 255, "d.npz": None}
    for name, version in versions.items():
        np.savez(tmp_path / name, y=np.arange(16), x=pixels) if version is None else np.save(tmp_path / name, version)
    loaded = [gennas.load_images(str(tmp_path / name), 0)[0] for name in versions]
    plain = (pixels - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2), ddof=1)
    for version in loaded:
        np.testing.assert_allclose(version, plain.transpose(0, 3, 1, 2), atol=1e-4)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch {}".format("hostile_was_here"),)


def test_a_hostile_pickle_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "data_batch_1", {b"data": Hostile()})
    with pytest.raises(ValueError, match="asks for (posix|nt).system"):
        gennas.load_images(str(tmp_path), 0)
    assert not (tmp_path / "hostile_was_here").exists()
    for text in (b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n(S'x'\ntR.", b"c_codecs\ndecode\n(S'x'\ntR."):
        (tmp_path / "data_batch_1").write_bytes(text)
        with pytest.raises(ValueError, match="asks for"):
            gennas.load_images(str(tmp_path), 0)


# ---------------------------------------------------------------------------------------------------- NAS-Bench-201
def live_terms(arch: tuple[str, ...]):
    """The live graph of a cell, by recursion from the output: {op instance (an edge): its sources}, output's sources."""
    ops = dict(zip(NB201.EDGES, arch))
    instances = {}

    def node(j: int) -> list:
        if j == 0:
            return ["x"]
        found = []
        for i in range(j):
            below = node(i)
            if ops[i, j] == "skip_connect":
                found += below
            elif ops[i, j] != "none" and below:
                instances[i, j] = (ops[i, j], below)
                found.append((i, j))
        return found

    output = node(3)
    reached, todo = set(), list(output)
    while todo:
        term = todo.pop()
        if term != "x" and term not in reached:
            reached.add(term)
            todo += instances[term][1]
    return {term: instances[term] for term in reached}, output


def isomorphic(a, b) -> bool:
    (ops_a, out_a), (ops_b, out_b) = live_terms(a), live_terms(b)
    if len(ops_a) != len(ops_b) or len(out_a) != len(out_b):
        return False
    for order in itertools.permutations(ops_b):
        name = {"x": "x", **dict(zip(ops_a, order))}
        image = {name[t]: (op, sorted(str(name[s]) for s in sources)) for t, (op, sources) in ops_a.items()}
        if (sorted(str(name[t]) for t in out_a) == sorted(map(str, out_b))
                and all(image[t] == (op, sorted(map(str, sources))) for t, (op, sources) in ops_b.items())):
            return True
    return False


def test_nb201_has_5425_networks():
    assert len(classes()) == 5425


def test_nb201_keys_are_isomorphism_classes():
    space, rng = NB201(), random.Random(0)
    sample = rng.sample(ARCHS, 120) + [a for a in ARCHS if a.count("none") + a.count("skip_connect") >= 5][::7]
    for _ in range(20):  # and whole classes, where equal keys are to be found
        sample += classes()[space.key(rng.choice(ARCHS))][:3]
    equal = 0
    for a, b in itertools.combinations(sample, 2):
        assert (space.key(a) == space.key(b)) == isomorphic(a, b), (a, b)
        equal += isomorphic(a, b)
    assert equal > 50


def test_nb201_round_trip_and_mutation():
    space, rng = NB201(), random.Random(1)
    for _ in range(200):
        arch = space.random(rng)
        assert space.parse(space.format(arch)) == arch
        numbers = [space.OPS.index(op) for op in arch]
        assert space.parse(json.dumps([numbers[:1], numbers[1:3], numbers[3:]])) == arch
        child = space.mutate(arch, rng)
        assert sum(a != b for a, b in zip(arch, child)) == 1 and set(child) <= set(space.OPS)
        assert space.key(child) != space.key(arch)


def test_nb201_random_is_uniform():
    rng = random.Random(2)
    counts = [arch.count("none") for arch in (NB201().random(rng) for _ in range(2000))]
    assert sum(counts) / 12000 == pytest.approx(0.2, abs=0.015)


@pytest.mark.parametrize("text", ["", "|", "nor_conv_3x3", RICH[:-1], RICH + "|", RICH.replace("~2", "~1"), RICH.replace("1x1", "5x5"),
                                  "[[1],[2,3],[1,2,5]]", "[[1],[2,3],[1,2]]", "[[1],[2,3],[1,2,-1]]", "[[1],[2,3],[1,2,true]]", "12"])
def test_nb201_refuses(text):
    with pytest.raises(ValueError, match="not a network of nb201"):
        NB201().parse(text)


def test_nb201_params_by_hand():
    conv = {"nor_conv_1x1": 1, "nor_conv_3x3": 9}
    for arch in random.Random(3).sample(ARCHS, 20):
        total = 3 * 16 * 9 + 2 * 16  # stem
        for c in (16, 32, 64):
            total += 5 * sum(conv[op] * c * c + 2 * c for op in arch if op in conv)
        for c in (32, 64):  # the residual blocks: two 3x3, their batch norms, the shortcut
            total += c // 2 * c * 9 + c * c * 9 + 4 * c + c // 2 * c
        assert NB201().params(arch) == total + 2 * 64 + 64 * 10 + 10


@pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded parameter counts")
def test_nb201_params_as_recorded():
    for text, recorded in json.loads((SHARED / "labels/nb201_params.json").read_text()):
        assert round(NB201().params(NB201().parse(text)), -2) == recorded, text


def norm(x):
    """A fresh batch norm in training."""
    return (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()


def conv_norm(x, weight, **options):
    return norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2, **options))


def test_nb201_network_against_its_definition():
    """The network's maps equal those of a plain walk over the cell's nodes; weights are matched by operation, so the
    cells have each convolution at most once."""
    space, rng, checked = NB201(width=4, cells=1), random.Random(4), 0
    while checked < 25:
        arch = space.random(rng)
        if arch.count("nor_conv_1x1") > 1 or arch.count("nor_conv_3x3") > 1 or not space.graph(arch)[-1].inputs:
            continue
        checked += 1
        network = space.build(arch).train()
        x = torch.randn(2, 3, 32, 32, generator=rng_of(checked))
        taps = network(x)
        assert [tuple(t.shape) for t in taps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)]
        for stage, tap in zip(network, taps):
            entry, cell = stage
            if tap is taps[0]:
                x = conv_norm(x, entry[0].weight)
            else:
                (first, second), shortcut = entry
                deep = conv_norm(F.relu(conv_norm(F.relu(x), first[1].weight, stride=2)), second[1].weight)
                x = deep + F.conv2d(F.avg_pool2d(x, 2), shortcut[1].weight)
            weights = {v.op: op[1].weight for v, op in zip(cell.graph[1:], cell.ops) if "conv" in v.op}
            nodes = [x, 0 * x, 0 * x, 0 * x]
            for (i, j), op in zip(space.EDGES, arch):
                if op == "skip_connect":
                    nodes[j] = nodes[j] + nodes[i]
                elif op == "avg_pool_3x3":
                    ones = F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
                    nodes[j] = nodes[j] + F.avg_pool2d(nodes[i], 3, 1, 1) / ones
                elif op in weights:
                    nodes[j] = nodes[j] + conv_norm(F.relu(nodes[i]), weights[op])
            x = nodes[3]
            torch.testing.assert_close(tap, x, atol=1e-4, rtol=1e-4)


def test_nothing_dead_is_built():
    arch = NB201().parse("|nor_conv_3x3~0|+|none~0|nor_conv_1x1~1|+|nor_conv_3x3~0|none~1|none~2|")
    cell = NB201(width=4, cells=1).build(arch)[0][1]
    assert [type(op) for op in cell.ops] == [nn.Sequential, nn.Identity]  # one convolution, and the output's sum
    taps = NB201(width=4, cells=1).build(NB201().parse(DEAD))(torch.randn(2, 3, 32, 32))
    assert [tuple(t.shape) for t in taps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8)] and not any(t.any() for t in taps)


def test_canonical_graph_is_independent_of_the_order():
    """Random graphs larger than any cell, their vertices shuffled."""
    rng = random.Random(5)
    for _ in range(200):
        size = rng.randint(3, 9)
        graph = [Vertex("input", ())]
        for i in range(1, size):
            graph.append(Vertex(rng.choice("ab"), tuple(rng.choices(range(i), k=rng.randint(1, 2)))))
        graph.append(Vertex("output", tuple(rng.choices(range(size), k=2))))
        depth_order = [0, *rng.sample(range(1, size), size - 1), size]
        while any(depth_order.index(j) > depth_order.index(i) for i in range(size + 1) for j in graph[i].inputs):
            depth_order = [0, *rng.sample(range(1, size), size - 1), size]
            if rng.random() < 0.01:
                depth_order = list(range(size + 1))
        shuffled = tuple(Vertex(graph[i].op, tuple(rng.sample([depth_order.index(j) for j in graph[i].inputs],
                         len(graph[i].inputs)))) for i in depth_order)
        result = search_spaces.canonical(tuple(graph))
        assert result == search_spaces.canonical(shuffled)
        assert all(j < i for i, v in enumerate(result) for j in v.inputs)  # topological
        assert sorted(v.op for v in result) == sorted(v.op for v in graph)


# ------------------------------------------------------------------------------------------------- every other space
TINY = {"nb101": lambda: NB101(width=6, cells=1), "nb201": lambda: NB201(width=4, cells=1), "nbmacro": lambda: NBMacro(width=2),
        "nbnlp": lambda: NBNLP(widths=(6, 8, 6))}


def tiny_arch(space, arch):
    """The same architecture, small enough to run in a test."""
    if isinstance(space, Cells):
        return arch._replace(width=4, depth=4)
    if isinstance(space, Residual):
        return arch._replace(ds=tuple(1 for _ in arch.ds), ws=tuple(16 for _ in arch.ws), num_gs=tuple(2 for _ in arch.num_gs))
    return arch


@pytest.mark.parametrize("name", search_spaces.SPACES)
def test_every_space(name):
    """Round trip, mutation, equal keys give equal networks, three taps at 32, 16 and 8 (or a sequence), trained and finite."""
    space, rng = search_spaces.get(name), random.Random(8)
    assert space.name == name and space.task in gennas.TASKS
    for _ in range(12):
        arch = space.random(rng)
        assert hash(arch) is not None and space.parse(space.format(arch)) == arch
        child = space.mutate(arch, rng)
        assert space.key(child) != space.key(arch) and space.parse(space.format(child)) == child
    small = tiny_arch(space, arch)
    network = TINY.get(name, lambda: space)().build(small)
    if isinstance(space, NBNLP):
        assert network(torch.randn(2, 5, 6)).shape == (2, 5, 6)
        regression_task, pictures = RnnTask({"kind": "uniform", "level": 0.1}, 7, *[[dict(basis="dot", level=1.0, density=0.5, per_sample=True)]] * 2), None
    else:
        sides = [16, 8, 4] if name == "resnet-in" else [32, 16, 8]  # four stages, of which the last three are tapped
        assert [tap.shape[2:] for tap in network(torch.randn(2, 3, 32, 32))] == [(side, side) for side in sides]
        regression_task, pictures = small_task(), images()
    regression = Regression(regression_task, pictures, Settings(steps=2))
    losses = regression(TINY.get(name, lambda: space)(), small)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert losses == regression(TINY.get(name, lambda: space)(), small)


@pytest.mark.parametrize("name", search_spaces.SPACES)
def test_every_space_refuses(name):
    space = search_spaces.get(name)
    for text in ("", "[]", "{}", "null", "[[[0, 1], [0, 0]], 3]", '{"net": 1}', "Genotype()", "x(1)", "3", "[" * 100_000):
        with pytest.raises(ValueError, match=f"not a network of {name}.*right is"):
            space.parse(text)


def test_nb101_counts():
    """All cells of 2 to 5 vertices that use all of them: 1, 6, 84 and 2,441 are different (NAS-Bench-101's own count)."""
    space, counts = NB101(), []
    for n in range(2, 6):
        keys = set()
        pairs = list(itertools.combinations(range(n), 2))
        for bits in itertools.product((0, 1), repeat=len(pairs)):
            edges = dict(zip(pairs, bits))
            matrix = tuple(tuple(edges.get((i, j), 0) for j in range(n)) for i in range(n))
            bare = space.graph(NB101Cell(matrix, ("input", *[NB101.OPS[0]] * (n - 2), "output")))
            if len(bare) == n and space.valid(NB101Cell(matrix, ("input", *[NB101.OPS[0]] * (n - 2), "output"))):
                keys |= {space.key(NB101Cell(matrix, ("input", *ops, "output"))) for ops in itertools.product(NB101.OPS, repeat=n - 2)}
        counts.append(len(keys))
    assert counts == [1, 6, 84, 2441]


def test_nb101_relabelling():
    space, rng = NB101(), random.Random(9)
    for _ in range(1000):
        arch = space.random(rng)
        order = [0]  # another topological order of the vertices
        while len(order) < 6:
            ready = [j for j in range(1, 6) if j not in order and all(i in order for i in range(j) if arch.matrix[i][j])]
            order.append(rng.choice(ready))
        order.append(6)
        twin = NB101Cell(tuple(tuple(arch.matrix[i][j] for j in order) for i in order), tuple(arch.ops[i] for i in order))
        assert space.key(twin) == space.key(arch)


def test_nb101_cell_by_hand():
    """Input to 1 and 3 and the output, 1 to 2 and the output, 2 and 3 to the output: 7 channels divided as 3, 2, 2."""
    matrix = ((0, 1, 0, 1, 1), (0, 0, 1, 0, 1), (0, 0, 0, 0, 1), (0, 0, 0, 0, 1), (0,) * 5)
    graph = NB101().graph(NB101Cell(matrix, ("input", "conv3x3-bn-relu", "maxpool3x3", "conv1x1-bn-relu", "output")), whole=True)
    cell = search_spaces.NB101Block(graph, 4, 7).train()
    x = torch.randn(2, 4, 8, 8, generator=rng_of(0))
    project = lambda to: F.relu(conv_norm(x, cell.projections[to][0].weight))
    one = F.relu(conv_norm(project(1), cell.ops[0][0].weight))
    two = F.max_pool2d(one[:, :2], 3, 1, 1)
    three = F.relu(conv_norm(project(3), cell.ops[2][0].weight))
    assert (one.shape[1], two.shape[1], three.shape[1]) == (3, 2, 2)
    torch.testing.assert_close(cell(x), torch.cat([one, two, three], 1) + project(4), atol=1e-4, rtol=1e-4)


def test_cell_by_hand():
    """A reduction cell of DARTS, every node written out; and its key under what does not matter."""
    space = Cells("darts")
    pairs = (("sep_conv_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("none", 0), ("skip_connect", 1), ("dil_conv_5x5", 3),
             ("avg_pool_3x3", 3), ("none", 4))
    _, graph = space.graphs(CellNet(space.genotype(pairs, pairs), 4, 3))
    cell = search_spaces.TwoInputCell(graph, 6, 5, 4, last_reduced=True, reduction=True, whole=False).train()
    before, last = torch.randn(2, 6, 16, 16, generator=rng_of(1)), torch.randn(2, 5, 8, 8, generator=rng_of(2))
    op = {vertex.op: module for vertex, module in zip(graph[2:], cell.ops)}

    def halved(x, module):
        x = F.relu(x)
        return norm(torch.cat([F.conv2d(x[:, :, ::2, ::2], module.halves[0].weight), F.conv2d(x[:, :, 1::2, 1::2], module.halves[1].weight)], 1))

    a = halved(before, cell.prepare[0])
    b = conv_norm(F.relu(last), cell.prepare[1][1].weight)
    first, second = op["sep_conv_3x3"]
    sep = F.conv2d(F.relu(a), first[1].weight, stride=2, padding=1, groups=4)
    sep = F.conv2d(F.relu(norm(F.conv2d(sep, first[2].weight))), second[1].weight, padding=1, groups=4)
    two = norm(F.conv2d(sep, second[2].weight)) + F.max_pool2d(b, 3, 2, 1)
    three = two
    dil = F.conv2d(F.relu(three), op["dil_conv_5x5"][1].weight, padding=4, dilation=2, groups=4)
    four = halved(b, op["skip_connect"]) + norm(F.conv2d(dil, op["dil_conv_5x5"][2].weight))
    five = F.avg_pool2d(three, 3, 1, 1) / F.avg_pool2d(torch.ones_like(three), 3, 1, 1)
    actual = cell(before, last, torch.zeros(2, 4, 4, 4))
    parts = actual.split(4, 1)
    for node in (two, three, four, five):  # the canonical order of nodes is not that of the genotype
        assert any(torch.allclose(node, part, atol=1e-4) for part in parts)


def test_cell_keys():
    space, rng = Cells("darts"), random.Random(10)
    for _ in range(30):
        arch = space.random(rng)
        key = space.key(arch)
        normal = list(arch.genotype.normal)
        for i in range(0, 8, 2):  # the two pairs of a node are unordered
            if rng.random() < 0.5:
                normal[i], normal[i + 1] = normal[i + 1], normal[i]
        normal = [(op, rng.randrange(2 + i // 2)) if op == "none" else (op, source) for i, (op, source) in enumerate(normal)]
        assert space.key(arch._replace(genotype=space.genotype(tuple(normal), arch.genotype.reduce))) == key
        if all(source != 2 for op, source in normal[2:4]):  # nodes 2 and 3 change places
            swap = {2: 3, 3: 2}
            swapped = [*normal[2:4], *normal[:2], *((op, swap.get(source, source)) for op, source in normal[4:])]
            assert space.key(arch._replace(genotype=space.genotype(tuple(swapped), arch.genotype.reduce))) == key
        assert space.key(arch._replace(width=arch.width * 2)) != key != space.key(arch._replace(depth=arch.depth + 1))


def test_a_cell_that_reaches_no_tap_is_not_built():
    """Cells that read only the one before the last: every other cell is dead, the reduction cells here among them."""
    space = Cells("pnas")
    pairs = tuple(("sep_conv_3x3", 0) for _ in range(10))
    alive = CellNet(space.genotype(pairs, pairs), 4, 6)  # reductions at 2 and 4, taps after 1, 3 and 5
    network = space.build(alive)
    assert [cell is None for cell in network.cells] == [True, False] * 3
    assert all([module is None for module in cell.prepare] == [False, True] for cell in network.cells if cell)
    other = CellNet(space.genotype(pairs, (("max_pool_3x3", 0), *pairs[1:])), 4, 6)
    assert space.key(alive) == space.key(other)


def test_depth_of_cells_that_read_nothing():
    """Only the tapped cells are left, and they are the same at any depth."""
    space = Cells("darts", imagenet=True)
    dead, alive = (("none", 0),) * 8, (("sep_conv_3x3", 0),) * 8
    keys = [space.key(CellNet(space.genotype(normal, dead), 32, depth)) for normal in (dead, alive) for depth in (6, 10)]
    assert keys[0] == keys[1] and len(set(keys)) == 3
    counts = [sum(p.numel() for p in space.build(CellNet(space.genotype(dead, dead), 32, depth)).parameters()) for depth in (6, 10)]
    assert counts[0] == counts[1]


ODD = [  # legal or not, none of it may end in anything but an arch or a ValueError
    ("nbnlp", '{"h_new_0": {"op": "linear", "input": ["x", "h_prev_0"]}}'),
    ("darts", "-" * 20000 + "1"),
    ("darts", "Genotype(normal=[], normal_concat=range(0, 1" + "0" * 30 + "), reduce=[], reduce_concat=[])"),
    *[("resnext-a-in", json.dumps({"block_type": "res_bottleneck_block", "ds": [1, 1, 1, 1], "ws": [64, 16, 16, 16], "ss": [8, 1, 2, 2],
                                   "bot_muls": [1.0, 1.0, 1.0, 1.0], "num_gs": [1, 1, 1, 1]} | change))
      for change in ({}, {"ws": [1, 16, 16, 16]}, {"ws": [10 ** 400, 16, 16, 16]}, {"bot_muls": [1e308, 1.0, 1.0, 1.0]}, {"bot_muls": [-3.5, 1.0, 1.0, 1.0]},
                     {"num_gs": [10 ** 50, 1, 1, 1]})],
]


@pytest.mark.parametrize("name, text", ODD, ids=lambda value: value[-40:])
def test_odd_texts(name, text):
    space = search_spaces.get(name)
    try:
        arch = space.parse(text)
    except ValueError as error:
        assert "not a network of" in str(error)
        return
    assert space.params(arch) and (name == "nbnlp" or [tap.shape[0] for tap in space.build(arch)(torch.randn(2, 3, 32, 32))] == [2, 2, 2])
    if name == "nbnlp":
        with pytest.raises(ValueError, match="no neighbour was found"):
            space.mutate(arch, random.Random(0))
    else:
        assert '"ws": [64, 16' in text and "308" not in text and "-3.5" not in text and "000" not in text


def test_a_concat_in_any_order():
    pairs = "[" + ", ".join(f"('sep_conv_3x3', {i % 2})" for i in range(8)) + "]"
    one, other = (f"Genotype(normal={pairs}, normal_concat={concat}, reduce={pairs}, reduce_concat=range(2, 6))" for concat in ("[5, 3, 4, 2]", "range(2, 6)"))
    space = search_spaces.get("darts-fix")
    assert space.parse(one) == space.parse(other)


def test_genotype_text():
    """The DARTS authors' own cell, as their code spells it."""
    text = ("Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 1), "
            "('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=range(2, 6), reduce=[('max_pool_3x3', 0), "
            "('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), ('skip_connect', 2), ('skip_connect', 2), "
            "('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])")
    space = search_spaces.get("darts-fix")
    arch = space.parse(text)
    assert eval(space.format(arch), {"Genotype": Genotype}) == arch.genotype and space.parse(space.format(arch)) == arch
    for bad in (text.replace("range(2, 6)", "[2, 3]"), text.replace("dil_conv_3x3', 2", "dil_conv_3x3', 5"), text.replace("skip", "hop"),
                text.replace("Genotype", "print"), text.replace("range(2, 6)", "range(print(1))")):
        with pytest.raises(ValueError, match="darts-fix"):
            space.parse(bad)


def test_residual_block_and_stem_by_hand():
    space = search_spaces.get("resnext-a")
    arch = space.parse(json.dumps({"block_type": "res_bottleneck_block", "ds": [1, 1, 2, 1], "ws": [8, 16, 32, 32], "ss": [1, 1, 2, 2],
                                   "bot_muls": [1, 0.5, 0.25, 1], "num_gs": [1, 2, 1, 4]}))
    network = space.build(arch).train()
    x = torch.randn(2, 3, 32, 32, generator=rng_of(3))
    taps = network(x)

    def block(x, module, stride, groups):
        (a, b, c), skip = module
        y = F.relu(conv_norm(x, a[0].weight))
        y = F.relu(conv_norm(y, b[0].weight, stride=stride, groups=groups))
        shortcut = x if isinstance(skip, nn.Identity) else conv_norm(x, skip[0].weight, stride=stride)
        return conv_norm(y, c[0].weight) + shortcut

    first, second, third = network
    x = block(F.relu(conv_norm(x, first[0][0].weight)), first[1], 1, 2)
    torch.testing.assert_close(taps[0], x, atol=1e-3, rtol=1e-3)
    x = block(F.relu(block(F.relu(x), second[1], 2, 1)), second[3], 1, 1)
    torch.testing.assert_close(taps[1], x, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(taps[2], block(F.relu(x), third[1], 2, 4), atol=1e-3, rtol=1e-3)


def test_macro_layer_by_hand():
    block = NBMacro().layer("2", 3, 3, 1).train()
    x = torch.randn(2, 3, 8, 8, generator=rng_of(4))
    grow, deep, shrink = block[0]
    y = F.relu(conv_norm(x, grow[0].weight))
    assert y.shape[1] == 18
    y = F.relu(conv_norm(y, deep[0].weight, groups=18))
    torch.testing.assert_close(block(x), conv_norm(y, shrink[0].weight) + x, atol=1e-4, rtol=1e-4)
    assert NBMacro().key("01001020") == NBMacro().key("01010002") != NBMacro().key("01100020")


RECIPE = {"h_new_1": {"op": "activation_tanh", "input": ["node_1"]}, "node_1": {"op": "linear", "input": ["x", "h_prev_1"]},
          "node_2": {"op": "linear", "input": ["h_prev_0", "h_new_1", "x"]}, "node_3": {"op": "activation_sigm", "input": ["node_2"]},
          "h_new_0": {"op": "blend", "input": ["node_3", "node_4", "h_new_1"]}, "node_4": {"op": "elementwise_prod", "input": ["node_3", "h_new_1"]}}


def test_recurrent_layer_by_hand():
    space = NBNLP()
    graph = space.graph(space.parse(json.dumps(RECIPE)))
    layer = search_spaces.RecurrentLayer(graph, 5, 4).eval()
    x = torch.randn(3, 6, 5, generator=rng_of(5))
    short, wide = sorted((i for i, vertex in enumerate(graph) if vertex.op == "linear"), key=lambda i: len(graph[i].inputs))
    weights = layer.weights
    source = {int(name.split()[1]): weight for name, weight in weights.items() if name.startswith(f"{wide} ")}
    h0, h1 = torch.zeros(3, 4), torch.zeros(3, 4)
    state1 = next(i for i in graph[short].inputs if i)  # the place of h_prev_1
    for t in range(6):
        new1 = torch.tanh(x[:, t] @ weights[f"{short} 0"].T + h1 @ weights[f"{short} {state1}"].T + layer.biases[str(short)])
        place0 = 3 - state1  # of h_prev_0
        rest = next(j for j in source if j not in (0, place0))
        node3 = torch.sigmoid(x[:, t] @ source[0].T + h0 @ source[place0].T + new1 @ source[rest].T + layer.biases[str(wide)])
        h0, h1 = node3 * (node3 * new1) + (1 - node3) * new1, new1
        torch.testing.assert_close(layer(x)[:, t], h0, atol=1e-5, rtol=1e-5)


def test_reservoir():
    """The same network, of which training leaves the recurrent matrices as they were drawn."""
    trained, outputs = {}, []
    for reservoir in (False, True):
        space = NBNLP((6, 8, 6), reservoir)
        torch.manual_seed(0)
        network = space.build(space.random(random.Random(3)))
        before = {name: p.clone() for name, p in network.named_parameters()}
        outputs.append(network.eval()(torch.ones(2, 3, 6)).detach())
        optimizer = gennas.adam(network.train(), Settings())
        network(torch.ones(2, 3, 6)).square().mean().backward()
        optimizer.step()
        trained[reservoir] = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        recurrent = {name for name in before if ".weights." in name and not name.endswith(" 0")}
    assert torch.equal(*outputs) and recurrent and recurrent <= trained[False] == trained[True] | recurrent and not recurrent & trained[True]


def test_recipe_keys():
    space = NBNLP()
    key_of = lambda recipe: space.key(space.parse(json.dumps(recipe)))
    key = key_of(RECIPE)
    assert key_of(dict(reversed(RECIPE.items()))) == key
    text = json.dumps(RECIPE)
    assert key_of(json.loads(text.replace("node_1", "node_9").replace("node_3", "node_1"))) == key
    assert key_of(json.loads(text.replace('"h_prev_0", "h_new_1", "x"', '"x", "h_prev_0", "h_new_1"'))) == key
    assert key_of(json.loads(text.replace('"node_4", "h_new_1"', '"h_new_1", "node_4"'))) != key  # a blend is ordered
    two = RECIPE | {"h_new_2": {"op": "activation_sigm", "input": ["node_5"]}, "node_5": {"op": "linear", "input": ["x", "h_prev_2"]},
                    "node_6": {"op": "elementwise_sum", "input": ["node_4", "h_new_2"]}, "h_new_0": {"op": "blend", "input": ["node_3", "node_6", "h_new_1"]}}
    swapped = re.sub(r"h_(new|prev)_([12])", lambda m: f"h_{m[1]}_{3 - int(m[2])}", json.dumps(two))
    assert key_of(two) == key_of(json.loads(swapped)) != key
    dead = RECIPE | {"h_new_2": {"op": "activation_sigm", "input": ["node_5"]}, "node_5": {"op": "linear", "input": ["x", "h_prev_2"]}}
    assert key_of(dead) == key and len(space.build(space.parse(json.dumps(dead))).layers[0].weights) == 5


@pytest.mark.parametrize("change", [{"h_new_3": RECIPE["h_new_1"]}, {"node_1": {"op": "linear", "input": ["x", "x"]}}, {"x": RECIPE["node_1"]},
                                    {"node_3": {"op": "activation_sigm", "input": ["x"]}}, {"node_2": {"op": "linear", "input": ["h_prev_0", "node_3"]}},
                                    {"node_4": {"op": "elementwise_prod", "input": ["node_3", "h_prev_2"]}}, {"node_3": {"op": "relu", "input": ["node_2"]}}])
def test_recipes_refused(change):
    with pytest.raises(ValueError, match="not a network of nbnlp"):
        NBNLP().parse(json.dumps(RECIPE | change))


def test_params_by_hand():
    conv = lambda i, o, k=1: i * o * k * k + 2 * o  # with its batch norm
    macro = conv(3, 32, 3) + conv(32, 64) + sum(conv(c, 3 * c) + 9 * 3 * c + 6 * c + conv(3 * c, c) for c in [64]) \
        + conv(64, 128) + conv(128, 128 * 6) + 25 * 768 + 2 * 768 + conv(768, 128) + conv(128, 256) + conv(256, 1280) + 1281 * 10
    assert NBMacro().params("01020000") == macro
    cell = json.dumps([[[0, 1, 1], [0, 0, 1], [0, 0, 0]], ["input", "conv3x3-bn-relu", "output"]])
    total = conv(3, 128, 3)
    for c in (128, 256, 512):
        total += sum(2 * conv(i, c) + conv(c, c, 3) for i in (128 if c == 128 else c // 2, c, c))
    assert NB101().params(NB101().parse(cell)) == total + 513 * 10
    net = {"block_type": "res_basic_block", "ds": [1, 2, 1, 1], "ws": [16, 16, 24, 32], "ss": [1, 1, 2, 2], "bot_muls": [], "num_gs": []}
    total = conv(3, 16, 3) + 4 * conv(16, 16, 3) + sum(conv(i, o, 3) + conv(o, o, 3) + conv(i, o) for i, o in ((16, 24), (24, 32)))
    assert search_spaces.get("resnet").params(search_spaces.get("resnet").parse(json.dumps(net))) == total + 33 * 10
    layers = sum(5 * h * h + 2 * h + (2 * (i - h) * h) for i, h in ((400, 600), (600, 600), (600, 400)))
    assert NBNLP().params(NBNLP().parse(json.dumps(RECIPE))) == 4_010_000 + layers
    skips = tuple(("skip_connect", 1) for _ in range(8))
    sep = lambda c: 2 * (c * 9 + conv(c, c))
    space = Cells("darts")
    arch = CellNet(space.genotype((("sep_conv_3x3", 1), *skips[1:]), skips), 8, 4)  # reductions at 1 and 2
    total = conv(3, 24, 3) + 2 * conv(24, 8) + sep(8)  # stem, cell 0
    total += conv(24, 16) + conv(32, 16) + 8 * conv(16, 16)  # cell 1
    total += conv(32, 32) + conv(64, 32) + 8 * conv(32, 32)  # cell 2, after a reduction
    total += conv(64, 32) + conv(128, 32) + sep(32) + 129 * 10  # cell 3, after a reduction
    assert space.params(arch) == total


RECORDED = {"nb101_params.json": "nb101", "nbmacro_params.json": "nbmacro", "nds/DARTS_in.json": "darts-in", "nds/PNAS_in.json": "pnas-in",
            "nds/ResNeXt-A_in.json": "resnext-a-in", "nds/ResNet_reruns.json": "resnet", "nbnlp": "nbnlp"}


@pytest.mark.skipif(not SHARED.exists(), reason="needs the recorded parameter counts")
@pytest.mark.parametrize("file", RECORDED)
def test_params_as_recorded(file):
    """On every 20th record; all are exact."""
    space, path = search_spaces.get(RECORDED[file]), SHARED / "labels" / file
    if path.is_dir():
        logs = [json.loads(log.read_text()) for log in sorted(path.glob("*.json"))[::20]]
        records = [(log["recepie"], log["num_params"]) for log in logs]
    else:
        content = json.loads(path.read_text())
        content = content["top"] + content["mid"] if isinstance(content, dict) else content
        records = [(json.dumps(r["net"]), r["params"]) if isinstance(r, dict) else (json.dumps(r[0]), r[1]) for r in content[::20]]
    assert len(records) > 5
    for text, recorded in records:
        assert space.params(space.parse(text)) == recorded, text


def test_flops_by_hand():
    """Torch counts convolutions and the linear layer, a multiply-add as two."""
    dead = 32 * 32 * 3 * 16 * 9
    for c, side in ((32, 16), (64, 8)):
        dead += side * side * (c // 2 * c * 9 + c * c * 9 + c // 2 * c)
    assert NB201().flops(NB201().parse(DEAD)) == 2 * (dead + 640)
    assert NB201().flops(NB201().parse("[[3],[0,0],[0,0,0]]")) == 2 * (dead + 640 + 5 * 9 * sum(c * c * s * s for c, s in ((16, 32), (32, 16), (64, 8))))


def test_labels_of_every_kind(tmp_path, capsys):
    net = {"block_type": "res_basic_block", "ds": [1, 1, 1, 1], "ws": [16, 16, 24, 32], "ss": [1, 1, 2, 2], "bot_muls": [], "num_gs": []}
    record = {"net": net, "params": 1, "test_ep_top1": [50.0, 7.5]}
    (tmp_path / "nds.json").write_text(json.dumps({"top": [record], "mid": [record | {"test_ep_top1": [9]}]}))
    assert [value for _, value in search_spaces.load_labels(search_spaces.get("resnet"), tmp_path / "nds.json")] == [92.5, 91]
    folder = tmp_path / "logs"
    folder.mkdir()
    log = {"recepie": json.dumps(RECIPE), "status": "OK", "val_losses": [6.0, math.nan, 5.5, 5.6]}
    for name, change in {"b": {}, "a": {"val_losses": [7.0]}, "c": {"status": "loss is nan!"}, "d": {"val_losses": []}}.items():
        (folder / f"{name}.json").write_text(json.dumps(log | change))
    assert [value for _, value in search_spaces.load_labels(NBNLP(), folder)] == [-7.0, -5.5]
    assert "2 of 4 runs failed" in capsys.readouterr().err
    (tmp_path / "list.json").write_text(json.dumps([[RECIPE, 1], [log, 2], [json.dumps(RECIPE), 3]]))
    assert [value for _, value in search_spaces.load_labels(NBNLP(), tmp_path / "list.json")] == [1, 2, 3]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no entry"):
        search_spaces.load_labels(NBNLP(), tmp_path / "empty")


# ------------------------------------------------------------------------------------------------------- regression
class Linear:
    """A space of one network whose taps are 1x1 convolutions of the image, to check the training by hand."""
    name = "linear"

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return [self.mix(x), self.mix(x)[:, :, ::2, ::2], self.mix(x)[:, :, ::4, ::4]]

    def key(self, arch):
        return arch

    format = params = parse = lambda self, arch: arch

    def build(self, arch):
        return self.Body()


@pytest.mark.parametrize("kind", ["uniform", "gaussian"])
def test_regression_by_hand(kind):
    """Three steps and the final loss, every formula written out: noise, batch norm, loss, momentum, weight decay."""
    hand_task = replace(small_task(), noise={"kind": kind, "level": 0.3})
    losses = Regression(hand_task, images(), Settings(steps=3), seed=7)(Linear(), "a")
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
    wanted = targets(hand_task, 7)
    rng = rng_of(gennas.seed_of("noise", "linear", "a", 7))
    expected = []
    for step in range(4):
        noise = torch.empty(16, 3, 32, 32).to(memory_format=torch.channels_last)
        noisy = images() + 0.3 * (noise.uniform_(-1, 1, generator=rng) if kind == "uniform" else noise.normal_(generator=rng))
        loss = 0
        for i, (target, weight) in enumerate(zip(wanted, (0.25, 0.5, 1))):
            tap = torch.einsum("oi,bihw->bohw", w[:, :, 0, 0], noisy) + b[:, None, None]
            tap = tap[:, :, ::4, ::4]
            hw, hb, gamma, beta = leaves[2 + 4 * i: 6 + 4 * i]
            mean, var = (tap.mean((0, 2, 3)), tap.var((0, 2, 3), unbiased=False)) if step < 3 else running[i]
            if step < 3:
                running[i][0] = 0.9 * running[i][0] + 0.1 * mean.detach()
                running[i][1] = 0.9 * running[i][1] + 0.1 * tap.var((0, 2, 3)).detach()
            tap = (tap - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * gamma[:, None, None] + beta[:, None, None]
            output = torch.einsum("oi,bihw->bohw", hw[:, :, 0, 0], tap) + hb[:, None, None]
            loss = loss + weight * ((output - target) ** 2).sum() / target.numel()
        expected.append(loss.item())
        gradients = torch.autograd.grad(loss, leaves)
        with torch.no_grad():
            for p, g, v in zip(leaves, gradients, velocity):
                v.mul_(0.9).add_(g + 4e-5 * p if p.ndim > 1 else g)
                p.sub_(0.1 * v)
    assert losses == pytest.approx(expected, rel=1e-4)


def losses_of(*texts: str, seed: int = 0) -> list[float]:
    space = NB201(width=4, cells=1)
    scorer = Scorer(space, lambda task: Regression(task, images(), Settings(steps=2), seed))
    return scorer([small_task()], [space.parse(text) for text in texts])[0]


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


def test_equal_keys_equal_scores():
    space, rng = NB201(width=4, cells=1), random.Random(6)
    regression = Regression(small_task(), images(), Settings(steps=2))
    for archs in rng.sample([archs for archs in classes().values() if len(archs) > 1], 8):
        assert regression(space, archs[0]) == regression(space, archs[-1])


def test_batch_statistics():
    """The body normalises by the batch at hand in eval() too; the heads keep their running statistics."""
    space = NB201(width=4, cells=1)
    reg = Regression(small_task(), images(), Settings(batch_statistics=True))
    body = space.build(space.parse(RICH))
    gennas.without_running_statistics(body)
    network = gennas.Heads(body, reg.inputs, reg.targets).train()
    for _ in range(3):
        outputs, taps = network(reg.inputs), network.body(reg.inputs)
    network.eval()
    for tap, other in zip(taps, network.body(reg.inputs)):
        assert torch.equal(tap, other)
    assert not any(torch.allclose(x, y, atol=1e-3) for x, y in zip(outputs, network(reg.inputs)))
    assert not any("body" in name for name, _ in network.named_buffers()) and len(list(network.buffers())) == 3 * 3
    with_, without = (Regression(small_task(), images(), replace(reg.settings, steps=3, batch_statistics=flag))(space, space.parse(RICH))
                      for flag in (True, False))
    assert with_[:-1] == without[:-1] and with_[-1] != without[-1]  # the stem and the reductions have running statistics


def test_log_score():
    """log(1 + loss); the training is the same."""
    space, settings = NB201(width=4, cells=1), Settings(steps=3, stage_weights=(0.0, 1.0, 0.0))
    plain, log = (Regression(small_task(), images(), replace(settings, log_score=flag))(space, space.parse(RICH)) for flag in (False, True))
    assert plain[:-1] == log[:-1] and log[-1] == pytest.approx(math.log(1 + plain[-1]), rel=1e-6)


def test_regression_takes_as_many_and_as_small_images_as_the_settings_say():
    reg = Regression(small_task(), images(), Settings(batch=4, side=16))
    assert reg.inputs.shape == (4, 3, 16, 16) and reg.targets[0].shape == (4, 5, 8, 8)
    plain = F.interpolate(images()[:4], size=16, mode="bilinear", antialias=True)
    assert torch.equal(reg.inputs, plain.to(memory_format=torch.channels_last)) and not torch.equal(plain, images()[:4, :, ::2, ::2])
    big = gennas.resized(images()[:1, :, :4, :4], 8)
    assert torch.equal(big, images()[:1, :, :4, :4].repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("space, preset, steps, side, width", [
    ("nb201", "paper", 100, 32, 16), ("nb201", "fast", 44, 32, 4), ("nbmacro", "fast", 72, 16, None), ("resnext-a-in", "fast", 24, 16, None)])
def test_presets_in_a_space(space, preset, steps, side, width):
    made, settings = gennas.load_space(space, preset)
    assert (settings.steps, settings.side) == (steps, side) and gennas.load_space(space, preset, 7)[1] == replace(settings, steps=7)
    if width:
        assert made.build(made.parse(RICH))[0][0][0].out_channels == width
    assert set(search_spaces.CELL_SPACES) <= set(gennas.EXCEPTIONS["fast"])


def test_no_step_waits_for_the_device():
    space = NB201(width=4, cells=1)

    regression = Regression(small_task(), images(), Settings(steps=3))
    with torch.profiler.profile() as profile:
        regression(space, space.parse(RICH))
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::convolution_backward"] == 3 * 22 and not {"aten::item", "aten::_local_scalar_dense"} & calls.keys()


class Exploding(Linear):
    """Network "bad" gives infinite maps."""

    def build(self, arch):
        body = self.Body()
        if arch == "bad":
            nn.init.constant_(body.mix.bias, math.inf)
        return body


def test_diverged_networks_rank_last_and_are_marked():
    scorer = Scorer(Exploding(), lambda task: Regression(task, images(), Settings(steps=2)))
    (good, bad), = scorer([small_task()], ["good", "bad"])
    assert math.isfinite(good) and bad == math.inf and scorer.scores[scorer.key(small_task(), "bad")].loss is None
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


def test_evolution_by_hand():
    """Population 3, tournament 2: candidates are numbers, a child is its parent + 10, the loss is the distance to 25."""
    initial = iter([1, 2, 3])
    rng = ScriptedRng([(0, 1), (0, 2), (1, 2), (0, 1)])
    history = regularized_evolution(lambda rng: next(initial), lambda parent, rng: parent + 10,
                                    lambda batch: [abs(c - 25) for c in batch], rng, population=3, tournament=2, cycles=4)
    # 1 2 3: of 1, 2 the better is 2 -> 12; 2 3 12: of 2, 12: 12 -> 22; 3 12 22: of 12, 22: 22 -> 32; 12 22 32: of 12, 22: 22 -> 32
    assert rng.queues == [[1, 2, 3], [2, 3, 12], [3, 12, 22], [12, 22, 32]]
    assert history == [(1, 24), (2, 23), (3, 22), (12, 13), (22, 3), (32, 7), (32, 7)]


def test_evolution_in_batches():
    initial = iter([1, 2, 3])
    rng = ScriptedRng([(0, 1), (1, 2), (0, 1)])
    sizes = []
    history = regularized_evolution(lambda rng: next(initial), lambda parent, rng: parent + 10,
                                    lambda batch: sizes.append(len(batch)) or [abs(c - 25) for c in batch],
                                    rng, population=3, tournament=2, cycles=3, batch=2)
    assert rng.queues == [[1, 2, 3], [1, 2, 3], [3, 12, 13]] and sizes == [3, 2, 1]
    assert [candidate for candidate, _ in history] == [1, 2, 3, 12, 13, 22]


@pytest.mark.parametrize("batch", [1, 4])
def test_evolution_finds_a_known_optimum(batch):
    flip = lambda bits, rng: tuple(b ^ (i == place) for place in [rng.randrange(20)] for i, b in enumerate(bits))
    history = regularized_evolution(lambda rng: tuple(rng.randint(0, 1) for _ in range(20)), flip,
                                    lambda batch: [20 - sum(bits) for bits in batch], random.Random(0), 20, 5, 600, batch)
    assert len(history) == 620 and min(loss for _, loss in history) == 0


# ------------------------------------------------------------------------------------------------- rank correlation
def test_rank_correlations_by_definition():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, 15), rng.integers(0, 6, 15)  # many ties
        place = lambda v: np.array([(v < x).sum() + ((v == x).sum() + 1) / 2 for x in v])
        assert gennas.spearman(a, b) == pytest.approx(np.corrcoef(place(a), place(b))[0, 1])
        pairs = list(itertools.combinations(range(15), 2))
        concordance = sum(np.sign(a[i] - a[j]) * np.sign(b[i] - b[j]) for i, j in pairs)
        untied = [sum(v[i] != v[j] for i, j in pairs) for v in (a, b)]
        assert gennas.kendall(a, b) == pytest.approx(concordance / math.sqrt(untied[0] * untied[1]))
    assert math.isnan(gennas.spearman([1, 1, 1], [1, 2, 3])) and math.isnan(gennas.kendall([1, 2, 3], [4, 4, 4]))
    assert gennas.spearman([1, 2, 3], [10, 20, 30]) == gennas.kendall([1, 2, 3], [10, 20, 30]) == 1


def test_bootstrap_interval():
    rng = np.random.default_rng(1)
    a = rng.normal(size=100)
    b = a + rng.normal(size=100)
    low, high = gennas.spearman_interval(a, b)
    rho = gennas.spearman(a, b)
    assert low < rho < high and 0.05 < high - low < 0.35  # the normal theory's: about 4 (1 - rho^2) / 10
    assert gennas.spearman_interval(a, a) == (1, 1)


# ------------------------------------------------------------------------------------------------------- task search
def genes(any_task) -> dict[str, object]:
    """The fields that a mutation draws again, by name."""
    data = json.loads(any_task.to_json())
    parts = data.pop("stages", None) or [{"signals": data.pop(name)} for name in ("input", "target")]
    for i, part in enumerate(parts):
        assert [signal["basis"] for signal in part["signals"]] == [basis for basis in gennas.BASES if basis in {s["basis"] for s in part["signals"]}]
        data |= {f"{basis} {i}": None for basis in gennas.BASES} | {f"{signal['basis']} {i}": signal for signal in part["signals"]}
        data |= {f"channels {i}": part["channels"]} if "channels" in part else {}
    return data


@pytest.mark.parametrize("kind, fields", [(Task, 19), (gennas.RnnTask, 12)])
def test_random_and_mutated_tasks(kind, fields):
    """Draws are valid, print and read back; each field has the chances of the paper's task space; mutation redraws a fifth."""
    rng = random.Random(0)
    tasks = [gennas.random_task(rng, kind) for _ in range(1000)]
    children = [gennas.mutate_task(parent, rng) for parent in tasks]
    for any_task in tasks + children:
        assert type(any_task) is kind and Task.from_json(any_task.to_json()) == any_task
    drawn, redrawn = [genes(any_task) for any_task in tasks], [genes(any_task) for any_task in children]
    assert {len(values) for values in drawn} == {fields}
    assert {(values["noise"]["kind"], values["noise"]["level"]) for values in drawn} == {
        (noise, level / 10) for noise in ("gaussian", "uniform") for level in range(10)}
    signals = [value for values in drawn for value in values.values() if isinstance(value, dict) and "basis" in value]
    assert {signal["level"] for signal in signals} == {level / 10 for level in range(5, 30)}
    own = [signal["per_sample"] for signal in signals if "per_sample" in signal]
    assert all(own) if kind is gennas.RnnTask else 0.45 < sum(own) / len(own) < 0.55
    frequencies = [f for signal in signals for f in signal.get("frequencies", ())]
    assert 0.24 < sum(frequencies) / len(frequencies) < 0.26 and min(frequencies) < 0.02 and max(frequencies) > 0.48
    for name in drawn[0].keys() - {"noise"}:
        values = [d[name] for d in drawn]
        if name.startswith(("channels", "dimension")):
            assert set(values) == set(range(16, 97, 16))
        else:
            absent = sum(value is None for value in values)
            assert absent == 1000 if kind is gennas.RnnTask and "resize" in name else 430 < absent < 570
            changed = sum(old != new for old, new in zip(values, (d[name] for d in redrawn)))
            if absent < 1000:  # of the redrawn three quarters differ: not those that are absent before and after
                assert 110 < changed < 225  # more than 150, as a child that changes in nothing is drawn again
    assert all(child != parent for child, parent in zip(children, tasks))


def test_search_task(run, tmp_path):
    """What it reports of the found task is what `correlate` says of it; every task on every architecture is trained once."""
    rng, labels, found, rest = random.Random(1), tmp_path / "labels.json", tmp_path / "found.json", tmp_path / "rest.json"
    archs = [NB201().format(NB201().random(rng)) for _ in range(9)]
    labels.write_text(json.dumps([[arch, float(i)] for i, arch in enumerate(archs)]))
    rest.write_text(json.dumps([[arch, float(i)] for i, arch in enumerate(archs[5:])]))
    out, command = tmp_path / "out.jsonl", ("--mode", "search-task", "--labels", labels, "--limit", 5, "--population", 4,
                                            "--tournament", 2, "--cycles", 5, "--batch", 2)
    status, stdout, stderr = run(*command, "--json", "--out", out)
    result = last_json(stdout)
    assert status == 0 and (result["mode"], result["evaluated"], result["n"], result["n_held_out"]) == ("search-task", 9, 5, 4)
    assert (f"spearman {result['spearman']:.3f} on the 5 labels of the search, {result['spearman_other_seeds']:.3f} by other seeds, "
            f"{result['spearman_held_out']:.3f} on 4 others") in stderr
    losses = recorded(out)
    per_task = Counter(key.split()[0] for key in losses if not key.startswith("seed"))
    assert len(per_task) == 9 and sorted(per_task.values())[-1] == 9 and "139/139" in stderr  # 9 tasks on 5 by 3 seeds, the found one on 4 more
    assert Counter(key[:7] for key in losses if key.startswith("seed")) == {"seed 1 ": 45, "seed 2 ": 45}

    found.write_text(run(*command, "--quiet")[1])  # without --json, what it prints is a task file
    assert json.loads(found.read_text()) == result["task"]
    for file, name in ((labels, "spearman"), (rest, "spearman_held_out")):
        told = last_json(run("--mode", "correlate", "--labels", file, "--limit", 5, "--task", found, "--json")[1])
        assert told["spearman"] == pytest.approx(result[name])

    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:17]) + lines[17][:9])
    assert timeless(last_json(run(*command, "--json", "--out", out)[1])) == timeless(result) and recorded(out) == losses


def test_search_task_from_a_task(run):
    """The first population is the given task and mutants of it."""
    command = "--mode", "search-task", "--limit", 3, "--population", 1, "--json"
    assert last_json(run(*command, "--task", "darts", "--cycles", 0)[1])["task"] == json.loads(gennas.TASKS["darts"].to_json())
    assert last_json(run(*command, "--cycles", 0)[1])["task"] == json.loads(gennas.random_task(random.Random(0)).to_json())
    rng, asked = random.Random(0), []
    mutants = [gennas.mutate_task(gennas.TASKS["darts"], rng) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gennas, "Regression", lambda task, **_: asked.append(task) or (lambda space, arch: [1.0]))
        run("--mode", "search-task", "--limit", 3, "--population", 3, "--cycles", 0, "--task", "darts")
    assert asked[:3] == [gennas.TASKS["darts"], *mutants]


def test_search_task_with_workers(tmp_path):
    """Killed in its middle and continued by other workers, it finds the task of the undisturbed run, and says so once."""
    command = [sys.executable, "gennas.py", "--space", "nb201", "--mode", "search-task", "--limit", "4", "--steps", "1", "--population", "3", "--tournament", "2",
               "--cycles", "2", "--batch", "2", "--json", "--workers"]
    whole = subprocess.run([*command, "1"], cwd=HERE, capture_output=True, text=True, check=True)
    out = tmp_path / "tasks.jsonl"
    killed = subprocess.Popen([*command, "2", "--out", out], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_scores(out)
    killed.kill()
    killed.wait()
    assert 3 <= len(recorded(out)) < 3 * 4 + 2 * 4 + 16
    again = subprocess.run([*command, "2", "--out", out], cwd=HERE, capture_output=True, text=True, check=True)
    assert timeless(last_json(again.stdout)) == timeless(last_json(whole.stdout)) and len(recorded(out)) == 5 * 4 * 3 + 16
    assert again.stderr.count("labels of the search") == 1


def test_search_task_prefers_what_correlates(monkeypatch, run):
    """The found task is the one whose losses rank the built-in labels best, the most accurate network lowest."""
    accuracy, asked = dict(NB201().labels), set()

    class Rigged:
        def __init__(self, task, **_):
            self.level = task.noise["level"]
            asked.add(self.level)

        def __call__(self, space, arch):
            rng = random.Random(str(arch))
            sign = 1 if self.level == 0 else -1  # without noise it ranks backwards, perfectly
            return [sign * accuracy[arch] + rng.gauss(0, 20 * self.level)]

    monkeypatch.setattr(gennas, "Regression", Rigged)
    result = last_json(run("--mode", "search-task", "--population", 10, "--cycles", 20, "--json")[1])
    assert 0 in asked and result["task"]["noise"]["level"] == min(asked - {0}) and result["n"] == 20 and "n_held_out" not in result
    assert result["spearman"] > 0.8


def test_other_seeds_choose_among_the_best_tasks(monkeypatch, run):
    """By the seed of the search all tasks rank without fault, so that the first ten are the finalists; by others the noise tells."""
    accuracy, rng = dict(NB201().labels), random.Random(0)
    finalists = [gennas.random_task(rng) for _ in range(12)][:10]

    def rigged(task, seed, **_):
        noise = 0 if seed == 0 else task.noise["level"]
        return lambda space, arch: [-accuracy[arch] + random.Random(f"{arch} {seed}").gauss(0, 20 * noise)]

    monkeypatch.setattr(gennas, "Regression", rigged)
    result = last_json(run("--mode", "search-task", "--population", 12, "--cycles", 8, "--json")[1])
    assert result["task"]["noise"]["level"] == min(task.noise["level"] for task in finalists)
    assert result["spearman"] == 1 >= result["spearman_other_seeds"]


def test_built_in_labels():
    space = NB201()
    archs, values = zip(*space.labels)
    assert len({space.key(arch) for arch in archs}) == 20 and all(space.parse(space.format(arch)) == arch for arch in archs)
    assert [sum(value > other for other in values[:10]) for value in values[:10]] == list(range(10))  # evenly spread in any half
    if SHARED.exists():
        recorded = dict(search_spaces.load_labels(space, SHARED / "labels" / "nb201_cifar10.json")[:600])
        assert [recorded[arch] for arch in archs] == list(values)
        assert sorted(values) == sorted(recorded.values())[15::30]


# ------------------------------------------------------------------------------------------------ the record, resume
SEARCH = [sys.executable, "gennas.py", "--space", "nb201", "--steps", "1", "--population", "6", "--tournament", "2", "--cycles", "8", "--batch", "3", "--json"]


def run_search(*words) -> dict:
    process = subprocess.run([*SEARCH, *map(str, words)], cwd=HERE, capture_output=True, text=True, check=True)
    return timeless(last_json(process.stdout))


def timeless(result: dict) -> dict:
    return {name: value for name, value in result.items() if name != "seconds"}


def recorded(out: Path) -> dict[str, float]:
    """By key, of a file with one line for each."""
    lines = [json.loads(line) for line in out.read_text().splitlines()[1:]]
    losses = {line["key"]: line["loss"] for line in lines}
    assert len(losses) == len(lines)
    return losses


def wait_for_scores(out: Path) -> None:
    """Until the file has a few."""
    deadline = time.monotonic() + 60
    while not (out.exists() and out.read_bytes().count(b"\n") >= 4) and time.monotonic() < deadline:
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict, dict]:
    """Result and losses of SEARCH with one worker."""
    out = tmp_path_factory.mktemp("search") / "scores.jsonl"
    result = run_search("--workers", 1, "--out", out)
    losses = recorded(out)
    assert result["evaluated"] == 14 and len(losses) == result["unique"]
    return result, losses


@pytest.mark.parametrize("victim, status", [("run", -signal.SIGKILL), ("run", 130), ("worker", 1)])
def test_search_resumes_after_kill(tmp_path, undisturbed, victim, status):
    """A run of which a process is killed in its middle, or that is told to end, continued by the same command, ends as the
    undisturbed one."""
    out = tmp_path / "scores.jsonl"
    run = subprocess.Popen([*SEARCH, "--workers", "2", "--out", out], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_scores(out)
    if victim == "run":
        run.send_signal(signal.SIGTERM if status == 130 else signal.SIGKILL)
    else:
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
        if not children.exists():
            pytest.skip("finds a process's children in Linux's /proc only")
        os.kill(int(children.read_text()), signal.SIGKILL)
    assert run.wait() == status
    if status > 0:
        stderr = run.stderr.read()
        assert ("error: worker 1 of 2 died (exit status -9); " if victim == "worker" else "interrupted; ") in stderr and "Traceback" not in stderr
        assert f"{out.read_bytes().count(bytes([10])) - 1} networks are scored and kept in {out}; best " in stderr
    done = recorded(out)
    assert 3 <= len(done) < len(undisturbed[1])
    assert run_search("--workers", 2, "--out", out) == undisturbed[0] and recorded(out) == undisturbed[1]


def test_results_do_not_depend_on_the_workers(tmp_path, undisturbed):
    assert run_search("--workers", 3, "--out", tmp_path / "scores.jsonl") == undisturbed[0]
    assert recorded(tmp_path / "scores.jsonl") == undisturbed[1]


def test_two_nodes_under_torchrun(tmp_path, undisturbed):
    """Two launchers that meet on the loopback address; only the first node keeps the scores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for node in (0, 1):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
                    "--master-addr", "127.0.0.1", "--master-port", str(port)]
        nodes.append(subprocess.Popen([*launcher, *SEARCH[1:], "--out", tmp_path / f"{node}.jsonl"], cwd=HERE,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert timeless(last_json(outputs[0][0])) == undisturbed[0] and outputs[1][0] == ""
    assert recorded(tmp_path / "0.jsonl") == undisturbed[1] and not (tmp_path / "1.jsonl").exists()


def test_torchrun_restarts_dead_workers(tmp_path, undisturbed):
    out = tmp_path / "scores.jsonl"
    words = [*SEARCH[1:], "--out", str(out)]
    launcher = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "3", *words],
                                cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not children.exists():
        launcher.kill()
        pytest.skip("finds a process's children in Linux's /proc only")
    wait_for_scores(out)
    os.kill(int(children.read_text().split()[-1]), signal.SIGKILL)
    stdout, stderr = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, stderr
    assert timeless(last_json(stdout)) == undisturbed[0] and recorded(out) == undisturbed[1]
    assert stderr.count("gennas: search nb201") == 2  # it did start anew


def test_workers_share_a_list():
    """Three workers, here threads that meet at one store: each item is worked on once, all see all results."""
    store, worked = torch.distributed.HashStore(), []
    seen = {rank: [] for rank in range(3)}

    def work(item: int) -> int:
        worked.append(item)
        time.sleep(0.01)
        return item * item

    def worker(rank: int) -> None:
        workers = gennas.Workers(store, rank)
        for items in ([1, 2, 3, 4, 5, 6, 7], [8], [9, 10]):
            workers.map(work, items, seen[rank].append)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(worked) == list(range(1, 11))
    assert seen[0] == seen[1] == seen[2] and sorted(seen[0]) == [i * i for i in range(1, 11)]


def test_a_wrong_input_that_one_worker_meets_is_told_to_all():
    store = torch.distributed.HashStore()

    def work(item: int) -> int:
        time.sleep(0.01)
        raise ValueError(f"item {item} is wrong")

    def worker(rank: int) -> str:
        with pytest.raises(ValueError) as told:
            gennas.Workers(store, rank).map(work, [1, 2, 3, 4], print)
        return str(told.value)

    with ThreadPoolExecutor(2) as threads:
        said = set(threads.map(worker, range(2)))
    assert len(said) == 1 and "is wrong" in said.pop()


def test_results_that_came_before_an_error_are_kept():
    def work(item: int) -> int:
        if item == 3:
            raise ArithmeticError
        return item

    kept = []
    with pytest.raises(ArithmeticError):
        gennas.Workers().map(work, [1, 2, 3, 4], kept.append)
    assert kept == [1, 2]
    with pytest.raises(ZeroDivisionError):  # what `done` raises ends the list
        gennas.Workers().map(lambda item: item, list(range(1000)), lambda result: 1 / 0)


def test_record(run, tmp_path):
    out = tmp_path / "scores.jsonl"
    command = "--mode", "score", RICH, DEAD, "--out", out, "--json"
    first = run(*command)
    whole = out.read_text()
    assert first[0] == 0 and len(whole.splitlines()) == 3
    assert last_json(run(*command)[1])["results"] == last_json(first[1])["results"] and out.read_text() == whole

    out.write_text(whole[:-20])  # torn: the last network is scored again
    status, stdout, stderr = run(*command)
    assert status == 0 and "torn last line is dropped" in stderr
    strip = lambda text: [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
    assert strip(out.read_text()) == strip(whole)
    out.write_text(whole[:100])  # torn in the settings
    assert run(*command)[0] == 0 and strip(out.read_text()) == strip(whole)

    for change, word in ((("--steps", 3), "steps"), (("--seed", 1), "seed"), (("--task", "combo"), "task")):
        status, _, stderr = run(*command, *change)
        assert status == 2 and f"made with {word}" in stderr and stderr.count("\n") == 1
    assert strip(out.read_text()) == strip(whole)

    lines = whole.splitlines(keepends=True)
    out.write_text(lines[0] + "{}\n" + lines[1])
    assert "line 2: not a score" in run(*command)[2]
    foreign = tmp_path / "letter.txt"
    foreign.write_text("Dear reader")
    status, _, stderr = run("--mode", "score", RICH, "--out", foreign)
    assert status == 2 and "holds no scores" in stderr and foreign.read_text() == "Dear reader"


def test_a_second_writer_is_refused(run, tmp_path):
    pytest.importorskip("fcntl")
    out = tmp_path / "scores.jsonl"
    assert run("--mode", "score", RICH, "--out", out)[0] == 0
    settings = json.loads(out.read_text().splitlines()[0])["settings"]
    record = gennas.Record(str(out), settings)
    status, _, stderr = run("--mode", "score", RICH, "--out", out)
    assert status == 2 and "another run is writing" in stderr
    record.file.close()
    assert run("--mode", "score", RICH, "--out", out)[0] == 0


def test_each_network_is_trained_once():
    space, calls = NB201(width=4, cells=1), []
    scorer = Scorer(space, lambda task: lambda space, arch: calls.append((task, arch)) or [len(calls)])
    twin = space.parse("|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|skip_connect~2|")
    other = space.parse("|nor_conv_3x3~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2|")
    first, second = small_task(), gennas.TASKS["combo"]
    assert scorer([first], [twin, other, twin]) == [[1, 1, 1]] and calls == [(first, twin)] and len(scorer.scores) == 1
    assert scorer([second, first, second], [other, twin]) == [[2, 2], [1, 1], [2, 2]] and calls[1:] == [(second, other)]


# ----------------------------------------------------------------------------------------------------- command line
def test_search(run, tmp_path):
    plot = tmp_path / "search.png"
    command = "--population", 4, "--tournament", 2, "--cycles", 4, "--batch", 2, "--json", "--plot", plot
    pytest.importorskip("matplotlib")
    status, stdout, stderr = run(*command)
    result = last_json(stdout)
    assert status == 0 and plot.stat().st_size > 1000
    assert {"mode", "space", "task", "arch", "loss", "params", "evaluated", "unique", "seconds"} <= result.keys()
    assert result["evaluated"] == 8 >= result["unique"] and result["params"] == NB201().params(NB201().parse(result["arch"]))
    assert "8/8" in stderr and "best" in stderr and result["arch"] in stdout.splitlines()[0]
    again = last_json(run(*command)[1])
    assert again["arch"] == result["arch"] and again["loss"] == result["loss"]
    assert last_json(run(*command, "--seed", 1)[1])["loss"] != result["loss"]


def test_search_within_limits(run, tmp_path):
    command = "--population", 4, "--tournament", 2, "--cycles", 6, "--json", "--out"

    def counts(name: str, *words) -> list[int]:
        assert run(*command, tmp_path / name, *words)[0] == 0
        archs = [json.loads(line)["arch"] for line in (tmp_path / name).read_text().splitlines()[1:]]
        return [getattr(NB201(), name[:name.index(".")])(NB201().parse(arch)) for arch in archs]

    for count, limit in (("params", 300_000), ("flops", 60_000_000)):
        assert max(counts(f"{count}.limited", f"--max-{count}", limit)) <= limit < max(counts(f"{count}.free"))
    status, _, stderr = run(*command, tmp_path / "none", "--max-params", 1000)
    assert status == 2 and "none of 300 draws is within --max-params 1,000; the last has" in stderr.splitlines()[-1]


def test_recurrent_command_line(capsys, monkeypatch):
    monkeypatch.setitem(search_spaces.SPACES, "nbnlp", lambda **sizes: NBNLP((6, 8, 6), **sizes))
    base = ["--space", "nbnlp", "--steps", "2", "--workers", "1", "--json"]
    gennas.main([*base, "--population", "3", "--tournament", "2", "--cycles", "3"])
    result = last_json(capsys.readouterr().out)
    assert NBNLP().params(NBNLP().parse(result["arch"])) == result["params"] and result["images"] == "none"
    for words, said in ((["--task", "combo"], "right is one like nlp"), (["--max-flops", "9"], "does not count operations")):
        with pytest.raises(SystemExit, match="2"):
            gennas.main([*base, *words])
        assert said in capsys.readouterr().err


def test_score(run, monkeypatch):
    import io
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{RICH}\n\n[[3],[2,4],[1,3,2]]\n"))
    status, stdout, stderr = run("--mode", "score", "-", "--json", "--quiet")
    first, second = last_json(stdout)["results"]
    assert status == 0 and stderr == "" and first["arch"] == second["arch"] == RICH and first == second
    assert first.keys() == {"arch", "loss", "params", "seconds"}


def test_loss_curves(run, tmp_path, monkeypatch):
    """What is drawn are the losses of the steps, without the score."""
    pytest.importorskip("matplotlib")
    drawn = []
    real = gennas.plot_curves
    monkeypatch.setattr(gennas, "plot_curves", lambda *words: drawn.append(words) or real(*words))
    status, stdout, _ = run("--mode", "score", RICH, DEAD, "--plot", tmp_path / "x.png")
    curves, names, *_ = drawn[0]
    assert status == 0 and (tmp_path / "x.png").stat().st_size > 5000
    assert [len(curve) for curve in curves] == [2, 2] and names == [RICH, DEAD] and curves[0] != curves[1]


def test_correlate(run, tmp_path):
    labels = tmp_path / "labels.json"
    rng = random.Random(7)
    archs = [NB201().random(rng) for _ in range(6)]
    labels.write_text(json.dumps([[NB201().format(arch), float(i)] for i, arch in enumerate(archs)]))
    plot = ("--plot", tmp_path / "c.svg") if pytest.importorskip("matplotlib") else ()
    result = last_json(run("--mode", "correlate", "--labels", labels, "--limit", 5, "--json", *plot)[1])
    assert {"mode", "space", "task", "n", "spearman", "spearman_ci", "kendall", "seconds_per_arch", "seconds"} <= result.keys()
    scored = last_json(run("--mode", "score", *map(NB201().format, archs[:5]), "--json")[1])["results"]
    merits = [-entry["loss"] for entry in scored]
    assert result["n"] == 5 and result["spearman"] == pytest.approx(gennas.spearman(merits, range(5)))
    assert result["kendall"] == pytest.approx(gennas.kendall(merits, range(5)))


def test_correlate_with_built_in_labels(run):
    result = last_json(run("--mode", "correlate", "--json", "--limit", 3)[1])
    scored = last_json(run("--mode", "score", *[NB201().format(arch) for arch, _ in NB201().labels[:3]], "--json")[1])["results"]
    assert result["spearman"] == gennas.spearman([-entry["loss"] for entry in scored], [value for _, value in NB201().labels[:3]])


def test_show(run, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("combo", "darts"):
        status, stdout, _ = run("--mode", "show", "--task", name, "--plot", tmp_path / f"{name}.png")
        assert status == 0 and Task.from_json(stdout) == gennas.TASKS[name]
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_task_file_is_a_task(run, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(gennas.TASKS["combo"].to_json())
    command = "--mode", "score", RICH, "--json", "--task"
    assert (last_json(run(*command, file)[1])["results"][0]["loss"] == last_json(run(*command, "combo")[1])["results"][0]["loss"]
            != last_json(run(*command, "darts")[1])["results"][0]["loss"])


WRONG = [  # words of the command line, what the message must say
    (["--space", "nb999"], ["nb999", "nb201"]),
    (["--mode", "paint"], ["paint", "search"]),
    (["--preset", "slow"], ["slow", "paper"]),
    (["--steps", "0"], ["steps", "from 1 up"]),
    (["--population", "x"], ["population", "whole number"]),
    (["--population", "5", "--tournament", "10"], ["tournament 10", "at most the population"]),
    (["--batch", "51"], ["batch 51", "at most the population"]),
    (["--seed", "-1"], ["seed"]),
    (["--nonsense"], ["nonsense"]),
    ([RICH], ["ARCH belongs to --mode score"]),
    (["--limit", "3"], ["limit belongs to --mode correlate or search-task"]),
    (["--mode", "search-task", "--max-params", "9"], ["max-params belongs to --mode search"]),
    (["--mode", "search-task", "--limit", "2"], ["at least 3"]),
    (["--space", "nb101", "--mode", "search-task"], ["needs --labels", "nb101 has no labels of its own"]),
    (["--mode", "score"], ["needs ARCH"]),
    (["--mode", "score", "abc"], ["abc", "nb201", "nor_conv_3x3"]),
    (["--space", "nb101", "--mode", "correlate"], ["needs --labels", "nb101 has no labels of its own"]),
    (["--mode", "correlate", "--limit", "2"], ["at least 3"]),
    (["--mode", "correlate", "--cycles", "0"], ["--cycles belongs to --mode search or search-task"]),
    (["--mode", "show", "--out", "x.jsonl"], ["--out belongs to", "not to --mode show"]),
    (["--mode", "correlate", "--labels", "absent.json"], ["absent.json", "No such file"]),
    (["--mode", "correlate", "--labels", "text.txt"], ["text.txt", "not JSON"]),
    (["--mode", "correlate", "--labels", "object.json"], ["object.json", "[architecture, number]"]),
    (["--mode", "correlate", "--labels", "other.json"], ["other.json, entry 1", "nb201"]),
    (["--mode", "correlate", "--labels", "value.json"], ["value.json, entry 0", "number"]),
    (["--mode", "correlate", "--labels", "two.json"], ["at least 3"]),
    (["--task", "guess"], ["guess", "combo"]),
    (["--task", "absent.json"], ["absent.json", "No such file"]),
    (["--task", "text.json"], ["text.json", "not JSON"]),
    (["--task", "task.json"], ["task.json", "task.noise.level", "0 to 10", "99"]),
    (["--images", "absent.npz"], ["absent.npz", "No such file"]),
    (["--images", "text.npz"], ["text.npz", "right is"]),
    (["--images", "text.txt"], ["text.txt", "python batch"]),
    (["--images", "grey.npy"], ["grey.npy", "(20, 32, 32)"]),
    (["--images", "few.npy"], ["few.npy", "3 images, 8 are needed"]),
    (["--images", "range.npy"], ["range.npy", "[0, 1]"]),
    (["--images", "flat.npy"], ["flat.npy", "same everywhere"]),
    (["--images", "long.npy"], ["long.npy", "int64"]),
    (["--images", "empty"], ["empty", "data_batch_1"]),
    (["--device", "abacus"], ["abacus"]),
    (["--out", "absent/x.jsonl"], ["absent/x.jsonl", "No such file"]),
    (["--out", "empty"], ["empty", "regular file"]),
    (["--plot", "absent/x.png"], ["absent/x.png", "folder"]),
    (["--plot", "x.docx"], ["x.docx", ".png"]),
]


@pytest.mark.parametrize("words, said", WRONG, ids=lambda value: " ".join(value)[:40])
def test_errors_are_one_line_and_exit_2(run, tmp_path, monkeypatch, words, said):
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("text.txt", "text.json", "text.npz"):
        (tmp_path / name).write_text("plain words")
    data = json.loads(small_task().to_json())
    data["noise"]["level"] = 99
    for name, content in {"object.json": {}, "other.json": [[RICH, 1], ["21012", 2], [DEAD, 3]], "value.json": [[RICH, "high"]],
                          "two.json": [[RICH, 1], [DEAD, 2]], "task.json": data}.items():
        (tmp_path / name).write_text(json.dumps(content))
    noise = np.random.default_rng(0).random((20, 32, 32, 3))
    for name, array in {"grey": noise[..., 0], "few": noise[:3], "range": noise * 255, "flat": 0 * noise,
                        "long": (noise * 255).astype(np.int64)}.items():
        np.save(tmp_path / f"{name}.npy", array)
    status, stdout, stderr = run(*words)
    assert status == 2 and stdout == "" and stderr.count("\n") == 1 and stderr.endswith("\n"), stderr
    for text in said:
        assert text in stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_cuda_asked_for_and_absent(run):
    status, _, stderr = run("--device", "cuda")
    assert status == 2 and "cuda" in stderr and stderr.count("\n") == 1


def test_plot_without_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, stderr = run("--mode", "show", "--plot", "x.png")
    assert status == 2 and "pip install matplotlib" in stderr and stderr.count("\n") == 1


def test_interrupt_tells_the_best(run, monkeypatch):
    real, calls = Regression.__call__, []

    def interrupted(self, space, arch):
        calls.append(arch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, space, arch)

    monkeypatch.setattr(Regression, "__call__", interrupted)
    status, _, stderr = run()
    assert status == 130 and "interrupted; 2 networks are scored; best " in stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="has no /dev/full")
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_stdout_that_cannot_be_written(options):
    with open("/dev/full", "w") as full:
        process = subprocess.run([*SEARCH[:-1], "--workers", "1", "--quiet", *options], cwd=HERE, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1 and process.stderr.startswith("gennas: error: stdout: No space left on device; ")
    assert process.stderr.count("\n") == 1


def test_importing_does_nothing():
    code = "import torch, random, numpy as np; s = torch.get_rng_state(), random.getstate(), torch.get_num_threads(); import gennas, search_spaces; " \
           "assert torch.equal(s[0], torch.get_rng_state()) and s[1:] == (random.getstate(), torch.get_num_threads()); " \
           "import sys; assert 'matplotlib' not in sys.modules"
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def readme_commands() -> list[str]:
    lines = [line for block in readme_blocks("sh") for line in block.splitlines()]
    return [re.split(" #| > | \\| |;", line.split("python ", 1)[1])[0].strip() for line in lines if "python gennas.py" in line]


def test_each_file_alone(tmp_path):
    """search_spaces.py builds a network; gennas.py scores an object with a space's methods, its command line says what it lacks."""
    alone = tmp_path / "spaces"
    alone.mkdir()
    shutil.copy(HERE / "gennas.py", tmp_path)
    shutil.copy(HERE / "search_spaces.py", alone)
    code = "import torch, random, search_spaces as s; space = s.get('nb201'); print(len(space.build(space.random(random.Random(0)))(torch.zeros(2, 3, 32, 32))))"
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
    assert process.stderr == "gennas: error: the command line needs search_spaces.py; right is both files in one folder\n"


def test_readme_space(tmp_path):
    """The README's example of a space of one's own, whole and with several workers; then without a method."""
    example, = [block for block in readme_blocks("python") if "class Plain" in block]
    assert example.count("\n") <= 40
    (tmp_path / "my_space.py").write_text(example)
    (tmp_path / "less.py").write_text(example.replace("def mutate", "def change"))
    command = [sys.executable, HERE / "gennas.py", "--steps", "1", "--population", "4", "--tournament", "2", "--cycles", "4", "--workers", "2",
               "--json", "--quiet", "--space"]
    process = subprocess.run([*command, "my_space.py:Plain"], cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    result = last_json(process.stdout)
    space = search_spaces.get(f"{tmp_path / 'my_space.py'}:Plain")
    assert result["evaluated"] == 8 and space.params(space.parse(result["arch"])) == result["params"]
    rng = random.Random(0)
    for arch in [space.random(rng) for _ in range(20)]:
        assert space.parse(space.format(arch)) == arch and space.key(space.mutate(arch, rng)) != space.key(arch)
    (tmp_path / "flat.py").write_text(example.replace("enumerate(arch)", "enumerate(arch[:1])"))
    for name, said in (("less.py:Plain", "has no mutate"), ("less.py:Fancy", "Fancy"), ("absent.py:Plain", "No such file"),
                       ("flat.py:Plain", "feature maps")):  # met in training, by two workers, told by one
        process = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 2 and said in process.stderr and process.stderr.count("\n") == 1, process.stderr


@pytest.mark.parametrize("right, wrong, said", [
    ("class Plain:", "class Plain:\n    task = 'guess'", ["unknown task 'guess'", "combo"]),
    ("enumerate(arch)", "enumerate(arch[:1])", ["gives 2 feature maps; right are 3"]),
    ("i = rng.randrange(3)", "raise ValueError('no neighbour')", ["no neighbour; ", " networks are scored; best ", "[[", "]]\n"]),
])
def test_own_space_with_a_mistake(run, tmp_path, right, wrong, said):
    example, = [block for block in readme_blocks("python") if "class Plain" in block]
    (tmp_path / "mine.py").write_text(example.replace(right, wrong))
    status, stdout, stderr = run("--space", f"{tmp_path / 'mine.py'}:Plain", "--population", 8, "--quiet")
    assert status == 2 and not stdout and stderr.count("\n") == 1 and all(words in stderr for words in said), stderr


def test_own_space_with_maps_of_one_pixel_and_its_file_in_the_record(run, tmp_path):
    example, = [block for block in readme_blocks("python") if "class Plain" in block]
    file, out = tmp_path / "mine.py", tmp_path / "out.jsonl"
    file.write_text(example.replace("1 if i == 0 else 2", "4"))  # 16 pixels, 4, 1, 1
    command = "--space", f"{file}:Plain", "--population", 3, "--cycles", 1, "--out", out
    assert run(*command)[0] == run(*command)[0] == 0
    file.write_text(file.read_text() + "\n")
    status, _, stderr = run(*command)
    assert status == 2 and "made with file" in stderr


def test_workers_that_disagree():
    class Deaf(gennas.Workers):
        def map(self, work, items, done):
            done(["another key", "another", 1.0, 1.0])

    with pytest.raises(gennas.WorkersFailed, match="workers ask for different architectures"):
        Scorer(NB201(), None, workers=Deaf())([small_task()], [NB201().parse(RICH)])


@pytest.mark.parametrize("code", [block for block in readme_blocks("python") if "class Plain" not in block])
def test_readme_python(code, tmp_path, monkeypatch):
    if "matplotlib" in code:
        pytest.importorskip("matplotlib").use("agg")
    monkeypatch.chdir(tmp_path)
    Path("figures").mkdir()
    run = {"preset": "fast", "seconds_per_arch": 1.0, "spearman": 0.5, "spearman_ci": [0.4, 0.6]}
    Path("frontier.jsonl").write_text("".join(json.dumps(run | {"space": space}) + "\n" for space in ("nb201", "nb101")))
    for name, settings in gennas.PRESETS.items():
        monkeypatch.setitem(gennas.PRESETS, name, replace(settings, steps=1))
    monkeypatch.setitem(gennas.EXCEPTIONS["fast"], "nb201", ({}, {"width": 4, "cells": 1}))
    if "[:120]" in code:  # 3,840 trainings
        Path("nb201.json").write_text(json.dumps([[NB201().format(NB201().random(random.Random(seed))), seed] for seed in range(90)]))
        monkeypatch.setattr(Regression, "__call__", lambda self, space, arch: [random.Random(str(arch) + self.task.to_json()).random()])
    exec(code, {})


@pytest.mark.parametrize("command", readme_commands())
def test_readme_commands(run, tmp_path, monkeypatch, command):
    """Each command that the README shows runs, on the tiny space; files that it reads are made here."""
    monkeypatch.chdir(tmp_path)
    if "--plot" in command:
        pytest.importorskip("matplotlib")
    cells = {"nb201": [RICH, DEAD, "[[3],[0,0],[1,0,0]]"], "nb101": [NB101().format(NB101().random(random.Random(seed))) for seed in range(3)]}
    for space, archs in cells.items():
        Path(f"{space}.json").write_text(json.dumps(list(zip(archs, range(3)))))
    monkeypatch.setitem(search_spaces.SPACES, "nbnlp", lambda **sizes: NBNLP((6, 8, 6), **sizes))
    Path("nb101_20.json").write_text(Path("nb101.json").read_text())
    Path("logs").mkdir()
    for seed in range(3):
        recipe = NBNLP().format(NBNLP().random(random.Random(seed)))
        Path(f"logs/{seed}.json").write_text(json.dumps({"recepie": recipe, "status": "OK", "val_losses": [5.0 + seed]}))
    Path("my_task.json").write_text(small_task().to_json())
    Path("my_space.py").write_text(next(block for block in readme_blocks("python") if "class Plain" in block))
    Path("figures").mkdir()
    np.save("my_images.npy", np.random.default_rng(0).random((16, 32, 32, 3)))
    words = shlex.split(command.replace("$steps", "1"))[1:]
    searches = "--mode" not in words or "search-task" in words
    assert run(*words, *searches * ["--population", "3", "--cycles", "2"], "--steps", "1")[0] == 0
