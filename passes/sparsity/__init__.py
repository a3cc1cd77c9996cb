"""Sparsity: weights that keep their shape and lose entries, in patterns that storage and kernels can use."""
