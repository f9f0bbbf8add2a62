"""Counts what the engine's scheduler does with a workload, without a device: steps, rows, waste."""

from collections.abc import Sequence
from dataclasses import dataclass

from jaxinfer.config import SchedulerConfig
from jaxinfer.request import Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduling.pages import PagePool
from jaxinfer.scheduling.scheduler import Scheduler

Lengths = Sequence[tuple[int, int]]
"""(prompt tokens, new tokens) of each request, in the order of arrival."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one run: steps, the most rows of a step, and sums over steps of rows, of tokens held in
    pages and of the positions those pages have."""

    num_steps: int
    most_rows: int
    row_steps: int
    token_steps: int
    position_steps: int

    @property
    def mean_rows(self) -> float:
        return self.row_steps / self.num_steps

    @property
    def waste(self) -> float:
        """Share of the pages' positions that holds no token."""
        return 1 - self.token_steps / self.position_steps

    def waste_of_reserving(self, positions: int) -> float:
        """Share of the memory that holds no token where each row has `positions` set aside."""
        return 1 - self.token_steps / (self.row_steps * positions)


def serve(
    lengths: Lengths, *, rows: int, num_pages: int, page_size: int, max_len: int, budget: int = 512
) -> Counts:
    """All requests arrive at once; one token of each row a step, `budget` tokens a step."""
    limits = SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=max(budget, rows),
        max_model_len=max_len,
        enable_prefix_caching=False,
    )
    pool = PagePool(num_pages + 1, page_size)
    scheduler = Scheduler(limits, pool)
    for i, (num_prompt, num_new) in enumerate(lengths):
        params = SamplingParams(temperature=0, max_tokens=num_new)
        request = Request(str(i), [0] * num_prompt, params, max_tokens=num_new, arrival=i)
        scheduler.add(request)
    steps = most = row_steps = token_steps = position_steps = 0
    while (plan := scheduler.plan()) is not None:
        steps += 1
        most = max(most, len(plan.rows))
        row_steps += len(plan.rows)
        token_steps += sum(row.kv_len for row in plan.rows)
        position_steps += page_size * sum(len(row.pages) for row in plan.rows)
        scheduler.commit(plan, [0] * len(plan.rows))
    if scheduler.has_work:
        raise RuntimeError("the scheduler stopped before every request had ended")
    return Counts(steps, most, row_steps, token_steps, position_steps)
