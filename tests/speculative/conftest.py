"""The tiny model on disk, as for the engine's tests."""

from tests.engine.conftest import tiny

__all__ = ["tiny"]
