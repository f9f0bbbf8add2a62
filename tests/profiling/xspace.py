"""Hand-made traces: an XSpace from plain data, with times that a test can check exactly."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jax.profiler import ProfileData

Value = int | str | bytes


@dataclass
class Event:
    """`start` and `length` in microseconds."""

    name: str
    start: float
    length: float
    stats: Mapping[str, Value] = field(default_factory=dict)


@dataclass
class Plane:
    """Lines by name; `metadata` are events that stand in the plane's table alone, with stats."""

    name: str
    lines: Mapping[str, Iterable[Event]] = field(default_factory=dict)
    metadata: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)


def serialise(planes: Iterable[Plane]) -> bytes:
    return ProfileData.text_proto_to_serialized_xspace("\n".join(map(_plane, planes)))


def write(path: Path, planes: Iterable[Plane]) -> Path:
    """A trace file where JAX would put it, below the folder `path`."""
    folder = path / "plugins" / "profile" / "2026_01_02_03_04_05"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "host.xplane.pb"
    file.write_bytes(serialise(planes))
    return file


def _plane(plane: Plane) -> str:
    events: dict[str, int] = {}
    stats: dict[str, int] = {}

    def stat(name: str, value: Value) -> str:
        key = stats.setdefault(name, len(stats) + 1)
        kind = {int: "int64_value", str: "str_value", bytes: "bytes_value"}[type(value)]
        return f"stats {{ metadata_id: {key} {kind}: {_literal(value)} }}"

    lines = []
    for number, (name, found) in enumerate(plane.lines.items()):
        text = []
        for event in found:
            key = events.setdefault(event.name, len(events) + 1)
            values = " ".join(stat(k, v) for k, v in event.stats.items())
            text.append(
                f"events {{ metadata_id: {key} offset_ps: {round(event.start * 1e6)} "
                f"duration_ps: {round(event.length * 1e6)} {values} }}"
            )
        lines.append(f"lines {{ id: {number + 1} name: {_literal(name)} {' '.join(text)} }}")
    table = [
        f"event_metadata {{ key: {key} value {{ id: {key} name: {_literal(name)} }} }}"
        for name, key in events.items()
    ]
    for number, (name, values) in enumerate(plane.metadata.items(), len(events) + 1):
        text = " ".join(stat(k, v) for k, v in values.items())
        table.append(
            f"event_metadata {{ key: {number} value {{ id: {number} name: {_literal(name)} "
            f"{text} }} }}"
        )
    table += [
        f"stat_metadata {{ key: {key} value {{ id: {key} name: {_literal(name)} }} }}"
        for name, key in stats.items()
    ]
    return f"planes {{ name: {_literal(plane.name)} {' '.join(lines + table)} }}"


def _literal(value: Value) -> str:
    """A number or a quoted string of a text proto."""
    if isinstance(value, int):
        return str(value)
    data = value.encode() if isinstance(value, str) else value
    return '"' + "".join(f"\\{byte:03o}" for byte in data) + '"'


# -- compiled programs


@dataclass
class Op:
    """One instruction of a program; `operands` and `calls` by name."""

    name: str
    opcode: str
    op_name: str = ""
    operands: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


def program(name: str, computations: Mapping[str, Iterable[Op]]) -> bytes:
    """A serialised HloProto."""
    listed = {key: list(ops) for key, ops in computations.items()}
    names = [op.name for ops in listed.values() for op in ops]
    ids = {op: number for number, op in enumerate(names, 1)}
    keys = {key: number for number, key in enumerate(listed, 101)}
    module = _bytes(1, name.encode())
    for key, ops in listed.items():
        body = b"".join(_bytes(2, _instruction(op, ids, keys)) for op in ops)
        module += _bytes(3, body + _number(5, keys[key]))
    return _bytes(1, module)


def _instruction(op: Op, ids: Mapping[str, int], keys: Mapping[str, int]) -> bytes:
    text = _bytes(1, op.name.encode()) + _bytes(2, op.opcode.encode())
    text += _bytes(7, _bytes(2, op.op_name.encode())) if op.op_name else b""
    text += _number(35, ids[op.name])
    text += _bytes(36, b"".join(map(_varint, (ids[name] for name in op.operands))))
    return text + b"".join(_number(38, keys[name]) for name in op.calls)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def metadata(programs: Mapping[str, bytes]) -> Plane:
    """The plane that carries compiled programs, by "name(id)"."""
    return Plane("/host:metadata", metadata={n: {"Hlo Proto": p} for n, p in programs.items()})


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what at least one of the intervals (start, end) covers."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        if end > reached:
            total += end - max(start, reached)
            reached = end
    return total
