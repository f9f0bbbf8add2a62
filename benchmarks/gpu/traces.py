"""What a trace says of an engine's steps: time on the device, and the gap the host leaves between.

While XLA is traced it runs a program's kernels one by one, not as the CUDA graph it runs otherwise.
So the busy time is that of the kernels themselves, and the idle time is stated twice: as the gap
between steps that the trace shows, and as what an untraced step takes beyond the busy time.
"""

from pathlib import Path

from jaxinfer.profiling import analysis, reader
from jaxinfer.profiling.events import TraceError

LEAST = 3  # steps that a trace must have, to be told of


def steps(folder: Path, step_seconds: float) -> dict[str, float | int | str]:
    """Columns for a row, medians over the whole steps in the trace under `folder`.
    `step_seconds`: what a step takes untraced. Where the trace does not tell, `trace` says why, and
    there is no figure."""
    try:
        profile = analysis.analyse(reader.load(folder))
    except TraceError as error:
        return {"trace": f"not read: {error}"}
    if profile.num_steps < LEAST:
        notes = "; ".join(profile.trace.notes) or "nothing is said of why"
        return {"trace": f"{profile.num_steps} whole steps in it, {LEAST} are needed: {notes}"}
    times = analysis.Spread([value for s in profile.steps.values() for value in s.values])
    busy = times.percentile(50) - profile.inside.percentile(50)
    found: dict[str, float | int | str] = {
        "trace_steps": profile.num_steps,
        "device_busy_s": busy,
        "idle_share": round(1 - busy / step_seconds, 4),
    }
    if profile.between.values and profile.period:
        found["traced_gap_s"] = profile.between.percentile(50)
        found["traced_gap_share"] = round(profile.between.total / profile.period, 4)
    if profile.trace.notes:
        found["trace"] = "; ".join(profile.trace.notes)[:300]
    return found
