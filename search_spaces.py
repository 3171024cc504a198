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

An arch is a plain immutable value, `rng` a `random.Random`. Text enters by `parse` alone, with a ValueError that names
what is wrong in it; the other methods take an arch that `parse`, `random` or `mutate` gave, and check nothing.
The file needs torch only and can be copied alone.
"""
from __future__ import annotations

import ast
import importlib.util
import json
import math
import random
import re
import sys
from functools import lru_cache, partial
from graphlib import TopologicalSorter
from itertools import accumulate, pairwise, product, repeat
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


# ----------------------------------------------------------------------------------------- computation graphs
class Vertex(NamedTuple):
    """A vertex of a computation graph: an operation on the sum of the vertices at `inputs`, earlier in the list."""
    op: str
    inputs: tuple[int, ...] = ()


Graph = tuple[Vertex, ...]  # in topological order: the inputs, called "input ...", come first, the output last


def live(graph: Iterable[Vertex]) -> Graph:
    """Return the graph without the vertices that do not reach its output; the inputs stay."""
    graph = tuple(graph)
    reached = {i for i, vertex in enumerate(graph) if vertex.op.startswith("input")} | {len(graph) - 1}
    for i in reversed(range(len(graph))):
        if i in reached:
            reached.update(graph[i].inputs)
    place = {old: new for new, old in enumerate(sorted(reached))}
    return tuple(Vertex(graph[i].op, tuple(place[j] for j in graph[i].inputs)) for i in place)


def spell(graph: Graph) -> str:
    """Return the graph as text, for keys."""
    return ";".join(f"{op}({','.join(map(str, inputs))})" for op, inputs in graph)


def run_graph(graph: Graph, ops: Iterable[nn.Module], maps: list[Tensor]) -> list[Tensor]:
    """Run `ops` on the vertices after the inputs, whose maps are `maps`. Return the maps of all vertices, in order."""
    sums: dict[tuple[int, ...], Tensor] = {}  # what several vertices read is summed once
    for (_, inputs), op in zip(graph[len(maps):], ops):
        if inputs not in sums:
            sums[inputs] = sum((maps[i] for i in inputs[1:]), start=maps[inputs[0]])
        maps.append(op(sums[inputs]))
    return maps


# ------------------------------------------------------------------------------------------------- operations
def conv(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, dilation: int = 1) -> nn.Conv2d:
    """Make a convolution without bias, padded so that only the stride changes the size of the map."""
    return nn.Conv2d(c_in, c_out, kernel, stride, dilation * (kernel - 1) // 2, dilation, groups, bias=False)


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(c_in, c_out, kernel, stride, groups), nn.BatchNorm2d(c_out))


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return conv_bn(c_in, c_out, kernel, stride, groups).append(nn.ReLU())


def relu_conv_bn(*convs: nn.Conv2d, **norm: bool) -> nn.Sequential:
    """Put convolutions between a ReLU and a batch norm. `norm` has options of the batch norm."""
    return nn.Sequential(nn.ReLU(), *convs, nn.BatchNorm2d(convs[-1].out_channels, **norm))


class Sum(nn.Sequential):
    """The sum of two branches on the same input."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x) + self[1](x)


class FactorizedReduce(nn.Module):
    """Halve a map without skipping every other position: two strided 1x1 convolutions, the second one pixel further."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.halves = nn.ModuleList(conv(c_in, c_out // 2, 1, stride=2) for _ in range(2))
        self.bn = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:  # (B, c_in, H, W) -> (B, c_out, H/2, W/2)
        x = F.relu(x)
        return self.bn(torch.cat([self.halves[0](x), self.halves[1](x[:, :, 1:, 1:])], 1))


def separable(kernel: int, dilation: int = 1, times: int = 2) -> Callable:
    return lambda c, stride: nn.Sequential(*[relu_conv_bn(conv(c, c, kernel, step, c, dilation), conv(c, c, 1))
                                             for step in (stride, 1)[:times]])


def factorized(k: int) -> Callable:
    return lambda c, stride: relu_conv_bn(nn.Conv2d(c, c, (1, k), (1, stride), (0, k // 2), bias=False),
                                         nn.Conv2d(c, c, (k, 1), (stride, 1), (k // 2, 0), bias=False))


OPS: dict[str, Callable[[int, int], nn.Module]] = {  # name -> constructor(channels, stride)
    **dict.fromkeys(("node", "output"), lambda c, stride: nn.Identity()),  # a sum and nothing else
    "none": lambda c, stride: nn.Sequential(nn.AvgPool2d(1, stride), nn.Threshold(math.inf, 0)),  # zero
    "skip_connect": lambda c, stride: nn.Identity() if stride == 1 else FactorizedReduce(c, c),
    "avg_pool_3x3": lambda c, stride: nn.AvgPool2d(3, stride, padding=1, count_include_pad=False),
    **dict.fromkeys(("max_pool_3x3", "maxpool3x3"), lambda c, stride: nn.MaxPool2d(3, stride, 1)),
    "max_pool_5x5": lambda c, stride: nn.MaxPool2d(5, stride, 2),
    "max_pool_7x7": lambda c, stride: nn.MaxPool2d(7, stride, 3),
    "conv1x1-bn-relu": lambda c, stride: conv_bn_relu(c, c, 1, stride),
    "conv3x3-bn-relu": lambda c, stride: conv_bn_relu(c, c, 3, stride),
    "conv_1x1": lambda c, stride: relu_conv_bn(conv(c, c, 1, stride)),
    "conv_3x3": lambda c, stride: relu_conv_bn(conv(c, c, 3, stride)),
    "conv_3x1_1x3": factorized(3), "conv_7x1_1x7": factorized(7),
    "sep_conv_3x3": separable(3), "sep_conv_5x5": separable(5), "sep_conv_7x7": separable(7),
    "dil_conv_3x3": separable(3, dilation=2, times=1), "dil_conv_5x5": separable(5, dilation=2, times=1),
    "dil_sep_conv_3x3": separable(3, dilation=2),
}


# -------------------------------------------------------------------------------------- what all spaces share
class SearchSpace:
    """The base class of all spaces. It has `mutate`, `parse`, `params` and `flops`. A subclass has

    neighbour(arch, rng) -> arch    a valid arch that is one random choice away, or `arch` itself; the key may be equal
    graph(arch) -> Graph            the canonical graph without dead operations, for `key`; or its own `key`
    read(text) -> arch              like `parse`, but its ValueError names only what is wrong
    build(arch, whole=False)        with `whole` the benchmark's own network, with dead operations and classifier
    """
    name: str
    task: str  # the task that the authors used for this space; for nbmacro, which they did not use, a choice made here
    spelling: str  # what `parse` reads, in words
    side = 32  # of the images of the benchmark
    labels: list[tuple[Any, float]] | None = None  # recorded values that come with the code, higher = better

    def parse(self, text: str) -> Any:
        try:
            return self.read(text.strip().strip("\"'"))
        except KeyError as error:
            wrong = f"no {error}"
        except ValueError as error:
            wrong = str(error)
        except (AttributeError, IndexError, TypeError):  # nothing like an architecture
            wrong = repr(text.strip()[:60])
        raise ValueError(f"not a network of {self.name}: {wrong}; expected {self.spelling}")

    def mutate(self, arch: Any, rng: random.Random, tries: int = 1000) -> Any:
        key = self.key(arch)
        for child in (self.neighbour(arch, rng) for _ in range(tries)):
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
        """Return the operations for one image, a multiply-add being two. FlopCounterMode agrees, but takes longer."""
        with torch.device("meta"):
            network, counts = self.build(arch, whole=True).eval(), []
        for layer in network.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.register_forward_hook(lambda op, _, y: counts.append(op.weight.numel() * y.shape[2:].numel()))
        tensors = {name: torch.empty(x.shape, device="cpu") for name, x in network.state_dict().items()}
        with torch.no_grad():  # of a batch without images, only the shapes are computed
            torch.func.functional_call(network, tensors, torch.empty(0, 3, self.side, self.side, device="cpu"))
        return 2 * sum(counts)


class Stages(nn.Sequential):
    """Stages one after the other, each a sequence of blocks. The taps are the outputs of the last three stages. With
    `all_blocks`, a tap is the concatenation of the outputs of all blocks of its stage."""

    def __init__(self, *stages: nn.Module, all_blocks: bool = False):
        super().__init__(*stages)
        self.all_blocks = all_blocks

    def forward(self, x: Tensor) -> list[Tensor]:
        taps = []
        for stage in self:
            maps = [x := block(x) for block in (stage if self.all_blocks else [stage])]
            taps.append(torch.cat(maps, 1) if self.all_blocks else x)
        return taps[-3:]


class Classifier(nn.Sequential):
    """The benchmark's network: the last tap, `tail`, global average, a linear layer."""

    def __init__(self, body: nn.Module, width: int, classes: int = 10, tail: Iterable[nn.Module] = ()):
        body.all_blocks = False  # this is for heads
        super().__init__(body, *tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        body, *tail = self
        return nn.Sequential(*tail)(body(x)[-1])


def normal_init(module: nn.Module) -> None:
    """Draw a convolution normal with variance 2 / (k k out), as in NAS-Bench-101 and the NDS residual networks."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def replaced(values: tuple, place: int, value: Any) -> tuple:
    return *values[:place], value, *values[place + 1:]


def another(values: Iterable, value: Any, rng: random.Random) -> Any:
    return rng.choice([v for v in values if v != value])


def require(condition: bool, wrong: str, *expected: Any) -> None:
    """Raise ValueError unless the condition holds. The message tells what is wrong and what is expected."""
    if not condition:
        raise ValueError(wrong + f", expected one of {', '.join(map(str, expected))}" * bool(expected))


def require_end(text: str) -> None:
    require(not text.strip(), f"text after the architecture: {text.strip()!r:.60}")


def literal(text: str) -> Any:
    """Return the value of a text in JSON or Python. ValueError if it is neither, or goes on after its bracket."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    end = next((i for i, (c, depth) in enumerate(zip(text, depths), 1) if c in ")]}" and depth == 0), 0)
    require(end > 0, f"no closing bracket after {text[-40:]!r}")
    require_end(text[end:])
    try:
        return json.loads(text[:end])
    except ValueError:
        try:
            return value_of(ast.parse(text[:end], mode="eval").body)
        except SyntaxError as error:
            raise ValueError(f"neither JSON nor Python: {error.text[error.offset - 1:]!r:.60}") from None


def value_of(node: ast.expr) -> Any:
    """Return the value of a Python literal, which may contain range, list, tuple, array, and Genotype (as a dict)."""
    match node:
        case ast.Constant(value):
            return value
        case ast.List(items) | ast.Tuple(items):
            return [value_of(item) for item in items]
        case ast.Dict(keys, values):
            return dict(zip(map(value_of, keys), map(value_of, values)))
        case ast.Call(ast.Name("range"), ends):
            return [*range(*map(value_of, ends))]
        case ast.Call(ast.Name("list" | "tuple" | "array") | ast.Attribute(ast.Name("np")), [value]):
            return value_of(value)  # np.int64(0), np.str_('none'), np.array(...): as NumPy prints them
        case ast.Call(ast.Name("Genotype"), values, words):
            fields = dict(zip(Genotype._fields, values)) | {word.arg: word.value for word in words}
            return {name: value_of(value) for name, value in fields.items()}
    raise ValueError(f"neither JSON nor Python: {ast.unparse(node)!r:.60}")


# ---------------------------------------------------------------------------------------------- NAS-Bench-201
class NB201(SearchSpace):
    """NAS-Bench-201 (Dong and Yang, ICLR 2020): 15,625 cells of 4 nodes. An arch is the operations on a cell's EDGES.
    A stem, three stages of five cells; between stages a residual block halves the map and doubles the channels."""
    name, task = "nb201", "nb101"
    OPS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # numbered as in the authors' files
    NAMES, NUMBERS = "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|", "[[{}],[{},{}],[{},{},{}]]"  # the two spellings
    spelling = f"{NAMES} or {NUMBERS}, each {{}} one of {', '.join(OPS)} or its number 0 to 4"
    EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))

    # Recorded test accuracies on CIFAR-10, in %. 600 random cells were sorted by accuracy, and the 16th and every 30th
    # after it were taken; the first, third, ... of these are listed first. A cell is the numbers of its operations.
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
        """Return the canonical graph. Dead operations are left out, and a skip is replaced by what it passes on. With
        `whole`, every operation of the cell stays, in order."""
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
        text = "".join(text.split())
        named = "|" in text  # a log may have words before the cell
        pattern = "[^|]*" * named + re.escape(self.NAMES if named else self.NUMBERS).replace(r"\{\}", r"(\w+)")
        ops, found = dict(zip(self.OPS if named else "01234", self.OPS)), re.match(pattern, text)
        for op in found.groups():
            require(op in ops, f"op {op!r}")
        require_end(text[found.end():].lstrip(")]") if named else text[found.end():])
        return tuple(ops[op] for op in found.groups())

    def format(self, arch: tuple[str, ...]) -> str:
        return self.NAMES.format(*arch)

    def build(self, arch: tuple[str, ...], whole: bool = False) -> nn.Module:
        """Build the network. Unless `whole`, the batch norms of cells have no parameters and no running statistics, as
        in GenNAS's code."""
        graph = self.graph(arch, whole)
        width, cells = (16, 5) if whole else (self.width, self.cells)
        if not graph[-1].inputs:
            return Nothing(width)
        norm = {} if whole else {"affine": False, "track_running_stats": False}
        entries = [conv_bn(3, width, 3)]
        for c in (width, 2 * width):
            body = nn.Sequential(relu_conv_bn(conv(c, 2 * c, 3, stride=2)), relu_conv_bn(conv(2 * c, 2 * c, 3)))
            entries.append(Sum(body, nn.Sequential(nn.AvgPool2d(2), conv(c, 2 * c, 1))))
        network = Stages(all_blocks=self.all_blocks)
        for entry, c in zip(entries, (width, 2 * width, 4 * width)):
            first, *others = (NB201Cell(graph, c, norm) for _ in range(cells))
            network.append(nn.Sequential(nn.Sequential(entry, first), *others))
        return Classifier(network, 4 * width, tail=(nn.BatchNorm2d(4 * width), nn.ReLU())) if whole else network


class NB201Cell(nn.Module):
    """A NAS-Bench-201 cell: a module for each vertex of its graph."""

    def __init__(self, graph: Graph, width: int, norm: dict[str, bool]):
        super().__init__()
        self.graph = graph
        self.ops = nn.ModuleList(
            relu_conv_bn(conv(width, width, int(op[-1])), **norm) if "conv" in op else OPS[op](width, 1)
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


# ---------------------------------------------------------------------------------------------- NAS-Bench-101
class NB101Cell(NamedTuple):
    matrix: tuple[tuple[int, ...], ...]  # upper-triangular adjacency
    ops: tuple[str, ...]  # of all vertices, the first "input", the last "output"


class NB101(SearchSpace):
    """NAS-Bench-101 (Ying et al., ICML 2019): 423,624 cells of up to 7 vertices with operations and 9 edges. A stem and
    three stacks of three cells; between stacks a max-pool halves the map and the channels double."""
    name = task = "nb101"
    OPS = "conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"
    VERTICES, MOST_EDGES = 7, 9
    spelling = f"[matrix, ops], an upper-triangular 0/1 matrix of 2 to 7 vertices; ops input, {', '.join(OPS)}, output"

    def __init__(self, width: int = 16, cells: int = 3, all_blocks: bool = False):
        self.width, self.cells, self.all_blocks = width, cells, all_blocks

    def random(self, rng: random.Random) -> NB101Cell:
        n = self.VERTICES
        while True:
            matrix = tuple(tuple(rng.randint(0, 1) if j > i else 0 for j in range(n)) for i in range(n))
            arch = NB101Cell(matrix, ("input", *(rng.choice(self.OPS) for _ in range(n - 2)), "output"))
            if 0 < self.edges(arch) <= self.MOST_EDGES:
                return arch

    def neighbour(self, arch: NB101Cell, rng: random.Random) -> NB101Cell:
        """Flip each possible edge of 7 vertices with chance 1/7, change each operation with chance 1/5."""
        n, missing = self.VERTICES, self.VERTICES - len(arch.ops)
        old_ops = *arch.ops[1:-1], *(rng.choice(self.OPS) for _ in range(missing))  # isolated
        rows = [[*row[:-1], *[0] * missing, row[-1]] for row in arch.matrix]
        rows[-1:-1] = [[0] * n] * missing
        matrix = tuple(tuple(rows[i][j] ^ (j > i and rng.random() < 1 / n) for j in range(n)) for i in range(n))
        ops = (another(self.OPS, op, rng) if rng.random() < 1 / 5 else op for op in old_ops)
        child = NB101Cell(matrix, ("input", *ops, "output"))
        return child if 0 < self.edges(child) <= self.MOST_EDGES else arch

    def edges(self, arch: NB101Cell) -> int:
        """Return the number of edges on paths from the input to the output."""
        return sum(len(vertex.inputs) for vertex in self.graph(arch, whole=True))

    def graph(self, arch: NB101Cell, whole: bool = False) -> Graph:
        """Return the vertices between input and output, in canonical order (`whole`: in the order given)."""
        graph, place = [Vertex("input")], {0: 0}
        for j, op in enumerate(arch.ops[1:], start=1):
            inputs = tuple(place[i] for i in range(j) if arch.matrix[i][j] and i in place)
            if inputs or op == "output":
                place[j] = len(graph)
                graph.append(Vertex(op, inputs))
        return live(graph) if whole else canonical(live(graph))

    def read(self, text: str) -> NB101Cell:
        match literal(text):
            case ([matrix, ops] | {"matrix": matrix, "ops": ops}
                  | {"module_adjacency": matrix, "module_operations": ops}):
                n = len(ops)
            case _:
                raise TypeError
        require(2 <= n <= self.VERTICES, f"{n} vertices, expected 2 to {self.VERTICES}")
        require([len(row) for row in matrix] == [n] * n, f"matrix of {len(matrix)} rows, expected {n} x {n} as of ops")
        require((ops[0], ops[-1]) == ("input", "output"), f"ops from {ops[0]!r} to {ops[-1]!r}")
        for op in ops[1:-1]:
            require(op in self.OPS, f"op {op!r}")
        for (i, row), j in product(enumerate(matrix), range(n)):
            allowed = (0, 1) if j > i else (0,)
            require(row[j] in allowed, f"value {row[j]!r} in row {i}, column {j}", *allowed)
        arch = NB101Cell(tuple(tuple(map(int, row)) for row in matrix), tuple(ops))
        edges = self.edges(arch)
        require(0 < edges, "no path from the first vertex to the last")
        require(edges <= self.MOST_EDGES, f"{edges} edges, at most {self.MOST_EDGES}")
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
    """A NAS-Bench-101 cell. Each edge from the input has its own 1x1 convolution. The output concatenates the vertices
    that it reads, so its channels are divided among them, and the first ones get one more each if there is a remainder.
    Any other vertex is as wide as the widest vertex that reads it."""

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


# -------------------------------------------------------------------------------------------- NAS-Bench-Macro
class NBMacro(SearchSpace):
    """NAS-Bench-Macro (Su et al., CVPR 2021): 6,561 networks of 8 layers. An arch is their digits: 0 identity, 1 and 2
    inverted residuals. The stages have 2, 3 and 3 layers; the first layer of each doubles the channels and halves the
    map (unless `whole`, not in the first stage)."""
    name, task = "nbmacro", "combo"
    STAGES = (0, 2), (2, 5), (5, 8)
    spelling = "8 digits, each 0, 1 or 2, or a list of them"
    BLOCKS = {"1": (3, 3), "2": (5, 6)}  # kernel, expansion

    def __init__(self, width: int = 32, all_blocks: bool = False):
        self.width, self.all_blocks = width, all_blocks  # width of the stem

    def random(self, rng: random.Random) -> str:
        return "".join(rng.choice("012") for _ in range(8))

    def neighbour(self, arch: str, rng: random.Random) -> str:
        layer = rng.randrange(8)
        return arch[:layer] + another("012", arch[layer], rng) + arch[layer + 1:]

    def key(self, arch: str) -> str:
        """Leave out identities, except at the start of a stage, where they change the shape."""
        return " ".join(arch[start] + arch[start + 1:end].replace("0", "") for start, end in self.STAGES)

    def read(self, text: str) -> str:
        digits, rest = re.fullmatch(r"(\d*)(.*)", text, re.S).groups()
        if text.startswith("["):
            digits, rest = [*map(str, literal(text))], ""
        for digit in digits:
            require(digit in ("0", "1", "2"), f"digit {digit!r}")
        require(len(digits) == 8, f"{len(digits)} digits, expected 8")
        require_end(rest)
        return "".join(digits)

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


# --------------------------------------------------------- NDS cell spaces: DARTS, ENAS, PNAS, NASNet, Amoeba
class Genotype(NamedTuple):
    """Two cells, as in the code of DARTS; it prints as the Python code that rebuilds it. Inputs 0 and 1 are the two
    previous cells, and the nodes are numbered from 2. The first node is the sum of the first two (operation, input) of
    its cell's list, the second node that of the next two, and so on."""
    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


class CellNet(NamedTuple):
    genotype: Genotype
    width: int
    depth: int


class Cells(SearchSpace):
    """The cell spaces of NDS (Radosavovic et al., ICCV 2019), CIFAR or ImageNet (`-in`), width and depth free or fixed.
    The network to regress with has 1/`shrink` of the channels."""
    task = "darts"
    COMMON = ("skip_connect", "avg_pool_3x3", "max_pool_3x3", "sep_conv_3x3", "sep_conv_5x5")
    KINDS = {  # number of nodes; whether the output has only the nodes that feed no other node; the operations
        "darts": (4, False, ("none", *COMMON, "dil_conv_3x3", "dil_conv_5x5")),
        "enas": (5, True, COMMON),
        "pnas": (5, False, (*COMMON, "sep_conv_7x7", "dil_conv_3x3", "conv_7x1_1x7")),
        "nasnet": (5, True, (*COMMON, "sep_conv_7x7", "max_pool_5x5", "max_pool_7x7", "conv_1x1", "conv_3x3",
                             "conv_3x1_1x3", "conv_7x1_1x7", "dil_conv_3x3")),
        "amoeba": (5, True, (*COMMON, "sep_conv_7x7", "dil_sep_conv_3x3", "conv_7x1_1x7")),
    }
    MACRO = {  # imagenet -> widths, depths, fixed width and depth; the fixed CIFAR ones are a choice made here
        False: ((16, 24, 32), (4, 8, 12, 16, 20), (16, 20)),
        True: ((32, 48, 64, 80, 96), (6, 10, 14, 18, 22), (32, 22)),
    }

    def __init__(self, cells: str, fixed: bool = False, imagenet: bool = False, shrink: int = 1,
                 all_blocks: bool = False):
        self.name, self.shrink, self.all_blocks = cells + "-fix" * fixed + "-in" * imagenet, shrink, all_blocks
        self.nodes, self.loose_ends, self.ops = self.KINDS[cells]
        self.fixed, self.imagenet, self.side = fixed, imagenet, 224 if imagenet else 32
        self.widths, self.depths, self.default = self.MACRO[imagenet]
        if fixed:
            self.widths, self.depths = self.default[:1], self.default[1:]
        self.spelling = ("an NDS net dict or Genotype(normal=..., normal_concat=..., reduce=..., reduce_concat=...), "
                         f"{self.nodes} nodes of two (op, input), ops {', '.join(self.ops)}")

    def random(self, rng: random.Random) -> CellNet:
        normal, reduce = (tuple((rng.choice(self.ops), rng.randrange(2 + i // 2)) for i in range(2 * self.nodes))
                          for _ in range(2))
        return CellNet(self.genotype(normal, reduce), rng.choice(self.widths), rng.choice(self.depths))

    def genotype(self, *cells: tuple) -> Genotype:
        fields: list[tuple] = []
        for pairs in cells:
            fed = {source for _, source in pairs} if self.loose_ends else ()
            fields += pairs, tuple(node for node in range(2, 2 + self.nodes) if node not in fed)
        return Genotype(*fields)

    def neighbour(self, arch: CellNet, rng: random.Random) -> CellNet:
        """Change one operation, one input, the width or the depth."""
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
        """Return the canonical graphs of the normal and of the reduction cell. A skip is replaced by what it passes on,
        unless it has stride 2; a node without inputs reads a zero. With `whole`, every operation stays, in order."""
        graphs = []
        for reduction, (pairs, concat) in enumerate((arch.genotype[:2], arch.genotype[2:])):
            graph = [Vertex("input 0"), Vertex("input 1")]
            nodes: list[tuple[int, ...]] = [(0,), (1,)]  # the vertices whose sum a node is
            for i in range(0, len(pairs), 2):
                nodes.append(())
                summed = [(op, source) for op, source in pairs[i:i + 2] if whole or op != "none"]
                for op, source in summed or [("none", 0)]:
                    if op == "skip_connect" and not whole and not (reduction and source < 2):
                        nodes[-1] += nodes[source]
                    else:
                        nodes[-1] += (len(graph),)
                        graph.append(Vertex(op, nodes[source]))
            first = len(graph)
            graph += [Vertex("node", nodes[j]) for j in concat]
            graph.append(Vertex("concat", tuple(range(first, len(graph)))))
            graphs.append(tuple(graph) if whole else canonical(live(graph)))
        return graphs

    def key(self, arch: CellNet) -> str:
        return "|".join([*map(spell, self.graphs(arch)), str(arch.width), str(arch.depth)])

    def read(self, text: str) -> CellNet:
        """Read an NDS net dict, or a text that ends in Genotype(...), which gets the fixed width and depth."""
        net = literal(text[max(text.find("Genotype("), 0):])
        if "Genotype(" in text:
            net = {"genotype": net, **dict(zip(("width", "depth"), self.default))}
        genotype, width, depth = net["genotype"], net["width"], net["depth"]
        require(width in self.widths, f"width {width!r}", *self.widths)
        require(depth in self.depths, f"depth {depth!r}", *self.depths)
        cells = [self.read_pairs(name, genotype[name]) for name in ("normal", "reduce")]
        arch = CellNet(self.genotype(*cells), int(width), int(depth))
        for name in ("normal_concat", "reduce_concat"):
            concat = [*getattr(arch.genotype, name)]
            require(sorted(genotype[name]) == concat, f"{name} {genotype[name]}, expected {concat}")
        return arch

    def read_pairs(self, name: str, pairs: list) -> tuple[tuple[str, int], ...]:
        if pairs and not isinstance(pairs[0][0], str):  # a list for each node
            pairs = [pair for node in pairs for pair in node]
        require(len(pairs) == 2 * self.nodes, f"{len(pairs)} (op, input) in {name}, expected {2 * self.nodes}")
        for i, (op, source) in enumerate(pairs):
            require(op in self.ops, f"op {op!r} in {name}")
            node = 2 + i // 2
            require(source in range(node), f"input {source!r} of node {node} in {name}", *range(node))
        return tuple((op, int(source)) for op, source in pairs)

    def format(self, arch: CellNet) -> str:
        return str(arch.genotype) if self.fixed else json.dumps(arch._asdict() | {"genotype": arch.genotype._asdict()})

    def build(self, arch: CellNet, whole: bool = False) -> nn.Module:
        width = arch.width if whole else arch.width // self.shrink
        network = CellNetwork(self.graphs(arch, whole), width, arch.depth, self.imagenet, self.all_blocks, whole)
        return Classifier(network, network.out_width, 1000 if self.imagenet else 10) if whole else network


class CellNetwork(nn.Module):
    """A chain of cells; each reads the outputs of the two before it. The cells at a third and two thirds of the depth
    are reduction cells, which halve the map and double the width. The taps are the maps before these two and at the
    end. Unless `whole`, an ImageNet stem has stride 1."""

    def __init__(self, graphs: list[Graph], width: int, depth: int, imagenet: bool, all_blocks: bool, whole: bool):
        super().__init__()
        self.all_blocks = all_blocks
        stride = 2 if whole else 1
        if imagenet:
            first = nn.Sequential(conv_bn_relu(3, width // 2, 3, stride), conv_bn(width // 2, width, 3, stride))
            self.stem = nn.ModuleList([first, relu_conv_bn(conv(width, width, 3, stride))])
        else:
            self.stem = nn.ModuleList([conv_bn(3, 3 * width, 3), nn.Identity()])

        reductions = depth // 3, 2 * depth // 3
        self.taps = *(i - 1 for i in reductions), depth - 1
        self.alive = set(self.taps)  # the cells that reach a tap; the outputs of the others are in no tap
        for i in reversed(range(depth)):
            if i in self.alive:
                graph = graphs[i in reductions]
                self.alive |= {i - 2 + j for op, inputs in graph if op != "none" for j in inputs if j < 2}

        self.cells = nn.ModuleList()
        c_prev_prev = c_prev = width if imagenet else 3 * width
        reduction_prev = imagenet and whole
        for i in range(depth):
            reduction = i in reductions
            width *= 1 + reduction
            self.cells.append(TwoInputCell(graphs[reduction], c_prev_prev, c_prev, width, reduction_prev, reduction))
            c_prev_prev, c_prev, reduction_prev = c_prev, width * len(graphs[reduction][-1].inputs), reduction
        self.out_width = c_prev

    def forward(self, x: Tensor) -> list[Tensor]:  # (B, 3, H, W) -> three taps
        before = self.stem[0](x)
        last = self.stem[1](before)
        taps, maps = [], []
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            if i in self.alive:
                maps.append(last)
            if i in self.taps:
                taps.append(torch.cat(maps, 1) if self.all_blocks else last)
                maps = []
        return taps


class TwoInputCell(nn.Module):
    """A cell: both inputs are brought to its width and pass its graph, which ends in a concatenation of nodes."""

    def __init__(self, graph: Graph, c_prev_prev: int, c_prev: int, width: int, reduction_prev: bool, reduction: bool):
        super().__init__()
        self.graph = graph
        before = FactorizedReduce(c_prev_prev, width) if reduction_prev else relu_conv_bn(conv(c_prev_prev, width, 1))
        self.preprocess = nn.ModuleList([before, relu_conv_bn(conv(c_prev, width, 1))])
        self.ops = nn.ModuleList(OPS[op](width, 1 + (reduction and max(inputs) < 2)) for op, inputs in graph[2:-1])

    def forward(self, before: Tensor, last: Tensor) -> Tensor:  # -> (B, nodes * width, H, W)
        maps = run_graph(self.graph, self.ops, [self.preprocess[0](before), self.preprocess[1](last)])
        return torch.cat([maps[j] for j in self.graph[-1].inputs], 1)


# -------------------------------------------------------------- NDS residual spaces: ResNet, ResNeXt-A and -B
class ResidualNet(NamedTuple):
    """An NDS net dict, one entry a stage; the first entry of each list is the stem's."""
    block_type: str
    ds: tuple[int, ...]  # numbers of blocks; the stem's entry is not used
    ws: tuple[int, ...]  # widths
    ss: tuple[int, ...]  # strides
    bot_muls: tuple[float, ...] = ()  # bottleneck width / width, for bottleneck blocks; the stem's is not used
    num_gs: tuple[int, ...] = ()  # groups of the 3x3 convolution, for bottleneck blocks; the stem's is not used


class Residual(SearchSpace):
    """The residual spaces of NDS (Radosavovic et al., ICCV 2019), CIFAR or ImageNet (`-in`). The blocks of the network
    to regress with have 1/`shrink` of the channels, but at least one for each of their groups."""
    task = "resnet"
    KINDS = {  # field of the net dict -> its values
        "resnet": {"ds": tuple(range(1, 25)), "ws": tuple(range(16, 257, 8))},
        "resnext-a": {"ds": (1, 2, 4, 8, 16), "ws": (16, 32, 64, 128, 256), "bot_muls": (.25, .5, 1.0),
                      "num_gs": (1, 2, 4)},
        "resnext-b": {"ds": (1, 2, 4, 8, 16), "ws": (64, 128, 256, 512, 1024), "bot_muls": (.25, .5, 1.0),
                      "num_gs": (1, 2, 4, 8, 16)},
    }
    STEMS: dict[int, Callable[[int, int], list[nn.Module]]] = {
        # total stride of the stem -> its layers, given the width and the stride of each layer that has one
        1: lambda w, stride: [conv_bn_relu(3, w, 3)],
        4: lambda w, stride: [conv_bn_relu(3, w, 7, stride), nn.MaxPool2d(3, stride, 1)],
        8: lambda w, stride: [conv_bn_relu(c_in, c, 3, stride) for c_in, c in ((3, w // 2), (w // 2, w), (w, w))],
    }

    def __init__(self, kind: str, imagenet: bool = False, shrink: int = 1, all_blocks: bool = False):
        self.name, self.shrink, self.all_blocks = kind + "-in" * imagenet, shrink, all_blocks
        self.choices, self.bottleneck = self.KINDS[kind], kind != "resnet"
        self.classes, self.side = (1000, 224) if imagenet else (10, 32)
        self.blocks = ("res_bottleneck_block",) if self.bottleneck else ("res_basic_block", "double_plain_block")
        self.strides = (1, 1, 2, 2) if not imagenet else (8, 1, 2, 2) if self.bottleneck else (4, 1, 2, 2, 2)
        self.stem = {"ds": 1, "ws": 64 if imagenet and self.bottleneck else 16, "bot_muls": 1.0, "num_gs": 1}
        self.spelling = f"an NDS net dict of block_type, ss, {', '.join(self.choices)}, the first entries the stem's"

    def random(self, rng: random.Random) -> ResidualNet:
        """Draw uniformly, but ResNet's blocks and widths log-uniformly. The block type is always the first."""
        lists = {}
        for field, values in self.choices.items():
            weights = None if self.bottleneck else [1 / value for value in values]
            lists[field] = self.stem[field], *rng.choices(values, weights, k=len(self.strides) - 1)
        return ResidualNet(self.blocks[0], ss=self.strides, **lists)

    def neighbour(self, arch: ResidualNet, rng: random.Random) -> ResidualNet:
        """Change one value."""
        field = rng.choice([*self.choices])
        values = getattr(arch, field)
        stage = rng.randrange(1, len(values))
        return arch._replace(**{field: replaced(values, stage, another(self.choices[field], values[stage], rng))})

    def stages(self, arch: ResidualNet) -> list[tuple]:
        """Return for each stage: blocks, width, stride, bottleneck width, groups. The last two are 0 for ResNet."""
        stages = zip(arch.ds, arch.ws, arch.ss, arch.bot_muls or repeat(0), arch.num_gs or repeat(0))
        return [(d, w, s, round(w * m), g) for d, w, s, m, g in stages][1:]

    def key(self, arch: ResidualNet) -> str:
        return json.dumps([arch.block_type, arch.ws[0], arch.ss[0], self.stages(arch)])

    def read(self, text: str) -> ResidualNet:
        """Read an NDS net dict. It may have blocks and widths of ResNet that `random` does not draw."""
        net, lists = literal(text), {}
        require(net["block_type"] in self.blocks, f"block_type {net['block_type']!r}", *self.blocks)
        require([*net["ss"]] == [*self.strides], f"ss {net['ss']}, expected {[*self.strides]}")
        for field, values in self.choices.items():
            lists[field] = tuple(value if value % 1 else int(value) for value in net[field])
            count, stages = len(lists[field]), len(self.strides)
            require(count == stages, f"{count} {field}, expected {stages}")
            for stage, value in enumerate(lists[field]):
                if stage == 0 and field != "ws":  # not used
                    require(0 <= value < math.inf, f"{field} {value} of the stem, expected a number >= 0")
                else:  # a stem has at least 2 channels, as it may halve its width
                    allowed = values if stage and self.bottleneck else range(1 if stage else 2, max(values) + 1)
                    require(value in allowed, f"{field} {value} of stage {stage}, expected one of {allowed}")
        return ResidualNet(net["block_type"], ss=self.strides, **lists)

    def format(self, arch: ResidualNet) -> str:
        return json.dumps(arch._asdict())

    def build(self, arch: ResidualNet, whole: bool = False) -> nn.Module:
        """Build the network. A tap is taken before the ReLU that ends a stage, so this ReLU begins the next stage."""
        entry = self.STEMS[arch.ss[0]](arch.ws[0], 2 if whole else 1)  # ends in a ReLU or a pool of its own
        c_in, network = arch.ws[0], Stages(all_blocks=self.all_blocks)
        shrink = 1 if whole else self.shrink
        for blocks, c, stride, mid, groups in self.stages(arch):
            network.append(nn.Sequential())
            c, mid = c // shrink, groups and max(mid // shrink // groups, 1) * groups
            for _ in range(blocks):
                block = residual_block(arch.block_type, c_in, c, stride, mid, groups)
                network[-1].append(nn.Sequential(*entry, block))
                c_in, stride, entry = c, 1, [nn.ReLU()]
        return Classifier(network, c_in, self.classes, tail=[nn.ReLU()]) if whole else network.apply(normal_init)


def residual_block(kind: str, c_in: int, c: int, stride: int, mid: int, groups: int) -> nn.Module:
    """Make a block of the `block_type` kind, without the ReLU after it; `mid`: the bottleneck's width."""
    if kind == "res_bottleneck_block":
        body = nn.Sequential(conv_bn_relu(c_in, mid, 1), conv_bn_relu(mid, mid, 3, stride, groups), conv_bn(mid, c, 1))
    else:
        body = nn.Sequential(conv_bn_relu(c_in, c, 3, stride), conv_bn(c, c, 3))
    if kind == "double_plain_block":
        return body
    return Sum(body, nn.Identity() if stride == 1 and c_in == c else conv_bn(c_in, c, 1, stride))


# ---------------------------------------------------------------------------------------------- NAS-Bench-NLP
class Node(NamedTuple):
    name: str
    op: str
    inputs: tuple[str, ...]


class NBNLP(SearchSpace):
    """NAS-Bench-NLP (Klyuchnikov et al., IEEE Access 2022): recurrent cells. An arch is a recipe: nodes on x, on the
    previous hidden states h_prev_i and on other nodes. The nodes h_new_i become the next hidden states, and h_new_0 is
    the output. In a `reservoir` the recurrent matrices are not trained: in the authors' code, weight drop cuts their
    gradient."""
    name, task = "nbnlp", "nlp"
    ACTIVATIONS = "activation_tanh", "activation_sigm", "activation_leaky_relu"
    KIN = ACTIVATIONS, ("elementwise_sum", "elementwise_prod")  # a mutation exchanges them
    ARITY = {"linear": (2, 3), "blend": (3,), "elementwise_prod": (2,), "elementwise_sum": (2,),
             **dict.fromkeys(ACTIVATIONS, (1,))}
    WORDS = 10_000  # of the benchmark's vocabulary
    flops = None  # they depend on the length of the sequence
    spelling = ('the nodes {name: {"op": ..., "input": [...]}} over x and h_prev_i, up to h_new_i, ops '
                f"{', '.join(ARITY)}")

    def __init__(self, widths: tuple[int, ...] = (400, 600, 600, 400), reservoir: bool = False):
        self.widths, self.reservoir = widths, reservoir

    def random(self, rng: random.Random) -> tuple[Node, ...]:
        """Draw as the benchmark does: nodes that read earlier ones, some of which become the new hidden states. Draws
        that leave a node unused are repeated."""
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
        """Return what an operation may read: hidden states and nodes, but "linear" x, hidden states and activations."""
        names = [node.name for node in nodes if op != "linear" or node.op in self.ACTIVATIONS]
        return ["x", *previous, *names] if op == "linear" else [*previous, *names]

    def reached(self, nodes: Iterable[Node], names: list[str], through_time: bool = False) -> list[str]:
        """Return all that `names` depend on, in one step or, through the hidden states, over all steps."""
        inputs = {node.name: node.inputs for node in nodes}
        if through_time:
            inputs |= {name.replace("new", "prev"): (name,) for name in self.new(inputs)}
        found = list(names)
        for name in found:  # grows on the way
            found += [source for source in inputs.get(name, ()) if source not in found]
        return found

    def new(self, names: Iterable[str]) -> list[str]:
        """Return the names that are new hidden states. A name such as h_new_1_part1 is that of a plain node."""
        return [name for name in names if re.fullmatch(r"h_new_\d+", name)]

    def previous(self, arch: tuple[Node, ...]) -> list[str]:
        """Return the previous hidden states, one for each new one."""
        return [name.replace("new", "prev") for name in self.new(node.name for node in arch)]

    def valid(self, arch: tuple[Node, ...]) -> bool:
        """Return whether all nodes are used and no new hidden state reads a previous one, as the benchmark demands."""
        new, previous = self.new(node.name for node in arch), self.previous(arch)
        reads_previous = any(source in previous for node in arch if node.name in new for source in node.inputs)
        return len(self.reached(arch, new)) == 1 + len(new) + len(arch) and not reads_previous

    def in_order(self, arch: tuple[Node, ...]) -> list[Node]:
        nodes = {node.name: node for node in arch}
        order = TopologicalSorter({node.name: node.inputs for node in arch}).static_order()
        return [nodes[name] for name in order if name in nodes]

    def neighbour(self, arch: tuple[Node, ...], rng: random.Random) -> tuple[Node, ...]:
        """Change one activation or input, or a sum to a product or the reverse."""
        place = rng.randrange(len(arch))
        node = arch[place]
        kin = next((ops for ops in self.KIN if node.op in ops), ())
        if kin and (node.op in self.ACTIVATIONS or rng.random() < 0.5):
            node = node._replace(op=another(kin, node.op, rng))
        else:
            unread = [source for source in self.sources(node.op, arch, self.previous(arch))
                      if source not in node.inputs and node.name not in self.reached(arch, [source])]  # no cycle
            if unread:
                node = node._replace(inputs=replaced(node.inputs, rng.randrange(len(node.inputs)), rng.choice(unread)))
        child = replaced(arch, place, node)
        return child if self.valid(child) else arch

    def graph(self, arch: tuple[Node, ...], whole: bool = False) -> Graph:
        """Return the nodes that reach the output over time (with `whole`, all nodes) as vertices. The three operands of
        a blend have different roles, so each passes a vertex of its own. A vertex "state" links a new hidden state to
        the previous one."""
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
        """Read a recipe, or a whole run log that has one."""
        nodes = literal(text)
        if "recepie" in nodes:  # the benchmark's own spelling
            nodes = literal(nodes["recepie"]) if isinstance(nodes["recepie"], str) else nodes["recepie"]
        arch = tuple(Node(name, node["op"], tuple(node["input"])) for name, node in nodes.items())
        new = sorted(self.new(nodes))
        require(new in (["h_new_0"], ["h_new_0", "h_new_1"], ["h_new_0", "h_new_1", "h_new_2"]),
                f"new hidden states {new}, expected one to three, from h_new_0 up")
        given = {"x", *self.previous(arch)}
        for name, op, inputs in arch:
            require(name not in given, f"node {name!r}, which is an input")
            require(op in self.ARITY, f"op {op!r} of {name}")
            fits = len(inputs) in self.ARITY[op] and len(set(inputs)) == len(inputs)
            count = " or ".join(map(str, self.ARITY[op]))
            require(fits, f"inputs {', '.join(inputs)} of {name}, {op}, expected {count} different ones")
            for source in inputs:
                readable = source in nodes or source in given and (source != "x" or op == "linear")
                require(readable, f"input {source!r} of {name}, {op}")
        self.in_order(arch)  # a cycle is a ValueError
        return arch

    def format(self, arch: tuple[Node, ...]) -> str:
        return json.dumps({name: {"op": op, "input": list(inputs)} for name, op, inputs in arch})

    def build(self, arch: tuple[Node, ...], whole: bool = False) -> nn.Module:
        """Build the network. With `whole`, add the decoder, whose matrix is the word embedding, too."""
        widths = (400, 600, 600, 400) if whole else self.widths
        drops = [0.25] * (len(widths) - 2) + [0.1]  # between layers, and at the end
        layer = partial(RecurrentLayer, self.graph(arch, whole), self.reservoir)
        network = nn.Sequential(*map(layer, widths, widths[1:], drops))
        network.width = widths[0]
        return nn.ModuleList([network, nn.Linear(400, self.WORDS)]) if whole else network


class RecurrentLayer(nn.Module):
    """A recipe's graph, run over a sequence with hidden states that start at zero; then locked dropout, one mask for
    all steps. All matrices but those of x have weight drop .1. In a `reservoir` only those of x are trained."""
    OPS: dict[str, Callable[..., Tensor | None]] = {
        "activation_tanh": torch.tanh, "activation_sigm": torch.sigmoid, "activation_leaky_relu": F.leaky_relu,
        "elementwise_sum": torch.add, "elementwise_prod": torch.mul,
        **dict.fromkeys(("blend 0", "blend 1", "blend 2"), lambda a: a), "state": lambda previous, new: None,
    }

    def __init__(self, graph: Graph, reservoir: bool, c_in: int, hidden: int, drop: float):
        super().__init__()
        self.graph, self.hidden, self.drop = graph, hidden, drop
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
        mask = F.dropout(torch.ones_like(outputs[0]), self.drop, self.training)
        return torch.stack(outputs, 1) * mask[:, None]


# ------------------------------------------------------------------------------------------- names and labels
SPACES: dict[str, Callable[..., SearchSpace]] = {
    "nb101": NB101, "nb201": NB201, "nbmacro": NBMacro, "nbnlp": NBNLP,
    **{kind + fix + end: partial(Cells, kind, fix == "-fix", end == "-in")
       for kind, fix, end in product(Cells.KINDS, ("", "-fix"), ("", "-in"))
       if not fix or kind in ("darts", "enas", "pnas")},
    **{kind + end: partial(Residual, kind, end == "-in") for kind, end in product(Residual.KINDS, ("", "-in"))},
}


def get(name: str, **sizes: Any) -> Any:
    """Return the search space of a `--space` name, made with the `sizes` that its class takes; or a space of
    your own, FILE.py:CLASS, made without arguments. ValueError for an unknown name; FILE.py may raise anything."""
    if name in SPACES:
        return SPACES[name](**sizes)
    path, _, cls = name.rpartition(":")
    require(path.endswith(".py"), f"unknown space {name!r}", *SPACES, "FILE.py:CLASS")
    sys.path.insert(0, str(Path(path).resolve().parent))  # for what it imports, as if it were run
    spec = importlib.util.spec_from_file_location("own_space", Path(path).resolve())
    sys.modules["own_space"] = module = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    require(hasattr(module, cls), f"space {name!r}: no {cls!r} in {path}, expected the name of a class")
    return getattr(module, cls)()


def load_labels(space: Any, path: str | Path) -> list[tuple[Any, float]]:
    """Return [(arch, value)], higher = better, from a JSON file, a list of [architecture, value]. The architecture is a
    text that `space.parse` reads, or the JSON value of such a text. ValueError, with the entry, for anything else."""
    labels, where = [], " is no JSON list of [architecture, value]"
    try:
        entries = json.loads(Path(path).read_bytes())  # of bytes: with a byte-order mark or in UTF-16 too
        require(isinstance(entries, list) and entries != [], json.dumps(entries)[:60])
        for number, entry in enumerate(entries):
            where, pair = f", entry {number}", isinstance(entry, list) and len(entry) == 2
            require(pair, f"{json.dumps(entry):.60}, expected [architecture, value]")
            arch, value = entry
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            require(is_number, f"value {json.dumps(value)}, expected a number")
            labels.append((space.parse(arch if isinstance(arch, str) else json.dumps(arch)), float(value)))
    except ValueError as error:
        raise ValueError(f"labels {path}{where}: {error}") from None
    return labels


# ------------------------------------------------------------------------------------------- canonical graphs
def canonical(graph: Graph, tries: int = 2000) -> Graph:
    """Return the same representative for all graphs that are `graph` up to the order of vertices and of summands.

    This is individualisation and refinement (McKay and Piperno, 2014). A vertex's colour is its rank by depth and
    operation, which is refined until it no longer changes. If vertices still have the same colour, each of them in turn
    is put before the others; of vertices with the same inputs and readers, only one is tried. Colours that all differ
    order the vertices, topologically. Of the graphs in these orders, the smallest is returned. ValueError after `tries`
    refinements; graphs drawn from the spaces need a handful.
    """
    readers: list[list[int]] = [[] for _ in graph]
    depths: list[int] = []
    for i, (op, inputs) in enumerate(graph):
        depths.append(0 if op.startswith("input") else 1 + max((depths[j] for j in inputs), default=0))
        for j in inputs:
            readers[j].append(i)
    depths[-1] = len(graph)  # the output stands last even when nothing reaches it

    found: list[Graph] = []
    todo: list[list[Any]] = [[(depth, vertex.op) for depth, vertex in zip(depths, graph)]]
    for _ in range(tries):
        ranks = refined(graph, readers, todo.pop())
        order = sorted(range(len(graph)), key=ranks.__getitem__)
        tied = next((ranks[i] for i, j in pairwise(order) if ranks[i] == ranks[j]), None)
        if tied is None:
            found.append(tuple(Vertex(graph[i].op, tuple(sorted(ranks[j] for j in graph[i].inputs))) for i in order))
        else:
            firsts = {(*sorted(graph[i].inputs), -1, *readers[i]): i for i in order if ranks[i] == tied}.values()
            todo += [[2 * rank - (i == first) for i, rank in enumerate(ranks)] for first in firsts]
        if not todo:
            return min(found)
    raise ValueError(f"a graph of {len(graph)} vertices is too regular for a canonical form to be found")


def refined(graph: Graph, readers: list[list[int]], colours: list[Any]) -> list[int]:
    """Return the ranks of the colours, refined by the colours of inputs and readers until no more colours arise."""
    while True:
        place = {colour: rank for rank, colour in enumerate(sorted(set(colours)))}
        ranks = [place[colour] for colour in colours]
        colours = [(rank, *sorted(ranks[j] for j in vertex.inputs), -1, *sorted(ranks[j] for j in reading))
                   for rank, vertex, reading in zip(ranks, graph, readers)]
        if len(set(colours)) == len(place):
            return ranks
