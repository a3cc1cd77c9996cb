"""Graphs, operators and reports as text, and text read back."""
