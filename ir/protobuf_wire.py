"""The wire format of protobuf, as far as large tensors need it that are not to pass through a message.

A message is a row of fields, each a key (number and kind, as one varint) and a value; a message inside one is a length
and its own fields (https://protobuf.dev/programming-guides/encoding).
"""

from __future__ import annotations

from collections.abc import Iterator

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


def fields(message: bytes) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of a serialised message, its key included; raises ValueError for groups."""
    at = 0
    while at < len(message):
        start = at
        key, at = _varint(message, at)
        kind = key & 7
        if kind == DELIMITED:
            length, at = _varint(message, at)
            at += length
        elif kind == VARINT:
            _, at = _varint(message, at)
        elif kind in FIXED_BYTES:
            at += FIXED_BYTES[kind]
        else:
            raise ValueError(f"field {key >> 3} is of kind {kind}")
        yield key >> 3, start, at


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
