"""Sparsity while training: objects that sit beside an optimizer in any torch training loop."""
