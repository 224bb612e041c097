"""WildCat: a coreset of keys by randomly pivoted Cholesky, and every other pair spread over it by Nystrom weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .prefix import Floats, Prefix, check_budget, with_ends

__all__ = ["SignedSummary", "nystrom"]

# The factor of the paper's code for tau^2, and what multiplied it here. Multiples of 1 / 1.5 / 2 / 3 / 4 gave
# .079 / .074 / .074 / .074 / .074 at 10% and .052 / .052 / .051 / .052 / .054 at 25%.
_RHO, _FLATTER = 3.94582, 2.0

# Of the kernel, whose diagonal is 1: 1e-9 to 1e-3 made no difference.
_RIDGE = 1e-6


@dataclass(frozen=True)
class SignedSummary:
    """Keys with summed values and masses, which may be negative: ``sum e^<q,k> u / sum e^<q,k> w``.

    Attributes
    ----------
    keys, sums : array, shape (streams, b, head_dim) and (streams, b, value_dim)
        In the dtype of the prefix.
    masses : float32 array, shape (streams, b)
    low, high : array, shape (streams, 1, value_dim)
        The range of the values; outputs are clamped to it.
    """

    keys: Floats
    sums: Floats
    masses: NDArray[np.float32]
    low: Floats
    high: Floats

    @property
    def nbytes(self) -> int:
        """Bytes of every array."""
        return sum(array.nbytes for array in (self.keys, self.sums, self.masses, self.low, self.high))

    def answer(self, rows: Floats) -> tuple[Floats, Floats]:
        """Answer as in `subgen.evaluation.baselines.prefix.Answers.answer`.

        Where the total mass is not positive, the prefix has no say.
        """
        logits = rows @ self.keys.astype(rows.dtype).swapaxes(1, 2)
        peak = logits.max(axis=-1, keepdims=True)
        weights = np.exp(logits - peak)
        mass = weights @ self.masses[..., None].astype(rows.dtype)
        positive = mass > np.finfo(np.float32).eps
        mass = np.where(positive, mass, 1.0)
        outputs = np.clip(weights @ self.sums.astype(rows.dtype) / mass, self.low, self.high)
        logsumexp = np.where(positive, np.log(mass) + peak, -np.inf)[..., 0]
        return np.where(positive, outputs, 0.0), logsumexp


def nystrom(prefix: Prefix, budget: int, rng: np.random.Generator) -> SignedSummary:
    """Weigh a coreset C of the keys X so that ``e^<q,X>`` is best approached by ``e^<q,C> W``.

    Keys are centred and divided by tau; with the Gaussian kernel K, ``W = (K_CC + ridge I)^-1 K_CX``, turned back to
    the exponential kernel by ``e^((|x|^2 - |c|^2) / 2)``. The pairs become ``(C, W V, W 1)``. Sinks and window are
    kept unchanged; a mass can be negative, and outputs are clamped to the range of the values, as in the paper's
    code. Departures, meant to make it stronger: pivots are drawn by the residual of the Gaussian kernel, not of
    the exponential one (.116 / .053 to .079 / .052, at the paper's tau), tau^2 is twice the paper's (see
    ``_FLATTER``), and its bins, which save time, are left out (not measured).

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline.

    References
    ----------
    Schroder, Mackey, "WildCat: Near-Linear Attention in Theory and Practice", arXiv 2602.10056 (2026), and its
    code, ``compress_kv``.
    """
    n_kept = check_budget(prefix, budget)
    chosen, sums, masses = [], [], []
    query_norms = np.linalg.norm(prefix.last_queries(prefix.n), axis=-1).max(axis=(1, 2)) / prefix.scale
    for stream in range(prefix.streams):
        keys = prefix.keys[stream].astype(np.float64)
        keys = (keys - keys.mean(axis=0))[prefix.middle] * math.sqrt(prefix.scale)
        values = prefix.values[stream, prefix.middle].astype(np.float64)
        if n_kept < len(keys):
            keys = keys / _temperature(keys / math.sqrt(prefix.scale), float(query_norms[stream]))
            pivots = _pivots(keys, n_kept, rng)
            weights = _weights(keys, pivots)
        else:
            pivots, weights = np.arange(len(keys)), np.eye(len(keys))
        chosen.append(pivots)
        sums.append(weights @ values)
        masses.append(weights.sum(axis=-1))
    middle = slice(prefix.sinks, prefix.sinks + n_kept)
    tokens = with_ends(prefix, prefix.sinks + np.stack(chosen))
    all_sums = np.take_along_axis(prefix.values, tokens[..., None], axis=1)
    # A 16-bit cache holds 16-bit sums: saturate, do not overflow.
    largest = np.finfo(all_sums.dtype).max
    all_sums[:, middle] = np.clip(np.stack(sums), -largest, largest)
    all_masses = np.ones(tokens.shape, dtype=np.float32)
    all_masses[:, middle] = np.stack(masses)
    return SignedSummary(
        keys=np.take_along_axis(prefix.keys, tokens[..., None], axis=1),
        sums=all_sums,
        masses=all_masses,
        low=prefix.values.min(axis=1, keepdims=True),
        high=prefix.values.max(axis=1, keepdims=True),
    )


def _temperature(keys: NDArray[np.float64], query_norm: float) -> float:
    """Return tau: it trades the rank that the kernel needs against what queries amplify, by the largest norms."""
    key_norm = float(np.linalg.norm(keys, axis=-1).max())
    return math.sqrt(_FLATTER * _RHO * key_norm / query_norm) if key_norm > 0 and query_norm > 0 else 1.0


def _gaussian(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """``exp(-|x - y|^2 / 2)``: ``(a, d)`` and ``(b, d)`` to ``(a, b)``."""
    squared = (x**2).sum(axis=-1)[:, None] + (y**2).sum(axis=-1)[None, :] - 2.0 * (x @ y.T)
    return np.asarray(np.exp(-0.5 * np.maximum(squared, 0.0)))


def _pivots(keys: NDArray[np.float64], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw ``count`` different tokens, each in proportion to what the ones before leave unexplained of its kernel.

    Chen, Epperly, Tropp, Webber, "Randomly pivoted Cholesky", arXiv 2207.06503 (2022).
    """
    n = len(keys)
    factor = np.zeros((count, n))
    residual = np.ones(n)
    free = np.ones(n, dtype=bool)
    pivots = np.zeros(count, dtype=np.int64)
    for i in range(count):
        # Repeated keys leave nothing to explain before the budget is spent: any free token will do.
        odds = residual if residual.sum() > n * np.finfo(np.float64).eps else free.astype(np.float64)
        pivot = pivots[i] = rng.choice(n, p=odds / odds.sum())
        row = _gaussian(keys[pivot : pivot + 1], keys)[0] - factor[:i, pivot] @ factor[:i]
        if row[pivot] > 0:
            factor[i] = row / math.sqrt(row[pivot])
        free[pivot] = False
        residual = np.where(free, np.maximum(residual - factor[i] ** 2, 0.0), 0.0)
    return np.sort(pivots)


def _weights(keys: NDArray[np.float64], pivots: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nystrom weights of the exponential kernel: ``(pivots, n)``."""
    kernel = _gaussian(keys[pivots], keys)
    weights = np.linalg.solve(kernel[:, pivots] + _RIDGE * np.eye(len(pivots)), kernel)
    half_norms = (keys**2).sum(axis=-1) / 2.0
    return np.asarray(weights * np.exp(half_norms[None, :] - half_norms[pivots, None]))
