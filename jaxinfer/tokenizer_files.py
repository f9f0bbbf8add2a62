"""Reads and checks a directory's tokenizer files, and turns the Rust library's faults into errors.

The `tokenizers` library accepts files with repeated ids, and may renumber added tokens silently;
either gives wrong token ids with no error. These checks run on the JSON itself, before the library
sees it, and the loaded tokenizer is compared with the file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

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
        raise TokenizerError(f"{where}{doing} failed: {str(error)[:300]}", path=path) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; errors carry the line and column."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise TokenizerError(
                f"{path}: has {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read",
                path=path,
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


@dataclass(frozen=True)
class LoadedFiles:
    """A directory's tokenizer. `templates` maps names to chat templates ("default" among them)."""

    backend: tokenizers.Tokenizer
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    templates: dict[str, str]


def load(directory: Path) -> LoadedFiles:
    """The checked tokenizer of a directory, read with transformers' AutoTokenizer.

    Only files of the directory are read; code in it is never run (`auto_map` is not followed).

    Raises:
        TokenizerError: a file is missing, malformed or contradicts itself.
    """
    path = directory / "tokenizer.json"
    if not directory.is_dir():
        raise TokenizerError(f"{directory}: not a directory", path=directory)
    if not path.exists() and (directory / "tokenizer.model").exists():
        raise TokenizerError(
            f"{directory}: has tokenizer.model but no tokenizer.json, and only the latter is read; "
            f"convert it (AutoTokenizer.save_pretrained of transformers) or pass tokenizer=",
            path=directory,
        )
    content = read_json(path)
    ids = check_tokenizer_json(content, path)
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    with rust_errors(
        f"reading it with tokenizers {tokenizers.__version__} (a newer version may know it)", path
    ):
        tokenizers.Tokenizer.from_file(str(path))
    loaded = _auto_tokenizer(directory)
    backend = loaded.backend_tokenizer
    for token, i in ids.items():
        if backend.token_to_id(token) != i:
            raise TokenizerError(
                f"{path}: {token!r:.100} has id {i}, but the tokenizer gives it "
                f"{backend.token_to_id(token)}; ids must follow one another",
                path=path,
            )
    # transformers gives a special token without an id a new one, which no embedding row stands for
    known = set(ids.values()) | {int(i) for i in settings.get("added_tokens_decoder") or {}}
    for name in ("bos_token", "eos_token"):
        i = getattr(loaded, f"{name}_id")
        if i is not None and i not in known:
            raise TokenizerError(
                f"{settings_path}: {name} {getattr(loaded, name)!r:.100} is not in the vocabulary",
                path=settings_path,
            )
    return LoadedFiles(
        backend,
        loaded.bos_token_id,
        loaded.eos_token_id,
        loaded.pad_token_id,
        read_templates(directory, settings),
    )


def _auto_tokenizer(directory: Path) -> Any:
    # Imported here: transformers takes seconds to import, and a GGUF model does without it.
    # Its advice to install torch is not for us: a tokenizer needs none.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    described = [directory / name for name in ("config.json", "tokenizer_config.json")]
    with rust_errors("reading the tokenizer with transformers", directory):
        if not any(path.exists() for path in described):
            return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )


def check_tokenizer_json(content: dict[str, Any], path: Path) -> dict[str, int]:
    """The ids of all tokens in a tokenizer.json; TokenizerError where they are contradictory."""
    model = content.get("model")
    if not isinstance(model, dict):
        raise TokenizerError(f'{path}: "model" must be an object; got {model!r:.100}', path=path)
    ids = _vocabulary(model.get("vocab"), path)
    texts = {i: token for token, i in ids.items()}
    if len(texts) != len(ids):
        first, i = next((token, i) for token, i in ids.items() if texts[i] != token)
        raise TokenizerError(
            f"{path}: {first!r:.100} and {texts[i]!r:.100} both have id {i}", path=path
        )
    _check_merges(model, ids, path)
    added = content.get("added_tokens") or []
    if not isinstance(added, list):
        raise TokenizerError(f'{path}: "added_tokens" must be a list', path=path)
    for entry in added:
        fields = entry if isinstance(entry, dict) else {}
        token, i = fields.get("content"), fields.get("id")
        if not isinstance(token, str) or type(i) is not int or i < 0:
            raise TokenizerError(
                f"{path}: an added token needs a text content and an id >= 0; got {entry!r:.100}",
                path=path,
            )
        if ids.get(token, i) != i or texts.get(i, token) != token:
            other = texts.get(i, token)
            raise TokenizerError(
                f"{path}: added token {token!r:.100} has id {i}, but the vocabulary says "
                f"{ids.get(token, 'nothing')} of it and has {other!r:.100} at {i}",
                path=path,
            )
        ids[token], texts[i] = i, token
    return ids


def _vocabulary(vocab: object, path: Path) -> dict[str, int]:
    if isinstance(vocab, list):  # Unigram: [token, score] in the order of ids
        pairs = [(e[0], i) for i, e in enumerate(vocab) if isinstance(e, list) and e]
    elif isinstance(vocab, dict):
        pairs = list(vocab.items())
    else:
        raise TokenizerError(f'{path}: "model.vocab" must be an object or a list', path=path)
    ids: dict[str, int] = {}
    for token, i in pairs:
        if not isinstance(token, str) or type(i) is not int or i < 0:
            raise TokenizerError(
                f"{path}: vocabulary entry {token!r:.100} needs an id >= 0; got {i!r:.100}",
                path=path,
            )
        if token in ids:
            raise TokenizerError(f"{path}: the vocabulary repeats {token!r:.100}", path=path)
        ids[token] = i
    if not ids or len(ids) != len(vocab):
        raise TokenizerError(f"{path}: the vocabulary is empty or has malformed entries", path=path)
    return ids


def _check_merges(model: dict[str, Any], ids: dict[str, int], path: Path) -> None:
    merges = model.get("merges") or []
    if not isinstance(merges, list):
        raise TokenizerError(f'{path}: "model.merges" must be a list', path=path)
    prefix = model.get("continuing_subword_prefix") or ""
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or [type(part) for part in parts] != [str, str]:
            raise TokenizerError(
                f"{path}: model.merges[{i}] must be two tokens; got {merge!r:.100}", path=path
            )
        for token in (*parts, parts[0] + parts[1].removeprefix(prefix)):
            if token not in ids:
                raise TokenizerError(
                    f"{path}: model.merges[{i}] has the unknown token {token!r:.100}", path=path
                )


def read_templates(directory: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: chat_template.jinja, else what tokenizer_config.json holds."""
    own = directory / "chat_template.jinja"
    if own.exists():
        try:
            return {"default": own.read_text(encoding="utf-8")}
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{own}: cannot be read: {error}", path=own) from error
    given = settings.get("chat_template")
    if given is None:
        return {}
    if isinstance(given, str):
        return {"default": given}
    pairs = [
        (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
        for entry in (given if isinstance(given, list) else [None])
    ]
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in pairs):
        raise TokenizerError(
            f"{directory}: chat_template must be text or a list of named templates", path=directory
        )
    return {str(name): str(text) for name, text in pairs}
