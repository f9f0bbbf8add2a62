"""Speculative decoding: tokens are drafted, and several verified in one step."""

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks import workloads
from benchmarks.techniques.bench import (
    Bench,
    Counted,
    Literature,
    Technique,
    counters,
    generate,
    make_row,
    prompts,
    seconds,
)
from jaxinfer import LLM, RequestOutput

DRAFT_MS, TARGET_MS, LENGTH = 5, 50, 4
"""The literature's example: times of a draft step and of a target step, drafted tokens a round."""
NGRAM = {"method": "ngram"}
DRAFT_MODEL = {"model": "self", "quantization": "int8"}
LONGEST = 15
OFF_IS = "the same engine without speculative_config"
COUNTERS = ("num_steps", "spec_decode_num_draft_tokens", "spec_decode_num_accepted_tokens")
_QUESTIONS = (
    "Why is the sky blue?",
    "Give me three tips for a good night's sleep.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a virus and a bacterium?",
)


def literature() -> Literature:
    """A round of the example, with one token fewer accepted than drafted, and with all."""
    round_ms = LENGTH * DRAFT_MS + TARGET_MS
    ratios = [(accepted + 1) * TARGET_MS / round_ms for accepted in (LENGTH - 1, LENGTH)]
    return Literature(
        f"draft {DRAFT_MS} ms, target {TARGET_MS} ms, k = {LENGTH}: {round_ms} ms a round, "
        f"{ratios[1]:.2f}x when {LENGTH} are accepted, {ratios[0]:.2f}x when {LENGTH - 1} are",
        "https://arxiv.org/abs/2211.17192",
        (ratios[0], ratios[1]),
    )


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    off = bench.engine(**bench.usual)
    ngram = {**NGRAM, "num_speculative_tokens": bench.size(LONGEST, 3)}
    on = bench.engine(**bench.usual, speculative_config=ngram)
    long, short = bench.size((128, 48), (12, 6))
    cases = (
        ("edits of a file, one at a time", edits(bench, off), 1.8),
        ("ordinary chat, one at a time", questions(bench, off), 0.97),
    )
    for case, asked, target in cases:
        rounds = [[prompt] for prompt in asked]
        yield one_case(bench, off, on, "n-gram", case, rounds, long, target)
    draft = {**DRAFT_MODEL, "num_speculative_tokens": LENGTH}
    off = bench.engine(**bench.usual)  # used last: the look-up's engine makes room
    on = bench.engine(**bench.usual, speculative_config=draft)
    case, asked, _ = cases[1]
    rounds = [[prompt] for prompt in asked]
    # No target: this draft costs over half a target step here, so it should switch itself off.
    yield one_case(bench, off, on, "own weights in int8", case, rounds, long, None)
    many = bench.size(64, 4)
    usual = {**bench.usual, "requests": max(many // 4, 4), "max_num_seqs": many}
    off = bench.engine(**usual)
    on = bench.engine(**usual, speculative_config=ngram)
    asked = (edits(bench, off) * many)[:many]
    case = f"edits of a file, {many} rows at once"
    yield one_case(bench, off, on, "n-gram", case, [asked], short, 0.97)


def edits(bench: Bench, llm: LLM) -> list[list[int]]:
    """Prompts whose answers repeat them; in a toy run, tokens that repeat."""
    if bench.size(False, True):
        return [prompt * 4 for prompt in prompts(llm, [5] * 2, 0)]
    tokenizer = llm.get_tokenizer()
    asks = workloads.repetitive(lambda text: tokenizer.encode(text, add_special_tokens=False))
    return [list(ask.prompt) for ask in asks.rounds[0]]


def questions(bench: Bench, llm: LLM) -> list[list[int]]:
    if bench.size(False, True):
        return prompts(llm, [12, 9], 1)
    messages = ([{"role": "user", "content": text}] for text in _QUESTIONS)
    return [llm.chat_prompt(each)["prompt_token_ids"] for each in messages]


def one_case(
    bench: Bench,
    off: LLM,
    on: LLM,
    method: str,
    case: str,
    rounds: list[list[list[int]]],
    num_new: int,
    target: float | None,
) -> dict[str, Any]:
    """The rounds one after another, the prompts of a round at once."""
    made: dict[int, list[list[int]]] = {}
    counted: dict[int, list[float]] = {}

    def run(llm: LLM) -> float:
        names = COUNTERS if llm is on else COUNTERS[:1]
        before = counters(llm, *names)
        outputs: list[RequestOutput] = []
        took = seconds(
            lambda: outputs.extend(
                output
                for asked in rounds
                for output in generate(llm, asked, [num_new] * len(asked))
            )
        )
        after = counters(llm, *names)
        counted[id(llm)] = [b - a for a, b in zip(before, after, strict=True)]
        made[id(llm)] = [output.outputs[0].token_ids for output in outputs]
        return took

    measured = bench.compare(f"{method} {case}", "time_s", lambda i: run(off), lambda i: run(on))
    (steps_off,), (steps_on, drafted, accepted) = counted[id(off)], counted[id(on)]
    equal = sum(a == b for a, b in zip(made[id(off)], made[id(on)], strict=True))
    rate = accepted / drafted if drafted else 0.0
    ratio = median(measured.ratios)
    return make_row(
        f"Speculative decoding: {method}",
        f"{case}, {num_new} tokens out",
        off_is=OFF_IS,
        literature=literature(),
        counted=Counted(
            f"target steps: {steps_off:,.0f} -> {steps_on:,.0f}; {drafted:,.0f} tokens drafted, "
            f"{rate:.0%} accepted; {equal} of {len(made[id(off)])} outputs equal",
            steps_off,
            steps_on,
        ),
        measured=measured,
        target=None if target is None else f"at least {target} times",
        target_met=None if target is None else ratio >= target,
        drafted=drafted,
        accepted=accepted,
        equal_outputs=equal,
    )


TECHNIQUE = Technique("speculation", "speculative decoding on and off", measure)
