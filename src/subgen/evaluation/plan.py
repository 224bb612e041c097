"""Plan a sketch from a sample: what the theorem needs, and what the default needs by measurement."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._checks import check_block, check_groups, check_integer, check_numpy, check_real, check_scale
from ..default.algorithm import ClusterMeans
from ..default.budget import Fixed
from ..io.captures import Capture
from ..theory import sample_sizes
from .compare import METHODS, compare
from .cover import delta_for_clusters

__all__ = ["DefaultSize", "Plan", "TheoremSize", "plan"]

# Keys of each stream that delta is chosen from: their pairwise distances are held at once.
_SAMPLED_KEYS = 512
# Shares of the pairs that the error of the default is measured at.
_SHARES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.7)


@dataclass(frozen=True)
class TheoremSize:
    """Algorithm 1 with as many clusters, at the sizes of the theorem.

    Attributes
    ----------
    clusters : int
        At most this many open on the sample.
    delta : float
        Radius at which they do, in the units of the keys.
    samples_per_cluster, value_samples : float
        The theorem's t and s, see `subgen.theory.sample_sizes`; ``inf`` where t is beyond any number.
    share : float
        Bytes over those of an exact cache of the planned length, if the stream has no more clusters than the sample.
    """

    clusters: int
    delta: float
    samples_per_cluster: float
    value_samples: float
    share: float


@dataclass(frozen=True)
class DefaultSize:
    """The default sketch as measured on the sample.

    Attributes
    ----------
    clusters : int
        Besides sinks and window.
    share : float
        Pairs over those of the prefix that was compressed.
    error : float
        Mean relative error of later answers.
    """

    clusters: int
    share: float
    error: float


@dataclass(frozen=True)
class Plan:
    """What `subgen.plan` found.

    Attributes
    ----------
    eps : float
    n : int
        Planned length of the stream.
    query_norm : float
        Largest norm of a query times the softmax scale: the paper's r.
    theorem : tuple of TheoremSize
    measured : tuple of DefaultSize
        By rising size, on the whole sample.
    sample_clusters : int or None
        Clusters at which the default's error is ``eps`` on the sample, by interpolation; ``None`` if it is above at
        every size measured.
    exponent : float
        Growth of that number with the length, from a half to the whole of the sample: 0 to 1; 1 where it could not
        be measured.
    clusters : int or None
        The same, carried on to n tokens with that exponent.
    window, sink : int
        As the clusters were measured with.
    nbytes, exact_nbytes : int
        Bytes of such a sketch, all streams; 0 if there is none. Of an exact cache of n tokens.
    """

    eps: float
    n: int
    query_norm: float
    theorem: tuple[TheoremSize, ...]
    measured: tuple[DefaultSize, ...]
    sample_clusters: int | None
    exponent: float
    clusters: int | None
    window: int
    sink: int
    nbytes: int
    exact_nbytes: int

    @property
    def theorem_in_reach(self) -> bool:
        """Whether some setting of Algorithm 1 keeps the theorem's promise in fewer bytes than an exact cache."""
        return any(size.share < 1.0 for size in self.theorem)

    @property
    def words(self) -> str:
        """The findings in plain words."""
        best = min(self.theorem, key=lambda size: size.share)
        if self.theorem_in_reach:
            theorem = (
                f"The theorem's promise is within reach: delta={best.delta:.4g}, t={best.samples_per_cluster:.4g}, "
                f"s={best.value_samples:.4g} take {best.share:.1%} of an exact cache of {self.n:,} tokens."
            )
        else:
            times = f"{best.share:.2g} times" if math.isfinite(best.share) else "more than any number of times"
            theorem = (
                f"The theorem's promise is out of reach: with delta = {best.delta:.3g} and r = {self.query_norm:.3g} "
                f"the least it needs, e^(2 delta r) samples and more for each cluster, is {times} the bytes of an "
                f"exact cache of {self.n:,} tokens. Fewer samples may do well, but nothing is promised for them."
            )
        if self.clusters is None:
            default = (
                f"The default does not reach an error of {self.eps:g} in any size measured, up to "
                f"{self.measured[-1].share:.0%} of the pairs: these keys hardly compress. Keep the exact cache, or "
                f"allow a larger error."
            )
        else:
            default = (
                f"The default reaches a mean relative error of {self.eps:g} with about {self.sample_clusters:,} "
                f"clusters on the sample. Carried on to {self.n:,} tokens (exponent {self.exponent:.2f}, measured "
                f"between a half and the whole of the sample; longer streams were not measured): "
                f"{self.clusters:,} clusters, {self.nbytes:,} bytes, {self.nbytes / self.exact_nbytes:.1%} of an exact "
                f"cache."
            )
        return f"{theorem} {default}"


def plan(
    eps: float,
    *,
    keys: NDArray[Any],
    values: NDArray[Any],
    queries: NDArray[Any],
    n: int | None = None,
    scale: float | None = None,
    window: int = 32,
    sink: int = 4,
    seed: int = 0,
    on_done: Callable[[str, float], object] | None = None,
) -> Plan:
    """Plan a sketch of n tokens from a sample of the stream.

    The sizes of the theorem (eq. 3 of the paper) follow from how the keys cluster and how long the queries are. The
    error it bounds is relative to ``||softmax(Kq)||_2 ||V||_op``; that of the default is measured: three quarters of
    the sample are compressed in several sizes, and later queries are compared with exact answers.

    Parameters
    ----------
    eps : float
        Error allowed, in (0, 1].
    keys, values : array, shape (streams, m, head_dim) and (streams, m, value_dim)
        NumPy arrays: a sample of the stream, a few hundred to a few thousand tokens of a typical text.
    queries : array, shape (q_streams, m, head_dim)
        Of the same tokens; ``q_streams`` is a multiple of ``streams``.
    n : int, optional
        Length of the stream to plan for; ``None`` means that of the sample.
    scale : float, optional
        Softmax scale; ``None`` means ``head_dim ** -0.5``.
    window, sink : int
        Exact tokens of the default.
    seed : int
    on_done : callable, optional
        Called with a word and a number after each step; for a progress bar.

    Returns
    -------
    Plan

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its bounds, or the sample too short to be compressed: below ten windows.

    Examples
    --------
    >>> import subgen.io.captures
    >>> sample = subgen.io.captures.sample()
    >>> q, k, v = (x[:1, :512] for x in (sample.q, sample.k, sample.v))
    >>> found = subgen.plan(0.1, keys=k, values=v, queries=q, n=100_000)
    >>> found.theorem_in_reach
    False
    >>> found.clusters < 0.1 * 100_000
    True
    """
    eps = check_real("eps", eps, minimum=0.0, strict=True, maximum=1.0)
    check_numpy("plan", keys=keys, values=values, queries=queries)
    keys, values = check_block(keys, values)
    queries = check_groups(queries, keys)
    if keys.ndim != 3 or queries.shape[-2] != keys.shape[-2]:
        raise ValueError(
            f"expected keys and values of shape (streams, tokens, dim) and a query for each token, got keys "
            f"{keys.shape} and queries {queries.shape}"
        )
    streams, length, head_dim = keys.shape
    n = length if n is None else check_integer("n", n)
    window, sink = check_integer("window", window, minimum=2), check_integer("sink", sink, minimum=0)
    factor = check_scale(scale, head_dim)
    if length < 10 * (window + sink):
        raise ValueError(
            f"a sample of {length} tokens is too short to compress beside a window of {window}: "
            f"give at least {10 * (window + sink)} tokens, or a smaller window"
        )
    done = on_done or (lambda word, number: None)
    capture = Capture(queries, keys, values)
    pair = keys.itemsize * (head_dim + values.shape[-1])
    exact_nbytes = streams * n * pair

    query_norm = float(np.linalg.norm(queries.astype(np.float64), axis=-1).max()) * factor
    theorem = []
    sampled = keys[:, : min(_SAMPLED_KEYS, length)]
    for clusters in sorted({8, math.isqrt(sampled.shape[1]), sampled.shape[1] // 4}):
        size = _theorem_size(eps, sampled, clusters, query_norm, values.shape[-1])
        share = streams * _paper_bytes(size, keys, values) / exact_nbytes
        theorem.append(TheoremSize(*size, share))
        done("theorem", clusters)

    def measure(part: Capture) -> tuple[DefaultSize, ...]:
        tokens = part.k.shape[1] * 375 // 512
        pairs = sorted({max(round(share * tokens), window + sink + 8) for share in _SHARES})
        shares = [p / tokens for p in pairs]
        method = {"subgen": METHODS["subgen"]}
        result = compare(part, shares, scale=factor, sinks=sink, window=window, methods=method, seed=seed, on_done=done)
        return tuple(
            DefaultSize(p - window - sink, share, float(error))
            for p, share, error in zip(result.pairs, shares, result.error[0], strict=True)
        )

    measured = measure(capture)
    half = measure(Capture(*(x[:, : length // 2] for x in (queries, keys, values))))
    enough, enough_half = _clusters_for(eps, measured), _clusters_for(eps, half)
    exponent = 1.0
    if enough and enough_half:
        exponent = min(1.0, max(0.0, math.log2(enough / enough_half)))
    clusters_at_n = None if enough is None else max(1, math.ceil(enough * max(1.0, n / length) ** exponent))
    nbytes = 0
    if clusters_at_n is not None:
        footprint = ClusterMeans(Fixed(clusters_at_n), window=window, sink=sink).footprint(keys, values)
        nbytes = streams * footprint.stream_bytes(clusters_at_n)
    return Plan(
        eps=eps,
        n=n,
        query_norm=query_norm,
        theorem=tuple(theorem),
        measured=measured,
        sample_clusters=enough,
        exponent=exponent,
        clusters=clusters_at_n,
        window=window,
        sink=sink,
        nbytes=nbytes,
        exact_nbytes=exact_nbytes,
    )


def _theorem_size(
    eps: float, keys: NDArray[Any], clusters: int, query_norm: float, value_dim: int
) -> tuple[int, float, float, float]:
    delta = delta_for_clusters(keys, clusters)
    try:
        sizes = sample_sizes(eps, delta=delta, query_norm=query_norm, value_dim=value_dim)
        samples = float(sizes.samples_per_cluster)
    except OverflowError:  # s does not depend on the radius
        sizes, samples = sample_sizes(eps, delta=0.0, query_norm=0.0, value_dim=value_dim), math.inf
    return clusters, delta, samples, float(sizes.value_samples)


def _paper_bytes(size: tuple[int, float, float, float], keys: NDArray[Any], values: NDArray[Any]) -> float:
    """Bytes of one stream: representatives, counts, slots with the moment they are due; see `subgen.paper.state`."""
    clusters, _, t, s = size
    key, value = keys.itemsize * keys.shape[-1], keys.itemsize * values.shape[-1]
    return float(clusters * (key + 8 + t * (key + 8)) + s * (key + value + 8) + 8)


def _clusters_for(eps: float, measured: tuple[DefaultSize, ...]) -> int | None:
    """Interpolate the size at which the error falls to eps, on log axes; the smallest measured if that will do."""
    below = next((i for i, size in enumerate(measured) if size.error <= eps), None)
    if below is None:
        return None
    if below == 0:
        return measured[0].clusters
    a, b = measured[below - 1], measured[below]
    if b.error <= 0.0:
        return b.clusters
    part = math.log(a.error / eps) / math.log(a.error / b.error)
    return math.ceil(a.clusters * math.pow(b.clusters / a.clusters, part) - 1e-9)
