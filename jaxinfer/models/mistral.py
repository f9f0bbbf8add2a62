"""Mistral: a Llama whose layers may have a window (`ModelConfig.windows`, arXiv:2310.06825)."""

from jaxinfer.models.llama import IGNORED, Block, rules

__all__ = ["IGNORED", "Block", "rules"]
