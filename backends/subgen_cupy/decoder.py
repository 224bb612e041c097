"""A sketch in arrays with fixed addresses, so that a decoding step can be recorded as a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from subgen import AttentionSketch
from subgen._array import Array, array_namespace
from subgen._checks import check_scale
from subgen._tree import leaves, tree_map
from subgen.default.algorithm import ClusterMeans
from subgen.default.state import BufferOwner, State
from subgen.layout import Layout
from subgen.softmax import unfold_groups

from .append import appends, count_tokens, decode_token
from .device import device_of

__all__ = ["Decoder"]

# More tokens than any stream has.
_BEYOND_ALL_STREAMS = 1 << 62


class Decoder:
    """Decode from a sketch in arrays with fixed addresses: every token launches the same.

    A step can be recorded once, in a CUDA graph of its own or within that of a whole model, and replayed for each
    token. `step` writes a token and answers its queries; the place of the token is a number on the device. `advance`
    keeps the token, and absorbs half a window when the window is full. Call it from the host after each token, outside
    the graph. Neither waits for the device.

    Parameters
    ----------
    sketch : AttentionSketch
        Of CuPy arrays, or of torch's CUDA tensors, in 16 bits or float32, with all of its clusters. The decoder works
        on a copy; the sketch does not change.

    Raises
    ------
    TypeError
        If it is not a sketch of such arrays.
    ValueError
        If the addresses of its arrays cannot stay fixed: with a budget that grows, ``delta`` or ``residual_samples``,
        or before all clusters exist. Also with ``check_finite``, which waits for the device.

    Examples
    --------
    >>> import cupy, subgen, subgen_cupy  # doctest: +SKIP
    >>> sketch = subgen.AttentionSketch(max_clusters=1024, check_finite=False)  # doctest: +SKIP
    >>> sketch.update(keys, values, queries=queries)  # doctest: +SKIP
    >>> decoder = subgen_cupy.Decoder(sketch)  # doctest: +SKIP
    >>> replay, outputs = subgen_cupy.capture(lambda: decoder.step(query, key, value))  # doctest: +SKIP
    >>> for _ in range(100):  # doctest: +SKIP
    ...     # write the next token into the arrays query, key and value
    ...     replay()
    ...     decoder.advance()
    """

    def __init__(self, sketch: AttentionSketch) -> None:
        method, state, layout = _checked(sketch)
        self._method, self._heads = method, layout.heads
        # Only this decoder writes these copies.
        state = _copied(state)
        xp = array_namespace(state.exact.keys)
        self._counters = xp.zeros(2, dtype=xp.int64, device=state.exact.keys.device)
        self._sketch = sketch.continued(layout, state)
        self._continue_with(state)

    def __repr__(self) -> str:
        return f"<Decoder n_seen={self.n_seen} {self._sketch!r}>"

    @property
    def n_seen(self) -> int:
        """Number of tokens kept."""
        return self._sketch.n_seen

    def step(self, queries: Array, keys: Array, values: Array) -> Array:
        """Write a token behind the kept ones, and answer its queries. Three launches.

        The next call writes over the token unless `advance` keeps it.

        Parameters
        ----------
        queries : array, shape (..., q_heads, 1, head_dim)
        keys : array, shape (..., kv_heads, 1, head_dim)
        values : array, shape (..., kv_heads, 1, value_dim)
            As in `subgen.AttentionSketch.step`. A graph reads these arrays at each replay: write the next token there.

        Returns
        -------
        array, shape (..., q_heads, 1, value_dim)
            In the dtype of the input. Each replay of a graph writes it again.

        Raises
        ------
        TypeError, ValueError
            As in `subgen.AttentionSketch.step`, or if it is not one token.
        """
        layout, keys, values, queries = self._sketch.check(keys, values, queries)
        if keys.shape[-2] != 1:
            raise ValueError(f"a Decoder takes one token at a time, got {keys.shape[-2]}: use AttentionSketch.step")
        xp = array_namespace(keys)
        state: Any = self._sketch.state
        rows = xp.reshape(queries, (layout.streams, -1, layout.head_dim))
        k, v = layout.flat(keys), layout.flat(values)
        if not appends(state, rows, k, v):
            raise ValueError(
                f"the kernels do not take {rows.shape[1]} query heads of a group with head_dim {layout.head_dim} and "
                f"value_dim {layout.value_dim}: use AttentionSketch.step"
            )
        scale = check_scale(self._method.scale, layout.head_dim)
        outputs = decode_token(device_of(keys), state, rows, k, v, scale, self._counters)
        return unfold_groups(outputs, queries.shape)

    def advance(self) -> None:
        """Keep the token that the last step or replay wrote, and reserve space for the next."""
        state: Any = self._sketch.state
        exact = replace(state.exact, n=state.exact.n + 1)
        self._continue_with(replace(state, exact=exact, n_seen=state.n_seen + 1))

    def sketch(self) -> AttentionSketch:
        """Return a copy of the sketch, with the tokens that are kept.

        A decoder absorbs half a window as soon as the window is full; a sketch of the same tokens does so at the next
        token.
        """
        state: Any = self._sketch.state
        return self._sketch.continued(self._sketch.layout, _copied(state, state.exact.n))

    def _continue_with(self, state: State) -> None:
        """Continue with a state in these arrays; absorb half a window if there is no space for a token."""
        absorbed = self._method.make_room(state, self._heads)
        if absorbed is not state:
            for (_, mine), (_, new) in zip(leaves(state), leaves(absorbed), strict=True):
                mine[...] = new
            state = replace(state, exact=replace(state.exact, n=absorbed.exact.n))
        self._sketch = self._sketch.continued(self._sketch.layout, state)
        count_tokens(device_of(self._counters), self._counters, state.exact.n, state.n_seen)


def _checked(sketch: AttentionSketch) -> tuple[ClusterMeans, State, Layout]:
    """Return method, state and layout of a sketch whose arrays can keep their addresses, or raise."""
    method = getattr(sketch, "method", None)
    if not isinstance(method, ClusterMeans):
        raise TypeError(f"a Decoder needs a default AttentionSketch, got {sketch!r}")
    state: Any = sketch.state
    layout = sketch.layout
    if state is None or layout is None:
        raise ValueError("the sketch is empty: update it until all of its clusters are there, then make the Decoder")
    changing = {
        "delta": method.delta is not None,
        "residual_samples": method.residual_samples > 0,
        "check_finite": sketch.check_finite,
    }
    given = [name for name, is_given in changing.items() if is_given]
    if given:
        raise ValueError(f"a Decoder launches the same for every token, which does not go with {', '.join(given)}")
    places = int(state.clusters.counts.shape[1])
    limits = [method.max_clusters(state, n) for n in (state.n_seen, _BEYOND_ALL_STREAMS)]
    now, ever = (places + method.block if x is None else min(places + method.block, x) for x in limits)
    if ever > now:
        raise ValueError(f"a Decoder keeps as many clusters as there are, and {method.budget} grows: give a number")
    if places < ever:
        raise ValueError(
            f"the sketch has {places} of its {'later' if ever == places + method.block else ever} clusters after "
            f"{state.n_seen} tokens: update it until all are there, then make the Decoder"
        )
    return method, state, layout


def _copied(state: State, filled: int | None = None) -> State:
    """Copy every array; the owner of the buffers counts ``filled`` tokens, see `subgen.default.state.BufferOwner`."""
    xp = array_namespace(state.exact.keys)
    copied = tree_map(lambda x: xp.asarray(x, copy=True), state)
    return replace(copied, exact=replace(copied.exact, owner=BufferOwner(filled)))
