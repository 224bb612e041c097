"""Reservoirs by skips: uniform over a cluster's members, and weighted by squared norm over all tokens.

A slot that flips a coin at every token is the same in distribution as one that draws, when it is replaced, the
moment of its next replacement; so a slot costs O(log n) random numbers over a stream of n tokens.

- Uniform (line S_i of UpdateSoftmaxNormalizer): replaced when the count was n, a slot survives until the count n'
  with probability n / n'; so it is next replaced at ``floor(n / u) + 1``.
- Weighted (UpdateMatrixProduct): replaced at total weight mu, a slot survives until the total mu' with probability
  mu / mu'; so it is next replaced at the token that brings the total to ``mu / u``.

``due`` holds those moments. A block of tokens is a few *rounds*: each gives, for every slot, the token that
replaces it next. The rounds give both what the slots hold after the block and what they held at each of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from ._array import Array, array_namespace, clip, positions
from ._checks import MOST_TOKENS
from ._random import DRAW_BITS, draws

__all__ = [
    "drawn_places",
    "first_reaching",
    "group_tokens",
    "last_count",
    "latest",
    "next_count",
    "replace",
    "uniform_rounds",
    "weighted_rounds",
]

# A slot whose next replacement is at this count times 2**DRAW_BITS is never replaced: no stream is that long.
_NEVER = (MOST_TOKENS + 1) >> DRAW_BITS


def first_reaching(ascending: Array, targets: Array) -> Array:
    """Index of the first entry that is at least the target, or the length where none is; row by row.

    Parameters
    ----------
    ascending : array, shape (streams, n)
        Non-decreasing along the last axis.
    targets : array, shape (streams, m)

    Returns
    -------
    int64 array, shape (streams, m)
    """
    xp = array_namespace(ascending)
    n = ascending.shape[1]
    low = xp.zeros_like(targets, dtype=xp.int64)
    high = xp.full_like(low, n)
    for _ in range(n.bit_length()):
        middle = (low + high) // 2
        # Rows whose search has ended (low == high == n) look at the last entry, which changes nothing.
        entry = xp.take_along_axis(ascending, xp.where(middle < n, middle, xp.full_like(middle, n - 1)), axis=1)
        reached = (entry >= targets) | (middle >= high)
        high = xp.where(reached, middle, high)
        low = xp.where(reached, low, middle + 1)
    return high


def _draw(
    hit: Array,
    key: tuple[Array, Array],
    slots: Array,
    numbers: Array,
    use: Callable[[Array, Array], Array] | None = None,
) -> Array:
    """Draw for the slots that are hit, zero elsewhere: encrypting only the few that need it.

    With ``use``, return its results for the numbers and the draws instead of the draws.
    """
    xp = array_namespace(hit)
    flat = xp.reshape(hit, (-1,))
    (chosen,) = xp.nonzero(flat)
    # Padded to a power of two, so that libraries that compile per shape see few of them.
    size = 1 << max(4, (int(chosen.shape[0]) - 1).bit_length())
    chosen = xp.concat([chosen, xp.zeros((size - chosen.shape[0],), dtype=chosen.dtype, device=chosen.device)])

    def pick(x: Array) -> Array:
        return xp.take(xp.reshape(xp.broadcast_to(x, hit.shape), (-1,)), chosen)

    chosen_numbers = pick(numbers)
    drawn = draws((pick(key[0]), pick(key[1])), pick(slots), chosen_numbers)
    if use is not None:
        drawn = use(chosen_numbers, drawn)
    rank = xp.cumulative_sum(xp.astype(flat, xp.int64)) - 1
    drawn = xp.take(drawn, xp.where(flat, rank, xp.zeros_like(rank)))
    return xp.reshape(xp.where(flat, drawn, xp.zeros_like(drawn)), hit.shape)


def group_tokens(assignment: Array, capacity: int) -> tuple[Array, Array, Array]:
    """Sort the tokens of a block by cluster, in order of arrival.

    Parameters
    ----------
    assignment : int64 array, shape (streams, n)
    capacity : int
        Number of clusters.

    Returns
    -------
    order : int64 array, shape (streams, n)
        Tokens, cluster after cluster.
    start, added : int64 arrays, shape (streams, capacity)
        Where each cluster's tokens begin in ``order``, and how many there are.
    """
    xp = array_namespace(assignment)
    order = xp.argsort(assignment, axis=-1, stable=True)
    in_order = xp.take_along_axis(assignment, order, axis=-1)
    clusters = xp.broadcast_to(positions(capacity + 1, assignment)[None, :], (assignment.shape[0], capacity + 1))
    bounds = first_reaching(in_order, clusters)
    return order, bounds[:, :-1], bounds[:, 1:] - bounds[:, :-1]


def uniform_rounds(
    due: Array,
    counts: Array,
    order: Array,
    start: Array,
    added: Array,
    key: tuple[Array, Array],
) -> tuple[Array, list[Array]]:
    """Replacements of the uniform reservoirs of every cluster in a block.

    Parameters
    ----------
    due : int64 array, shape (streams, clusters, slots)
        The count at which each slot is next replaced; 1 for a cluster that has not opened.
    counts : int64 array, shape (streams, clusters)
        Members before the block.
    order, start, added : int64 arrays
        From `group_tokens`.
    key : (int64 array, int64 array)
        Each of shape (streams, 1, 1).

    Returns
    -------
    due : int64 array
        After the block.
    rounds : list of int64 arrays, shape (streams, clusters, slots)
        The token that replaces the slot in each round; the length of the block where none does.
    """
    xp = array_namespace(due)
    streams, n_clusters, t = due.shape
    n = order.shape[1]
    end = (counts + added)[:, :, None]
    slots = xp.reshape(positions(n_clusters * t, due), (1, n_clusters, t))
    rounds = []
    hit = due <= end
    while bool(xp.any(hit)):
        place = xp.where(hit, start[:, :, None] + due - counts[:, :, None] - 1, xp.zeros_like(due))
        token = xp.take_along_axis(order, xp.reshape(place, (streams, -1)), axis=-1)
        rounds.append(xp.where(hit, xp.reshape(token, due.shape), xp.full_like(due, n)))
        due = xp.where(hit, _draw(hit, key, slots, due, next_count), due)
        hit = due <= end
    return due, rounds


def next_count(counts: Array, drawn: Array) -> Array:
    """The count at which a slot is next replaced if it holds a uniform sample of so many: ``floor(n / u) + 1``.

    Parameters
    ----------
    counts : int64 array
        Up to ``subgen._checks.MOST_TOKENS``.
    drawn : int64 array
        From ``subgen._random.draws``.

    Returns
    -------
    int64 array
        Exact up to ``subgen._checks.MOST_TOKENS``, and some number above that where it is larger.
    """
    # Division in two steps: counts * 2**DRAW_BITS takes more than 64 bits from 2**38 tokens on.
    whole = counts // drawn
    rest = counts - whole * drawn
    return (clip(whole, None, _NEVER) << DRAW_BITS) + (rest << DRAW_BITS) // drawn + 1


def last_count(n: int) -> int:
    """Return the largest number that `next_count` gives for a count of ``n``, whatever was drawn."""
    return (min(n, _NEVER + 1) << DRAW_BITS) + 1


def drawn_places(counts: Array, drawn: Array) -> Array:
    """Draw one of so many places: integers from 0 to ``counts - 1``, each as likely; 0 where there is none.

    By this a slot of a joined stream chooses a token, and holds what the slot of the part that has this token holds.

    Parameters
    ----------
    counts : int64 array
        Up to ``subgen._checks.MOST_TOKENS``.
    drawn : int64 array
        From ``subgen._random.draws``.

    Returns
    -------
    int64 array
    """
    # A product in two parts: as one it takes more than 64 bits from 2**38 tokens on.
    rest = counts & ((1 << DRAW_BITS) - 1)
    return (counts >> DRAW_BITS) * drawn + ((rest * drawn) >> DRAW_BITS)


def weighted_rounds(due: Array, totals: Array, first: int, key: tuple[Array, Array]) -> tuple[Array, list[Array]]:
    """Replacements of the norm-weighted reservoir in a block.

    Parameters
    ----------
    due : float64 array, shape (streams, slots)
        The running weight at which each slot is next replaced; positive.
    totals : float64 array, shape (streams, n)
        Running weight after each token of the block.
    first : int
        Position of the block's first token in the stream.
    key : (int64 array, int64 array)
        Each of shape (streams, 1).

    Returns
    -------
    due : float64 array
        After the block.
    rounds : list of int64 arrays, shape (streams, slots)
        As `uniform_rounds` gives them.
    """
    xp = array_namespace(due)
    slots = positions(due.shape[1], due)[None, :]
    rounds = []
    # A running weight beyond the dtype is reached once: no slot is due behind infinity.
    hit = (due <= totals[:, -1:]) & (due < math.inf)
    while bool(xp.any(hit)):
        token = first_reaching(totals, due)
        rounds.append(token)
        safe = xp.where(hit, token, xp.zeros_like(token))
        drawn = _draw(hit, key, slots, safe + first)
        u = xp.astype(xp.where(hit, drawn, xp.ones_like(drawn)), xp.float64) * 2.0**-DRAW_BITS
        due = xp.where(hit, xp.take_along_axis(totals, safe, axis=-1) / u, due)
        hit = (due <= totals[:, -1:]) & (due < math.inf)
    return due, rounds


def latest(rounds: list[Array], n: int) -> Array:
    """Return the token each slot was last replaced by in a block of ``n``, or ``n`` where it was not."""
    last = rounds[0]
    xp = array_namespace(last)
    for tokens in rounds[1:]:
        last = xp.where(tokens < n, tokens, last)
    return last


def replace(content: Array, block: Array, tokens: Array) -> Array:
    """Put tokens of the block into slots.

    Parameters
    ----------
    content : array, shape (streams, slots, dim)
    block : array, shape (streams, n, dim)
    tokens : int64 array, shape (streams, slots)
        The token for each slot; ``n`` leaves the slot as it is.

    Returns
    -------
    array, shape (streams, slots, dim)
    """
    xp = array_namespace(content)
    hit = tokens < block.shape[1]
    fresh = xp.take_along_axis(block, xp.where(hit, tokens, xp.zeros_like(tokens))[:, :, None], axis=1)
    return xp.where(hit[:, :, None], fresh, content)
