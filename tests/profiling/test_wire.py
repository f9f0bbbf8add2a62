"""The wire format reader: what it accepts, and that it stops where bytes are not a message."""

import pytest

from jaxinfer.profiling import wire


def test_fields_of_every_wire_type():
    message = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x19" + bytes(8) + b"\x25" + bytes(4)
    found = [
        (n, v if isinstance(v, int) else bytes(v)) for n, v in wire.fields(memoryview(message))
    ]
    assert found == [(1, 150), (2, b"hi"), (3, bytes(8)), (4, bytes(4))]


@pytest.mark.parametrize(
    ("message", "what"),
    [
        (b"\x08", "cut off"),
        (b"\x08\x96", "cut off"),
        (b"\x12\x05hi", "5 bytes at byte 2 of 4"),
        (b"\x19\x00\x00", "8 bytes"),
        (b"\x0b", "wire type 3"),
        (b"\x08" + b"\xff" * 11, "more than ten bytes"),
    ],
)
def test_malformed(message, what):
    with pytest.raises(wire.WireError, match=what):
        list(wire.fields(memoryview(message)))


def test_numbers_packed_or_one_by_one():
    assert wire.numbers(300) == [300]
    assert wire.numbers(memoryview(b"\x03\x8e\x02\x9e\xa7\x05")) == [3, 270, 86942]
    assert wire.numbers(memoryview(b"")) == []


def test_parts_are_the_values_with_a_length():
    message = memoryview(b"\x12\x01a\x10\x05\x12\x01b")
    assert [bytes(part) for part in wire.parts(message, 2)] == [b"a", b"b"]


def test_text_of_bytes_that_are_none():
    assert wire.text(memoryview(b"a\xff")) == "a\ufffd"
    assert wire.text(7) == ""
