"""Quantization: weights and activations as small integers with scales."""
