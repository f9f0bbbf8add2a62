"""Qwen2 and 2.5: a Llama with biases on q, k, v (`ModelConfig.qkv_bias`, arXiv:2407.10671)."""

from jaxinfer.models.llama import IGNORED, Block, rules

__all__ = ["IGNORED", "Block", "rules"]
