"""Gives integer layers of an emitted module their paths: that of the layer which each replaces, or one below it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch

from regauge.backends.torch_module.frames import inside, module_path
from regauge.ir.edit import Builder
from regauge.ir.graph import Graph, Kind, Node, Parameter
from regauge.ir.storage.weights import Weight

Parts: TypeAlias = "dict[str, tuple[Weight | torch.Tensor, Literal['parameter', 'buffer', 'trained']]]"
"""The tensors of a layer by their names in it; parameters are not trained but for those that are said to be."""


@dataclass(eq=False)
class Home:
    """A layer: the name of the weight that it was made of, its source text, its node and its tensors."""

    origin: str
    text: str
    node: Node | None = None
    parts: dict[str, Parameter] = field(default_factory=dict)
    path: str = ""

    def add(self, build: Builder, parts: Parts) -> None:
        """Make the tensors, under names that are not their own yet."""
        for leaf, (data, kind) in parts.items():
            of_kind: Kind = "buffer" if kind == "buffer" else "parameter"
            name = build.unique(f"{self.origin}.{leaf}")
            self.parts[leaf] = build.parameter(name, data, of_kind, trainable=kind == "trained")


def settle(graph: Graph, homes: Sequence[Home]) -> None:
    """Give every layer a path of its own, as close as can be to where its weight was, and its tensors their names."""
    own = {parameter for home in homes for parameter in home.parts.values()}
    others = {name for p in graph.parameters.values() if p not in own for name in p.names}
    frames = Counter(module_path(path) for node in graph.nodes for path, _ in node.scope)
    taken: set[str] = set()
    for home in homes:
        assert home.node is not None
        frame = module_path(home.node.scope[-1][0]) if home.node.scope else ""
        home.path = next(path for path in _candidates(home.origin, frame) if _fits(path, frame, frames, others | taken))
        taken.add(home.path)
        for leaf, parameter in home.parts.items():
            parameter.name = f"{home.path}.{leaf}"
    graph.parameters = {parameter.name: parameter for parameter in graph.parameters.values()}


def _candidates(origin: str, frame: str) -> Iterator[str]:
    """fc.weight_quantized: fc; attn.in_proj_weight: attn.in_proj; then the same below the module that runs it."""
    path = re.sub(r"[._]?weight$", "", origin.removesuffix("_quantized")) or "linear"
    path = ".".join(re.sub(r"\W", "_", part) or "layer" for part in re.split(r"[.:/]+", path))
    yield path
    leaf = path.rpartition(".")[2]
    below = f"{frame}.{leaf}".lstrip(".")
    yield below
    count = 0
    while True:
        count += 1
        yield f"{below}_{count}"


def _fits(path: str, frame: str, frames: Counter[str], taken: set[str]) -> bool:
    """Whether a layer may live there: the module that runs it, if nothing else does, or a new one inside of that."""
    if any(name == path or inside(name, path) or inside(path, name) for name in taken):
        return False
    return frames[path] == 1 if path == frame else inside(path, frame) and path not in frames
