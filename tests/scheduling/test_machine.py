"""Random lives of a scheduler against the echo device: the right tokens, once, and no page lost."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from jaxinfer.errors import CapacityError
from jaxinfer.request import Status
from tests.scheduling.harness import Harness

# Three symbols and short prompts, so that prefixes meet often.
PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=12)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(3, 24),
        page_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        spare_budget=st.integers(0, 12),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.sampled_from([True, True, True, False]),
        max_wait_steps=st.sampled_from([1, 3, 1000]),
    )
    def start(
        self, num_pages, page_size, max_num_seqs, spare_budget, policy, caching, max_wait_steps
    ):
        self.h = Harness(
            num_pages=num_pages,
            page_size=page_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=24,
            policy=policy,
            enable_prefix_caching=caching,
            max_wait_steps=max_wait_steps,
            max_preemptions=2,
        )

    @rule(
        prompt=PROMPTS,
        repeat=st.none() | st.integers(0, 5),
        max_tokens=st.integers(1, 8),
        n=st.sampled_from([1, 1, 2, 3]),
        salt=st.sampled_from(["", "", "a"]),
        priority=st.integers(0, 2),
        stops=st.sampled_from([((), ()), ((), ()), ((3,), ()), ((), (1,)), ((2,), (2,))]),
        min_tokens=st.sampled_from([0, 0, 2]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        bad_words=st.sampled_from([(), (), ((4,),), ((4, 3),)]),
        cache_only=st.sampled_from([False, False, False, True]),
    )
    def add(self, prompt, repeat, n, salt, stops, min_tokens, bad_words, **fields):
        h = self.h
        if repeat is not None and repeat < len(h.requests):  # the next turn of a conversation
            told = h.requests[repeat]
            prompt = (told.sequences[0].tokens + prompt)[:20]
            salt = told.cache_salt
        try:
            h.add(
                prompt,
                n=n,
                cache_salt=salt,
                eos=stops[0],
                stop_token_ids=list(stops[1]),
                min_tokens=min(min_tokens, fields["max_tokens"]),
                bad_token_ids=bad_words,
                **fields,
            )
        except CapacityError as error:
            assert error.need is not None and error.have is not None and error.need > error.have

    @rule()
    def plan(self):
        if len(self.h.pending) < 2 and self.h.plan() is None and self.h.pending:
            self.h.commit()

    @rule()
    def step(self):
        self.h.step()

    @rule(count=st.integers(2, 8))
    def steps_with_overlap(self, count):
        for _ in range(count):
            planned = len(self.h.pending) < 2 and self.h.plan()
            if self.h.pending and (not planned or len(self.h.pending) == 2):
                self.h.commit()

    @precondition(lambda self: self.h.pending)
    @rule()
    def commit(self):
        self.h.commit()

    @precondition(lambda self: self.h.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.h.requests))
        assert self.h.scheduler.abort(request.request_id) == any(
            sequence not in self.h.ended for sequence in request.sequences
        )
        assert not self.h.scheduler.abort("no such request")
        self.h.check()

    @precondition(lambda self: self.h.scheduler.num_running)
    @rule(data=st.data())
    def stop_string(self, data):
        running = [
            sequence
            for request in self.h.requests
            for sequence in request.sequences
            if sequence.status is Status.RUNNING
        ]
        self.h.scheduler.finish(data.draw(st.sampled_from(running)), "stop string", "text")
        self.h.check()

    @precondition(lambda self: self.h.requests)
    @rule(data=st.data(), position=st.integers(0, 15))
    def make_nan(self, data, position):
        request = data.draw(st.sampled_from(self.h.requests))
        self.h.device.poisoned.add((request.request_id, position))

    @precondition(lambda self: self.h.requests)
    @rule(data=st.data())
    def ban_all_tokens(self, data):
        self.h.banned.add(data.draw(st.sampled_from(self.h.requests)).request_id)

    @rule()
    def reset_cache(self):
        self.h.scheduler.reset_prefix_cache()
        self.h.check()

    @precondition(lambda self: self.h.requests)
    @rule(data=st.data(), ttl=st.sampled_from([None, 1.0, 5.0]), pin=st.booleans())
    def pin(self, data, ttl, pin):
        request = data.draw(st.sampled_from(self.h.requests))
        tokens = request.sequences[0].tokens
        num_marked = self.h.scheduler.pin(tokens, request.cache_salt, ttl, pin)
        assert num_marked <= len(tokens) and num_marked % self.h.pool.page_size == 0
        self.h.check()

    @precondition(lambda self: self.h.requests)
    @rule(data=st.data())
    def unpin(self, data):
        request = data.draw(st.sampled_from(self.h.requests))
        self.h.scheduler.unpin(request.prompt_token_ids, request.cache_salt)
        self.h.check()

    @rule(seconds=st.sampled_from([0.5, 2.0, 10.0]))
    def wait(self, seconds):
        self.h.now += seconds

    @invariant()
    def nothing_is_broken(self):
        if hasattr(self, "h"):
            self.h.check()

    def teardown(self):
        if hasattr(self, "h"):
            self.h.drain(overlap=len(self.h.requests) % 2 == 0)
            self.h.check_drained()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
