"""The same step lowers for TPU and GPU; compiling it needs only the platform's compiler."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import kv_cache, models
from jaxinfer.batch import Bucket, Layout
from jaxinfer.step import step
from jaxinfer.weights import config_from_hf
from pallas_kernels import dispatch
from tests.helpers import TINY_CONFIG


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_the_step_lowers(platform, dtype):
    ops = dispatch.resolve("auto", platform="gpu" if platform == "cuda" else platform)
    model = models.build(config_from_hf(TINY_CONFIG, None), ops, dtype)
    pages = jax.eval_shape(partial(kv_cache.allocate, model, 9, 16))
    for bucket in (Bucket(8, 8), Bucket(32, 8)):
        layout = Layout(bucket, pages_per_row=4)
        function = partial(step, model, layout, num_top=5, valid_vocab=259)
        arguments = (
            model.shapes(),
            pages,
            jax.ShapeDtypeStruct((9, model.config.vocab_size), jnp.float32),
            jax.ShapeDtypeStruct((8,), jnp.int32),
            jax.ShapeDtypeStruct((layout.size,), jnp.int32),
        )
        traced = jax.jit(function, donate_argnames="pages").trace(*arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # The pool is donated: every one of its arrays names the output that takes its place.
        donated = text.count("tf.aliasing_output") + text.count("jax.buffer_donor")
        assert donated >= len(jax.tree_util.tree_leaves(pages))
