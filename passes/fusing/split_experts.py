"""``split-experts``: a dense hidden layer as experts, of which a router runs a few for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from regauge.ir.edit import Builder, record, remove_dead, replace_uses
from regauge.ir.errors import PassError
from regauge.ir.graph import Graph, Parameter, Value
from regauge.ir.running.lockstep import Lockstep
from regauge.ir.sizes.expressions import product
from regauge.passes.base import GIVE_DATA, Context, Contract, Cut, Pass
from regauge.passes.calibration.batches import calibration_batches, examples_in
from regauge.passes.calibration.layers import Layer
from regauge.passes.depth.scores import Judge
from regauge.passes.fusing.hidden_layers import HiddenLayer, hidden_layers
from regauge.passes.name_patterns import check_patterns, matches
from regauge.passes.options import option

_ROWS = 2048  # that units are clustered by
_ROUNDS = 20  # of balanced k-means
_TURNS = 3  # of routers and means
_RIDGE = 1e-3  # of the mean square of an input, for routers


@dataclass(frozen=True, kw_only=True)
class SplitExperts(Pass):
    """Split the units of dense hidden layers into experts, and let a router choose which of them run for a row.

    before  y = down(act(up(x)))
    after   y = sum over the experts e that router(x) is greatest of   down_e(act(up_e(x)))    + what the others mean

    Units that are active together make one expert (Zhang et al. 2022, MoEfication, section 3.2; Cai et al. 2024,
    Read-ME, section 3.1, by domains of data): balanced k-means on the sizes of what units add to the result, row by
    row. The router is linear in what the hidden layer reads, in closed form: least squares for the size of what each
    expert adds; an expert that does not run adds the mean of what it would add on such rows. With as many active as
    there are experts the network computes what it did. Known deviations from Read-ME: it trains routers, which look
    ahead, and experts by gradients; there is no fine-tuning here.
    """

    name: ClassVar[str] = "split-experts"
    contract: ClassVar[Contract] = "approximate"
    solves: ClassVar[bool] = True
    wants_layers: ClassVar[bool] = True

    experts: int = option(8, "into how many experts each hidden layer is split", at_least=2)
    active: int = option(4, "how many of them run for a row", at_least=1)
    include: tuple[str, ...] = option((), "globs on names of the weights behind hidden units: only these")
    exclude: tuple[str, ...] = option((), "globs on names of the weights behind hidden units: not these")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active > self.experts:
            raise PassError(
                f"split-experts: {self.active} of {self.experts} experts cannot run: active={self.experts} at most"
            )

    def call(self, graph: Graph, context: Context) -> Graph:
        if context.data is None:
            raise PassError(f"split-experts needs data: {GIVE_DATA}")
        result = graph.copy()
        hidden = self._chosen(result, context)
        if not hidden:
            if not context.left:
                context.left["no hidden layer of free units was found"] += 1
            return graph
        batches = calibration_batches(graph, context)
        judge = Judge(graph, batches, "distortion", healed=False, by=self.name)
        for own, rows in _inputs(result, hidden, batches):
            parts = split(own, rows, self.experts, self.active)
            write_experts(result, own, parts, self.active, by=self.name)
            context.cuts.append(Cut(f"{own.down.weight.name}: experts that run", self.experts, self.active))
        remove_dead(result)
        context.note(f"split on {sum(map(examples_in, batches))} examples")
        context.note(f"error of the outputs, as a share of their squares: {judge.error(result):.3g}")
        return result

    def _chosen(self, graph: Graph, context: Context) -> list[HiddenLayer]:
        found = hidden_layers(graph, context.left)
        names = [name for own in found for name in own.down.weight.names]
        check_patterns("include", self.include, names, what="weight behind hidden units")
        check_patterns("exclude", self.exclude, names, what="weight behind hidden units")
        chosen = []
        for own in found:
            if own.units % self.experts:
                context.left[f"its units are not a multiple of {self.experts}"] += 1
            elif self.include and not matches(own.down.weight.names, self.include):
                context.left["not included"] += 1
            elif matches(own.down.weight.names, self.exclude):
                context.left["excluded"] += 1
            else:
                chosen.append(own)
        return chosen


@dataclass(frozen=True)
class Experts:
    """``order`` of the units, those of each expert together; ``router`` [experts, inputs + 1], the last its bias;
    ``means`` [experts, outputs], what each expert would add where it does not run, in the mean."""

    order: torch.Tensor
    router: torch.Tensor
    means: torch.Tensor


def _inputs(graph: Graph, hidden: Sequence[HiddenLayer], batches: Sequence[Any]) -> list[tuple[HiddenLayer, _Rows]]:
    """What hidden layers read and what their units are, [rows, ...], in double precision."""
    found = []
    waiting = {own.down.node: own for own in hidden}
    run = Lockstep(graph, batches)
    sources = {own.source: own for own in hidden}
    read: dict[HiddenLayer, torch.Tensor] = {}
    for node in run.steps():
        if node in {layer.node for own in hidden for layer in own.ups}:
            own = sources[node.inputs[0]]  # type: ignore[index]
            read.setdefault(own, _flat(run.values(own.source)))
        if node in waiting:
            own = waiting[node]
            found.append((own, _Rows(read.pop(own), _flat(run.values(node.inputs[0])))))
        run.execute(node)
    return found


@dataclass(frozen=True)
class _Rows:
    read: torch.Tensor
    units: torch.Tensor


def _flat(values: Sequence[Any]) -> torch.Tensor:
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values]).double()


def split(own: HiddenLayer, rows: _Rows, experts: int, active: int) -> Experts:
    """Which units make an expert, and the router.

    Router and means are found in turns, from means of zero on: which rows an expert does not run for hangs on the one,
    how much it adds besides on the other. The pair that loses least counts.
    """
    down = own.down.matrix(own.down.weight.tensor.detach()).double()  # [outputs, units]
    step = -(-len(rows.units) // _ROWS)
    sizes = rows.units[::step].abs() * down.norm(dim=0)  # [rows, units]
    order = _clustered(sizes.t(), experts)
    parts = order.reshape(experts, -1)
    added = torch.stack([rows.units[:, part] @ down[:, part].t() for part in parts])  # [experts, rows, outputs]
    x = torch.cat([rows.read, torch.ones_like(rows.read[:, :1])], 1)
    gram = x.t() @ x
    gram.diagonal()[:-1].add_(_RIDGE * float(gram.diagonal()[:-1].mean()))
    means, found = torch.zeros_like(added[:, 0]), list[tuple[float, Experts]]()
    for _ in range(_TURNS):
        wanted = (added - means[:, None]).norm(dim=2).t()  # [rows, experts]
        router = torch.linalg.solve(gram, x.t() @ wanted).t()
        idle = torch.ones(len(x), experts, dtype=torch.bool)
        idle.scatter_(1, (x @ router.t()).topk(active, dim=1).indices, value=False)
        count = idle.sum(0)[:, None]
        means = torch.where(count > 0, torch.einsum("ero,re->eo", added, idle.double()) / count.clamp(min=1), 0.0)
        missing = torch.einsum("ero,re->ro", added - means[:, None], idle.double())
        found.append((float(missing.square().sum()), Experts(order, router, means)))
    return min(found, key=lambda pair: pair[0])[1]


def _clustered(features: torch.Tensor, count: int) -> torch.Tensor:
    """The order [units] in which units of ``count`` clusters of one size lie together, by the cosines of features.

    Balanced k-means (Malinen and Fränti 2014): units are assigned to places of clusters, so many in each.
    """
    from scipy.optimize import linear_sum_assignment

    units = torch.nn.functional.normalize(features - features.mean(1, keepdim=True), dim=1)
    size = len(units) // count
    centres = [units[0]]
    for _ in range(1, count):  # one after the other the unit that is least like all centres so far
        centres.append(units[int((units @ torch.stack(centres).t()).amax(1).argmin())])
    found, places = torch.stack(centres), torch.arange(len(units)) // size
    labels = None
    for _ in range(_ROUNDS):
        like = units @ torch.nn.functional.normalize(found, dim=1).t()
        chosen = places[torch.from_numpy(linear_sum_assignment(-like[:, places].numpy())[1])]
        if labels is not None and bool((chosen == labels).all()):
            break
        labels = chosen
        found = torch.stack([units[labels == cluster].mean(0) for cluster in range(count)])
    assert labels is not None
    return labels.argsort(stable=True)


# -- writing -----------------------------------------------------------------------------------------------------------


def write_experts(graph: Graph, own: HiddenLayer, parts: Experts, active: int, *, by: str) -> None:
    """Let a hidden layer run as experts: rows are repeated for each of their experts, and sorted by these."""
    down, count = own.down, len(parts.router)
    build, writer = Builder(graph, by=by), _Writer(own, parts)
    stem = down.weight.name.removesuffix(".weight")
    with build.at(down.node):
        outside = down.node.scope
        build.scope = outside[:-1] if outside and outside[-1][0] == stem else outside
        leading = own.source.shape[:-1]
        width, rows = own.source.shape[-1], product(leading)
        x = build.reshape(own.source, shape=(rows, width))
        names = ("weight", "bias")
        router = [writer.weight(build, f"{stem}_router.{n}", t) for n, t in zip(names, writer.router, strict=True)]
        _, chosen = build.topk(build.linear(x, *router), k=active, dim=1)
        experts, order = build.sort(build.reshape(chosen, shape=(rows * active,)), dim=0, stable=True)
        mine = build.index_select(x, build.div(order, active, rounding_mode="floor"), dim=0)
        numbers = build.constant(torch.arange(count)[:, None], f"{stem}_experts")
        each = build.cast(build.eq(numbers, build.reshape(experts, shape=(1, rows * active))), dtype=torch.int32)
        ends = build.cast(build.cumsum(build.sum(each, dims=(1,)), dim=0), dtype=torch.int32)
        held: dict[Value, Value] = {}
        for layer in own.ups:
            y = build.grouped_mm(mine, writer.stacked_ups(build, layer), ends)
            if layer.bias is not None:
                y = build.add(
                    y, build.index_select(writer.biases(build, layer.bias, _stem(layer.weight)), experts, dim=0)
                )
            held[layer.node.output] = y
        for node in own.between:
            for _, bias in node.operands():
                if isinstance(bias, Parameter):
                    held[bias] = build.index_select(writer.biases(build, bias, _stem(bias)), experts, dim=0)
            operands = [held[o] if isinstance(o, Value) else o for o in node.inputs]
            held[node.output] = build(node.op, *operands, **node.attributes)
        hidden = down.node.inputs[0]
        assert isinstance(hidden, Value)
        y = build.grouped_mm(held[hidden], writer.stacked_down(build), ends)
        y = build.sub(y, build.index_select(writer.weight(build, f"{stem}_means", parts.means), experts, dim=0))
        _, back = build.sort(order, dim=0, stable=True)
        y = build.reshape(build.index_select(y, back, dim=0), shape=(rows, active, down.outputs))
        y = build.add(build.sum(y, dims=(1,)), writer.weight(build, f"{stem}_mean", writer.mean))
        y = build.reshape(y, shape=(*leading, down.outputs), name=down.node.output.name)
    replace_uses(graph, down.node.output, y)
    record(graph, by, f"{down.weight.name}: {active} of {count} experts")


class _Writer:
    """The weights of experts, in the types of those that they come from."""

    def __init__(self, own: HiddenLayer, parts: Experts) -> None:
        self.own, self.parts = own, parts
        self.router = parts.router[:, :-1], parts.router[:, -1]
        bias = own.down.bias
        self.mean = parts.means.sum(0) + (0 if bias is None else bias.tensor.detach().double())

    def weight(self, build: Builder, name: str, data: torch.Tensor) -> Value:
        like = self.own.down.weight
        assert isinstance(like.dtype, torch.dtype)
        kept = data.to(like.dtype).contiguous()
        return build.parameter(build.unique(name), kept, like.kind, trainable=like.trainable)

    def _parts(self, tensor: torch.Tensor) -> torch.Tensor:
        """[experts, units of each, ...] of [units, ...]."""
        return tensor.detach()[self.parts.order].reshape(len(self.parts.router), -1, *tensor.shape[1:])

    def stacked_ups(self, build: Builder, layer: Layer) -> Value:
        return self.weight(build, f"{_stem(layer.weight)}_experts", self._parts(layer.matrix(layer.weight.tensor)).mT)

    def biases(self, build: Builder, bias: Parameter, stem: str) -> Value:
        return self.weight(build, f"{stem}_biases", self._parts(bias.tensor))

    def stacked_down(self, build: Builder) -> Value:
        down = self.own.down
        return self.weight(build, f"{_stem(down.weight)}_experts", self._parts(down.matrix(down.weight.tensor).t()))


def _stem(weight: Value) -> str:
    return weight.name.removesuffix(".weight")
