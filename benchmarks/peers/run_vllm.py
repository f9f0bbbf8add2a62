"""vLLM (its CPU build) for the benchmark: the engine's own loop, so that every token has a time.

Tuned for a machine of few cores. The engine runs in this process with a thread on every core: by
default it takes three processes and reserves a core for them, which on 2 cores made 0.6 times the
tokens. Its cache of whole compiled models cannot be read back in this mode (0.32 compiles anew
each time), so that the cache of compiled graphs is used, with which a start takes half as long.
"""

import os
import time
from typing import Any

from benchmarks.peers.protocol import Clock, Engine, serve

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def time_warmup() -> list[float]:
    """A list that gets the seconds of vLLM's warm-up run, in which it compiles."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    seconds: list[float] = []
    warm_up = CPUModelRunner.warming_up_model

    def timed(runner: CPUModelRunner) -> None:
        begun = time.perf_counter()
        warm_up(runner)
        seconds.append(time.perf_counter() - begun)

    CPUModelRunner.warming_up_model = timed
    return seconds


class Vllm(Engine):
    def __init__(self, setup: dict[str, Any]) -> None:
        from vllm import LLM

        warmups = time_warmup()
        self._llm = LLM(
            setup["model"],
            dtype=setup["dtype"],
            max_model_len=2048,
            max_num_seqs=setup["max_num_seqs"],
            enable_prefix_caching=setup["prefix_caching"],
            skip_tokenizer_init=True,
            seed=0,
        )
        self._count = 0
        self.compile_s = sum(warmups) if warmups else None
        config = self._llm.llm_engine.vllm_config
        self.settings = {
            "dtype": setup["dtype"],
            "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
            "max_model_len": config.model_config.max_model_len,
            "block_size": config.cache_config.block_size,
            "compilation": config.compilation_config.mode.name,
            "environment": {**ENVIRONMENT, "OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]},
        }

    def reset(self) -> None:
        if not self._llm.llm_engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")

    def run(self, asks: list[dict], clock: Clock) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        requests = {}
        for i, ask in enumerate(asks):
            self._count += 1
            requests[str(self._count)] = i
            params = SamplingParams(
                temperature=0,
                max_tokens=ask["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(str(self._count), {"prompt_token_ids": ask["prompt"]}, params)
        cached = 0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = clock.now()
            for output in outputs:
                clock.add(requests[output.request_id], list(output.outputs[0].token_ids), now)
                if output.finished:
                    cached += output.num_cached_tokens or 0
        clock.cached_tokens = cached


def make(setup: dict[str, Any]) -> tuple[Vllm, dict[str, str]]:
    # OpenMP and vLLM read these when they are imported.
    os.environ.update(ENVIRONMENT, OMP_NUM_THREADS=str(setup["threads"]))
    import torch
    import vllm

    return Vllm(setup), {"vllm": vllm.__version__, "torch": torch.__version__}


if __name__ == "__main__":
    serve(make)
