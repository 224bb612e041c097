"""A sketch whose arrays stay where they are, so that a step of it can be recorded as a CUDA graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from subgen import AttentionSketch
from subgen._array import Array, array_namespace
from subgen._checks import check_scale
from subgen.backends import operations_for
from subgen.means import ClusterMeans, MeansState, own_copy
from subgen.sketch import Layout
from subgen.tail import Tail
from subgen.weighted import unfold_groups

from . import _decoding, _operations

__all__ = ["Decoder"]

# More tokens than any stream has.
_NO_LONGER_STREAM = 1 << 62


class Decoder:
    """Decoding from a sketch in arrays that stay where they are: what a step launches is the same for every token.

    A step can therefore be recorded once, in a CUDA graph of its own or within that of a whole model, and replayed for
    each token: `step` writes the token where the device keeps count of, and answers its query. `advance`, called from
    the host after each token, keeps it, and lets half a window join the clusters when the window is full; it is never
    part of a graph. Neither waits for the device.

    Parameters
    ----------
    sketch : AttentionSketch
        Of CuPy arrays, or of torch's CUDA tensors: 16 bits or float32, with as many clusters as it will ever have.
        It is as it was: the decoder goes on in a copy.

    Raises
    ------
    TypeError
        If it is not a sketch of such arrays.
    ValueError
        If arrays of it could not stay where they are: with a budget that grows, ``delta`` or ``residual_samples``;
        before all clusters are there; or with ``check_finite``, which waits for the device.

    Examples
    --------
    >>> import cupy, subgen, subgen_cupy  # doctest: +SKIP
    >>> sketch = subgen.AttentionSketch(max_clusters=1024, check_finite=False)  # doctest: +SKIP
    >>> sketch.update(keys, values, queries)  # doctest: +SKIP
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
        self._ops = operations_for(layout.example)
        # Copies to write into; nobody else may, so no state made of them may think that it could.
        state = _alone(state)
        xp = array_namespace(state.keys)
        self._counters = xp.zeros(2, dtype=xp.int64, device=state.keys.device)
        self._sketch = sketch.continued(layout, state)
        self._go_on(state)

    def __repr__(self) -> str:
        return f"<Decoder n_seen={self.n_seen} {self._sketch!r}>"

    @property
    def n_seen(self) -> int:
        """Tokens that are kept."""
        return self._sketch.n_seen

    def step(self, queries: Array, keys: Array, values: Array) -> Array:
        """Write a token behind those that are kept, and answer its queries; three launches.

        Until `advance` keeps it, the next call writes over it.

        Parameters
        ----------
        queries : array, shape (..., q_heads, 1, head_dim)
        keys : array, shape (..., kv_heads, 1, head_dim)
        values : array, shape (..., kv_heads, 1, value_dim)
            As in `subgen.AttentionSketch.step`. In a graph they are read where they are: write the next token there.

        Returns
        -------
        array, shape (..., q_heads, 1, value_dim)
            In the dtype of the input. In a graph each replay writes it anew.

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
        if not _operations.takes_in(state, rows, keys, values):
            raise ValueError(
                f"the kernels do not take {rows.shape[1]} query heads of a group with head_dim {layout.head_dim} and "
                f"value_dim {layout.value_dim}: use AttentionSketch.step"
            )
        decoded = _decoding.decode(
            _operations.device_of(keys),
            state,
            rows,
            layout.flat(keys),
            layout.flat(values),
            check_scale(self._method.scale, layout.head_dim),
            self._counters,
        )
        return unfold_groups(decoded.outputs, queries.shape)

    def advance(self) -> None:
        """Keep the token that the last step or replay wrote, and make room for the next."""
        state: Any = self._sketch.state
        kept = replace(state, n_exact=state.n_exact + 1, n_seen=state.n_seen + 1, asked=(*state.asked, True))
        self._go_on(kept)

    def sketch(self) -> AttentionSketch:
        """Return a sketch of the tokens that are kept, in arrays of its own.

        Where the window is full, its older half has joined the clusters already; in a sketch that absorbed the same
        tokens it does when the next one comes.
        """
        state: Any = self._sketch.state
        return self._sketch.continued(self._sketch.layout, replace(_alone(state), tail=Tail(state.n_exact)))

    def _go_on(self, state: MeansState) -> None:
        """Take a state in these arrays, with room for a token."""
        roomy = self._method.make_room(state, self._heads, self._ops)
        if roomy is not state:
            for mine, new in zip(_places(state), _places(roomy), strict=True):
                mine[...] = new
            state = replace(
                roomy,
                keys=state.keys,
                values=state.values,
                counts=state.counts,
                spread=state.spread,
                key_codes=state.key_codes,
                value_codes=state.value_codes,
                queries=state.queries,
                tail=Tail(None),
            )
        self._sketch = self._sketch.continued(self._sketch.layout, state)
        _decoding.count_tokens(_operations.device_of(self._counters), self._counters, state.n_exact, state.n_seen)


def _checked(sketch: AttentionSketch) -> tuple[ClusterMeans, MeansState, Layout]:
    """Return the parts of a sketch whose arrays can stay where they are."""
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
    places, room = int(state.counts.shape[1]), int(state.counts.shape[1]) + method.block
    now, ever = (method.most(state, n, room) for n in (state.n_seen, _NO_LONGER_STREAM))
    if ever > now:
        raise ValueError(f"a Decoder keeps as many clusters as there are, and {method.budget} grows: give a number")
    if places < ever:
        raise ValueError(
            f"the sketch has {places} of its {'later' if ever == room else ever} clusters after {state.n_seen} tokens: "
            f"update it until all are there, then make the Decoder"
        )
    return method, state, layout


def _places(state: MeansState) -> list[Array]:
    """List what a step reads or writes."""
    codes = [x for x in (state.key_codes, state.value_codes, state.queries) if x is not None]
    return [state.keys, state.values, state.counts, state.spread, *(y for x in codes for y in (x.codes, x.scales))]


def _alone(state: MeansState) -> MeansState:
    """Copy what a step reads or writes; nobody may write into what is returned, but who made it."""
    xp = array_namespace(state.keys)

    def copied(x: Array) -> Array:
        return xp.asarray(x, copy=True)

    key_codes, value_codes = (None if x is None else x.each(copied) for x in (state.key_codes, state.value_codes))
    return replace(
        own_copy(state, 0),
        counts=copied(state.counts),
        spread=copied(state.spread),
        key_codes=key_codes,
        value_codes=value_codes,
        tail=Tail(None),
    )
