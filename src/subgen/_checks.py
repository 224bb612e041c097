"""Bad input stops here: what was given, what was expected, what to do. Nothing is changed before these pass."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from ._array import Array, Namespace, array_namespace, dtype_name, is_floating, library_name
from ._inputs import namespace_of, plain

__all__ = [
    "MAX_PLACES",
    "MOST_TOKENS",
    "check_alike",
    "check_block",
    "check_choice",
    "check_example",
    "check_finite",
    "check_flag",
    "check_groups",
    "check_integer",
    "check_length",
    "check_numpy",
    "check_ratio",
    "check_real",
    "check_scale",
    "check_seed",
]

# Places that arrays are made for.
MAX_PLACES = 2**31 - 1

#: Tokens of the longest stream: sums of two counts, and the moments of reservoirs, fit in 64 bits.
MOST_TOKENS = 2**62 - 1


def check_real(
    name: str, value: Any, *, minimum: float = -math.inf, strict: bool = False, maximum: float = math.inf
) -> float:
    """Return a finite real number within bounds as a float; ``strict`` excludes the minimum."""
    bound = f"{'above' if strict else 'at least'} {minimum:g}" if minimum > -math.inf else "finite"
    if maximum < math.inf:
        bound += f" and at most {maximum:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number {bound}, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not math.isfinite(number) or number < minimum or (strict and number == minimum) or number > maximum:
        raise ValueError(f"{name} must be a real number {bound}, got {value!r}")
    return number


def check_integer(name: str, value: Any, *, minimum: int = 1, maximum: int | None = None) -> int:
    """Return an integer within bounds as an int."""
    bound = f"an integer of at least {minimum}" + ("" if maximum is None else f" and at most {maximum}")
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be {bound}, got {value!r} ({type(value).__name__})")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    return number


def check_length(n_seen: int, more: int) -> None:
    """Raise if a stream of so many tokens, and as many more, is longer than can be counted."""
    if n_seen + more > MOST_TOKENS:
        raise OverflowError(
            f"a sketch counts up to 2**62 - 1 tokens, got {n_seen:,} and {more:,} more; nothing was changed: start "
            f"another sketch for what follows, and merge its answers by logsumexp"
        )


def check_seed(seed: Any) -> int:
    """Return a seed in ``[0, 2**64)``."""
    return check_integer("seed", seed, minimum=0, maximum=2**64 - 1)


def check_ratio(value: Any) -> float:
    """Return a compression ratio, the share to remove: 0 or more, and below 1."""
    ratio = check_real("compression_ratio", value, minimum=0.0, maximum=1.0)
    if ratio == 1.0:
        raise ValueError(
            f"compression_ratio is the share of the cache to remove, below 1, which would leave nothing: got {value!r}"
        )
    return ratio


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Return one of a few words."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """Return a bool; nothing that merely counts as true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def check_scale(scale: Any, head_dim: int) -> float:
    """Return the softmax scale; ``None`` means ``head_dim ** -0.5``."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return check_real("scale", scale, minimum=0.0, strict=True)


def check_example(name: str, x: Any) -> Array:
    """Return an array that stands for its library, dtype and device, as it is computed with."""
    x = plain(name, x)
    xp = array_namespace(x)
    if not is_floating(x.dtype, xp):
        raise TypeError(
            f"{name} must have a real floating dtype of 16 to 64 bits that {library_name(xp)} computes with, got "
            f"{x.dtype}; {_cast(name, x.dtype, xp)}"
        )
    if library_name(xp) == "jax" and "int64" not in xp.__array_namespace_info__().dtypes():
        raise TypeError(
            "subgen counts and clusters in 64 bits, which JAX has switched off: call "
            "jax.config.update('jax_enable_x64', True) at the start of the program"
        )
    return x


def _check_array(name: str, x: Any) -> Array:
    """Return an array of a block as it is computed with; see `subgen._inputs.plain`."""
    x = check_example(name, x)
    if len(x.shape) < 2:
        raise ValueError(f"{name} must have shape (..., tokens, head_dim), got {tuple(x.shape)}")
    if 0 in tuple(x.shape):
        raise ValueError(
            f"{name} is empty: got shape {tuple(x.shape)}; pass at least one stream, token and dimension, "
            f"or skip the call"
        )
    return x


def _cast(name: str, dtype: Any, xp: Namespace) -> str:
    """Say what to do about a dtype that is not computed with."""
    kind = dtype_name(dtype)
    if kind.startswith(("complex", "clongdouble")):
        return f"pass its real part, or the real and imaginary parts side by side, {name}.real and {name}.imag"
    if kind.startswith(("quint", "qint")):
        return f"pass {name}.dequantize()"
    if kind in ("longdouble", "float96", "float128"):
        # No other library has it, nor does a file; to compute in float64 unasked would lose what it was chosen for.
        return f"cast it first, by {name}.astype(numpy.float64): no sketch computes in more"
    if getattr(dtype, "fields", None):
        return f"pass one of its fields, or numpy.lib.recfunctions.structured_to_unstructured({name})"
    call = f"{name}.to(torch.float32)" if library_name(xp) == "torch" else f"{name}.astype({library_name(xp)}.float32)"
    return f"cast it first, for example to float32 by {call.replace('jax.', 'jax.numpy.')}"


def check_numpy(what: str, **arrays: Any) -> None:
    """Check that arrays are NumPy's, for what is computed with NumPy alone."""
    for name, x in arrays.items():
        if not isinstance(x, np.ndarray):
            raise TypeError(
                f"{what} computes with NumPy: {name} must be a numpy.ndarray, got {type(x).__module__}."
                f"{type(x).__qualname__}; convert it first, for example with numpy.asarray"
            )


def check_alike(name: str, x: Array, other_name: str, other: Array) -> None:
    """Library, dtype and device of two arrays must agree."""
    xp, other_xp = namespace_of(name, x), namespace_of(other_name, other)
    if xp is not other_xp:
        raise TypeError(
            f"{name} is an array of {library_name(xp)} but {other_name} of {library_name(other_xp)}; "
            f"convert one of them"
        )
    if x.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {x.dtype} but {other_name} {other.dtype}; cast one of them")
    if x.device != other.device:
        raise TypeError(f"{name} is on device {x.device} but {other_name} on {other.device}; move one of them")


def check_finite(name: str, x: Array) -> None:
    """Raise if a number is NaN or infinite."""
    xp = array_namespace(x)
    with np.errstate(all="ignore"):
        # The sum is finite if all numbers are, unless it is beyond the dtype.
        total = xp.sum(x)
    if math.isfinite(float(total.detach() if hasattr(total, "detach") else total)):
        return
    if not bool(xp.all(xp.isfinite(x))):
        raise ValueError(
            f"{name} holds NaN or infinity; nothing was changed. Look for an overflow (float16 ends at 65504) "
            f"or an uninitialised array upstream"
        )


def check_block(keys: Any, values: Any, *, finite: bool = True) -> tuple[Array, Array]:
    """Check a block of tokens: ``(..., n, head_dim)`` and ``(..., n, value_dim)``, alike and, if wanted, finite.

    Returns
    -------
    keys, values : array
        Converted; see `subgen._inputs.plain`.
    """
    keys, values = _check_array("keys", keys), _check_array("values", values)
    check_alike("values", values, "keys", keys)
    if tuple(keys.shape[:-1]) != tuple(values.shape[:-1]):
        raise ValueError(
            f"keys and values must agree in every axis but the last: got {tuple(keys.shape)} and "
            f"{tuple(values.shape)}; expected (..., kv_heads, n, head_dim) and (..., kv_heads, n, value_dim)"
        )
    if finite:
        check_finite("keys", keys)
        check_finite("values", values)
    return keys, values


def check_groups(
    queries: Any, keys: Array, name: str = "keys", keys_shape: tuple[int, ...] | None = None, *, finite: bool = True
) -> Array:
    """Check that queries fit keys: same streams and head_dim, heads a multiple of the key-value heads.

    Returns
    -------
    array
        The queries, converted; see `subgen._inputs.plain`.
    """
    queries = _check_array("queries", queries)
    check_alike("queries", queries, name, keys)
    shape = tuple(queries.shape)
    key_shape = tuple(keys.shape) if keys_shape is None else keys_shape
    if shape[-1] != key_shape[-1]:
        raise ValueError(f"queries have head_dim {shape[-1]} (shape {shape}) but {name} {key_shape[-1]} {key_shape}")
    if len(shape) != len(key_shape) or shape[:-3] != key_shape[:-3]:
        raise ValueError(
            f"queries and {name} must have the same leading axes: got {shape} and {key_shape}; expected "
            f"(..., q_heads, m, head_dim) and (..., kv_heads, n, head_dim)"
        )
    if len(shape) > 2 and shape[-3] % key_shape[-3]:
        raise ValueError(
            f"the number of query heads must be a multiple of the key-value heads: got {shape[-3]} query heads "
            f"(shape {shape}) for {key_shape[-3]} key-value heads (shape {key_shape})"
        )
    if finite:
        check_finite("queries", queries)
    return queries
