"""Decoders that are run position by position: caches of keys and values as states, and what they take."""
