"""Verification: which tokens a step with a draft emits. Pure, on the host.

The device gives a drafted token a row of its own, so one step draws the token after each prefix of
the draft, by the same sampler with the same parameters and noise as plain decoding: the draw at a
position depends on the prefix, the sequence's seed and the position alone. A drafted token is
accepted where it equals the draw. Then

* what is emitted is what plain decoding emits, token for token, for greedy and random rows alike;
* for a random row this is rejection sampling (Leviathan et al. 2023, arXiv:2211.17192): a draft x
  is accepted with probability p(x), and given that it is not, the draw has the distribution p
  without x, renormalised: the residual of a point mass. After a whole draft is accepted the draw
  behind it is the bonus token;
* a draft model draws with the noise of the same (seed, position), so that its token equals the
  target's with probability at least (1 - d) / (1 + d) for distributions at total variation d
  (Daliri, Musco, Suresh 2024, arXiv:2408.07978). Leviathan's acceptance of a draft with
  probabilities is 1 - d, but which token then comes would depend on the drafter, and with it on
  how many tokens were drafted, that is on the batch's other rows.
"""

from collections.abc import Sequence as Seq


def emitted(draft: Seq[int], drawn: Seq[int]) -> list[int]:
    """The tokens to emit: those drawn up to the first that differs from the draft.

    Args:
        draft: k drafted tokens.
        drawn: k + 1 tokens: drawn[i] after i drafted tokens. Negative where the row could draw
            none (NaN, everything banned): it differs from any draft and is the last.

    Returns:
        1 to k + 1 tokens.
    """
    for i, token in enumerate(draft):
        if drawn[i] != token:
            return list(drawn[: i + 1])
    return list(drawn[: len(draft) + 1])
