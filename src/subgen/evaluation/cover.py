"""How clusterable keys are: the radius at which k balls cover them (section 3.1 of the paper), and a delta for it."""

from __future__ import annotations

from .._array import Array, array_namespace, pieces
from .._checks import check_block, check_integer
from .._inputs import outside_modes
from .._tree import concat
from ..leaders import assign_leaders

__all__ = ["delta_for_clusters", "k_center_radii"]


@outside_modes
def k_center_radii(keys: Array, k: int) -> Array:
    """Radii of the greedy k-center cover of each stream, for 1 to k centres.

    Farthest-first traversal (Gonzalez 1985), at most twice the optimum: each centre is the key farthest from those
    before it, beginning with the first key. Keys covered by m balls of radius R are ``(m, 2 R)``-clusterable, so a
    sketch with ``delta = 2 R`` opens at most m clusters.

    Parameters
    ----------
    keys : array, shape (..., n, head_dim)
    k : int
        Number of centres, 1 to n.

    Returns
    -------
    float64 array, shape (..., k)
        Largest distance of a key to its nearest centre, in the units of the keys.

    Raises
    ------
    TypeError, ValueError
        If the keys are not a finite floating array or k is out of bounds.

    Examples
    --------
    >>> import numpy as np
    >>> k_center_radii(np.array([[0.0], [1.0], [10.0]]), 3)
    array([10.,  1.,  0.])
    """
    keys, _ = check_block(keys, keys)
    xp = array_namespace(keys)
    n = keys.shape[-2]
    k = check_integer("k", k, maximum=n)
    points = xp.reshape(keys, (-1, n, keys.shape[-1]))
    farthest = xp.zeros((points.shape[0], 1), dtype=xp.int64, device=keys.device)
    squared, radii = None, []
    parts = pieces(n, points.shape[0] * points.shape[-1], keys)
    if len(parts) == 1:
        points = xp.astype(points, xp.float64)
    for _ in range(k):
        centre = xp.astype(xp.take_along_axis(points, farthest[:, :, None], axis=1), xp.float64, copy=False)
        distances = [
            xp.sum((xp.astype(points[:, part, :], xp.float64, copy=False) - centre) ** 2, axis=-1) for part in parts
        ]
        distance = concat(distances, axis=-1)
        squared = distance if squared is None else xp.minimum(squared, distance)
        radii.append(xp.max(squared, axis=-1, keepdims=True))
        farthest = xp.argmax(squared, axis=-1, keepdims=True)
    return xp.reshape(xp.sqrt(xp.concat(radii, axis=-1)), (*keys.shape[:-2], k))


@outside_modes
def delta_for_clusters(keys: Array, n_clusters: int) -> float:
    """Choose a delta at which every stream of these keys opens at most a number of clusters, and little more.

    The cover radius R gives a certain answer, ``2 R``; real keys open far fewer clusters there. Bisection below it
    counts the clusters that really open.

    Parameters
    ----------
    keys : array, shape (..., n, head_dim)
        A sample of the stream; the time grows with the square of its length.
    n_clusters : int
        At least 1.

    Returns
    -------
    float
        In the units of the keys.

    Raises
    ------
    TypeError, ValueError
        As in `k_center_radii`.

    Examples
    --------
    >>> import numpy as np
    >>> 1.0 <= delta_for_clusters(np.array([[0.0], [1.0], [10.0], [11.0]]), 2) < 1.1
    True
    """
    keys, _ = check_block(keys, keys)
    n = keys.shape[-2]
    n_clusters = min(check_integer("n_clusters", n_clusters), n)
    xp = array_namespace(keys)
    points = xp.reshape(keys, (-1, n, keys.shape[-1]))
    none_yet = xp.zeros((points.shape[0],), dtype=xp.int64, device=keys.device)
    low, high = 0.0, 2.0 * float(xp.max(k_center_radii(keys, n_clusters)[..., -1]))
    for _ in range(12):
        middle = (low + high) / 2.0
        _, opened = assign_leaders(points, points[:, :1, :], none_yet, middle)
        fits = int(xp.max(xp.sum(xp.astype(opened, xp.int64), axis=-1))) <= n_clusters
        low, high = (low, middle) if fits else (middle, high)
    return high
