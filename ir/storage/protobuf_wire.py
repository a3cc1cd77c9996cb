"""The wire format of protobuf, as far as large tensors need it that are not to pass through a message.

A message is a row of fields, each a key (number and kind, as one varint) and a value; a message inside one is a length
and its own fields (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TypeAlias

Bytes: TypeAlias = bytes | mmap.mmap

VARINT, EIGHT_BYTES, DELIMITED, FOUR_BYTES = 0, 1, 2, 5  # kinds of values; the others are groups, which ONNX has not
FIXED_BYTES = {EIGHT_BYTES: 8, FOUR_BYTES: 4}


def encode_varint(number: int) -> bytes:
    """A number in groups of seven bits, the least first."""
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def delimited(field: int, length: int) -> bytes:
    """What stands in front of ``length`` bytes that are the value of a field."""
    return encode_varint(field << 3 | DELIMITED) + encode_varint(length)


def fields(message: Bytes, at: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int | None, int]]:
    """Of each field of a serialised message its number, its start, key included, and its end.

    Third comes where the bytes of its value start, None where that is a number. The message is what lies in ``message``
    from ``at`` to ``end``. Raises ValueError for groups and for a field that ends elsewhere, IndexError where there are
    no bytes.
    """
    end = len(message) if end is None else end
    while at < end:
        start, body = at, None
        key = message[at]
        at += 1
        if key > 127:
            key, at = _varint(message, start)
        kind = key & 7
        if kind == DELIMITED:
            length = message[at]
            at += 1
            if length > 127:
                length, at = _varint(message, at - 1)
            body = at
            at += length
        elif kind == VARINT:
            _, at = _varint(message, at)
        elif kind in FIXED_BYTES:
            at += FIXED_BYTES[kind]
        else:
            raise ValueError(f"field {key >> 3} is of kind {kind}")
        if at > end:
            raise ValueError(f"field {key >> 3} ends behind its message")
        yield key >> 3, start, body, at


def _varint(message: Bytes, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
