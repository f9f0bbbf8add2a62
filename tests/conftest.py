"""Settings every test runs under: CPU, strict promotion, compiled programs shared between tests."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"  # what jax starts with; see `compilation`

import jax
import pytest

from tests import helpers

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "xla"
CACHE.mkdir(parents=True, exist_ok=True, mode=0o700)

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Many tests build engines of equal shapes: most of the suite's time would go to compiling them
# again.
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--attention-impl",
        default="auto",
        help="attention_impl of the tiny engines: the engine's tests through another kernel "
        "(pytest tests/engine --attention-impl interpret)",
    )
    parser.addoption(
        "--kv-cache-dtype",
        default="auto",
        choices=list(helpers.TIES),
        help="kv_cache_dtype of the tiny engines: the engine's tests with 8-bit pages",
    )

    parser.addoption(
        "--optimised",
        action="store_true",
        help="compile all tests' programs as users' are compiled, not only those of modules marked "
        "so; slower",
    )


def pytest_configure(config: pytest.Config) -> None:
    helpers.ENGINE_DEFAULTS["attention_impl"] = config.getoption("--attention-impl")
    helpers.ENGINE_DEFAULTS["kv_cache_dtype"] = config.getoption("--kv-cache-dtype")


@pytest.fixture(scope="module", autouse=True)
def compilation(request: pytest.FixtureRequest) -> None:
    """LLVM's optimisations of code that then runs for milliseconds took 25 of the 58 seconds of a
    test that makes five engines. They are left out, here and in the processes that tests start,
    where no test depends on them."""
    optimised = request.config.getoption("--optimised") or bool(
        request.node.get_closest_marker("optimised")
    )
    wanted = str(int(not optimised))
    if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != wanted:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", not optimised)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = wanted
