"""Reads and checks the files of a tokenizer directory, and turns the Rust library's faults into errors.

The `tokenizers` library accepts files with repeated ids, and renumbers added tokens silently; either
gives wrong token ids with no error. These checks run on the JSON itself before the library sees it.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jaxinfer.errors import TokenizerError

MAX_FILE_BYTES = 256 * 2**20


@contextmanager
def rust_errors(doing: str, path: object = None) -> Iterator[None]:
    """Re-raises what `tokenizers` raises as TokenizerError.

    A panic in Rust is a `PanicException`, which derives from BaseException and so escapes an
    `except Exception`. Interrupts and exits pass through.
    """
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        where = f"{path}: " if path is not None else ""
        raise TokenizerError(
            f"{where}{doing} failed: {str(error)[:300]}", path=path
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; errors carry the line and column."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(
                f"{path}: has {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read", path=path
            )
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise TokenizerError(
            f"{path}: not found; give a directory that has it, or pass tokenizer=", path=path
        ) from None
    except json.JSONDecodeError as error:
        raise TokenizerError(
            f"{path}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})", path=path
        ) from error
    except (OSError, UnicodeDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, TokenizerError):
            raise
        raise TokenizerError(f"{path}: cannot be read: {error}", path=path) from error
    if not isinstance(content, dict):
        raise TokenizerError(
            f"{path}: must hold an object; got {type(content).__name__}", path=path
        )
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number of JSON")
