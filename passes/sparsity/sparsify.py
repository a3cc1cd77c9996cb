"""``sparsify``: zeros in weights, in patterns that storage and kernels can use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from regauge.ir.edit import set_weight
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph
from regauge.passes.base import GIVE_DATA, Context, Contract, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.chosen_layers import chosen_layers
from regauge.passes.calibration.layers import Layer
from regauge.passes.calibration.sensitivity import row_sensitivity
from regauge.passes.options import option
from regauge.passes.report import sparse_cut
from regauge.passes.sparsity.allocation import adaptive_shares
from regauge.passes.sparsity.patterns import Pattern, parse_pattern
from regauge.passes.sparsity.permutation import permuted
from regauge.passes.sparsity.run_costs import RunCost
from regauge.passes.sparsity.sequential import (
    Done,
    Method,
    Recipe,
    Refinement,
    Update,
    is_counted,
    mask_by_magnitude,
    may_exchange,
    sparsify_on_data,
)
from regauge.passes.sparsity.still_sparse import Zeros, remember

RATIO = 0.5
BLOCK = "4x4"


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pass):
    """Set weights of linear layers and convolutions to zero; shapes stay.

    before  w: f32[64,128]
    after   w: f32[64,128], of which 2 in every 4 neighbours along the inputs are zero

    N:M counts along the axis that the weight shares with its input: input features, or the input channels of each place
    of a kernel. Tied and grouped weights are left alone, and layers whose sizes are no multiple of the pattern's.

    Without data the smallest weights go. With data masks are chosen by the optimal brain surgeon, kept and removed
    entries change places while that lowers the error, and what is kept is solved by least squares, layer by layer, to
    give what the layer gave in the original.
    """

    name: ClassVar[str] = "sparsify"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    pattern: str = option("2:4", "N:M, which keeps N of every M neighbours, or unstructured, or block")
    ratio: float | None = option(
        None, f"share of the weights that goes, for unstructured and block ({RATIO} if not given)", above=0, below=1
    )
    block: str | None = option(None, f"rows by columns of a block, for pattern=block ({BLOCK} if not given)")
    transposable: bool = option(False, "N:M in both directions of the weight")
    method: Method | None = option(None, "how masks are chosen; obs where data is given, else magnitude")
    refine: Refinement | None = option(
        None,
        "how masks are bettered: off, means (DSnoT), or exchange while the error after least squares falls; the last "
        "with obs, where rows are independent",
    )
    update: Update | None = option(
        None,
        "what kept weights become: off (as they are), columns (the update of obs), or least-squares; the last where "
        "data is given",
    )
    allocation: Literal["uniform", "adaptive"] | None = option(
        None, "the same ratio for every layer, or by what each costs on data; adaptive for a ratio with data"
    )
    cost: RunCost = option(
        "weights",
        "what ratio is a share of where allocation is adaptive: weights, their macs, their power by LPViT's formula, "
        "or the energy of a run",
    )
    permute: bool = option(False, "first reorder input axes, exactly, so that N:M loses less")
    include: tuple[str, ...] = option((), "globs on names of weights: only these")
    exclude: tuple[str, ...] = option((), "globs on names of weights: not these")
    seed: int = option(0, "seed of the search for orders and of the directions of gradients", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        pattern = self._pattern()
        if self.ratio is not None and not is_counted(pattern):
            raise PassError(f"sparsify: {self.pattern} says itself how much goes: give no ratio")
        if self.block is not None and self.pattern != "block":
            raise PassError(f"sparsify: block={self.block} is for pattern=block, not {self.pattern}")
        if self.allocation is not None and not is_counted(pattern):
            raise PassError(f"sparsify: {self.pattern} is the same share of every layer: give no allocation")
        if self.transposable and is_counted(pattern):
            raise PassError(f"sparsify: transposable is for patterns N:M, not {self.pattern}")
        if self.permute and is_counted(pattern):
            raise PassError(f"sparsify: permute is for patterns N:M, not {self.pattern}")
        if self.cost != "weights" and (not is_counted(pattern) or self.allocation == "uniform"):
            raise PassError(
                f"sparsify: cost={self.cost} is for a ratio that layers share out, with allocation=adaptive"
            )
        if self.refine in ("means", "exchange") and not may_exchange(pattern):
            raise PassError(f"sparsify: refine={self.refine} is not for {pattern}, whose rows depend on one another")
        if self.refine == "exchange" and self.update not in (None, "least-squares"):
            raise PassError(f"sparsify: refine=exchange counts on update=least-squares, not {self.update}")
        if self.refine == "means" and self.update == "columns":
            raise PassError("sparsify: update=columns solves for the mask of obs, which refine=means would change")
        if self.update == "columns" and self.method not in (None, "obs"):
            raise PassError(f"sparsify: update=columns belongs to method=obs, not {self.method}")

    def call(self, graph: Graph, context: Context) -> Graph:
        batches = self._batches(graph, context)
        pattern = self._pattern()
        names = [layer.weight.name for layer in self._layers(graph, context.left)]
        if not names:
            return graph
        original = graph
        if self.permute:
            original = permuted(graph, names, pattern, batches, self.seed, context, by=self.name)
        result = original.copy()
        layers = self._layers(result, Counter())
        done = (
            self._by_magnitude(result, layers)
            if batches is None
            else self._on_data(original, result, layers, batches, context)
        )
        sizes = _entries(layers)
        gone = sum(done.zeros.values()) / sum(sizes.values())
        remember(result, {name: Zeros(pattern, zeros / sizes[name]) for name, zeros in done.zeros.items()})
        if is_counted(pattern):
            context.cuts += [sparse_cut(name, sizes[name], zeros) for name, zeros in done.zeros.items()]
        context.note(f"{pattern}: {gone:.1%} of the weights of {len(layers)} layers are zero")
        if batches is not None:
            context.note(f"chosen on {sum(map(examples_in, batches))} examples")
        if done.large:
            context.note(f"{done.large} large layers: entries changed places with the other weights held fixed")
        return result

    def _layers(self, graph: Graph, left: Counter[str]) -> list[Layer]:
        """The layers that take the pattern."""
        pattern = self._pattern()

        def misfit(layer: Layer) -> str | None:
            return pattern.misfit(layer.outputs, layer.columns // layer.taps)

        return chosen_layers(graph, self.include, self.exclude, left, misfit)

    def _pattern(self) -> Pattern:
        return parse_pattern(self.pattern, self.block or BLOCK, self.transposable)

    def _batches(self, graph: Graph, context: Context) -> list[Any] | None:
        """The calibration data, where there is any and the options want it."""
        asked = {"method": ("wanda", "obs"), "refine": ("means", "exchange"), "update": ("columns", "least-squares")}
        wants = [f"{name}={getattr(self, name)}" for name, values in asked.items() if getattr(self, name) in values]
        wants += ["allocation=adaptive"] if self.allocation == "adaptive" else []
        wants += [f"cost={self.cost}"] if self.cost != "weights" else []
        if context.data is None and wants:
            raise PassError(f"sparsify needs data for {wants[0]}: {GIVE_DATA}")
        nothing = self.method == "magnitude" and self.update == "off" and not wants
        return None if context.data is None or nothing else calibration_batches(graph, context)

    def _recipe(self) -> Recipe:
        pattern, method = self._pattern(), self.method or "obs"
        update = self.update or "least-squares"
        exchanges = method == "obs" and update == "least-squares" and may_exchange(pattern)
        return Recipe(pattern, method, self.refine or ("exchange" if exchanges else "off"), update)

    def _by_magnitude(self, result: Graph, layers: Sequence[Layer]) -> Done:
        done = Done()
        for layer in layers:
            kept = mask_by_magnitude(layer, self._pattern(), self._share())
            weight = layer.matrix(layer.weight.tensor.detach())
            set_weight(result, layer.weight, layer.stored(torch.where(kept, weight, 0)), by=self.name)
            done.zeros[layer.weight.name] = int((~kept).sum())
        return done

    def _on_data(
        self, original: Graph, result: Graph, layers: Sequence[Layer], batches: Sequence[Any], context: Context
    ) -> Done:
        rows: Mapping[str, torch.Tensor]
        pattern, names = self._pattern(), [layer.weight.name for layer in layers]
        if is_counted(pattern) or self.transposable:
            rows = row_sensitivity(original, names, batches, self.seed)
        else:  # each row of N:M is a matter of its own
            rows = {layer.weight.name: torch.ones(layer.outputs, dtype=torch.float64) for layer in layers}
        shares = dict.fromkeys(names, self._share())
        if is_counted(pattern) and self.allocation != "uniform":
            shares, costs = adaptive_shares(original, rows, batches, pattern, self._share(), self.cost)
        done = sparsify_on_data(original, result, shares, rows, layers, batches, self._recipe(), by=self.name)
        if self.cost != "weights":
            sizes = _entries(layers)
            gone = sum(costs[name] * done.zeros[name] / sizes[name] for name in names) / sum(costs.values())
            context.note(f"{gone:.1%} of the {self.cost} of these layers goes")
        return done

    def _share(self) -> float:
        return RATIO if self.ratio is None else self.ratio


def _entries(layers: Sequence[Layer]) -> dict[str, int]:
    return {layer.weight.name: layer.outputs * layer.columns for layer in layers}
