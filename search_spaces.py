# SPDX-License-Identifier: MIT
"""Search spaces of GenNAS: what an architecture is, how to sample, mutate, name and build it, what its benchmark holds.

A search space is a class with

    random(rng) -> arch             the benchmark's own draw
    mutate(arch, rng) -> arch       a valid neighbour whose key differs
    build(arch) -> nn.Module        the network to regress with: images (B, 3, 32, 32) -> three feature maps, the taps,
                                    or a recurrent net, sequences (B, T, width) -> (B, T, width)
    key(arch) -> str                canonical form of the live computation graph; equal keys = the same network
    parse(text), format(arch)       the spelling that the benchmark's own tools read and write
    params(arch) -> int             the parameter count of the benchmark's own network, dead operations included

An arch is a plain immutable value, `rng` a `random.Random`. The file needs torch only and can be copied alone. It has
computation graphs, which keys and cells are made of; operations; what all spaces share; the spaces; names and labels.

    space                           an arch                                     a mutation changes     width (benchmark)
    nb101                           matrix and ops of a cell's vertices         edges and ops          16 (128)
    nb201                           ops on a cell's 6 edges                     one op                 16 (16)
    nbmacro                         kinds of 8 layers                           one layer              32 (32)
    darts enas pnas nasnet amoeba   (op, input) pairs of 2 cells, width, depth  one of these           the arch's own
    resnet resnext-a resnext-b      blocks, width, bottleneck, groups a stage   one of one stage       the arch's own
    nbnlp                           op and inputs of a recurrent cell's nodes   one op or one input    400-600-600-400
"""
from __future__ import annotations

import ast
import importlib.util
import json
import math
import random
import re
import sys
import warnings
from contextlib import suppress
from functools import cache, lru_cache, partial
from graphlib import TopologicalSorter
from itertools import accumulate, pairwise, product, repeat
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode


# ---------------------------------------------------------------------------------------------- computation graphs
class Vertex(NamedTuple):
    """One vertex of a computation graph: an operation on the sum of the vertices at `inputs`, earlier in the list."""
    op: str
    inputs: tuple[int, ...] = ()


Graph = tuple[Vertex, ...]  # topological order; the inputs, called "input ...", come first, the output last
MOST_ORDERS = 2000  # that `canonical` compares; graphs drawn from the spaces need a handful


def live(graph: Iterable[Vertex]) -> Graph:
    """`graph` without the vertices that do not reach its output; the inputs stay."""
    graph = tuple(graph)
    reached = {i for i, vertex in enumerate(graph) if vertex.op.startswith("input")} | {len(graph) - 1}
    for i in reversed(range(len(graph))):
        if i in reached:
            reached.update(graph[i].inputs)
    place = {old: new for new, old in enumerate(sorted(reached))}
    return tuple(Vertex(graph[i].op, tuple(place[j] for j in graph[i].inputs)) for i in place)


def canonical(graph: Graph) -> Graph:
    """The same representative for all graphs that are `graph` up to the order of vertices and of summands.

    Individualisation and refinement (McKay and Piperno, 2014): a vertex's colour is its rank by depth and operation,
    then by the colours of what it reads and of what reads it, until that splits nothing more. Where colours still tie,
    each of the tied vertices is set before the others in turn. Without ties they order the vertices, topologically; the
    smallest graph in such an order wins. Two orders of the same graph are a symmetry of it, and of an orbit, vertices
    that symmetries carry into each other, one is enough to try. ValueError where MOST_ORDERS are not enough.
    """
    readers: list[list[int]] = [[] for _ in graph]
    depths: list[int] = []
    for i, vertex in enumerate(graph):
        depths.append(0 if vertex.op.startswith("input") else 1 + max((depths[j] for j in vertex.inputs), default=0))
        for j in vertex.inputs:
            readers[j].append(i)
    depths[-1] = len(graph)  # the output stands last even when nothing reaches it

    def colours_of(colours: list[int], vertices: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted(colours[i] for i in vertices))

    def refine(colours: list[Any]) -> list[int]:
        while True:
            place = {colour: rank for rank, colour in enumerate(sorted(set(colours)))}
            ranks = [place[colour] for colour in colours]
            colours = [(rank, colours_of(ranks, vertex.inputs), colours_of(ranks, reading))
                       for rank, vertex, reading in zip(ranks, graph, readers)]
            if len(set(colours)) == len(place):
                return ranks

    def opens_its_orbit(i: int, fixed: tuple[int, ...]) -> bool:
        """Whether no known symmetries that leave `fixed` where they are carry vertex i to a smaller one."""
        moves = [symmetry for symmetry in symmetries if all(symmetry[j] == j for j in fixed)]
        orbit = [i]
        for j in orbit:  # grows on the way
            orbit += {move[j] for move in moves}.difference(orbit)
        return i == min(orbit)

    orders: dict[Graph, list[int]] = {}  # the first order of the vertices that was found for a graph
    symmetries: list[dict[int, int]] = []
    todo: list[tuple[list[Any], tuple[int, ...]]] = [([(depth, op) for depth, (op, _) in zip(depths, graph)], ())]
    while todo:  # depth first: colours, and the vertices that were set before others
        colours, chosen = todo.pop()
        if not all(opens_its_orbit(i, chosen[:n]) for n, i in enumerate(chosen)):
            continue
        colours = refine(colours)
        order = sorted(range(len(graph)), key=colours.__getitem__)
        tied = next((colours[i] for i, j in pairwise(order) if colours[i] == colours[j]), None)
        if tied is not None:
            todo += [([2 * c - (i == first) for i, c in enumerate(colours)], (*chosen, first))
                     for first in reversed(range(len(graph))) if colours[first] == tied]
        else:
            result = tuple(Vertex(graph[i].op, colours_of(colours, graph[i].inputs)) for i in order)
            known = orders.setdefault(result, order)
            if known is not order:
                symmetries.append(dict(zip(known, order)))
            if len(orders) + len(symmetries) > MOST_ORDERS:
                raise ValueError(f"a graph of {len(graph)} vertices is too regular for a canonical form to be found")
    return min(orders)


def spell(graph: Graph) -> str:
    """A graph as text, for keys."""
    return ";".join(f"{op}({','.join(map(str, inputs))})" for op, inputs in graph)


def run_graph(graph: Graph, ops: Iterable[nn.Module], maps: list[Tensor]) -> list[Tensor]:
    """Return `maps`, those of the inputs, and after them those of all vertices that `ops` has a module for. A sum that
    several vertices read is computed once."""
    sums: dict[tuple[int, ...], Tensor] = {}
    for (_, inputs), op in zip(graph[len(maps):], ops):
        if inputs not in sums:
            sums[inputs] = sum((maps[i] for i in inputs[1:]), start=maps[inputs[0]])
        maps.append(op(sums[inputs]))
    return maps


# ------------------------------------------------------------------------------------------------------- operations
Op = Callable[[int, int], nn.Module]  # constructor(channels, stride)


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the map's size but for the stride."""
    return nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel - 1) // 2, dilation, groups, bias=False)


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out))


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_bn(c_in, c_out, kernel, stride, groups).append(nn.ReLU())


def relu_bn(*convs: nn.Conv2d, **norm: bool) -> nn.Sequential:
    """Convolutions between a ReLU and a batch norm; `norm`: options of the latter."""
    return nn.Sequential(nn.ReLU(), *convs, nn.BatchNorm2d(convs[-1].out_channels, **norm))


class Sum(nn.Sequential):
    """The sum of what its two branches make of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + self[1](x)


class FactorizedReduction(nn.Module):
    """Half the side without losing a position: two strided 1x1 convolutions, the second one pixel further."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.halves = nn.ModuleList(conv(c_in, c_out // 2, 1, stride=2) for _ in range(2))
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, c_out, H/2, W/2)
        x = F.relu(x)
        return self.bn(torch.cat([self.halves[0](x), self.halves[1](x[:, :, 1:, 1:])], 1))


def relu_conv(kernel: int) -> Op:
    return lambda c, stride: relu_bn(conv(c, c, kernel, stride))


def separable(kernel: int, dilation: int = 1) -> Op:
    return lambda c, stride: relu_bn(conv(c, c, kernel, stride, c, dilation), conv(c, c, 1))


def twice(op: Op) -> Op:
    return lambda c, stride: nn.Sequential(op(c, stride), op(c, 1))


def factorized(k: int) -> Op:
    return lambda c, stride: relu_bn(nn.Conv2d(c, c, (1, k), (1, stride), (0, k // 2), bias=False),
                                     nn.Conv2d(c, c, (k, 1), (stride, 1), (k // 2, 0), bias=False))


OPS: dict[str, Op] = {
    "node": lambda c, stride: nn.Identity(), "output": lambda c, stride: nn.Identity(),  # a sum and nothing else
    "none": lambda c, stride: nn.Sequential(nn.AvgPool2d(1, stride), nn.Threshold(math.inf, 0)),  # zero
    "skip_connect": lambda c, stride: nn.Identity() if stride == 1 else FactorizedReduction(c, c),
    "avg_pool_3x3": lambda c, stride: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    "maxpool3x3": lambda c, stride: nn.MaxPool2d(3, stride, 1),
    "max_pool_3x3": lambda c, stride: nn.MaxPool2d(3, stride, 1),
    "max_pool_5x5": lambda c, stride: nn.MaxPool2d(5, stride, 2),
    "max_pool_7x7": lambda c, stride: nn.MaxPool2d(7, stride, 3),
    "conv1x1-bn-relu": lambda c, stride: conv_bn_relu(c, c, 1, stride),
    "conv3x3-bn-relu": lambda c, stride: conv_bn_relu(c, c, 3, stride),
    "conv_1x1": relu_conv(1), "conv_3x3": relu_conv(3),
    "conv_3x1_1x3": factorized(3), "conv_7x1_1x7": factorized(7),
    "sep_conv_3x3": twice(separable(3)), "sep_conv_5x5": twice(separable(5)), "sep_conv_7x7": twice(separable(7)),
    "dil_conv_3x3": separable(3, dilation=2), "dil_conv_5x5": separable(5, dilation=2),
    "dil_sep_conv_3x3": twice(separable(3, dilation=2)),
}


# --------------------------------------------------------------------------------------------- what all spaces share
TRIES = 1000  # of a mutation, before an architecture counts as one without neighbours


class SearchSpace:
    """Mutation, reading and counting, for a space that has

    neighbour(arch, rng) -> arch    a valid arch that differs in one choice, whatever its key
    graph(arch) -> Graph            the live, canonical one, which `key` spells; or a `key` of its own
    read(text) -> arch              `parse` without a message: any of the usual exceptions for malformed text
    build(arch, whole=False)        `whole`: the benchmark's own network, dead operations and classifier included
    """
    name: str
    task: str  # the task that the authors used for this space; for nbmacro, which they did not use, a choice made here
    spelling: str  # what `parse` reads, in words
    side = 32  # of the images of the benchmark
    labels: list[tuple[Any, float]] | None = None  # recorded values that come with the code, higher = better

    def parse(self, text: str) -> Any:
        try:
            return self.read(text.strip())
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError,
                ValueError):
            raise ValueError(f"not a network of {self.name}: {text.strip()[:60]!r}; expected {self.spelling}") from None

    def mutate(self, arch: Any, rng: random.Random) -> Any:
        key = self.key(arch)
        for _ in range(TRIES):
            child = self.neighbour(arch, rng)
            if self.key(child) != key:
                return child
        raise ValueError(f"no neighbour that differs was found of {self.format(arch)}")

    def key(self, arch: Any) -> str:
        return spell(self.graph(arch))

    @lru_cache(4096)  # bounded, since it keeps the space and the archs alive
    def params(self, arch: Any) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(arch, whole=True).parameters())

    @lru_cache(4096)
    def flops(self, arch: Any) -> int:
        """Floating-point operations of one image's forward pass, as torch counts them: a multiply-add is two."""
        with torch.device("meta"):
            network, image = self.build(arch, whole=True).eval(), torch.empty(1, 3, self.side, self.side)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(image)
        return counter.get_total_flops()


class Stages(nn.Sequential):
    """Stages one after the other, each a sequence of blocks. The taps are what the last three make: their last blocks
    or, with `all_blocks`, all their blocks, concatenated."""

    def __init__(self, *stages: nn.Module, all_blocks: bool = False):
        super().__init__(*stages)
        self.all_blocks = all_blocks

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for stage in self:
            _, *maps = accumulate(stage if self.all_blocks else [stage], lambda x, block: block(x), initial=x)
            taps.append(torch.cat(maps, 1) if len(maps) > 1 else maps[0])
            x = maps[-1]
        return taps[-3:]


class Classifier(nn.Sequential):
    """The benchmark's network: the last tap, `tail`, global average, a linear layer."""

    def __init__(self, body: nn.Module, width: int, classes: int = 10, tail: Iterable[nn.Module] = ()):
        body.all_blocks = False  # these are for heads
        super().__init__(body, *tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        body, *tail = self
        return nn.Sequential(*tail)(body(x)[-1])


def normal_init(module: nn.Module) -> None:
    """A convolution normal with variance 2 / (k k out), as in NAS-Bench-101's and the NDS residual networks."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def replaced(values: tuple, place: int, value: Any) -> tuple:
    return *values[:place], value, *values[place + 1:]


def another(values: Iterable, value: Any, rng: random.Random) -> Any:
    return rng.choice([v for v in values if v != value])


def require(*conditions: Any) -> None:
    if not all(conditions):
        raise ValueError


# ---------------------------------------------------------------------------------------------------- NAS-Bench-101
class NB101Cell(NamedTuple):
    matrix: tuple[tuple[int, ...], ...]  # upper-triangular adjacency
    ops: tuple[str, ...]  # of all vertices, the first "input", the last "output"


class NB101(SearchSpace):
    """NAS-Bench-101 (Ying et al., ICML 2019): 423,624 cells of up to 7 vertices with operations and 9 edges. A stem and
    three stacks of three cells; between stacks a max-pool halves the map and the channels double."""
    name = task = "nb101"
    OPS = "conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"
    VERTICES, MOST_EDGES = 7, 9
    spelling = ("[matrix, ops] as JSON: an upper-triangular 0/1 matrix of 2 to 7 vertices with a path from the first "
                f"to the last and at most 9 edges; ops input, then {', '.join(OPS)}, then output")

    def __init__(self, width: int = 16, cells: int = 3, all_blocks: bool = False):
        self.width, self.cells, self.all_blocks = width, cells, all_blocks

    def random(self, rng: random.Random) -> NB101Cell:
        n = self.VERTICES
        while True:
            matrix = tuple(tuple(rng.randint(0, 1) if j > i else 0 for j in range(n)) for i in range(n))
            arch = NB101Cell(matrix, ("input", *(rng.choice(self.OPS) for _ in range(n - 2)), "output"))
            if self.valid(arch):
                return arch

    def neighbour(self, arch: NB101Cell, rng: random.Random) -> NB101Cell:
        """Each possible edge of 7 vertices flips with chance 1/7, each operation becomes another with chance 1/5."""
        n, missing = self.VERTICES, self.VERTICES - len(arch.ops)
        old_ops = *arch.ops[1:-1], *(rng.choice(self.OPS) for _ in range(missing))  # vertices without edges
        rows = [[*row[:-1], *[0] * missing, row[-1]] for row in arch.matrix]
        rows[-1:-1] = [[0] * n] * missing
        while True:
            matrix = tuple(tuple(rows[i][j] ^ (j > i and rng.random() < 1 / n) for j in range(n)) for i in range(n))
            ops = (another(self.OPS, op, rng) if rng.random() < 1 / 5 else op for op in old_ops)
            child = NB101Cell(matrix, ("input", *ops, "output"))
            if self.valid(child):
                return child

    def valid(self, arch: NB101Cell) -> bool:
        graph = self.graph(arch, whole=True)
        return bool(graph[-1].inputs) and sum(len(vertex.inputs) for vertex in graph) <= self.MOST_EDGES

    def graph(self, arch: NB101Cell, whole: bool = False) -> Graph:
        """The vertices on a path from the input to the output (`whole`: these too, but in the order given)."""
        graph, place = [Vertex("input")], {0: 0}
        for j, op in enumerate(arch.ops[1:], start=1):
            inputs = tuple(place[i] for i in range(j) if arch.matrix[i][j] and i in place)
            if inputs or op == "output":
                place[j] = len(graph)
                graph.append(Vertex(op, inputs))
        return live(graph) if whole else canonical(live(graph))

    def read(self, text: str) -> NB101Cell:
        matrix, ops = json.loads(text)
        require(2 <= len(ops) <= self.VERTICES, [len(row) for row in matrix] == [len(ops)] * len(ops))
        require(ops[0] == "input", ops[-1] == "output", set(ops[1:-1]) <= set(self.OPS))
        require(all(type(x) is int and x in (0, j > i) for i, row in enumerate(matrix) for j, x in enumerate(row)))
        arch = NB101Cell(tuple(map(tuple, matrix)), tuple(ops))
        require(self.valid(arch))
        return arch

    def format(self, arch: NB101Cell) -> str:
        return json.dumps(arch)

    def build(self, arch: NB101Cell, whole: bool = False) -> nn.Module:
        graph = self.graph(arch, whole)
        width, cells = (128, 3) if whole else (self.width, self.cells)
        entries = conv_bn_relu(3, width, 3), nn.MaxPool2d(2), nn.MaxPool2d(2)
        network = Stages(all_blocks=self.all_blocks)
        for entry, c_in, c in zip(entries, (width, width, 2 * width), (width, 2 * width, 4 * width)):
            first, *others = (NB101Block(graph, c if i else c_in, c) for i in range(cells))
            network.append(nn.Sequential(nn.Sequential(entry, first), *others))
        return Classifier(network, 4 * width) if whole else network.apply(normal_init)


class NB101Block(nn.Module):
    """A NAS-Bench-101 cell. What leaves the input passes a 1x1 convolution of its own. The output's channels are
    divided among what it reads, the remainder one each to the first; others are as wide as the widest they feed."""

    def __init__(self, graph: Graph, c_in: int, c_out: int):
        super().__init__()
        self.graph, last = graph, len(graph) - 1
        self.joined = [j for j in graph[last].inputs if j]  # what is concatenated
        self.channels = [0] * last + [c_out]
        for place, j in enumerate(self.joined):
            self.channels[j] = c_out // len(self.joined) + (place < c_out % len(self.joined))
        for j in reversed(range(1, last)):
            if j not in self.joined:
                self.channels[j] = max(self.channels[i] for i in range(j, last) if j in graph[i].inputs)
        self.ops = nn.ModuleList(OPS[graph[j].op](self.channels[j], 1) for j in range(1, last))
        self.projections = nn.ModuleList(conv_bn_relu(c_in, c, 1) if 0 in vertex.inputs else None
                                         for vertex, c in zip(graph, self.channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, c_out, H, W)
        maps = [x]
        for j, op in enumerate(self.ops, start=1):
            read = [maps[i][:, :self.channels[j]] if i else self.projections[j](x) for i in self.graph[j].inputs]
            maps.append(op(sum(read[1:], start=read[0])))
        joined = torch.cat([maps[j] for j in self.joined], 1) if self.joined else 0
        return joined + self.projections[-1](x) if self.projections[-1] else joined


# ---------------------------------------------------------------------------------------------------- NAS-Bench-201
class NB201(SearchSpace):
    """NAS-Bench-201 (Dong and Yang, ICLR 2020): 15,625 cells of 4 nodes. An arch is the operations on a cell's EDGES.
    A stem, three stages of five cells; between stages a residual block halves the map and doubles the channels."""
    name, task = "nb201", "nb101"
    OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # numbered as in the authors' files
    NAMES, NUMBERS = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|", "[[{}],[{},{}],[{},{},{}]]"  # the two spellings
    spelling = f"{NAMES} or {NUMBERS}, each {{}} one of {', '.join(OPS)} or its number 0 to 4"
    EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))

    # Recorded test accuracies on CIFAR-10, in %: of 600 cells drawn at random, sorted by accuracy, the 16th and every
    # 30th after it, every other one first. A cell is written as the numbers of its operations.
    ACCURACIES = {
        "441004": 67.27, "143110": 83.46, "141234": 87.2067, "131020": 88.7767, "201110": 89.6367, "032042": 90.94,
        "044322": 91.71, "333022": 92.1333, "324431": 92.46, "312213": 93.13, "200404": 76.0233, "314144": 86.6633,
        "410113": 88.32, "124201": 89.0467, "404222": 90.1367, "420213": 91.3733, "300340": 91.98, "011322": 92.26,
        "202330": 92.7133, "340133": 93.64,
    }

    def __init__(self, width: int = 16, cells: int = 5, all_blocks: bool = False):
        self.width, self.cells, self.all_blocks = width, cells, all_blocks
        self.labels = [(tuple(self.OPS[int(i)] for i in cell), value) for cell, value in self.ACCURACIES.items()]

    def random(self, rng: random.Random) -> tuple[str, ...]:
        return tuple(rng.choice(self.OPS) for _ in self.EDGES)

    def neighbour(self, arch: tuple[str, ...], rng: random.Random) -> tuple[str, ...]:
        edge = rng.randrange(len(arch))
        return replaced(arch, edge, another(self.OPS, arch[edge], rng))

    def graph(self, arch: tuple[str, ...], whole: bool = False) -> Graph:
        """The canonical graph of what has an effect, skips resolved to what they carry (`whole`: every operation)."""
        graph = [Vertex("input")]
        nodes: list[tuple[int, ...]] = [(0,), (), (), ()]  # the vertices whose sum a node is
        for (source, target), op in zip(self.EDGES, arch):
            if op == "skip_connect" and not whole:
                nodes[target] += nodes[source]
            elif whole or op != "none" and nodes[source]:
                nodes[target] += (len(graph),)
                graph.append(Vertex(op, nodes[source]))
        graph.append(Vertex("output", nodes[3]))
        return tuple(graph) if whole else canonical(live(graph))

    def read(self, text: str) -> tuple[str, ...]:
        named = text[0] == "|"
        pattern = re.escape(self.NAMES if named else self.NUMBERS).replace(r"\{\}", r"(\w+)")
        ops = dict(zip(self.OPS if named else "01234", self.OPS))
        return tuple(ops[op] for op in re.fullmatch(pattern, "".join(text.split())).groups())

    def format(self, arch: tuple[str, ...]) -> str:
        return self.NAMES.format(*arch)

    def build(self, arch: tuple[str, ...], whole: bool = False) -> nn.Module:
        """Unless `whole`, the cells' batch norms neither learn nor remember, as in the code of GenNAS's authors."""
        graph = self.graph(arch, whole)
        width, cells = (16, 5) if whole else (self.width, self.cells)
        if not graph[-1].inputs:
            return Nothing(width)
        norm = {} if whole else {"affine": False, "track_running_stats": False}
        entries = [conv_bn(3, width, 3)]
        for c in (width, 2 * width):
            body = nn.Sequential(relu_bn(conv(c, 2 * c, 3, stride=2)), relu_bn(conv(2 * c, 2 * c, 3)))
            entries.append(Sum(body, nn.Sequential(nn.AvgPool2d(2), conv(c, 2 * c, 1))))
        network = Stages(all_blocks=self.all_blocks)
        for entry, c in zip(entries, (width, 2 * width, 4 * width)):
            first, *others = (NB201Cell(graph, c, norm) for _ in range(cells))
            network.append(nn.Sequential(nn.Sequential(entry, first), *others))
        return Classifier(network, 4 * width, tail=(nn.BatchNorm2d(4 * width), nn.ReLU())) if whole else network


class NB201Cell(nn.Module):
    """A NAS-Bench-201 cell, a module for each vertex of its graph."""

    def __init__(self, graph: Graph, width: int, norm: dict[str, bool]):
        super().__init__()
        self.graph = graph
        self.ops = nn.ModuleList(relu_bn(conv(width, width, int(op[-1])), **norm) if "conv" in op else OPS[op](width, 1)
                                 for op, _ in graph[1:])

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return run_graph(self.graph, self.ops, [x])[-1]


class Nothing(nn.Module):
    """A dead network: its taps are zero."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x.new_zeros(len(x), self.width << i, x.shape[2] >> i, x.shape[3] >> i) for i in range(3)]


# -------------------------------------------------------------------------------------------------- NAS-Bench-Macro
class NBMacro(SearchSpace):
    """NAS-Bench-Macro (Su et al., CVPR 2021): 6,561 networks of 8 layers. An arch is their digits: 0 identity, 1 and 2
    inverted residuals. Stages of 2, 3 and 3 layers; the first layer of each halves the map (not the first stage's when
    regressing) and doubles the channels."""
    name, task = "nbmacro", "combo"
    STAGES = (0, 2), (2, 5), (5, 8)
    spelling = "8 digits, each 0, 1 or 2"
    BLOCKS = {"1": (3, 3), "2": (5, 6)}  # kernel, expansion

    def __init__(self, width: int = 32, all_blocks: bool = False):
        self.width, self.all_blocks = width, all_blocks  # width of the stem

    def random(self, rng: random.Random) -> str:
        return "".join(rng.choice("012") for _ in range(8))

    def neighbour(self, arch: str, rng: random.Random) -> str:
        layer = rng.randrange(8)
        return arch[:layer] + another("012", arch[layer], rng) + arch[layer + 1:]

    def key(self, arch: str) -> str:
        """An identity that changes no shape is nothing."""
        return " ".join(arch[start] + arch[start + 1:end].replace("0", "") for start, end in self.STAGES)

    def read(self, text: str) -> str:
        return re.fullmatch('("?)([012]{8})\\1', text)[2]

    def format(self, arch: str) -> str:
        return arch

    def build(self, arch: str, whole: bool = False) -> nn.Module:
        width = 32 if whole else self.width
        network = Stages(all_blocks=self.all_blocks)
        entries, strides = ([conv_bn_relu(3, width, 3)], [], []), (2 if whole else 1, 2, 2)
        for entry, digits, stride, c in zip(entries, self.key(arch).split(), strides, (width, 2 * width, 4 * width)):
            first, *others = (self.layer(digit, 2 * c if i else c, 2 * c, 1 if i else stride)
                              for i, digit in enumerate(digits))
            network.append(nn.Sequential(nn.Sequential(*entry, first), *others))
        return Classifier(network, 1280, tail=[conv_bn_relu(8 * width, 1280, 1)]) if whole else network

    def layer(self, digit: str, c_in: int, c_out: int, stride: int) -> nn.Module:
        if digit == "0":
            return conv_bn(c_in, c_out, 1, stride)
        kernel, expansion = self.BLOCKS[digit]
        c = c_in * expansion
        block = nn.Sequential(conv_bn_relu(c_in, c, 1), conv_bn_relu(c, c, kernel, stride, c), conv_bn(c, c_out, 1))
        return Sum(block, nn.Identity()) if stride == 1 and c_in == c_out else block


# ---------------------------------------------------------------- NDS cell spaces: DARTS, ENAS, PNAS, NASNet, Amoeba
class Genotype(NamedTuple):
    """Two cells, as in the code of DARTS; prints as the Python that rebuilds it. Nodes are numbered from 2 (0 and 1 are
    the two previous cells); a node is the sum of two (operation, input), at 2 i and 2 i + 1 of its cell's list."""
    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


class CellNet(NamedTuple):
    genotype: Genotype
    width: int
    depth: int


COMMON = ("skip_connect", "avg_pool_3x3", "max_pool_3x3", "sep_conv_3x3", "sep_conv_5x5")
CELL_SPACES = {  # nodes of a cell; whether the output has only the loose ends, which feed no other node; the operations
    "darts": (4, False, ("none", *COMMON, "dil_conv_3x3", "dil_conv_5x5")),
    "enas": (5, True, COMMON),
    "pnas": (5, False, (*COMMON, "sep_conv_7x7", "dil_conv_3x3", "conv_7x1_1x7")),
    "nasnet": (5, True, (*COMMON, "sep_conv_7x7", "max_pool_5x5", "max_pool_7x7", "conv_1x1", "conv_3x3",
                         "conv_3x1_1x3", "conv_7x1_1x7", "dil_conv_3x3")),
    "amoeba": (5, True, (*COMMON, "sep_conv_7x7", "dil_sep_conv_3x3", "conv_7x1_1x7")),
}


class Cells(SearchSpace):
    """The cell spaces of NDS (Radosavovic et al., ICCV 2019), CIFAR or ImageNet (`-in`), width and depth free or fixed.
    The ImageNet network's values are those of its records; the CIFAR network's could not be compared with records. The
    network to regress with has a `shrink`-th of the channels."""
    task = "darts"
    MACRO = {  # imagenet -> widths, depths, fixed width and depth; the fixed CIFAR ones are a choice made here
        False: ((16, 24, 32), (4, 8, 12, 16, 20), (16, 20)),
        True: ((32, 48, 64, 80, 96), (6, 10, 14, 18, 22), (32, 22)),
    }

    def __init__(self, cells: str, fixed: bool = False, imagenet: bool = False, shrink: int = 1,
                 all_blocks: bool = False):
        self.name, self.shrink, self.all_blocks = cells + "-fix" * fixed + "-in" * imagenet, shrink, all_blocks
        self.nodes, self.loose_ends, self.ops = CELL_SPACES[cells]
        self.fixed, self.imagenet, self.side = fixed, imagenet, 224 if imagenet else 32
        self.widths, self.depths, self.default = self.MACRO[imagenet]
        if fixed:
            self.widths, self.depths = self.default[:1], self.default[1:]
        self.spelling = (
            "an NDS net dict or Genotype(normal=..., normal_concat=..., reduce=..., reduce_concat=...) with "
            f"{self.nodes} nodes of two (op, input), ops among {', '.join(self.ops)}, the concat "
            f"{'the loose ends' if self.loose_ends else 'all nodes'}; width in {self.widths}, depth in {self.depths}")

    def random(self, rng: random.Random) -> CellNet:
        def cell() -> tuple[tuple[str, int], ...]:
            return tuple((rng.choice(self.ops), rng.randrange(2 + i // 2)) for i in range(2 * self.nodes))
        return CellNet(self.genotype(cell(), cell()), rng.choice(self.widths), rng.choice(self.depths))

    def genotype(self, normal: tuple, reduce: tuple) -> Genotype:
        def concat(pairs: tuple) -> tuple[int, ...]:
            fed = {source for _, source in pairs} if self.loose_ends else ()
            return tuple(node for node in range(2, 2 + self.nodes) if node not in fed)
        return Genotype(normal, concat(normal), reduce, concat(reduce))

    def neighbour(self, arch: CellNet, rng: random.Random) -> CellNet:
        """Another operation or another input in one place, or another width or depth."""
        places = [*product(("op", "input"), range(2), range(2 * self.nodes))]
        what, cell, i = rng.choice(places if self.fixed else [*places, ("width", 0, 0), ("depth", 0, 0)])
        if what in ("width", "depth"):
            return arch._replace(**{what: another(getattr(self, what + "s"), getattr(arch, what), rng)})
        cells = [arch.genotype.normal, arch.genotype.reduce]
        op, source = cells[cell][i]
        pair = (another(self.ops, op, rng), source) if what == "op" else (op, another(range(2 + i // 2), source, rng))
        cells[cell] = replaced(cells[cell], i, pair)
        return arch._replace(genotype=self.genotype(*cells))

    def graphs(self, arch: CellNet, whole: bool = False) -> list[Graph]:
        """Return the canonical graphs of the normal and of the reduction cell (`whole`: every operation, in order). A skip
        is resolved to what it carries, except a strided one, which is an operation; a sum of nothing is zero."""
        graphs = []
        for reduction, (pairs, concat) in enumerate((arch.genotype[:2], arch.genotype[2:])):
            graph = [Vertex("input 0"), Vertex("input 1")]
            nodes: list[tuple[int, ...]] = [(0,), (1,)]  # the vertices whose sum a node is
            for i in range(0, len(pairs), 2):
                node: tuple[int, ...] = ()
                for op, source in pairs[i:i + 2]:
                    if op == "skip_connect" and not whole and not (reduction and source < 2):
                        node += nodes[source]
                    elif whole or op != "none":
                        node += (len(graph),)
                        graph.append(Vertex(op, nodes[source]))
                if not node:
                    node = (len(graph),)
                    graph.append(Vertex("none", (0,)))
                nodes.append(node)
            first = len(graph)
            graph += [Vertex("node", nodes[j]) for j in concat]
            graph.append(Vertex("concat", tuple(range(first, len(graph)))))
            graphs.append(tuple(graph) if whole else canonical(live(graph)))
        return graphs

    def key(self, arch: CellNet) -> str:
        return "|".join([*map(spell, self.graphs(arch)), str(arch.width), str(arch.depth)])

    def read(self, text: str) -> CellNet:
        """From an NDS net dict, or from the text `Genotype(...)`, which has the fixed width and depth."""
        if text.startswith("{"):
            net = json.loads(text)
            genotype, width, depth = net["genotype"], net["width"], net["depth"]
        else:
            text = re.sub(r"range\((\d), ?(\d)\)", lambda found: str([*range(int(found[1]), int(found[2]))]), text)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's own, of odd literals
                call = ast.parse(text, mode="eval").body
            require(call.func.id == "Genotype", not call.args)
            genotype = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            width, depth = self.default
        require(type(width) is type(depth) is int, width in self.widths, depth in self.depths)
        cells = [tuple((op, source) for op, source in genotype[cell]) for cell in ("normal", "reduce")]
        for pairs in cells:
            require(len(pairs) == 2 * self.nodes)
            require(all(op in self.ops and type(source) is int for op, source in pairs))
            require(all(0 <= source < 2 + i // 2 for i, (_, source) in enumerate(pairs)))
        arch = CellNet(self.genotype(*cells), width, depth)
        for cell in ("normal_concat", "reduce_concat"):
            require(sorted(genotype[cell]) == [*getattr(arch.genotype, cell)])
        return arch

    def format(self, arch: CellNet) -> str:
        return str(arch.genotype) if self.fixed else json.dumps(arch._asdict() | {"genotype": arch.genotype._asdict()})

    def build(self, arch: CellNet, whole: bool = False) -> nn.Module:
        width = arch.width if whole else arch.width // self.shrink
        network = CellNetwork(self.graphs(arch, whole), width, arch.depth, self.imagenet, self.all_blocks, whole)
        return Classifier(network, network.out_width, 1000 if self.imagenet else 10) if whole else network


class CellNetwork(nn.Module):
    """Cells in a chain, each on the outputs of the two before it; those at a third and two thirds of the depth are
    reduction cells, which halve the map and double the width. Taps: before these two, and at the end. Unless `whole`,
    an ImageNet stem has stride 1."""

    def __init__(self, graphs: list[Graph], width: int, depth: int, imagenet: bool, all_blocks: bool = False,
                 whole: bool = False):
        super().__init__()
        self.all_blocks = all_blocks
        stride = 2 if whole else 1
        if imagenet:
            first = nn.Sequential(conv_bn_relu(3, width // 2, 3, stride), conv_bn(width // 2, width, 3, stride))
            self.stem = nn.ModuleList([first, relu_bn(conv(width, width, 3, stride))])
        else:
            self.stem = nn.ModuleList([conv_bn(3, 3 * width, 3), nn.Identity()])
        reductions = depth // 3, 2 * depth // 3
        self.taps = *(i - 1 for i in reductions), depth - 1
        self.cells = nn.ModuleList()
        c_before = c_last = width if imagenet else 3 * width
        last_reduced = imagenet and whole
        for i in range(depth):
            reduction = i in reductions
            width *= 1 + reduction
            self.cells.append(TwoInputCell(graphs[reduction], c_before, c_last, width, last_reduced, reduction))
            c_before, c_last, last_reduced = c_last, width * len(graphs[reduction][-1].inputs), reduction
        self.out_width = c_last

    def forward(self, x: Tensor) -> list[Tensor]:  # (B, 3, H, W)
        before = self.stem[0](x)
        last = self.stem[1](before)
        taps, maps = [], []
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            maps.append(last)
            if i in self.taps:
                taps.append(torch.cat(maps, 1) if self.all_blocks else last)
                maps = []
        return taps


class TwoInputCell(nn.Module):
    """One cell: both inputs brought to its width, its graph, the concatenation of nodes."""

    def __init__(self, graph: Graph, c_before: int, c_last: int, width: int, last_reduced: bool, reduction: bool):
        super().__init__()
        self.graph = graph
        before = FactorizedReduction(c_before, width) if last_reduced else relu_bn(conv(c_before, width, 1))
        self.prepare = nn.ModuleList([before, relu_bn(conv(c_last, width, 1))])
        self.ops = nn.ModuleList(OPS[op](width, 2 if reduction and max(inputs) < 2 else 1)
                                 for op, inputs in graph[2:-1])

    def forward(self, before: Tensor, last: Tensor) -> Tensor:  # (B, c_before, ...), (B, c_last, H, W)
        maps = run_graph(self.graph, self.ops, [self.prepare[0](before), self.prepare[1](last)])
        return torch.cat([maps[j] for j in self.graph[-1].inputs], 1)


# ----------------------------------------------------------------------- NDS residual spaces: ResNet, ResNeXt-A and -B
class ResidualNet(NamedTuple):
    """An NDS net dict, one entry a stage; the first entry of each list is the stem's."""
    block_type: str
    ds: tuple[int, ...]  # blocks
    ws: tuple[int, ...]  # widths
    ss: tuple[int, ...]  # strides
    bot_muls: tuple[float, ...]  # bottleneck width over width; empty but for res_bottleneck_block
    num_gs: tuple[int, ...]  # groups of the 3x3 convolution, likewise


RESNEXT = {"ds": (1, 2, 4, 8, 16), "ws": (), "bot_muls": (0.25, 0.5, 1.0), "num_gs": ()}
RESIDUAL_SPACES = {  # field of the net dict -> its values
    "resnet": {"ds": tuple(range(1, 25)), "ws": tuple(range(16, 257, 8)), "bot_muls": (), "num_gs": ()},
    "resnext-a": RESNEXT | {"ws": (16, 32, 64, 128, 256), "num_gs": (1, 2, 4)},
    "resnext-b": RESNEXT | {"ws": (64, 128, 256, 512, 1024), "num_gs": (1, 2, 4, 8, 16)},
}
# stride of the benchmark's whole stem -> its layers(width, stride of each layer that has one)
STEMS: dict[int, Callable[[int, int], list[nn.Module]]] = {
    1: lambda w, stride: [conv_bn_relu(3, w, 3)],
    4: lambda w, stride: [conv_bn_relu(3, w, 7, stride), nn.MaxPool2d(3, stride, 1)],
    8: lambda w, stride: [conv_bn_relu(c_in, c, 3, stride) for c_in, c in ((3, w // 2), (w // 2, w), (w, w))],
}


def residual_block(kind: str, c_in: int, c: int, stride: int, mid: int, groups: int) -> nn.Module:
    """A block of the `block_type` kind, without the ReLU after it; `mid`: the bottleneck's width."""
    if kind == "res_bottleneck_block":
        body = nn.Sequential(conv_bn_relu(c_in, mid, 1), conv_bn_relu(mid, mid, 3, stride, groups), conv_bn(mid, c, 1))
    else:
        body = nn.Sequential(conv_bn_relu(c_in, c, 3, stride), conv_bn(c, c, 3))
    if kind == "double_plain_block":
        return body
    return Sum(body, nn.Identity() if stride == 1 and c_in == c else conv_bn(c_in, c, 1, stride))


class Residual(SearchSpace):
    """The residual spaces of NDS (Radosavovic et al., ICCV 2019), CIFAR or ImageNet (`-in`). The blocks of the network
    to regress with have a `shrink`-th of the channels, but of their groups at least one each."""
    task = "resnet"

    def __init__(self, kind: str, imagenet: bool = False, shrink: int = 1, all_blocks: bool = False):
        self.name, self.shrink, self.all_blocks = kind + "-in" * imagenet, shrink, all_blocks
        self.choices, self.plain = RESIDUAL_SPACES[kind], kind == "resnet"
        self.imagenet, self.side = imagenet, 224 if imagenet else 32
        self.blocks = ("res_basic_block", "double_plain_block") if self.plain else ("res_bottleneck_block",)
        self.strides = (1, 1, 2, 2) if not imagenet else (4, 1, 2, 2, 2) if self.plain else (8, 1, 2, 2)
        self.stem = {"ds": 1, "ws": 64 if imagenet and not self.plain else 16, "bot_muls": 1.0, "num_gs": 1}
        allowed = (f"{field} {f'up to {max(values)}' if self.plain else f'of {values}'}" if values else f"{field} empty"
                   for field, values in self.choices.items())
        self.spelling = (f"an NDS net dict as JSON: block_type {' or '.join(self.blocks)}, ss {list(self.strides)}, as "
                         f"many {', '.join(allowed)}; the first entry is the stem's")

    def random(self, rng: random.Random) -> ResidualNet:
        """Uniform; ResNet's blocks and widths log-uniform. Of the block types, the first."""
        lists = {}
        for field, values in self.choices.items():
            weights = [1 / value for value in values] if self.plain else None
            lists[field] = (self.stem[field], *rng.choices(values, weights, k=len(self.strides) - 1)) if values else ()
        return ResidualNet(self.blocks[0], ss=self.strides, **lists)

    def neighbour(self, arch: ResidualNet, rng: random.Random) -> ResidualNet:
        """Another value in one place."""
        field = rng.choice([field for field in self.choices if getattr(arch, field)])
        values = getattr(arch, field)
        stage = rng.randrange(1, len(values))
        return arch._replace(**{field: replaced(values, stage, another(self.choices[field], values[stage], rng))})

    def stages(self, arch: ResidualNet) -> list[tuple]:
        """Of each stage: blocks, width, stride, bottleneck width, groups; the last two 0 without bottlenecks."""
        stages = zip(arch.ds, arch.ws, arch.ss, arch.bot_muls or repeat(0), arch.num_gs or repeat(0))
        return [(d, w, s, round(w * m), g) for d, w, s, m, g in stages][1:]

    def key(self, arch: ResidualNet) -> str:
        return json.dumps([arch.block_type, arch.ws[0], arch.ss[0], self.stages(arch)])

    def read(self, text: str) -> ResidualNet:
        net = json.loads(text)
        lists = {field: tuple(net[field]) for field in ("ss", *self.choices)}
        require(net["block_type"] in self.blocks, lists["ss"] == self.strides)
        for field, values in self.choices.items():
            listed = lists[field]
            require(len(listed) == (len(self.strides) if values else 0))
            require(all(is_finite(value) if field == "bot_muls" else type(value) is int for value in listed))
            require(all(0 < value <= max(values) for value in listed), self.plain or set(listed[1:]) <= set(values))
        require(lists["ws"][0] > 1)  # a stem may halve it
        return ResidualNet(net["block_type"], **lists | {"ss": self.strides})

    def format(self, arch: ResidualNet) -> str:
        return json.dumps(arch._asdict())

    def build(self, arch: ResidualNet, whole: bool = False) -> nn.Module:
        """The ReLU of a stage's last block opens the next stage, for taps are before it."""
        entry: list[nn.Module] = STEMS[arch.ss[0]](arch.ws[0], 2 if whole else 1)  # ends in a ReLU or a pool of its own
        c_in, network = arch.ws[0], Stages(all_blocks=self.all_blocks)
        shrink = 1 if whole else self.shrink
        for blocks, c, stride, mid, groups in self.stages(arch):
            network.append(nn.Sequential())
            c, mid = c // shrink, groups and max(mid // shrink // groups, 1) * groups
            for _ in range(blocks):
                block = residual_block(arch.block_type, c_in, c, stride, mid, groups)
                network[-1].append(nn.Sequential(*entry, block))
                c_in, stride, entry = c, 1, [nn.ReLU()]
        if whole:
            return Classifier(network, c_in, 1000 if self.imagenet else 10, tail=[nn.ReLU()])
        return network.apply(normal_init)


# ---------------------------------------------------------------------------------------------------- NAS-Bench-NLP
class Node(NamedTuple):
    name: str
    op: str
    inputs: tuple[str, ...]


class NBNLP(SearchSpace):
    """NAS-Bench-NLP (Klyuchnikov et al., IEEE Access 2022): recurrent cells. An arch is a recipe: nodes on x, on the
    previous hidden states h_prev_i and on other nodes. The nodes h_new_i become the next hidden states, and h_new_0 is
    the output. In a `reservoir` the recurrent matrices stay as drawn, as weight drop has it in the authors' code."""
    name, task = "nbnlp", "nlp"
    ACTIVATIONS = "activation_tanh", "activation_sigm", "activation_leaky_relu"
    KIN = ACTIVATIONS, ("elementwise_sum", "elementwise_prod")  # a mutation exchanges them
    ARITY = {"linear": (2, 3), "blend": (3,), "elementwise_prod": (2,), "elementwise_sum": (2,),
             **dict.fromkeys(ACTIVATIONS, (1,))}
    WORDS = 10_000  # of the benchmark's vocabulary
    MOST_NODES = 100  # that are read; the generator's recipes have at most 25
    flops = None  # they depend on the length of the sequence
    spelling = ('a JSON object of nodes {name: {"op": ..., "input": [...]}}, at most 100, without a cycle, over x (of '
                f"linear only) and h_prev_i, with h_new_0 and as many h_new as h_prev, ops {', '.join(ARITY)}")

    def __init__(self, widths: tuple[int, ...] = (400, 600, 600, 400), reservoir: bool = False):
        self.widths, self.reservoir = widths, reservoir

    def random(self, rng: random.Random) -> tuple[Node, ...]:
        """The benchmark's generator: nodes on earlier ones, some of them the new hidden states, until all is used."""
        while True:
            previous = [f"h_prev_{i}" for i in range(rng.choice((1, 2, 3)))]
            size = len(previous) + rng.choice((7, 14, 21))
            nodes: list[Node] = []
            while len(nodes) < size:
                op, = rng.choices(("linear", "blend", "elementwise_prod", "elementwise_sum"), (3, 1, 1, 1))
                sources = self.sources(op, nodes, previous)
                count = min(*rng.choices((2, 3), (4, 1)), len(sources)) if op == "linear" else self.ARITY[op][0]
                if count <= len(sources):
                    nodes.append(Node(f"node_{len(nodes)}", op, tuple(rng.sample(sources, count))))
                    if op == "linear":
                        nodes.append(Node(f"node_{len(nodes)}", rng.choice(self.ACTIVATIONS), (nodes[-1].name,)))
            new = {node.name: f"h_new_{i}" for i, node in enumerate(rng.sample(nodes, len(previous)))}
            reached = self.reached(nodes, list(new))
            arch = tuple(Node(new.get(name, name), op, tuple(new.get(source, source) for source in inputs))
                         for name, op, inputs in nodes if name in reached)
            if self.valid(arch):
                return arch

    def sources(self, op: str, nodes: Iterable[Node], previous: list[str]) -> list[str]:
        """What an operation may read: linear ones x, hidden states and activations; the others no x, but all nodes."""
        names = [node.name for node in nodes if op != "linear" or node.op in self.ACTIVATIONS]
        return ["x", *previous, *names] if op == "linear" else [*previous, *names]

    def reached(self, nodes: Iterable[Node], names: list[str], through_time: bool = False) -> list[str]:
        """All that `names` depend on, in one step or, through the hidden states, over all steps."""
        inputs = {node.name: node.inputs for node in nodes}
        if through_time:
            inputs |= {name.replace("new", "prev"): (name,) for name in inputs if name.startswith("h_new")}
        found = list(names)
        for name in found:  # grows on the way
            found += [source for source in inputs.get(name, ()) if source not in found]
        return found

    def previous(self, arch: tuple[Node, ...]) -> list[str]:
        """The previous hidden states, one for each new one."""
        return [node.name.replace("new", "prev") for node in arch if node.name.startswith("h_new")]

    def valid(self, arch: tuple[Node, ...]) -> bool:
        """As the benchmark's generator has it: everything used, no new hidden state that reads a previous one."""
        new = [node for node in arch if node.name.startswith("h_new")]
        used = self.reached(arch, [node.name for node in new])
        reads_previous = any(source.startswith("h_prev") for node in new for source in node.inputs)
        return len(used) == 1 + len(new) + len(arch) and not reads_previous

    def in_order(self, arch: tuple[Node, ...]) -> list[Node]:
        nodes = {node.name: node for node in arch}
        order = TopologicalSorter({node.name: node.inputs for node in arch}).static_order()
        return [nodes[name] for name in order if name in nodes]

    def neighbour(self, arch: tuple[Node, ...], rng: random.Random) -> tuple[Node, ...]:
        """Another activation, a sum for a product or the reverse, or another input in one place."""
        previous, asked = self.previous(arch), self.valid(arch)  # of a foreign recipe no more is asked than it has
        for _ in range(TRIES):
            place = rng.randrange(len(arch))
            node = arch[place]
            kin = next((ops for ops in self.KIN if node.op in ops), ())
            if kin and (node.op in self.ACTIVATIONS or rng.random() < 0.5):
                node = node._replace(op=another(kin, node.op, rng))
            else:
                unread = [source for source in self.sources(node.op, arch, previous)
                          if source not in node.inputs and node.name not in self.reached(arch, [source])]  # no cycle
                if not unread:
                    continue
                node = node._replace(inputs=replaced(node.inputs, rng.randrange(len(node.inputs)), rng.choice(unread)))
            child = replaced(arch, place, node)
            if not asked or self.valid(child):
                return child
        raise ValueError(f"no neighbour was found of {self.format(arch)}")

    def graph(self, arch: tuple[Node, ...], whole: bool = False) -> Graph:
        """The nodes that reach the output over time (`whole`: all) as vertices. The operands of a blend, which are not
        alike, pass vertices of their own; a vertex "state" ties a new hidden state to the previous one."""
        used = self.reached(arch, ["h_new_0"], through_time=True)
        states = [i for i in range(len(self.previous(arch))) if whole or i == 0 or f"h_prev_{i}" in used]
        graph = [Vertex("input 0"), *(Vertex("input 2" if i else "input 1") for i in states)]  # x, h_prev_0, the others
        place = {"x": 0, **{f"h_prev_{i}": number for number, i in enumerate(states, start=1)}}
        for name, op, inputs in self.in_order(arch):
            if not whole and name not in used:
                continue
            sources = tuple(place[source] for source in inputs)
            if op == "blend":
                graph += [Vertex(f"blend {i}", (source,)) for i, source in enumerate(sources)]
                sources = tuple(range(len(graph) - 3, len(graph)))
            place[name] = len(graph)
            graph.append(Vertex(op, sources))
        first = len(graph)
        graph += [Vertex("state", (place[f"h_prev_{i}"], place[f"h_new_{i}"])) for i in states]
        graph.append(Vertex("output", tuple(range(first, len(graph)))))
        return tuple(graph) if whole else canonical(tuple(graph))

    def read(self, text: str) -> tuple[Node, ...]:
        """From a recipe, or a whole run log that has one."""
        recipe = json.loads(text)
        if "recepie" in recipe:  # the benchmark's own spelling
            recipe = json.loads(recipe["recepie"])
        arch = tuple(Node(name, node["op"], tuple(node["input"])) for name, node in recipe.items())
        names = {node.name for node in arch}
        new = sorted(name for name in names if name.startswith("h_new"))
        require(len(arch) <= self.MOST_NODES, not any(name == "x" or name.startswith("h_prev") for name in names))
        require(1 <= len(new) <= 3, new == [f"h_new_{i}" for i in range(len(new))])
        known = {"x", *self.previous(arch), *names}
        for _, op, inputs in arch:
            require(len(inputs) == len(set(inputs)), len(inputs) in self.ARITY[op], set(inputs) <= known)
            require(op == "linear" or "x" not in inputs)
        self.in_order(arch)  # a cycle is a ValueError
        return arch

    def format(self, arch: tuple[Node, ...]) -> str:
        return json.dumps({name: {"op": op, "input": list(inputs)} for name, op, inputs in arch})

    def build(self, arch: tuple[Node, ...], whole: bool = False) -> nn.Module:
        """`whole`: with the word embedding, whose weights the decoder shares."""
        widths = (400, 600, 600, 400) if whole else self.widths
        network = RecurrentNetwork(self.graph(arch, whole), widths, self.reservoir)
        if not whole:
            return network
        encoder, decoder = nn.Embedding(self.WORDS, 400), nn.Linear(400, self.WORDS)
        decoder.weight = encoder.weight
        return nn.ModuleList([encoder, network, decoder])


class RecurrentNetwork(nn.Module):
    """Layers with locked dropout, one mask over time, after each: .25 between layers, .1 at the end."""

    def __init__(self, graph: Graph, widths: tuple[int, ...], reservoir: bool = False):
        super().__init__()
        self.width = widths[0]
        self.layers = nn.ModuleList(RecurrentLayer(graph, c_in, hidden, reservoir) for c_in, hidden in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, widths[0]) -> (B, T, widths[-1])
        for layer in self.layers:
            x = layer(x)
            drop = 0.1 if layer is self.layers[-1] else 0.25
            x = x * F.dropout(torch.ones_like(x[:, :1]), drop, self.training)
        return x


class RecurrentLayer(nn.Module):
    """A recipe's graph run over a sequence, hidden states from zero. Weight drop .1 on all matrices but those of x,
    which are the only ones that are trained in a `reservoir`."""
    OPS: dict[str, Callable[..., Tensor | None]] = {
        "activation_tanh": torch.tanh, "activation_sigm": torch.sigmoid, "activation_leaky_relu": F.leaky_relu,
        "elementwise_sum": torch.add, "elementwise_prod": torch.mul,
        **dict.fromkeys(("blend 0", "blend 1", "blend 2"), lambda a: a), "state": lambda previous, new: None,
    }

    def __init__(self, graph: Graph, c_in: int, hidden: int, reservoir: bool = False):
        super().__init__()
        self.graph, self.hidden = graph, hidden
        self.weights, self.biases = nn.ParameterDict(), nn.ParameterDict()
        bound = 1 / math.sqrt(hidden)
        for i, (op, inputs) in enumerate(graph):
            if op == "linear":
                for j in inputs:
                    weight = torch.empty(hidden, hidden if j else c_in).uniform_(-bound, bound)
                    self.weights[f"{i} {j}"] = nn.Parameter(weight, requires_grad=not (j and reservoir))
                self.biases[str(i)] = nn.Parameter(torch.empty(hidden).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, c_in) -> (B, T, hidden)
        weights = {name: w if name.endswith(" 0") else F.dropout(w, 0.1, self.training)
                   for name, w in self.weights.items()}
        fixed = {}  # what linear vertices get from x and their bias, for all steps at once, (B, T, hidden)
        for i, (op, inputs) in enumerate(self.graph):
            if op == "linear":
                bias = self.biases[str(i)]
                fixed[i] = F.linear(x, weights[f"{i} 0"], bias) if 0 in inputs else bias.expand(*x.shape[:2], -1)
        states = sorted(vertex.inputs for vertex in self.graph if vertex.op == "state")  # (previous, new)
        hidden = [x.new_zeros(len(x), self.hidden) for _ in states]
        vertices = list(enumerate(self.graph))[1 + len(hidden):-1]
        outputs = []
        for t in range(x.shape[1]):
            values: list[Any] = [None, *hidden]
            for i, (op, inputs) in vertices:
                if op == "linear":
                    read = (F.linear(values[j], weights[f"{i} {j}"]) for j in inputs if j)
                    values.append(sum(read, start=fixed[i][:, t]))
                elif op == "blend":
                    a, b, c = (values[j] for j in sorted(inputs, key=lambda j: self.graph[j].op))
                    values.append(a * b + (1 - a) * c)
                else:
                    values.append(self.OPS[op](*(values[j] for j in inputs)))
            hidden = [values[new] for _, new in states]
            outputs.append(hidden[0])
        return torch.stack(outputs, 1)


# ------------------------------------------------------------------------------------------------- names and labels
SPACES: dict[str, Callable[..., SearchSpace]] = {
    "nb101": NB101, "nb201": NB201, "nbmacro": NBMacro, "nbnlp": NBNLP,
    **{kind + fix + end: partial(Cells, kind, fix == "-fix", end == "-in")
       for kind, fix, end in product(CELL_SPACES, ("", "-fix"), ("", "-in"))
       if not fix or kind in ("darts", "enas", "pnas")},
    **{kind + end: partial(Residual, kind, end == "-in") for kind, end in product(RESIDUAL_SPACES, ("", "-in"))},
}
METHODS = "random", "mutate", "build", "key", "parse", "format", "params"


def get(name: str, **sizes: int) -> Any:
    """The search space of a `--space` name, made with the `sizes` that its class takes; or one of your own,
    FILE.py:CLASS, made without. ValueError for an unknown name or a class that is not a search space."""
    if name in SPACES:
        return SPACES[name](**sizes)
    path, _, cls = name.rpartition(":")
    if not path.endswith(".py"):
        raise ValueError(f"unknown space {name!r}; expected one of {', '.join(SPACES)}, or FILE.py:CLASS")
    try:
        spec = importlib.util.spec_from_file_location("own_space", path)
        sys.modules["own_space"] = module = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        spec.loader.exec_module(module)
        space = getattr(module, cls)()
    except (Exception, SystemExit) as error:  # the file can raise anything, and call sys.exit
        raise ValueError(f"space {name}: {type(error).__name__}: {error}; expected the file and the name of a "
                         "class") from None
    absent = [method for method in METHODS if not hasattr(space, method)]
    if absent:
        raise ValueError(f"space {name}: has no {', '.join(absent)}; expected a class with {', '.join(METHODS)}")
    return space


def load_labels(space: Any, path: str | Path) -> list[tuple[Any, float]]:
    """The recorded values of architectures, [(arch, value)], higher = better, in file order.

    From a JSON list of [arch, value], an arch in any spelling that `space.parse` reads, as text or as JSON; from an NDS
    file, a list of records or {"top": records, "mid": records}, value = 100 - last test error; or from a folder of
    NAS-Bench-NLP run logs, sorted by name, value = - lowest validation loss, failed runs left out with a warning.
    ValueError for anything else or another space's architectures, OSError for a file that is not there.
    """
    path, failed, labels = Path(path), 0, []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"labels {file}: not JSON ({error})") from None
        match content:
            case {"recepie": _}:
                content = [content]
            case {"top": [*top], "mid": [*mid]}:
                content = top + mid
        for number, record in enumerate(content if isinstance(content, list) else [content]):
            match record:
                case [arch, value] if is_finite(value):
                    pass
                case {"net": arch, "test_ep_top1": [*_, error]} if is_finite(error):
                    value = 100 - error
                case {"recepie": arch, "status": status, "val_losses": [*losses]}:
                    if status != "OK" or not any(map(is_finite, losses)):
                        failed += 1
                        continue
                    value = -min(filter(is_finite, losses))
                case _:
                    raise ValueError(f"labels {file}, entry {number}: expected [architecture, number], an NDS record "
                                     f"or a NAS-Bench-NLP run log, not {json.dumps(record)[:80]}")
            try:
                labels.append((space.parse(arch if isinstance(arch, str) else json.dumps(arch)), float(value)))
            except ValueError as error:
                raise ValueError(f"labels {file}, entry {number}: {error}") from None
    if failed and labels:
        with suppress(OSError):  # a full disk under stderr ends no run
            print(f"labels {path}: {failed} of {failed + len(labels)} runs failed and are left out", file=sys.stderr)
    if not labels:
        raise ValueError(f"labels {path}: no entry that counts; expected a JSON list of [architecture, value], an NDS "
                         "file, or a folder of run logs")
    return labels
