"""From instructions to scopes: paths, and what stands in for a path that XLA lost."""

import pytest

from jaxinfer.profiling import hlo
from tests.profiling.xspace import Op, program


@pytest.mark.parametrize(
    ("op_name", "scope"),
    [
        ("jit(step)/Decoder/layers_3/attn/qkv/td,nhd->tnh/dot_general", "Decoder/layers/attn/qkv"),
        ("jit(step)/Decoder/layers_12/attn/attention/while/body/cond/branch_0_fun/add",
         "Decoder/layers/attn/attention"),
        ("jit(step)/sampler/draw/vmap(jit(_gumbel))/jit(_uniform)/vmap()/while/body/closed_call/add",
         "sampler/draw"),
        ("jit(step)/sampler/keys/row_keys.<locals>.key/sampler/keys/xor", "sampler/keys"),
        ("jit(step)/logits/logits/dot_general", "logits"),
        ("jit(step)/sampler/while/body/eval_jaxpr/sin", "sampler"),  # jax 0.11
        ("jit(loss)/transpose(jvp(flash))/jit(_where)/select_n", "flash"),
        ("jit(step)/add", ""),
        ("reduce_sum", ""),
        ("", ""),
    ],
)  # fmt: skip
def test_scope_of(op_name, scope):
    assert "/".join(hlo.scope_of(op_name)) == scope


def read(**computations) -> hlo.Program:
    return hlo.read_program(memoryview(program("jit_step", computations)))


def scope(found: hlo.Program, name: str) -> str:
    return "/".join(found.scope(name, found.scopes_of_weights()))


def test_names_opcodes_and_control():
    found = read(main=[Op("while.1", "while"), Op("add.1", "add"), Op("call.2", "call")])
    assert found.name == "jit_step"
    assert [found.is_control(name) for name in ("while.1", "add.1", "call.2", "nothing")] == [
        True, False, True, False,
    ]  # fmt: skip
    assert found.scope("nothing", {}) == ()


def test_a_fusion_has_the_scope_of_its_result():
    found = read(
        fused=[Op("mul.1", "multiply", "jit(f)/a/mul"), Op("add.1", "add", "jit(f)/b/add")],
        main=[Op("fusion.1", "fusion", calls=("fused",))],
    )
    assert scope(found, "fusion.1") == "b"


def test_readers_come_before_operands():
    found = read(
        main=[
            Op("norm", "add", "jit(f)/norm/add"),
            Op("copy.1", "copy", operands=("norm",)),
            Op("copy.2", "copy", operands=("norm",)),
            Op("out", "add", "jit(f)/out/add", operands=("copy.1",)),
        ]
    )
    assert scope(found, "copy.1") == "out"
    assert scope(found, "copy.2") == "norm"


def test_a_product_without_a_name_is_found_by_its_weight():
    """What XLA does to a product of one row: the new instruction has no op_name."""
    weight = "params['layers_0']['attn']['q']"
    other = read(
        main=[
            Op("p", "parameter", weight),
            Op("x", "add", "jit(f)/norm/add"),
            Op("dot.1", "dot", "jit(f)/layers_0/attn/qkv/td,nhd->tnh/dot_general", ("x", "p")),
        ]
    )
    found = read(
        main=[
            Op("p", "parameter", "params['layers_5']['attn']['q']"),
            Op("b", "bitcast", operands=("p",)),
            Op("x", "add", "jit(f)/norm/add"),
            Op("dot.7", "dot", operands=("x", "b")),
            Op("r", "add", "jit(f)/rope/add", operands=("dot.7",)),
        ]
    )
    assert found.scope("dot.7", other.scopes_of_weights()) == ("layers", "attn", "qkv")
    assert found.scope("dot.7", {}) == ("weights", "layers", "attn", "q")


def test_looking_up_a_table_is_not_multiplying_by_it():
    found = read(
        main=[
            Op("p", "parameter", "params['embed']"),
            Op("ids", "parameter", "packed"),
            Op("take", "gather", "jit(f)/embed/gather", ("p", "ids")),
            Op("x", "add", "jit(f)/norm/add"),
            Op("dot.1", "dot", operands=("x", "p")),
        ]
    )
    assert found.scope("dot.1", found.scopes_of_weights()) == ("weights", "embed")


def test_a_copy_in_a_branch_belongs_to_the_branch():
    found = read(
        branch=[Op("p", "parameter"), Op("copy.1", "copy", operands=("p",))],
        main=[Op("cond.1", "conditional", "jit(f)/penalties/cond", calls=("branch",))],
    )
    assert scope(found, "copy.1") == "penalties"


def test_circles_end():
    found = read(
        main=[Op("a", "add", operands=("b",)), Op("b", "add", operands=("a",))],
    )
    assert scope(found, "a") == ""
