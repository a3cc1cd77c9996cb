"""Sizes of axes: numbers, or expressions over the dynamic sizes that a user named."""
