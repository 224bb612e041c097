"""Algorithm 1 of SubGen (arXiv 2402.06082), exactly.

Data flow of one block of tokens, all streams at once::

    keys ---> assign_leaders ---> assignment --> counts n_i --------------------.
      |            (clustering)        '-------> uniform_rounds --> samples S_i --+--> tau --.
      |                                             (sampling)                               +--> z / tau
    values -> squared norms -> running weight mu --> weighted_rounds --> slots M ----> z ---'

The answer to a query q is ``z / tau`` with

- ``z = sum over M of mu / (s ||v||^2) e^<q,k> v``,
- ``tau = sum over i of n_i / t * sum over S_i of e^<q,k>``,

both of them one weighted attention, so that large logits do no harm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from .._array import (
    Array,
    array_namespace,
    chunks,
    clip,
    compute_dtype,
    pieces,
    positions,
    saturating_cast,
    transient_limit,
)
from .._checks import MAX_PLACES, check_integer, check_real, check_scale, check_seed
from .._random import stream_key
from .._tree import concat
from ..leaders import append_leaders, assign_leaders, padded_capacity
from ..reservoirs import group_tokens, latest, uniform_rounds, weighted_rounds
from ..reservoirs import replace as replace_slots
from ..softmax import merge_attention, scaled, weighted_attention
from .state import Clusters, PaperState, ValueReservoir

__all__ = ["CLUSTER_DRAWS", "VALUE_DRAWS", "Algorithm1", "flat", "with_capacity"]

# The streams of random numbers; 3 to 7 belong to `subgen.default`.
CLUSTER_DRAWS, VALUE_DRAWS = 1, 2

# Most tokens of a block.
_BLOCK = 512
# Numbers of values beyond this are sampled as if they were this: the sum of squares over any stream stays finite, and
# the estimator without bias, as it divides by the same.
_LARGEST = 1e140


@dataclass(frozen=True)
class Algorithm1:
    """The algorithm and its parameters; all of its functions are pure.

    Parameters
    ----------
    delta : float
        Radius of a cluster, in the units of the keys.
    t : int
        Samples per cluster.
    s : int
        Samples of the values.
    scale : float or None
        Softmax scale; ``None`` means ``head_dim ** -0.5``, the paper's is 1.
    seed : int
        In ``[0, 2**64)``.
    """

    delta: float
    t: int
    s: int
    scale: float | None
    seed: int

    @classmethod
    def from_arguments(
        cls, *, delta: Any, samples_per_cluster: Any, value_samples: Any, scale: Any = 1.0, seed: Any = 0
    ) -> Algorithm1:
        """Check the arguments of `subgen.AttentionSketch.paper` and make the parameters.

        Raises
        ------
        TypeError, ValueError
            If an argument is not a number within its bounds.
        """
        return cls(
            delta=check_real("delta", delta, minimum=0.0),
            t=check_integer("samples_per_cluster", samples_per_cluster, maximum=MAX_PLACES),
            s=check_integer("value_samples", value_samples, maximum=MAX_PLACES),
            scale=None if scale is None else check_scale(scale, 1),
            seed=check_seed(seed),
        )

    def to_arguments(self) -> dict[str, Any]:
        """Return the arguments that make these parameters."""
        return {
            "delta": self.delta,
            "samples_per_cluster": self.t,
            "value_samples": self.s,
            "scale": self.scale,
            "seed": self.seed,
        }

    def init(self, keys: Array, values: Array) -> PaperState:
        """Return the empty state for streams like ``(streams, n, head_dim)`` and ``(streams, n, value_dim)``."""
        xp = array_namespace(keys)
        streams, device = keys.shape[0], keys.device
        d, e, capacity = keys.shape[-1], values.shape[-1], padded_capacity(0)

        def zeros(*shape: int, dtype: object = keys.dtype) -> Array:
            return xp.zeros((streams, *shape), dtype=dtype, device=device)

        clusters = Clusters(
            centres=zeros(capacity, d),
            counts=zeros(capacity, dtype=xp.int64),
            samples=zeros(capacity, self.t, d),
            due=zeros(capacity, self.t, dtype=xp.int64) + 1,
        )
        # Due at any positive weight: the first value that is not zero fills every slot, with probability 1.
        smallest = float(xp.finfo(xp.float64).smallest_normal)
        reservoir = ValueReservoir(
            keys=zeros(self.s, d),
            values=zeros(self.s, e),
            due=zeros(self.s, dtype=xp.float64) + smallest,
            weight=zeros(dtype=xp.float64),
        )
        return PaperState(clusters, reservoir, 0)

    def n_clusters(self, state: PaperState) -> Array:
        """Count the live clusters: int64, shape (streams,)."""
        xp = array_namespace(state.clusters.counts)
        return xp.sum(xp.astype(state.clusters.counts > 0, xp.int64), axis=-1)

    def update(self, state: PaperState, keys: Array, values: Array, queries: Array | None, heads: Array) -> PaperState:
        """Absorb tokens; see `subgen.default.algorithm.ClusterMeans.update`. The queries are unused."""
        for part in chunks(keys.shape[1], self._block(state, 1)):
            state, _ = self._advance(state, keys[:, part, :], values[:, part, :], heads, None)
        return state

    prefill = update

    def step(
        self, state: PaperState, queries: Array, keys: Array, values: Array, heads: Array
    ) -> tuple[PaperState, Array]:
        """Absorb tokens and answer each of them; see `subgen.default.algorithm.ClusterMeans.step`."""
        xp = array_namespace(keys)
        scale = check_scale(self.scale, queries.shape[-1])
        outputs, start, n = [], 0, keys.shape[1]
        while start < n:
            part = slice(start, min(n, start + self._block(state, queries.shape[1])))
            rows = scaled(queries[:, :, part, :], scale)
            state, output = self._advance(state, keys[:, part, :], values[:, part, :], heads, rows)
            outputs.append(saturating_cast(output, queries))
            start = part.stop
        return state, xp.concat(outputs, axis=2)

    def attend(self, state: PaperState, rows: Array) -> tuple[Array, Array]:
        """Answer scaled queries of shape (streams, m, head_dim); the logsumexp is that of tau."""
        xp = array_namespace(rows)
        clusters, reservoir = state.clusters, state.reservoir
        log_counts = _log(xp.astype(clusters.counts, rows.dtype)) - math.log(self.t)
        log_counts = xp.repeat(log_counts, self.t, axis=-1)[:, None, :]
        log_rates = (_log(reservoir.weight)[:, None] - self._log_norms(reservoir.values))[:, None, :]
        log_rates = xp.astype(log_rates, rows.dtype)
        samples = flat(clusters.samples)
        outputs = []
        for part in pieces(rows.shape[1], rows.shape[0] * (samples.shape[1] + self.s), rows):
            denominator = weighted_attention(rows[:, part, :], samples, samples[..., :1], log_counts)[1]
            numerator = weighted_attention(rows[:, part, :], reservoir.keys, reservoir.values, log_rates)
            outputs.append((_ratio(numerator, denominator), denominator))
        return concat(outputs, axis=1)

    def _block(self, state: PaperState, group: int) -> int:
        """Tokens to take at once, so that temporaries stay small; the answer does not depend on it."""
        streams, capacity = map(int, state.clusters.counts.shape)
        limit = transient_limit(state.clusters.counts)
        return max(1, min(_BLOCK, limit // (streams * group * (capacity * self.t + self.s + _BLOCK))))

    def _log_norms(self, values: Array) -> Array:
        """Return ``log(s ||v||^2)``; ``inf`` for a zero vector, which then weighs nothing."""
        xp = array_namespace(values)
        squared = _squared_norms(values)
        return xp.where(squared > 0, _log(squared) + math.log(self.s), xp.full_like(squared, math.inf))

    def _advance(
        self,
        state: PaperState,
        keys: Array,
        values: Array,
        heads: Array,
        rows: Array | None,
    ) -> tuple[PaperState, Array | None]:
        xp = array_namespace(keys)
        streams, n = keys.shape[:2]

        # UpdateSoftmaxNormalizer
        before = self.n_clusters(state)
        assignment, opened = assign_leaders(keys, state.clusters.centres, before, self.delta)
        most = int(xp.max(before + xp.sum(xp.astype(opened, xp.int64), axis=-1)))
        old = with_capacity(state.clusters, padded_capacity(most))
        order, start, added = group_tokens(assignment, old.counts.shape[1])
        key0, key1 = stream_key(self.seed, CLUSTER_DRAWS, heads)
        due, rounds = uniform_rounds(
            old.due,
            old.counts,
            order,
            start,
            added,
            (key0[:, None, None], key1[:, None, None]),
        )
        key_rounds = [xp.reshape(tokens, (streams, -1)) for tokens in rounds]
        samples = old.samples
        if key_rounds:
            samples = xp.reshape(replace_slots(flat(samples), keys, latest(key_rounds, n)), samples.shape)
        centres = append_leaders(old.centres, before, keys, opened)
        clusters = Clusters(centres, old.counts + added, samples, due)

        # UpdateMatrixProduct. The sum runs on from the last weight, so a stream cut elsewhere adds alike.
        reservoir = state.reservoir
        totals = xp.concat([reservoir.weight[:, None], _squared_norms(values)], axis=1)
        totals = xp.cumulative_sum(totals, axis=1)[:, 1:]
        key0, key1 = stream_key(self.seed, VALUE_DRAWS, heads)
        due, value_rounds = weighted_rounds(reservoir.due, totals, state.n_seen, (key0[:, None], key1[:, None]))
        filled = replace(reservoir, due=due, weight=totals[:, -1])
        if value_rounds:
            last = latest(value_rounds, n)
            filled = replace(
                filled,
                keys=replace_slots(reservoir.keys, keys, last),
                values=replace_slots(reservoir.values, values, last),
            )
        after = PaperState(clusters, filled, state.n_seen + n)
        if rows is None:
            return after, None

        # Answers at each token: every content of a slot counts for the tokens at which the slot held it.
        streams, group, _, head_dim = rows.shape
        capacity = old.counts.shape[1]

        def answer(part: slice) -> Array:
            some = xp.reshape(rows[:, :, part, :], (streams, -1, head_dim))
            member = assignment[:, : part.stop, None] == positions(capacity, keys)[None, None, :]
            counts = xp.cumulative_sum(xp.astype(member, xp.int64), axis=1)[:, part.start :, :]
            log_counts = _log(xp.astype(old.counts[:, None, :] + counts, some.dtype)) - math.log(self.t)
            log_counts = xp.repeat(log_counts, self.t, axis=-1)
            log_totals = _log(totals[:, part])[:, :, None]

            def partial(content: Array, value: Array, log_weights: Array, held: Array) -> tuple[Array, Array]:
                log_weights = xp.astype(log_weights, some.dtype, copy=False)
                bias = xp.where(held, log_weights, xp.full_like(log_weights, -math.inf))
                return weighted_attention(some, content, value, xp.tile(bias, (1, group, 1)))

            denominator = None
            for content, held in _contents([flat(old.samples)], [keys], key_rounds, n, part):
                piece = partial(content[0], content[0][..., :1], log_counts, held)
                denominator = piece if denominator is None else merge_attention(denominator, piece)
            numerator = None
            for content, held in _contents([reservoir.keys, reservoir.values], [keys, values], value_rounds, n, part):
                log_rates = log_totals - self._log_norms(content[1])[:, None, :]
                piece = partial(content[0], content[1], log_rates, held)
                numerator = piece if numerator is None else merge_attention(numerator, piece)
            output = _ratio(numerator, denominator[1])  # type: ignore[arg-type,index]
            return xp.reshape(output, (streams, group, -1, output.shape[-1]))

        # More clusters may have opened than the capacity when the block was cut.
        outputs = [answer(part) for part in pieces(n, streams * group * max(capacity * self.t, self.s), keys)]
        return after, concat(outputs, axis=2)


def _contents(
    held: list[Array], block: list[Array], rounds: list[Array], n: int, part: slice
) -> Iterator[tuple[list[Array], Array]]:
    """Iterate over what the slots held, round by round, and when: bool arrays (streams, part of n, slots)."""
    xp = array_namespace(block[0])
    token = positions(n, block[0])[None, part, None]
    begin = xp.zeros_like(held[0][:, :, 0], dtype=xp.int64)
    for upcoming in [*rounds, None]:
        since = token >= begin[:, None, :]
        yield held, since if upcoming is None else since & (token < upcoming[:, None, :])
        if upcoming is not None:
            # A slot that is not replaced in this round begins past the end in the next: it held all it will hold.
            held = [replace_slots(old, new, upcoming) for old, new in zip(held, block, strict=True)]
            begin = upcoming


def with_capacity(clusters: Clusters, capacity: int) -> Clusters:
    """Pad the arrays of the clusters to a capacity; a cluster that has not opened is due at its first member."""
    extra = capacity - clusters.counts.shape[1]
    if extra <= 0:
        return clusters

    def pad(x: Array, value: int = 0) -> Array:
        xp = array_namespace(x)
        shape = (x.shape[0], extra, *x.shape[2:])
        return xp.concat([x, xp.full(shape, value, dtype=x.dtype, device=x.device)], axis=1)

    return Clusters(pad(clusters.centres), pad(clusters.counts), pad(clusters.samples), pad(clusters.due, 1))


def flat(samples: Array) -> Array:
    """Join clusters and slots: ``(streams, clusters, t, head_dim)`` to ``(streams, clusters * t, head_dim)``."""
    xp = array_namespace(samples)
    return xp.reshape(samples, (samples.shape[0], -1, samples.shape[-1]))


def _squared_norms(values: Array) -> Array:
    xp = array_namespace(values)
    wide = xp.astype(values, xp.float64, copy=False)
    if values.dtype == xp.float64:
        wide = clip(wide, -_LARGEST, _LARGEST)
    return xp.sum(wide * wide, axis=-1)


def _log(x: Array) -> Array:
    """Logarithm with ``log 0 = -inf`` and no warning."""
    xp = array_namespace(x)
    positive = x > 0
    return xp.where(positive, xp.log(xp.where(positive, x, xp.ones_like(x))), xp.full_like(x, -math.inf))


def _ratio(numerator: tuple[Array, Array], denominator: Array) -> Array:
    """``z / tau`` from a normalised z with its logarithm, and log tau; saturates instead of overflowing.

    Where the samples of D miss the keys that M found (logits spread over thousands) the paper's ratio is a number
    that no float holds.
    """
    output, log_mass = numerator
    xp = array_namespace(output)
    info = xp.finfo(compute_dtype(output))
    log_ratio = xp.where(xp.isfinite(log_mass), log_mass - denominator, xp.full_like(log_mass, -math.inf))
    largest = math.log(float(info.max)) - 1.0
    ratio = xp.exp(xp.where(log_ratio < largest, log_ratio, xp.full_like(log_ratio, largest)))[..., None]
    # The product would overflow where |output| * ratio does; compare before multiplying.
    limit = float(info.max) / 2.0
    fits = xp.abs(output) < limit / xp.where(ratio > 1.0, ratio, xp.ones_like(ratio))
    return xp.where(fits, output, xp.zeros_like(output)) * ratio + xp.where(
        fits, xp.zeros_like(output), xp.copysign(xp.full_like(output, limit), output)
    )
