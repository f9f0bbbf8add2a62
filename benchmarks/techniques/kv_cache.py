"""KV cache: a token's keys and values are computed once, not again for every later token."""

import re
from collections.abc import Iterator
from typing import Any

from benchmarks.techniques.bench import (
    WARM_UP,
    Bench,
    Counted,
    Literature,
    Technique,
    generate,
    make_row,
    prompts,
    seconds,
)
from jaxinfer import LLM

PROMPT = 2
"""With a prompt of 2 tokens, 100 new ones feed 2 + 99 tokens: the 101 that the literature has."""


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    new = bench.size(100, 12)
    llm = bench.engine(**bench.usual)
    tokens: dict[str, list[int]] = {}
    fed: dict[str, int] = {}
    padded: dict[str, int] = {}

    def run(side: str, repeat: int) -> float:
        prompt = prompts(llm, [PROMPT], repeat)[0]
        work = with_cache if side == "on" else without_cache
        steps = llm.engine.metrics.num_steps
        # 40 tokens fill both of the buckets that the whole run needs.
        num_new = min(new, 40) if repeat == WARM_UP else new
        took = seconds(lambda: tokens.update({side: work(llm, prompt, num_new)}))
        count = llm.engine.metrics.num_steps - steps
        done = list(llm.engine.metrics.steps)[-count:]
        fed[side] = sum(step.num_tokens for step in done)
        padded[side] = sum(bucket_tokens(step.bucket) for step in done)
        return took

    measured = bench.compare("kv-cache", "time_s", lambda i: run("off", i), lambda i: run("on", i))
    same = sum(a == b for a, b in zip(tokens["off"], tokens["on"], strict=True))
    yield make_row(
        "KV cache",
        f"{new} tokens after a prompt of {PROMPT}, one request",
        off_is="each token is asked for by a request of its own, whose prompt is all before it: "
        "the same engine and weights compute the whole sequence again",
        literature=Literature(
            "100 tokens: 5,049 K/V computations without, 101 with: about 50x",
            "arithmetic; sum of 2..101 = 5,150 without, of which 5,049 are repeats",
            (5049 / 101, 5150 / 101),
        ),
        counted=Counted(
            f"tokens fed to the model: {fed['off']:,} -> {fed['on']:,}", fed["off"], fed["on"]
        ),
        measured=measured,
        padded_tokens_off=padded["off"],
        padded_tokens_on=padded["on"],
        equal_tokens=same,
        new_tokens=new,
    )


def with_cache(llm: LLM, prompt: list[int], new: int) -> list[int]:
    return generate(llm, [prompt], [new])[0].outputs[0].token_ids


def without_cache(llm: LLM, prompt: list[int], new: int) -> list[int]:
    """The engine's own prefill of everything so far, once per token."""
    tokens = list(prompt)
    for _ in range(new):
        tokens += generate(llm, [tokens], [1])[0].outputs[0].token_ids
    return tokens[len(prompt) :]


def bucket_tokens(name: str) -> int:
    """Tokens that a step of bucket `name` computes, padding included."""
    found = re.search(r"\d+", name)
    if found is None:
        raise RuntimeError(f"bucket {name!r} has no number of tokens")
    return int(found.group())


TECHNIQUE = Technique(
    "kv-cache", "100 tokens with the cache, and with everything recomputed for each", measure
)
