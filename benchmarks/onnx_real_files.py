"""Seven real ONNX files: no passes, then prune{ratio=0.3}, held to the masked original in onnxruntime.

    python benchmarks/onnx_real_files.py FOLDER [--write]

FOLDER holds the files listed below. ``identical``: a run without passes gives back the same bytes. ``kept``: share of
the float weights left. ``masked``: largest difference, relative to the largest output, between the pruned file and the
original with zeros in the removed positions, both run by onnxruntime without optimisation; only Dims that nothing
normalises or averages over are cut for it, because those see fewer entries. Kept positions are found by value: the
weights are redrawn, every entry of a tensor another number. ``all``: every free Dim cut, the file against the reference
interpreter on the pruned graph. The two face detectors are one network before and after simplification: their
convolutions must come out in the same shapes.
"""

from __future__ import annotations

import argparse
import glob
import math
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from benchmarks.mask_oracle import kept_entries
from benchmarks.report import append_table, environment

FACE, FACE_SIMPLE = "face_version-RFB-320.onnx", "face_version-RFB-320_simplified.onnx"
Feeds = dict[str, np.ndarray]


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _bytes(count: int, dtype: type) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, count)).astype(dtype)


def inputs() -> dict[str, Feeds]:
    """Inputs that each file is made for."""
    voice = {"input": _normal(1, 512), "state": _normal(2, 1, 128), "sr": np.array(16000)}
    return {
        FACE: {"input": _normal(1, 3, 240, 320)},
        FACE_SIMPLE: {"input": _normal(1, 3, 240, 320)},
        "magika_standard_v1.onnx": {"bytes": _bytes(1536, np.float32)},
        "magika_standard_v2_1.onnx": {"bytes": _bytes(4096, np.int32)},
        "silero_v3.onnx": {"input": _normal(1, 4000), "h0": _normal(2, 1, 64), "c0": _normal(2, 1, 64)},
        "silero_v6.onnx": voice,
        "silero_v6_16k_op15.onnx": voice,
    }


def weights(graph: Any) -> Iterator[tuple[str, Any]]:
    """Float tensors of at least one axis by name, those of Constant nodes and nested graphs included."""
    for tensor in graph.initializer:
        yield tensor.name, tensor
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.HasField("t"):
                yield node.output[0], attribute.t
            if attribute.HasField("g"):
                yield from weights(attribute.g)


def float_weights(model: onnx.ModelProto) -> dict[str, Any]:
    kind = onnx.TensorProto.FLOAT
    return {name: t for name, t in weights(model.graph) if t.data_type == kind and np.prod(t.dims) > 1 and t.dims}


def set_array(tensor: Any, array: np.ndarray) -> None:
    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))


def redraw(model: onnx.ModelProto) -> None:
    """Give every entry of a weight another value; a weight keeps its mean, its spread, and its sign if it had one."""
    generator = np.random.default_rng(1)
    for tensor in float_weights(model).values():
        old = numpy_helper.to_array(tensor).astype(np.float64)
        places = (generator.permutation(old.size) + 0.5) / old.size
        fresh = torch.special.ndtri(torch.as_tensor(places)).numpy().reshape(old.shape)
        spread = max(float(old.std()), 1e-3)
        fresh = old.mean() + spread * fresh
        if (old >= 0).all():
            fresh = np.abs(fresh) + 1e-3
        set_array(tensor, fresh.astype(np.float32))


def masked(model: onnx.ModelProto, small: onnx.ModelProto) -> onnx.ModelProto:
    """The model with zeros wherever ``small`` has lost an entry."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    found = float_weights(small)
    for name, tensor in float_weights(copied).items():
        if name not in found:
            continue
        original = torch.tensor(numpy_helper.to_array(tensor))
        kept = kept_entries(original, torch.tensor(numpy_helper.to_array(found[name])))
        if kept is None:
            raise SystemExit(f"{name} is no part of the original: {list(tensor.dims)} -> {list(found[name].dims)}")
        original *= kept
        set_array(tensor, original.numpy())
    return copied


def results(model: onnx.ModelProto, feeds: Feeds) -> list[Any]:
    """Outputs, by onnxruntime; of one that is squashed to 0..1, what goes into that, where differences still show."""
    from regauge.backends.run_onnxruntime import Session

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    for output in model.graph.output:
        node = producers[output.name]
        if node.op_type in ("Softmax", "Sigmoid") and node.input[0] not in {o.name for o in copied.graph.output}:
            copied.graph.output.add(name=node.input[0])
    return Session(copied, optimisation="off").run(feeds)


def _cuts(graph: Any) -> int:
    """How many Dims were cut: each leaves a line ``name: before -> after`` in the history."""
    return sum(" -> " in edit.what for edit in graph.history)


def difference(found: list[Any], expected: list[Any]) -> float:
    """The largest relative difference over outputs; inf where a value is not finite: max() would pass over a NaN."""
    pairs = zip(found, expected, strict=True)
    worst = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs]
    return max(worst) if all(math.isfinite(x) for x in worst) else math.inf


def prune(model: onnx.ModelProto, path: Path, ratio: float, *, exact_only: bool) -> Any:
    """Prune and write; with ``exact_only`` leave out the Dims that something normalises or averages over."""
    import regauge
    from regauge.passes.pruning.prune import Prune

    graph = regauge.load(model)
    exclude = tuple(glob.escape(name) for name in recomputed(graph)) if exact_only else ()
    small = regauge.optimize(graph, Prune(ratio=ratio, exclude=exclude, compensate=False))
    small.to_onnx(path, verify=False)  # compared in measure, on inputs whose errors redrawn weights do not amplify
    return small


def recomputed(graph: Any) -> list[str]:
    """Names of the Dims that statistics are computed over."""
    from regauge.ir.dims.extents import leaves

    calls = graph.axes.calls.values()
    roles = [(role, extent) for call in calls for role, extent in call.roles]
    seen = {dim for role, extent in roles if role in ("normalise", "reduce") for dim in leaves(extent)}
    return [group.name for group in graph.groups() if group.dim in seen]


def measure(path: Path, feeds: Feeds, ratio: float) -> tuple[list[str], list[list[int]], float]:
    """The row of one file, the shapes its convolutions were left with, and the larger of the two differences."""
    import regauge
    from regauge.backends.run_onnxruntime import Session
    from regauge.ir.running.interpret import run

    with tempfile.TemporaryDirectory() as folder:
        copy, small = Path(folder) / "copy.onnx", Path(folder) / "small.onnx"
        regauge.optimize(regauge.load(path), []).to_onnx(copy)
        identical = copy.read_bytes() == path.read_bytes()
        model = onnx.load(path)
        redraw(model)
        part = prune(model, small, ratio, exact_only=True)
        zeros = masked(model, onnx.load(small))
        exact = difference(results(onnx.load(small), feeds), results(zeros, feeds))
        cut = [_cuts(part)]
        graph = prune(model, small, ratio, exact_only=False)
        cut.append(_cuts(graph))
        expected = run(graph, {name: torch.as_tensor(array) for name, array in feeds.items()})
        every = difference(Session(small, optimisation="off").run(feeds), expected)
        pruned = float_weights(onnx.load(small))
    sizes = [sum(int(np.prod(t.dims)) for t in found.values()) for found in (pruned, float_weights(model))]
    masked_cell = f"{exact:.1e}, {cut[0]} of {cut[1]} Dims" if cut[0] else "every Dim is normalised over"
    row = [path.name, "yes" if identical else "no", f"{sizes[0] / sizes[1]:.3f}", masked_cell, f"{every:.1e}"]
    return row, sorted(list(t.dims) for t in pruned.values() if len(t.dims) == 4), max(exact, every)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files are")
    parser.add_argument("--only", default="", help="part of a file name")
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(environment())
    rows, convolutions, worst = [], {}, {}
    for name, feeds in inputs().items():
        if options.only in name:
            row, convolutions[name], worst[name] = measure(options.folder / name, feeds, options.ratio)
            rows.append(row)
            print("  ".join(row), flush=True)
    if options.write:
        heads = ["file", "identical", "kept", "masked", "all"]
        append_table(f"Real ONNX files, ratio {options.ratio}", heads, rows)
    alike = convolutions.get(FACE) == convolutions.get(FACE_SIMPLE)
    print("the two face detectors are cut alike" if alike else "the two face detectors are cut differently")
    good = alike and all(row[1] == "yes" and worst[row[0]] < 1e-3 for row in rows)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
