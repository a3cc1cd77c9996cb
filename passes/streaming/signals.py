"""Whole signals through a graph that takes a few frames at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regauge.ir.errors import GraphError
from regauge.ir.graph import Graph
from regauge.ir.states import Steps, ordinary_inputs

STREAM = "stream"  # the key of a StreamForm in the metadata of a graph


@dataclass(frozen=True)
class StreamForm:
    """How a graph takes signals: ``chunk`` frames in a step along ``axes`` of its inputs, by name.

    Its ordinary outputs have frames along ``output_axes``, of which the first ``delays`` of all stand for nothing.
    """

    chunk: int
    axes: Mapping[str, int]
    output_axes: tuple[int, ...]
    delays: tuple[int, ...]


def run_stream(graph: Graph, *signals: torch.Tensor) -> list[torch.Tensor]:
    """Run a graph that ``stream`` made step by step over whole signals, given in order of its ordinary inputs.

    The outputs are one behind the other, without the frames that stand for nothing. Raises GraphError for another
    graph, and for a signal that is no whole number of steps long.
    """
    form = graph.metadata.get(STREAM)
    if not isinstance(form, StreamForm):
        raise GraphError(f"graph {graph.name!r} takes no frames in steps: make it with the pass stream")
    names = [value.name for value in ordinary_inputs(graph)]
    if len(names) != len(signals):
        raise GraphError(f"graph {graph.name!r} takes {len(names)} signals ({', '.join(names)}), got {len(signals)}")
    lengths = {x.shape[form.axes[name]] for name, x in zip(names, signals, strict=True) if name in form.axes}
    if len(lengths) != 1 or (length := lengths.pop()) % form.chunk:
        raise GraphError(f"signals are to have one length, a multiple of {form.chunk} frames")
    step, results = Steps(graph), []
    for start in range(0, length, form.chunk):
        named = zip(names, signals, strict=True)
        results.append(step(*(x.narrow(form.axes[n], start, form.chunk) if n in form.axes else x for n, x in named)))
    whole = [torch.cat(parts, axis) for parts, axis in zip(zip(*results, strict=True), form.output_axes, strict=True)]
    triples = zip(whole, form.output_axes, form.delays, strict=True)
    return [x.narrow(axis, min(d, x.shape[axis]), max(0, x.shape[axis] - d)) for x, axis, d in triples]
