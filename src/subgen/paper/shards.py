"""The state of Algorithm 1 for one stream after another, from those of the two.

Clusters of the second whose representative lies within ``delta`` of one of the first join the nearest such cluster,
whole; the others open. Every slot chooses a token of the joined stream, uniformly or by squared norm, and takes
what the same slot holds in the part that has this token.
"""

from __future__ import annotations

from .._array import Array, array_namespace, chunks, positions
from .._random import DRAW_BITS, slot_draws
from ..leaders import append_leaders, assign_leaders, padded_capacity
from ..reservoirs import drawn_places, first_reaching, group_tokens, next_count
from .algorithm import CLUSTER_DRAWS, VALUE_DRAWS, Algorithm1, flat, with_capacity
from .state import Clusters, PaperState, ValueReservoir

__all__ = ["merge_states"]

# The streams of random numbers; others belong to `subgen.paper.algorithm` and `subgen.default`.
_CLUSTER_CHOICES, _VALUE_CHOICES = 8, 9
# Clusters of the second that are assigned at once.
_BLOCK = 512


def merge_states(method: Algorithm1, first: PaperState, second: PaperState, heads: Array) -> PaperState:
    """Join the states of two streams, the second after the first.

    Whatever the seeds of the two, each slot holds any token with the right probability, and the slots of a cluster are
    independent, as are those of the values: a slot chooses by a draw of its own number at the length of the joined
    stream, at which neither has drawn, and what it holds in either part comes from draws of its number alone.

    Parameters
    ----------
    method : Algorithm1
        That of the first, which draws by its seed.
    first, second : PaperState
    heads : int64 array, shape (streams,)
        See `subgen.default.algorithm.ClusterMeans.update`.

    Returns
    -------
    PaperState
    """
    clusters = _join_clusters(method, first, second, heads)
    n_seen = first.n_seen + second.n_seen
    reservoir = _join_values(method, first.reservoir, second.reservoir, n_seen, heads)
    return PaperState(clusters, reservoir, n_seen)


def _join_clusters(method: Algorithm1, first: PaperState, second: PaperState, heads: Array) -> Clusters:
    xp = array_namespace(first.clusters.counts)
    other = second.clusters
    old, assignment = _assign(method, first, other)
    places, t = int(old.counts.shape[1]), method.t
    # Clusters of the second in the order of what they joined, and the members up to each.
    order, start, added = group_tokens(assignment, places)
    members = xp.cumulative_sum(xp.take_along_axis(other.counts, order, axis=1), axis=1, include_initial=True)
    before = xp.take_along_axis(members, start, axis=1)
    counts = old.counts + xp.take_along_axis(members, start + added, axis=1) - before

    slots = xp.reshape(positions(places * t, counts), (1, places, t))

    def drawn(purpose: int) -> Array:
        return slot_draws(method.seed, purpose, heads, slots, counts[:, :, None])

    token = drawn_places(counts[:, :, None], drawn(_CLUSTER_CHOICES)) - old.counts[:, :, None]
    taken = (token >= 0) & (counts > 0)[:, :, None]
    rank = xp.where(taken, before[:, :, None] + token, xp.zeros_like(token))
    rank = first_reaching(members[:, 1:], xp.reshape(rank + 1, (rank.shape[0], -1)))
    source = xp.take_along_axis(order, rank, axis=1)
    slot = source * t + xp.reshape(slots, (1, -1)) % t
    fresh = xp.take_along_axis(flat(other.samples), slot[:, :, None], axis=1)
    samples = xp.where(taken[..., None], xp.reshape(fresh, old.samples.shape), old.samples)
    return Clusters(old.centres, counts, samples, next_count(counts[:, :, None], drawn(CLUSTER_DRAWS)))


def _assign(method: Algorithm1, first: PaperState, other: Clusters) -> tuple[Clusters, Array]:
    """Assign the clusters of the second by their representatives; return those of the first, with what opened."""
    xp = array_namespace(other.counts)
    # Places that are free repeat a representative: they open nothing.
    centres = xp.where((other.counts > 0)[:, :, None], other.centres, other.centres[:, :1, :])
    held, before, assignments = first.clusters, method.n_clusters(first), []
    for part in chunks(centres.shape[1], _BLOCK):
        block = centres[:, part, :]
        assignment, opened = assign_leaders(block, held.centres, before, method.delta)
        after = before + xp.sum(xp.astype(opened, xp.int64), axis=-1)
        held = with_capacity(held, padded_capacity(int(xp.max(after))))
        leaders = append_leaders(held.centres, before, block, opened)
        held, before = Clusters(leaders, held.counts, held.samples, held.due), after
        assignments.append(assignment)
    return held, xp.concat(assignments, axis=1)


def _join_values(
    method: Algorithm1, first: ValueReservoir, second: ValueReservoir, n_seen: int, heads: Array
) -> ValueReservoir:
    xp = array_namespace(first.keys)
    weight = (first.weight + second.weight)[:, None]
    slots = positions(method.s, weight)[None, :]

    def uniform(purpose: int, number: int) -> Array:
        drawn = slot_draws(method.seed, purpose, heads, slots, xp.zeros_like(slots) + number)
        return xp.astype(drawn, xp.float64) * 2.0**-DRAW_BITS

    taken = uniform(_VALUE_CHOICES, n_seen) * weight >= first.weight[:, None]
    # As if the last token had replaced it.
    due = weight / uniform(VALUE_DRAWS, n_seen - 1)
    return ValueReservoir(
        keys=xp.where(taken[:, :, None], second.keys, first.keys),
        values=xp.where(taken[:, :, None], second.values, first.values),
        due=xp.where(weight > 0, due, first.due),
        weight=weight[:, 0],
    )
