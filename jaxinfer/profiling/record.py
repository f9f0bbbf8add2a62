"""Records an XLA trace of what runs inside a `with`: it opens in XProf and Perfetto."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from jaxinfer.errors import ConfigError


def prepare(directory: str | Path) -> None:
    """Make the folder of a trace, and programs that are compiled from here on bear true names.

    Call it before the engine is made. A program that comes from JAX's compile cache has the scopes
    of the code that compiled it, not of the code that runs; from here on the two are not the same.

    Raises:
        ConfigError: the folder cannot be made or written to.
    """
    _folder(directory)
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)


def _folder(directory: str | Path) -> Path:
    path = Path(directory).expanduser()
    try:
        (path / "plugins" / "profile").mkdir(parents=True, exist_ok=True)  # where XProf looks
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ConfigError(
            f"--profile {path} cannot be used ({error}); name a writable folder"
        ) from None
    return path


@contextmanager
def trace(directory: str | Path | None) -> Iterator[None]:
    """Trace the block into `directory` (None: do nothing).

    Calls of Python functions are left out: they are most of what a trace would hold, and slow what
    they measure. The profiler keeps everything in memory until the block ends, about a megabyte for
    each step of a small model, and then takes seconds to write it.

    Raises:
        ConfigError: the folder cannot be made or written to, before or after the block.
    """
    if directory is None:
        yield
        return
    path = _folder(directory)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(path), create_perfetto_trace=True, profiler_options=options)
    try:
        yield
    finally:
        _stop(path)


def _stop(path: Path) -> None:
    try:
        jax.profiler.stop_trace()
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"the trace could not be written to {path} ({error}); is the disk full? Free some "
            f"space, or name another folder"
        ) from error
