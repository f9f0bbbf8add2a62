"""The near-tie rule: how far apart the scores are of two tokens that an engine might choose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import LLM, SamplingParams, sampling


@dataclasses.dataclass
class _Keys:
    seed_low: jax.Array
    seed_high: jax.Array
    sample_index: jax.Array
    position: jax.Array


def score_gap(llm: LLM, prompt: list[int], choose: SamplingParams, one: int, other: int) -> float:
    """How far apart the scores of two tokens are after `prompt`: logits, with the noise of a seeded
    draw; infinity where `llm` ranks one of them below its 20 best."""
    ask = dataclasses.replace(choose, max_tokens=1, logprobs=20, temperature=0)
    entry = llm.generate(prompt, ask, use_tqdm=False)[0].outputs[0].logprobs[0]
    if one not in entry or other not in entry:
        return float("inf")
    scores = np.array([entry[one].logprob, entry[other].logprob])
    if not choose.is_greedy:
        zero = jnp.zeros((1,), jnp.int32)
        seed = jnp.full((1,), choose.seed, jnp.int32)
        row = _Keys(seed, zero, zero, jnp.full((1,), len(prompt), jnp.int32))
        shape = (llm.model.config.vocab_size,)
        noise = jax.random.gumbel(sampling.row_keys(row)[0], shape, jnp.float32)
        scores = scores / (choose.temperature or 1.0) + np.asarray(noise)[[one, other]]
    return float(abs(scores[0] - scores[1]))
