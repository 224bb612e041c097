"""Numbers in 16 bits for loops that numba compiles: it has none, and they are words; see `subgen_numpy._float16`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from subgen.default.quantization import LARGEST_ROOT, SCALE_UNIT

__all__ = ["narrow", "power_below", "upcast", "upcast_root", "upcast_scale"]

#: The feature of a processor that upcasts float16.
FLOAT16_INSTRUCTIONS = "+f16c"

_BITS, _WORD, _FLOAT = ir.IntType(32), ir.IntType(16), ir.FloatType()
_SIGN, _MAGNITUDE = _BITS(0x80000000), _BITS(0x7FFFFFFF)
# The bits of infinity, and of the least normal float16.
_INFINITE, _LEAST_NORMAL_HALF = _BITS(0x7F800000), _BITS(113 << 23)
# Has in its last place the least float16.
_SNAPS = _BITS(126 << 23)


_WORDS = types.int16, types.uint16


@intrinsic
def upcast(context: Any, x: Any) -> Any:
    """Convert a number to float32: a word of 16 bits, an int8 or a float32."""
    return (types.float32(x), _upcast) if x in (types.float32, types.int8, *_WORDS) else None


def _upcast(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    kind, number = signature.args[0], given[0]
    if kind == types.float32:
        return number
    if kind == types.int8:
        return builder.sitofp(number, _FLOAT)
    if kind == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(number, _BITS), _BITS(16)), _FLOAT)
    if FLOAT16_INSTRUCTIONS in context.codegen().magic_tuple()[2].split(","):
        return builder.fpext(builder.bitcast(number, ir.HalfType()), _FLOAT)
    # Without an instruction for it the compiler would call a function that is not there.
    return _half(builder, number)


@intrinsic
def upcast_root(context: Any, x: Any) -> Any:
    """Convert a number that grows as a square to float32: a word is its root; see `subgen.default.quantization`."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = _upcast(context, builder, signature, given)
        if x not in _WORDS:
            return number
        largest = ir.Constant(_FLOAT, LARGEST_ROOT)
        number = builder.select(builder.fcmp_ordered(">", number, largest), largest, number)
        return builder.fmul(number, number)

    return (types.float32(x), generate) if x in (types.float32, *_WORDS) else None


@intrinsic
def upcast_scale(context: Any, x: Any) -> Any:
    """Convert the scale of codes to float32: a word is in another unit; see `subgen.default.quantization`."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        number = _upcast(context, builder, signature, given)
        return builder.fmul(number, ir.Constant(_FLOAT, SCALE_UNIT)) if x in _WORDS else number

    return (types.float32(x), generate) if x in (types.float32, *_WORDS) else None


def _half(builder: Any, number: Any) -> Any:
    """Build what upcasts the word of a float16 from plain operations."""
    word = builder.zext(number, _BITS)
    shifted = builder.shl(builder.and_(word, _BITS(0x7FFF)), _BITS(13))
    scaled = builder.fmul(builder.bitcast(shifted, _FLOAT), ir.Constant(_FLOAT, 2.0**112))
    bits = builder.bitcast(scaled, _BITS)
    beyond = builder.icmp_unsigned(">=", shifted, _BITS(0x7C00 << 13))
    bits = builder.select(beyond, builder.or_(bits, _INFINITE), bits)
    sign = builder.shl(builder.and_(word, _BITS(0x8000)), _BITS(16))
    return builder.bitcast(builder.or_(bits, sign), _FLOAT)


@intrinsic
def narrow(context: Any, x: Any, like: Any) -> Any:
    """Round a float32 to nearest, of two as near to the even one, and give the word; NaN stays NaN.

    No larger than the largest finite number. The second argument is an array of such words.
    """

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        bits = builder.bitcast(given[0], _BITS)
        magnitude = builder.and_(bits, _MAGNITUDE)
        odd_one = builder.icmp_unsigned(">", magnitude, _INFINITE)
        if like.dtype == types.uint16:
            odd = builder.and_(builder.lshr(bits, _BITS(16)), _BITS(1))
            word = builder.lshr(builder.add(bits, builder.add(odd, _BITS(0x7FFF))), _BITS(16))
            return builder.trunc(builder.select(odd_one, _BITS(0x7FC0), word), _WORD)
        odd = builder.and_(builder.lshr(magnitude, _BITS(13)), _BITS(1))
        rebiased = builder.sub(builder.add(magnitude, builder.add(odd, _BITS(0xFFF))), _BITS(112 << 23))
        word = builder.lshr(rebiased, _BITS(13))
        # Below the least normal number the sum with another has the right last place.
        snapped = builder.fadd(builder.bitcast(magnitude, _FLOAT), builder.bitcast(_SNAPS, _FLOAT))
        small = builder.icmp_unsigned("<", magnitude, _LEAST_NORMAL_HALF)
        word = builder.select(small, builder.sub(builder.bitcast(snapped, _BITS), _SNAPS), word)
        word = builder.select(odd_one, _BITS(0x7E00), word)
        sign = builder.lshr(builder.and_(bits, _SIGN), _BITS(16))
        return builder.trunc(builder.or_(word, sign), _WORD)

    if x == types.float32 and like.dtype in (types.int16, types.uint16):
        return like.dtype(x, like), generate
    return None


@intrinsic
def power_below(context: Any, x: Any) -> Any:
    """Give the largest power of two that is not above a positive normal float32."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.bitcast(builder.and_(builder.bitcast(given[0], _BITS), _INFINITE), _FLOAT)

    return (types.float32(x), generate) if x == types.float32 else None
