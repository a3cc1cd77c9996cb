"""The size of a graph as a differentiable function of how many indices each Dim keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch

from regauge.ir.cost import cost
from regauge.ir.dims.extents import Dim
from regauge.ir.graph import Graph
from regauge.passes.training.target import Target


class SizeShare:
    """``share(counts)`` is what is kept of the figure that the target limits, 1 for the whole graph; counts may be
    tensors with gradients. ``wanted`` is the share to reach. A ratio is about indices, all alike.
    """

    def __init__(self, graph: Graph, dims: Sequence[Dim], target: Target) -> None:
        self.dims = list(dims)
        self._whole = float(sum(int(dim.size) for dim in dims))
        self._figure: Any = None
        self.wanted = 1 - (target.ratio or 0.0)
        if target.metric is not None and target.budget is not None:
            model = cost(graph)
            figure = sympy.sympify(getattr(model, target.metric))
            chosen = [model.symbols[dim] for dim in self.dims]
            others = {symbol: model.number(dim) for dim, symbol in model.symbols.items() if symbol not in set(chosen)}
            least = {s: max(1, graph.symbols.get(s, (1, None))[0]) for s in figure.free_symbols - set(chosen)}
            self._figure = sympy.lambdify(chosen, figure.subs({**least, **others}), modules="math")
            self._whole = float(self._figure(*(int(dim.size) for dim in self.dims)))
            self.wanted = target.kept(self._whole) / self._whole

    def __call__(self, counts: Mapping[Dim, torch.Tensor]) -> torch.Tensor:
        given = [counts[dim] for dim in self.dims]
        found: torch.Tensor = torch.stack(given).sum() if self._figure is None else self._figure(*given)
        return found / self._whole
