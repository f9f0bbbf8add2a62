"""Opening files that may be anything: bounded, never blocking, naming what a wrong file looks like.

Every weight and config file enters through here. A path that is not a regular file (a FIFO, a
folder, a device) is refused before it is opened: opening a FIFO would wait for a writer forever.
"""

import json
import mmap
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from jaxinfer.errors import ConfigError, JaxInferError, ModelFormatError

MAX_JSON_BYTES = 16 * 2**20
MAX_INDEX_BYTES = 64 * 2**20

_LOOKS_LIKE = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<!doctype", "an HTML page (a login or error page?): download the file again"),
    (b"<html", "an HTML page (a login or error page?): download the file again"),
    (b"pk\x03\x04", "a zip archive (a PyTorch checkpoint?): pickle is never loaded; convert it"),
    (b"\x80\x02", "a Python pickle: pickle is never loaded; convert it to safetensors"),
    (b"\x80\x03", "a Python pickle: pickle is never loaded; convert it to safetensors"),
    (b"\x80\x04", "a Python pickle: pickle is never loaded; convert it to safetensors"),
    (b"\x80\x05", "a Python pickle: pickle is never loaded; convert it to safetensors"),
    (b"\x89hdf\r\n", "an HDF5 file: convert it to safetensors"),
    (b"gguf", "a GGUF file: name it *.gguf"),
)


def looks_like(head: bytes) -> str | None:
    """Say what a file that begins with `head` seems to be, None where nothing is recognised."""
    start = head.lstrip().lower()
    return next((what for magic, what in _LOOKS_LIKE if start.startswith(magic)), None)


def regular_size(path: Path, error: type[JaxInferError] = ModelFormatError) -> int:
    """Return the size of the regular file `path` in bytes; anything else is `error`."""
    try:
        info = os.stat(path)
    except (OSError, ValueError) as cause:
        raise _file_error(error, path, f"cannot be opened: {_reason(cause)}") from cause
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "not a regular file"
        raise _file_error(error, path, f"is {kind}; a file is needed")
    return info.st_size


def map_file(path: Path) -> mmap.mmap:
    """Map a regular, non-empty file read-only; ModelFormatError where that is not possible."""
    if regular_size(path) == 0:
        raise ModelFormatError(f"{path}: the file is empty (0 bytes); download it again", path=path)
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as cause:
        raise ModelFormatError(f"{path}: cannot be opened: {_reason(cause)}", path=path) from cause


def read_json(path: Path, *, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object strictly; ConfigError names the file and the fault.

    Refused: larger than `limit` bytes, a byte order mark, NaN and Infinity, a name given twice,
    anything that is not an object at the top.
    """
    size = regular_size(path, ConfigError)
    if size > limit:
        raise ConfigError(f"{path}: {size} bytes; a JSON file here may have {limit}", path=path)
    try:
        data = path.read_bytes()
    except OSError as cause:
        raise ConfigError(f"{path}: cannot be opened: {_reason(cause)}", path=path) from cause
    try:
        return parse_json_object(data)
    except ValueError as cause:
        raise ConfigError(f"{path}: {cause}", path=path) from cause


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Parse strict JSON bytes whose top is an object; ValueError says what is wrong."""
    if not data.strip():
        raise ValueError("the file is empty; a JSON object is needed")
    if what := looks_like(data[:64]):
        raise ValueError(f"not JSON: it looks like {what}")
    if data.startswith(b"\xef\xbb\xbf"):
        raise ValueError("begins with a byte order mark; save it as UTF-8 without BOM")
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError as cause:
        raise ValueError(f"is not UTF-8 text (byte {cause.start})") from cause
    except json.JSONDecodeError as cause:
        raise ValueError(f"is not valid JSON: {cause}") from cause
    except RecursionError as cause:
        raise ValueError("is not valid JSON: nested too deeply") from cause
    if not isinstance(value, dict):
        raise ValueError(f"holds a JSON {type(value).__name__}; an object {{...}} is needed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"gives the name {twice[:200]!r} twice; which one holds is undefined")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"holds {text}, which is not a JSON number; write a finite number")


def _file_error(error: type[JaxInferError], path: Path, text: str) -> JaxInferError:
    caused = error(f"{path}: {text}")
    caused.path = path  # type: ignore[attr-defined]
    return caused


def _reason(cause: Exception) -> str:
    return getattr(cause, "strerror", None) or str(cause)
