"""Dims: the axis analysis that finds them, their groups and extents, and what may be cut, ordered or kept of them."""
