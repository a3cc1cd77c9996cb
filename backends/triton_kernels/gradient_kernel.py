"""The kernels of the gradients of attention as one that is launched like others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from regauge.backends.triton_kernels.attention_gradient import (
    BIAS_FORMS,
    GRADIENT_FORMS,
    WIDE_FORMS,
    AttentionGradientKernel,
)
from regauge.backends.triton_kernels.attention_sizes import launch_of_bias
from regauge.backends.triton_kernels.bias_gradient import BiasGradientKernel
from regauge.backends.triton_kernels.kernel import Form, Kernel, Source
from regauge.backends.triton_kernels.launch import Launch
from regauge.backends.triton_kernels.loops import count
from regauge.ir.dims.extents import Dim
from regauge.ir.fusion.attention_gradients import AttentionGradient
from regauge.ir.graph import Graph, Value


@dataclass(eq=False)
class GradientKernel(Kernel):
    """Three kernels, one after the other; ``graph`` is that of ``gradient`` or a copy of it, whose inputs are given and
    whose outputs are found."""

    gradient: AttentionGradient | None = None
    graph: Graph | None = None

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        return ("statistics",)

    def form_for(self, sizes: Mapping[Dim, int], *, single: bool = False) -> Form:
        return "statistics"

    def _write(self, form: Form, contiguous: bool, *, text: bool = True) -> Source:
        then: Source | None = None
        for writer in reversed(self._writers(contiguous)):
            made, reads, writes = writer.source() if text else "", tuple(writer.reads), tuple(writer.writes)
            then = Source(
                made,
                writer.name_of_kernel,
                writer.form,
                self.rounding,
                reads,
                writes,
                writer.loops,
                scratch=writer.scratch,
                then=then,
            )
        assert then is not None
        return then

    def _writers(self, contiguous: bool) -> list[AttentionGradientKernel]:
        gradient, name = self.gradient, self.name
        assert gradient is not None
        if gradient.bias is None:
            forms = WIDE_FORMS if gradient.parts.wide_head or gradient.parts.wide_columns else GRADIENT_FORMS
            return [AttentionGradientKernel(gradient, name, form, contiguous=contiguous) for form in forms]
        return [BiasGradientKernel(gradient, name, form, contiguous=contiguous) for form in BIAS_FORMS]

    def scratch(self, source: Source, sizes: Mapping[Dim, int], start: Launch, architecture: str) -> list[int]:
        """Of the gradient of a bias also the parts that are added up, if there are several."""
        rows = super().scratch(source, sizes, start, architecture)
        if self.gradient is None or self.gradient.bias is None:
            return rows
        (bias,), loops = source.writes, source.loops
        parts = launch_of_bias(source.reads, bias, loops, sizes, architecture).constants["PARTS"]
        return [*rows, parts * count(bias.loops(loops.all), sizes) if parts > 1 else 1]

    def launch(self, given: Mapping[Value, torch.Tensor], form: Form | None = None) -> dict[Value, torch.Tensor]:
        """The gradients of queries, keys and values, or of a bias, for what the region reads and the gradient of its
        result."""
        assert self.gradient is not None and self.graph is not None
        whole = self.gradient.graph
        inside = [*self.gradient.reads, whole.inputs[-1]]
        read = {own: given[value] for own, value in zip(inside, self.graph.inputs, strict=True)}
        found = super().launch(read, form)
        return {own: found[value] for own, value in zip(self.graph.outputs, whole.outputs, strict=True)}  # type: ignore[index, misc]
