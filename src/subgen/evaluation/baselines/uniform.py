"""A uniform sample of the middle, each pair standing for ``1 / rate`` of them: the baseline of every coreset."""

from __future__ import annotations

import math

import numpy as np

from .prefix import Prefix, Summary, check_budget, keep, with_ends

__all__ = ["uniform"]


def uniform(prefix: Prefix, budget: int, rng: np.random.Generator) -> Summary:
    """Sample the middle without replacement; log-weight ``log(1 / rate)``, so numerator and normaliser are unbiased.

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline.
    """
    n_kept = check_budget(prefix, budget)
    size = prefix.n - prefix.sinks - prefix.window
    chosen = np.sort(np.argsort(rng.random((prefix.streams, size)), axis=-1)[:, :n_kept], axis=-1)
    tokens = with_ends(prefix, prefix.sinks + chosen)
    log_weights = np.zeros(tokens.shape)
    if n_kept:
        log_weights[:, prefix.sinks : prefix.sinks + n_kept] = math.log(size / n_kept)
    return keep(prefix, tokens, log_weights)
