"""What engines are asked: prompts as token ids, output lengths, and what is sent when. Seeded.

A workload is rounds; the asks of a round are sent at once, the next round when all have ended. All
asks are greedy and ignore the end-of-sequence token, so that every engine makes the same number of
tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: prompt token ids and the number of tokens to make."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """`rounds` of asks; `max_num_seqs` rows at once; prefixes are cached where that is what is
    measured."""

    name: str
    description: str
    rounds: tuple[tuple[Ask, ...], ...]
    max_num_seqs: int
    prefix_caching: bool = False

    @property
    def output_tokens(self) -> int:
        return sum(ask.max_tokens for round_ in self.rounds for ask in round_)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(ask.prompt) for round_ in self.rounds for ask in round_)


def random_prompt(rng: np.random.Generator, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(rng.integers(0, vocab, length).tolist())


def fixed(batch: int, seed: int, *, vocab: int, inputs: int = 128, outputs: int = 128) -> Workload:
    """`batch` requests at once of the same lengths."""
    rng = np.random.default_rng([seed, batch])
    asks = tuple(Ask(random_prompt(rng, inputs, vocab), outputs) for _ in range(batch))
    text = f"{batch} requests at once, {inputs} tokens in, {outputs} out"
    return Workload(f"fixed-{batch}", text, (asks,), batch)


def uniform(
    seed: int, *, vocab: int, requests: int = 64, low: int = 16, high: int = 192, rows: int = 16
) -> Workload:
    """Uniformly random lengths in and out: the usual workload of small engines (nano-vllm: 256
    requests of 100 to 1024), scaled to a CPU."""
    rng = np.random.default_rng([seed, 1])
    asks = tuple(
        Ask(
            random_prompt(rng, int(rng.integers(low, high + 1)), vocab),
            int(rng.integers(low, high + 1)),
        )
        for _ in range(requests)
    )
    text = f"{requests} requests, {low} to {high} tokens in and out, {rows} rows"
    return Workload("uniform", text, (asks,), rows)


def chat(
    seed: int,
    *,
    vocab: int,
    conversations: int = 8,
    turns: int = 4,
    system: int = 600,
    user: int = 32,
    answer: int = 48,
) -> Workload:
    """Conversations over one system prompt. Answers are scripted, so that every engine reads the
    same prompts whatever it said before."""
    rng = np.random.default_rng([seed, 2])
    shared = random_prompt(rng, system, vocab)
    said = [shared + random_prompt(rng, user, vocab) for _ in range(conversations)]
    rounds = []
    for _ in range(turns):
        rounds.append(tuple(Ask(prompt, answer) for prompt in said))
        said = [p + random_prompt(rng, answer + user, vocab) for p in said]
    text = (
        f"{conversations} conversations of {turns} turns over one system prompt of {system} tokens"
    )
    return Workload("chat", text, tuple(rounds), conversations, prefix_caching=True)


_CODE = '''class Stack:
    """A stack of items."""

    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

    def peek(self):
        return self.items[-1]

    def size(self):
        return len(self.items)
'''
_EDITS = (
    "Rename the class Stack to Pile and repeat the whole file unchanged otherwise.",
    "Rename the method push to add and repeat the whole file unchanged otherwise.",
    "Repeat this file exactly, line by line.",
    "Repeat this file twice, exactly.",
)


def repetitive(encode: Callable[[str], list[int]], *, outputs: int = 128) -> Workload:
    """Editing of code, where the answer repeats the prompt; `encode`: text -> token ids."""
    template = (
        "<|im_start|>user\n{edit}\n\n```python\n{code}```<|im_end|>\n"
        "<|im_start|>assistant\n```python\n"
    )
    asks = tuple(Ask(tuple(encode(template.format(edit=e, code=_CODE))), outputs) for e in _EDITS)
    text = f"{len(asks)} edits of one file, {outputs} tokens out"
    return Workload("repetitive", text, (asks,), len(asks))


def prefill(seed: int, *, vocab: int, requests: int = 8, inputs: int = 512) -> Workload:
    """Prompts alone: one token out, so that the time is that of reading them."""
    rng = np.random.default_rng([seed, 3])
    asks = tuple(Ask(random_prompt(rng, inputs, vocab), 1) for _ in range(requests))
    text = f"{requests} prompts of {inputs} tokens, one token out"
    return Workload("prefill", text, (asks,), requests)


FIXED_BATCHES = (1, 4, 8, 16, 64)
NAMES = (*(f"fixed-{b}" for b in FIXED_BATCHES), "prefill", "uniform", "chat", "repetitive")


def make(
    name: str, seed: int, *, vocab: int, encode: Callable[[str], list[int]], toy: bool = False
) -> Workload:
    """The workload of this name; `toy`: the same with few and short requests.

    Raises ValueError for a name that there is not.
    """
    kind, _, batch = name.partition("-")
    if kind == "fixed" and name in NAMES:
        sizes = {"inputs": 8, "outputs": 6} if toy else {}
        return fixed(int(batch), seed, vocab=vocab, **sizes)
    if name == "prefill":
        return prefill(seed, vocab=vocab, **({"requests": 2, "inputs": 24} if toy else {}))
    if name == "uniform":
        sizes = {"requests": 6, "low": 2, "high": 12, "rows": 4} if toy else {}
        return uniform(seed, vocab=vocab, **sizes)
    if name == "chat":
        sizes = {"conversations": 2, "turns": 2, "system": 40, "user": 4, "answer": 4}
        return chat(seed, vocab=vocab, **(sizes if toy else {}))
    if name == "repetitive":
        return repetitive(encode, **({"outputs": 6} if toy else {}))
    raise ValueError(f"no workload {name!r}; there are {', '.join(NAMES)}")
