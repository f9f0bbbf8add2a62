"""`jaxinfer eval`: which tokens are scored, what stands before them, exactness, the command."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import processors

from jaxinfer import cli, evaluate
from jaxinfer.errors import InvalidRequestError
from jaxinfer.request import Logprob
from tests.helpers import VOCAB_SIZE, byte_tokenizer, tiny_llm, write_tiny_model

TEXTS = ("How many tokens does a naïve crocodile eat? Two, of 34 — or none.", "def f(x): return 1")
BOS = 256
WINDOW, STRIDE = 24, 9
TOLERANCE = 2e-5
"""Nats between float32 log-probs of two implementations: 100 to 200 times the rounding of values of
about 5; the tiny model's log-probs of neighbouring tokens differ by far more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("eval") / "tiny")


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory) -> Path:
    """The same model, with a tokenizer that begins texts with <|endoftext|>."""
    folder = write_tiny_model(tmp_path_factory.mktemp("eval") / "bos")
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", BOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llm(model):
    with tiny_llm(model, max_logprobs=-1) as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs(model):
    return transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def their_log_probs(theirs, tokens: list[int]) -> np.ndarray:
    """[V] float64: after `tokens`, by transformers."""
    with torch.no_grad():
        logits = theirs(torch.tensor([tokens]), use_cache=False).logits[0, -1].double().numpy()
    return logits - np.logaddexp.reduce(logits)


def contexts(ids: list[int], prefix: list[int], window: int, stride: int) -> dict[int, list[int]]:
    """What stands before each scored token, from the definition: the windows end at `room`,
    `room + stride`, ..., and the first that reaches past a token scores it."""
    room = window - len(prefix)
    found = {}
    for at in range(0 if prefix else 1, len(ids)):
        behind = max(0, math.ceil((at + 1 - room) / stride))
        end = min(room + behind * stride, len(ids))
        found[at] = prefix + ids[max(0, end - room) : at]
    return found


# -- windows ---------------------------------------------------------------------------


@pytest.mark.parametrize("num_prefix", [0, 1, 2])
@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 1), (9, 6), (4, 2), (40, 20)])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 20, 41])
def test_each_token_is_scored_once_with_the_longest_context(num_prefix, window, stride, length):
    plan = evaluate.plan_windows([length], window, stride, num_prefix)
    scored = [t for w in plan for t in range(w.scored, w.end)]
    assert scored == list(range(0 if num_prefix else 1, length))
    ids, prefix = list(range(length)), [-1] * num_prefix
    expected = contexts(ids, prefix, window, stride)
    for w in plan:
        assert num_prefix + w.end - w.start <= window
        for t in range(w.scored, w.end):
            assert prefix + ids[w.start : t] == expected[t]
            assert num_prefix + t - w.start >= min(window - stride, num_prefix + t)


def test_a_limit_cuts_the_last_window_short():
    full = evaluate.plan_windows([30, 30], 8, 3, 0)
    some = evaluate.plan_windows([30, 30], 8, 3, 0, max_tokens=40)
    assert sum(w.end - w.scored for w in some) == 40
    assert some[:-1] == full[: len(some) - 1]
    assert {w.text for w in some} == {0, 1}
    assert evaluate.plan_windows([30, 30], 8, 3, 0, max_tokens=10)[-1].text == 0


# -- scores ----------------------------------------------------------------------------


def check_against_theirs(scores: evaluate.Scores, theirs, ids: list[list[int]], prefix: list[int]):
    expected, targets = [], []
    for text in ids:
        for at, context in contexts(text, prefix, WINDOW, STRIDE).items():
            expected.append(their_log_probs(theirs, context))
            targets.append(text[at])
    rows = np.array(expected)
    assert scores.targets.tolist() == targets
    picked = rows[np.arange(len(rows)), targets]
    np.testing.assert_allclose(scores.logprobs, picked, rtol=0, atol=TOLERANCE)
    assert scores.top_ids[:, 0].tolist() == rows.argmax(1).tolist()
    ordered = -np.sort(-rows, axis=1)[:, : scores.top_ids.shape[1]]
    np.testing.assert_allclose(scores.top_logprobs, ordered, rtol=0, atol=TOLERANCE)
    result = evaluate.summary(scores)
    nats = float(-picked.mean())
    assert result["nats_per_token"] == pytest.approx(nats, abs=TOLERANCE)
    assert result["perplexity"] == pytest.approx(math.exp(nats), rel=TOLERANCE)
    assert result["nats_standard_error"] == pytest.approx(
        picked.std(ddof=1) / len(picked) ** 0.5, rel=1e-4
    )
    return -picked.sum()


def test_scores_are_transformers(llm, theirs):
    scores = evaluate.score(llm, TEXTS, window=WINDOW, stride=STRIDE, num_top=3)
    ids = [llm.get_tokenizer().encode(text) for text in TEXTS]
    assert max(map(len, ids)) > WINDOW + 2 * STRIDE
    nats = check_against_theirs(scores, theirs, ids, [])
    result = evaluate.summary(scores)
    # One token is one byte here, and the first of each text is not scored.
    assert result["num_tokens"] == len("".join(TEXTS).encode())
    assert result["num_scored"] == result["num_bytes"] == result["num_tokens"] - 2
    assert result["bits_per_byte"] == pytest.approx(
        nats / math.log(2) / result["num_bytes"], rel=TOLERANCE
    )
    assert (result["min_context"], result["max_context"]) == (1, WINDOW - 1)
    assert result["num_prefix_tokens"] == 0


def test_bos_begins_every_window_and_is_not_scored(with_bos, theirs):
    with tiny_llm(with_bos) as engine:
        scores = evaluate.score(engine, TEXTS, window=WINDOW, stride=STRIDE, num_top=2)
        ids = [engine.get_tokenizer().encode(text, add_special_tokens=False) for text in TEXTS]
    check_against_theirs(scores, theirs, ids, [BOS])
    result = evaluate.summary(scores)
    assert result["num_scored"] == result["num_tokens"] == sum(map(len, ids))
    assert (result["min_context"], result["max_context"]) == (1, WINDOW - 1)
    assert result["num_prefix_tokens"] == 1


def test_a_limit_scores_the_first_tokens_alike(llm):
    options: dict[str, Any] = {"window": WINDOW, "stride": STRIDE, "num_top": 2}
    full = evaluate.score(llm, TEXTS, **options)
    some = evaluate.score(llm, TEXTS, **options, max_tokens=50)
    assert some.targets.tolist() == full.targets[:50].tolist()
    np.testing.assert_allclose(some.logprobs, full.logprobs[:50], rtol=0, atol=TOLERANCE)
    assert some.num_tokens == full.num_tokens


def test_long_windows_are_computed_in_chunks(llm, theirs):
    """Longer than a step of the engine (64 tokens), and by default as long as it takes."""
    text = " ".join(TEXTS) * 2
    ids = llm.get_tokenizer().encode(text)
    scores = evaluate.score(llm, [text])
    assert (scores.window, scores.stride, scores.num_windows) == (1023, 511, 1)
    for at in (1, 63, 64, 65, len(ids) - 1):
        expected = their_log_probs(theirs, ids[:at])[ids[at]]
        assert scores.logprobs[at - 1] == pytest.approx(expected, abs=TOLERANCE)


def test_the_target_takes_the_rank_that_is_left():
    entry = {7: Logprob(-1.0, 1, None), 4: Logprob(-1.0, 1, None), 9: Logprob(-3.0, 3, None)}
    # 4 and 7 are equally likely: the engine lists 4 first, and gives 7 its strict rank, 1 too.
    assert evaluate.most_likely(entry, 7, 3) == [(4, -1.0), (7, -1.0), (9, -3.0)]
    assert evaluate.most_likely({7: Logprob(-9.0, 50, None), 4: Logprob(-1.0, 1, None)}, 7, 1) == [
        (4, -1.0)
    ]


# -- comparison ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rounded(model):
    with tiny_llm(model, max_logprobs=-1, quantization="int8") as engine:
        yield engine


def test_divergence_over_the_vocabulary_is_exact(llm, rounded):
    """Against the plain formula in float64 over whole distributions."""
    options: dict[str, Any] = {"window": WINDOW, "stride": STRIDE, "num_top": -1}
    ours = evaluate.score(rounded, TEXTS, **options)
    base = evaluate.score(llm, TEXTS, **options)
    result = evaluate.compare(ours, base)
    assert result["kl_top"] == VOCAB_SIZE
    q, p = np.empty((2, len(base.targets), VOCAB_SIZE))
    for into, scores in ((q, ours), (p, base)):
        np.put_along_axis(into, scores.top_ids.astype(np.int64), scores.top_logprobs, axis=1)
    expected = (np.exp(p) * (p - q)).sum(1).mean()
    assert expected > 1e-4
    assert result["kl_divergence"] == pytest.approx(expected, rel=1e-3)
    same = p.argmax(1) == q.argmax(1)
    assert 0 < result["num_agreeing"] == same.sum() < len(same)
    assert result["greedy_agreement"] == same.mean()
    change = math.exp((base.logprobs - ours.logprobs).mean()) - 1
    assert result["perplexity_change_percent"] == pytest.approx(100 * change, rel=1e-6)


def test_fewer_tokens_give_less_divergence(llm, rounded):
    found = []
    for num_top in (1, 4, 32, -1):
        options: dict[str, Any] = {"window": WINDOW, "stride": STRIDE, "num_top": num_top}
        ours = evaluate.score(rounded, TEXTS, **options)
        base = evaluate.score(llm, TEXTS, **options)
        found.append(evaluate.compare(ours, base)["kl_divergence"])
    assert 0 <= found[0] <= found[1] <= found[2] <= found[3]
    same = evaluate.compare(base, base)
    assert (same["kl_divergence"], same["greedy_agreement"]) == (0, 1)
    assert same["perplexity_change_percent"] == 0


def test_different_tokens_are_not_compared(llm):
    options: dict[str, Any] = {"window": WINDOW, "stride": STRIDE, "num_top": 1}
    base = evaluate.score(llm, TEXTS, **options)
    with pytest.raises(InvalidRequestError, match="different tokens"):
        evaluate.compare(base, evaluate.score(llm, TEXTS[::-1], **options))
    with pytest.raises(InvalidRequestError, match="different tokens"):
        evaluate.compare(base, evaluate.score(llm, TEXTS, **{**options, "stride": 5}))
    with pytest.raises(InvalidRequestError, match="num_top"):
        evaluate.compare(base, evaluate.score(llm, TEXTS, **{**options, "num_top": 0}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, r"window must be in 2\.\.1023"),
        ({"window": 1024}, r"window must be in 2\.\.1023 .* got 1024"),
        ({"window": 8, "stride": 8}, r"stride must be in 1\.\.7"),
        ({"stride": 0}, "stride must be in 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(llm, options, message):
    with pytest.raises(InvalidRequestError, match=message):
        evaluate.score(llm, TEXTS, **options)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_with_nothing_to_score_is_refused(llm, text):
    with pytest.raises(InvalidRequestError, match=r"text 2 of 2 .* nothing to score"):
        evaluate.score(llm, [TEXTS[0], text])


# -- the command -----------------------------------------------------------------------

OPTIONS = (
    "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--page-size", "8",
    "--num-pages", "200", "--compilation-cache-dir", "None", "--window", "24", "--stride", "9",
)  # fmt: skip


@pytest.fixture
def files(tmp_path) -> list[str]:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text)
    return [str(tmp_path / f"{i}.txt") for i in range(len(TEXTS))]


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (status, standard output, standard error)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(["eval", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_command_as_json(run, model, llm, files):
    status, out, err = run(str(model), "--text", *files, "--json", *OPTIONS)
    assert (status, err) == (0, "")
    result = json.loads(out)
    expected = evaluate.summary(evaluate.score(llm, TEXTS, window=WINDOW, stride=STRIDE))
    assert result.pop("texts") == files
    assert result.keys() == expected.keys()
    assert result["nats_per_token"] == pytest.approx(expected["nats_per_token"], abs=TOLERANCE)
    counts = [name for name, value in expected.items() if isinstance(value, int)]
    assert {n: result[n] for n in counts} == {n: expected[n] for n in counts}


def test_command_compares_with_the_float_model(run, model, files):
    status, out, err = run(
        "--model", str(model), "--text", *files, "--quantization", "int8", "--compare",
        "--max-tokens-scored", "60", *OPTIONS,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert f"60 of {len(''.join(TEXTS).encode())} tokens" in out
    for line in ("perplexity", "bits per byte", "reference", "greedy agreement", "KL divergence"):
        assert f"\n{line}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text"], "no text"),
        (["--compare"], "compare the model with itself"),
        (["--compare", "--quantization", "int8", "--max-logprobs", "0"], "--max-logprobs"),
        (["--speculative-config", '{"method": "ngram"}'], "speculative_config has no meaning"),
        (["--window", "2000"], "window must be in"),
        (["--quantization-group-size", "32"], "no meaning without quantization"),
    ],
)
def test_command_refuses(run, model, files, arguments, message):
    texts = [] if "--text" in arguments else ["--text", *files]
    arguments = [a for a in arguments if a != "--text"]
    status, out, err = run(str(model), *texts, *OPTIONS, *arguments)
    assert (status, out) == (2, "")
    assert message in err


def test_command_refuses_two_models_and_bad_files(run, model, files, tmp_path):
    status, _, err = run(str(model), "--model", str(model), "--text", *files)
    assert status == 2 and "not both" in err
    (tmp_path / "latin.txt").write_bytes(b"na\xefve")
    status, _, err = run(str(model), "--text", str(tmp_path / "latin.txt"))
    assert status == 2 and "latin.txt: not UTF-8" in err
    status, _, err = run(str(model), "--text", str(tmp_path / "missing.txt"))
    assert status == 2 and "missing.txt" in err
