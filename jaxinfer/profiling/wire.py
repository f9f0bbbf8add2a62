"""Protocol buffers' wire format, as much of it as reading a trace takes. Knows no message.

A message is a run of (field number, value): integers for varints, `memoryview`s for everything that
has a length or a fixed width. Source: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator

Field = int | memoryview


class WireError(ValueError):
    """The bytes are not a message."""


def fields(message: memoryview) -> Iterator[tuple[int, Field]]:
    """(field number, value) in the order they are written; WireError where they end too early."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise WireError(f"wire type {kind} at byte {at}")
        if at + size > end:
            raise WireError(f"a field of {size} bytes at byte {at} of {end}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    try:
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise WireError(f"a number of more than ten bytes at byte {at}")
    except IndexError:
        raise WireError(f"a number is cut off at byte {at}") from None


def parts(message: memoryview, number: int) -> Iterator[memoryview]:
    """The values of field `number` that have a length: sub-messages, strings, packed numbers."""
    for found, value in fields(message):
        if found == number and isinstance(value, memoryview):
            yield value


def text(value: Field) -> str:
    """A string field; "" for what is none."""
    return bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else ""


def numbers(value: Field) -> list[int]:
    """A repeated integer field, packed or one by one."""
    if isinstance(value, int):
        return [value]
    found, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        found.append(number)
    return found
