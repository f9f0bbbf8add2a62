"""Tokenizers that several test files share: the default model's and two small ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxinfer import weights
from jaxinfer.tokenizer import Tokenizer, from_gguf

GOLDENS = Path(__file__).parent / "goldens"


def golden(name: str) -> Any:
    return json.loads((GOLDENS / f"{name}.json").read_text())


def metadata_of(kind: str, lists: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {f"tokenizer.ggml.{k}": v for k, v in {"model": kind, **lists, **fields}.items()}


@pytest.fixture(scope="session")
def default_metadata() -> dict[str, Any]:
    source = weights.open_model(None)
    metadata = source.gguf_metadata
    source.close()
    assert metadata is not None
    return metadata


@pytest.fixture(scope="session")
def default_tokenizer(default_metadata: dict[str, Any]) -> Tokenizer:
    return from_gguf(default_metadata, "model.gguf")


@pytest.fixture
def bpe() -> Callable[..., dict[str, Any]]:
    """Metadata of a small byte-level BPE vocabulary; keyword arguments replace or remove fields."""
    return lambda **fields: metadata_of("gpt2", golden("bpe_vocabulary"), **fields)


@pytest.fixture
def spm() -> Callable[..., dict[str, Any]]:
    """The same for a small SentencePiece vocabulary."""
    return lambda **fields: metadata_of("llama", golden("spm_vocabulary"), **fields)
