"""write_safetensors.py GGUF FOLDER: a GGUF model's weights as float32 safetensors, by transformers.

Transformers refuses to save a model that it loaded from GGUF, because its configuration names a
quantisation: the weights go into a fresh model without one.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    path, folder = Path(sys.argv[1]), Path(sys.argv[2])
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    entries = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        entries.pop(name, None)
    fresh = type(loaded)(type(loaded.config)(**entries))
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)


if __name__ == "__main__":
    main()
