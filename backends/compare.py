"""Do two models compute the same? Graphs, torch modules, ONNX files and plain functions, in any combination."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Number
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from regauge.backends.run_onnxruntime import Session
from regauge.ir.errors import EquivalenceError, RegaugeError, first_line
from regauge.ir.graph import Graph, Value
from regauge.ir.printing.tables import format_table
from regauge.ir.running.interpret import describe, run
from regauge.ir.running.sample_inputs import fitting_inputs

Runner = Callable[[Any], Any]

_FLOATS = {"float": torch.float32, "double": torch.float64, "float16": torch.float16}


@dataclass(frozen=True)
class Difference:
    """How far two models are apart in one output; ``relative`` is to the greatest magnitude in the first model's."""

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The outputs of two models side by side; print it, or ask ``equal(tolerance)``."""

    outputs: tuple[Difference, ...]
    runs: int

    @property
    def absolute(self) -> float:
        """The greatest absolute difference of any output."""
        return max((output.absolute for output in self.outputs), default=0.0)

    @property
    def relative(self) -> float:
        """The greatest relative difference of any output."""
        return max((output.relative for output in self.outputs), default=0.0)

    def equal(self, tolerance: float = 1e-5) -> bool:
        """True if every output differs by at most ``tolerance``, relative to its greatest magnitude."""
        return self.relative <= tolerance

    def rows(self) -> list[list[str]]:
        """A header and one row per output."""
        rows = [["output", "shape", "max abs", "max rel", ""]]
        for output in self.outputs:
            shape = "x".join(map(str, output.shape)) or "scalar"
            rows.append([output.name, shape, f"{output.absolute:.2e}", f"{output.relative:.2e}", output.note])
        return rows

    def __str__(self) -> str:
        return "\n".join(format_table(self.rows()))


def compare(a: Any, b: Any, inputs: Any = None, *, seeds: Sequence[int] = (0,)) -> Comparison:
    """Run two models on the same inputs and measure how far their outputs are apart.

    ``a`` and ``b`` are each a Graph, an ``nn.Module`` (run in eval mode, which is put back), the path of an ONNX file
    (run in onnxruntime without its optimisations) or a function. ``inputs`` is one batch (a tensor, a tuple or list of
    tensors, or a mapping by name), or as for ``optimize(data=)`` an iterable of batches or a function that gives one: a
    list of tuples or mappings is one. Without it inputs are drawn for each of ``seeds`` from the signature of whichever
    model has one. Of each output the run in which it differs most counts.

        regauge.compare(model, graph, (images,)).equal(1e-5)
        regauge.compare(model, graph, [(images,), (other_images,)])

    Raises RegaugeError where a model cannot be run on the inputs, or none are given and none can be made up.
    """
    numbers = not any(isinstance(model, str | os.PathLike) for model in (a, b))  # no file has them among its outputs
    (run_a, names_a), (run_b, names_b) = _prepared(a, numbers), _prepared(b, numbers)
    batches = _batches(inputs) if inputs is not None else [_made_up(a, b, seed) for seed in seeds]
    worst: list[Difference] = []
    for batch in batches:
        arguments = (
            batch if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, list | tuple) else (batch,)
        )
        left, right = (_tensors(runner(arguments), numbers) for runner in (run_a, run_b))
        found = list(_differences(left, right, names_a or names_b))
        worst = found if not worst else [max(p, key=lambda d: d.relative) for p in zip(worst, found, strict=True)]
    return Comparison(tuple(worst), len(batches))


def check_equal(a: Any, b: Any, inputs: Any = None, *, tolerance: float = 1e-5) -> Comparison:
    """:func:`compare`, raising EquivalenceError where an output differs by more than ``tolerance``."""
    found = compare(a, b, inputs)
    if not found.equal(tolerance):
        worst = max(found.outputs, key=lambda output: output.relative)
        note = f" ({worst.note})" if worst.note else ""
        raise EquivalenceError(
            f"output {worst.name} differs by {worst.relative:.1e} of its range, {tolerance:g} allowed{note}"
        )
    return found


def _batches(inputs: Any) -> list[Any]:
    """The batches in what was given: itself, where it is one."""
    if callable(inputs) and not isinstance(inputs, torch.Tensor):
        inputs = inputs()
    if isinstance(inputs, Mapping | tuple) or hasattr(inputs, "shape"):
        return [inputs]
    if not isinstance(inputs, Iterable) or isinstance(inputs, str):
        raise RegaugeError(
            f"inputs are a {type(inputs).__name__}: give a tensor, a tuple or mapping of them, or batches"
        )
    batches = list(inputs)
    if isinstance(inputs, list) and not all(isinstance(batch, Mapping | tuple | list) for batch in batches):
        return [inputs]
    if not batches:
        raise RegaugeError(
            "inputs hold no batch: give a tensor, a tuple or mapping of tensors, or an iterable of these"
        )
    return batches


def _prepared(model: Any, numbers: bool) -> tuple[Runner, list[str]]:
    """How a model is run, and the names of its outputs where it has any."""
    if isinstance(model, Graph):
        return lambda inputs: run(model, inputs), output_names(model, numbers=numbers)
    if isinstance(model, torch.nn.Module):
        return lambda inputs: _run_module(model, inputs), []
    if isinstance(model, str | os.PathLike):
        session = Session(model, optimisation="off")
        return session.run, session.outputs
    if callable(model):
        return lambda inputs: model(**inputs) if isinstance(inputs, Mapping) else model(*inputs), []
    raise RegaugeError(
        f"a {type(model).__name__} cannot be run: give a Graph, an nn.Module, an ONNX path or a function"
    )


def output_names(graph: Graph, *, numbers: bool = False) -> list[str]:
    """Names of the outputs that are tensors, with ``numbers`` also of Python's; of what is no result there are none.

    Of a loaded graph they are those of the file's outputs: one may be a copy of another value, whose name it has not.
    """
    carried = graph.metadata.get("onnx")
    if carried is not None and len(carried.graph.outputs) == len(graph.outputs):
        return [output.name or f"output_{i}" for i, output in enumerate(carried.graph.outputs)]
    named = [(output, getattr(output, "name", f"output_{i}")) for i, output in enumerate(graph.outputs)]
    return [name for output, name in named if isinstance(output, Value) or (numbers and isinstance(output, Number))]


def _run_module(model: torch.nn.Module, inputs: Any) -> Any:
    with _evaluating(model), torch.no_grad():
        try:
            return model(**inputs) if isinstance(inputs, Mapping) else model(*inputs)
        except RegaugeError:
            raise
        except Exception as error:  # the user's own code
            reason = first_line(error)
            raise RegaugeError(f"{type(model).__name__} cannot be run on {describe(inputs)}: {reason}") from error


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while: a run in train mode would change the statistics of the user's BatchNorms."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _made_up(a: Any, b: Any, seed: int) -> Any:
    graph = next((model for model in (a, b) if isinstance(model, Graph)), None)
    if graph is not None:
        return tuple(fitting_inputs(graph, seed=seed))
    path = next((model for model in (a, b) if isinstance(model, str | os.PathLike)), None)
    if path is not None:
        return _made_up_for(Session(path, optimisation="off"), seed)
    raise RegaugeError(
        "no inputs are given, and neither model is a Graph or an ONNX file whose inputs could be made up"
    )


def _made_up_for(session: Session, seed: int) -> dict[str, torch.Tensor]:
    """Normal numbers, zeros and ones, or true masks, by the types and shapes that an ONNX file declares."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[Any, int] = {}
    result = {}
    for name, kind in session.input_types.items():
        shape = [s if isinstance(s, int) else sizes.setdefault(s, len(sizes) + 2) for s in session.input_shapes[name]]
        kind = kind.removeprefix("tensor(").removesuffix(")")
        if kind in _FLOATS:
            result[name] = torch.randn(shape, generator=generator).to(_FLOATS[kind])
        elif kind == "bool":
            result[name] = torch.ones(shape, dtype=torch.bool)
        elif kind.removeprefix("u").startswith("int"):
            result[name] = torch.randint(0, 2, shape, generator=generator).to(getattr(torch, kind))
        else:
            raise RegaugeError(f"no input of type {kind} can be made up for {name!r}: give inputs")
    return result


def _differences(
    left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], names: Sequence[str]
) -> Iterator[Difference]:
    for index in range(max(len(left), len(right))):
        name = names[index] if index < len(names) else f"output {index}"
        if index >= len(left) or index >= len(right):
            only = "second" if index >= len(left) else "first"
            shape = tuple((right if only == "second" else left)[index].shape)
            yield Difference(name, shape, float("inf"), float("inf"), f"only the {only} model has it")
            continue
        yield _difference(name, left[index], right[index])


def _tensors(outputs: Any, numbers: bool) -> list[torch.Tensor]:
    found = []
    for leaf in tree_flatten(outputs)[0]:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf.detach().cpu())
        elif numbers and isinstance(leaf, Number):
            found.append(torch.as_tensor(leaf))
    return found


def _difference(name: str, a: torch.Tensor, b: torch.Tensor) -> Difference:
    if a.shape != b.shape:
        note = f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
        return Difference(name, tuple(a.shape), float("inf"), float("inf"), note)
    if not a.numel():
        return Difference(name, tuple(a.shape), 0.0, 0.0)
    wide = torch.complex128 if a.is_complex() or b.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    same = (x == y) | (x.isnan() & y.isnan())
    absolute = float(torch.where(same, 0.0, (x - y).abs()).nan_to_num(nan=float("inf")).max())
    finite = x.abs()[x.abs().isfinite()]
    scale = float(finite.max()) if finite.numel() else 0.0
    relative = absolute / max(scale, 1e-12) if absolute else 0.0
    undefined = int((x.isnan() & y.isnan()).sum())
    note = f"both are NaN at {undefined} of {x.numel()} entries" if undefined else ""
    return Difference(name, tuple(a.shape), absolute, relative, note)
