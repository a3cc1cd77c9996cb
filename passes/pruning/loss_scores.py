"""Scores from gradients of a loss: what removing an index does to it, to first or second order.

All sums are over the slices of weights that an index owns; of weight w, gradient g and Hessian H. Gradients of scores
that are squared are taken example by example, as their papers say; the others from the mean loss of all examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from regauge.ir.dims.extents import Dim, leaves
from regauge.ir.dims.groups import Group
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.passes.calibration.losses import Labelled, Loss, loss_of
from regauge.passes.calibration.weight_gradients import (
    Differentiable,
    batch_gradients,
    example_gradients,
    example_outputs,
    hessian_products,
)
from regauge.passes.pruning.scores import MemberScores, Scores, normalised, on_dim, scored_members, summed

Elements: TypeAlias = Mapping[Parameter, torch.Tensor]
_READ = {"contract", "reduce", "normalise"}  # roles of a Dim whose indices a node brings together


class LossScores:
    """The scores of one graph on the same data; ``loss`` as in :mod:`regauge.passes.calibration.losses`."""

    def __init__(
        self, graph: Graph, groups: Sequence[Group], batches: Sequence[Labelled], loss: Loss | None, seed: int
    ) -> None:
        self.graph, self.groups, self.batches, self.loss, self.seed = graph, groups, batches, loss, seed
        members = [m.parameter for group in groups for m in scored_members(group)]
        self.parameters = [p for p in dict.fromkeys(members) if torch.is_floating_point(p.tensor)]

    def taylor(self) -> MemberScores:
        """|sum w g|: the change of the loss to first order when the whole slice goes (Molchanov et al. 2017)."""
        return _mapped(np.abs, self._sums(self._products()))

    def taylor_element(self) -> MemberScores:
        """sum |w g|: first order, each element by itself."""
        return self._sums({p: q.abs() for p, q in self._products().items()})

    def taylor_squared(self) -> MemberScores:
        """E[(sum w g)^2] over examples, for each member by itself (Molchanov et al. 2019, eq. 8)."""
        return self._mean_over_examples(lambda members: _mapped(np.square, members))

    def fisher(self) -> Scores:
        """E[(sum w g)^2] over examples, the sum over all members of the Dim (NViT, Yang et al. 2023, eq. 4)."""
        found = self._mean_over_examples(lambda m: {dim: [np.square(np.sum(v, axis=0))] for dim, v in m.items() if v})
        return self._first(found)

    def obd(self) -> MemberScores:
        """sum h w^2 / 2 with h = E[g^2] over examples: optimal brain damage (LeCun et al. 1990), empirical Fisher."""
        total: dict[Parameter, torch.Tensor] = {}
        count = 0
        for found in example_gradients(self.graph, self.parameters, self.batches, self.loss, self.seed):
            count += 1
            for parameter, gradient in found.items():
                total[parameter] = total.get(parameter, 0) + gradient.double().square()
        return self._sums({p: 0.5 * h / count * p.tensor.detach().double().square() for p, h in total.items()})

    def snip(self) -> MemberScores:
        """sum |w g| / (that of all weights scored), on the first batch (SNIP, Lee et al. 2019, eq. 6)."""
        first = LossScores(self.graph, self.groups, self.batches[:1], self.loss, self.seed)
        products = {p: q.abs() for p, q in first._products().items()}
        whole = sum(float(q.sum()) for q in products.values()) or 1.0
        return self._sums({p: q / whole for p, q in products.items()})

    def grasp(self) -> MemberScores:
        """sum w (H g): GraSP (Wang et al. 2020, eq. 8) removes the highest of -w (H g), so this is its negative."""
        return self._sums(self._hessian_products())

    def crop(self) -> MemberScores:
        """sum |w (H g)|: CroP (Rachwan et al. 2022) keeps what changes the gradient flow most, either way."""
        return self._sums({p: q.abs() for p, q in self._hessian_products().items()})

    def hesso(self) -> Scores:
        """The mean of five proxies, each divided by its sum over all indices (HESSO, Chen et al. 2024).

        |w|, |w| / sqrt(elements), 1 - cos(w, g), |sum w g| and (sum w g)^2 / 2, of an index's slices of all members
        together. A step to zero agrees with descent where cos(w, g) is near 1: such an index may go.
        """
        weights = {p: p.tensor.detach().double() for p in self.parameters}
        gradients = batch_gradients(self.graph, self.parameters, self.batches, self.loss, self.seed)
        products = self._summed({p: weights[p] * g.double() for p, g in gradients.items()})
        squares = self._summed({p: w.square() for p, w in weights.items()})
        steep = self._summed({p: g.double().square() for p, g in gradients.items()})
        counts = self._summed({p: torch.ones_like(w) for p, w in weights.items()})
        proxies: list[Scores] = [{} for _ in range(5)]
        for dim, product in products.items():
            norm = np.sqrt(squares[dim])
            both = norm * np.sqrt(steep[dim])
            cosine = np.divide(product, both, out=np.zeros_like(both), where=both > 0)
            parts = (norm, norm / np.sqrt(np.maximum(counts[dim], 1)), 1 - cosine, np.abs(product), product**2 / 2)
            for proxy, part in zip(proxies, parts, strict=True):
                proxy[dim] = part
        return _mean_of_shares(proxies)

    def mask_gradient(self) -> Scores:
        """E[(dL/dm_i)^2] over examples, m a mask of ones on a Dim wherever a node brings its indices together.

        One backward run scores every Dim, also such as no weight contracts. The mask multiplies what is contracted,
        summed or normalised over; of a Dim of which nothing is, the first value that has it.
        """
        places = _mask_places(self.graph, [group.dim for group in self.groups])
        masks: dict[tuple[Node, Value, int], torch.Tensor] = {}

        def replace(node: Node, value: Value, tensor: torch.Tensor) -> torch.Tensor:
            for axis in places.get((node, value), {}):
                masks[node, value, axis] = torch.ones(tensor.shape[axis], dtype=tensor.dtype, requires_grad=True)
                shape = [-1 if a == axis else 1 for a in range(tensor.dim())]
                tensor = tensor * masks[node, value, axis].reshape(shape)
            return tensor

        totals: Scores = {group.dim: np.zeros(int(group.dim.size)) for group in self.groups}
        generator, count = torch.Generator().manual_seed(self.seed), 0
        for outputs, example in example_outputs(Differentiable(self.graph, [], replace), self.batches):
            loss = loss_of(outputs, example, self.loss, squared=True, generator=generator)
            if loss is None:
                continue
            count += 1
            found = torch.autograd.grad(loss, list(masks.values()), allow_unused=True, retain_graph=True)
            own: Scores = {}
            for (node, value, axis), gradient in zip(masks, found, strict=True):
                for dim in places[node, value][axis] if gradient is not None else ():
                    part = on_dim(self.graph.axes.of[value][axis], dim, gradient.double().numpy())
                    own[dim] = own.get(dim, 0) + part
            for dim, part in own.items():
                totals[dim] += part**2
        return {dim: total / max(1, count) for dim, total in totals.items()}

    # -- sums over slices ----------------------------------------------------------------------------------------------

    def _products(self) -> dict[Parameter, torch.Tensor]:
        found = batch_gradients(self.graph, self.parameters, self.batches, self.loss, self.seed)
        return {p: p.tensor.detach().double() * g.double() for p, g in found.items()}

    def _hessian_products(self) -> dict[Parameter, torch.Tensor]:
        found = hessian_products(self.graph, self.parameters, self.batches, self.loss, self.seed)
        return {p: p.tensor.detach().double() * g.double() for p, g in found.items()}

    def _sums(self, elements: Elements) -> MemberScores:
        """The sums of elements over the slice of each index, for each member; zeros where there are no elements."""
        sums: dict[tuple[Parameter, int], np.ndarray] = {}
        found: MemberScores = {}
        for group in self.groups:
            found[group.dim] = []
            for parameter, axis in scored_members(group):
                axes, own = self.graph.axes.of[parameter], elements.get(parameter)
                if group.majors:
                    dims = (*group.majors, group.dim)
                    found[group.dim].append(np.zeros(group.choices) if own is None else summed(axes, axis, dims, own))
                    continue
                if (parameter, axis) not in sums:
                    sums[parameter, axis] = _along(own, axis, int(parameter.shape[axis]))
                found[group.dim].append(on_dim(axes[axis], group.dim, sums[parameter, axis]))
        return found

    def _summed(self, elements: Elements) -> Scores:
        return {dim: np.sum(m, axis=0) for dim, m in self._sums(elements).items() if m}

    def _mean_over_examples(self, of: Callable[[MemberScores], MemberScores]) -> MemberScores:
        total: MemberScores = {}
        count = 0
        for gradients in example_gradients(self.graph, self.parameters, self.batches, self.loss, self.seed):
            count += 1
            products = {p: p.tensor.detach().double() * g.double() for p, g in gradients.items()}
            for dim, members in of(self._sums(products)).items():
                before = total.get(dim, [0.0] * len(members))
                total[dim] = [old + new for old, new in zip(before, members, strict=True)]
        return _mapped(lambda part: part / max(1, count), total)

    def _first(self, found: MemberScores) -> Scores:
        empty: dict[Dim, list[Any]] = {group.dim: [np.zeros(group.choices)] for group in self.groups}
        return {dim: (found.get(dim) or empty[dim])[0] for dim in empty}


def _along(elements: torch.Tensor | None, axis: int, size: int) -> np.ndarray:
    if elements is None:
        return np.zeros(size)
    others = [other for other in range(elements.dim()) if other != axis]
    found: np.ndarray = (elements.double().sum(others) if others else elements.double()).numpy()
    return found


def _mapped(function: Callable[[np.ndarray], np.ndarray], members: MemberScores) -> MemberScores:
    return {dim: [function(part) for part in parts] for dim, parts in members.items()}


def _mean_of_shares(proxies: Sequence[Scores]) -> Scores:
    """The mean of several scores, each divided by what it sums to over all Dims."""
    wholes = [sum(float(np.abs(part).sum()) for part in proxy.values()) or 1.0 for proxy in proxies]
    dims = proxies[0]
    return {
        dim: np.mean([normalised(p[dim] / whole, "none") for p, whole in zip(proxies, wholes, strict=True)], axis=0)
        for dim in dims
    }


def _mask_places(graph: Graph, dims: Sequence[Dim]) -> dict[tuple[Node, Value], dict[int, list[Dim]]]:
    """Where nodes read each Dim to bring its indices together: node and operand, and the Dims on each of its axes."""
    wanted, met = set(dims), set[Dim]()
    found: dict[tuple[Node, Value], dict[int, list[Dim]]] = {}
    for node, call in graph.axes.calls.items():
        read = {dim for role, extent in call.roles if role in _READ for dim in leaves(extent)} & wanted
        for value in {value for _, value in node.operands()} if read else ():
            if _is_computed(value):
                _enter(found, graph, node, value, read, met)
    for node in graph.nodes:
        for value in node.outputs:
            rest = {dim for extent in graph.axes.of[value] for dim in leaves(extent)} & (wanted - met)
            for user in value.consumers() if rest and _is_computed(value) else ():
                _enter(found, graph, user, value, rest, met)
    return found


def _enter(
    found: dict[tuple[Node, Value], dict[int, list[Dim]]],
    graph: Graph,
    node: Node,
    value: Value,
    dims: set[Dim],
    met: set[Dim],
) -> None:
    for axis, extent in enumerate(graph.axes.of[value]):
        own = [dim for dim in dict.fromkeys(leaves(extent)) if dim in dims]
        if own:
            found.setdefault((node, value), {}).setdefault(axis, []).extend(own)
            met.update(own)


def _is_computed(value: Value) -> bool:
    real = isinstance(value.dtype, torch.dtype) and value.dtype.is_floating_point
    return real and not isinstance(value, Parameter)
