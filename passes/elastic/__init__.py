"""Nested networks: one set of weights of which the first indices of every Dim are a network too."""
