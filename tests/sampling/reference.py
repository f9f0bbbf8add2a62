"""The sampler written the obvious way: NumPy, float64, sorts, one row at a time.

Nothing here is taken from jaxinfer but the record that its arguments travel in. Tests share both.
"""

from collections import Counter
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from jaxinfer.batch import SampleParams

OFF: dict[str, float] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence": 0.0,
    "frequency": 0.0,
    "repetition": 1.0,
    "top_k": 0,
    "seed": 0,
    "sample_index": 0,
    "prompt_len": 0,
    "position": 0,
    "bias_slot": 0,
}
"""A row that draws from its plain softmax."""
_FLOATS = ("temperature", "top_p", "min_p", "presence", "frequency", "repetition")
_INTS = ("top_k", "sample_index", "prompt_len", "position", "bias_slot")


def columns(rows: list[dict]) -> dict[str, list]:
    """Rows that name only what they change, as one column per parameter."""
    return {name: [row.get(name, value) for row in rows] for name, value in OFF.items()}


def device_params(size: int, **given) -> SampleParams:
    """SampleParams of `size` rows; a scalar holds for all. `seed` is a 64-bit int or a column."""

    def column(name, dtype):
        return np.array(np.broadcast_to(np.asarray(given.get(name, OFF[name])), (size,)), dtype)

    seeds = np.broadcast_to(np.asarray(given.get("seed", 0), object), (size,))
    low = np.array([int(s) & 0xFFFFFFFF for s in seeds], np.uint32).view(np.int32)
    high = np.array([int(s) >> 32 & 0xFFFFFFFF for s in seeds], np.uint32).view(np.int32)
    values = {name: column(name, np.float32) for name in _FLOATS}
    values |= {name: column(name, np.int32) for name in _INTS}
    values |= {"seed_low": low, "seed_high": high, "num_logprobs": np.zeros(size, np.int32)}
    return SampleParams(**{name: jnp.asarray(value) for name, value in values.items()})


def processed(
    logits: np.ndarray,
    row: Mapping[str, float],
    history: np.ndarray,
    bias: np.ndarray,
    valid_vocab: int,
) -> np.ndarray:
    """One row [V] after penalties, bias and bans."""
    row = OFF | dict(row)
    x = logits.astype(np.float64)
    prompt_len, position = int(row["prompt_len"]), int(row["position"])
    prompt = [int(t) for t in history[: min(prompt_len, len(history))]]
    output = Counter(int(t) for t in history[prompt_len:position])
    for token in {*prompt, *output}:
        repetition = row["repetition"]
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token, count in output.items():
        x[token] -= row["frequency"] * count + row["presence"]
    x = x + bias
    x[valid_vocab:] = -np.inf
    return x


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)


def filtered(x: np.ndarray, row: Mapping[str, float], slack: float = 0.0) -> np.ndarray:
    """One row [V] over its temperature, -inf where a filter removes a token.

    A positive `slack` loosens top-p and min-p by that much and a negative one tightens them:
    between the two lies every answer that float32 sums may give.
    """
    row = OFF | dict(row)
    if row["temperature"] == 0:
        return x
    x = x.astype(np.float64) / row["temperature"]
    if 0 < row["top_k"] < len(x):
        x = np.where(x >= np.sort(x)[::-1][int(row["top_k"]) - 1], x, -np.inf)
    if row["top_p"] < 1:
        order = np.argsort(-x, kind="stable")
        mass = np.cumsum(softmax(x)[order])
        enough = np.flatnonzero(mass >= row["top_p"] + slack)
        last = enough[0] if len(enough) else len(x) - 1
        x = np.where(x >= x[order[last]], x, -np.inf)
    if row["min_p"] > 0:
        share = min(row["min_p"] * (1 - slack), 1.0)
        probabilities = softmax(x)
        x = np.where(probabilities >= share * np.max(probabilities), x, -np.inf)
    return x
