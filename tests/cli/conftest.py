"""A tiny model, what it says, and the command run in this process."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

from jaxinfer import LLM, cli
from jaxinfer.cli_commands import Sampling
from tests.cli.flags import OPTIONS
from tests.helpers import tiny_llm, write_tiny_model


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="package")
def texts(model) -> dict[str, str]:
    """What LLM generates greedily for the prompts of the tests, 8 tokens each."""
    with tiny_llm(model, max_num_seqs=2, max_num_batched_tokens=32) as llm:
        params = Sampling(max_tokens=8).params()
        outputs = llm.generate(["one", "two words", "dritté"], params)
        return {o.prompt: o.outputs[0].text for o in outputs}


@pytest.fixture
def run_fresh(model, capsys, monkeypatch):
    """run(command, *arguments, stdin=bytes) -> (status, standard output, standard error)."""

    def run(command: str, *arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capsys.readouterr()
        try:
            status = cli.main([command, "--model", str(model), *OPTIONS, *arguments])
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture(scope="package")
def kept():
    """Engines by their options, so that not every command compiles its own."""
    engines: dict[str, LLM] = {}
    yield engines
    for llm in engines.values():
        llm.close()


@pytest.fixture
def run(run_fresh, kept, monkeypatch):
    """As run_fresh, but commands with equal engine options share an engine."""

    def open_kept(**options):
        key = repr(sorted(options.items()))
        if key not in kept:
            kept[key] = LLM(**options)
        kept[key].reset_prefix_cache()
        return contextlib.nullcontext(kept[key])

    monkeypatch.setattr(cli, "LLM", open_kept)
    return run_fresh
