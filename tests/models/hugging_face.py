"""The tiny models in Hugging Face transformers (torch, float32, eager): the source of truth."""

import copy
from typing import Any

import numpy as np
import torch
import transformers

from tests.models.tiny import CONFIGS, make_weight


def build(case: str) -> Any:
    """The tiny model of `case` with its seeded weights, in evaluation mode."""
    settings = copy.deepcopy(CONFIGS[case])  # transformers writes into nested dicts
    del settings["torch_dtype"]
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    state = {
        name: torch.from_numpy(make_weight(case, name, tuple(tensor.shape)))
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight" or not config.tie_word_embeddings
    }
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.eval()


def tensors(model: Any) -> dict[str, np.ndarray]:
    """Every tensor of the model's state by name, tied ones included."""
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence, without a cache."""
    with torch.no_grad():
        out = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    return out.logits[0].float().numpy()
