"""Layers made sparse one after the other on data, each with the inputs that the sparse layers before it give.

magnitude   |w|                       the mask alone looks at no data
wanda       |w| |x_column|            Sun et al. 2024, A Simple and Effective Pruning Approach; unstructured: per row
obs         column by column          :mod:`regauge.passes.sparsity.column_updates`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.moments import Moments
from regauge.passes.calibration.quadratic import Quadratic, change_of_output, least_error, refit
from regauge.passes.calibration.side_by_side import SideBySide
from regauge.passes.sparsity.column_updates import prune_by_columns
from regauge.passes.sparsity.patterns import Blocks, NofM, Pattern, Unstructured, grouped
from regauge.passes.sparsity.quick_swaps import exchange_with_fixed
from regauge.passes.sparsity.refinement import swap_by_means
from regauge.passes.sparsity.swaps import exchange

Method: TypeAlias = Literal["magnitude", "wanda", "obs"]
Refinement: TypeAlias = Literal["off", "means", "exchange"]
Update: TypeAlias = Literal["off", "columns", "least-squares"]

RIDGE = 1e-2  # share of the mean square of a column
MOST_WORK = 5e10  # rows times columns^3 of a layer in which entries change places exactly
_MOST_EXCHANGES = 200  # per row


@dataclass(frozen=True)
class Recipe:
    """How masks are chosen and what becomes of the weights that are kept."""

    pattern: Pattern
    method: Method
    refinement: Refinement
    update: Update


@dataclass
class Done:
    """What was done, by the names of the layers' weights."""

    zeros: dict[str, int] = field(default_factory=dict)
    large: int = 0  # layers whose entries change places with all other weights held fixed


def mask_by_magnitude(layer: Layer, pattern: Pattern, share: float) -> torch.Tensor:
    """The mask [outputs, columns] that keeps the greatest weights, in the layer's own order of columns."""
    columns = grouped(layer)
    weight = layer.matrix(layer.weight.tensor.detach()).double()
    kept = torch.empty_like(weight, dtype=torch.bool)
    kept[:, columns] = pattern.mask(weight[:, columns].abs(), share)
    return kept


def sparsify_on_data(
    original: Graph,
    changed: Graph,
    shares: Mapping[str, float],
    rows: Mapping[str, torch.Tensor],
    layers: Sequence[Layer],
    batches: Sequence[Any],
    recipe: Recipe,
    *,
    by: str,
) -> Done:
    """Write sparse weights into ``layers``, which are those of ``changed``, a copy of ``original``.

    ``shares`` says by the names of weights how much of each goes, ``rows`` what the error of each output weighs.
    """
    by_node = {layer.node: layer for layer in layers}
    run, done = SideBySide(original, changed, batches), Done()
    for was, node in run.steps():
        layer = by_node.get(node)
        if layer is None:
            continue
        name = layer.weight.name
        kept, weight, bias = _Solver(run, layer, was, recipe).solve(shares[name], rows[name], done)
        # a product with the mask may leave negative zeros, which are bits that sparse storage would keep
        set_weight(changed, layer.weight, layer.stored(torch.where(kept, weight, 0)), by=by)
        done.zeros[name] = int((~kept).sum())
        shifted = layer.shifted(bias) if bias is not None else None
        if shifted is not None:
            set_weight(changed, *shifted, by=by)
    return done


class _Solver:
    """One layer: its moments are taken, a mask is chosen and bettered, the weight is solved for."""

    def __init__(self, run: SideBySide, layer: Layer, was: Node, recipe: Recipe) -> None:
        self.layer, self.recipe = layer, recipe
        self.columns = grouped(layer)
        self.weight = layer.matrix(layer.weight.tensor.detach()).double()
        bias = (
            layer.bias.tensor.detach().double() if layer.bias is not None else self.weight.new_zeros(len(self.weight))
        )
        self.fitted = recipe.update == "least-squares"
        self.moments = Moments(layer.columns, layer.outputs if self.fitted else 0)
        targets = run.targets(layer, was) if self.fitted else [None] * len(run.now)
        for x, y in zip(run.inputs(layer), targets, strict=True):
            self.moments.add(layer.rows_of_input(x), None if y is None else layer.rows_of_output(y))
        self.moments.check(layer.node.label)
        self.before = bias
        self.problem = self._problem(bias).ordered(self.columns)

    def _problem(self, bias: torch.Tensor) -> Quadratic:
        if not self.fitted:
            return change_of_output(self.moments, self.weight, bias, RIDGE)
        free = self.layer.bias is not None or self.layer.norm is not None
        return least_error(self.moments, self.weight, bias, RIDGE, free=free)

    def solve(
        self, share: float, rows: torch.Tensor, done: Done
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The mask, the weight, and by how much the output shifts where a bias takes that up."""
        recipe, ordered = self.recipe, self.weight[:, self.columns]
        kept, updated = self._choose(ordered, share, rows)
        if recipe.refinement == "means":
            kept = self._by_means(ordered, kept)
        weight: torch.Tensor | None = None
        if recipe.refinement == "exchange" and self.fitted:
            if self._work() <= MOST_WORK:
                kept, weight = exchange(self.problem, kept, self._group(), _MOST_EXCHANGES)
            else:
                kept, weight = exchange_with_fixed(self.problem, kept, updated, self._group(), _MOST_EXCHANGES)
                done.large += 1
        if weight is None:
            weight = {
                "off": ordered * kept,
                "columns": updated,
                "least-squares": refit(self.problem, kept, updated) if self.fitted else updated,
            }[recipe.update]
        bias = self.problem.bias(weight) - self.before if self.fitted else None
        inverse = self.columns.argsort()
        return kept[:, inverse], weight[:, inverse], bias

    def _choose(self, ordered: torch.Tensor, share: float, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pattern = self.recipe.pattern
        if self.recipe.method == "obs":
            return prune_by_columns(self.problem, pattern, share, rows)
        if self.recipe.method == "wanda":
            kept = wanda_mask(pattern, ordered, self.moments.gram.diag()[:-1][self.columns], share)
        else:
            kept = pattern.mask(ordered.abs(), share)
        return kept, ordered * kept

    def _by_means(self, ordered: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        gram, rows = self.moments.gram, max(1, self.moments.rows)
        mean, second = gram[-1, :-1] / rows, gram.diag()[:-1] / rows
        return swap_by_means(ordered, kept, mean[self.columns], second[self.columns], self._group())

    def _group(self) -> int:
        """Within how many neighbours entries may change places."""
        pattern = self.recipe.pattern
        return pattern.of if isinstance(pattern, NofM) else self.layer.columns

    def _work(self) -> float:
        return float(self.layer.outputs * self.layer.columns**3)


def wanda_mask(pattern: Pattern, weight: torch.Tensor, squares: torch.Tensor, share: float) -> torch.Tensor:
    """The mask by |w| times the norm of its column of inputs, from the columns' sums of ``squares``."""
    costs = weight.abs() * squares.sqrt()
    return (Unstructured(per_row=True) if isinstance(pattern, Unstructured) else pattern).mask(costs, share)


def may_exchange(pattern: Pattern) -> bool:
    """Whether entries of a row can change places alone: not where the pattern binds rows to one another."""
    return isinstance(pattern, NofM | Unstructured)


def is_counted(pattern: Pattern) -> bool:
    """Whether a share says how much goes."""
    return isinstance(pattern, Unstructured | Blocks)
