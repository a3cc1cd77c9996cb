"""Notes on nodes that were captured in evaluation mode: what their module does in training, which no node shows.

Kept in ``node.metadata``; only the torch emitter reads them.
"""

from __future__ import annotations

TRACKED = "torch.tracked_by"  # a norm over each instance, which updates its running statistics by this momentum
DROPOUT = "torch.attention_dropout"  # the share of its weights that an attention, or the softmax of one, drops
LAYER = "torch.layer"  # the source of a layer that draws random numbers
