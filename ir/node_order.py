"""Graphs whose order of nodes was chosen for what is alive: code written of them keeps it, and frees what was read."""

IN_ORDER = "in_order"
"""In the metadata of such a graph."""
