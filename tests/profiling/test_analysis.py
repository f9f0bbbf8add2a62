"""The arithmetic, on operations whose times are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.profiling import analysis
from jaxinfer.profiling.analysis import Spread, analyse, shared_times
from jaxinfer.profiling.events import Operation, Run, Span, Trace, TraceError
from tests.profiling.xspace import covered


def op(start: float, end: float, name="add.1", scope=("a",), run=0, **more) -> Operation:
    return Operation(name, "jit_step", 1, "gpu:0", start, end, scope=scope, run=run, **more)


def test_operations_one_after_the_other_keep_their_time():
    assert shared_times([op(0, 2), op(2, 5)]) == [2, 3]


def test_an_instant_is_shared_by_what_runs_in_it():
    # [0,2) alone, [2,4) two, [4,5) three, [5,6) two, [6,7) alone
    times = shared_times([op(0, 5), op(2, 7), op(4, 6)])
    assert times == pytest.approx([2 + 1 + 1 / 3, 1 + 1 / 3 + 1 / 2 + 1, 1 / 3 + 1 / 2])
    assert sum(times) == pytest.approx(7)


def test_a_loop_gets_what_is_left_by_its_body():
    loop, inner = op(0, 10, control=True), op(1, 9, control=True)
    times = shared_times([loop, inner, op(2, 3), op(5, 8)])
    assert times == pytest.approx([2, 4, 1, 3])


def test_what_takes_no_time_disturbs_nothing():
    assert shared_times([op(0, 4), op(2, 2), op(4, 4), op(0, 0)]) == [4, 0, 0, 0]


spans = st.tuples(st.integers(0, 50), st.integers(0, 20), st.booleans())


@given(st.lists(spans, max_size=30))
def test_times_add_up_to_what_is_covered(raw):
    operations = [op(a, a + length, control=control) for a, length, control in raw]
    times = shared_times(operations)
    assert all(t >= -1e-9 for t in times)
    assert sum(times) == pytest.approx(covered((o.start, o.end) for o in operations))


def test_covered():
    assert covered([]) == 0
    assert covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_percentiles_are_nearest_rank():
    spread = Spread([3.0, 1.0, 2.0, 4.0])
    assert [spread.percentile(p) for p in (0, 50, 75, 99)] == [1, 2, 3, 4]
    assert Spread().percentile(50) == 0


def trace(runs, operations, spans=()) -> Trace:
    made = [Run("jit_step", "gpu:0", a, b, label, program_id=1) for a, b, label in runs]
    named = [Span(name, a, b, "python") for name, a, b in spans]
    return Trace("a.xplane.pb", "gpu", list(operations), made, named)


def test_host_gaps_idle_time_and_steps():
    found = analyse(
        trace(
            [(0, 10, "decode 8"), (14, 24, "decode 8"), (25, 45, "mixed 32x8")],
            [
                op(0, 4, run=0), op(6, 10, run=0),  # 2 idle inside
                op(11, 12, run=None),  # another program, in the gap of 4
                op(14, 24, run=1),
                op(25, 45, run=2),
            ],
            [("plan", 0, 1), ("plan", 2, 5), ("wait", 42, 46), ("other", 0, 100)],
        )
    )  # fmt: skip
    assert found.between.values == [3, 1]
    assert found.inside.values == [2, 0, 0]
    assert found.period == 14 + 11
    assert {k: v.values for k, v in found.steps.items()} == {
        "decode 8": [10, 10], "mixed 32x8": [20],
    }  # fmt: skip
    assert (found.num_steps, found.num_cut, found.busy) == (3, 0, 39)
    assert found.phases["plan"].values == [1, 3]
    assert found.phases["wait"].values == [4]


def test_no_gap_while_the_engine_has_no_request():
    runs = [(0, 1, ""), (5, 6, ""), (90, 91, "")]
    operations = [op(a, b, run=i) for i, (a, b, _) in enumerate(runs)]
    found = analyse(trace(runs, operations, [("wake", -1, -1), ("wake", 89, 89)]))
    assert found.between.values == [4]
    assert found.period == 5


def test_steps_that_overlap_have_no_gap():
    runs = [(0, 10, ""), (8, 20, "")]
    found = analyse(trace(runs, [op(0, 10, run=0), op(8, 20, run=1)]))
    assert found.between.values == [0]


def test_steps_cut_by_the_ends_of_the_recording_are_no_steps():
    """The first ran already when the recording began, the last still when it ended."""
    runs = [(0, 1, ""), (10, 13, ""), (20, 23, ""), (30, 33, ""), (40, 49, "")]
    operations = [op(a, b, run=i) for i, (a, b, _) in enumerate(runs)]
    waits = [("wait", 5, 14), ("wait", 15, 24), ("wait", 25, 34), ("wait", 35, 41)]
    found = analyse(trace(runs, operations, [("dispatch", 2, 3), *waits[:3]]))
    assert (found.num_steps, found.num_cut) == (3, 2)
    assert found.busy == 19  # device time is all there is
    # the gap before the first whole step counts: the step before it did end
    assert found.between.values == [9, 7, 7]
    assert analyse(trace(runs, operations, [("dispatch", 2, 3), *waits])).num_steps == 3
    later = [("wait", 41, 48.9)]  # the host was told, then the last operation's end was noted
    assert analyse(trace(runs, operations, [("dispatch", 2, 3), *later])).num_steps == 4
    assert analyse(trace(runs, operations)).num_steps == 5


def test_scopes_and_operations_are_sums():
    found = analyse(
        trace(
            [(0, 9, "")],
            [
                op(0, 3, "fusion.1"), op(3, 5, "fusion.22"), op(5, 6, "fusion.3.clone"),
                op(6, 8, "copy.1", ("b",)), op(8, 9, "fusion.1", ()),
            ],
        )
    )  # fmt: skip
    parts = [(p.name, p.scope, p.count, p.time) for p in found.operations]
    assert parts == [
        ("fusion", ("a",), 3, 6), ("copy", ("b",), 1, 2), ("fusion", (), 1, 1),
    ]  # fmt: skip
    assert [(p.scope, p.count, p.time) for p in found.scopes] == [
        (("a",), 3, 6), (("b",), 1, 2), ((), 1, 1),
    ]  # fmt: skip


def test_two_devices_do_not_share_time():
    operations = [op(0, 4), op(0, 4)]
    operations[1].device = "gpu:1"
    assert analyse(trace([], operations)).busy == 8


def test_one_bucket_alone():
    runs = [(0, 1, "decode 8"), (2, 5, "mixed 32x8")]
    operations = [op(0, 1, run=0), op(2, 5, run=1)]
    found = analyse(trace(runs, operations), "mixed 32x8")
    assert (found.busy, found.num_steps) == (3, 1)
    with pytest.raises(TraceError, match=r"'decode 9'.*'decode 8', 'mixed 32x8'"):
        analyse(trace(runs, operations), "decode 9")


def test_no_step_at_all():
    found = analyse(trace([], [op(0, 1, run=None)]))
    assert (found.num_steps, found.busy, found.period) == (0, 1, 0)
    assert analysis.NO_SCOPE
