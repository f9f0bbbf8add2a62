"""Hand-made traces with the structure of a GPU's, a TPU's and a CPU's: exact times come out."""

import os

import pytest
from jax.profiler import ProfileData

from jaxinfer.profiling import reader
from jaxinfer.profiling.analysis import analyse
from jaxinfer.profiling.events import Trace, TraceError
from tests.profiling.xspace import Event, Op, Plane, metadata, program, serialise, write

US = 1e-6
PROGRAM = program(
    "jit_step",
    {
        "main": [
            Op("gemm.1", "custom-call", "jit(step)/Decoder/layers_0/mlp/up/dot_general"),
            Op("gemm.2", "custom-call", "jit(step)/Decoder/layers_1/mlp/up/dot_general"),
            Op("fusion.3", "fusion", "jit(step)/sampler/draw/argmax"),
            Op("while.4", "while", "jit(step)/Decoder/layers_0/attn/while"),
        ]
    },
)
HOST_SPANS = [
    Event("wake", 0, 0),
    Event("step", 0, 9, {"step_num": 0, "_r": 1}),
    Event("plan", 1, 2),
    Event("dispatch", 4, 4, {"bucket": "decode 8"}),
    Event("step", 100, 50, {"step_num": 1, "_r": 1}),
    Event("dispatch", 104, 4, {"bucket": "decode 8"}),
    Event("wait", 132, 30),
]


def load(tmp_path, *planes: Plane) -> Trace:
    write(tmp_path, planes)
    return reader.load(tmp_path)


def times(trace: Trace) -> dict[str, float]:
    """Microseconds by scope."""
    return {"/".join(p.scope): pytest.approx(p.time / US, abs=1e-3) for p in analyse(trace).scopes}


# -- GPU


def kernel(op: str, start: float, length: float, launch: int) -> Event:
    stats = {"hlo_op": op, "hlo_module": "jit_step", "program_id": 7, "correlation_id": launch}
    return Event(f"kernel of {op}", start, length, stats)


def gpu(*, launches: bool = True, more: tuple[Event, ...] = ()) -> list[Plane]:
    """Two steps: [20, 60) with 5 idle inside, [120, 160); a copy to the host between them."""
    launched = [
        Event("cuLaunchKernelEx", at, 1, {"correlation_id": n, "hlo_op": "gemm.1"})
        for n, at in ((1, 5), (2, 6), (3, 7), (4, 105), (5, 106))
    ]
    stream = [
        kernel("gemm.1", 20, 20, 1), kernel("gemm.2", 40, 10, 2), kernel("fusion.3", 55, 5, 3),
        kernel("gemm.1", 120, 30, 4), kernel("fusion.3", 150, 10, 5),
    ]  # fmt: skip
    copies = [Event("MemcpyD2H", 70, 2, {"correlation_id": 99})]
    return [
        metadata({"jit_step(7)": PROGRAM}),
        Plane(
            "/host:CPU",
            {"python": HOST_SPANS, "Host Threads/1": launched if launches else []},
        ),
        Plane(
            "/device:GPU:0", {"Stream #7(Kernel)": [*stream, *more], "Stream #8(Memcpy)": copies}
        ),
    ]


def test_a_gpu_trace(tmp_path):
    trace = load(tmp_path, *gpu())
    found = analyse(trace)
    assert trace.platform == "gpu"
    assert not trace.notes
    assert times(trace) == {"Decoder/layers/mlp/up": 60, "sampler/draw": 15, "": 2}
    assert found.num_steps == 2
    assert found.steps["decode 8"].values == pytest.approx([40 * US, 40 * US])
    assert found.between.values == pytest.approx([58 * US])  # 60 less the copy
    assert found.inside.values == pytest.approx([5 * US, 0], abs=1e-12)
    assert found.period == pytest.approx(100 * US)
    assert found.phases["plan"].values == pytest.approx([2 * US])
    assert found.phases["wait"].values == pytest.approx([30 * US])
    largest = found.operations[0]
    assert (largest.name, largest.count) == ("gemm", 3)
    assert largest.time == pytest.approx(60 * US)


def test_what_the_host_computed_beside_a_gpu_does_not_count(tmp_path):
    planes = gpu()
    planes[1].lines = {**planes[1].lines, "tf_XLAEigen/1": [thunk("gemm.1", 300, 40, 1, 1)]}
    trace = load(tmp_path, *planes)
    assert times(trace)["Decoder/layers/mlp/up"] == 60
    assert analyse(trace).num_steps == 2


def test_launches_in_a_plane_of_their_own(tmp_path):
    """CUPTI's plane is merged into the host's when a session ends; one written early has it."""
    planes = gpu()
    lines = dict(planes[1].lines)
    planes.append(Plane("/host:CUPTI", {"Host Threads/1": lines.pop("Host Threads/1")}))
    planes[1].lines = {**lines, "compiling": [Event("compile", 90, 5, {"program": "decode 8"})]}
    trace = load(tmp_path, *planes)
    assert analyse(trace).num_steps == 2
    assert len(trace.compiles) == 1


def test_two_streams_share_the_time_in_which_both_run(tmp_path):
    planes = gpu()
    planes[2].lines = {
        "Stream #1(Kernel)": [kernel("gemm.1", 20, 10, 1)],
        "Stream #2(Kernel)": [kernel("fusion.3", 25, 10, 2)],
    }
    assert times(load(tmp_path, *planes)) == {"Decoder/layers/mlp/up": 7.5, "sampler/draw": 7.5}


def test_kernels_of_a_cuda_graph_are_said_to_be_nameless(tmp_path):
    nameless = Event("a kernel", 165, 5, {"correlation_id": 5, "cuda_graph_id": 2})
    trace = load(tmp_path, *gpu(more=(nameless,)))
    assert times(trace)[""] == 7
    assert "1 kernels of gpu:0 ran in CUDA graphs" in trace.notes[0]
    assert "--xla_gpu_enable_command_buffer=" in trace.notes[0]


def test_a_kernel_may_bear_its_op_name(tmp_path):
    planes = gpu()[1:]  # without the compiled program
    one = kernel("gemm.9", 200, 7, 5)
    one.stats = {**one.stats, "name": "jit(step)/Decoder/layers_4/attn/out/dot_general"}
    planes[1].lines = {"Stream #7(Kernel)": [one]}
    assert times(load(tmp_path, *planes)) == {"Decoder/layers/attn/out": 7}


def test_a_trace_of_another_program_has_no_steps_and_no_complaint(tmp_path):
    planes = gpu()
    planes[1].lines = {"python": []}
    trace = load(tmp_path, *planes)
    assert (analyse(trace).num_steps, trace.notes) == (0, [])


def test_kernels_without_their_launch_belong_to_no_step(tmp_path):
    trace = load(tmp_path, *gpu(launches=False))
    assert analyse(trace).num_steps == 0
    assert "5 kernels of gpu:0 have no launch" in trace.notes[0]
    assert times(trace)["sampler/draw"] == 15


# -- TPU


def tpu() -> list[Plane]:
    """Two steps of 40 and 30; in the first a loop of 20 with 12 of operations in it."""

    def text(name):
        return f"%{name} = f32[8]{{0}} something(%x), calls=%c"

    return [
        metadata({"jit_step(7)": PROGRAM}),
        Plane("/host:CPU", {"python": HOST_SPANS}),
        Plane(
            "/device:TPU:0",
            {
                "Steps": [Event("0", 10, 45), Event("1", 60, 30)],
                "XLA Modules": [Event("jit_step(7)", 10, 40), Event("jit_step(7)", 110, 30)],
                "XLA Ops": [
                    Event(text("while.4"), 10, 20), Event(text("gemm.1"), 12, 12),
                    Event(text("fusion.3"), 30, 20), Event(text("gemm.2"), 110, 30),
                ],
                "Async XLA Ops": [Event(text("copy-start.9"), 10, 500)],
            },
        ),
    ]  # fmt: skip


def test_a_tpu_trace(tmp_path):
    trace = load(tmp_path, *tpu())
    found = analyse(trace)
    assert trace.platform == "tpu"
    assert times(trace) == {
        "Decoder/layers/mlp/up": 42, "sampler/draw": 20, "Decoder/layers/attn": 8,
    }  # fmt: skip
    assert found.steps["decode 8"].values == pytest.approx([40 * US, 30 * US])
    assert found.between.values == pytest.approx([60 * US])
    assert found.inside.values == pytest.approx([0, 0], abs=1e-12)


def test_several_devices(tmp_path):
    planes = tpu()
    planes.append(Plane("/device:TPU:1", planes[2].lines))
    planes.append(Plane("/device:CUSTOM:x", planes[2].lines))
    found = analyse(load(tmp_path, *planes))
    assert found.num_steps == 4
    assert len(found.steps["decode 8"].values) == 4
    assert found.between.values == pytest.approx([60 * US, 60 * US])
    assert found.busy == pytest.approx(140 * US)


# -- CPU


def thunk(op: str, start: float, length: float, run: int, key: int) -> Event:
    stats = {
        "hlo_op": op, "hlo_module": "jit_step", "program_id": 9, "run_id": run,
        "device_ordinal": 0, "_pt": 0, "_p": key,
    }  # fmt: skip
    return Event(op, start, length, stats)


def cpu() -> list[Plane]:
    """Two steps on two threads; gemm.2 returns at once and is done on another thread at 45."""

    def end(op, at, key):
        return Event(f"end: {op}", at, 0, {"_ct": 0, "_c": key})

    return [
        metadata({"jit_step(3)": PROGRAM}),  # from the compile cache: another id than it runs under
        Plane(
            "/host:CPU",
            {
                "python": HOST_SPANS,
                "tf_XLAEigen/1": [
                    Event("ThreadpoolListener::StartRegion", 19, 0),
                    thunk("gemm.1", 20, 20, -5, 1), thunk("gemm.2", 40, 1, -5, 2),
                    end("gemm.1", 40, 1),
                ],
                "tf_XLAEigen/2": [end("gemm.2", 45, 2), thunk("fusion.3", 50, 5, -5, 3)],
                "tf_XLAPjRtCpuClient/1": [
                    Event("ThunkExecutor::Execute", 115, 50),
                    thunk("gemm.1", 120, 10, 6, 4), thunk("gemm.2", 130, 10, 6, 5),
                    thunk("fusion.3", 140, 5, 6, 6),
                ],
            },
        ),
    ]  # fmt: skip


def test_a_cpu_trace(tmp_path):
    trace = load(tmp_path, *cpu())
    found = analyse(trace)
    assert trace.platform == "cpu"
    assert times(trace) == {"Decoder/layers/mlp/up": 45, "sampler/draw": 10}
    assert found.steps["decode 8"].values == pytest.approx([35 * US, 25 * US])
    assert found.between.values == pytest.approx([65 * US])
    assert found.inside.values == pytest.approx([5 * US, 0], abs=1e-12)


@pytest.mark.parametrize(
    ("region", "then", "length"), [(41, 57, 5), (59, 57, 19), (30, 57, 19), (41, 58, 19)]
)
def test_what_the_marking_thread_ran_first_is_not_the_operations(tmp_path, region, then, length):
    """gemm.2 is shared out at 40; thread 2 does the last part of it from 41 to 45, runs what waited
    for it until 58 and marks its end at 59. If it began with the part at 59, if what it ran began
    before gemm.2 did, or if another operation came between, the mark is the end."""

    def execute(start, end):
        return Event("ThunkExecutor::Execute", start, end - start)

    began = 45 if region != 30 else 35
    plane = Plane(
        "/host:CPU",
        {
            "tf_XLAEigen/1": [execute(15, 42), thunk("gemm.2", 40, 1, -5, 2)],
            "tf_XLAEigen/2": [
                Event("ThreadpoolListener::StartRegion", region, 0),
                execute(began, 58), thunk("fusion.3", 47, 5, -5, 3),
                execute(54, 57), thunk("other.4", then, 0.5, -5, 4),
                Event("end: gemm.2", 59, 0, {"_ct": 0, "_c": 2}),
            ],
        },
    )  # fmt: skip
    trace = load(tmp_path, metadata({"jit_step(3)": PROGRAM}), plane)
    (gemm,) = (op for op in trace.operations if op.name == "gemm.2")
    assert gemm.end - gemm.start == pytest.approx(length * US)


def test_of_programs_with_one_name_that_which_has_the_operations_is_taken(tmp_path):
    other = program("jit_step", {"main": [Op("gemm.1", "custom-call", "jit(step)/wrong/dot")]})
    planes = cpu()
    planes[0] = metadata({"jit_step(9)": other, "jit_step(3)": PROGRAM, "jit_else(1)": other})
    assert "wrong" not in times(load(tmp_path, *planes))


def test_without_the_program_there_are_no_scopes(tmp_path):
    trace = load(tmp_path, *cpu()[1:])
    assert times(trace) == {"": 55}
    assert analyse(trace).num_steps == 2


def test_compiles_by_the_engines_names_and_by_module(tmp_path):
    planes = cpu()
    planes[1].lines = {
        **planes[1].lines,
        "compiling": [
            Event("compile", 200, 100, {"program": "decode 8"}),
            Event("backend_compile_and_load", 220, 70),
            Event("compile", 400, 30, {"program": "copy pages"}),
            Event("backend_compile_and_load", 500, 20),
        ],
        "tf_PjRtCompilerThreadPool/1": [
            Event("HLO passes (jit_step)", 230, 5, {"module": "jit_step"}),
            Event("HLO passes (jit__lambda)", 505, 5, {"module": "jit__lambda"}),
        ],
    }
    found = [
        (c.program, pytest.approx(c.seconds / US), c.is_loaded)
        for c in load(tmp_path, *planes).compiles
    ]
    assert found == [("decode 8", 100, False), ("copy pages", 30, True), ("jit__lambda", 20, False)]


def test_two_programs_compiled_at_a_time(tmp_path):
    planes = cpu()
    planes[1].lines = {
        **planes[1].lines,
        "a": [
            Event("compile", 200, 100, {"program": "decode 8"}),
            Event("backend_compile_and_load", 220, 60),
        ],
        "b": [
            Event("compile", 210, 80, {"program": "decode 16"}),
            Event("backend_compile_and_load", 230, 40),
        ],
    }
    found = load(tmp_path, *planes).compiles
    assert [(c.program, c.is_loaded) for c in found] == [("decode 8", False), ("decode 16", False)]


# -- what is no trace


def test_the_newest_trace_is_taken(tmp_path):
    old, new = write(tmp_path / "a", cpu()), write(tmp_path / "b", gpu())
    os.utime(old, (1, 1))
    assert reader.newest(tmp_path) == new
    assert reader.newest(old) == old


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_nothing_there(tmp_path, name):
    (tmp_path / "empty").mkdir()
    what = {"missing": "does not exist", "empty": "holds no trace"}[name]
    with pytest.raises(TraceError, match=what):
        reader.load(tmp_path / name)


def damaged() -> dict[str, bytes]:
    whole = serialise(cpu())
    return {"cut": whole[: len(whole) // 2], "text": b"hello world" * 9, "zeros": bytes(99)}


@pytest.mark.parametrize("kind", damaged())
def test_a_damaged_file(tmp_path, kind):
    file = tmp_path / "x.xplane.pb"
    file.write_bytes(damaged()[kind])
    with pytest.raises(TraceError, match="not a whole trace"):
        reader.load(file)


def test_a_damaged_program(tmp_path):
    planes = cpu()
    planes[0] = metadata({"jit_step(3)": PROGRAM[:-20]})
    with pytest.raises(TraceError, match="not a whole trace"):
        load(tmp_path, *planes)


def test_names_that_are_lost(tmp_path):
    """A trace that refers to names which are not in it: what is left of it is read."""
    text = """planes { name: "/host:CPU"
        lines { id: 1 name: "python"
          events { metadata_id: 9 offset_ps: 1 }
          events { metadata_id: 1 offset_ps: 1 duration_ps: 2000000 stats { metadata_id: 7 } }
          events { metadata_id: 2 offset_ps: 1 duration_ps: 3000000
            stats { metadata_id: 3 str_value: "gemm.1" } stats { metadata_id: 7 int64_value: 3 } } }
        event_metadata { key: 1 value { id: 1 name: "plan" } }
        event_metadata { key: 2 value { id: 2 name: "gemm.1" } }
        stat_metadata { key: 3 value { id: 3 name: "hlo_op" } } }"""
    file = tmp_path / "x.xplane.pb"
    file.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    found = analyse(reader.load(file))
    assert found.busy == pytest.approx(3 * US)
    assert found.phases["plan"].values == pytest.approx([2 * US])


@pytest.mark.parametrize("planes", [[], [Plane("/host:CPU", {"python": HOST_SPANS})]])
def test_no_operation_of_a_device(tmp_path, planes):
    with pytest.raises(TraceError, match="no operation of a device"):
        load(tmp_path, *planes)
