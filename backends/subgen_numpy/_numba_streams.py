"""How loops are compiled, and what numba lacks: numbers that threads share, and parts of arrays that lie together.

A slice of an array, to numba, counts as an owner, which takes longer than what short loops do with it, and may begin
at a negative place, which keeps loops from working on many numbers at once.
"""

from __future__ import annotations

from typing import Any

from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

__all__ = ["OPTIONS", "SUMS", "finish", "of_stream", "subview", "take_next", "view_at", "wait"]

OPTIONS = {"cache": True, "nogil": True, "error_model": "numpy"}
#: Sums in any order, and fused with products. NaN and infinity are what they are.
SUMS = {"reassoc", "contract", "nsz"}
# Some twenty microseconds.
_SPINS = 2000


@intrinsic
def _add(context: Any, numbers: Any, place: Any, added: Any) -> Any:
    """Add to a number that other threads add to as well; gives what it was."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, given[0])
        where = builder.gep(array.data, [given[1]])
        return builder.atomic_rmw("add", where, given[2], "seq_cst")

    return types.int64(numbers, types.intp, types.int64), generate


@intrinsic
def _at(context: Any, address: Any, shape: Any, like: Any) -> Any:
    """Give the array of a shape that begins at an address, of the dtype of another."""
    one = types.Array(like.dtype, shape.count, "C")

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        result = context.make_array(one)(context, builder)
        data = builder.inttoptr(given[0], result.data.type)
        sizes = cgutils.unpack_tuple(builder, given[1])
        itemsize = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(like.dtype)))
        steps = [itemsize]
        for size in reversed(sizes[1:]):
            steps.insert(0, builder.mul(steps[0], size))
        populate_array(result, data, sizes, steps, itemsize, meminfo=None)
        return result._getvalue()

    return one(types.int64, shape, like), generate


@njit(**OPTIONS)
def view_at(places: Any, which: int, stream: int, shape: Any, like: Any) -> Any:
    """Return a stream of one of several arrays.

    Loops are compiled once: an array is the same to them with and without gaps between its streams, read-only or not.

    Parameters
    ----------
    places : int64 array, shape (arrays, 2)
        From `subgen_numpy._numba.addresses`.
    which, stream : int
    shape : tuple of int
        Of the stream.
    like : array
        Of the dtype.
    """
    return _at(places[which, 0] + stream * places[which, 1], shape, like)


@intrinsic
def of_stream(context: Any, x: Any, stream: Any) -> Any:
    """Give a stream of an array each of whose streams lies together, without counting owners."""
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
def subview(context: Any, x: Any, start: Any, end: Any) -> Any:
    """Give some numbers that lie one behind the other, none of them outside the array."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, given[0])
        result = context.make_array(x)(context, builder)
        data = builder.gep(array.data, [given[1]])
        size, step = builder.sub(given[2], given[1]), cgutils.unpack_tuple(builder, array.strides)
        populate_array(result, data, [size], step, array.itemsize, meminfo=None)
        return result._getvalue()

    return x(x, types.intp, types.intp), generate


@njit(**OPTIONS)
def take_next(tickets: Any) -> Any:
    """Take the number of the next stream, from three numbers that all threads share and that begin with 0."""
    return _add(tickets, 0, 1)


@njit(**OPTIONS)
def finish(tickets: Any) -> None:
    """Count a stream as done."""
    _add(tickets, 1, 1)


@njit(**OPTIONS)
def wait(tickets: Any, streams: Any) -> None:
    """Wait until all streams are done, or leave it to `subgen_numpy._parallel.parallel_for` if it takes long.

    A thread that spins takes the processor from the one it waits for, if another process has the others.
    """
    for _ in range(_SPINS):
        if _add(tickets, 1, 0) >= streams:
            return
    tickets[2] = streams
