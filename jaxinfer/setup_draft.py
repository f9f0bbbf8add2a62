"""From a `speculative_config` to a Speculator, with its proposer and the draft model, if any."""

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass

from jaxinfer import kv_cache, models, weights
from jaxinfer.batch import Builder
from jaxinfer.buckets import Buckets
from jaxinfer.config import EngineConfig, ModelConfig
from jaxinfer.draft import draft_step
from jaxinfer.errors import ConfigError, JaxInferError
from jaxinfer.models import Model
from jaxinfer.runner import DraftDevice, Runner
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.setup_model import (
    choose_dtype,
    load_params,
    open_source,
    open_tokenizer,
    page_dtype,
    quantised,
    resolve_ops,
)
from jaxinfer.speculative.config import SpeculativeConfig
from jaxinfer.speculative.draft_model import DraftModelProposer
from jaxinfer.speculative.ngram import NgramProposer
from jaxinfer.speculative.proposer import Proposer
from jaxinfer.speculative.speculator import Speculator
from jaxinfer.tokenizer import Tokenizer


def speculative(config: EngineConfig) -> SpeculativeConfig | None:
    """The checked `speculative_config`, None where there is none."""
    given = config.speculative_config
    return None if given is None else SpeculativeConfig.from_dict(given)


def num_lanes(config: EngineConfig, speculative: SpeculativeConfig | None) -> int:
    """Most rows of a step on the device: sequences, each with its drafted tokens."""
    rows = config.max_num_seqs or 0
    return rows if speculative is None else max(rows, speculative.num_speculative_tokens + 1)


@dataclass(slots=True)
class Draft:
    """A draft model that is open, and the runner that gets its weights."""

    source: weights.ModelSource
    model: Model
    max_model_len: int
    valid_vocab: int
    runner: Runner | None = None

    def __enter__(self) -> "Draft":
        return self

    def __exit__(self, *error: object) -> None:
        self.source.__exit__(*error)

    def begin(self, config: EngineConfig, verbose: bool) -> None:
        """Load the weights; then the runner can run."""
        if self.runner is None:
            raise AssertionError("speculator() makes the runner first")
        self.runner.begin(load_params(config, self.source, self.model, verbose))


def open_draft(
    speculative: SpeculativeConfig,
    config: EngineConfig,
    target: ModelConfig,
    tokenizer: Tokenizer | None,
    platform: str,
) -> Draft:
    """Open the draft model, and see that it speaks the target's tokens.

    Raises:
        ConfigError: it does not load, or has another vocabulary or tokenizer.
    """
    if speculative.model == "self":
        own = dataclasses.replace(
            config,
            quantization=speculative.quantization,
            quantization_group_size=None,
            dequantize=False,
        )
    else:
        own = dataclasses.replace(
            config,
            model=speculative.model,
            hf_overrides=None,
            revision=None,
            tokenizer=None,
            chat_template=None,
            quantization=None,
            quantization_group_size=None,
            quantize_lm_head=False,
            dequantize=False,
        )
    try:
        return _open(speculative, own, target, tokenizer, platform)
    except JaxInferError as error:
        raise _wrong(f"model {speculative.model!r}: {error}") from None


def _open(
    speculative: SpeculativeConfig,
    own: EngineConfig,
    target: ModelConfig,
    tokenizer: Tokenizer | None,
    platform: str,
) -> Draft:
    """open_draft() with the draft model's `own` configuration."""
    with ExitStack() as stack:
        source = stack.enter_context(open_source(own))
        if speculative.model == "self" and source.quantised is not None:
            raise ConfigError(
                f"{source.path} is quantised already ({source.quantised.describe()}); name a "
                "smaller model as the draft"
            )
        vocab = _common_vocabulary(own, source, target, tokenizer)
        dtype = choose_dtype(own, source.config, platform)
        ops = resolve_ops(own, source.config, dtype, platform)
        model = models.build(source.config, ops, dtype, page_dtype(own, dtype))
        model = quantised(own, model, source)
        stack.pop_all()  # it stays open: its weights are read later
    limit = source.config.max_position
    wanted = speculative.max_model_len or limit
    if wanted > limit:
        source.close()
        raise ConfigError(f"max_model_len={wanted} exceeds its {limit} positions; lower it")
    return Draft(source, model, wanted, vocab)


def _common_vocabulary(
    own: EngineConfig,
    source: weights.ModelSource,
    target: ModelConfig,
    tokenizer: Tokenizer | None,
) -> int:
    """Ids that the draft model's tokenizer has; ConfigError unless they are the target's."""
    own_tokenizer = open_tokenizer(own, source)
    if tokenizer is None or own_tokenizer is None:
        vocab = source.config.vocab_size
        if vocab != target.vocab_size:
            raise ConfigError(
                f"it has {vocab} token ids, the target {target.vocab_size}; a draft needs the "
                "target's vocabulary"
            )
        return vocab
    if own_tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise ConfigError(
            f"it has another tokenizer than the target ({own_tokenizer.vocab_size} and "
            f"{tokenizer.vocab_size} ids); name a draft of the target's family"
        )
    return own_tokenizer.vocab_size


def check_fits(
    speculative: SpeculativeConfig, plan: kv_cache.MemoryPlan, draft: Draft | None
) -> None:
    """Raises ConfigError for a draft that the pages or the draft model's positions cannot hold."""
    length = speculative.num_speculative_tokens
    if length + 2 > plan.num_tokens:
        raise _wrong(
            f"num_speculative_tokens={length} does not fit the page pool of {plan.num_tokens} "
            "tokens; lower it or give the pages more memory"
        )
    if draft is not None and draft.max_model_len < plan.max_model_len:
        raise _wrong(
            f"the draft model takes {draft.max_model_len} tokens and max_model_len is "
            f"{plan.max_model_len}; pass max_model_len={draft.max_model_len}, or a draft that "
            "takes more"
        )


def speculator(
    config: EngineConfig,
    speculative: SpeculativeConfig,
    runner: Runner,
    pool: PagePool,
    plan: kv_cache.MemoryPlan,
    draft: Draft | None,
) -> Speculator:
    """The Speculator of an engine whose target runs on `runner`."""
    buckets = runner.builder.buckets
    proposer: Proposer
    if draft is None:
        proposer = NgramProposer(speculative.prompt_lookup_min, speculative.prompt_lookup_max)
    else:
        draft.runner = Runner(
            draft.model,
            Builder(
                # A row that drafts has two lanes of the target's at least.
                Buckets.make(
                    max(1, buckets.decode[-1].num_rows // 2), config.max_num_batched_tokens or 0
                ),
                plan.page_size,
                math.ceil(plan.max_model_len / plan.page_size),
            ),
            num_pages=plan.num_pages,
            page_size=plan.page_size,
            max_num_seqs=1,
            bias_rows=1,
            program=draft_step,
            options={
                "num_tokens": speculative.num_speculative_tokens,
                "valid_vocab": draft.valid_vocab,
            },
            strict=config.strict,
        )
        proposer = DraftModelProposer(DraftDevice(draft.runner), pool.generations, plan.page_size)
    return Speculator(
        speculative,
        proposer,
        [bucket.num_rows for bucket in buckets.decode],
        runner.model.config.vocab_size,
    )


def _wrong(message: str) -> ConfigError:
    return ConfigError(f"speculative_config: {message}", field="speculative_config")
