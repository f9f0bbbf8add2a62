"""The tiny model on disk, once for the whole run; an engine over it, once per module."""

from pathlib import Path

import pytest

from jaxinfer import LLM
from tests.helpers import assert_no_leak, tiny_llm, write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def shared(tiny):
    with tiny_llm(tiny, max_logprobs=-1) as made:
        yield made


@pytest.fixture
def llm(shared: LLM):
    """The module's engine with an empty cache; the test must leave no page behind."""
    shared.reset_prefix_cache()
    yield shared
    assert_no_leak(shared)
