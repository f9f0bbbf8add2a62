"""Which engines there are, and the Python each runs on."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import BenchmarkError

HERE = Path(__file__).parent


MODULES = {
    "jaxinfer": "run_jaxinfer",
    "transformers": "run_transformers",
    "llama.cpp": "run_llama_cpp",
    "vllm": "run_vllm",
}
"""The adapter of each environment."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An engine and how it is set up.

    `environment` names its Python and adapter. `dtype` is what it is asked for, `peak` the number
    type whose matmul rate bounds it: llama.cpp multiplies Q4_1 weights as 8-bit integers.
    `quantization` is jaxinfer's, of the layers' matrices and of the output head.
    """

    name: str
    environment: str
    dtype: str
    peak: str
    quantization: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What jaxinfer's LLM is given beside."""
        if self.quantization is None:
            return {}
        return {"quantization": self.quantization, "quantize_lm_head": True}

    @property
    def weights(self) -> str:
        """What a step reads of a weight: its number type."""
        return self.dtype if self.quantization is None else "int8"

    @property
    def is_ours(self) -> bool:
        return self.environment == "jaxinfer"

    @property
    def module(self) -> str:
        return MODULES[self.environment]

    @property
    def reads_gguf(self) -> bool:
        """Or a folder with the same weights as safetensors."""
        return self.environment != "vllm"


REFERENCE = "transformers-float32"
"""Whose greedy tokens the others are compared with."""
ENTRIES = {
    entry.name: entry
    for entry in (
        Entry("jaxinfer-float32", "jaxinfer", "float32", "float32"),
        Entry("jaxinfer-bfloat16", "jaxinfer", "bfloat16", "bfloat16"),
        Entry("jaxinfer-int8", "jaxinfer", "bfloat16", "int8", "int8"),
        Entry("vllm-float32", "vllm", "float32", "float32"),
        Entry("vllm-bfloat16", "vllm", "bfloat16", "bfloat16"),
        Entry("llama.cpp-q4_1", "llama.cpp", "q4_1", "int8"),
        Entry(REFERENCE, "transformers", "float32", "float32"),
        Entry("transformers-bfloat16", "transformers", "bfloat16", "bfloat16"),
    )
}
DEFAULT = tuple(name for name in ENTRIES if name != "transformers-bfloat16")


def cache_folder() -> Path:
    """Where environments and converted weights are kept."""
    return Path(os.environ.get("JAXINFER_PEERS", "~/.cache/jaxinfer/peers")).expanduser()


class Missing(Exception):
    """An environment or model that cannot be had; the message says why."""


class Environments:
    """Finds the Python of each environment, installing what is missing on demand."""

    def __init__(self, given: dict[str, str], *, cache: Path, install: bool) -> None:
        self._given, self._cache, self._install = given, cache, install
        self._found: dict[str, str | Missing] = {}

    def python(self, environment: str) -> str:
        """Raises Missing, again for every engine that asks."""
        if environment not in self._found:
            try:
                self._found[environment] = self._find(environment)
            except Missing as error:
                self._found[environment] = error
        found = self._found[environment]
        if isinstance(found, Missing):
            raise found
        return found

    def _find(self, environment: str) -> str:
        given = self._given.get(environment)
        if given is not None:
            if not os.access(given, os.X_OK):
                raise Missing(f"--python {environment}={given} is not a program that can be run")
            return given
        if environment == "jaxinfer":
            return sys.executable
        command = ["bash", str(HERE / "install.sh"), environment]
        python = self._cache / environment / "bin" / "python"
        variables = {**os.environ, "JAXINFER_PEERS": str(self._cache)}
        if not self._install:
            check = [*command[:2], "--check", environment]
            if subprocess.run(check, env=variables, capture_output=True).returncode:
                raise Missing(
                    f"{environment} is not installed in {self._cache}; leave --no-install out, or "
                    f"name a Python that has it: --python {environment}=PATH"
                )
            return str(python)
        print(f"{environment}: installed by {command[1]} where it is missing", file=sys.stderr)
        done = subprocess.run(
            command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if done.returncode:
            raise Missing(f"install.sh {environment} failed: {done.stdout.strip()[-800:]}")
        return str(python)


def parse_pythons(values: list[str]) -> dict[str, str]:
    """NAME=PATH options -> {environment: Python}."""
    pythons = {}
    for value in values:
        name, sign, path = value.partition("=")
        if not sign or not path:
            raise BenchmarkError(f"--python {value!r} must be NAME=PATH, as vllm=/path/to/python")
        if name not in MODULES:
            raise BenchmarkError(
                f"--python: no environment {name!r}; there are {', '.join(MODULES)}"
            )
        pythons[name] = path
    return pythons


def parse_engines(names: list[str]) -> list[Entry]:
    unknown = [name for name in names if name not in ENTRIES]
    if unknown:
        raise BenchmarkError(
            f"no engine {', '.join(map(repr, unknown))}; there are {', '.join(ENTRIES)}"
        )
    return [ENTRIES[name] for name in dict.fromkeys(names)]
