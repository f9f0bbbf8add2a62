"""The padded shapes that a step may have: few, and known before the engine starts."""

from dataclasses import dataclass

from jaxinfer.request import StepPlan


@dataclass(frozen=True, slots=True)
class Bucket:
    """The padded shape of a step: T tokens, S rows; `decode_only` when T == S, one token a row."""

    num_tokens: int
    num_rows: int

    @property
    def decode_only(self) -> bool:
        return self.num_tokens == self.num_rows

    def __str__(self) -> str:
        if self.decode_only:
            return f"decode {self.num_rows}"
        return f"mixed {self.num_tokens}x{self.num_rows}"


@dataclass(frozen=True, slots=True)
class Buckets:
    """Every shape a step may have, smallest first; all are known before the engine starts."""

    decode: tuple[Bucket, ...]
    mixed: tuple[Bucket, ...]

    @classmethod
    def make(cls, max_num_seqs: int, max_num_batched_tokens: int) -> "Buckets":
        """Decode rows 1, 8, then doubling; token chunks 32, times four up to 512, then doubling;
        few or all rows."""
        rows = [1, *_geometric(8, max_num_seqs, 2)]
        rows = sorted({min(r, max_num_seqs) for r in rows})
        few = min(8, max_num_seqs)
        mixed = set()
        small = [t for t in (32, 128, 512) if t < max_num_batched_tokens]
        for tokens in [*small, *_geometric(1024, max_num_batched_tokens, 2)]:
            # A mixed bucket must not look like a decode one, hence one row fewer than tokens at
            # most.
            for limit in (few, max_num_seqs):
                if limit < tokens:
                    mixed.add(Bucket(tokens, limit))
        top = max(max_num_batched_tokens, max_num_seqs + 1)
        mixed.add(Bucket(top, max_num_seqs))
        ordered = sorted(mixed, key=lambda b: (b.num_tokens, b.num_rows))
        return cls(tuple(Bucket(r, r) for r in rows), tuple(ordered))

    @property
    def all(self) -> tuple[Bucket, ...]:
        return self.decode + self.mixed

    def decode_bucket(self, num_rows: int) -> Bucket:
        """The smallest decode bucket of at least `num_rows` rows."""
        return next(bucket for bucket in self.decode if num_rows <= bucket.num_rows)

    def choose(self, plan: StepPlan) -> Bucket:
        """The cheapest bucket that holds the plan."""
        num_rows, num_tokens = len(plan.rows), plan.num_tokens
        if all(row.num_new == 1 and not row.has_targets for row in plan.rows):
            return self.decode_bucket(num_rows)
        return self.mixed_bucket(num_tokens, num_rows)

    def mixed_bucket(self, num_tokens: int, num_rows: int) -> Bucket:
        """The smallest mixed bucket of at least so many tokens and rows."""
        for bucket in self.mixed:
            if num_tokens <= bucket.num_tokens and num_rows <= bucket.num_rows:
                return bucket
        raise AssertionError(f"no bucket holds {num_tokens} tokens in {num_rows} rows")


def _geometric(start: int, stop: int, factor: int) -> list[int]:
    """start, start*factor, ... and stop itself as the last."""
    values = []
    value = start
    while value < stop:
        values.append(value)
        value *= factor
    return [*values, stop]
