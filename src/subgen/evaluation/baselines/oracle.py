"""The oracle: each future query picks its own best pairs from the full cache. A bound, not a method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...softmax import weighted_attention
from .prefix import Floats, Prefix, check_budget

__all__ = ["Oracle", "oracle"]


@dataclass(frozen=True)
class Oracle:
    """The full cache, of which each query reads ``budget`` pairs.

    Attributes
    ----------
    keys, values : array, shape (streams, n, head_dim) and (streams, n, value_dim)
    budget : int
    """

    keys: Floats
    values: Floats
    budget: int

    @property
    def nbytes(self) -> int:
        """Bytes of the full cache: what it holds, not what it reads."""
        return self.keys.nbytes + self.values.nbytes

    def answer(self, rows: Floats) -> tuple[Floats, Floats]:
        """Answer as in `subgen.evaluation.baselines.prefix.Answers.answer`."""
        logits = rows @ self.keys.astype(rows.dtype).swapaxes(1, 2)
        best = np.argpartition(-logits, self.budget - 1, axis=-1)[..., : self.budget]
        log_weights = np.full_like(logits, -np.inf)
        np.put_along_axis(log_weights, best, 0.0, axis=-1)
        outputs, logsumexp = weighted_attention(rows, self.keys, self.values, log_weights)
        return outputs, logsumexp


def oracle(prefix: Prefix, budget: int, rng: np.random.Generator) -> Oracle:
    """Keep everything; each query attends to its ``budget`` pairs of largest logits, alone.

    No eviction can keep more attention mass for every query at once. Neither sinks nor window are forced on it,
    which makes it a stronger bound (.063 / .033; with them .075 / .035).

    Parameters
    ----------
    prefix, budget, rng
        As in every baseline; ``rng`` is not used.
    """
    check_budget(prefix, budget)
    return Oracle(prefix.keys, prefix.values, budget)
