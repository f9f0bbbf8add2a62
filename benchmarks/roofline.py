"""What kernels and whole models must at least do and move, and what a chip allows: formulas alone.
No jax in this process: a parent that holds the accelerator would leave none to its children.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
"""Of a number, by dtype."""
BACKWARD = 2.5  # products of the backward pass, in forwards: dq, dk, dv, and P and dP again


def attention_flops(num_heads: int, head_dim: int, q_lens: list[int], kv_lens: list[int]) -> int:
    """Of causal attention, forward: two products over every visible pair, for rows whose queries
    are the last positions of their keys."""
    pairs = sum(q * kv - q * (q - 1) // 2 for q, kv in zip(q_lens, kv_lens, strict=True))
    return 4 * num_heads * head_dim * pairs


def page_bytes_read(num_kv_heads: int, head_dim: int, page_dtype: str, positions: int) -> int:
    """K and V of `positions`, each read once, with the scales of quantised pages."""
    item = ITEM_BYTES[page_dtype]
    return positions * 2 * num_kv_heads * (head_dim * item + (4 if item == 1 else 0))


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes of memory and bfloat16 FLOPs per second that something allows."""

    bytes_s: float
    flops: float


# What makers state, dense: jax's name of the chip -> memory bandwidth and bfloat16 matrix rate.
NOMINAL = {
    "NVIDIA H200": Limits(4.8e12, 989e12),
    "NVIDIA H100 80GB HBM3": Limits(3.35e12, 989e12),
    "NVIDIA A100-SXM4-80GB": Limits(2.04e12, 312e12),
    "TPU v5 lite": Limits(0.81e12, 197e12),
    "TPU v5": Limits(2.8e12, 459e12),
    "TPU v6 lite": Limits(1.6e12, 918e12),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """Least bytes moved and floating-point operations of a piece of work. `serial_bytes` are those
    of attention, which no matrix product hides."""

    weight_bytes: float
    serial_bytes: float
    matmul_flops: float
    attention_flops: float

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.serial_bytes

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.attention_flops

    def seconds(self, limits: Limits) -> float:
        """Weights are streamed while products are made; attention's bytes come on top."""
        products = max(self.weight_bytes / limits.bytes_s, self.matmul_flops / limits.flops)
        return products + max(
            self.serial_bytes / limits.bytes_s, self.attention_flops / limits.flops
        )


@dataclass(frozen=True, slots=True)
class Decoder:
    """What a decoder-only model's cost depends on. The embedding is gathered, not streamed.

    `weight_bytes` and `kv_bytes` are of one number; packed weights have a fraction, on average.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    mlp: int
    vocab: int
    weight_bytes: float = 2
    kv_bytes: int = 2

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str) -> "Decoder":
        """From a Hugging Face config.json of a Llama and the dtype of weights and pages."""
        heads = config["num_attention_heads"]
        item = ITEM_BYTES[dtype]
        return cls(
            config["num_hidden_layers"],
            heads,
            config["num_key_value_heads"],
            config.get("head_dim") or config["hidden_size"] // heads,
            config["hidden_size"],
            config["intermediate_size"],
            config["vocab_size"],
            item,
            item,
        )

    @property
    def block_weights(self) -> int:
        """Of all layers' matrices."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.num_layers * self.hidden * (attention + 3 * self.mlp)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    @property
    def bytes_per_token(self) -> int:
        """Of K and V in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.kv_bytes

    def decode(self, batch: float, context: float) -> Cost:
        """One step of `batch` rows that each see `context` positions."""
        weights = self.block_weights + self.head_weights
        pairs = batch * context
        return Cost(
            weights * self.weight_bytes,
            pairs * self.bytes_per_token,
            2 * batch * weights,
            4 * self.num_layers * self.num_heads * self.head_dim * pairs,
        )

    def prefill(self, rows: int, tokens: int, cached: int = 0) -> Cost:
        """`rows` prompts of `tokens`, causal, of which the last token's logits are wanted; K and V
        of the first `cached` of each are there already."""
        pairs = rows * (tokens**2 - cached**2) / 2
        return Cost(
            (self.block_weights + self.head_weights) * self.weight_bytes,
            rows * tokens * self.bytes_per_token,
            2 * rows * ((tokens - cached) * self.block_weights + self.head_weights),
            4 * self.num_layers * self.num_heads * self.head_dim * pairs,
        )


def shares(cost: Cost, seconds: float, limits: Limits | None, name: str) -> dict[str, float | None]:
    """{"mbu_NAME", "mfu_NAME", "roofline_share_NAME"}: shares of what `limits` allow that work of
    `cost` reached in `seconds`; None where the limits are not known."""
    keys = (f"mbu_{name}", f"mfu_{name}", f"roofline_share_{name}")
    if limits is None:
        return dict.fromkeys(keys)
    reached = (
        cost.bytes / seconds / limits.bytes_s,
        cost.flops / seconds / limits.flops,
        cost.seconds(limits) / seconds,
    )
    return {key: round(value, 4) for key, value in zip(keys, reached, strict=True)}
