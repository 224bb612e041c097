"""Scores of answers, and how certain a mean of them is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .._checks import check_integer, check_real

__all__ = ["share_found", "wilson_interval"]

# Of a normal distribution, 95% are within so many standard deviations.
_WITHIN = 1.959964


def share_found(answer: str, references: Sequence[str]) -> float:
    """Compute the share of references that occur in an answer: RULER's score (arXiv 2404.06654).

    Parameters
    ----------
    answer : str
        Of a model.
    references : sequence of str
        At least one. Upper and lower case are equal.

    Returns
    -------
    float
        From 0 to 1.

    Raises
    ------
    ValueError
        If there is no reference.

    Examples
    --------
    >>> share_found("They are 17 and Blue.", ["17", "blue", "23"])
    0.6666666666666666
    """
    if not references:
        raise ValueError("there is no reference to look for in the answer: give at least one")
    return sum(x.lower() in answer.lower() for x in references) / len(references)


def wilson_interval(mean: float, n: int) -> tuple[float, float]:
    """Compute the interval that covers the true share in 95% of repetitions (Wilson 1927).

    Parameters
    ----------
    mean : float
        Of scores from 0 to 1. If some are between, the interval is wider than necessary.
    n : int
        Number of scores.

    Returns
    -------
    low, high : float

    Raises
    ------
    TypeError, ValueError
        If the mean is not a number from 0 to 1, or n is below 1.

    Examples
    --------
    >>> low, high = wilson_interval(0.0, 50)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.071)
    """
    mean, n = check_real("mean", mean, minimum=0.0, maximum=1.0), check_integer("n", n)
    square = _WITHIN**2 / n
    centre = (mean + square / 2) / (1 + square)
    half = math.sqrt(mean * (1 - mean) * square + square**2 / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)
