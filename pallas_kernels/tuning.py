"""Block sizes by chip and shape: `tuned/*.json`, written by `scripts/tune_kernels.py`.

A kernel asks with what it knows while it is traced; where the table has nothing it uses its own
rule. Each entry says where it comes from: "static" (the TPU compiler's schedule) or "measured".

    {"device_kind": "TPU v5 lite",
     "entries": [{"op": "paged_attention", "stage": "decode", "key": {"head_dim": 128, ...},
                  "config": {"block_kv": 512}, "source": "static", "score": 1234.5,
                  "versions": {"jax": "0.11.2", "libtpu": "0.0.52"}}]}

`key` is what the kernel asks with, whole; a lookup finds equal keys only. `score` is what the tuner
compared: lower is better (static: cycles; measured: microseconds).
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "tuned"

SOURCES = ("static", "measured")
STAGES = {
    "flash_attention": ("forward", "backward"),
    "paged_attention": ("decode", "prefill"),
}

Config = Mapping[str, int]
Key = tuple[str, str, tuple[tuple[str, int | str], ...]]


@dataclass(frozen=True)
class Entry:
    """One tuned choice of block sizes."""

    op: str
    stage: str
    key: Mapping[str, int | str]
    config: Config
    source: str
    score: float
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> Key:
        return self.op, self.stage, tuple(sorted(self.key.items()))


def lookup(device_kind: str | None, op: str, stage: str, **key: int | str) -> Config | None:
    """The tuned block sizes of `op` ("flash_attention", "paged_attention") in `stage` ("forward",
    "decode", ...) for exactly `key`, or None where nothing was tuned."""
    wanted = op, stage, tuple(sorted(key.items()))
    for trial in _trials:
        trial.asked.append(wanted)
        if (op, stage) in trial.configs:
            return trial.configs[op, stage]
    if device_kind is None:
        return None
    return _table(device_kind).get(wanted)


@dataclass
class Trial:
    """What is asked of `lookup` while it lasts, in order, and what is answered instead of the
    table's entries."""

    configs: Mapping[tuple[str, str], Config]
    asked: list[Key] = field(default_factory=list)


_trials: list[Trial] = []


@contextmanager
def trial(configs: Mapping[tuple[str, str], Config] | None = None) -> Iterator[Trial]:
    """For tools: block sizes by (op, stage) for everything traced inside, whatever its key; and a
    record of the keys that were asked for. What was traced before keeps its block sizes."""
    begun = Trial(configs or {})
    _trials.append(begun)
    try:
        yield begun
    finally:
        _trials.remove(begun)


def entries(device_kind: str) -> tuple[Entry, ...]:
    """All that was tuned for a chip; nothing where it has no file."""
    path = file_of(device_kind)
    return parse(path.read_text(), str(path), device_kind) if path.exists() else ()


def file_of(device_kind: str) -> Path:
    """Where the entries of a chip are kept: "TPU v5 lite" in tpu_v5_lite.json."""
    return FOLDER / f"{device_kind.lower().replace(' ', '_')}.json"


def parse(text: str, where: str, device_kind: str) -> tuple[Entry, ...]:
    """The entries of a file's text; ValueError that says where in `where` something is wrong."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("entries"), list):
        raise ValueError(f'{where} must be an object with a list "entries"')
    if content.get("device_kind") != device_kind:
        given = content.get("device_kind")
        raise ValueError(f"{where} has device_kind {given!r}; its name says {device_kind!r}")
    found: dict[Key, Entry] = {}
    for i, raw in enumerate(content["entries"]):
        entry = _entry(raw, f"{where}, entry {i}")
        if entry.id in found:
            raise ValueError(f"{where}, entry {i}: its op, stage and key were there before")
        found[entry.id] = entry
    return tuple(found.values())


def _entry(raw: Any, where: str) -> Entry:
    if not isinstance(raw, dict):
        raise ValueError(f"{where} is {raw!r}; it must be an object")
    names = {"op", "stage", "key", "config", "source", "score", "versions"}
    if raw.keys() != names:
        raise ValueError(f"{where} has {sorted(raw)}; it must have {sorted(names)}")
    if raw["op"] not in STAGES:
        raise ValueError(f"{where}: op is {raw['op']!r}; allowed: {', '.join(STAGES)}")
    allowed = STAGES[raw["op"]]
    if raw["stage"] not in allowed:
        raise ValueError(f"{where}: stage is {raw['stage']!r}; allowed: {', '.join(allowed)}")
    if raw["source"] not in SOURCES:
        raise ValueError(f"{where}: source is {raw['source']!r}; allowed: {', '.join(SOURCES)}")
    if not _is_number(raw["score"]):
        raise ValueError(f"{where}: score is {raw['score']!r}; it must be a number")
    _check_values(where, "key", raw["key"], lambda x: _is_int(x) or isinstance(x, str))
    _check_values(where, "config", raw["config"], lambda x: _is_int(x) and x >= 0)
    _check_values(where, "versions", raw["versions"], lambda x: isinstance(x, str))
    return Entry(**raw)


def _check_values(where: str, name: str, values: Any, allowed: Any) -> None:
    if not isinstance(values, dict) or not all(map(allowed, values.values())):
        kind = {"key": "ints and strings", "config": "ints >= 0", "versions": "strings"}[name]
        raise ValueError(f"{where}: {name} is {values!r}; it must be an object of {kind}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def render(device_kind: str, found: Iterable[Entry]) -> str:
    """The text of a chip's file: sorted, one entry a line, so that a diff shows what changed."""
    lines = [
        json.dumps(vars(entry), sort_keys=True) for entry in sorted(found, key=lambda e: str(e.id))
    ]
    body = ",\n    ".join(lines)
    name = json.dumps(device_kind)
    return f'{{\n  "device_kind": {name},\n  "entries": [\n    {body}\n  ]\n}}\n'


@lru_cache
def _table(device_kind: str) -> dict[Key, Config]:
    return {entry.id: entry.config for entry in entries(device_kind)}
