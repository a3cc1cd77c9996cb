"""``fused``: nodes that are computed as one, kept as a region; see :mod:`regauge.ir.fusion.fused`."""

from __future__ import annotations

from typing import Any

from regauge.ir.onnx_kernels import DOMAIN, KERNEL
from regauge.ir.operator import operator


def _fused_rule(call: Any) -> Any:
    return call.region(0, [axes or [] for axes in call.axes])


def _spell(onnx: Any, node: Any) -> Any:
    return onnx(node.metadata[KERNEL], *onnx.all_operands(), outputs=len(node.outputs), domain=DOMAIN)


@operator(rule=_fused_rule, spell=_spell)
def fused(*operands, rounding="fused", regions=()):  # type: ignore[no-untyped-def]
    """Its only region, of the operands. ``rounding`` says what a kernel of it rounds: what it gives at the end
    (``fused``), or what each of its nodes gives (``eager``, as here)."""
    return regions[0](*operands)
