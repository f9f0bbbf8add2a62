"""Writes tests/goldens: the logits of every tiny model, from Hugging Face transformers on torch.

Run from the repository root with torch installed: `python -m scripts.make_goldens`. The files hold
configurations, tensor shapes, a seed and logits; the weights are made again from the seed.
"""

import json

import numpy as np

from tests.models import hugging_face, tiny


def main() -> None:
    """Build every case, run it, write models.json and models.npz."""
    header, arrays = {}, {}
    for case, config in tiny.CONFIGS.items():
        model = hugging_face.build(case)
        tokens = tiny.make_tokens(config["vocab_size"])
        arrays[f"{case}.tokens"] = tokens
        arrays[f"{case}.logits"] = hugging_face.logits(model, tokens)
        shapes = {name: list(a.shape) for name, a in hugging_face.tensors(model).items()}
        if model.config.tie_word_embeddings:
            del shapes["lm_head.weight"]
        header[case] = {"config": config, "seed": tiny.SEED, "shapes": shapes}
        largest = float(np.abs(arrays[f"{case}.logits"]).max())
        print(f"{case}: {len(shapes)} tensors, largest logit {largest:.2f}")
    tiny.GOLDENS.mkdir(exist_ok=True)
    np.savez_compressed(tiny.GOLDENS / "models.npz", **arrays)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    (tiny.GOLDENS / "models.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
