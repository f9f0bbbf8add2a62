"""The tiny model on disk, once for the whole run."""

from pathlib import Path

import pytest

from tests.helpers import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
