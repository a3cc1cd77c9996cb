"""Regions: sets of nodes that one kernel can compute, found from the axis rules and elements of operators."""
