"""Quantized models beside one in float: what Regauge, onnxruntime, NNCF and torchao make of one ONNX file.

NNCF (3.4) and torchao (0.18) run where they can be imported; a peer that fails is a row that says with what:
- onnxruntime: ``quantize_static`` per channel with unsigned activations, and ``quantize_dynamic`` per channel.
- NNCF: ``quantize`` with its defaults, and with ``model_type=TRANSFORMER`` where the file is of a transformer;
  ``compress_weights`` to 8 bits.
- torchao: its configurations of 8 bits on the torch module that the file is read as, and the exported module through
  its quantizer for x86 and Inductor, for one batch size, that of the examples.
All are timed against the float file in onnxruntime, by processor time of one thread, medians in turns.
"""

from __future__ import annotations

import io
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import regauge
from regauge.backends.run_onnxruntime import Session

Batch = Mapping[str, torch.Tensor]
FLOAT, TURNS = "float", 25
SCHEMES = ("w8a8", "w8")


@dataclass(frozen=True)
class Contender:
    """What gives the first output of a batch by input names, and the bytes that it is stored in."""

    run: Callable[[Batch], torch.Tensor]
    bytes: int
    fixed: bool = False  # for the number of examples that calibrated it alone


Maker = Callable[[], Contender]


def compare(
    path: Path,
    chosen: Sequence[Batch],
    held_out: Sequence[Batch],
    timed: Sequence[Batch],
    *,
    transformer: bool,
    judge: Callable[[torch.Tensor], str] | None = None,
    tools: Sequence[str] = ("*",),
) -> Iterator[list[str]]:
    """Rows: tool, decibels, what ``judge`` says of all results if given, size, and speed on each of ``timed``.

    ``tools`` are globs on names of those that are wanted.
    """
    with tempfile.TemporaryDirectory() as folder:
        float_file = of_file(path)
        wanted = _results(float_file, held_out)
        for tool, make in makers(path, chosen, Path(folder), transformer=transformer).items():
            if not any(fnmatch(tool, glob) for glob in tools):
                continue
            try:
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    contender = make()
                    found = _results(contender, held_out)
            except Exception as error:  # peers raise what they like
                yield [tool, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"]
                continue
            noise = float((found - wanted).square().sum())
            decibels = f"{10 * math.log10(float(wanted.square().sum()) / noise):.1f}" if noise else ""
            yield [
                tool,
                decibels,
                *([judge(found)] if judge else []),
                f"{float_file.bytes / contender.bytes:.2f}",
                *(_speed(float_file, contender, batch, chosen[0]) for batch in timed),
            ]


def _results(contender: Contender, batches: Sequence[Batch]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([contender.run(batch) for batch in batches])


def _speed(plain: Contender, contender: Contender, batch: Batch, like: Batch) -> str:
    """Processor time of the float file over the contender's."""
    if contender.fixed and any(tensor.shape != like[name].shape for name, tensor in batch.items()):
        return ""
    times: list[tuple[float, float]] = []
    for _ in range(TURNS + 3):
        times.append((_seconds(plain, batch), _seconds(contender, batch)))
    ours, theirs = (statistics.median(own) for own in zip(*times[3:], strict=True))
    return f"{ours / theirs:.2f}"


def _seconds(contender: Contender, batch: Batch) -> float:
    with torch.no_grad():
        before = time.thread_time()
        contender.run(batch)
        return time.thread_time() - before


def makers(path: Path, chosen: Sequence[Batch], folder: Path, *, transformer: bool) -> dict[str, Maker]:
    """What makes each contender, by name; the float file comes first."""
    found: dict[str, Maker] = {FLOAT: lambda: of_file(path)}
    for scheme in SCHEMES:
        found[f"regauge, {scheme}"] = partial(of_regauge, path, chosen, folder, scheme)
    found["onnxruntime, static"] = lambda: _made(folder, lambda target: onnxruntime_static(path, target, chosen))
    found["onnxruntime, dynamic"] = lambda: _made(folder, lambda target: onnxruntime_dynamic(path, target))
    if find_spec("nncf"):
        for kind in ("", "TRANSFORMER") if transformer else ("",):
            tool = f"NNCF, {kind.lower() or 'default'}"
            found[tool] = partial(_made, folder, partial(nncf_static, path, batches=chosen, model_type=kind))
        found["NNCF, weights"] = lambda: _made(folder, lambda target: nncf_weights(path, target))
    if find_spec("torchao"):
        for name in ("Int8DynamicActivationInt8Weight", "Int8WeightOnly"):
            found[f"torchao, {name}"] = partial(torchao_layers, path, name)
        for dynamic in (False, True):
            tool = f"torchao, exported, {'dynamic' if dynamic else 'static'}, Inductor"
            found[tool] = partial(torchao_exported, path, chosen, dynamic=dynamic)
    return found


def of_file(path: Path) -> Contender:
    session = Session(path, threads=1)
    return Contender(lambda batch: session.run(batch)[0], path.stat().st_size)


def of_regauge(path: Path, chosen: Sequence[Batch], folder: Path, scheme: str) -> Contender:
    step = f"quantize{{scheme={scheme}}}"
    return _made(folder, lambda target: regauge.optimize(regauge.load(path), step, data=chosen).to_onnx(target))


def _made(folder: Path, write: Callable[[Path], Any]) -> Contender:
    target = folder / f"{len(list(folder.iterdir()))}.onnx"
    write(target)
    return of_file(target)


def onnxruntime_static(source: Path, target: Path, batches: Sequence[Batch]) -> None:
    """onnxruntime's static quantizer with the options that serve it best here: per channel, unsigned activations."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.left, None)
            return None if batch is None else _arrays(batch)

    quantize_static(
        str(source), str(target), Reader(), per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip


def onnxruntime_dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(source), str(target), per_channel=True, weight_type=QuantType.QInt8)


def nncf_static(source: Path, target: Path, batches: Sequence[Batch], model_type: str) -> None:
    import nncf
    import onnx

    kind = getattr(nncf.ModelType, model_type) if model_type else None
    dataset = nncf.Dataset(batches, _arrays)
    onnx.save(nncf.quantize(onnx.load(source), dataset, subset_size=len(batches), model_type=kind), target)


def nncf_weights(source: Path, target: Path) -> None:
    import nncf
    import onnx

    onnx.save(nncf.compress_weights(onnx.load(source), mode=nncf.CompressWeightsMode.INT8_SYM), target)


def torchao_layers(path: Path, name: str) -> Contender:
    """Linear layers by one of torchao's configurations, in eager mode."""
    import torchao.quantization as torchao

    graph = regauge.load(path)
    model = graph.to_torch().eval()
    before = stored(model)
    torchao.quantize_(model, getattr(torchao, f"{name}Config")())
    if stored(model) == before:
        raise ValueError("no layer was quantized")
    return _of_module(model, model, _names(graph))


def torchao_exported(path: Path, chosen: Sequence[Batch], *, dynamic: bool) -> Contender:
    """The exported module, annotated for x86, calibrated, and compiled by Inductor with its weights frozen."""
    import torch._inductor.config as inductor
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    graph = regauge.load(path)
    names = _names(graph)
    batches = [tuple(batch[name] for name in names) for batch in chosen]
    exported = torch.export.export(graph.to_torch().eval(), batches[0]).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=dynamic))
    model = quantize_pt2e.prepare_pt2e(exported, quantizer)
    for batch in batches:
        model(*batch)
    model = quantize_pt2e.convert_pt2e(model)
    with torch.no_grad(), inductor.patch(freezing=True):
        compiled = torch.compile(model)
        compiled(*batches[0])
    return _of_module(compiled, model, names, size=len(batches[0][0]))


def _of_module(run: Callable[..., Any], model: nn.Module, names: Sequence[str], size: int | None = None) -> Contender:
    """Of a module, or of one for ``size`` examples, which fewer are filled up to."""

    def first(batch: Batch) -> torch.Tensor:
        count = len(next(iter(batch.values())))
        filled = [batch[name] if size is None else _filled(batch[name], size) for name in names]
        found = run(*filled)
        tensor: torch.Tensor = found if isinstance(found, torch.Tensor) else next(iter(found))
        return tensor[:count]

    return Contender(first, stored(model), size is not None)


def _filled(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:].expand(size - len(tensor), *tensor.shape[1:])])


def _names(graph: Any) -> list[str]:
    return [value.name for value in graph.inputs]


def _arrays(batch: Batch) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in batch.items()}


def stored(module: nn.Module) -> int:
    """Bytes of the file of a state_dict, which for quantized modules is no list of plain tensors."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()
