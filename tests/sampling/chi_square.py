"""Pearson's chi-square, failing at a p-value of 1e-5."""

import numpy as np


def critical(freedom: int, z: float = 4.265) -> float:
    """Chi-square that is exceeded with probability 1e-5 (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + z * np.sqrt(spread)) ** 3


def is_drawn_from(counts: np.ndarray, p: np.ndarray) -> bool:
    """Pearson's test; cells that expect fewer than 10 are one cell."""
    if np.any(counts[p == 0]):
        return False
    expected = p * np.sum(counts)
    rare = expected < 10
    expected = np.append(expected[~rare], np.sum(expected[rare]))
    observed = np.append(counts[~rare], np.sum(counts[rare]))
    if expected[-1] < 10:  # still too few for a cell of its own: into the last of the others
        expected = np.append(expected[:-2], np.sum(expected[-2:]))
        observed = np.append(observed[:-2], np.sum(observed[-2:]))
    if len(expected) == 1:
        return True
    statistic = np.sum((observed - expected) ** 2 / expected)
    return bool(statistic < critical(len(expected) - 1))
