"""Means, intervals and verdicts over seeds: pure functions of numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "not decided"


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval.

    Args:
        mean: The mean.
        low: Lower end; minus infinity if n < 2.
        high: Upper end; infinity if n < 2.
        n: Number of values.
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width, the ± in tables."""
        return self.high - self.mean


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean with its t interval.

    Args:
        values: At least one number.
        level: Confidence level, 0 to 1; it is exact for independent, normally distributed values.

    Raises:
        ValueError: There is no value.

    Source: Student's t with n - 1 degrees of freedom.
    """
    if not values:
        raise ValueError("no values")
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    from scipy.stats import t  # half a second to import

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95
) -> Interval | None:
    """Return the mean of first - second over the seeds that both have, or None if they share none.

    Pairing removes effects of the seed that both arms share: the order of the data, and the augmentation.
    """
    seeds = sorted(first.keys() & second.keys())
    return mean_interval([first[s] - second[s] for s in seeds], level) if seeds else None


def verdict(difference: Interval | None, relation: str, matters: float) -> str:
    """Return the verdict on a claim, from the interval of its difference.

    Args:
        difference: first - second, or None if nothing is paired.
        relation: "better": first - second >= matters. "at-least": first - second > -matters.
            "same": |first - second| < matters.
        matters: Smallest difference that matters, at least 0.

    Returns:
        "supported" if the whole interval agrees with the claim, "contradicted" if the whole interval disagrees,
        "not decided" if it holds values of both kinds.

    Raises:
        ValueError: The relation is not known.
    """
    if difference is None:
        return UNDECIDED
    low, high = difference.low, difference.high
    bounds = {"better": (matters, math.inf), "at-least": (-matters, math.inf), "same": (-matters, matters)}
    if relation not in bounds:
        raise ValueError(f"unknown relation {relation!r}")
    least, most = bounds[relation]
    if low >= least and high <= most:
        return SUPPORTED
    return CONTRADICTED if high < least or low > most else UNDECIDED


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of the share correct / n, 0 to 1; its default level is 95%."""
    share, spread = correct / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
