"""Search spaces of GenNAS: what an architecture is, how to sample, mutate, name and build it, what its benchmark recorded.

A search space is a small class with

    random(rng) -> arch             a uniform draw
    mutate(arch, rng) -> arch       a valid neighbour whose key differs
    build(arch) -> nn.Module        images (B, 3, 32, 32) -> three feature maps, the taps of the regression
    key(arch) -> str                canonical form of the live computation graph; equal keys = the same network
    parse(text), format(arch)       the spelling that the benchmark's own tools read and write
    params(arch) -> int             the parameter count of the benchmark's own network, dead operations included

An arch is a plain immutable value, `rng` a `random.Random`. The file needs torch only and can be copied alone.
"""
from __future__ import annotations

import json
import math
import random
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ---------------------------------------------------------------------------------------------- computation graphs
class Vertex(NamedTuple):
    """One vertex of a computation graph: an operation on the sum of the vertices at `inputs`, earlier in the list."""
    op: str
    inputs: tuple[int, ...]


Graph = tuple[Vertex, ...]  # topological order; the first vertex is the input, the last the output


def live(graph: Graph) -> Graph:
    """`graph` without the vertices that do not reach its output (the input stays)."""
    reached = {0, len(graph) - 1}
    for i in reversed(range(len(graph))):
        if i in reached:
            reached.update(graph[i].inputs)
    place = {old: new for new, old in enumerate(sorted(reached))}
    return tuple(Vertex(graph[i].op, tuple(place[j] for j in graph[i].inputs)) for i in place)


def canonical(graph: Graph) -> Graph:
    """The same representative for all graphs that are `graph` up to the order of vertices and of summands.

    Individualisation and refinement: a vertex's colour is its rank by (depth, operation), then by the colours of what
    it reads and of what reads it, until that splits nothing more. Where colours still tie, each of the tied vertices is
    set before the others in turn and the smallest graph wins; of twins, which read and are read alike, one will do.
    Vertices stand in the order of their colours, depth first, so the result is a topological order too.
    """
    readers: list[list[int]] = [[] for _ in graph]
    depths: list[int] = []
    for i, vertex in enumerate(graph):
        depths.append(1 + max((depths[j] for j in vertex.inputs), default=-1))
        for j in vertex.inputs:
            readers[j].append(i)
    depths[-1] = len(graph)  # the output stands last even when nothing reaches it

    def refine(colours: list[Any]) -> list[int]:
        classes = 0
        while True:
            rank = {colour: r for r, colour in enumerate(sorted(set(colours)))}
            ranks = [rank[colour] for colour in colours]
            if len(rank) == classes:
                return ranks
            classes = len(rank)
            colours = [(ranks[i], sorted_tuple(ranks, graph[i].inputs), sorted_tuple(ranks, readers[i])) for i in range(len(graph))]

    def smallest(colours: list[int]) -> Graph:
        tied = next((c for c in range(len(graph)) if colours.count(c) > 1), None)
        if tied is None:
            order = sorted(range(len(graph)), key=colours.__getitem__)
            return tuple(Vertex(graph[i].op, sorted_tuple(colours, graph[i].inputs)) for i in order)
        twins = {(sorted_tuple(range(len(graph)), graph[i].inputs), tuple(readers[i])): i for i, c in enumerate(colours) if c == tied}
        return min(smallest(refine([2 * c - (i == first) for i, c in enumerate(colours)])) for first in twins.values())

    return smallest(refine([(depth, vertex.op) for depth, vertex in zip(depths, graph)]))


def sorted_tuple(ranks: Any, vertices: Any) -> tuple[int, ...]:
    return tuple(sorted(ranks[i] for i in vertices))


# ------------------------------------------------------------------------------------------------- building blocks
def conv_bn(before: list[nn.Module], c_in: int, c_out: int, kernel: int, stride: int = 1, plain_bn: bool = False) -> nn.Sequential:
    """`before`, then a convolution without bias that keeps the map's size but for the stride, then batch norm.

    `plain_bn`: without affine parameters and without running statistics, so that eval() too uses the batch's own.
    """
    return nn.Sequential(*before, nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
                         nn.BatchNorm2d(c_out, affine=not plain_bn, track_running_stats=not plain_bn))


class Cell(nn.Module):
    """Runs a computation graph on a feature map. A sum that several vertices read is computed once."""

    def __init__(self, graph: Graph, ops: dict[str, Any]):
        super().__init__()
        self.graph = graph
        self.ops = nn.ModuleList(ops[vertex.op]() for vertex in graph[1:-1])

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        maps = [x]
        sums: dict[tuple[int, ...], Tensor] = {}

        def total(inputs: tuple[int, ...]) -> Tensor:
            if inputs not in sums:
                sums[inputs] = sum((maps[i] for i in inputs[1:]), start=maps[inputs[0]])
            return sums[inputs]

        for op, vertex in zip(self.ops, self.graph[1:-1]):
            maps.append(op(total(vertex.inputs)))
        return total(self.graph[-1].inputs)


def count_parameters(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


# ---------------------------------------------------------------------------------------------------- NAS-Bench-201
class NB201:
    """NAS-Bench-201 (Dong and Yang, ICLR 2020): 15,625 cells of 4 nodes with one operation on each of the 6 edges.

    An arch is the tuple of the operations on the edges 0-1, 0-2, 1-2, 0-3, 1-3, 2-3; a node is the sum of its edges.
    The network: a stem, three stages of `cells` equal cells at widths `width`, 2 `width`, 4 `width`, and a residual
    block that halves the map between two stages. The taps are the ends of the stages: 32x32, 16x16, 8x8.
    """
    name = "nb201"
    task = "nb101"  # the task that the authors used for this space
    OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # numbered as in the authors' files
    NAMES, NUMBERS = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|", "[[{}],[{},{}],[{},{},{}]]"  # the two spellings
    EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))

    def __init__(self, width: int = 16, cells: int = 5):
        self.width, self.cells = width, cells

    def random(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(rng.choice(self.OPS) for _ in self.EDGES)

    def mutate(self, arch: tuple[str, ...], rng: random.Random) -> tuple[str, ...]:
        """Another operation on one edge, such that the network is another one."""
        while True:
            edge = rng.randrange(len(arch))
            child = *arch[:edge], rng.choice(self.OPS), *arch[edge + 1:]
            if self.key(child) != self.key(arch):
                return child

    def graph(self, arch: tuple[str, ...]) -> Graph:
        """The canonical live graph: a vertex for each operation that has an effect, skips resolved to what they carry."""
        vertices = [Vertex("input", ())]
        nodes: list[tuple[int, ...]] = [(0,), (), (), ()]  # the vertices whose sum a node is
        for (source, target), op in zip(self.EDGES, arch):
            if op == "skip_connect":
                nodes[target] += nodes[source]
            elif op != "none" and nodes[source]:
                nodes[target] += (len(vertices),)
                vertices.append(Vertex(op, nodes[source]))
        return canonical(live((*vertices, Vertex("output", nodes[3]))))

    def key(self, arch: tuple[str, ...]) -> str:
        return ";".join(f"{op}({','.join(map(str, inputs))})" for op, inputs in self.graph(arch))

    def parse(self, text: str) -> tuple[str, ...]:
        """From `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|` or the authors' numbers `[[a],[b,c],[d,e,f]]`; else ValueError."""
        for spelling, ops in ((self.NAMES, {op: op for op in self.OPS}), (self.NUMBERS, dict(zip("01234", self.OPS)))):
            found = re.fullmatch(re.escape(spelling).replace(r"\{\}", r"(\w+)"), "".join(text.split()))
            if found and all(op in ops for op in found.groups()):
                return tuple(ops[op] for op in found.groups())
        raise ValueError(f"not a NAS-Bench-201 cell: {text!r}; right is {self.NAMES} or {self.NUMBERS}, "
                         f"each {{}} one of {', '.join(self.OPS)} or its number 0 to 4")

    def format(self, arch: tuple[str, ...]) -> str:
        return self.NAMES.format(*arch)

    def params(self, arch: tuple[str, ...]) -> int:
        """As recorded: the network of width 16 and 5 cells a stage, every edge's operation, affine batch norms, 10 classes."""
        everything = Vertex("input", ()), *(Vertex(op, (0,)) for op in arch), Vertex("output", ())
        with torch.device("meta"):
            network = NB201Network(everything, width=16, cells=5, plain_bn=False)
            return count_parameters(network, nn.BatchNorm2d(64), nn.Linear(64, 10))

    def build(self, arch: tuple[str, ...]) -> nn.Module:
        """Images (B, 3, 32, 32) -> three maps (B, w, 32, 32), (B, 2w, 16, 16), (B, 4w, 8, 8). Batch norms in the cells
        have no affine parameters and no running statistics, as in the authors' code."""
        return NB201Network(self.graph(arch), self.width, self.cells, plain_bn=True)


class NB201Network(nn.Module):
    def __init__(self, graph: Graph, width: int, cells: int, plain_bn: bool):
        super().__init__()
        self.dead = not graph[-1].inputs
        self.widths = widths = width, 2 * width, 4 * width
        entries = conv_bn([], 3, width, 3), *(ReductionBlock(c_in, c_out) for c_in, c_out in pairwise(widths))
        self.stages = nn.ModuleList(nn.Sequential(entry, *(Cell(graph, self.ops(c, plain_bn)) for _ in range(cells)))
                                    for entry, c in zip(entries, widths))

    @staticmethod
    def ops(width: int, plain_bn: bool) -> dict[str, Any]:
        return {
            "none": nn.Identity,
            "skip_connect": nn.Identity,
            "nor_conv_1x1": lambda: conv_bn([nn.ReLU()], width, width, 1, plain_bn=plain_bn),
            "nor_conv_3x3": lambda: conv_bn([nn.ReLU()], width, width, 3, plain_bn=plain_bn),
            "avg_pool_3x3": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        }

    def forward(self, x: Tensor) -> list[Tensor]:
        if self.dead:  # no cell passes anything on
            return [x.new_zeros(len(x), c, x.shape[2] >> i, x.shape[3] >> i) for i, c in enumerate(self.widths)]
        taps = []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        return taps


class ReductionBlock(nn.Module):
    """NAS-Bench-201's residual block between stages: half the map's side, another width."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.body = nn.Sequential(conv_bn([nn.ReLU()], c_in, c_out, 3, stride=2), conv_bn([nn.ReLU()], c_out, c_out, 3))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(c_in, c_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, c_out, H/2, W/2)
        return self.body(x) + self.shortcut(x)


# --------------------------------------------------------------------------------------------------- names and labels
SPACES = {"nb201": NB201}


def get(name: str) -> Any:
    """The search space of a `--space` name; ValueError with the names for another."""
    if name not in SPACES:
        raise ValueError(f"unknown space {name!r}; right is one of {', '.join(SPACES)}")
    return SPACES[name]()


def load_labels(space: Any, path: str | Path) -> list[tuple[Any, float]]:
    """The recorded values of architectures, [(arch, value)], higher = better, in file order.

    The file is a JSON list of [arch, value], an arch in any spelling that `space.parse` reads, as text or as JSON.
    ValueError for a file that is not such a list or holds another space's architectures, OSError if there is none.
    """
    try:
        records = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"labels {path}: not JSON ({error}); right is a list of [architecture, value]") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f"labels {path}: right is a list of [architecture, value] with at least one entry")
    labels = []
    for number, record in enumerate(records):
        match record:
            case [arch, int() | float() as value] if math.isfinite(value) and not isinstance(value, bool):
                pass
            case _:
                raise ValueError(f"labels {path}, entry {number}: right is [architecture, number], not {json.dumps(record)[:80]}")
        try:
            labels.append((space.parse(arch if isinstance(arch, str) else json.dumps(arch)), float(value)))
        except ValueError as error:
            raise ValueError(f"labels {path}, entry {number}: {error}") from None
    return labels
