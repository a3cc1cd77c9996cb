"""Linear layers of a module on torch's sparse kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from regauge.ir.storage.sparse_layouts import Layout, NofM

_TRIAL_ROWS = 64  # a multiple of what any kernel wants


def use_sparse_kernels(module: nn.Module, layouts: Sequence[Layout] = (NofM(2, 4),)) -> dict[str, str]:
    """Let the linear layers of a module run on sparse kernels, in place, for inference.

    Each takes the first of the ``layouts`` that its weight fits and that torch multiplies with where it lies: 2:4 on
    CUDA in half precision; ``Csr()`` and ``Blocks(4, 4)`` on a CPU too, which pays where nearly all entries are zero.
    Returns the layers that stay as they are, with the reason of each.
    """
    left = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer.weight.layout is torch.strided:
            reasons = []
            for layout in layouts:
                reason = _put(layer, layout)
                if reason is None:
                    break
                reasons.append(reason if len(layouts) == 1 else f"{layout.name}: {reason}")
            else:
                left[name] = "; ".join(reasons)
    return left


def _put(layer: nn.Linear, layout: Layout) -> str | None:
    """Give a layer its weight in a layout; the reason where that cannot be."""
    weight = layer.weight.detach()
    reason = layout.kernel_misfit(weight)
    if reason is not None:
        return reason
    try:
        operand = layout.operand(weight)
        F.linear(weight.new_zeros(_TRIAL_ROWS, weight.shape[1]), operand, layer.bias)
    except (RuntimeError, NotImplementedError) as refusal:
        return f"torch does not run it on {weight.device.type}: {str(refusal).splitlines()[0]}"
    layer.weight = nn.Parameter(operand, requires_grad=False)
    return None
