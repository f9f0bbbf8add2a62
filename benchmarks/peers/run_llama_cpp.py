"""llama.cpp for the benchmark: continuous batching through its low-level batch interface.

As its own server does: a slot for every row, one decode call for the next token of every running
slot together with as much of the waiting prompts as the batch holds. With prefix caching a request
takes the free slot that shares the longest prefix with it; slots do not share with one another.
"""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.peers.protocol import Clock, Engine, serve

N_BATCH, N_UBATCH = 2048, 512  # its defaults


@dataclass
class Slot:
    """A sequence of the KV cache: `tokens` are in it; `pending` are still to be computed."""

    index: int
    tokens: list[int] = field(default_factory=list)
    pending: list[int] = field(default_factory=list)
    request: int | None = None
    left: int = 0  # tokens still to be made
    logits: int = -1  # its row of the last call's logits


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class LlamaCpp(Engine):
    def __init__(self, setup: dict[str, Any]) -> None:
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(setup["model"].encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {setup['model']}")
        slots = setup["max_num_seqs"]
        length = -(-setup["max_len"] // 256) * 256
        context = llama_cpp.llama_context_default_params()
        context.n_ctx = slots * length
        context.n_seq_max = slots
        context.n_batch, context.n_ubatch = N_BATCH, N_UBATCH
        context.n_threads = context.n_threads_batch = setup["threads"]
        context.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
        context.kv_unified = False
        context.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp cannot make a context of {slots} x {length} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self._batch = llama_cpp.llama_batch_init(N_BATCH, 0, 1)
        self._slots = [Slot(i) for i in range(slots)]
        self._prefix_caching = setup["prefix_caching"]
        self._cached = 0
        self.settings = {
            "weights": setup["dtype"],
            "n_ctx": context.n_ctx,
            "n_seq_max": slots,
            "n_batch": N_BATCH,
            "n_ubatch": N_UBATCH,
            "n_threads": setup["threads"],
            "flash_attention": "auto",
            "kv_unified": False,
            "kv_type": "f16",
            "system": llama_cpp.llama_print_system_info().decode().strip(" |"),
        }

    def reset(self) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        for slot in self._slots:
            slot.tokens = []

    def run(self, asks: list[dict], clock: Clock) -> None:
        self._cached = 0
        waiting = list(enumerate(asks))[::-1]
        while waiting or any(slot.request is not None for slot in self._slots):
            while waiting and any(slot.request is None for slot in self._slots):
                self._take(*waiting.pop())
            self._step(clock)
        clock.cached_tokens = self._cached if self._prefix_caching else 0

    def _take(self, request: int, ask: dict) -> None:
        """Give a request the free slot with the longest common prefix; keep that prefix."""
        prompt = ask["prompt"]
        free = [slot for slot in self._slots if slot.request is None]
        kept = 0
        slot = free[0]
        if self._prefix_caching:
            slot = max(free, key=lambda s: common(s.tokens, prompt))
            kept = min(common(slot.tokens, prompt), len(prompt) - 1)  # the last gives the logits
        llama_cpp.llama_memory_seq_rm(self._memory, slot.index, kept, -1)
        slot.tokens, slot.pending = prompt[:kept], prompt[kept:]
        slot.request, slot.left = request, ask["max_tokens"]
        self._cached += kept

    def _step(self, clock: Clock) -> None:
        """One decode call; the tokens it gave."""
        batch, count = self._batch, 0
        running = [slot for slot in self._slots if slot.request is not None]
        for slot in sorted(running, key=lambda s: len(s.pending)):  # next tokens, then prompts
            slot.logits = -1
            part = slot.pending[: N_BATCH - count]
            for i, token in enumerate(part):
                batch.token[count] = token
                batch.pos[count] = len(slot.tokens) + i
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = slot.index
                batch.logits[count] = 0
                count += 1
            slot.tokens += part
            slot.pending = slot.pending[len(part) :]
            if part and not slot.pending:
                slot.logits = count - 1
                batch.logits[count - 1] = 1
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode of {count} tokens gave {status}")
        tokens = [(slot, self._argmax(slot.logits)) for slot in running if slot.logits >= 0]
        now = clock.now()
        for slot, token in tokens:
            if slot.request is None:
                raise AssertionError("a slot that ran has a request")
            clock.add(slot.request, [token], now)
            slot.pending = [token]
            slot.left -= 1
            if not slot.left:
                slot.request, slot.pending = None, []

    def _argmax(self, row: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.argmax(np.ctypeslib.as_array(pointer, (self._vocab,))))

    def close(self) -> dict[str, Any]:
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)
        return {"compiles_after_warmup": None}


def make(setup: dict[str, Any]) -> tuple[LlamaCpp, dict[str, str]]:
    return LlamaCpp(setup), {"llama-cpp-python": llama_cpp.__version__}


if __name__ == "__main__":
    serve(make)
