"""Removing whole parts of a network: residual branches and repeated blocks."""
