"""Layers as products of smaller ones, and the ranks of these."""
