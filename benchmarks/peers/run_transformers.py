"""Hugging Face transformers on torch for the benchmark: `generate` on static batches.

It has no continuous batching on a CPU: requests go in batches of `max_num_seqs` in the order they
came, shorter prompts padded on the left, and a batch runs until its longest request ends. Tokens
beyond a request's own length are computed, as they must be, and not counted.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.peers.protocol import Clock, Engine, serve


class Note(StoppingCriteria):
    """Called after every step with all tokens so far: hands the new ones to the clock."""

    def __init__(self, asks: list[tuple[int, int]], clock: Clock) -> None:
        self._asks, self._clock, self._count = asks, clock, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        tokens = input_ids[:, -1].tolist()
        now = self._clock.now()
        self._count += 1
        for (request, wanted), token in zip(self._asks, tokens, strict=True):
            if self._count <= wanted:
                self._clock.add(request, [token], now)
        return torch.zeros(len(tokens), dtype=torch.bool)


class Transformers(Engine):
    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        path = Path(setup["model"])
        file = {} if path.is_dir() else {"gguf_file": path.name}
        folder = path if path.is_dir() else path.parent
        dtype = getattr(torch, setup["dtype"])
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **file).eval()
        # A pad id is only needed to be silent about it: padding is masked.
        self._model.generation_config.pad_token_id = 0
        self._rows = setup["max_num_seqs"]
        self.settings = {
            "dtype": setup["dtype"],
            "batching": "static, left-padded",
            "attention": self._model.config._attn_implementation,
            "threads": torch.get_num_threads(),
        }

    def run(self, asks: list[dict], clock: Clock) -> None:
        for at in range(0, len(asks), self._rows):
            batch = asks[at : at + self._rows]
            longest = max(len(ask["prompt"]) for ask in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, ask in enumerate(batch):
                ids[row, longest - len(ask["prompt"]) :] = torch.tensor(ask["prompt"])
                mask[row, longest - len(ask["prompt"]) :] = 1
            wanted = [(at + row, ask["max_tokens"]) for row, ask in enumerate(batch)]
            with torch.inference_mode():
                self._model.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=max(ask["max_tokens"] for ask in batch),
                    eos_token_id=None,
                    do_sample=False,
                    stopping_criteria=StoppingCriteriaList([Note(wanted, clock)]),
                )


def make(setup: dict[str, Any]) -> tuple[Transformers, dict[str, str]]:
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return Transformers(setup), versions


if __name__ == "__main__":
    serve(make)
