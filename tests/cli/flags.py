"""Flags of the commands under test."""

OPTIONS = (
    "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--page-size", "8",
    "--num-pages", "128", "--compilation-cache-dir", "None",
)  # fmt: skip
"""Of an engine that is small and leaves nothing behind."""
EIGHT = ("--max-tokens", "8")
