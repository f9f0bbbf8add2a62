"""The readers of formats run on the host: they import no jax."""

import pytest

from tests.test_layering import ROOT, violations

QUANT = ROOT / "jaxinfer" / "quant"
FILES = ("packed", "config", "awq", "gptq", "compressed_tensors", "fp8_blocks", "gguf_blocks",
         "checkpoint")  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_no_device(name: str):
    assert not list(violations(QUANT / f"{name}.py", "quant", {"errors", "params"}))
