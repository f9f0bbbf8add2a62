"""generate: a whole generation in one pure function, its loop one lax.while_loop.

It uses the engine's model, paged attention and sampler over pages of its own, so greedy tokens
equal `LLM`'s. Callers jit it, shard its inputs, or call it inside a larger program. No state, no
host.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from jaxinfer import kv_cache
from jaxinfer import sampling as sampler
from jaxinfer.batch import SampleParams
from jaxinfer.bias import bias_row
from jaxinfer.errors import InvalidRequestError
from jaxinfer.models import Model
from jaxinfer.sampling_params import SamplingParams, check_int
from pallas_kernels.paged_attention import Ragged

_IGNORED_FIELDS = ("max_tokens", "output_kind", "detokenize", "skip_special_tokens")
_IGNORED_FIELDS += ("spaces_between_special_tokens", "include_stop_str_in_output")
_APPLIED_FIELDS = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "min_tokens")
_APPLIED_FIELDS += ("ignore_eos",)
_APPLIED_FIELDS += ("frequency_penalty", "repetition_penalty", "logit_bias", "allowed_token_ids")


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class Generated:
    """`tokens[b, :lengths[b]]` were generated, the end-of-sequence token included; the rest is 0.

    `logprobs` are natural logarithms of softmax of the raw logits at each token.
    A row whose logits were not finite ends there, with token -1.
    """

    tokens: Int32[Array, "B new"]
    lengths: Int32[Array, " B"]
    logprobs: Float[Array, "B new"]


@partial(jax.tree_util.register_dataclass)
@dataclass(frozen=True)
class _State:
    step: Int32[Array, ""]
    layers: tuple
    history: Int32[Array, "B total"]
    kv_lens: Int32[Array, " B"]
    done: Bool[Array, " B"]
    out: Generated


def generate(
    model: Model,
    params: dict,
    tokens: Int32[Array, "B S"],
    lengths: Int32[Array, " B"],
    *,
    max_new_tokens: int,
    sampling: SamplingParams | None = None,
    key: Array | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    valid_vocab: int | None = None,
) -> Generated:
    """Generate up to `max_new_tokens` after each prompt.

    Args:
        model, params: `llm.model` and `llm.params`. Close over `model`
            when jitting; it is static, and its `page_dtype` is that of the pages.
        tokens: prompts, int32, padded on the right with anything.
        lengths: true prompt lengths, each in 1..S. The caller answers for this inside jit, where
            values cannot be checked.
        max_new_tokens: static.
        sampling: static; one for all rows; None is greedy. Temperature, top_k, top_p, min_p, the
            penalties, logit_bias, allowed_token_ids and min_tokens apply.
        key: typed PRNG key; needed unless greedy. Row b's draw at a position depends on
            (key, b, position) alone.
        eos_id: token(s) that end a row; None: every row runs to max_new_tokens.
        valid_vocab: ids from here on are never drawn; `LLM` passes its tokenizer's size, which
            matters where the embedding has more rows. None: the model's vocabulary.

    Raises:
        InvalidRequestError: a shape, a dtype or a sampling field that cannot be served.
    """
    choose = SamplingParams(temperature=0.0) if sampling is None else sampling
    rows, width = _check(model, tokens, lengths, max_new_tokens, choose, key)
    eos = () if choose.ignore_eos else _eos_ids(eos_id, model.config.vocab_size)
    page_size = kv_cache.PAGE_SIZES[model.ops.platform]
    pages_per_row = -(-(width + max_new_tokens) // page_size)
    pages = kv_cache.allocate(model, rows * pages_per_row + 1, page_size)
    table = 1 + jnp.arange(rows * pages_per_row, dtype=jnp.int32).reshape(rows, pages_per_row)
    lengths = lengths.astype(jnp.int32)
    unused = jax.random.key(0)  # greedy rows draw nothing, but the sampler traces the draw
    vocab = check_int(
        "valid_vocab", valid_vocab or model.config.vocab_size, 1, model.config.vocab_size
    )
    draw = partial(_draw, model, choose, unused if key is None else key, eos, vocab, lengths)
    hidden, layers = _prefill(model, params, pages.layers, table, page_size, tokens, lengths)
    state = draw(params, hidden, _start(layers, tokens, lengths, max_new_tokens))

    def more(state: _State):
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def body(state: _State) -> _State:
        hidden, state = _decode(model, params, table, page_size, state)
        return draw(params, hidden, state)

    return jax.lax.while_loop(more, body, state).out


def _start(layers: tuple, tokens, lengths: jax.Array, max_new_tokens: int) -> _State:
    """Nothing is generated yet."""
    rows = len(lengths)
    zeros = jnp.zeros((rows, max_new_tokens))
    return _State(
        step=jnp.int32(0),
        layers=layers,
        history=jnp.pad(tokens.astype(jnp.int32), ((0, 0), (0, max_new_tokens))),
        kv_lens=lengths,
        done=jnp.zeros((rows,), bool),
        out=Generated(zeros.astype(jnp.int32), jnp.zeros((rows,), jnp.int32), zeros),
    )


def _check(model: Model, tokens, lengths, max_new_tokens, choose: SamplingParams, key):
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise InvalidRequestError(
            f"tokens must be integers [B, S]; got {tokens.dtype}{list(tokens.shape)}",
            param="tokens",
        )
    rows, width = tokens.shape
    if lengths.shape != (rows,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise InvalidRequestError(
            f"lengths must be [B] = [{rows}], integers; got {lengths.dtype}{list(lengths.shape)}",
            param="lengths",
        )
    check_int("max_new_tokens", max_new_tokens, 1, None)
    if width < 1 or width + max_new_tokens > model.config.max_position:
        raise InvalidRequestError(
            f"{width} prompt tokens + max_new_tokens={max_new_tokens} must be in "
            f"2..{model.config.max_position}, the model's positions",
            param="max_new_tokens",
        )
    if not isinstance(choose, SamplingParams):
        raise InvalidRequestError(
            f"sampling must be SamplingParams or None; got {type(choose).__name__}",
            param="sampling",
        )
    if key is None and not choose.is_greedy:
        raise InvalidRequestError(
            "sampling needs key=jax.random.key(...); or use temperature=0", param="key"
        )
    default = SamplingParams()
    if choose.max_tokens not in (None, default.max_tokens, max_new_tokens):
        raise InvalidRequestError(
            f"sampling.max_tokens={choose.max_tokens} and max_new_tokens={max_new_tokens} differ; "
            f"give max_new_tokens alone",
            param="max_tokens",
        )
    for name in SamplingParams.__dataclass_fields__:
        known = name in _APPLIED_FIELDS or name in _IGNORED_FIELDS
        if not known and getattr(choose, name) != getattr(default, name):
            raise InvalidRequestError(
                f"generate does not apply SamplingParams.{name}; use LLM, or leave it out",
                param=name,
            )
    for name in ("logit_bias", "allowed_token_ids"):
        for token in getattr(choose, name) or ():
            check_int(f"{name} id", token, 0, model.config.vocab_size - 1)
    return rows, width


def _eos_ids(eos_id: object, vocab_size: int) -> tuple[int, ...]:
    """The ids that end a row: none, one, or several."""
    if eos_id is None:
        return ()
    ids = eos_id if isinstance(eos_id, (list, tuple)) else (eos_id,)
    return tuple(check_int("eos_id", token, 0, vocab_size - 1) for token in ids)


def _prefill(model: Model, params, layers, table, page_size: int, tokens, lengths):
    """All prompts as one ragged batch; hidden states [B, D] of each prompt's last token."""
    rows, width = tokens.shape
    ends = jnp.cumsum(lengths, dtype=jnp.int32)
    starts = ends - lengths
    flat = jnp.arange(rows * width, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, flat, side="right").astype(jnp.int32), rows - 1)
    real = flat < ends[-1]
    position = jnp.where(real, flat - starts[row], 0)
    ids = jnp.where(real, tokens.astype(jnp.int32)[row, position], 0)
    slots = table[row, position // page_size] * page_size + position % page_size
    ragged = Ragged(
        page_table=table,
        kv_lens=lengths,
        cu_q_lens=jnp.concatenate([jnp.zeros((1,), jnp.int32), ends]),
        num_decode=jnp.int32(0),
        slots=jnp.where(real, slots, 0),
        decode_only=False,
    )
    hidden, layers = model.forward(params, layers, ids, position, ragged)
    return hidden[ends - 1], layers


def _decode(model: Model, params, table, page_size: int, state: _State):
    """One token of each row: the last of its history. Rows that are done write to page 0."""
    rows = table.shape[0]
    position = state.kv_lens
    row = jnp.arange(rows, dtype=jnp.int32)
    ids = jnp.maximum(state.history[row, position], 0)
    slots = table[row, position // page_size] * page_size + position % page_size
    ragged = Ragged(
        page_table=table,
        kv_lens=position + 1,
        cu_q_lens=jnp.arange(rows + 1, dtype=jnp.int32),
        num_decode=jnp.int32(rows),
        slots=jnp.where(state.done, 0, slots),
        decode_only=True,
    )
    hidden, layers = model.forward(params, state.layers, ids, position, ragged)
    kv_lens = jnp.where(state.done, position, position + 1)
    state = _State(state.step, layers, state.history, kv_lens, state.done, state.out)
    return hidden, state


def _draw(
    model: Model, choose: SamplingParams, key, eos, valid_vocab, prompt_lens, params, hidden, state
):
    """Sample each row's next token from hidden [B, D] and append it."""
    rows = hidden.shape[0]
    logits = model.logits(params, hidden)
    table = jnp.stack(
        [
            jnp.zeros((model.config.vocab_size,), jnp.float32),
            jnp.asarray(bias_row(model.config.vocab_size, choose)),
            jnp.asarray(bias_row(model.config.vocab_size, choose, eos)),
        ]
    )
    plain = choose.logit_bias is None and choose.allowed_token_ids is None
    slot = jnp.where(state.step < choose.min_tokens, 2, 0 if plain else 1).astype(jnp.int32)
    fill = partial(jnp.full, (rows,), dtype=jnp.float32)
    zeros = jnp.zeros((rows,), jnp.int32)
    per_row = SampleParams(
        temperature=fill(0.0 if choose.is_greedy else choose.temperature),
        top_p=fill(choose.top_p),
        min_p=fill(choose.min_p),
        presence=fill(choose.presence_penalty),
        frequency=fill(choose.frequency_penalty),
        repetition=fill(choose.repetition_penalty),
        top_k=jnp.full((rows,), min(choose.top_k, 2**31 - 1), jnp.int32),
        seed_low=zeros,
        seed_high=zeros,
        sample_index=zeros,
        prompt_len=prompt_lens,
        num_logprobs=zeros,
        position=state.kv_lens,
        bias_slot=jnp.broadcast_to(slot, (rows,)),
    )

    def keys():
        per_row = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
        return jax.vmap(jax.random.fold_in)(per_row, state.kv_lens)

    drawn = sampler.sample(logits, per_row, lambda: state.history, table, valid_vocab, keys)
    logprob = sampler.log_probs(logits, drawn, 1)[0]
    row = jnp.arange(rows)
    ended = drawn < 0
    for token in eos:
        ended = ended | (drawn == token)
    at = jnp.where(state.done, state.out.tokens.shape[1], state.step)  # done: out of range, dropped
    out = Generated(
        tokens=state.out.tokens.at[row, at].set(drawn, mode="drop"),
        lengths=jnp.where(state.done, state.out.lengths, state.step + 1),
        logprobs=state.out.logprobs.at[row, at].set(logprob, mode="drop"),
    )
    history = state.history.at[row, state.kv_lens].set(drawn, mode="drop")
    return _State(
        step=state.step + 1,
        layers=state.layers,
        history=history,
        kv_lens=state.kv_lens,
        done=state.done | ended,
        out=out,
    )
