"""The sizes that torch's own layers keep beside their tensors, set from the tensors they now hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from regauge.ir.graph import Graph, Node

Changed = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Name of each tensor that has a new shape, with the old and the new one."""


def set_layer_sizes(graph: Graph, model: nn.Module, changed: Changed) -> None:
    """Set ``in_features``, ``out_channels``, ``groups``, ``normalized_shape`` ... of layers with changed tensors."""
    readers = _readers(graph)
    for path in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        module = model.get_submodule(path)
        nodes = [node for name, found in readers.items() if name.rpartition(".")[0] == path for node in found]
        for kind, setter in _SETTERS:
            if isinstance(module, kind):
                setter(module, nodes)
                break
        else:
            _set_own_sizes(module, path, changed)
    _set_groups(model, readers)


def _set_own_sizes(module: nn.Module, path: str, changed: Changed) -> None:
    """Attributes of the user's layer that are the size of an axis of its tensors, where that is one size only now."""
    now = own_sizes(module, path, changed)
    for attribute, value in list(module.__dict__.items()):
        if isinstance(value, int) and not isinstance(value, bool) and len(now.get(value, ())) == 1:
            module.__dict__[attribute] = next(iter(now[value]))


def own_sizes(module: nn.Module, path: str, changed: Changed) -> dict[int, set[int]]:
    """What became of each size that an axis of the module's own tensors had."""
    own = {name: getattr(module, name) for name in (*module._parameters, *module._buffers)}
    now: dict[int, set[int]] = {}
    for name, tensor in own.items():
        if tensor is None:
            continue
        # The tensors are the new ones already.
        old, new = changed.get(f"{path}.{name}" if path else name, (tuple(tensor.shape), tuple(tensor.shape)))
        for before, after in zip(old, new, strict=False):
            now.setdefault(before, set()).add(after)
    return now


def _readers(graph: Graph) -> dict[str, list[Node]]:
    """Which nodes read each parameter, under each of its names."""
    return {name: parameter.consumers() for parameter in graph.parameters.values() for name in parameter.names}


def _set_groups(model: nn.Module, readers: dict[str, list[Node]]) -> None:
    """Group counts follow the graph even where no tensor of the layer changed its shape."""
    for name, nodes in readers.items():
        for node in nodes:
            module = model.get_submodule(name.rpartition(".")[0])
            if isinstance(module, _ConvNd) and node.op in ("conv", "conv_transpose"):
                _set_conv(module, [node])
            elif isinstance(module, nn.GroupNorm) and node.op == "group_norm":
                _set_group_norm(module, [node])


def _attribute(nodes: Iterable[Node], operators: tuple[str, ...], name: str) -> Any:
    for node in nodes:
        if node.op in operators and name in node.attributes:
            return node.attributes[name]
    return None


def _set_linear(module: nn.Linear, nodes: list[Node]) -> None:
    module.out_features, module.in_features = module.weight.shape


def _set_bilinear(module: nn.Bilinear, nodes: list[Node]) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _set_conv(module: _ConvNd, nodes: list[Node]) -> None:
    module.groups = _attribute(nodes, ("conv", "conv_transpose"), "groups") or module.groups
    first, second = module.weight.shape[:2]
    if isinstance(module, _ConvTransposeNd):
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.in_channels, module.out_channels = second * module.groups, first


def _set_norm(module: _NormBase, nodes: list[Node]) -> None:
    for tensor in (module.weight, module.running_mean):
        if tensor is not None:
            module.num_features = tensor.shape[0]
            return


def _set_layer_norm(module: Any, nodes: list[Node]) -> None:
    module.normalized_shape = tuple(module.weight.shape)


def _set_group_norm(module: nn.GroupNorm, nodes: list[Node]) -> None:
    module.num_channels = module.weight.shape[0] if module.weight is not None else module.num_channels
    module.num_groups = _attribute(nodes, ("group_norm",), "num_groups") or module.num_groups


def _set_embedding(module: Any, nodes: list[Node]) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _set_attention(module: nn.MultiheadAttention, nodes: list[Node]) -> None:
    weight = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    module.embed_dim = weight.shape[1]
    if module._qkv_same_embed_dim:
        module.kdim = module.vdim = module.embed_dim
    else:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    module.head_dim = module.embed_dim // module.num_heads
    module.out_proj.out_features, module.out_proj.in_features = module.out_proj.weight.shape


def _set_recurrent(module: Any, nodes: list[Node]) -> None:
    module.input_size = module.weight_ih_l0.shape[1]
    projected = getattr(module, "weight_hr_l0", None)
    if projected is not None:
        module.proj_size, module.hidden_size = projected.shape
    else:
        module.hidden_size = module.weight_hh_l0.shape[1]
    module.flatten_parameters()


def _set_recurrent_cell(module: Any, nodes: list[Node]) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


def _set_prelu(module: nn.PReLU, nodes: list[Node]) -> None:
    module.num_parameters = module.weight.shape[0]


_SETTERS: list[tuple[Any, Callable[[Any, list[Node]], None]]] = [
    (nn.Linear, _set_linear),
    (nn.Bilinear, _set_bilinear),
    (_ConvNd, _set_conv),
    (_NormBase, _set_norm),
    ((nn.LayerNorm, nn.RMSNorm), _set_layer_norm),
    (nn.GroupNorm, _set_group_norm),
    ((nn.Embedding, nn.EmbeddingBag), _set_embedding),
    (nn.MultiheadAttention, _set_attention),
    (nn.RNNBase, _set_recurrent),
    (nn.RNNCellBase, _set_recurrent_cell),
    (nn.PReLU, _set_prelu),
]
