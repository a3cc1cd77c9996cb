"""Writing a graph as an ONNX model.

A graph that was loaded from ONNX is written by patching the carried model: what no pass touched stays as it was, to the
byte where nothing was touched at all. A graph that was captured from torch goes through torch's own exporter.

    load("m.onnx") ── prune ── to_onnx("p.onnx")     same nodes, names, metadata, opsets, data layout; smaller weights
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import onnx_ir

from regauge.backends.onnx_model.audit import audit_of
from regauge.backends.onnx_model.carrier import Carrier
from regauge.backends.onnx_model.changes import find_changes
from regauge.backends.onnx_model.check import Checker
from regauge.backends.onnx_model.emit import patched_model
from regauge.backends.onnx_model.kernels import add_functions, as_calls
from regauge.backends.onnx_model.write import Check, copy_model, external_locations, write_model
from regauge.ir.collection import without_collection
from regauge.ir.errors import EmitError, RegaugeWarning
from regauge.ir.folding.limits import BYTES_BEFORE, BYTES_PROPERTY
from regauge.ir.graph import Graph
from regauge.ir.node_order import IN_ORDER
from regauge.ir.states import PROPERTY, noted_states

Inputs = Sequence[Any] | Mapping[str, Any]


def to_onnx(
    graph: Graph,
    path: str | os.PathLike[str],
    *,
    external_data: bool | str | None = None,
    sparse_weights: bool = False,
    verify: bool = True,
    overwrite: bool = True,
    inputs: Inputs | None = None,
    check: Check | None = None,
    functions: bool = False,
) -> Path:
    """Write ``graph`` as an ONNX model at ``path`` and return the path.

    ``external_data``: None keeps the layout of the source, True puts the weights into ``<name>.data`` beside the model,
    a text names that file, False puts them into the model; more than 1.8 GB always go beside it. ``sparse_weights``
    stores weights with many zeros as sparse initializers where the file becomes smaller by that; they are dense again
    once they are loaded. With ``verify`` the finished file is run in onnxruntime and compared with the graph, on
    ``inputs`` or on made-up ones; a ``check`` of one's own is called with its path, unless it is a copy of the source.
    With ``functions`` fused nodes are calls of local functions (:mod:`regauge.ir.onnx_kernels`), else their nodes.
    Buffers that runs write stay as they are in a file, with a RegaugeWarning: a file has no memory. The file appears
    whole or not at all. Raises EmitError when something cannot be expressed, written, or computes
    something else.
    """
    target = Path(path)
    if external_data is not None and not isinstance(external_data, bool | str):
        raise EmitError(f"external_data is {external_data!r}: give True, False, or the name of a file beside the model")
    _warn_of_memory(graph)
    audit = audit_of(graph)
    checks: list[Check] = [Checker(graph, inputs), *([] if audit is None else [audit])] if verify else []
    checks += [] if check is None else [check]
    calls = as_calls(graph, functions=functions)
    graph = calls.graph
    if "onnx" not in graph.metadata:
        from regauge.backends.onnx_model.export import exported_model

        model = exported_model(graph, calls.bodies)
        add_functions(model, calls)
        _note_passes(model, graph)
        write_model(
            model,
            target,
            external_data=external_data,
            overwrite=overwrite,
            checks=checks,
            sparse_weights=sparse_weights,
        )
        return target
    changes = find_changes(_imported(graph), graph)
    source = _unchanged_source(graph)
    in_order = IN_ORDER in graph.metadata
    folds = in_order or bool(graph.metadata.get("onnx_fold"))
    with without_collection():  # a clone of the model and all that is made of it lives until the file is written
        model, changed = patched_model(graph, changes) if changes or folds else (_copied(graph), False)
    if changed:
        add_functions(model, calls)
    changed = changed or in_order or bool(graph.metadata.get("onnx_converted"))
    if not changed and external_data is None and not sparse_weights and source is not None:
        copy_model(source, target, external_locations(graph.metadata["onnx"]), overwrite=overwrite)
        return target
    if changed:
        _note_passes(model, graph)
    write_model(
        model,
        target,
        external_data=external_data,
        overwrite=overwrite,
        checks=checks if changed or sparse_weights else (),
        sparse_weights=sparse_weights,
    )
    return target


def _warn_of_memory(graph: Graph) -> None:
    lost = [state.name for state in graph.states if not state.returned]
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        warnings.warn(
            f"each run of the module writes {names}; an ONNX file keeps nothing between runs, so that each run begins "
            "with what is stored now: return what it writes, and take it as an input, where the next run needs it",
            RegaugeWarning,
            stacklevel=4,
        )


def _imported(graph: Graph) -> Graph:
    imported = graph.metadata.get("onnx_imported")
    if not isinstance(imported, Graph):
        raise EmitError(f"graph {graph.name!r} carries an ONNX model but not the graph read from it: load it again")
    return imported


def _copied(graph: Graph) -> onnx_ir.Model:
    return Carrier(graph.metadata["onnx"]).model


def _note_passes(model: onnx_ir.Model, graph: Graph) -> None:
    """Say in the model what was done to it."""
    try:
        model.metadata_props["regauge.version"] = version("regauge")
    except PackageNotFoundError:  # run from a checkout
        model.metadata_props["regauge.version"] = "unreleased"
    passes = list(dict.fromkeys(edit.by for edit in graph.history))
    if passes:
        model.metadata_props["regauge.passes"] = ",".join(passes)
    notes = [*graph.metadata.get("onnx_notes", ())]
    if "onnx" in graph.metadata:
        if BYTES_BEFORE in graph.metadata:
            model.metadata_props[BYTES_PROPERTY] = str(graph.metadata[BYTES_BEFORE])
        unlisted = len(graph.metadata["onnx"].graph.inputs) - len(model.graph.inputs)
        notes += [f"weights that were listed as inputs and are constants now: {unlisted}"] if unlisted else []
    if notes:
        model.metadata_props["regauge.notes"] = "; ".join(notes)
    model.metadata_props.pop(PROPERTY, None)
    named = [[value.name for value in values] for values in (model.graph.inputs, model.graph.outputs)]
    alike = [len(names) for names in named] == [len(graph.inputs), len(graph.outputs)]
    states = noted_states(graph, *named) if alike else None
    if states is not None:
        model.metadata_props[PROPERTY] = states


def _unchanged_source(graph: Graph) -> Path | None:
    """The file the graph was loaded from, if it still is that file."""
    recorded = graph.metadata.get("onnx_source")
    if recorded is None:
        return None
    path, size, modified = recorded
    try:
        now = os.stat(path)
    except OSError:
        return None
    return Path(path) if (now.st_size, now.st_mtime_ns) == (size, modified) else None
