"""Structured pruning: removing indices of Dims by importance."""
