"""``quotient-remainder``: a table of embeddings as two smaller ones, read by quotient and remainder of an index.

Shi et al. 2020, Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems,
sections 2 and 3: e(v) = Q[v div m] * R[v mod m], or their sum; every index has a pair of rows of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch

from regauge.ir.dtypes import is_real
from regauge.ir.edit import Builder, record, remove_dead, replace_uses
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.base import Context, Contract, Cut, Pass
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option

Compose: TypeAlias = Literal["product", "sum"]

_ROUNDS = 20  # of filling what the last quotient lacks


@dataclass(frozen=True, kw_only=True)
class QuotientRemainder(Pass):
    """Make an embedding of two smaller ones, for a network that is trained from there on.

    before  y = embedding(table, v)                                     table: f32[10000,64]
    after   y = embedding(q, v div 100) * embedding(r, v mod 100)       q, r: f32[100,64]

    The tables begin at the least squares fit of the one that was, dimension by dimension: of products the first
    singular vectors of its values as a matrix [quotients, remainders], of sums the means of its rows and columns. What
    that loses is in the report, and is most of a table whose rows have nothing in common: this saves memory in
    training, and is no way to compress what is trained.
    """

    name: ClassVar[str] = "quotient-remainder"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True

    rows: int | None = option(
        None, "of the table of remainders; if not given such that both have fewest together", at_least=2
    )
    compose: Compose = option("product", "how the two rows become one")
    include: tuple[str, ...] = option((), "globs on names of tables: only these")
    exclude: tuple[str, ...] = option((), "globs on names of tables: not these")

    def call(self, graph: Graph, context: Context) -> Graph:
        tables = _tables(graph)
        names = [name for table in tables for name in table.names]
        check_patterns("include", self.include, names, what="table of an embedding")
        check_patterns("exclude", self.exclude, names, what="table of an embedding")
        chosen = []
        for table, readers in tables.items():
            size = self.rows or math.ceil(math.sqrt(int(table.shape[0])))
            reason = _misfit(table, readers, size)
            if self.include and not matches(table.names, self.include):
                reason = "not included"
            elif matches(table.names, self.exclude):
                reason = "excluded"
            if reason is None:
                chosen.append((table.name, size))
            else:
                context.left[reason] += 1
        if not chosen:
            if not tables:
                context.left["no embedding was found"] += 1
            return graph
        result = graph.copy()
        for name, size in chosen:
            lost = self._write(result, result.parameters[name], size)
            before = int(graph.parameters[name].shape[0])
            context.cuts.append(Cut(f"{name}: rows", before, -(-before // size) + size))
            context.note(f"{name}: squared error {lost:.3g} of the table's squares")
        remove_dead(result)
        return result

    def _write(self, graph: Graph, table: Parameter, size: int) -> float:
        """Put two tables in the place of one; returns the share of its squares that is lost."""
        whole = table.tensor.detach().double()
        parts = fitted(whole, size, self.compose)
        places = torch.arange(len(whole))
        rows = parts[0][places // size], parts[1][places % size]
        lost = (whole - (rows[0] * rows[1] if self.compose == "product" else rows[0] + rows[1])).square().sum()
        build = Builder(graph, by=self.name)
        stem = table.name.removesuffix(".weight")
        held = [
            build.parameter(
                build.unique(f"{stem}_{name}.weight"),
                part.to(table.tensor.dtype),
                table.kind,
                trainable=table.trainable,
            )
            for name, part in zip(("quotient", "remainder"), parts, strict=True)
        ]
        for node in list(table.consumers()):
            with build.at(node):
                index, name = node.inputs[1], node.output.name
                index = build.remainder(index, len(whole)) if node.attributes["from_end"] else index
                quotient = build.div(index, size, rounding_mode="floor")
                remainder = build.sub(index, build.mul(quotient, size))
                found = [build.embedding(own, at) for own, at in zip(held, (quotient, remainder), strict=True)]
                made = build.mul(*found, name=name) if self.compose == "product" else build.add(*found, name=name)
            replace_uses(graph, node.output, made)
        record(graph, self.name, f"{table.name}: {len(parts[0])} quotients, {size} remainders")
        return float(lost / whole.square().sum().clamp(min=1e-300))


def _tables(graph: Graph) -> dict[Parameter, list[Node]]:
    """The tables of embeddings with all that reads them."""
    found = {}
    for node in graph.nodes:
        table = node.inputs[0] if node.op == "embedding" else None
        if isinstance(table, Parameter) and table.kind == "parameter":
            found[table] = list(table.consumers())
    return found


def _misfit(table: Parameter, readers: list[Node], size: int) -> str | None:
    if any(node.op != "embedding" or node.inputs[0] is not table for node in readers):
        return "something besides embeddings reads the table"
    if any(not isinstance(node.inputs[1], Value) or isinstance(node.inputs[1], Parameter) for node in readers):
        return "its indices are fixed"
    if not is_real(table.dtype):
        return "its numbers are integers"
    count = int(table.shape[0])
    return None if -(-count // size) + size < count else "two tables would be no smaller"


def fitted(whole: torch.Tensor, size: int, compose: Compose) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables of quotients and of remainders, [rows, width], nearest to a table [indices, width].

    Where indices end before the last quotient does, what is missing is filled with the fit, in turns.
    """
    count, width = whole.shape
    quotients = -(-count // size)
    grid = torch.cat([whole, whole.mean(0).expand(quotients * size - count, -1)]).reshape(quotients, size, width)
    missing = (torch.arange(quotients * size) >= count).reshape(quotients, size)
    for _ in range(_ROUNDS):
        first, second = _products(grid) if compose == "product" else _sums(grid)
        if not missing.any():
            break
        image = first[:, None] * second if compose == "product" else first[:, None] + second
        grid = torch.where(missing[..., None], image, grid)
    return first, second


def _products(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, v = torch.linalg.svd(grid.permute(2, 0, 1), full_matrices=False)
    root = s[:, 0].sqrt()
    return (u[:, :, 0].t() * root), (v[:, 0].t() * root)


def _sums(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean = grid.mean((0, 1))
    return grid.mean(1) - mean / 2, grid.mean(0) - mean / 2
