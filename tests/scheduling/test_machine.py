"""Random lives of a scheduler against the echo device: the right tokens, once, and no page lost."""

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from jaxinfer.errors import CapacityError
from tests.scheduling.harness import Harness

# Three symbols and short prompts, so that prefixes meet often.


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, 2), min_size=1, max_size=12),
        "max_tokens": st.integers(1, 8),
        "n": st.sampled_from([1, 1, 2, 3]),
        "cache_salt": st.sampled_from(["", "", "a"]),
        "priority": st.integers(0, 2),
        "eos": st.sampled_from([(), (), (3,)]),
        "stop_token_ids": st.sampled_from([[], [], [1], [3]]),
        "min_tokens": st.sampled_from([0, 0, 2]),
        "prompt_logprobs": st.sampled_from([None, None, 0]),
        "bad_token_ids": st.sampled_from([(), (), ((4,),), ((4, 3),)]),
        "cache_only": st.sampled_from([False, False, False, True]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_pages=st.integers(3, 20),
        page_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        spare_budget=st.integers(0, 12),
        policy=st.sampled_from(["fcfs", "priority"]),
        caching=st.sampled_from([True, True, True, False]),
        max_wait_steps=st.sampled_from([1, 3, 1000]),
        drafts=st.none() | st.integers(0, 2**32),
    )
    def start(self, num_pages, page_size, max_num_seqs, spare_budget, caching, drafts, **config):
        self.h = Harness(
            num_pages=num_pages,
            page_size=page_size,
            drafts=None if drafts is None else random.Random(drafts),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            max_model_len=24,
            enable_prefix_caching=caching,
            max_preemptions=2,
            **config,
        )

    def pick(self, number):
        """A request of those added, late ones more often."""
        return self.h.requests[-1 - number % len(self.h.requests)]

    def add(self, fields):
        fields["min_tokens"] = min(fields["min_tokens"], fields["max_tokens"])
        try:
            self.h.add(**fields)
        except CapacityError as error:
            assert error.need is not None and error.have is not None and error.need > error.have

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add_some(self, requests):
        for fields in requests:
            self.add(fields)

    @precondition(lambda self: self.h.requests)
    @rule(number=st.integers(0, 5), fields=REQUESTS)
    def next_turn(self, number, fields):
        told = self.pick(number)
        prompt = (told.sequences[-1].tokens + fields["prompt"])[:20]
        self.add({**fields, "prompt": prompt, "cache_salt": told.cache_salt})

    @rule()
    def plan(self):
        if len(self.h.pending) < 2 and self.h.plan() is None and self.h.pending:
            self.h.commit()

    @rule()
    def step(self):
        self.h.step()

    @rule(count=st.integers(2, 12))
    def steps_with_overlap(self, count):
        for _ in range(count):
            self.h.advance()

    @precondition(lambda self: self.h.pending)
    @rule()
    def commit(self):
        self.h.commit()

    @precondition(lambda self: self.h.requests)
    @rule(number=st.integers(0, 5), kind=st.integers(0, 3), position=st.integers(0, 15))
    def disturb(self, number, kind, position):
        request = self.pick(number)
        if kind == 0:
            is_live = any(sequence not in self.h.ended for sequence in request.sequences)
            assert self.h.scheduler.abort(request.request_id) == is_live
            assert not self.h.scheduler.abort("no such request")
        elif kind == 1:
            self.h.device.poisoned.add((request.request_id, position))
        elif kind == 2:
            self.h.banned.add(request.request_id)
        else:
            sequence = request.sequences[position % len(request.sequences)]
            if not sequence.is_finished:
                self.h.scheduler.finish(sequence, "stop string", "text")
        self.h.check()

    @precondition(lambda self: self.h.requests)
    @rule(
        number=st.integers(0, 5),
        kind=st.integers(0, 3),
        ttl=st.sampled_from([None, 1.0, 5.0]),
        pin=st.booleans(),
    )
    def use_cache(self, number, kind, ttl, pin):
        request = self.pick(number)
        scheduler, tokens, salt = self.h.scheduler, request.sequences[0].tokens, request.cache_salt
        if kind == 0:
            scheduler.reset_prefix_cache()
        elif kind == 1:
            num_marked = scheduler.pin(tokens, salt, ttl, pin)
            assert num_marked <= len(tokens) and num_marked % self.h.pool.page_size == 0
        elif kind == 2:
            assert scheduler.unpin(request.prompt_token_ids, salt) <= len(tokens)
        else:
            self.h.now += ttl or 0.5
        self.h.check()

    def teardown(self):
        if hasattr(self, "h"):
            self.h.drain(overlap=len(self.h.requests) % 2 == 0)
            self.h.check_drained()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(
    max_examples=200,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
