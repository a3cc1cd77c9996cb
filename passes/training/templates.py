"""Layers as mixtures of templates while they are trained, and two such networks as one of twice the width.

    first = regauge.training.Templates(model, graph)          # each layer's weight is c0 T0 + c1 T1
    optimizer = torch.optim.SGD([*first.parameters(), ...])   # and biases, norms: what the model trains besides
    ...                                                       # train; and a second model of the same classes alike
    wide = first.grow(second)                                 # a graph: wide.to_torch() is trained on

What grows is found as ``grow`` finds it: every Dim whose indices may have copies.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from regauge.ir.dims.extents import Dim, Extent, Product, resolve
from regauge.ir.dims.kept import flat_indices, touches
from regauge.ir.dims.resize import taken
from regauge.ir.edit import record, set_weight
from regauge.ir.errors import PassError, RegaugeWarning
from regauge.ir.graph import Graph, Parameter
from regauge.passes.growing.grow import copiable
from regauge.passes.training.bound_model import BoundModel, ForwardWeights


@dataclass(frozen=True, eq=False)
class Mixture:
    """The weight of a layer as it is trained: ``templates`` [count, ...], each by its entry of ``coefficients``."""

    templates: nn.Parameter
    coefficients: nn.Parameter

    def tensor(self, coefficients: torch.Tensor | None = None) -> torch.Tensor:
        own = self.coefficients if coefficients is None else coefficients
        tensor: torch.Tensor = torch.tensordot(own, self.templates, 1)
        return tensor

    def other(self) -> torch.Tensor:
        """Coefficients of length 1 at right angles to those of the layer."""
        own = self.coefficients.detach()[None].double()
        last: torch.Tensor = torch.linalg.svd(own).Vh[-1]
        return last.to(self.coefficients)


class Templates:
    """MixtureGrowth (Pham et al. 2024, arXiv 2311.04251): growth by new mixtures of learned templates.

    Before growth each layer with an axis that grows has ``count`` templates of its own, of which its weight is a
    mixture. Templates are drawn with the spread of the weight, coefficients with length 1, and then moved so that the
    weight is what it was: a trained model goes on from where it is. In the wide network the weights of two such models
    are the blocks on the diagonal; in the blocks beside them stand new mixtures of the first model's templates (in the
    rows of its outputs) and of the second's, whose coefficients are at right angles to those that were learned
    (section 3.2; rows as in the authors' code by default). What does not grow is the mean of both: a classifier gives
    the mean of what the two give, where the new blocks are zero and no norm runs over both halves of a stream. A
    layer of which nothing grows, as where its weight is tied, is the mean as well, and a warning names it.

    Known deviations: banks of templates that layers share are not made; weights of the wide network are trained
    themselves, and no longer their templates; trained weights may be the start. Raises PassError where nothing grows.
    """

    def __init__(self, model: nn.Module, graph: Graph, *, count: int = 2, seed: int = 0) -> None:
        if count < 2:
            raise PassError(f"Templates: count={count}, and of fewer than 2 templates there is no other mixture")
        self.bound, self.graph, self.left = BoundModel(model, graph), graph, Counter[str]()
        self._readers = copiable(graph, (), (), self.left)
        self.dims = [dim for dim in graph.axes.groups if dim in self._readers]
        generator = torch.Generator().manual_seed(seed)
        self.mixtures = {
            parameter: _mixture(self.bound.tensor(parameter).detach(), count, generator)
            for parameter in self.bound.trained()
            if parameter.rank > 1 and any(touches(extent, self.dims) for extent in graph.axes.of[parameter])
        }
        if not self.mixtures:
            reasons = "; ".join(f"{number} x {reason}" for reason, number in self.left.items())
            raise PassError(f"Templates finds no layer that can become wider: {reasons or 'no Dim may be changed'}")
        self._forward = ForwardWeights(self.bound, lambda: {own: mix.tensor() for own, mix in self.mixtures.items()})

    def parameters(self) -> Iterator[nn.Parameter]:
        """Templates and coefficients, which are trained in place of the weights that they make."""
        for mixture in self.mixtures.values():
            yield from (mixture.templates, mixture.coefficients)

    def finish(self) -> Graph:
        """The graph with the weights as they are mixed now; the module has them as well, and is let go."""
        self._forward.remove()
        with torch.no_grad():
            for parameter, mixture in self.mixtures.items():
                self.bound.tensor(parameter).copy_(mixture.tensor())
        return self.bound.trained_graph("templates")

    def grow(self, other: Templates, *, scale: float = 1.0) -> Graph:
        """The network of twice the width; ``scale`` is the length of new coefficients (0: blocks of zeros).

        Ends both. Raises PassError where the other network is of another structure.
        """
        if [(p.name, p.shape) for p in self.mixtures] != [(p.name, p.shape) for p in other.mixtures]:
            raise PassError("the two networks are to grow into one, and their layers have other names or sizes")
        mixed = [[mix.tensor(scale * mix.other()).detach() for mix in own.mixtures.values()] for own in (self, other)]
        halves = {parameter.name: pair for parameter, *pair in zip(self.mixtures, *mixed, strict=True)}
        self._warn_of_means()
        first, second = self.finish(), other.finish()
        copies = {dim: np.tile(np.arange(int(dim.size)), 2) for dim in self.dims}
        result = taken(self.graph, copies)
        for parameter in self.graph.all_parameters():
            if not isinstance(parameter.dtype, torch.dtype) or not parameter.dtype.is_floating_point:
                continue
            name = parameter.name
            pair = [own.parameters[name].tensor.detach() for own in (first, second)]
            axes = self.graph.axes.of[parameter]
            wide = _wide(axes, copies, pair, halves.get(name, pair))
            if self._is_summed(parameter, axes):
                wide = wide / 2
            set_weight(result, result.parameters[name], wide.to(parameter.dtype), by="templates")
        for dim in self.dims:
            record(result, "templates", f"{dim.name}: {dim.size} -> {2 * int(dim.size)}")
        result.version += 1
        return result

    def _warn_of_means(self) -> None:
        """Two networks that were trained apart have nothing in common of which a mean would be of use."""
        names = [own.name for own in self.bound.trained() if own.rank > 1 and own not in self.mixtures]
        if names:
            reasons = "; ".join(f"{number} x {reason}" for reason, number in self.left.items())
            warnings.warn(
                f"nothing of {', '.join(names)} grows ({reasons}): there the wide network has the mean of both "
                "weights, which fits neither network",
                RegaugeWarning,
                stacklevel=3,
            )

    def _is_summed(self, parameter: Parameter, axes: Sequence[Extent]) -> bool:
        """Whether a weight adds up indices that have grown into some that have not: those of both networks."""
        reading = {axis for own in self._readers.values() for side, axis in own.sides if side is parameter}
        return bool(reading) and not any(
            touches(extent, self.dims) for axis, extent in enumerate(axes) if axis not in reading
        )


def _mixture(weight: torch.Tensor, count: int, generator: torch.Generator) -> Mixture:
    """Templates and coefficients whose mixture is a weight."""
    coefficients = torch.randn(count, generator=generator).to(weight)
    coefficients /= coefficients.norm()
    templates = torch.randn(count, *weight.shape, generator=generator).to(weight) * weight.std(correction=0)
    missing = weight - torch.tensordot(coefficients, templates, 1)
    templates += coefficients.reshape(-1, *[1] * weight.dim()) * missing
    return Mixture(nn.Parameter(templates), nn.Parameter(coefficients))


def _wide(
    axes: Sequence[Extent],
    copies: Mapping[Dim, np.ndarray],
    pair: Sequence[torch.Tensor],
    mixed: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The weight of both networks: of each what is its own, mixtures between, and the mean of what has not grown."""
    laid = []
    for tensor in (*pair, *mixed):
        for axis, extent in enumerate(axes):
            if touches(extent, copies):
                tensor = tensor.index_select(axis, torch.from_numpy(flat_indices(extent, copies)).to(tensor.device))
        laid.append(tensor)
    seen, lead = np.zeros([1] * len(axes), dtype=np.int64), np.zeros([1] * len(axes), dtype=np.int64)
    for axis, extent in enumerate(axes):
        if touches(extent, copies):
            along = _halves(extent, copies).reshape([-1 if at == axis else 1 for at in range(len(axes))])
            seen, lead = seen | along, np.where(lead == 0, along & -along, lead)
    shape = laid[0].shape
    own, rows = (torch.from_numpy(np.broadcast_to(found, shape).copy()).to(laid[0].device) for found in (seen, lead))
    result = torch.where(rows == 2, laid[3], laid[2])
    result = torch.where(own == 1, laid[0], torch.where(own == 2, laid[1], result))
    return torch.where(own == 0, (laid[0] + laid[1]) / 2, result)


def _halves(extent: Extent, copies: Mapping[Dim, np.ndarray]) -> np.ndarray:
    """For each position of the wide axis whose it is: 1 the first network's, 2 the second's, 3 of both, 0 of none."""
    found = resolve(extent)
    if isinstance(found, Dim):
        size = int(found.size)
        return np.repeat([1, 2], size) if found in copies else np.zeros(size, dtype=np.int64)
    if not isinstance(found, Product):
        return np.concatenate([_halves(part, copies) for part in found.segments])
    result = np.zeros(1, dtype=np.int64)
    for part in found.factors:
        result = np.bitwise_or.outer(result, _halves(part, copies)).reshape(-1)
    return result
