"""Graphs as torch modules: ``to_torch(graph)`` gives a living nn.Module, ``write(graph, folder)`` source and weights.

graph.to_torch()              an nn.Module with the original hierarchy and state_dict keys, in shrunk shapes
graph.write("pruned")         pruned/model.py (readable, needs torch and safetensors only), pruned/model.safetensors
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from regauge.backends.torch_module.forward import Forward
from regauge.backends.torch_module.frames import frame_tree
from regauge.backends.torch_module.integers import as_integer_layers
from regauge.backends.torch_module.layer_names import as_layers
from regauge.backends.torch_module.modules import Classes
from regauge.backends.torch_module.onednn_layers import as_onednn_layers
from regauge.backends.torch_module.places import Places
from regauge.backends.torch_module.quantized_source import layer_sources
from regauge.backends.torch_module.runtime import import_source
from regauge.backends.torch_module.source import assemble
from regauge.backends.torch_module.tensors import needs_gradient
from regauge.ir.errors import EmitError
from regauge.ir.graph import Graph, Parameter

Kernels: TypeAlias = Literal["triton", "onednn"]
_SOURCE, _WEIGHTS = "model.py", "model.safetensors"
_MARK = "written by Regauge"  # in the first line of the source


@dataclass(frozen=True)
class Emitted:
    """The source of a graph: the text, the name of its root class, and where its tensors live."""

    source: str
    root: str
    places: Places


def emit(
    graph: Graph,
    *,
    integers: bool = True,
    kernels: Kernels | None = None,
    tuned: str | os.PathLike[str] | None = None,
    without: frozenset[str] = frozenset(),
) -> Emitted:
    """Source without weights; raises EmitError naming the node that has no torch form.

    Quantized layers compute on ``integers``, or stay pairs of quantize and dequantize, as an ONNX exporter wants them.
    With ``kernels="triton"`` fused nodes are operators of torch; where there are none, all regions that gain on a GPU.
    With ``"onednn"`` layers run on its kernels, those ``without`` them aside, which are named by their weight.
    """
    if kernels not in (None, *get_args(Kernels)):
        raise EmitError(f"there are no kernels {kernels!r}: give {' or '.join(map(repr, get_args(Kernels)))}, or None")
    if tuned is not None and kernels != "triton":
        raise EmitError("a tuned table is for kernels: give kernels='triton', too")
    if kernels == "triton":
        from regauge.backends.triton_kernels.weights import for_kernels

        graph = for_kernels(graph)
    given = graph
    spelt = as_layers(graph)
    graph, homes = as_integer_layers(spelt) if integers else (spelt, [])
    graph, packed = as_onednn_layers(graph, without) if kernels == "onednn" else (graph, {})
    frame = frame_tree(graph)
    places = Places(graph, frame)
    forward = Forward(graph, places, kernels=kernels == "triton", tuned=None if tuned is None else os.fspath(tuned))
    code = forward.root(frame)
    if any(getattr(forward.modules.get(home.path), "layer", None) != home.text for home in homes):
        # a layer that could not be one: of a module that runs in several forms
        return emit(spelt, integers=False, kernels=kernels, tuned=tuned, without=without)
    plain = {name for name, text in packed.items() if not _is_layer(forward, name, text)}
    if plain:
        return emit(given, integers=integers, kernels=kernels, tuned=tuned, without=without | plain)
    forward.helpers.sources.update(layer_sources([*(home.text for home in homes), *packed.values()]))
    classes = Classes(graph, forward, code)
    texts = [*forward.functions.sources(), *classes.texts]
    source = assemble(f"{classes.root}, {_MARK}.", forward.helpers.sources, texts, classes.imports)
    return Emitted(source, classes.root, places)


def _is_layer(forward: Forward, weight: str, text: str) -> bool:
    """Whether the module that has a weight became the layer with that source."""
    module = forward.modules.get(weight.rpartition(".")[0])
    return module is not None and module.layer is not None and module.layer.partition("(")[0] == text.partition("(")[0]


def to_torch(
    graph: Graph,
    *,
    device: torch.device | str | None = None,
    integers: bool = True,
    kernels: Kernels | None = None,
    tuned: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A module of its own that computes the graph: importable, trainable, picklable, exportable again.

    Its tensors are copies. It takes the arguments the captured module took, or the graph's inputs in order, and gives
    the same structure of results. Raises EmitError where a node has no torch form. For ``integers`` see :func:`emit`,
    for ``kernels`` :mod:`regauge.backends.torch_module.kernels` ("triton") and
    :mod:`regauge.backends.torch_module.onednn` ("onednn", for a CPU); ``tuned`` is the path of a table of ``regauge
    autotune``.
    """
    emitted = emit(graph, integers=integers, kernels=kernels, tuned=tuned)
    python = import_source(emitted.source, _module_name(graph))
    with torch.device("meta"):
        module: nn.Module = getattr(python, emitted.root)()
    _fill(module, emitted.places, device)
    module.train(bool(graph.metadata.get("torch", {}).get("training", False)))
    return module


def _fill(module: nn.Module, places: Places, device: torch.device | str | None) -> None:
    """Give every name its tensor; a tensor under several names stays one tensor."""
    made: dict[Parameter, torch.Tensor] = {}
    for name, parameter in places.tensors.items():
        if parameter not in made:
            data = parameter.tensor.detach().clone()
            data = data if device is None else data.to(device)
            trained = places.is_trained(parameter)
            made[parameter] = nn.Parameter(data, requires_grad=needs_gradient(parameter)) if trained else data
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, made[parameter])
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta:
            raise EmitError(f"the emitted module has a tensor {name!r} that the graph does not have: report this")


def write(graph: Graph, folder: str | os.PathLike[str], *, kernels: Kernels | None = None) -> Path:
    """Write ``model.py`` and ``model.safetensors`` into a folder, both or nothing; returns the folder.

    Files of these names are replaced where Regauge wrote them, others stay. The source needs torch and safetensors
    only; with ``kernels="triton"`` fused nodes are operators of torch where Regauge is installed. Raises EmitError
    where the graph has no torch form, or the folder has a model that is not ours.
    """
    from safetensors.torch import save_file

    target = Path(folder)
    check_folder(target)
    emitted = emit(graph, kernels=kernels)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        (staging / _SOURCE).write_text(emitted.source + _loader(graph, emitted))
        save_file(_stored(graph, kernels), staging / _WEIGHTS, metadata={"format": "pt"})
        for file in staging.iterdir():
            file.chmod(0o644)
        if not target.exists():
            staging.chmod(0o755)
            staging.rename(target)
            return target
        for name in (_WEIGHTS, _SOURCE):
            os.replace(staging / name, target / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def check_folder(folder: Path) -> None:
    """Raise EmitError where :func:`write` would have to replace what Regauge did not write, or a file."""
    if folder.exists() and not folder.is_dir():
        raise EmitError(f"{folder} is a file: give the path of a folder")
    source, weights = folder / _SOURCE, folder / _WEIGHTS
    ours = source.is_file() and _MARK in source.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    for file in () if ours else (source, weights):
        if file.exists():
            raise EmitError(f"{file} was not written by Regauge, and is left as it is: give another folder, or move it")


def _stored(graph: Graph, kernels: Kernels | None) -> dict[str, torch.Tensor]:
    """Every tensor once, under the first of its names in the module, as ``load()`` of the source asks for it."""
    module = to_torch(graph, kernels=kernels)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _loader(graph: Graph, emitted: Emitted) -> str:
    mode = "train" if graph.metadata.get("torch", {}).get("training", False) else "eval"
    return f'''

def load(folder=None):
    """The model with its weights, from the folder of this file or another one."""
    from pathlib import Path

    from safetensors.torch import load_file

    weights = load_file(Path(folder or Path(__file__).parent) / "model.safetensors")
    model = {emitted.root}()
    # By name, not load_state_dict(): tied tensors are stored once, non-persistent buffers too.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = weights[name]
    return model.{mode}()
'''


def _module_name(graph: Graph) -> str:
    return re.sub(r"\W", "_", str(graph.metadata.get("torch", {}).get("root_class") or graph.name)).lower()
