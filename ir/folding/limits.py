"""The limit on growth by folding, kept in ``graph.metadata`` and in the file of a simplified model.

The limit is a part of the bytes that the parameters had before any run of ``simplify``. A simplified file says how many
those were, or each run would grant anew what the one before used up.
"""

from __future__ import annotations

from collections.abc import Mapping

BYTES_BEFORE = "bytes_before_simplify"  # of all parameters
FILE_ROOM = "onnx_room"  # bytes that constants may take which stand in the file for what it computed so far
BYTES_PROPERTY = "regauge.bytes_before_simplify"  # in the metadata of a file
NODE_BYTES = 64  # what a node takes in a file, about: a small constant in its place does not make it larger


def noted_bytes(properties: Mapping[str, str]) -> int | None:
    """What the metadata of a file says of its parameters before ``simplify``; None where that is no number."""
    text = properties.get(BYTES_PROPERTY, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
