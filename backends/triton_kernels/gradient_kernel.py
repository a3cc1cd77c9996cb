"""The kernels of the gradients of attention as one that is launched like others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from regauge.backends.triton_kernels.attention_gradient import GRADIENT_FORMS, STATISTICS, AttentionGradientKernel
from regauge.backends.triton_kernels.kernel import Form, Kernel, Source
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.attention_gradients import AttentionGradient
from regauge.ir.graph import Graph, Value


@dataclass(eq=False)
class GradientKernel(Kernel):
    """Three kernels, one after the other; ``graph`` is that of ``gradient`` or a copy of it, whose inputs are given and
    whose outputs are found."""

    gradient: AttentionGradient | None = None
    graph: Graph | None = None

    @property
    def forms(self) -> tuple[Form, ...]:
        return ("statistics",)

    def form_for(self, sizes: Mapping[Dim, int], *, single: bool = False) -> Form:
        return "statistics"

    def _write(self, form: Form, contiguous: bool) -> Source:
        assert self.gradient is not None
        then: Source | None = None
        for one in reversed(GRADIENT_FORMS):
            writer = AttentionGradientKernel(self.gradient, self.name, one, contiguous=contiguous)
            text, reads, writes = writer.source(), tuple(writer.reads), tuple(writer.writes)
            then = Source(
                text,
                writer.name_of_kernel,
                one,
                self.rounding,
                reads,
                writes,
                writer.loops,
                scratch=STATISTICS,
                then=then,
            )
        assert then is not None
        return then

    def launch(self, given: Mapping[Value, torch.Tensor], form: Form | None = None) -> dict[Value, torch.Tensor]:
        """The gradients of queries, keys and values, for what the region reads, the gradient of its result, and it."""
        assert self.gradient is not None and self.graph is not None
        whole = self.gradient.graph
        inside = [*self.gradient.reads, *whole.inputs[-2:]]
        read = {own: given[value] for own, value in zip(inside, self.graph.inputs, strict=True)}
        found = super().launch(read, form)
        return {own: found[value] for own, value in zip(self.graph.outputs, whole.outputs, strict=True)}  # type: ignore[index, misc]
