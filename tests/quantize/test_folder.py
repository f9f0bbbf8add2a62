"""What stands beside the weights: config.json and tokenizer of models that had none."""

from pathlib import Path

import numpy as np
import pytest

from jaxinfer import tokenizer
from jaxinfer.errors import ConfigError
from jaxinfer.quant.checkpoint import PackedCheckpoint
from jaxinfer.quantize import folder
from jaxinfer.quantize.run import quantize
from jaxinfer.quantize.settings import Request
from jaxinfer.weights import ModelSource, config_from_hf, open_model
from jaxinfer.weights.packed_reader import PackedReader
from tests.models import tiny
from tests.weights import builders

TEXTS = [
    "The quick brown fox jumps over 1,234 lazy dogs.\n\n\tIt's 3.14% déjà vu — naïve?",
    "<|im_start|>user\nHi<|im_end|>\n",
    "   spaces  and\r\nlines \u2028 中文字符 🙂👩‍👩‍👧 a\u0301",
]


@pytest.mark.parametrize("case", [case for case in tiny.CONFIGS if case != "gpt2"])
def test_a_described_configuration_is_the_same_model(case: str):
    config = config_from_hf(tiny.CONFIGS[case], None)  # described() compares the two itself
    assert folder.described(config).keys() >= {"architectures", "model_type", "rope_theta"}


def test_what_config_json_cannot_say_is_an_error():
    config = config_from_hf(tiny.CONFIGS["llama"] | {"attention_bias": False}, None)
    object.__setattr__(config, "embed_scale", 2.0)
    with pytest.raises(ConfigError, match="embed_scale"):
        folder.described(config)


@pytest.fixture(scope="module")
def default() -> ModelSource:
    return open_model(None)


def test_the_default_models_tokenizer(default: ModelSource, tmp_path: Path):
    """Same ids, same chat, though tokenizer.json has no entry for bytes without a token."""
    assert default.gguf_metadata is not None
    own = tokenizer.from_gguf(default.gguf_metadata)
    folder.write(tmp_path, default, folder.described(default.config), own)
    read = tokenizer.from_directory(tmp_path)
    tokenizer.check_vocab(read, default.config.vocab_size)
    for text in TEXTS:
        assert read.encode(text) == own.encode(text)
        assert read.decode(own.encode(text)) == own.decode(own.encode(text))
    assert (read.bos_token_id, read.eos_token_id) == (own.bos_token_id, own.eos_token_id)
    messages = [{"role": "user", "content": "Hello"}]
    assert read.apply_chat_template(messages) == own.apply_chat_template(messages)


def test_a_gguf_file(tmp_path: Path):
    """Its weights, rounded to 8 bits, under Hugging Face's names; its float tensors as they are."""
    lists = ["Ġ", *(chr(c) for c in range(ord("a"), ord("a") + 26)), "ab", "Ġa", "x1", "x2", "x3"]
    merges = builders.strings("tokenizer.ggml.merges", ["a b", "Ġ a"])
    path = tmp_path / "m.gguf"
    path.write_bytes(
        builders.llama_gguf(
            tokens=builders.strings("tokenizer.ggml.tokens", lists),
            model=builders.string("tokenizer.ggml.model", "gpt2"),
            pre=builders.string("tokenizer.ggml.pre", "smollm"),
            merges=merges,
            eos=builders.u32("tokenizer.ggml.eos_token_id", 31),
        )
    )
    quantize(path, tmp_path / "out", Request(method="rtn", bits=8), progress=False)
    with open_model(path) as plain, open_model(tmp_path / "out") as source:
        assert source.config == plain.config
        assert isinstance(source.reader, PackedReader)
        checkpoint: PackedCheckpoint = source.reader.checkpoint
        assert len(checkpoint.packed) == 7
        for name in plain.reader.infos:
            want, got = plain.reader.read(name), source.reader.read(name)
            if name in checkpoint.packed:
                step = np.abs(want).max(axis=1, keepdims=True) / 127.5
                assert (np.abs(got - want) <= 0.51 * step).all()
            else:
                np.testing.assert_array_equal(got, want)
        ours = tokenizer.from_gguf(plain.gguf_metadata or {})
    assert tokenizer.from_directory(tmp_path / "out").encode("ab a cab") == ours.encode("ab a cab")
