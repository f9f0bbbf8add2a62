"""Hugging Face hub ids: a snapshot from the local cache, or from the network."""

import re
from pathlib import Path

import huggingface_hub  # its functions, and the HTTP client, are imported when first named

from jaxinfer.errors import ConfigError

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9._-]{1,96}")
_TEXT_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
# other layouts of the same weights: folders (original/, onnx/) and Mistral's own format
_IGNORED = ["*/*", "consolidated*"]


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form org/name."""
    return _ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def snapshot(name: str, revision: str | None, *, weights: bool) -> Path:
    """Folder with the files of hub id `name`; the network is used only if the cache lacks some.

    `weights` False leaves the weight files out. Raises ConfigError that says what to do.
    """
    patterns = [*_TEXT_FILES, *(["*.safetensors"] if weights else [])]
    cached = _cached(name, revision, patterns)
    if cached is not None and _complete(cached, weights):
        return cached
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=_IGNORED
            )
        )
    except Exception as cause:  # the hub client raises errors of several HTTP libraries
        at = f" at revision {revision!r}" if revision else ""
        reason = str(cause).strip().splitlines()[0][:300] if str(cause).strip() else repr(cause)
        raise ConfigError(
            f"model {name!r}{at} is no local path, is not (fully) in the Hugging Face cache, and "
            f"cannot be downloaded: {reason}. Check the name, the network and, for gated models, "
            f"`hf auth login`; or download it elsewhere (`hf download {name}`) and give the folder",
            field="model",
        ) from cause


def _cached(name: str, revision: str | None, patterns: list[str]) -> Path | None:
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=_IGNORED,
                local_files_only=True,
            )
        )
    except (OSError, ValueError):  # not cached, or not all of it
        return None


def _complete(folder: Path, weights: bool) -> bool:
    # an earlier download may have fetched the text files only
    has_config = (folder / "config.json").exists()
    return has_config and (not weights or any(folder.glob("*.safetensors")))
