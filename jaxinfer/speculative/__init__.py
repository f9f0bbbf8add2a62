"""Speculative decoding, the host's part: who drafts tokens (proposers), how many, and what is kept.

    lengths   speculator.py   how many tokens to draft for each row: by its acceptance so far and
                              by what steps of each size were measured to take
    propose   ngram.py, draft_model.py   the drafted tokens
    verify    verify.py       which of the tokens that the step drew are emitted

A new kind of drafter is a file with a `Proposer`; nothing else changes. No jax here.
"""
