"""What can be promised: the sample sizes of the theorem, and bounds for cluster means, with explicit constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._checks import check_integer, check_real

__all__ = ["MassBounds", "SampleSizes", "mass_bounds", "output_bound", "sample_sizes"]

# Its exponential, and that of twice it, is still a float.
_LARGEST_EXPONENT = 300.0


@dataclass(frozen=True)
class SampleSizes:
    """Samples per cluster (the paper's t) and of the values (its s)."""

    samples_per_cluster: int
    value_samples: int


def sample_sizes(eps: float, *, delta: float, query_norm: float, value_dim: int, failure: float = 0.01) -> SampleSizes:
    """Sizes at which one answer meets the bound of the paper's theorem, eq. (3), for certain constants.

    The paper gives orders, ``t = Omega(eps^-2 e^(2 delta r) log n)`` and ``s = Omega(eps^-2 d)``. These constants
    follow from the estimator's second moments: the relative variance of tau is at most
    ``sinh(delta r)^2 / t``, that of the numerator ``||V||_F^2 / (s ||V||_op^2) <= value_dim / s``. With
    ``|tau / E tau - 1| <= eps / 3`` and a numerator within ``eps (2 - eps) / 3``, both with probability
    ``1 - failure / 2`` (Chebyshev, Markov), the ratio is within
    ``eps ||softmax(Kq)||_2 ||V||_op`` of exact attention.

    Parameters
    ----------
    eps : float
        In (0, 1].
    delta : float
        Radius of the clusters.
    query_norm : float
        The paper's r: bound of the norm of a query, times the softmax scale.
    value_dim : int
        Dimension of the values.
    failure : float
        Probability in (0, 1) that one answer misses the bound.

    Returns
    -------
    SampleSizes
        At least 1 each.

    Raises
    ------
    TypeError, ValueError
        If an argument is out of its bounds.
    OverflowError
        If ``delta * query_norm`` is so large that no number of samples would do.

    Examples
    --------
    >>> sample_sizes(0.5, delta=0.1, query_norm=2.0, value_dim=8)
    SampleSizes(samples_per_cluster=292, value_samples=25600)
    """
    eps = check_real("eps", eps, minimum=0.0, strict=True, maximum=1.0)
    delta = check_real("delta", delta, minimum=0.0)
    query_norm = check_real("query_norm", query_norm, minimum=0.0)
    value_dim = check_integer("value_dim", value_dim)
    failure = check_real("failure", failure, minimum=0.0, strict=True, maximum=1.0)
    exponent = delta * query_norm
    if exponent > _LARGEST_EXPONENT:
        raise OverflowError(
            f"delta * query_norm is {exponent:.4g}: the theorem needs about e^{2 * exponent:.0f} samples per "
            f"cluster; choose a smaller delta"
        )
    t = 2.0 * math.sinh(exponent) ** 2 / (failure * (eps / 3.0) ** 2)
    s = 2.0 * value_dim / (failure * (eps * (2.0 - eps) / 3.0) ** 2)
    return SampleSizes(max(1, math.ceil(t)), math.ceil(s))


@dataclass(frozen=True)
class MassBounds:
    """Bounds of the mass of a cluster over the mass it is taken to have."""

    low: float
    high: float


def mass_bounds(query_norm: float, radius: float, *, corrected: bool = True) -> MassBounds:
    """Bound how far the mass that clusters are taken to have is from their true mass, without any chance.

    Let every member of a cluster lie within ``radius`` of its mean, and ``x = <q, k - mean>``. The x of the members
    average to zero and lie in [-a, a], ``a = query_norm * radius``. By Jensen's inequality and convexity (the chord of
    exp over [-a, a]) ``1 <= mean e^x <= cosh(a)``: the true mass over ``n e^<q, mean>`` lies there, and an error in
    the denominator of attention is of second order in a. The correction of `subgen.default.attend.log_weights`
    multiplies that by a factor of 1 to ``e^(a^2 / 2)``, since its variance is at most ``a^2``; then the ratio is at
    least ``e^(-a^2 / 2)``. The denominator of the sketch is off by no more than that either: it is a sum of masses, and
    the exact tokens have ratio 1.

    Parameters
    ----------
    query_norm : float
        Bound of the norm of a query, times the softmax scale.
    radius : float
        Largest distance of a member to the mean of its cluster, in the units of the keys. With ``delta`` it is at
        most ``2 * delta``.
    corrected : bool
        Whether masses carry the correction of the default sketch, or are ``n e^<q, mean>``.

    Returns
    -------
    MassBounds

    Raises
    ------
    TypeError, ValueError
        If an argument is not a finite number of at least 0.

    Examples
    --------
    >>> mass_bounds(2.0, 0.1, corrected=False)
    MassBounds(low=1.0, high=1.020066755619076)
    """
    query_norm = check_real("query_norm", query_norm, minimum=0.0)
    a = query_norm * check_real("radius", radius, minimum=0.0)
    high = math.cosh(a) if a < _LARGEST_EXPONENT else math.inf
    # Against a factor of up to e^(a^2/2); the true mass may be as small as if there were no spread.
    low = math.exp(-min(a * a / 2.0, _LARGEST_EXPONENT)) if corrected else 1.0
    return MassBounds(low, high)


def output_bound(
    query_norm: float,
    radius: float,
    *,
    value_deviation: float,
    value_range: float,
    corrected: bool = True,
) -> float:
    """Bound the error of an answer from cluster means, ``||z - Attn||``, without any chance.

    The error has two parts. Within a cluster attention leans away from the mean value: by the inequality of Cauchy and
    Schwarz at most ``value_deviation`` times the relative deviation of ``e^x``, which is at most ``2 sinh(a / 2)``
    (with ``y = e^x`` in ``[e^-a, e^a]``, ``y^2 <= 2 cosh(a) y - 1`` and ``mean y >= 1``). Between clusters the masses
    are off by factors in [low, high], see `mass_bounds`: at most ``value_range`` times the largest relative
    deviation of a number in that interval, ``(high - low) / (2 sqrt(low high))``.

    Parameters
    ----------
    query_norm, radius, corrected
        As in `mass_bounds`.
    value_deviation : float
        Largest root mean square distance of the values of a cluster to their mean.
    value_range : float
        Largest distance of the mean value of a cluster, or the value of an exact token, to the answer: at most the
        diameter of the values.

    Returns
    -------
    float
        ``inf`` where the bound says nothing.

    Raises
    ------
    TypeError, ValueError
        If an argument is not a finite number of at least 0.

    Examples
    --------
    >>> round(output_bound(2.0, 0.1, value_deviation=0.5, value_range=1.0), 3)
    0.12
    """
    bounds = mass_bounds(query_norm, radius, corrected=corrected)
    deviation = check_real("value_deviation", value_deviation, minimum=0.0)
    spread = check_real("value_range", value_range, minimum=0.0)
    if math.isinf(bounds.high) or bounds.low == 0.0:
        return math.inf
    between = (bounds.high - bounds.low) / (2.0 * math.sqrt(bounds.low * bounds.high))
    return 2.0 * math.sinh(query_norm * radius / 2.0) * deviation + between * spread
