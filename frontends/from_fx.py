"""The last way in: fx symbolic tracing, for models whose Python torch.export cannot follow.

fx traces without shapes, so data-dependent Python that only looks at modules and attributes is unrolled; the traced
module, which has plain graph code instead of the user's forward, is then exported to get shapes and ATen calls.
"""

from __future__ import annotations

import torch
from torch import fx


def trace(module: torch.nn.Module) -> fx.GraphModule:
    """The module as an fx graph over its own sub-modules; raises whatever fx raises where it cannot be traced."""
    if isinstance(module, fx.GraphModule):
        return module
    return fx.symbolic_trace(module)
