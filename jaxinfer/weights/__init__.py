"""Reading models: `open_model` finds and checks one, `load` streams its weights to the device.

Formats are readers that present Hugging Face tensor names and layouts; whatever the format, a
model's one table of rules serves. No file is trusted, nothing is unpickled, no model's code is run.
"""

from jaxinfer.weights.gguf_config import config_from_gguf
from jaxinfer.weights.hf_config import KNOWN_ARCHITECTURES, config_from_hf
from jaxinfer.weights.source import ModelSource, load, open_model

__all__ = [
    "KNOWN_ARCHITECTURES",
    "ModelSource",
    "config_from_gguf",
    "config_from_hf",
    "load",
    "open_model",
]
