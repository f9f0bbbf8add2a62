"""How well a model predicts a text: perplexity, and agreement with another model on the same text.

The engine itself is measured: windows of the text are prompts, and what their tokens' log-probs
(`prompt_logprobs`) say is counted. So chunked prefill, the paged K/V cache and its dtype, the
kernels and the quantised weights are those that serve.

Which tokens are scored: a text is tokenised once, without special tokens. A window is `window`
tokens of a prompt, which begins with the special tokens that the tokenizer puts before a text (BOS;
many have none): they are context in every window and never scored. The first window starts with the
text and scores all of its tokens that have something before them; each later one ends `stride`
tokens further and scores the tokens past the end of the one before. So every token is scored once,
with at least window - stride tokens before it once the text is that long. Without BOS the first
token of a text is context alone. Texts are apart: no window holds tokens of two.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxinfer.errors import InvalidRequestError
from jaxinfer.llm import LLM
from jaxinfer.request import Logprob, RequestOutput
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.tokenizer import Tokenizer

DEFAULT_WINDOW = 1024


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens [start, end) of text number `text`; those in [scored, end) are scored."""

    text: int
    start: int
    scored: int
    end: int


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model said of each scored token, in the order of the texts.

    Attributes:
        targets: [N] int32, the scored tokens. context: [N] int32, how many tokens each had before
            it in its window, BOS included.
        logprobs: [N] float64, natural logarithm of the model's probability of each.
        top_ids, top_logprobs: [N, K] int32 and float64, the model's most likely tokens at each
            position, best first; K may be 0.
        num_tokens: of the texts, special tokens aside. num_windows, window, stride: as they were.
        num_prefix: special tokens before each window.
        num_bytes: UTF-8 bytes that the scored tokens stand for; None where the tokenizer's tokens
            are not bytes.
    """

    targets: np.ndarray
    context: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray
    num_tokens: int
    num_windows: int
    num_prefix: int
    num_bytes: int | None
    window: int
    stride: int


def score(
    llm: LLM,
    texts: Sequence[str],
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    num_top: int = 0,
    progress: bool | None = None,
) -> Scores:
    """Score the tokens of `texts` with the engine `llm`.

    Args:
        window: tokens of a window; None: 1024, or what the engine's max_model_len leaves.
        stride: tokens by which a window is further than the one before; None: half a window.
        max_tokens: stop after so many scored tokens; None: all.
        num_top: K, the most likely tokens to keep for `compare`; at most the engine's max_logprobs.
            -1: the whole vocabulary.
        progress: show a progress bar; None: if standard error is a terminal.

    Raises:
        InvalidRequestError: a text has nothing to score, or window and stride do not fit the
            engine. NumericalError: the model gave NaN or infinite logits.
    """
    tokenizer = llm.get_tokenizer()
    prefix = special_prefix(tokenizer)
    limit = llm.config.max_model_len or 0
    window, stride = _check(window, stride, max_tokens, len(prefix), limit)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    for i, tokens in enumerate(ids):
        if len(tokens) + min(len(prefix), 1) < 2:
            raise InvalidRequestError(
                f"text {i + 1} of {len(ids)} has {len(tokens)} tokens and nothing to score; "
                "a token needs one before it",
                param="texts",
            )
    plan = plan_windows([len(t) for t in ids], window, stride, len(prefix), max_tokens)
    targets = [t for w in plan for t in ids[w.text][w.scored : w.end]]
    context = [len(prefix) + t - w.start for w in plan for t in range(w.scored, w.end)]
    num_bytes = sum(len(tokenizer.token_bytes(t)) for t in targets) if tokenizer.bytewise else None
    prompts = [prefix + ids[w.text][w.start : w.end] for w in plan]
    counts = [w.end - w.scored for w in plan]
    show = sys.stderr.isatty() if progress is None else progress
    with tqdm(total=len(targets), desc="scoring", unit="tok", disable=not show) as bar:
        logprobs, top_ids, top_logprobs = _gather(llm, prompts, counts, num_top, bar)
    return Scores(
        targets=np.array(targets, np.int32),
        context=np.array(context, np.int32),
        logprobs=logprobs,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        num_tokens=sum(map(len, ids)),
        num_windows=len(plan),
        num_prefix=len(prefix),
        num_bytes=num_bytes,
        window=window,
        stride=stride,
    )


def _gather(
    llm: LLM, prompts: list[list[int]], counts: list[int], num_top: int, bar: tqdm
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`logprobs`, `top_ids` and `top_logprobs` of Scores, for the last `counts[i]` tokens of each
    prompt, in the prompts' order."""
    vocab = llm.model.config.vocab_size
    width = vocab if num_top < 0 else min(num_top, vocab)
    first = np.cumsum([0, *counts])
    logprobs = np.empty(first[-1])
    top_ids = np.empty((first[-1], width), np.int32)
    top_logprobs = np.empty((first[-1], width))
    for i, output in _run(llm, prompts, num_top):
        targets = prompts[i][-counts[i] :]
        entries = (output.prompt_logprobs or [])[-counts[i] :]
        for at, (target, entry) in enumerate(zip(targets, entries, strict=True), first[i]):
            if entry is None:
                raise AssertionError("a scored token has one before it")
            logprobs[at] = entry[target].logprob
            best = most_likely(entry, target, width)
            top_ids[at] = [token for token, _ in best]
            top_logprobs[at] = [logprob for _, logprob in best]
        bar.update(counts[i])
    return logprobs, top_ids, top_logprobs


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that `tokenizer` puts before a text: BOS, or nothing."""
    sample = "a"
    plain, full = tokenizer.encode(sample, add_special_tokens=False), tokenizer.encode(sample)
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return full[:at]
    raise InvalidRequestError("the tokenizer's special tokens change the tokens of the text itself")


def _check(
    window: int | None, stride: int | None, max_tokens: int | None, num_prefix: int, limit: int
) -> tuple[int, int]:
    """Window and stride, decided and in range."""
    longest = limit - 1  # the engine keeps room for a token after the prompt
    if window is None:
        window = min(DEFAULT_WINDOW, longest)
    low = num_prefix + 2
    if not low <= window <= longest:
        raise InvalidRequestError(
            f"window must be in {low}..{longest} tokens (max_model_len is {limit}, and one token "
            f"is kept free); got {window}",
            param="window",
            value=window,
        )
    # A window's first token has nothing before it but the prefix, if there is one.
    most = window - max(num_prefix, 1)
    if stride is None:
        stride = max(1, window // 2)
    if not 1 <= stride <= most:
        raise InvalidRequestError(
            f"stride must be in 1..{most} tokens for a window of {window}, so that every scored "
            f"token has one before it; got {stride}",
            param="stride",
            value=stride,
        )
    if max_tokens is not None and max_tokens < 1:
        raise InvalidRequestError(
            f"max_tokens must be at least 1; got {max_tokens}", param="max_tokens", value=max_tokens
        )
    return window, stride


def plan_windows(
    lengths: Sequence[int], window: int, stride: int, num_prefix: int, max_tokens: int | None = None
) -> list[Window]:
    """The windows over texts of `lengths` tokens, as the module says; `max_tokens` cuts what is
    scored."""
    room = window - num_prefix
    left = sum(lengths) if max_tokens is None else max_tokens
    plan = []
    for text, length in enumerate(lengths):
        scored = 0 if num_prefix else 1
        end = min(room, length)
        while scored < length and left:
            end = min(end, scored + left)
            plan.append(Window(text, max(0, end - room), scored, end))
            left -= end - scored
            scored, end = end, min(end + stride, length)
    return plan


def _run(llm: LLM, prompts: list[list[int]], num_top: int) -> Iterator[tuple[int, RequestOutput]]:
    """(index, output) of each prompt as it is done. A few wait, so that a step is full."""
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=num_top, detokenize=False
    )
    most = 2 * (llm.config.max_num_seqs or 1)
    added = done = 0
    while done < len(prompts):
        while added < len(prompts) and added - done < most:
            llm.add_request(f"eval-{added}", prompts[added], params)
            added += 1
        for output in llm.step():
            if output.error is not None:
                raise output.error
            if output.finished:
                done += 1
                yield int(output.request_id.removeprefix("eval-")), output


def most_likely(entry: dict[int, Logprob], target: int, count: int) -> list[tuple[int, float]]:
    """[(token, log-prob)] of the `count` best of an entry of `prompt_logprobs`, best first.

    An entry has the target first, then the others of the best `count` with their ranks; so the
    target is one of these where a rank is left for it.
    """
    best = {p.rank: (token, p.logprob) for token, p in entry.items() if token != target}
    if len(best) < count:
        missing = next(rank for rank in range(1, count + 1) if rank not in best)
        best[missing] = (target, entry[target].logprob)
    return [best[rank] for rank in range(1, count + 1)]


def summary(scores: Scores) -> dict[str, Any]:
    """What `scores` amount to: nats per token, perplexity (its standard error takes tokens as
    independent), bits per byte, and the exact counts."""
    nats = -scores.logprobs
    count = len(nats)
    mean = float(nats.mean())
    error = float(nats.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return {
        "nats_per_token": mean,
        "nats_standard_error": error,
        "perplexity": perplexity(mean),
        "bits_per_byte": float(nats.sum()) / math.log(2) / scores.num_bytes
        if scores.num_bytes
        else None,
        "num_scored": count,
        "num_tokens": scores.num_tokens,
        "num_bytes": scores.num_bytes,
        "num_windows": scores.num_windows,
        "window": scores.window,
        "stride": scores.stride,
        "num_prefix_tokens": scores.num_prefix,
        "min_context": int(scores.context.min()),
        "mean_context": float(scores.context.mean()),
        "max_context": int(scores.context.max()),
    }


def perplexity(nats_per_token: float) -> float:
    """e to the mean negative log-prob; infinite where a float cannot hold it."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf


def compare(scores: Scores, reference: Scores) -> dict[str, Any]:
    """How far a model is from `reference` on the same tokens, each predicted from the true ones
    before it (teacher-forced).

    `greedy_agreement` is the share of positions at which both have the same most likely token.
    `kl_divergence` is the mean over positions of KL(reference || model) in nats, where the tokens
    that are among the best K of both, and the target, count each for itself and all others as one.
    So it is at most the divergence over the vocabulary, which it equals where K is all of it.

    Raises:
        InvalidRequestError: the two scored different tokens, or one kept no most likely tokens.
    """
    same = np.array_equal(scores.targets, reference.targets)
    if not same or not np.array_equal(scores.context, reference.context):
        raise InvalidRequestError(
            f"the model and its reference scored different tokens ({len(scores.targets)} and "
            f"{len(reference.targets)}); they need one tokenizer, text, window and stride"
        )
    if not scores.top_ids.shape[1] or not reference.top_ids.shape[1]:
        raise InvalidRequestError("a comparison needs num_top >= 1", param="num_top")
    agree = scores.top_ids[:, 0] == reference.top_ids[:, 0]
    divergences = [_divergence(scores, reference, i) for i in range(len(agree))]
    nats, base = -float(scores.logprobs.mean()), -float(reference.logprobs.mean())
    return {
        "reference_nats_per_token": base,
        "reference_perplexity": perplexity(base),
        "perplexity_change_percent": 100 * (perplexity(nats) / perplexity(base) - 1),
        "greedy_agreement": float(agree.mean()),
        "num_agreeing": int(agree.sum()),
        "kl_divergence": float(np.mean(divergences)),
        "kl_top": min(scores.top_ids.shape[1], reference.top_ids.shape[1]),
    }


_ROUNDING = 1e-5
"""Less probability than this in "all other tokens" is the rounding of float32 log-probs."""


def _divergence(scores: Scores, reference: Scores, at: int) -> float:
    """KL(reference || model) at one position, over the tokens known of both and the rest."""
    shared, ours, theirs = np.intersect1d(
        scores.top_ids[at], reference.top_ids[at], assume_unique=True, return_indices=True
    )
    q, p = scores.top_logprobs[at, ours], reference.top_logprobs[at, theirs]
    if scores.targets[at] not in shared:
        q, p = np.append(q, scores.logprobs[at]), np.append(p, reference.logprobs[at])
    found = float(np.sum(np.exp(p) * (p - q)))
    rest_p, rest_q = 1 - float(np.exp(p).sum()), 1 - float(np.exp(q).sum())
    if rest_p > _ROUNDING:
        found += rest_p * math.log(rest_p / max(rest_q, _ROUNDING))
    return found


def render(result: dict[str, Any]) -> str:
    """`summary`, with `compare` where it was added, for people."""
    unscored = result["num_tokens"] - result["num_scored"]
    lines = [
        f"scored           {result['num_scored']:,} of {result['num_tokens']:,} tokens, each once; "
        f"{unscored:,} not scored",
        f"windows          {result['num_windows']:,} of up to {result['window']:,} tokens, stride "
        f"{result['stride']:,}, {result['num_prefix_tokens']} special tokens before each",
        f"context          {result['min_context']:,} to {result['max_context']:,} tokens, "
        f"{result['mean_context']:,.0f} on average",
        f"perplexity       {result['perplexity']:.4f} a token "
        f"({result['nats_per_token']:.5f} nats{_plus_minus(result)})",
    ]
    if result["bits_per_byte"] is not None:
        lines.append(f"bits per byte    {result['bits_per_byte']:.5f}")
    if "greedy_agreement" in result:
        lines += [
            f"reference        perplexity {result['reference_perplexity']:.4f}; the model's is "
            f"{result['perplexity_change_percent']:+.2f} % of it away",
            f"greedy agreement {100 * result['greedy_agreement']:.2f} % "
            f"({result['num_agreeing']:,} of {result['num_scored']:,})",
            f"KL divergence    {result['kl_divergence']:.5f} nats, at least (from the "
            f"{result['kl_top']:,} most likely tokens)",
        ]
    return "\n".join(lines)


def _plus_minus(result: dict[str, Any]) -> str:
    error = result["nats_standard_error"]
    return "" if error is None else f" +- {error:.5f}"
