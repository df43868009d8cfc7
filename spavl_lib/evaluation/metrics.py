"""Rates with their counts and intervals, and the calibration of scores."""

import math


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927), 95 % by default.

    Raises:
        ValueError: `k` is not within 0..n, or n is 0.
    """
    if not 0 <= k <= n or n == 0:
        raise ValueError(f"need 0 <= k <= n and n > 0, got k={k}, n={n}")
    p, z2 = k / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(k: int, n: int) -> dict | None:
    """`{"k", "n", "value", "ci_low", "ci_high"}`; None, never 0, when there is nothing to count."""
    if n == 0:
        return None
    low, high = wilson(k, n)
    return {"k": k, "n": n, "value": k / n, "ci_low": round(low, 6), "ci_high": round(high, 6)}
