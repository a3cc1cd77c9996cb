"""Repairing what a removal did, in closed form: layers are refitted so that the residual stream comes back.

Both graphs, the original and the one without parts, run side by side on the data, and the layers that are left are
solved one after the other, in the order of the graph, by least squares on their present inputs X:

    a layer that writes into a sum     |s - t - X W'|^2,  s the sum in the original, t the other addends as they are now
    any other layer behind a removal   |y - X W'|^2,      y what it gave in the original

The stream in front of a removed part stands for the one behind it: the last layer before the part takes over what the
part added, as far as its inputs tell, and each later branch adds what is still missing (the reconstruction of He et al.
2017, section 3.3, along the whole depth). No gradients are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from regauge.ir.edit import set_weight
from regauge.ir.graph import Graph, Node, Parameter, Value
from regauge.ir.running.lockstep import Lockstep
from regauge.passes.calibration.layers import Layer, layer_of
from regauge.passes.calibration.moments import Moments, least_squares
from regauge.passes.calibration.row_samples import add_sample
from regauge.passes.depth.branches import is_sum
from regauge.passes.depth.routes import Route, route_of

RIDGE = 3e-2  # share of the mean square of a column
ROWS = 256  # per column of a layer's matrix: as many are looked at, drawn from all that the data gives


def heal(
    original: Graph,
    reduced: Graph,
    moved: Mapping[Value, Value],
    batches: Sequence[Any],
    *,
    by: str,
    rows_per_column: int = ROWS,
    changed: Collection[Value] = (),
) -> int:
    """Refit the layers of ``reduced``, which is changed; returns how many.

    ``moved`` says for each value of ``original`` what it is in ``reduced``, as
    :func:`regauge.passes.depth.removal.without` does. Layers without such a value are new, and stay as they are;
    ``changed`` are values of ``reduced`` that are computed in another way. Memory: what the two graphs hold of all
    batches at a time.
    """
    twins = Twins(original, reduced, moved, by)
    run = _Healing(original, reduced, twins, batches, by, rows_per_column, changed)
    run.run()
    return run.refitted


class Twins:
    """For each value of the reduced graph the value of the original that it was, and the one that it stands for.

    These differ in front of what was removed. Where the value is a function of one value (an activation, a norm), that
    one stands for the operand of the same function; a norm then takes the weights of the one that it stands for.
    """

    def __init__(self, original: Graph, reduced: Graph, moved: Mapping[Value, Value], by: str) -> None:
        self.was: dict[Value, Value] = {}
        self.wanted: dict[Value, Value] = {}
        place = {value: at for at, value in enumerate(v for node in original.nodes for v in node.outputs)}
        for old, new in sorted(moved.items(), key=lambda pair: place.get(pair[0], -1)):
            self.was.setdefault(new, old)
            self.wanted[new] = old
        for node in reversed(reduced.nodes):
            if len(node.outputs) == 1 and self.stands_in(node.output):
                self._follow(reduced, node, by)

    def stands_in(self, value: Value) -> bool:
        """Whether a value stands for another one than it was."""
        return value in self.was and self.wanted[value] is not self.was[value]

    def _follow(self, reduced: Graph, node: Node, by: str) -> None:
        other = self.wanted[node.output].producer
        source = node.inputs[0] if node.inputs else None
        if other is None or other.op != node.op or other.attributes != node.attributes or is_sum(node):
            return
        if not isinstance(source, Value) or not isinstance(other.inputs[0], Value) or len(source.uses) != 1:
            return
        if source.producer is None or not is_sum(source.producer):
            return
        pairs = list(zip(node.inputs[1:], other.inputs[1:], strict=False))
        if len(node.inputs) != len(other.inputs) or not all(self._may_take(a, b) for a, b in pairs):
            return
        self.wanted[source] = other.inputs[0]
        for own, its in pairs:
            if isinstance(own, Parameter) and isinstance(its, Parameter) and self.was[own] is not its:
                set_weight(reduced, own, its.weight, by=by)

    def _may_take(self, own: Any, its: Any) -> bool:
        if isinstance(own, Parameter) and isinstance(its, Parameter):
            same = own.shape == its.shape and own.dtype == its.dtype
            return self.was.get(own) is its or (same and len(own.uses) == 1)
        return not isinstance(own, Value) and not isinstance(its, Value) and own == its


class _Healing:
    def __init__(
        self,
        original: Graph,
        reduced: Graph,
        twins: Twins,
        batches: Sequence[Any],
        by: str,
        rows_per_column: int,
        changed: Collection[Value],
    ) -> None:
        self.changed = changed
        self.rows_per_column = rows_per_column
        self.reduced, self.twins, self.by = reduced, twins, by
        self.before, self.now = Lockstep(original, batches), Lockstep(reduced, batches)
        self._ahead = self.before.steps()
        self.drifted: set[Value] = set()
        self.refitted = 0

    def run(self) -> None:
        for node in self.now.steps():
            layer = layer_of(node)
            if layer is not None and node.output in self.twins.was:
                targets = self._targets(layer)
                if targets is not None:
                    self._refit(layer, targets)
            self.now.execute(node)
            self._note_drift(node)

    def _note_drift(self, node: Node) -> None:
        read = [value for _, value in node.operands()]
        for value in node.outputs:
            if value in self.changed or any(v in self.drifted for v in read) or self.twins.stands_in(value):
                self.drifted.add(value)

    # -- what a layer should give --------------------------------------------------------------------------------------

    def _targets(self, layer: Layer) -> Sequence[torch.Tensor] | None:
        """What the layer should give, for each batch; None where it stays as it is."""
        node = layer.node
        source = node.inputs[0]
        route = route_of(node, self._is_known)
        changed = source in self.drifted
        if route is not None:
            changed |= self.twins.stands_in(route.sum.output) or any(other in self.drifted for other in route.others)
        if not changed:
            return None
        given = self._originals(self.twins.was[node.output])
        if given is None or route is None:
            return given
        lost = self._lost(route)
        if lost is None:
            return given
        return [y + part for y, part in zip(given, route.back(lost, self.now.values), strict=True)]

    def _lost(self, route: Route) -> list[torch.Tensor] | None:
        """What the sum lacks when the layer's branch gives what it gave: the wanted sum less all addends."""
        branch = self._originals(self.twins.was[route.entry])
        wanted = self._originals(self.twins.wanted[route.sum.output])
        if branch is None or wanted is None:
            return None
        others = zip(*(self.now.values(other) for other in route.others), strict=True)
        return [w - b - sum(parts) for w, b, parts in zip(wanted, branch, others, strict=True)]

    def _is_known(self, value: Value) -> bool:
        return value.producer is None or self.now.holds(value)

    def _originals(self, value: Value) -> Sequence[torch.Tensor] | None:
        """A value of the original graph, which runs on as far as needed; None where it has been dropped."""
        while not self._holds(value):
            node = next(self._ahead, None)
            if node is None:
                return None
            self.before.execute(node)
        return self.before.values(value)

    def _holds(self, value: Value) -> bool:
        return value.producer is None or self.before.holds(value)

    # -- refitting -----------------------------------------------------------------------------------------------------

    def _refit(self, layer: Layer, targets: Sequence[torch.Tensor]) -> None:
        weight = layer.matrix(layer.weight.tensor.detach()).double()
        bias = layer.bias.tensor.detach().double() if layer.bias is not None else weight.new_zeros(len(weight))
        found = Moments(weight.shape[1], len(weight))
        rows = self.rows_per_column * (weight.shape[1] + 1)
        add_sample(found, layer, self.now.values(layer.node.inputs[0]), targets, rows)
        found.check(layer.node.label)
        behind = _bias_behind(layer)
        free = layer.bias is not None or layer.norm is not None or behind is not None
        solved = least_squares(found, torch.cat([weight, bias[:, None]], 1), RIDGE, bias=free)
        set_weight(self.reduced, layer.weight, layer.stored(solved[:, :-1]), by=self.by)
        shift = solved[:, -1] - bias
        shifted = layer.shifted(shift) if behind is None else (behind, _plus(behind, shift))
        if shifted is not None:
            set_weight(self.reduced, *shifted, by=self.by)
        self.drifted.add(layer.node.output)
        self.refitted += 1


def _bias_behind(layer: Layer) -> Parameter | None:
    """The weight that is added to a layer without bias as a node of its own, and to nothing else."""
    users = list(layer.node.output.uses)
    if layer.bias is not None or len(users) != 1 or users[0][0].op != "add" or layer.node.op == "conv":
        return None
    add, slot = users[0]
    bias = add.inputs[1 - slot]
    if not isinstance(bias, Parameter) or len(bias.uses) != 1 or bias.kind != "parameter":
        return None
    return bias if bias.shape == (layer.outputs,) else None


def _plus(parameter: Parameter, shift: torch.Tensor) -> torch.Tensor:
    before = parameter.tensor.detach()
    return (before.double() + shift).to(before.dtype)
