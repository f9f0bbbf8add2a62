"""The runner: the engine's only jax.jit. Owns params, pages and the compiled programs.

Every program is compiled ahead of time for a bucket that is known before the engine starts, so that
what is compiled, and when, is explicit. Nothing here knows about requests.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import kv_cache
from jaxinfer.batch import Builder, HostBatch
from jaxinfer.buckets import Bucket
from jaxinfer.errors import ConfigError, RecompileError
from jaxinfer.models import Model
from jaxinfer.request import Row, Sequence, StepPlan
from jaxinfer.step import copy_pages, set_bias_row, step

COPY_PAIRS = 16
"""Page pairs that one run of the copy program takes."""


class CompileCounter:
    """Counts XLA compilations and persistent-cache hits of the whole process, by jax.monitoring."""

    def __init__(self) -> None:
        self.compiles = 0
        self.cache_hits = 0
        self.seconds = 0.0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def _on_duration(self, event: str, duration_secs: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            with self._lock:
                self.compiles += 1
                self.seconds += duration_secs

    def _on_event(self, event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            with self._lock:
                self.cache_hits += 1


COMPILES = CompileCounter()
"""The process's counter: jax.monitoring keeps its listeners for ever, so there is exactly one."""


def use_compile_cache(directory: str | Path | None) -> Path | None:
    """Turn on JAX's persistent compile cache; None leaves the process's setting as it is.

    What is in the folder is run as code, so it must belong to the user and be writable by no other.

    Raises:
        ConfigError: the folder cannot be made, belongs to someone else, or others may write to it.
    """
    if directory is None:
        return None
    path = Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        stat = path.stat()
    except OSError as error:
        raise ConfigError(
            f"compilation_cache_dir {path} cannot be used ({error}); name a writable folder, or "
            f"pass compilation_cache_dir=None"
        ) from None
    if hasattr(os, "getuid") and (stat.st_uid != os.getuid() or stat.st_mode & 0o022):
        raise ConfigError(
            f"compilation_cache_dir {path} must belong to you and be writable only by you, because "
            f"compiled programs in it are run; chmod 700 it or name another folder"
        )
    jax.config.update("jax_compilation_cache_dir", str(path))
    # The small programs of small models are worth keeping too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def _compiling(program: str) -> jax.profiler.TraceAnnotation:
    """Names what is traced, lowered and compiled, or loaded, in a profiler's trace."""
    return jax.profiler.TraceAnnotation("compile", program=program)


class Runner:
    """Runs steps of one model on one device, in the order they are given.

    It is made from shapes alone, so that programs compile while the weights load; `begin` brings
    the weights. `run` returns at once; the arrays of its StepResult are ready when the device is
    done. `program`, with its static `options`, is what a step computes: step() or, for a draft
    model, draft_step().
    """

    def __init__(
        self,
        model: Model,
        builder: Builder,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        bias_rows: int,
        program: Callable[..., Any] = step,
        options: dict[str, int],
        strict: bool = False,
    ):
        self.model = model
        self.builder = builder
        self.strict = strict
        self.params: dict = {}

        def allocate() -> tuple[kv_cache.KVPages, jax.Array, jax.Array]:
            return (
                kv_cache.allocate(model, num_pages, page_size),
                jnp.zeros((bias_rows, model.config.vocab_size), jnp.float32),
                jnp.zeros((max_num_seqs,), jnp.int32),
            )

        lowered = jax.jit(allocate).lower()
        self._state_shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), lowered.out_info
        )
        # Zeroing the pages takes a CPU about as long as reading the weights.
        allocator = ThreadPoolExecutor(1, thread_name_prefix="jaxinfer-allocate")
        self._state = allocator.submit(lambda: lowered.compile()())
        allocator.shutdown(wait=False)
        # One at a time: the first program is waited for first.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="jaxinfer-compile")
        self._program, self._options = program, options
        self._is_target = program is step  # a draft model copies no pages and has no bias rows
        self._programs: dict[Bucket, Callable] = {}
        self._early: dict[Bucket, Future[Callable]] = {}
        self._copy: Callable | None = None
        self._set_bias: Callable | None = None
        self._is_warm = False
        self.compiles_after_warmup = 0
        self.temp_bytes: dict[Bucket, int] = {}

    def begin(self, params: dict) -> None:
        """Take the weights, of the model's shapes: from here on it can run."""
        self._compiler.shutdown(wait=False)
        self.params = params
        self.pages, self.bias_table, self.previous = self._state.result()
        del self._state  # the pages are donated: nothing else may hold them

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.builder.buckets.all

    def is_compiled(self, bucket: Bucket) -> bool:
        early = self._early.get(bucket)
        return bucket in self._programs or (early is not None and early.done())

    def compile_early(self, bucket: Bucket) -> None:
        """Compile the program of `bucket` in a thread, before `begin`; who needs it waits for it.

        It is traced here, under the caller's JAX settings; XLA's part, or loading from the compile
        cache, needs no interpreter.
        """
        if bucket not in self._early:
            with _compiling(str(bucket)):
                lowered = self._lower(bucket)
            self._early[bucket] = self._compiler.submit(self._finish, bucket, lowered)

    def compile(self, bucket: Bucket) -> Callable:
        """The program of `bucket`, compiled now where it is not; `warmup` compiles all."""
        early = self._early.get(bucket)
        if early is not None:
            self._programs[bucket] = early.result()
            self._early.pop(bucket, None)
        elif bucket not in self._programs:
            with _compiling(str(bucket)):
                self._programs[bucket] = self._finish(bucket, self._lower(bucket))
        return self._programs[bucket]

    def _lower(self, bucket: Bucket) -> jax.stages.Lowered:
        layout = self.builder.layouts[bucket]
        function = jax.jit(
            partial(self._program, self.model, layout, **self._options), donate_argnames="pages"
        )
        packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        return function.lower(self.model.shapes(), *self._state_shapes, packed)

    def _finish(self, bucket: Bucket, lowered: jax.stages.Lowered) -> Callable:
        program = lowered.compile()
        analysis = program.memory_analysis()
        self.temp_bytes[bucket] = analysis.temp_size_in_bytes if analysis else 0
        return program

    def _compile_copy(self) -> Callable:
        function = jax.jit(partial(copy_pages, self.model.ops), donate_argnames="pages")
        pairs = jax.ShapeDtypeStruct((COPY_PAIRS,), jnp.int32)
        with _compiling("copy pages"):
            return function.lower(self._state_shapes[0], pairs, pairs).compile()

    def _compile_set_bias(self) -> Callable:
        function = jax.jit(set_bias_row, donate_argnames="table")
        slot = jax.ShapeDtypeStruct((), jnp.int32)
        table = self._state_shapes[1]
        row = jax.ShapeDtypeStruct((table.shape[1],), jnp.float32)
        with _compiling("set bias"):
            return function.lower(table, slot, row).compile()

    def warmup(self, on_program: Callable[[str], None] | None = None) -> float:
        """Compile every program that is not compiled yet; seconds it took.

        Two are compiled at a time: tracing holds the interpreter, XLA does not.
        """
        started = time.perf_counter()
        note = on_program or (lambda name: None)

        def compile_one(bucket: Bucket) -> None:
            self.compile(bucket)
            note(str(bucket))

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(compile_one, reversed(self.buckets)))
        if self._is_target:
            self._copy = self._copy or self._compile_copy()
            note("copy pages")
            self._set_bias = self._set_bias or self._compile_set_bias()
            note("set bias")
        self._is_warm = True
        self.compiles_after_warmup = 0
        return time.perf_counter() - started

    @property
    def num_programs(self) -> int:
        """Programs that a warm-up makes: one for each bucket, and the target's two small ones."""
        return len(self.buckets) + 2 * self._is_target

    def _note_compiles(self, before: int, bucket: Bucket) -> None:
        """Count what was compiled since `before`, by this runner's steps alone, once it is warm."""
        count = COMPILES.compiles - before
        if not self._is_warm or not count:
            return
        self.compiles_after_warmup += count
        if self.strict:
            raise RecompileError(
                f"strict=True: {count} program(s) were compiled after warm-up, for step {bucket}; "
                f"set jax_log_compiles to see which, or pass strict=False"
            )

    def run(
        self,
        batch: HostBatch,
        copies: list[tuple[int, int]],
        bias_rows: list[tuple[int, np.ndarray]],
    ) -> Any:
        """Copy pages, set bias rows, then dispatch the step, whose StepResult (DraftResult of a
        draft model) comes back; its tokens feed the next step.

        Raises RecompileError where strict and something was compiled here after warmup().
        """
        before = COMPILES.compiles
        for slot, row in bias_rows:
            self._set_bias = self._set_bias or self._compile_set_bias()
            self.bias_table = self._set_bias(self.bias_table, np.int32(slot), row)
        for at in range(0, len(copies), COPY_PAIRS):
            pairs = np.zeros((2, COPY_PAIRS), np.int32)
            some = copies[at : at + COPY_PAIRS]
            pairs[:, : len(some)] = np.asarray(some, np.int32).T
            self._copy = self._copy or self._compile_copy()
            self.pages = self._copy(self.pages, pairs[0], pairs[1])
        program = self._programs.get(batch.bucket) or self.compile(batch.bucket)
        self._note_compiles(before, batch.bucket)
        before = COMPILES.compiles
        result, self.pages = program(
            self.params, self.pages, self.bias_table, self.previous, batch.packed
        )
        self.previous = result.tokens
        self._note_compiles(before, batch.bucket)  # there must be none: the program is compiled
        return result

    def close(self) -> None:
        """Give the device's memory back: params, pages and sampler state."""
        owned = (self.params, self.pages, self.bias_table, self.previous)
        for leaf in jax.tree_util.tree_leaves(owned):
            if not leaf.is_deleted():
                leaf.delete()
        self.params, self.pages = {}, None
        self._programs.clear()
        self._early.clear()
        self._copy = self._set_bias = None


class DraftDevice:
    """The draft model on its device, as DraftModelProposer asks for it."""

    def __init__(self, runner: Runner):
        self.runner = runner
        self._builder = runner.builder
        self.max_num_tokens = self._builder.buckets.mixed[-1].num_tokens

    def fill(self, rows: list[Row]) -> None:
        """Compute K/V of the rows' tokens. Their number is within `max_num_tokens`."""
        plan = StepPlan(0, rows)
        bucket = self._builder.buckets.mixed_bucket(plan.num_tokens, len(rows))
        self.runner.run(self._builder.build(plan, [0] * len(rows), bucket), [], [])

    def draft(self, rows: list[Row]) -> list[list[int]]:
        """The tokens drafted after each row, which has one token: as many as the largest
        `max_draft`. Waits for the device."""
        batch = self._builder.build(StepPlan(0, rows), [0] * len(rows))
        length = max(row.max_draft for row in rows)
        self.runner.previous = np.full((1,), length, np.int32)
        result = self.runner.run(batch, [], [])
        return np.asarray(result.drafts)[: len(rows), :length].tolist()

    def forget(self, sequence: Sequence) -> None:
        """`sequence` has ended."""
        self._builder.forget(sequence)
