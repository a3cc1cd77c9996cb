"""Measurements: each script prints what it measured and can append it to docs/benchmarks.md."""
