"""From an ExportedProgram to a Graph, without decompositions: linear, layer_norm, attention and the like stay whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from regauge.frontends.dynamic import Requests, name_symbols
from regauge.frontends.fx_importer import Importer, Trail
from regauge.frontends.pytrees import Leaf
from regauge.frontends.traced_sizes import TracedBuilder, TracedSizes
from regauge.ir.edit import remove_dead
from regauge.ir.errors import CaptureError
from regauge.ir.folding.fold import fold_constants
from regauge.ir.graph import Graph, Parameter, State, Value


@dataclass(frozen=True)
class Imported:
    """A graph, and what the import left beside it."""

    graph: Graph
    trail: Trail


def from_export(
    program: ExportedProgram,
    leaves: Sequence[Leaf],
    requests: Requests,
    *,
    name: str,
    avoid: Mapping[str, str] | None = None,
    fold: bool = True,
) -> Imported:
    """Import a program; ``leaves`` are the flattened inputs it was exported with, in order.

    Raises CaptureError for what no graph can say, NeedsDecomposition where ``program.run_decompositions({})`` is needed
    first. The program's tensors are shared, never written.
    """
    return _ProgramImport(program, leaves, requests, name, dict(avoid or {})).run(fold)


class _ProgramImport:
    def __init__(
        self, program: ExportedProgram, leaves: Sequence[Leaf], requests: Requests, name: str, avoid: dict[str, str]
    ) -> None:
        self.program = program
        self.leaves = leaves
        self.avoid = avoid
        self.nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
        self.inputs = self._inputs()
        names, ranges = name_symbols(self.inputs, requests)
        self.graph = Graph(name=name)
        self.graph.symbols = dict(ranges)
        self.build = TracedBuilder(self.graph, TracedSizes(names), _fake_mode(self.nodes.values()))
        self.trail = Trail()
        self.before: dict[fx.Node, Value] = {}  # what a placeholder stands for before the program writes into it
        self.importer = Importer(self.build, program.graph_module, self.trail, avoid)

    def _inputs(self) -> list[tuple[Leaf, fx.Node]]:
        """Tensor leaves with their placeholders."""
        user = [spec for spec in self.program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]
        if len(user) != len(self.leaves):
            given, wanted = len(self.leaves), len(user)
            raise CaptureError(f"the exported program takes {wanted} flattened inputs, the example inputs are {given}")
        pairs = [(leaf, self.nodes[spec.arg.name]) for leaf, spec in zip(self.leaves, user, strict=True)]
        return [(leaf, node) for leaf, node in pairs if isinstance(node.meta.get("val"), torch.Tensor)]

    def run(self, fold: bool) -> Imported:
        self._bind_parameters()
        self.before.update(self.importer.env)
        for leaf, node in self.inputs:
            val = node.meta["val"]
            self.before[node] = self.build.input(leaf.name, self.build.sizes.shape(val), val.dtype)
            self.importer.bind(node, self.before[node])
        for node in self.nodes.values():
            if node not in self.importer.env:
                self.importer.bind(node, node.meta.get("val"))
        self._finish(self.importer.run())
        if fold:
            remove_dead(self.graph, parameters=False)
            fold_constants(self.graph)
        return Imported(self.graph, self.trail)

    # -- parameters --------------------------------------------------------------------------------------------------

    def _bind_parameters(self) -> None:
        by_name = self._add_state()
        for spec in self.program.graph_signature.input_specs:
            if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
                self.importer.bind(self.nodes[spec.arg.name], by_name[str(spec.target)])
            elif spec.kind == InputKind.CONSTANT_TENSOR:
                tensor = self.program.constants[str(spec.target)]
                constant = self.build.constant(tensor.detach(), str(spec.target))
                self.importer.bind(self.nodes[spec.arg.name], constant)
            elif spec.kind not in (InputKind.USER_INPUT, InputKind.TOKEN):
                raise CaptureError(
                    f"the program needs {spec.target}, an object that is no tensor: pass tensors instead"
                )

    def _add_state(self) -> dict[str, Parameter]:
        """One Parameter per tensor of the state, under its first name; the other names of tied tensors are aliases."""
        fleeting = set(self.program.graph_signature.non_persistent_buffers)
        tensors = dict(self.program.state_dict)
        tensors |= {name: t for name, t in self.program.constants.items() if name in fleeting}
        shared: dict[Any, list[str]] = {}
        for name, tensor in tensors.items():
            shared.setdefault(_identity(tensor), []).append(name)
        result = {}
        for names in shared.values():
            first = tensors[names[0]]
            trained = isinstance(first, torch.nn.Parameter)
            parameter = self.build.parameter(
                names[0],
                first.detach(),
                "parameter" if trained else "buffer",
                aliases=names[1:],
                trainable=bool(first.requires_grad),
                persistent=any(name not in fleeting for name in names),
            )
            result.update(dict.fromkeys(names, parameter))
        return result

    # -- results -----------------------------------------------------------------------------------------------------

    def _finish(self, results: list[Any]) -> None:
        specs = self.program.graph_signature.output_specs
        for spec, value in zip(specs, results, strict=True):
            if spec.kind == OutputKind.USER_OUTPUT:
                self.graph.outputs.append(value)
            elif spec.kind == OutputKind.BUFFER_MUTATION:
                self._add_written(str(spec.target), self.graph.find(str(spec.target)), value)
            elif spec.kind == OutputKind.USER_INPUT_MUTATION:
                before = self.before[self.nodes[str(spec.target)]]
                self._add_written(before.name, before, value)
        aliases = self.importer.aliases
        for node in self.nodes.values():
            if aliases.version.get(node):
                before = self.before[node]
                self._add_written(before.name, before, self.importer.read(node))
        self._add_statistics()

    def _add_statistics(self) -> None:
        """A batch norm in training mode writes its running statistics, which torch.export does not call a mutation."""
        written = {state.before for state in self.graph.states}
        for node in self.graph.nodes:
            if node.op != "batch_norm" or len(node.outputs) != 3:
                continue
            for before, after in zip(node.inputs[3:5], node.outputs[1:], strict=True):
                if isinstance(before, Parameter) and before not in written:
                    written.add(before)
                    self.graph.states.append(State(before.name, before, after))

    def _add_written(self, name: str, before: Value, after: Any) -> None:
        if isinstance(before, Parameter) and before.kind == "parameter":
            raise CaptureError(
                f"the model writes into its parameter {name!r} while it runs: make it a buffer, or run the model once "
                f"before it is captured if it only prepares its weights"
            )
        if isinstance(after, Value):
            self.graph.states.append(State(name, before, after))


def _identity(tensor: torch.Tensor) -> Any:
    """Equal for names of one and the same tensor."""
    if tensor.numel() == 0:
        return id(tensor)
    try:
        where = tensor.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # sparse and opaque layouts have no storage
        return id(tensor)
    return where, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def _fake_mode(nodes: Any) -> Any:
    for node in nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    return None
