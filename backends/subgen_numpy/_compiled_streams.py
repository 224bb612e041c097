"""What numba lacks: numbers that threads share, and parts of arrays that loops know to lie together.

A slice of an array, to numba, counts as an owner, which takes longer than what short loops do with it, and may begin
at a negative place, which keeps loops from working on many numbers at once.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

__all__ = ["finish", "of_stream", "stretch", "take_next", "wait"]


@intrinsic
def _add(context: Any, numbers: Any, place: Any, added: Any) -> Any:
    """Add to a number that other threads add to as well; gives what it was."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, given[0])
        where = builder.gep(array.data, [given[1]])
        return builder.atomic_rmw("add", where, given[2], "seq_cst")

    return types.int64(numbers, types.intp, types.int64), generate


@intrinsic
def of_stream(context: Any, x: Any, stream: Any) -> Any:
    """Give a stream of an array each of whose streams lies together, as loops know it, and without counting owners.

    Whatever lies between the streams, as the room behind the clusters and pairs of each.
    """
    one = types.Array(x.dtype, x.ndim - 1, "C")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, given[0])
        shape, strides = (cgutils.unpack_tuple(builder, of_all) for of_all in (array.shape, array.strides))
        data = cgutils.pointer_add(builder, array.data, builder.mul(given[1], strides[0]), array.data.type)
        result = context.make_array(one)(context, builder)
        populate_array(result, data, shape[1:], strides[1:], array.itemsize, meminfo=None)
        return result._getvalue()

    return one(x, types.intp), generate


@intrinsic
def stretch(context: Any, x: Any, start: Any, end: Any) -> Any:
    """Give some numbers that lie one behind the other, none of them outside the array."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, given[0])
        result = context.make_array(x)(context, builder)
        data = builder.gep(array.data, [given[1]])
        size, step = builder.sub(given[2], given[1]), cgutils.unpack_tuple(builder, array.strides)
        populate_array(result, data, [size], step, array.itemsize, meminfo=None)
        return result._getvalue()

    return x(x, types.intp, types.intp), generate


@njit(nogil=True, cache=True)
def take_next(turns: Any) -> Any:
    """Take the number of the next stream, from two numbers that all threads share and that begin with 0."""
    return _add(turns, 0, 1)


@njit(nogil=True, cache=True)
def finish(turns: Any) -> None:
    """Tell that a stream is done."""
    _add(turns, 1, 1)


@njit(nogil=True, cache=True)
def wait(turns: Any, streams: Any) -> None:
    """Wait until all are done: never longer than another thread takes for one."""
    while _add(turns, 1, 0) < streams:
        pass
