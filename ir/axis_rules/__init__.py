"""Axis rules: their notation, and what one says of the extents of the operands of a node."""
