"""Exact simplification: rewrite rules, folding, merging of equal nodes."""
