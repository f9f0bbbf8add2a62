"""A trace of the tiny model, recorded once through the command line."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from jaxinfer import LLM, cli
from jaxinfer.metrics import StepStats
from tests.helpers import write_tiny_model

PROMPTS = ["the first prompt, which is long enough for a chunk of its own", "two", "three"]
OPTIONS = (
    "--max-num-seqs", "4", "--max-num-batched-tokens", "32", "--page-size", "8",
    "--num-pages", "64", "--compilation-cache-dir", "None",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("profiled") / "tiny")


@pytest.fixture
def true_names() -> Iterator[None]:
    """Take back what `--profile` sets for the process: it changes the keys of the compile cache."""
    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[name]
    yield
    jax.config.update(name, before)


@dataclass
class Recording:
    """What `generate --profile --timeline` left behind, and what the engine says it did."""

    folder: Path
    timeline: Path
    output: list[dict]
    steps: list[StepStats]
    num_compiles: float


@pytest.fixture(scope="session")
def recording(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    folder = tmp_path_factory.mktemp("recording")
    kept: list[LLM] = []

    def make(**options) -> contextlib.AbstractContextManager[LLM]:
        kept.append(LLM(**options))
        return contextlib.nullcontext(kept[0])

    name = "jax_compilation_cache_include_metadata_in_key"
    before = jax.config.values[name]
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr(cli, "LLM", make)
        patch.setattr("builtins.print", lambda *a, **k: None if "file" in k else lines.append(*a))
        status = cli.main(
            [
                "generate", *PROMPTS, "--model", str(tiny), *OPTIONS, "--max-tokens", "9",
                "--ignore-eos", "--output-format", "jsonl",
                "--profile", str(folder / "trace"), "--timeline", str(folder / "t.json"),
            ]
        )  # fmt: skip
        jax.config.update(name, before)
    assert status == 0
    llm = kept[0]
    yield Recording(
        folder / "trace",
        folder / "t.json",
        [json.loads(line) for line in lines],
        list(llm.engine.metrics.steps),
        llm.get_metrics()["num_compiles_after_warmup"],
    )
    llm.close()
