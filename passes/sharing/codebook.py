"""Layers whose rows are made of short vectors of one table, which the same layer of all blocks reads.

    W_l[o, k d + i] = C[code_l[o, k], i]        C [entries, d], codes of one or two bytes

The table is a weighted k-means of the vectors of all layers, each entry with the diagonals of the layer's metrics. With
data it is then, beside the codes, least squares in the whole metrics, and codes of a layer are found from its first
columns to its last, what each vector is off being made up for by the columns that are still to come (GPTVQ, van
Baalen et al. 2024, The Blessing of Dimensionality for LLM Quantization, algorithm 1). Beyond the paper the table is
common to layers of several blocks, whose order of channels and heads is one by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from regauge.ir.edit import Builder, record, set_input
from regauge.ir.graph import Graph
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import factor_of
from regauge.passes.factorization.chains import weight_like
from regauge.passes.factorization.problems import Problem
from regauge.passes.sharing.fitting import solved
from regauge.passes.sharing.grouping import least_loss
from regauge.passes.sharing.sites import Problems, Site, problems_at
from regauge.passes.sharing.writing import around, stem

_LENGTHS = (1, 2, 4, 8)
_ENTRIES = (16, 64, 256, 2048)  # of codes of one byte the most that layers are large enough for, and one of two bytes
_EACH = 16  # vectors for each entry, at least
_ROUNDS, _FIRST_ROUNDS = 12, 4  # of k-means; and when choices are weighed
_TURNS = 3  # of codes beside the table and it beside them, with data
_RIDGE = 1e-8  # of the mean of a metric
_SAMPLE, _FIRST_SAMPLE = 1 << 16, 1 << 13  # of vectors that k-means sees; and when choices are weighed
_DISTANCES = 1 << 22  # held at a time


@dataclass
class Coded:
    """Layers of vectors of one ``table`` [entries, length]; ``codes`` [outputs, vectors of a row] of each."""

    names: tuple[str, ...]
    table: torch.Tensor
    codes: dict[str, torch.Tensor]
    code_bytes: float
    _own: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Codes count by the bytes that they take, in those of a number."""
        return self.table.numel() + round(self.code_bytes * sum(own.numel() for own in self.codes.values()))

    def matrix(self, problem: Problem) -> torch.Tensor:
        codes = self._own[problem.layer.weight.name] = _along_columns(problem, self.table)
        return self.table[codes].flatten(1)

    def write(self, graph: Graph, layers: Sequence[Layer], *, by: str) -> None:
        """
        before  y = linear(x, w, b)
        after   y = linear(x, reshape(embedding(table, codes)), b)     table: f32[entries, d], codes: i16[outputs, k]
        """
        build = Builder(graph, by=by)
        table = weight_like(build, f"{stem(layers[0])}_codebook", self.table, layers[0].weight)
        for layer in layers:
            codes = self._own[layer.weight.name].to(_code_type(len(self.table)))
            held = build.parameter(build.unique(f"{stem(layer)}_codes"), codes, "buffer")
            with build.at(layer.node):
                build.scope = around(layer)
                name = layer.node.output.name
                index = build.cast(held, dtype=torch.int32, name=f"{name}_codes")
                vectors = build.embedding(table, index, name=f"{name}_vectors")
                if layer.node.op == "matmul":
                    weight = build.reshape(vectors, shape=tuple(reversed(layer.weight.shape)))
                    weight = build.permute(weight, dims=(1, 0), name=f"{name}_weight")
                else:
                    weight = build.reshape(vectors, shape=tuple(layer.weight.shape), name=f"{name}_weight")
                set_input(layer.node, 1, weight, graph)
            record(graph, by, f"{layer.weight.name}: vectors of {self.table.shape[1]} of a table of {len(self.table)}")


def codebooks(sites: Sequence[Site], problems: Problems, allowed: float) -> list[Coded]:
    """A table for each site, all so large that least is lost within ``allowed`` parameters.

    Raises PassError where no choice is small enough.
    """
    found = dict[Site, list[Coded]]()
    options = dict[Site, list[tuple[int, float]]]()
    for site in sites:
        own = problems_at(site, problems)
        vectors = _Vectors(own, first=True)
        found[site] = [vectors.coded(site, *choice) for choice in _choices(site, own)]
        losses = [_error(own, one) for one in found[site]]
        whole = (len(own) * site.size, 0.0)
        options[site] = [whole, *((one.parameters, loss) for one, loss in zip(found[site], losses, strict=True))]
    picks, _ = least_loss(options, allowed)
    result = []
    for site, pick in picks.items():
        if pick:
            own = problems_at(site, problems)
            chosen = found[site][pick - 1]
            result.append(_bettered(own, _Vectors(own).coded(site, *chosen.table.shape)))
    return result


def _choices(site: Site, problems: Sequence[Problem]) -> list[tuple[int, int]]:
    """Entries and lengths with which layers are smaller than they are."""
    layer, whole = problems[0].layer, len(problems) * site.size
    if layer.node.op not in ("linear", "matmul", "conv") or layer.blocks > 1:
        return []
    found = []
    for length in _LENGTHS if layer.columns % max(_LENGTHS) == 0 else (1,):
        most = [entries for entries in _ENTRIES if entries * _EACH <= whole // length]
        one = [entries for entries in most if _code_type(entries) == torch.uint8]
        for entries in {*one[-1:], *(most[len(one) :] if length > 1 else ())}:
            if entries * length + _code_bytes(layer, entries) * whole / length < whole:
                found.append((entries, length))
    return found


def _code_type(entries: int) -> torch.dtype:
    return torch.uint8 if entries <= 256 else torch.int16


def _code_bytes(layer: Layer, entries: int) -> float:
    """Of one code, in those of one of the layer's weights."""
    return _code_type(entries).itemsize / layer.weight.tensor.element_size()


def _error(problems: Sequence[Problem], found: Coded) -> float:
    return sum(p.error(found.table[found.codes[p.layer.weight.name]].flatten(1)) for p in problems)


class _Vectors:
    """The weights of layers, and how much each entry matters by the diagonals of the metrics."""

    def __init__(self, problems: Sequence[Problem], *, first: bool = False) -> None:
        self.problems, self.first = problems, first
        self.weights = torch.stack([problem.weight for problem in problems])
        self.importance = torch.stack([_importance(problem) for problem in problems])

    def coded(self, site: Site, entries: int, length: int) -> Coded:
        vectors, weighs = (own.reshape(-1, length) for own in (self.weights, self.importance))
        rounds, most = (_FIRST_ROUNDS, _FIRST_SAMPLE) if self.first else (_ROUNDS, _SAMPLE)
        some = slice(None, None, -(-len(vectors) // most))
        table = _start(vectors[some], entries)
        for _ in range(rounds):
            codes = _nearest(vectors[some], weighs[some], table)
            table = _centres(vectors[some], weighs[some], codes, table)
        codes = _nearest(vectors, weighs, table).reshape(len(self.weights), self.weights.shape[1], -1)
        each = _code_bytes(self.problems[0].layer, entries)
        return Coded(site.names, table, dict(zip(site.names, codes, strict=True)), each)


def _importance(problem: Problem) -> torch.Tensor:
    found = torch.ones_like(problem.weight) / problem.scale
    if problem.inputs is not None:
        found = found * problem.inputs.diagonal()
    if problem.outputs is not None:
        found = found * problem.outputs.diagonal()[:, None]
    return found.clamp(min=1e-12 * float(found.mean()))


def _start(vectors: torch.Tensor, entries: int) -> torch.Tensor:
    """Vectors at equal distances in the order of their lengths along the direction of greatest spread."""
    _, axes = torch.linalg.eigh(vectors.t() @ vectors)
    order = (vectors @ axes[:, -1]).argsort()
    places = torch.linspace(0, len(order) - 1, entries, dtype=torch.float64).round().long()
    return vectors[order[places]].clone()


def _nearest(vectors: torch.Tensor, weighs: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of the table for each vector that is nearest, each place with a weight."""
    found, step, entries = [], max(1, _DISTANCES // len(table)), table.float().t()
    both = torch.cat([entries.square(), -2 * entries])
    for part, own in zip(torch.split(vectors, step), torch.split(weighs, step), strict=True):
        scale = own.mean(1, keepdim=True)
        off = torch.cat([own, own * part], 1).div(scale).float() @ both
        found.append(torch.from_numpy(off.numpy().argmin(1)))  # several times as fast as torch's on rows
    return torch.cat(found)


def _centres(vectors: torch.Tensor, weighs: torch.Tensor, codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The weighted mean of the vectors of each entry; an entry of none takes one of those that are furthest off."""
    total = torch.zeros_like(table).index_add(0, codes, weighs)
    mean = torch.zeros_like(table).index_add(0, codes, weighs * vectors) / total.clamp(min=1e-300)
    empty = total[:, 0] == 0
    if empty.any():
        off = (weighs * (vectors - table[codes]).square()).sum(1)
        mean[empty] = vectors[off.topk(int(empty.sum())).indices]
    return mean


def _bettered(problems: Sequence[Problem], found: Coded) -> Coded:
    """Codes and table in turns, in the whole metrics; the best of them."""
    if problems[0].inputs is None:
        return found
    best, least = found, _error(problems, found)
    for _ in range(_TURNS):
        codes = {p.layer.weight.name: _along_columns(p, found.table) for p in problems}
        found = Coded(found.names, _refitted(problems, codes, found.table), codes, found.code_bytes)
        error = _error(problems, found)
        if error < least:
            best, least = found, error
    return best


def _refitted(problems: Sequence[Problem], codes: dict[str, torch.Tensor], table: torch.Tensor) -> torch.Tensor:
    """The table that loses least beside codes."""

    def gathered(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros_like(table)
        for problem, matrix in zip(problems, matrices, strict=True):
            weighed = problem.weighed(matrix) / problem.scale
            total.index_add_(0, codes[problem.layer.weight.name].flatten(), weighed.reshape(-1, table.shape[1]))
        return total

    def image(own: torch.Tensor) -> torch.Tensor:
        return gathered([own[codes[problem.layer.weight.name]].flatten(1) for problem in problems])

    return solved(image, gathered([problem.weight for problem in problems]), table)


def _along_columns(problem: Problem, table: torch.Tensor) -> torch.Tensor:
    """Codes [outputs, vectors of a row]: each nearest beside those before it, in the metric of the inputs.

    With U' U the inverse of the metric the error of a vector is (w - c) U_JJ^-1, and columns behind it take
    (w - c) U_JJ^-1 U_J,later.
    """
    length, rest = table.shape[1], problem.weight.clone()
    if problem.inputs is None:
        vectors = rest.reshape(-1, length)
        return _nearest(vectors, torch.ones_like(vectors), table).reshape(len(rest), -1)
    root = factor_of(problem.inputs, max(_RIDGE * float(problem.inputs.diagonal().mean()), 1e-300))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(root), upper=True)
    found = []
    for start in range(0, rest.shape[1], length):
        own = upper[start : start + length, start : start + length]
        here = rest[:, start : start + length]
        seen, entries = (torch.linalg.solve_triangular(own, side, upper=True, left=False) for side in (here, table))
        codes = _nearest(seen, torch.ones_like(seen), entries)
        found.append(codes)
        rest[:, start + length :] -= (seen - entries[codes]) @ upper[start : start + length, start + length :]
    return torch.stack(found, 1)
