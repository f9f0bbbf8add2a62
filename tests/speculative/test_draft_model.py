"""The draft-model proposer: outputs never change, drafts are right where the draft model is."""

import numpy as np
import pytest

from jaxinfer import LLM
from jaxinfer.request import Request, Row, Sequence
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.speculative.draft_model import DraftModelProposer
from tests.helpers import (
    TINY_CONFIG,
    assert_no_leak,
    draws,
    greedy,
    tiny_llm,
    tiny_weights,
    write_tiny_model,
)

LENGTH = 4
PARAMS = [
    greedy(max_tokens=30),
    draws(max_tokens=30, seed=3),
    greedy(max_tokens=23, repetition_penalty=1.3, frequency_penalty=0.2),
    draws(max_tokens=30, seed=5, temperature=0.7, min_tokens=20, ignore_eos=False),
    greedy(max_tokens=9, logprobs=2),
    draws(max_tokens=20, seed=1, top_k=5, temperature=1.3),
]


def prompts(count: int, length: int = 20, seed: int = 0) -> list[list[int]]:
    return np.random.default_rng(seed).integers(0, 256, (count, length)).tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The target; a draft that is a little off; one that has nothing to do with it."""
    folder = tmp_path_factory.mktemp("draft")
    weights = tiny_weights(TINY_CONFIG)
    rng = np.random.default_rng(9)
    near = {
        name: (w + 0.02 * w.std() * rng.standard_normal(w.shape)).astype(np.float32)
        for name, w in weights.items()
    }
    small = {"num_hidden_layers": 1}
    far = tiny_weights({**TINY_CONFIG, **small}, seed=4)
    return {
        "same": write_tiny_model(folder / "target", weights=weights),
        "near": write_tiny_model(folder / "near", weights=near),
        "far": write_tiny_model(folder / "far", weights=far, **small),
    }


def engine(folders, draft: str | None, **options) -> LLM:
    """With a draft it always drafts: whether it pays is not asked."""
    config = {"model": str(folders[draft]), "num_speculative_tokens": LENGTH} if draft else None
    llm = tiny_llm(folders["same"], speculative_config=config, max_num_seqs=16, **options)
    if llm.engine.speculator is not None:
        llm.engine.speculator._cost = lambda bucket, base, plain: plain * 1e-6
    return llm


@pytest.fixture(scope="module")
def plain(folders):
    with engine(folders, None) as llm:
        outputs = llm.generate(prompts(6), PARAMS)
        yield [output.outputs[0] for output in outputs]


@pytest.mark.parametrize(
    ("draft", "overlap"),
    [
        ("near", True),
        ("far", False),
        pytest.param("same", True, marks=pytest.mark.slow),
        pytest.param("near", False, marks=pytest.mark.slow),
        pytest.param("far", True, marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_without_it(folders, plain, draft, overlap):
    with engine(folders, draft, strict=overlap, async_scheduling=overlap) as llm:
        if draft == "near" and overlap:
            llm.warmup()
        for count in (6, 1):
            for _ in range(2):  # the second time from the prefix cache, the draft model's too
                found = llm.generate(prompts(count), PARAMS[:count])
                for output, expected in zip(found, plain, strict=False):
                    assert output.outputs[0].token_ids == expected.token_ids
                    assert output.outputs[0].finish_reason == expected.finish_reason
                assert_no_leak(llm)
        metrics = llm.get_metrics()
    assert metrics["spec_decode_num_drafts"] > 10
    assert metrics["num_compiles_after_warmup"] == 0
    rate = metrics["spec_decode_acceptance_rate"]
    # The same weights draw the same tokens, random rows too: they share the noise.
    assert {"same": rate == 1, "near": 0.4 < rate < 1, "far": rate < 0.4}[draft]


@pytest.mark.parametrize("target", [None, "int8"])
def test_the_targets_own_weights_quantised(folders, plain, target):
    config = {"model": "self", "quantization": "int8", "num_speculative_tokens": LENGTH}
    expected = [output.token_ids for output in plain]
    if target is not None:
        with tiny_llm(folders["same"], quantization=target) as llm:
            expected = [o.outputs[0].token_ids for o in llm.generate(prompts(6), PARAMS)]
    with tiny_llm(
        folders["same"], speculative_config=config, max_num_seqs=16, quantization=target
    ) as llm:
        llm.engine.speculator._cost = lambda bucket, base, plain: plain * 1e-6
        found = llm.generate(prompts(6), PARAMS)
        rate = llm.get_metrics()["spec_decode_acceptance_rate"]
        assert_no_leak(llm)
    assert [o.outputs[0].token_ids for o in found] == expected
    assert rate == 1 if target == "int8" else 0.5 < rate < 1


def test_logprobs_of_verified_tokens(folders, plain):
    with engine(folders, "near") as llm:
        found = llm.generate(prompts(6), PARAMS)[4].outputs[0]
    for got, expected in zip(found.logprobs, plain[4].logprobs, strict=True):
        assert got.keys() == expected.keys()
        for token, value in got.items():
            # A step of more rows sums in another order.
            assert value.logprob == pytest.approx(expected[token].logprob, abs=1e-4)


def test_few_pages_and_preemption(folders, plain):
    with engine(folders, "near", num_pages=24) as llm:
        found = llm.generate(prompts(6), PARAMS)
        assert [o.outputs[0].token_ids for o in found] == [o.token_ids for o in plain]
        assert_no_leak(llm)
        assert llm.get_metrics()["num_preemptions"] > 0


def test_several_samples(folders):
    params = draws(n=3, max_tokens=16, seed=8)
    tokens = []
    for draft in (None, "near"):
        with engine(folders, draft) as llm:
            output = llm.generate(prompts(1), params)[0]
            tokens.append([sample.token_ids for sample in output.outputs])
            assert_no_leak(llm)
    assert tokens[0] == tokens[1]


class Device:
    """Counts what the draft model is asked to read."""

    max_num_tokens = 8

    def __init__(self):
        self.filled: list[tuple[int, int]] = []

    def fill(self, rows):
        self.filled += [(row.start, row.kv_len) for row in rows]

    def draft(self, rows):
        return [[7] * LENGTH for _ in rows]

    def forget(self, sequence):
        pass


def row_of(sequence: Sequence, pages: list[int]) -> Row:
    last = len(sequence.tokens) - 1
    return Row(sequence, last, 1, True, 0, pages, max_draft=LENGTH)


def sequence_of(tokens: list[int]) -> Sequence:
    return Sequence(Request("0", tokens, SamplingParams(), 8), 0, list(tokens))


def test_what_the_draft_model_has_read():
    device, generations = Device(), [0, *[1] * 9]
    proposer = DraftModelProposer(device, generations, 4)
    sequence = sequence_of(list(range(14)))
    pages = [1, 2, 3, 4, 5]
    assert proposer.propose([row_of(sequence, pages)]) == [[]]  # 8 of 13 tokens at a time
    assert proposer.propose([row_of(sequence, pages)]) == [[7] * LENGTH]
    assert device.filled == [(0, 8), (8, 13)]

    sequence.tokens += [7, 7, 1]  # two drafted tokens were right: nothing is to be read again
    pages = [*pages, 6]
    assert proposer.propose([row_of(sequence, pages)]) == [[7] * LENGTH]
    assert device.filled == [(0, 8), (8, 13)]

    sequence.tokens += [7, 7, 7, 7, 2]  # all of them, and one more
    assert proposer.propose([row_of(sequence, pages)]) == [[7] * LENGTH]
    assert device.filled == [(0, 8), (8, 13)]

    sequence.tokens += [3, 4]  # none, and a step without a draft
    assert proposer.propose([row_of(sequence, pages)]) == [[7] * LENGTH]
    assert device.filled[2:] == [(22, 23)]

    other = sequence_of([*range(8), 50])  # the first two pages are shared
    assert proposer.propose([row_of(other, [1, 2, 7])]) == [[7] * LENGTH]
    assert device.filled[3:] == []
    generations[2] += 1  # page 2 changed hands
    assert proposer.propose([row_of(other, [1, 2, 7])]) == [[7] * LENGTH]
    assert device.filled[3:] == [(4, 8)]


def bad(folders, error, draft="near", k=LENGTH, **options):
    given = {"model": str(folders.get(draft, draft)), "num_speculative_tokens": k}
    with pytest.raises(ValueError, match=error):
        tiny_llm(folders["same"], speculative_config=given, **options)


def test_bad_drafts(folders, tmp_path):
    bad(folders, "speculative_config: model '.*nothing'", str(tmp_path / "nothing"))
    bad(folders, r"takes 64 tokens and max_model_len is 1024; pass max_model_len=64", str(
        write_tiny_model(tmp_path / "short", max_position_embeddings=64)
    ))  # fmt: skip
    bad(folders, "does not fit the page pool of 8 tokens", num_pages=1, max_model_len=8, k=7)
    with pytest.raises(ValueError, match="none of the group sizes 128, 64, 32 divides"):
        own = {"model": "self", "quantization": "int4", "num_speculative_tokens": LENGTH}
        tiny_llm(folders["same"], speculative_config=own)
    other = write_tiny_model(tmp_path / "vocabulary", vocab_size=300)
    bad(folders, "300 token ids, the target 264", str(other), skip_tokenizer_init=True)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|begin|>"))
    bad(folders, "another tokenizer", str(other))
