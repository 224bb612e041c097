"""What can be promised: the sample sizes of the theorem, with explicit constants."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ._checks import check_integer, check_real

__all__ = ["SampleSizes", "sample_sizes"]


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
        The paper's r: bound of the norm of a query, times the factor of the logits.
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
    if exponent > 300.0:
        raise OverflowError(
            f"delta * query_norm is {exponent:.4g}: the theorem asks for about e^{2 * exponent:.0f} samples per "
            f"cluster; choose a smaller delta"
        )
    t = 2.0 * math.sinh(exponent) ** 2 / (failure * (eps / 3.0) ** 2)
    s = 2.0 * value_dim / (failure * (eps * (2.0 - eps) / 3.0) ** 2)
    return SampleSizes(max(1, math.ceil(t)), math.ceil(s))
