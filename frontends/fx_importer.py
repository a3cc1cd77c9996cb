"""Imports one traced fx graph of ATen calls node by node: records, opaque calls, writes, sizes, nested graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from regauge.frontends.aliasing import Aliases, NeedsDecomposition, inverse_view, writes, written_nodes
from regauge.frontends.aten_call import Emitted, Refusal, Truth, emit_call, emit_opaque, target_path
from regauge.frontends.in_place import copied, functional_form
from regauge.frontends.provenance import scope_of, source_of
from regauge.frontends.traced_sizes import TracedBuilder
from regauge.ir.errors import CaptureError, RegaugeError
from regauge.ir.graph import Value
from regauge.ir.sizes.expressions import symbol
from regauge.ir.sizes.symints import plain_sympy

# These check or annotate; they compute nothing.
_SILENT = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "_print",
           "sym_constrain_range_for_size", "_assert_not_none"}  # fmt: skip
# Arithmetic on sizes: over a number that data decides it is computed, by these records.
_ARITHMETIC: dict[Any, Callable[..., Value]] = {
    operator.add: lambda build, a, b: build.add(a, b),
    operator.sub: lambda build, a, b: build.sub(a, b),
    operator.mul: lambda build, a, b: build.mul(a, b),
    operator.neg: lambda build, a: build.neg(a),
    operator.mod: lambda build, a, b: build.remainder(a, b),
    operator.floordiv: lambda build, a, b: build.div(a, b, rounding_mode="floor"),
}
# These give their first argument as it is. Writes into them are writes into it.
_SAME = {"lift_fresh_copy", "lift_fresh", "lift", "detach", "detach_", "alias", "requires_grad_"}


@dataclass
class Trail:
    """What an import leaves behind beside the graph: refusals, and which traced node each value stands for."""

    refusals: list[Refusal] = field(default_factory=list)
    pairs: list[tuple[fx.Node, Value]] = field(default_factory=list)


class Importer:
    """Imports one fx graph (of a program or of a region) into the graph of ``build``.

    ``avoid`` names operators (as ``aten.add.Tensor``) whose records are not to be used.
    """

    def __init__(
        self, build: TracedBuilder, module: fx.GraphModule, trail: Trail, avoid: Mapping[str, str] | None = None
    ) -> None:
        self.build = build
        self.module = module
        self.trail = trail
        self.avoid = dict(avoid or {})
        _refuse_mapped(module.graph)
        self.aliases = Aliases(module.graph)
        self.env: dict[fx.Node, Any] = {}

    # -- values ------------------------------------------------------------------------------------------------------

    def bind(self, node: fx.Node, value: Any) -> None:
        self.env[node] = value
        if self.aliases.active:
            self.aliases.fresh(node)
        fake = node.meta.get("val")
        if isinstance(value, Value) and isinstance(fake, torch.Tensor):
            self.build.remember(value, fake)

    def read(self, node: fx.Node) -> Any:
        """What a node stands for now: if its memory was written since, it is computed again from the new value."""
        if self.aliases.active and self.aliases.stale(node) and node in self.aliases.parent:
            if writes(node) or self._is_same(node):
                self.bind(node, self.read(self.aliases.parent[node]))
            else:
                self._compute(node)
        if node not in self.env:
            raise CaptureError(f"the exported program reads {node.name}, which it never computes")
        return self.env[node]

    def argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.read(value)
        if isinstance(value, list | tuple):
            return [self.argument(part) for part in value]
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, torch.SymInt):
            return self.build.sizes.of(value)
        return value

    def truth(self, val: Any) -> Truth:
        parts = val if isinstance(val, list | tuple) else [val]
        return [
            (self.build.sizes.shape(part), part.dtype) if isinstance(part, torch.Tensor) else None for part in parts
        ]

    # -- nodes -------------------------------------------------------------------------------------------------------

    def run(self) -> list[Any]:
        """Import every node; returns what the output node returns (placeholders must have been bound)."""
        for position, node in enumerate(self.module.graph.nodes):
            self.aliases.now = position
            if node.op == "output":
                returned = node.args[0]
                return [
                    self.argument(part) for part in (returned if isinstance(returned, list | tuple) else [returned])
                ]
            if node.op == "get_attr":
                self._attribute(node)
            elif node.op == "call_function":
                self._place(node)
                self._compute(node)
        raise CaptureError("the exported program has no output node")

    def _place(self, node: fx.Node) -> None:
        scope = scope_of(node.meta)
        if scope or not node.meta.get("nn_module_stack"):
            self.build.scope = scope or self.build.scope
        self.build.source = source_of(node.meta) or self.build.source

    def _attribute(self, node: fx.Node) -> None:
        found: Any = self.module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if isinstance(found, torch.Tensor):
            found = self.build.constant(found.detach(), str(node.target))
        self.bind(node, found)

    def _is_same(self, node: fx.Node) -> bool:
        schema = getattr(node.target, "_schema", None)
        return schema is not None and schema.name.removeprefix("aten::") in _SAME

    def _compute(self, node: fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        if node.target is operator.getitem and isinstance(self.read(node.args[0]), list):  # type: ignore[arg-type]
            self._getitem(node)
        elif schema is None:
            self._without_schema(node)
        elif schema.name.partition("::")[2] in _SILENT:
            return
        elif self._is_same(node):
            self.bind(node, self.argument(node.args[0]))
        elif isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool | int | float | bool):
            self._number(node)
        elif writes(node):
            self._write(node)
        else:
            self._bind_results(node, self.emit(node.target, *self._arguments(node), node.meta.get("val")))

    def _arguments(self, node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
        return [self.argument(a) for a in node.args], {k: self.argument(v) for k, v in node.kwargs.items()}

    def _getitem(self, node: fx.Node) -> None:
        whole, index = self.argument(node.args[0]), node.args[1]
        if whole[index] is None and node.users and isinstance(node.meta.get("val"), torch.Tensor):
            raise CaptureError(f"{node.args[0]} at {self.build.source} has no result {index} in its operator record")
        self.bind(node, whole[index])

    def _bind_results(self, node: fx.Node, results: Emitted) -> None:
        if isinstance(node.meta.get("val"), list | tuple):
            self.bind(node, results)
            return
        self.bind(node, results[0])
        if isinstance(results[0], Value):
            self.trail.pairs.append((node, results[0]))

    def emit(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any], val: Any) -> Emitted:
        """Nodes for a call: by its record, else opaque."""
        truth = self.truth(val)
        path = target_path(target)
        try:
            if path in self.avoid:
                raise RegaugeError(self.avoid[path])
            results = emit_call(self.build, target, args, kwargs, truth)
            self._require_used(results, truth)
            return results
        except RegaugeError as error:
            self.trail.refusals.append(Refusal(path, self.build.source, str(error)))
            return emit_opaque(self.build, target, args, kwargs, truth)

    def _require_used(self, results: Emitted, truth: Truth) -> None:
        if len(truth) == 1 and truth[0] is not None and results[0] is None:
            raise RegaugeError("its record gives no result")

    # -- writes ------------------------------------------------------------------------------------------------------

    def _write(self, node: fx.Node) -> None:
        """An operator that writes into an argument: its functional form, and a new value for what it wrote into."""
        written = written_nodes(node)
        args, kwargs = self._arguments(node)
        source = copied(self.build, node.target, args, written)
        form = functional_form(node.target, args, kwargs) if len(written) == 1 else None
        if source is not None or form is not None:
            value = source if form is None or source is not None else self.emit(*form, node.meta["val"])[0]
            self._bind_results(node, [value])
            self._written(written[0], value)
            return
        truth = self.truth(node.meta.get("val"))
        results = emit_opaque(self.build, node.target, args, kwargs, truth)
        self.trail.refusals.append(Refusal(target_path(node.target), self.build.source, "it writes into its arguments"))
        self._bind_results(node, results[: len(truth)])
        for target, value in zip(written, results[len(truth) :], strict=True):
            self._written(target, value)

    def _written(self, node: fx.Node, value: Any) -> None:
        self.env[node] = value

        def scatter(parent: fx.Node, child: fx.Node) -> None:
            call = inverse_view(child, parent, child, parent.meta["val"].shape)
            if call is None:
                self.env[parent] = self.env[child]
                return
            base = self.env[parent] if parent not in self.aliases.parent else self.read(parent)
            known = {parent: base, child: self.env[child]}
            target, given = call
            args = [known[a] if isinstance(a, fx.Node) and a in known else self.argument(a) for a in given]
            self.env[parent] = self.emit(target, args, {}, parent.meta["val"])[0]

        self.aliases.write(node, scatter)

    # -- numbers and higher-order operators --------------------------------------------------------------------------

    def _number(self, node: fx.Node) -> None:
        """A size or another number: an expression over the symbols, or a computed scalar where data decides it."""
        val = node.meta["val"]
        if isinstance(val, bool | int | float):
            self.bind(node, val)
            return
        if isinstance(val, torch.SymInt):
            self.build.sizes.of(val)  # what data decides is known by its symbol from here on
        args, kwargs = self._arguments(node)
        computed = [a for a in (*args, *kwargs.values()) if isinstance(a, Value)]
        from_data = any(str(s).startswith(("u", "zuf")) for s in val.node.expr.free_symbols)
        is_size = isinstance(val, torch.SymInt) and (not from_data or _reads_shape(node))
        if computed and not is_size and hasattr(node.target, "_schema"):
            self.bind(node, self._scalar(node, args, kwargs))
        elif computed and not is_size and node.target in _ARITHMETIC:
            self.bind(node, _ARITHMETIC[node.target](self.build, *args))
        elif isinstance(val, torch.SymInt):
            self.bind(node, self.build.sizes.of(val))
        else:
            self.bind(node, self._expression(val))

    def _scalar(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Value | None:
        dtype = {torch.SymInt: torch.int64, torch.SymBool: torch.bool}.get(type(node.meta["val"]), torch.float64)
        if target_path(node.target).startswith(("aten.item", "aten._local_scalar_dense")):
            return args[0]  # type: ignore[no-any-return]
        return emit_opaque(self.build, node.target, args, kwargs, [((), dtype)])[0]

    def _expression(self, val: Any) -> Any:
        expression = val.node.expr
        if isinstance(expression, bool) or not isinstance(expression, sympy.Basic):
            return expression
        for inner in expression.free_symbols:
            self.build.sizes.names.setdefault(inner, symbol(str(inner)))
        return plain_sympy(expression).subs(self.build.sizes.names, simultaneous=True)

    def _without_schema(self, node: fx.Node) -> None:
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            val = node.meta.get("val")
            if val is None or not isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool | bool | int | float):
                name = getattr(node.target, "__name__", node.target)
                if isinstance(val, torch.Tensor | list | tuple):
                    raise CaptureError(f"the program calls {name}, which is no torch operator, at {self.build.source}")
                return  # bookkeeping of a tracer
            self._number(node)
            return
        from regauge.frontends.higher_order import import_higher_order

        import_higher_order(self, node)


def _reads_shape(node: fx.Node) -> bool:
    """Whether a node reads a size off a tensor (``sym_size``, ``sym_numel``), which that tensor then shows."""
    return hasattr(node.target, "_schema") and target_path(node.target).startswith("aten.sym_")


def _refuse_mapped(graph: fx.Graph) -> None:
    """Raises NeedsDecomposition where a program holds the body of a torch.vmap, on tensors with a hidden axis."""
    if any(getattr(node.target, "__module__", None) == "torch._functorch.predispatch" for node in graph.nodes):
        raise NeedsDecomposition("it maps a function over an axis by torch.vmap")
