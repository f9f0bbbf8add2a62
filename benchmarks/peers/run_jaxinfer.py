"""jaxinfer for the benchmark, through the public `LLM`: requests queued, then one step after
another, with every program compiled before the first."""

import importlib.metadata
import time
from typing import Any

from benchmarks.peers.protocol import Clock, Engine, serve
from jaxinfer import LLM, RequestOutputKind, SamplingParams
from jaxinfer.profiling import record


class Jaxinfer(Engine):
    def __init__(self, setup: dict[str, Any]) -> None:
        if setup["profile"] is not None:
            record.prepare(setup["profile"])
        self._llm = LLM(
            setup["model"],
            dtype=setup["dtype"],
            max_num_seqs=setup["max_num_seqs"],
            enable_prefix_caching=setup["prefix_caching"],
            skip_tokenizer_init=True,
            verbose=False,
            **setup["options"],
        )
        begun = time.perf_counter()
        self._llm.warmup(use_tqdm=False)
        self.compile_s = time.perf_counter() - begun
        metrics = self._llm.get_metrics()
        config = self._llm.config
        self.settings = {
            "dtype": config.dtype,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_model_len": config.max_model_len,
            "page_size": config.page_size,
            "num_pages": config.num_pages,
            "attention_impl": config.attention_impl,
            "programs_compiled": metrics["num_compiles"],
            "programs_from_cache": metrics["num_compile_cache_hits"],
        }
        self._prefix_caching = setup["prefix_caching"]
        self._count = 0

    def reset(self) -> None:
        if self._prefix_caching:
            self._llm.reset_prefix_cache()

    def run(self, asks: list[dict], clock: Clock) -> None:
        requests = {}
        for i, ask in enumerate(asks):
            self._count += 1
            requests[str(self._count)] = i
            params = SamplingParams(
                temperature=0,
                max_tokens=ask["max_tokens"],
                ignore_eos=True,
                output_kind=RequestOutputKind.DELTA,
            )
            self._llm.add_request(str(self._count), ask["prompt"], params)
        cached = 0
        while self._llm.has_unfinished_requests():
            outputs = self._llm.step()
            now = clock.now()
            for output in outputs:
                if output.error is not None:
                    raise output.error
                clock.add(requests[output.request_id], output.outputs[0].token_ids, now)
                if output.finished:
                    cached += output.num_cached_tokens
        clock.cached_tokens = cached

    def profiled(self, rounds: list[list[dict]], directory: str) -> None:
        """An XLA trace of `rounds`, which is not timed: tracing takes time of its own."""
        with record.trace(directory):
            for asks in rounds:
                self.run(asks, Clock(len(asks)))

    def close(self) -> dict[str, Any]:
        after = self._llm.get_metrics()["num_compiles_after_warmup"]
        self._llm.close()
        return {"compiles_after_warmup": after}


def make(setup: dict[str, Any]) -> tuple[Jaxinfer, dict[str, str]]:
    names = ("jaxinfer", "jax", "jaxlib")
    return Jaxinfer(setup), {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    serve(make)
