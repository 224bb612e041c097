"""Attention Matching: some of the keys, with masses and values that fit attention of reference queries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .prefix import Floats, Prefix, Summary, check_budget, keep, with_ends

__all__ = ["attention_matching"]

# Queries that masses and values are fitted on: the last tokens of the prefix, at most so many in all heads of a stream.
_REFERENCES = 4096
# Added to the diagonal of a least-squares problem, as a share of its mean.
_RIDGE = 1e-4
# Sweeps over the masses.
_SWEEPS = 50
# Rounds of the pursuit.
_STEPS = 16
# Bounds of a mass: a token stands for at most the whole prefix, and is not dropped.
_LEAST_MASS = 1e-3


def attention_matching(prefix: Prefix, budget: int, rng: np.random.Generator) -> Summary:
    """Keep keys that represent the attention of reference queries, and fit a mass and a value of each to them.

    Keys: orthogonal matching pursuit, a sixteenth of them at a time: those whose attention fits best to the mass that
    is still missing. Masses: non-negative least squares, so that the sum of the weights of the kept keys is that of all
    middle keys. Values: least squares, so that the output of the middle is that of exact attention. The reference
    queries are those of the prefix. The paper also generates some, by letting the model repeat the context or ask
    itself questions, which a capture does not have. Its faster choice, the keys of the largest root mean square of
    attention, gave .147 / .084
    (this one .105 / .082).

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline; nothing is drawn.

    References
    ----------
    Zweiger, Fu, Guo, Kim, "Fast KV Compaction via Attention Matching", arXiv 2602.16284 (2026).
    """
    n_kept, group = check_budget(prefix, budget), prefix.queries.shape[0] // prefix.streams
    rows = prefix.last_queries(min(prefix.n, max(1, _REFERENCES // group)))
    chosen, masses, values = [], [], []
    for stream in range(prefix.streams):
        keys, own_values = (x[stream, prefix.middle].astype(np.float64) for x in (prefix.keys, prefix.values))
        if n_kept < len(keys):
            logits = rows[stream].reshape(-1, keys.shape[1]).astype(np.float64) @ keys.T
            tokens, mass, fitted = _matched(logits, own_values, n_kept)
        else:
            tokens, mass, fitted = np.arange(n_kept), np.ones(n_kept), own_values
        chosen.append(tokens)
        masses.append(mass)
        values.append(fitted)
    middle = slice(prefix.sinks, prefix.sinks + n_kept)
    tokens = with_ends(prefix, prefix.sinks + np.stack(chosen))
    log_weights = np.zeros(tokens.shape)
    log_weights[:, middle] = np.log(np.stack(masses))
    kept = keep(prefix, tokens, log_weights)
    # A 16-bit cache holds 16-bit values: saturate, do not overflow.
    largest = np.finfo(kept.values.dtype).max
    kept.values[:, middle] = np.clip(np.stack(values), -largest, largest)
    return kept


def _matched(logits: Floats, values: Floats, count: int) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Choose tokens of a stream by its logits, shape (queries, n); return them, their masses and their values."""
    attention = np.exp(logits - logits.max(axis=1, keepdims=True))
    attention /= attention.sum(axis=1, keepdims=True)
    tokens, mass = _pursuit(attention, count)
    fitted = attention[:, tokens] * mass
    gram = fitted.T @ fitted
    gram[np.diag_indices(count)] += _ridge(np.diag(gram))
    # From the values that the tokens have: what no query attends to keeps its own.
    own = values[tokens]
    return tokens, mass, own + np.linalg.solve(gram, fitted.T @ (attention @ values - fitted @ own))


def _pursuit(attention: Floats, count: int) -> tuple[NDArray[np.int64], Floats]:
    """Choose columns whose non-negative combination is closest to one in every row; return them in order."""
    norms = np.sqrt((attention**2).sum(axis=0)) + np.finfo(float).tiny
    whole = np.ones(len(attention))
    chosen, missing, mass = np.zeros(0, dtype=np.int64), whole, np.zeros(0)
    while len(chosen) < count:
        fits = attention.T @ missing / norms
        fits[chosen] = -np.inf
        more = np.argsort(-fits, kind="stable")[: min(-(-count // _STEPS), count - len(chosen))]
        chosen = np.sort(np.concatenate([chosen, more]))
        mass = _non_negative(attention[:, chosen], whole)
        missing = whole - attention[:, chosen] @ mass
    return chosen, np.clip(mass, _LEAST_MASS, attention.shape[1])


def _non_negative(matrix: Floats, target: Floats) -> Floats:
    """Solve non-negative least squares by coordinate descent, from ones."""
    gram, right = matrix.T @ matrix, matrix.T @ target
    diagonal = np.diag(gram) + _ridge(np.diag(gram))
    x = np.ones(len(right))
    gradient = right - gram @ x
    for _ in range(_SWEEPS):
        for j in range(len(x)):
            step = max(gradient[j] / diagonal[j], -x[j])
            if step:
                x[j] += step
                gradient -= gram[:, j] * step
    return x


def _ridge(diagonal: Floats) -> float:
    return _RIDGE * max(float(diagonal.mean()) if diagonal.size else 0.0, np.finfo(float).tiny)
