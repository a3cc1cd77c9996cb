"""Reads options off the user's modules that only act in training, which a graph of their evaluation does not show.

An average of all batches (``momentum=None``), running statistics of an instance norm, dropout inside an attention, and
slopes drawn at random: they are noted on the nodes, so that the emitted module can be trained like the user's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from regauge.ir.graph import Graph, Node
from regauge.ir.training_notes import DROPOUT, LAYER, TRACKED


@contextmanager
def traceable_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms that average over all batches divide by a count that data decides: a plain momentum stands for it."""
    averaging = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training and m.momentum is None]
    for norm in averaging:
        norm.momentum = 0.1
    try:
        yield
    finally:
        for norm in averaging:
            norm.momentum = None


def note_options(graph: Graph, module: nn.Module, *, training: bool) -> list[str]:
    """Note them on the nodes; returns the paths of modules whose training has no place in the graph, with a reason."""
    modules = dict(module.named_modules())
    noted: set[str] = set()
    for _, node in graph.walk():
        if node.scope:
            path = re.sub(r"@\d+$", "", node.scope[-1][0])
            if path in modules and _note(node, modules[path], training):
                noted.add(path)
    return [] if training else [f"{path or 'the root'} ({reason})" for path, reason in _lost(modules, noted)]


def _note(node: Node, module: nn.Module, training: bool) -> bool:
    """Whether a node takes a note of its module's training."""
    if isinstance(module, _BatchNorm) and module.momentum is None and node.op == "batch_norm":
        node.attributes["momentum"] = None
    elif isinstance(module, _InstanceNorm) and module.track_running_stats and node.op in _NORMS:
        node.metadata[TRACKED] = str(module.momentum)
    elif isinstance(module, nn.MultiheadAttention) and node.op in _WEIGHTS[: 1 if training else 2] and module.dropout:
        node.metadata[DROPOUT] = str(module.dropout)
    elif isinstance(module, nn.RReLU) and node.op in ("leaky_relu", "torch_call"):
        node.metadata[LAYER] = f"nn.RReLU({module.lower}, {module.upper})"
    else:
        return False
    return True


_NORMS = ("batch_norm", "instance_norm")
_WEIGHTS = ("attention", "softmax")  # what makes the weights to drop some of; in training a node follows the softmax


def _lost(modules: dict[str, nn.Module], noted: set[str]) -> Iterator[tuple[str, str]]:
    for path, module in modules.items():
        if isinstance(module, nn.MultiheadAttention) and module.dropout > 0 and path not in noted:
            yield path, f"MultiheadAttention, dropout={module.dropout}"
        elif isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout) and module.p > 0:
            yield path, f"{type(module).__name__}, p={module.p}"
