"""`jaxinfer` as a process of its own, and its help."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.flags import EIGHT, OPTIONS


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_tells_every_flag(run, command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    for flag in ("--model", "--temperature", "--max-tokens", "--stop", "--max-num-seqs", "--seed",
                 "--hf-overrides", "--enable-prefix-caching", "--verbose"):  # fmt: skip
        assert flag in out
    assert ("--system" in out) == (command == "chat")
    assert "engine:" not in out  # no option has become a subcommand
    assert "Traceback" not in out


def process(*arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "jaxinfer", *arguments],
        input=stdin, capture_output=True, timeout=300, cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_module_help():
    done = process("--help")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"generate" in done.stdout and b"chat" in done.stdout
    assert process().returncode == 2


def test_a_reader_that_leaves_is_no_error(model, texts):
    """`jaxinfer ... | head`: no traceback. And a whole run as a process is quiet."""
    arguments = ["generate", "--model", str(model), *OPTIONS, "one", *EIGHT]
    done = process(*arguments)
    assert (done.returncode, done.stdout.decode()) == (0, texts["one"] + "\n")
    assert done.stderr == b""
    read, write = os.pipe()
    os.close(read)
    left = subprocess.run(
        [sys.executable, "-m", "jaxinfer", *arguments],
        stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, timeout=300,
        cwd=Path(__file__).resolve().parents[2], env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    os.close(write)
    assert (left.returncode, left.stderr) == (0, b"")
