"""The Triton backend: fused regions as kernels, their sizes, tuning, compilation and files."""
