"""transformers on torch at the same shape and dtype, random weights, with the same prompts: its
`generate`, and its continuous batching. No jax here.

What it does on the machine that is found is what is reported: its attention is torch's own where
the flash-attention packages are not installed, and the row says which was used.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import scale as scales
from benchmarks.report import spread

Row = dict[str, Any]
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Peer:
    """A model on a device; `deadline` is the section's (time.monotonic)."""

    torch: Any
    model: Any
    scale: scales.Scale
    deadline: float
    load_s: float

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self.deadline

    def peak_memory(self) -> int | None:
        cuda = self.torch.cuda
        return cuda.max_memory_allocated() if cuda.is_available() else None

    def config(self, tokens: int) -> Any:
        """Greedy, exactly `tokens`."""
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            bos_token_id=None,
        )


def build(scale: scales.Scale, folder: Path, deadline: float) -> Peer:
    """The model with random weights, made on the device in its dtype.

    Raises RuntimeError where torch sees no GPU that the scale wants.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    begun = time.perf_counter()
    on_gpu = scale is scales.FULL
    if on_gpu and not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} sees no GPU; install its CUDA build")
    config = AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if on_gpu else "cpu"), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, scale.dtype))
    model.eval()
    model.generation_config.eos_token_id = None
    if on_gpu:
        torch.cuda.synchronize()
    return Peer(torch, model, scale, deadline, time.perf_counter() - begun)


def generate(peer: Peer) -> Iterator[Row]:
    """Prefill, and decode steps as the difference of a long and a short call."""
    scale = peer.scale
    row = {"section": "transformers", "engine": "transformers generate"}
    yield {
        **row,
        "case": "start",
        "load_s": peer.load_s,
        "attention": peer.model.config._attn_implementation,
    }
    parts = [partial(_prompts, peer, *lengths) for lengths in scale.prefills]
    for found in _in_time(peer, partial(_steps, peer), parts):
        yield found if "left_out" in found else {**row, **found}


def _in_time(
    peer: Peer, measure: Callable[[int], Row], between: Sequence[Callable[[], Row]] = ()
) -> Iterator[Row]:
    """Rows of the smaller batches, largest first, then `between`, then the largest batch if it can
    end in time: its work grows at most as its rows."""
    *small, large = peer.scale.batches
    seconds: dict[int, float] = {}
    for batch in reversed(small):
        if not peer.has_time:
            yield {"left_out": f"transformers: batch {batch}, no time"}
            continue
        begun = time.perf_counter()
        yield measure(batch)
        seconds[batch] = time.perf_counter() - begun
    for at, part in enumerate(between):
        if not peer.has_time:
            yield {"left_out": f"transformers: {len(between) - at} lengths of prompts, no time"}
            break
        yield part()
    grown = seconds.get(small[-1], 0.0) * large / small[-1]
    if not peer.has_time or time.monotonic() + grown > peer.deadline:
        yield {"left_out": f"transformers: batch {large} may take {grown:.0f} s, no time"}
        return
    yield measure(large)


def _steps(peer: Peer, batch: int) -> Row:
    """Decode steps: what a long call takes beyond one that makes a single token."""
    scale, tokens = peer.scale, peer.scale.peer_tokens
    prompts = scales.prompts(scale, batch, max(1, scale.context - tokens // 2), seed=batch)
    _seconds(peer, prompts, 2)  # the first call of a size chooses kernels
    short, long = [], []
    while len(long) < REPEATS and (peer.has_time or not long):
        short.append(_seconds(peer, prompts, 1))
        long.append(_seconds(peer, prompts, 1 + tokens))
    step = (statistics.median(long) - statistics.median(short)) / tokens
    found: Row = {
        "case": f"batch {batch}",
        "batch": batch,
        "context": scale.context,
        "fill_s": statistics.median(short),
        "repeats": len(long),
        "peak_memory_bytes": peer.peak_memory(),
    }
    if step <= 0:
        return {**found, "note": "a long call took no longer than a short one: no step time"}
    return {**found, "step_s": step, "output_tok_s": batch / step}


def _prompts(peer: Peer, rows: int, length: int) -> Row:
    """The time of a call that makes one token a row."""
    prompts = scales.prompts(peer.scale, rows, length, seed=0)
    _seconds(peer, prompts, 1)
    times = spread([_seconds(peer, prompts, 1) for _ in range(REPEATS)])
    return {
        "case": f"{rows} x {length}",
        "batch": rows,
        "prompt_tokens": length,
        "ttft_p50_s": times["median"],
        "ttft_low_s": times["low"],
        "ttft_high_s": times["high"],
        "prefill_tok_s": rows * length / times["median"],
        "peak_memory_bytes": peer.peak_memory(),
    }


def _seconds(peer: Peer, prompts: list[list[int]], tokens: int) -> float:
    """Of a call of `generate` that makes `tokens` for each prompt."""
    torch = peer.torch
    ids = torch.tensor(prompts, device=peer.model.device)
    begun = time.perf_counter()
    with torch.inference_mode():
        made = peer.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=peer.config(tokens)
        )
    shape = tuple(made.cpu().shape)  # waits for the device
    seconds = time.perf_counter() - begun
    if shape != (len(prompts), len(prompts[0]) + tokens):
        raise RuntimeError(f"transformers made {shape}, {tokens} tokens a row were asked for")
    return seconds


def batching(peer: Peer) -> Iterator[Row]:
    """Continuous batching: all requests at once; the rate while every row decodes, by the times at
    which it says each token was made, and the whole job's."""
    for found in _in_time(peer, partial(_batch, peer)):
        if "left_out" in found:
            yield found
        else:
            yield {"section": "batching", "engine": "transformers continuous batching", **found}


def _batch(peer: Peer, batch: int) -> Row:
    from transformers import ContinuousBatchingConfig

    scale, tokens = peer.scale, peer.scale.peer_tokens
    length = max(1, scale.context - tokens // 2)
    prompts = scales.prompts(scale, batch, length, seed=batch)
    # On a GPU it sizes itself, which is its best; on a CPU that would be most of the memory.
    sizes = {} if scale is scales.FULL else {"num_blocks": 16, "max_batch_tokens": 64}
    used: set[str] = set()
    hook = peer.model.register_forward_pre_hook(
        lambda model, _: used.add(model.config._attn_implementation)
    )
    begun = time.perf_counter()
    found = peer.model.generate_batch(
        prompts,
        generation_config=peer.config(2 * tokens),
        continuous_batching_config=ContinuousBatchingConfig(**sizes),
        record_timestamps=True,
    )
    seconds = time.perf_counter() - begun
    hook.remove()
    results = list(found.values())
    problems = [r.error for r in results if r.error is not None]
    made = sum(len(r.generated_tokens) for r in results)
    if problems or made != batch * 2 * tokens:
        raise RuntimeError(
            f"transformers made {made} of {batch * 2 * tokens} tokens for {batch} requests: "
            f"{problems[:1]}"
        )
    return {
        "case": f"batch {batch}",
        "batch": batch,
        "context": length + tokens,
        "attention": ", ".join(sorted(used)),
        **_steady([r.timestamps for r in results]),
        "job_s": seconds,
        "job_output_tok_s": made / seconds,
        "num_tokens": made,
        "peak_memory_bytes": peer.peak_memory(),
    }


def _steady(stamps: list[list[float]]) -> Row:
    """Step time and tokens per second between the moment in which the last row had its first token
    and that in which the first row had its last."""
    begun, ended = max(row[0] for row in stamps), min(row[-1] for row in stamps)
    made = sum(begun < at <= ended for row in stamps for at in row)
    if ended <= begun or not made:
        return {"step_s": None, "note": "the rows never all decoded at once"}
    rate = made / (ended - begun)
    return {
        "step_s": len(stamps) / rate,
        "output_tok_s": rate,
        "fill_s": begun - min(row[0] for row in stamps),
        "steady_tokens": made,
    }


SECTIONS = {"transformers": generate, "batching": batching}


def run(name: str, scale: scales.Scale, folder: Path, deadline: float) -> Iterator[Row]:
    """A section by its name."""
    yield from SECTIONS[name](build(scale, folder, deadline))
