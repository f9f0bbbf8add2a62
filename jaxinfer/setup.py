"""From an EngineConfig to the parts of an engine: source, model, memory plan, weights, tokenizer.

Everything that can be wrong with a model or a setting is found here, before device memory is taken.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax

from jaxinfer import kv_cache, models, setup_draft
from jaxinfer.batch import Builder
from jaxinfer.bias import BiasRows
from jaxinfer.buckets import Bucket, Buckets
from jaxinfer.config import EngineConfig, ModelConfig, SchedulerConfig
from jaxinfer.engine import Engine
from jaxinfer.errors import ConfigError, InvalidRequestError
from jaxinfer.intake import Intake
from jaxinfer.models import Model
from jaxinfer.request import Row, StepPlan
from jaxinfer.runner import Runner, use_compile_cache
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import Scheduler
from jaxinfer.setup_model import (
    choose_dtype,
    describe_weights,
    load_params,
    open_source,
    open_tokenizer,
    page_dtype,
    quantised,
    quantization_of,
    resolve_ops,
)
from jaxinfer.speculative.config import SpeculativeConfig
from jaxinfer.speculative.speculator import Speculator
from jaxinfer.tokenizer import Tokenizer

_DEFAULTS = {  # platform: (max_num_seqs, max_num_batched_tokens)
    "cpu": (64, 512),
    "gpu": (256, 2048),
    "tpu": (256, 2048),
}


@dataclass(slots=True)
class Parts:
    """What `LLM` is made of. `config` has every None decided."""

    config: EngineConfig
    model: Model
    engine: Engine
    tokenizer: Tokenizer | None
    plan: kv_cache.MemoryPlan


def is_verbose(config: EngineConfig) -> bool:
    """Whether plan and progress are shown: as asked, else where standard error is a terminal."""
    return sys.stderr.isatty() if config.verbose is None else config.verbose


def assemble(config: EngineConfig, first_prompts: Sequence[Any] = ()) -> Parts:
    """Build an engine; while the weights load, the programs for `first_prompts` are compiled.

    Raises:
        ConfigError, ModelFormatError, TokenizerError, CapacityError: all ValueErrors, each naming
        the file or option, the value, and what to do.
    """
    _refuse_contradictions(config)
    speculative = setup_draft.speculative(config)
    verbose = is_verbose(config)
    use_compile_cache(config.compilation_cache_dir)
    platform = jax.default_backend()
    with ExitStack() as stack:
        source = stack.enter_context(open_source(config))
        dtype = choose_dtype(config, source.config, platform)
        config = dataclasses.replace(config, page_size=_page_size(config, platform))
        ops = resolve_ops(config, source.config, dtype, platform)
        model = models.build(source.config, ops, dtype, page_dtype(config, dtype))
        model = quantised(config, model, source)
        if model.formats:
            config = dataclasses.replace(config, quantization=quantization_of(config, source))
        tokenizer = open_tokenizer(config, source)
        draft = None
        if speculative is not None and speculative.model is not None:
            draft = stack.enter_context(
                setup_draft.open_draft(speculative, config, source.config, tokenizer, platform)
            )
        config = _decide(config, source.name, dtype, platform, source.config, speculative)
        lanes = setup_draft.num_lanes(config, speculative)
        plan = _memory(config, model, lanes, draft.model if draft else None)
        config = _with_plan(config, plan)
        if verbose:
            _say(f"attention: {ops.name} ({ops.reason})\n{plan}")
            if model.formats:
                _say(describe_weights(config, source, model))
        if speculative is not None:
            setup_draft.check_fits(speculative, plan, draft)
        pool = PagePool(plan.num_pages, plan.page_size)
        runner = _runner(config, model, tokenizer, plan, lanes)
        speculator = None
        if speculative is not None:
            speculator = setup_draft.speculator(config, speculative, runner, pool, plan, draft)
        intake = _intake(config, model, tokenizer, plan)
        first = _first_buckets(first_prompts, runner.builder.buckets, intake, config, speculative)
        for bucket in first[:1]:
            runner.compile_early(bucket)
        params = load_params(config, source, model, verbose)
        for bucket in first[1:]:  # after: the first token does not need it
            runner.compile_early(bucket)
        runner.begin(params)
        if draft is not None:
            draft.begin(config, verbose)
    # Not the intake above: one counts its requests.
    intake = _intake(config, model, tokenizer, plan)
    engine = _engine(config, runner, intake, plan, pool, speculator)
    if draft is not None and draft.runner is not None:
        engine.runners.append(draft.runner)
    if verbose:
        _say(f"buckets: {', '.join(map(str, engine.runner.buckets))}\n{describe(config)}")
    return Parts(config, model, engine, tokenizer, plan)


def _page_size(config: EngineConfig, platform: str) -> int:
    return config.page_size or kv_cache.PAGE_SIZES.get(platform, kv_cache.PAGE_SIZES["gpu"])


def _refuse_contradictions(config: EngineConfig) -> None:
    """Two options of which one would be ignored."""
    if config.num_pages is not None and config.kv_cache_memory_bytes is not None:
        raise ConfigError(
            f"num_pages={config.num_pages} and kv_cache_memory_bytes="
            f"{config.kv_cache_memory_bytes} both size the page pool; give one of them"
        )
    for name in ("tokenizer", "chat_template"):
        if config.skip_tokenizer_init and getattr(config, name) is not None:
            raise ConfigError(
                f"{name} has no meaning with skip_tokenizer_init=True; leave one of them out",
                field=name,
            )
    for name, unset in (("quantization_group_size", None), ("quantize_lm_head", False)):
        value = getattr(config, name)
        if config.quantization is None and value != unset:
            raise ConfigError(
                f"{name}={value} has no meaning without quantization; name a scheme, or leave it "
                f"out",
                field=name,
            )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def describe(config: EngineConfig) -> str:
    """The effective configuration, one option per line."""
    lines = ["configuration:"]
    lines += [f"  {f.name:<24}{getattr(config, f.name)}" for f in dataclasses.fields(config)]
    return "\n".join(lines)


def _decide(
    config: EngineConfig,
    name: str,
    dtype: str,
    platform: str,
    model_config: ModelConfig,
    speculative: SpeculativeConfig | None,
) -> EngineConfig:
    """Fill in what was left open, but for what the memory plan decides."""
    rows, tokens = _DEFAULTS.get(platform, _DEFAULTS["gpu"])
    limit = model_config.max_position
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the model's {limit} "
            f"positions; lower it, "
            f"or override max_position_embeddings through hf_overrides if you know the model can",
            field="max_model_len",
        )
    tokens = config.max_num_batched_tokens or max(tokens, config.max_num_seqs or 0)
    rows = config.max_num_seqs or min(rows, tokens)
    if tokens < rows:
        raise ConfigError(
            f"max_num_batched_tokens ({tokens}) must be at least max_num_seqs ({rows}), or a step "
            f"could not hold one token of each; raise the first or lower the second",
            field="max_num_batched_tokens",
        )
    if speculative is not None and tokens <= speculative.num_speculative_tokens:
        raise ConfigError(
            f"speculative_config num_speculative_tokens={speculative.num_speculative_tokens} must "
            f"be less than max_num_batched_tokens ({tokens}), which bounds a step; lower the first "
            "or raise the second",
            field="speculative_config",
        )
    return dataclasses.replace(
        config,
        model=config.model or name,
        dtype=dtype,
        kv_cache_dtype="fp8" if config.kv_cache_dtype == "fp8_e4m3" else config.kv_cache_dtype,
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
    )


def _with_plan(config: EngineConfig, plan: kv_cache.MemoryPlan) -> EngineConfig:
    return dataclasses.replace(
        config,
        max_model_len=plan.max_model_len,
        num_pages=plan.num_pages - 1,
        kv_cache_memory_bytes=plan.pages,
    )


def _memory(
    config: EngineConfig, model: Model, lanes: int, draft: Model | None
) -> kv_cache.MemoryPlan:
    return kv_cache.make_plan(
        model,
        draft=draft,
        request=kv_cache.MemoryRequest(
            config.gpu_memory_utilization, config.kv_cache_memory_bytes, config.num_pages
        ),
        device_bytes=kv_cache.device_memory(jax.devices()[0]),
        page_size=config.page_size or 0,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs or 0,
        max_num_batched_tokens=config.max_num_batched_tokens or 0,
        max_num_rows=lanes,
    )


def _intake(
    config: EngineConfig, model: Model, tokenizer: Tokenizer | None, plan: kv_cache.MemoryPlan
) -> Intake:
    eos = set(model.config.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        eos.add(tokenizer.eos_token_id)
    return Intake(
        tokenizer,
        vocab_size=model.config.vocab_size,
        eos_token_ids=tuple(sorted(eos)),
        max_model_len=plan.max_model_len,
        max_n=config.max_n,
        max_logprobs=config.max_logprobs,
        seed=config.seed,
    )


def _runner(
    config: EngineConfig,
    model: Model,
    tokenizer: Tokenizer | None,
    plan: kv_cache.MemoryPlan,
    rows: int,
) -> Runner:
    """`rows` bounds those of a step."""
    vocab = model.config.vocab_size
    pages_per_row = math.ceil(plan.max_model_len / plan.page_size)
    buckets = Buckets.make(rows, config.max_num_batched_tokens or 0)
    return Runner(
        model,
        Builder(buckets, plan.page_size, pages_per_row),
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_num_seqs=rows,
        bias_rows=rows + 1,
        options={
            "num_top": vocab if config.max_logprobs < 0 else min(config.max_logprobs, vocab),
            "valid_vocab": vocab if tokenizer is None else min(vocab, tokenizer.vocab_size),
        },
        strict=config.strict,
    )


def _first_buckets(
    prompts: Sequence[Any],
    buckets: Buckets,
    intake: Intake,
    config: EngineConfig,
    speculative: SpeculativeConfig | None,
) -> list[Bucket]:
    """Those of the first step, which takes in what it can of `prompts`, of the step after, and of
    one that verifies a draft of each row."""
    nobody: Any = None
    rows: list[Row] = []
    room = config.max_num_batched_tokens or 0
    for prompt in prompts[: config.max_num_seqs]:
        try:
            request = intake.request(prompt, request_id="first")
        except InvalidRequestError:
            continue  # it is refused, with this error, when it is asked for
        count = min(len(request.prompt_token_ids), room)
        if count:
            rows.append(Row(nobody, 0, count, True, 0, []))
        room -= count
    if not rows:
        return []
    found = [buckets.choose(StepPlan(0, rows)), buckets.decode_bucket(len(rows))]
    if speculative is not None:
        lanes = len(rows) * (speculative.num_speculative_tokens + 1)
        found.append(buckets.decode_bucket(min(lanes, buckets.decode[-1].num_rows)))
    return found


def _engine(
    config: EngineConfig,
    runner: Runner,
    intake: Intake,
    plan: kv_cache.MemoryPlan,
    pool: PagePool,
    speculator: Speculator | None,
) -> Engine:
    rows = config.max_num_seqs or 0
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=rows,
            max_num_batched_tokens=config.max_num_batched_tokens or 0,
            max_model_len=plan.max_model_len,
            policy=config.scheduling_policy,
            enable_prefix_caching=config.enable_prefix_caching,
            max_num_waiting=config.max_num_waiting,
        ),
        pool,
    )
    return Engine(
        scheduler=scheduler,
        runner=runner,
        builder=runner.builder,
        bias=BiasRows(
            runner.builder.buckets.decode[-1].num_rows + 1, runner.model.config.vocab_size
        ),
        intake=intake,
        tokenizer=intake.tokenizer,
        overlap=config.async_scheduling,
        speculator=speculator,
    )
