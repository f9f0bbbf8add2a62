"""Writes tests/goldens/default_model.json: the embedded model's greedy tokens, by transformers on
torch.

Run from the repository root with torch, transformers and accelerate installed:
`python -m scripts.make_default_model_goldens`. 16 prompts of 5 to 600 tokens, 64 new tokens each,
with the logit margin between transformers' best and second best token at every position.
"""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from jaxinfer import tokenizer
from jaxinfer.weights import open_model

OUTPUT = Path("tests/goldens/default_model.json")
LENGTHS = (5, 7, 11, 16, 17, 31, 48, 64, 65, 100, 150, 210, 290, 380, 490, 600)
NEW_TOKENS = 64
TEXTS = (
    "The capital of France is the city of light, and the capital of Italy is",
    "<|im_start|>user\nWhat is 17 * 23? Think step by step.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n: int) -> int:\n    '''Return the n-th Fibonacci number.'''\n    if n < 2:\n",
    "Once upon a time, in a village by the sea, there lived a fisherman who had three wishes. ",
    "In 1969 two astronauts, 384,400 km from home, walked on the Moon: Armstrong and Aldrin. ",
    "Ünïcödé, 日本語, emoji 🙂🚀 and tabs\t\tare tokens too; so are     spaces and 3.14159. ",
    "The licence says: you may reproduce and distribute copies of it with or without edits. ",
    "Water boils at 100 degrees Celsius at sea level, but on a mountain it boils at a lower one. ",
)


def main() -> None:
    """Make the prompts, let transformers continue them, write the file."""
    with open_model(None) as source:
        made = tokenizer.from_gguf(source.gguf_metadata, source.path)
        folder, name = source.path.parent, source.path.name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    record: dict[str, list] = {"prompts": [], "tokens": [], "margins": []}
    for i, length in enumerate(LENGTHS):
        text = "".join(TEXTS[(i + j) % len(TEXTS)] for j in range(60))
        prompt = made.encode(text)[:length]
        output = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        best = torch.stack(output.logits)[:, 0].topk(2).values
        record["prompts"].append(prompt)
        record["tokens"].append(output.sequences[0, length:].tolist())
        record["margins"].append([round(float(a - b), 6) for a, b in best])
        print(f"{length} tokens: smallest margin {min(record['margins'][-1]):.5f}")
    OUTPUT.write_text(json.dumps(record, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
