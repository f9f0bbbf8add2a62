"""Streams, added requests, aborts at every stage, and the numbers that LLM keeps."""

import pytest

from jaxinfer import (
    LLM,
    InvalidRequestError,
    RequestOutputKind,
)
from tests.helpers import draws, greedy, one

EOS = 258
PAGE = 8


# -- streams and steps -----------------------------------------------------------------


def test_stream_equals_generate(llm):
    prompt, params = "stream of text", draws(seed=4, max_tokens=40, temperature=2.0)
    want = llm.generate(prompt, params)[0].outputs[0]
    deltas = list(llm.stream(prompt, params))
    assert len(deltas) > 10
    assert "".join(d.outputs[0].text for d in deltas) == want.text
    assert [t for d in deltas for t in d.outputs[0].token_ids] == want.token_ids
    assert [d.finished for d in deltas] == [False] * (len(deltas) - 1) + [True]
    assert deltas[-1].outputs[0].finish_reason == "length"
    assert len({d.request_id for d in deltas}) == 1


def test_stream_logprobs_come_once(llm):
    params = greedy(logprobs=1, prompt_logprobs=1)
    want = llm.generate("once", params)[0]
    deltas = list(llm.stream("once", params))
    assert [e for d in deltas for e in d.outputs[0].logprobs or []] == want.outputs[0].logprobs
    given = [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None]
    assert len(given) == 1
    assert given[0][0] is None
    assert all(entry is not None for entry in given[0][1:])


def test_streams_interleaved_with_generate(llm):
    prompts = ["first one", "the second", "and a third"]
    want = [one(llm, p, greedy(max_tokens=10 + i)).token_ids for i, p in enumerate(prompts)]
    a = llm.stream(prompts[0], greedy(max_tokens=10))
    b = llm.stream([prompts[1], prompts[2]], [greedy(max_tokens=11), greedy(max_tokens=12)])
    got: dict[str, list[int]] = {}

    def take(stream):
        output = next(stream, None)
        if output is not None:
            got.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
        return output is not None

    for _ in range(3):
        assert take(a)
        assert take(b)
    assert one(llm, "in between", greedy()).finish_reason == "length"
    assert one(llm, prompts[0], greedy(max_tokens=10)).token_ids == want[0]
    while take(a) | take(b):
        pass
    by_end = {
        request_id.split("-")[1:][-1] + request_id.split("-")[1]: t for request_id, t in got.items()
    }
    assert sorted(map(tuple, by_end.values())) == sorted(map(tuple, want))


def test_closing_a_stream_frees_its_pages(llm):
    stream = llm.stream(list(range(60)), greedy(max_tokens=200))
    other = llm.stream("goes on", greedy(max_tokens=20))
    for _ in range(3):
        next(stream)
    next(other)
    stream.close()
    assert llm.engine.scheduler.num_running == 1
    rest = [t for d in other for t in d.outputs[0].token_ids]
    assert len(rest) >= 18
    assert not llm.engine.has_work


def test_output_kinds(llm):
    want = one(llm, "kinds", greedy(max_tokens=6)).token_ids
    seen: dict[str, list[list[int]]] = {}
    for kind in RequestOutputKind:
        llm.add_request(kind.name, "kinds", greedy(max_tokens=6, output_kind=kind))
    while llm.has_unfinished_requests():
        for output in llm.step():
            seen.setdefault(output.request_id, []).append(output.outputs[0].token_ids)
    assert seen["FINAL_ONLY"] == [want]
    assert [t for part in seen["DELTA"] for t in part] == want
    assert len(seen["DELTA"]) == len(seen["CUMULATIVE"]) == 6
    assert seen["CUMULATIVE"] == [want[: i + 1] for i in range(6)]


def test_outputs_of_added_requests_wait_while_others_are_served(llm):
    llm.add_request("mine", "waits", greedy(output_kind=RequestOutputKind.FINAL_ONLY))
    assert one(llm, "another", greedy(max_tokens=20)).finish_reason == "length"
    found = []
    while llm.has_unfinished_requests():
        found += llm.step()
    assert [o.request_id for o in found] == ["mine"]
    assert found[0].outputs[0].token_ids == one(llm, "waits", greedy()).token_ids
    with pytest.raises(InvalidRequestError, match="non-empty string"):
        llm.add_request("", "x", greedy())
    llm.add_request("twice", "x", greedy())
    with pytest.raises(InvalidRequestError, match="'twice' is in use"):
        llm.add_request("twice", "x", greedy())
    while llm.has_unfinished_requests():
        llm.step()


# -- abort -----------------------------------------------------------------------------


def drain(llm: LLM) -> dict[str, object]:
    last = {}
    while llm.has_unfinished_requests():
        for output in llm.step():
            last[output.request_id] = output
    return last


@pytest.mark.parametrize("steps", range(7))
def test_abort_at_every_stage(llm, steps):
    """A prompt of three chunks: waiting, in each chunk, in flight, decoding, all beside another."""
    llm.add_request("good", "stays", greedy(max_tokens=12))
    llm.add_request("gone", list(range(150)), greedy(max_tokens=30))
    for _ in range(steps):
        llm.step()
    llm.abort("gone")
    llm.abort(["gone", "unknown"])
    last = drain(llm)
    assert last["gone"].finished
    assert last["gone"].outputs[0].finish_reason == "abort"
    assert last["good"].outputs[0].token_ids == one(llm, "stays", greedy(max_tokens=12)).token_ids


def test_abort_in_the_queue_and_after_the_end(llm):
    for i in range(12):  # four more than max_num_seqs
        llm.add_request(str(i), [i + 1] * 10, draws(n=1, seed=i, max_tokens=10))
    llm.step()
    llm.abort(["10", "11"])
    last = drain(llm)
    assert sorted(last, key=int) == [str(i) for i in range(12)]
    reasons = [last[str(i)].outputs[0].finish_reason for i in range(12)]
    assert reasons == ["length"] * 10 + ["abort"] * 2
    assert last["11"].outputs[0].token_ids == []
    llm.abort("3")
    assert not llm.has_unfinished_requests()


@pytest.mark.parametrize("steps", range(5))
def test_abort_of_samples(llm, steps):
    llm.add_request("n", list(range(70)), draws(n=3, seed=1, max_tokens=20))
    for _ in range(steps):
        llm.step()
    llm.abort("n")
    last = drain(llm)
    assert [o.finish_reason for o in last["n"].outputs] == ["abort"] * 3


# -- numbers ---------------------------------------------------------------------------


def test_request_metrics_are_ordered(llm):
    m = llm.generate("times", greedy())[0].metrics
    assert m is not None
    assert m.arrival_time <= m.first_scheduled_time <= m.first_token_time <= m.finished_time
    assert m.num_preemptions == 0


def test_engine_metrics(llm):
    before = llm.get_metrics()
    llm.generate(["one", "two"], greedy(max_tokens=5))
    after = llm.get_metrics()
    assert after["generation_tokens"] - before["generation_tokens"] == 10
    assert after["prompt_tokens"] - before["prompt_tokens"] == 6
    assert after["requests_finished_length"] - before["requests_finished_length"] == 2
    assert {"num_steps", "num_compiles", "num_compile_cache_hits", "num_preemptions", "num_running",
            "num_waiting", "num_evictions", "num_prefix_hits", "num_prefix_queries",
            "time_to_first_token_p50", "inter_token_latency_p99", "host_seconds_per_step",
            "num_compiles_after_warmup"} <= set(after)  # fmt: skip
    assert after["num_running"] == after["num_waiting"] == 0
    assert all(isinstance(v, (int, float)) and v >= 0 for v in after.values())
