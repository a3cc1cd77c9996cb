"""What the command line does with files: their arguments, how they are opened and read, what one holds."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from regauge.ir.errors import RegaugeError, RegaugeWarning, first_line

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir
    import torch

    from regauge.ir.graph import Graph

PATH = click.Path(path_type=Path)

model_argument = click.argument(
    "model", metavar="IN", type=PATH, help="an ONNX file, or a program saved by torch.export (.pt2)"
)
data_option = click.option(
    "--data", metavar="FILE", type=PATH, multiple=True, help="an .npz file, one array per input; may be repeated"
)
at_option = click.option("--at", metavar="SYMBOL=SIZE", multiple=True, help="the value of a dynamic size")

Command = TypeVar("Command", bound=Callable[..., Any])


def most_option(flag: str, default: int, help: str) -> Callable[[Command], Command]:
    """An option for how many rows of a table are shown at most."""
    return click.option(
        flag, "most", type=click.IntRange(min=0), default=default, show_default=True, metavar="N", help=help
    )


OF_TORCH = (".pt", ".pth", ".ckpt", ".safetensors")  # files of weights, or of programs in forms that are not read


def is_onnx(path: Path) -> bool:
    return path.suffix.lower() in (".onnx", ".textproto", ".pb")


def open_file(path: Path, *, freeze: bool = False, opset: int | None = None) -> Graph:
    """The graph of a file, converted to ``opset`` where given; raises RegaugeError for a file of another kind."""
    if not path.exists():
        raise RegaugeError(f"there is no file {path}")
    if path.suffix.lower() in OF_TORCH:
        raise RegaugeError(
            f"{path} is no ONNX file: export the module to .onnx, or save what torch.export gives of it as .pt2"
        )
    if path.suffix.lower() == ".pt2":
        if opset is not None:
            raise RegaugeError(f"{path} is a program of torch, which has no opset: leave --opset out")
        if not zipfile.is_zipfile(path):  # torch would log a traceback
            raise RegaugeError(f"{path} is not a program that torch.export saved: save it by torch.export.save")
        import torch

        from regauge.frontends.capture import capture

        try:
            program = torch.export.load(path)
        except Exception as error:
            reason = first_line(error)
            raise RegaugeError(f"{path} is not a program that torch.export saved: {reason}") from error
        return capture(program)
    from regauge.frontends.from_onnx import load

    return load(path, freeze=freeze, opset=opset)


def read_batches(paths: Sequence[Path] | None, model: Graph | Path) -> list[dict[str, Any]] | None:
    """The batches in .npz files, under the names of the model's inputs and of their types.

    Data for passes may hold labels beside them, which some scores need. Floats of another width are brought to that of
    the model, with a warning. Raises RegaugeError, with the file, where names, types or shapes differ.
    """
    if not paths:
        return None
    from regauge.ir.running.interpret import LABELS

    inputs, optional = _declared_inputs(model)
    needed = [name for name in inputs if name not in optional]
    optional = optional if isinstance(model, Path) else [*optional, *LABELS]
    batches = []
    for path in paths:
        batch = _read_npz(path)
        if not set(needed) <= set(batch) <= {*needed, *optional}:
            raise RegaugeError(
                f"{path} holds {'arrays called ' + ', '.join(batch) if batch else 'no array'}, "
                f"but the model takes {', '.join(needed) or 'no inputs'}"
            )
        batches.append(_fitted(path, batch, inputs))
    return batches


def _declared_inputs(model: Graph | Path) -> tuple[dict[str, tuple[Any, Any]], list[str]]:
    """Types and shapes of the inputs, and the names of those that need not be given."""
    if isinstance(model, Path):
        from regauge.backends.run_onnxruntime import INPUT_TYPES, Session

        session = Session(model, optimisation="off")
        kinds = {name: INPUT_TYPES.get(kind, kind) for name, kind in session.input_types.items()}
        return {name: (kinds[name], session.input_shapes[name]) for name in session.inputs}, session.overridable
    defaults = model.metadata.get("input_defaults", {})
    return {v.name: (v.dtype, v.shape if v.ranked else None) for v in model.inputs}, list(defaults)


def _fitted(path: Path, batch: dict[str, Any], inputs: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    from regauge.ir.running.given_inputs import fitted_array

    found = dict(batch)
    for name in inputs.keys() & batch.keys():
        try:
            found[name], changed = fitted_array(name, batch[name], *inputs[name])
        except RegaugeError as error:
            raise RegaugeError(f"{path}: {error}") from error
        if changed:
            warnings.warn(f"{path}: {changed}", RegaugeWarning, stacklevel=3)
    return found


def _read_npz(path: Path) -> dict[str, Any]:
    """Arrays by name; raises RegaugeError for anything that is not a plain .npz file."""
    import numpy as np

    if not path.exists():
        raise RegaugeError(f"there is no file {path}")
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            raise RegaugeError(f"{path} holds one array without a name: save it by numpy.savez, under that of an input")
        with found as file:
            return {name: _tensor(path, name, np.array(file[name])) for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise RegaugeError(f"{path} is not an .npz file of arrays: save one by numpy.savez") from error


def _tensor(path: Path, name: str, array: np.ndarray) -> torch.Tensor:
    import torch

    if array.dtype.kind not in "biufc":
        raise RegaugeError(f"{path}: {name} holds {array.dtype}, which is no type of numbers: save numbers under it")
    return torch.from_numpy(array)


def written_model(path: Path) -> onnx_ir.Model:
    """The model in a file, without the data of large weights in it."""
    import onnx_ir

    from regauge.frontends.onnx_model.reading import read_skeleton

    model: onnx_ir.Model = onnx_ir.from_proto(read_skeleton(path))
    return model


def file_figures(path: Path, model: onnx_ir.Model, graph: Graph) -> tuple[int, int, int]:
    """Nodes of all scopes but for Constants, bytes with external data, and MACs of an ONNX file and its graph."""
    from regauge.backends.onnx_model.write import all_graphs, external_locations
    from regauge.ir.cost import figures

    nodes = sum(node.op_type != "Constant" for inner in all_graphs(model) for node in inner)
    beside = sum((path.parent / location).stat().st_size for location in external_locations(model))
    return nodes, path.stat().st_size + beside, figures(graph).macs


def check_output(path: Path, suffix: str) -> None:
    """Tell before the work that its results could not be written, into a folder without a ``suffix``; RegaugeError."""
    if not suffix:
        from regauge.backends.to_torch import check_folder

        return check_folder(path)
    if path.is_dir():
        raise RegaugeError(f"cannot write {path}: it is a folder")
    if path.suffix.lower() != suffix:
        kind = f"a {path.suffix} file" if path.suffix else "a file without a suffix"
        raise RegaugeError(f"{path} would be {kind}: give it the suffix {suffix}")
    if not path.parent.is_dir():
        raise RegaugeError(f"cannot write {path}: the folder {path.parent} does not exist, make it first")


def dynamic_sizes(graph: Graph, given: Sequence[str]) -> dict[Any, int]:
    """``batch=8`` for each dynamic size that is given."""
    symbols = {str(symbol): symbol for symbol in graph.symbols}
    sizes = {}
    for text in given:
        name, _, size = text.partition("=")
        if name not in symbols or not size.isdecimal() or int(size) < 1:
            known = ", ".join(symbols) or "there are none"
            raise RegaugeError(f"--at {text}: give the name of a dynamic size and its value ({known})")
        sizes[symbols[name]] = int(size)
    return sizes
