"""Fusion: nodes that one kernel computes as one node, and back."""
