"""Files that nobody meant: what `subgen.load` and the command line read, mutated. ``make fuzz``.

Every input is made from a valid file by its number alone, so that a failure can be repeated: ``--first 1234
--inputs 1``. Below the checksums, the changes are signed anew. Each input must be refused with a `FileError`, or give
something that works: answers, more tokens, another save. Anything else is a bug: another exception, more than
`SECONDS`, more than `MEMORY`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from safetensors.numpy import save as to_safetensors

import subgen
from subgen import AttentionSketch
from subgen._checks import MOST_TOKENS
from subgen.io.captures import FileError, read_capture
from subgen.io.save import _checksum

SECONDS = 20.0
MEMORY = 6 << 30

Rng = np.random.Generator
Tensors = dict[str, np.ndarray]


# What is valid.


@dataclass(frozen=True)
class Saved:
    """A file of a sketch, taken apart."""

    tensors: Tensors
    config: dict[str, Any]
    metadata: dict[str, str]

    def signed(self, text: str | None = None) -> dict[str, str]:
        text = json.dumps(self.config) if text is None else text
        return {**self.metadata, "config": text, "sha256": _checksum(text, self.tensors)}


def random(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


@cache
def sketches() -> list[tuple[bytes, Saved]]:
    """Files of all kinds of sketches."""
    paper = {"delta": 1.0, "samples_per_cluster": 2, "value_samples": 5}
    made = [
        (AttentionSketch(6, window=6, sink=2), "float32", 50),
        (AttentionSketch(6, window=6, sink=2, storage="int8", check_finite=False), "float16", 50),
        (AttentionSketch(subgen.Power(1.0, 0.5), window=4, delta=1.0, residual_samples=4), "float64", 50),
        (AttentionSketch(max_bytes=4000, window=6, sink=0, storage="int8", residual_samples=3), "float32", 40),
        (AttentionSketch(compression_ratio=0.5, window=4), "float16", 3),
        (AttentionSketch(4, window=4), "float32", 0),
        (AttentionSketch.paper(**paper), "float32", 40),
        (AttentionSketch.paper(**paper, scale=None), "float16", 1),
    ]
    # Merged with themselves: more tokens than 32 bits count, and nearly as many as a sketch counts.
    long = [
        (AttentionSketch(3, window=4, storage="int8", residual_samples=3), "float16", 20, 30),
        (AttentionSketch.paper(**paper), "float32", 20, 57),
    ]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (sketch, dtype, n, doublings) in enumerate((*((*one, 0) for one in made), *long)):
            if n:
                keys, values = random(i, (2, n, 4), dtype), random(i + 50, (2, n, 3), dtype)
                sketch.update(keys, values, queries=keys)
            for _ in range(doublings):
                sketch = subgen.merge(sketch, sketch)
            path = Path(folder) / "a.safetensors"
            sketch.save(path)
            found.append(path.read_bytes())
    # Of the first version of the format, too.
    found += [path.read_bytes() for path in sorted((Path(__file__).parent / "data").glob("version_*/*.safetensors"))]
    parts = []
    for data in found:
        header, tensors = take_apart(data)
        metadata = header["__metadata__"]
        parts.append((data, Saved(tensors, json.loads(metadata["config"]), metadata)))
    return parts


def take_apart(data: bytes) -> tuple[dict[str, Any], Tensors]:
    """Header and arrays of a valid safetensors file."""
    from safetensors.numpy import load

    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]), load(data)


@cache
def captures() -> list[Tensors]:
    return [
        {"q": random(i, (4, 30, 4), dtype), "k": random(i + 10, (2, 30, 4), dtype), "v": random(20, (2, 30, 3), dtype)}
        for i, dtype in enumerate(("float16", "float32", "float64"))
    ]


def npz(arrays: Tensors) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


# Changes that know nothing of what they change.


def pick(rng: Rng, choices: Any) -> Any:
    return choices[int(rng.integers(len(choices)))]


def scramble(rng: Rng, data: bytes, other: bytes) -> bytes:
    """Cut, flip, insert, overwrite, repeat or splice."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        size = max(1, len(changed))
        # The beginning, where the header is, as often as all the rest.
        at = int(rng.integers(min(size, 600))) if rng.random() < 0.5 else int(rng.integers(size))
        length = int(rng.integers(1, 60))
        kind = pick(rng, ("flip", "cut", "insert", "zeros", "noise", "repeat", "splice", "length"))
        if kind == "flip" and changed:
            changed[at] ^= 1 << int(rng.integers(8))
        elif kind == "cut":
            del changed[at : at + length if rng.random() < 0.5 else None]
        elif kind == "insert":
            changed[at:at] = rng.bytes(length)
        elif kind == "zeros":
            changed[at : at + length] = bytes(length)
        elif kind == "noise":
            changed[at : at + length] = rng.bytes(length)
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length]
        elif kind == "splice":
            start = int(rng.integers(len(other)))
            changed[at:] = other[start:]
        else:
            changed[:8] = struct.pack("<Q", int(pick(rng, (0, 1, size - 8, size, 2**31, 2**63, 2**64 - 1))))
    return bytes(changed)


WILD_JSON = (
    *(None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, 2**64, 2**62 - 1, 10**15, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "0", "7", "means", "int8", "float64", "\ud800", "x" * 5000),
    *([], {}, [1], [[]], ["x"], {"coefficient": 1.0, "exponent": 2.0}, {"x": {}}, [0, 10**12], [1] * 100),
)
WILD_TEXT = ("", "{", "[" * 100_000, "7" * 5000, '{"a": ' + "1" * 5000 + "}", "null", "[]", '"', "\ufeff{}", "{}")
WILD_NUMBERS = (np.nan, np.inf, -np.inf, -1, 0, 1, 127, -128, 2**31 - 1, -(2**31), 2**62, -(2**63), 1e30, 1e-45, 65504)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything in a JSON value, containers included."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from leaves(one, (*path, key))


def change_json(rng: Rng, value: Any) -> Any:
    """Replace, remove or add one thing."""
    value = json.loads(json.dumps(value))
    *way, last = pick(rng, list(leaves(value)))
    inside = value
    for key in way:
        inside = inside[key]
    kind = pick(rng, ("wild", "wild", "wild", "remove", "add", "near"))
    if kind == "wild":
        inside[last] = pick(rng, WILD_JSON)
    elif kind == "remove":
        del inside[last]
    elif kind == "near" and isinstance(inside[last], (int, float)):
        inside[last] += int(rng.integers(-2, 3))
    elif isinstance(inside, dict):
        inside[pick(rng, ("x", "seed", "delta", "n_seen", "__class__"))] = pick(rng, WILD_JSON)
    else:
        inside.append(pick(rng, WILD_JSON))
    return value


def change_array(rng: Rng, x: np.ndarray) -> np.ndarray:
    """Other numbers, another dtype or another shape."""
    kind = pick(rng, ("number", "number", "number", "row", "shuffle", "dtype", "axis", "shorter", "longer", "noise"))
    x = x.copy()
    with np.errstate(all="ignore"):
        if kind == "number" and x.size:
            x.flat[rng.integers(x.size, size=int(rng.integers(1, 4)))] = np.asarray(pick(rng, WILD_NUMBERS)).astype(
                x.dtype
            )
        elif kind == "row" and x.size:
            x[...] = np.asarray(pick(rng, WILD_NUMBERS)).astype(x.dtype)
        elif kind == "shuffle" and x.ndim:
            x = rng.permutation(x, axis=int(rng.integers(x.ndim)))
        elif kind == "dtype":
            x = x.astype(pick(rng, ("f2", "f4", "f8", "i1", "i4", "i8", "u2", "?")))
        elif kind == "axis":
            x = pick(rng, (x[..., None], x[None], x.reshape(-1), np.moveaxis(x, 0, -1)))
        elif kind == "shorter" and x.ndim:
            x = np.delete(x, 0, axis=int(rng.integers(x.ndim))) if 0 not in x.shape else x
        elif kind == "longer" and x.ndim:
            axis = int(rng.integers(x.ndim))
            x = np.concatenate([x, x], axis=axis)
        elif kind == "noise":
            x = np.frombuffer(rng.bytes(x.nbytes), dtype=x.dtype).reshape(x.shape)
    return np.ascontiguousarray(x)


def change_arrays(rng: Rng, arrays: Tensors) -> Tensors:
    arrays = dict(arrays)
    name = pick(rng, sorted(arrays))
    kind = pick(rng, ("change", "change", "change", "change", "remove", "rename", "swap", "all streams"))
    if kind == "change":
        arrays[name] = change_array(rng, arrays[name])
    elif kind == "remove":
        del arrays[name]
    elif kind == "rename":
        arrays[pick(rng, ("x", "", "counts", "Q", "q.npy", "../q", "é" * 40))] = arrays.pop(name)
    elif kind == "swap":
        other = pick(rng, sorted(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    else:
        part = pick(rng, (slice(0, 0), slice(0, 1), slice(None, None, -1)))
        arrays = {name: np.ascontiguousarray(x[part]) if x.size else x for name, x in arrays.items()}
    return arrays


# Whole files.


def signed_sketch(rng: Rng, saved: Saved) -> bytes:
    """Change what the checksum covers, and sign it anew."""
    text = None
    for _ in range(int(rng.integers(1, 3))):
        kind = pick(rng, ("arrays", "arrays", "arrays", "config", "config", "metadata", "text"))
        if kind == "arrays" and saved.tensors:
            saved = Saved(change_arrays(rng, saved.tensors), saved.config, saved.metadata)
        elif kind == "config":
            saved = Saved(saved.tensors, change_json(rng, saved.config), saved.metadata)
        elif kind == "metadata":
            key, value = (
                pick(rng, ("format", "version", "x")),
                pick(rng, ("", "0", "1", "2", "-1", "9" * 5000, "²", "٣")),
            )
            saved = Saved(saved.tensors, saved.config, {**saved.metadata, key: value})
        elif rng.random() < 0.3:
            text = pick(rng, WILD_TEXT)
    return to_safetensors(saved.tensors, saved.signed(text))


def other_header(rng: Rng, data: bytes) -> bytes:
    """Change the table of contents of a safetensors file; the data stay."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.2 and len(header) > 1:
        name = pick(rng, [name for name in header if name != "__metadata__"])
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    else:
        text = json.dumps(change_json(rng, header))
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + data[8 + length :]


def safetensors_capture(rng: Rng, arrays: Tensors) -> bytes:
    if rng.random() < 0.2:  # bfloat16: two bytes for every number
        arrays = {name: x.view("u2")[..., : x.shape[-1]] for name, x in arrays.items()}
        data = to_safetensors({name: np.ascontiguousarray(x) for name, x in arrays.items()})
        data = data.replace(b'"U16"', b'"BF16"')
        length = int.from_bytes(data[:8], "little") + 3
        data = struct.pack("<Q", length) + data[8:]
    else:
        data = to_safetensors(change_arrays(rng, arrays) if rng.random() < 0.6 else arrays)
    return other_header(rng, data) if rng.random() < 0.4 else data


def npy(rng: Rng, x: np.ndarray) -> bytes:
    """An array as a member of an .npz, with a header that may say anything."""
    file = io.BytesIO()
    if rng.random() < 0.1:
        np.save(file, np.asarray([{"a": 1}, x.shape], dtype=object), allow_pickle=True)
        return file.getvalue()
    np.save(file, x)
    data = file.getvalue()
    if rng.random() < 0.3:
        return scramble(rng, data, data)
    if rng.random() < 0.5:
        return data
    shape = pick(
        rng, (x.shape, (0,), (), (-1,), (1, 2**62, 4), (1, 10**9, 8), (2**40,), (x.size,), (1,) * 65, "x", None)
    )
    descr = pick(
        rng, ("<f2", "<f4", ">f4", "<f8", "<f16", "|O", "|V8", "<c8", "<M8[s]", "|S9", "<U4", [("a", "<f4")], "")
    )
    header = repr({"descr": descr, "fortran_order": pick(rng, (True, False, 2, None)), "shape": shape}).encode()
    header += b" " * pick(rng, (0, 1, 63, 20_000)) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) % 65536) + header + data[128:]


def npz_capture(rng: Rng, arrays: Tensors) -> bytes:
    """An archive with odd members."""
    file = io.BytesIO()
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    with zipfile.ZipFile(file, "w", pick(rng, kinds)) as archive:
        if rng.random() < 0.3:
            arrays = change_arrays(rng, arrays)
        changed = pick(rng, (*arrays, None))
        for name, x in arrays.items():
            names = (name, f"../{name}.npy", f"{name}.NPY", f"{name}/", "x.npy")
            for _ in range(2 if rng.random() < 0.05 else 1):
                member = pick(rng, names) if rng.random() < 0.05 else f"{name}.npy"
                archive.writestr(member or "nameless", npy(rng, x) if name == changed else npy_of(x))
        if rng.random() < 0.1:
            archive.writestr(pick(rng, ("q", "more.npy", "a/b", "q.npy/")), b"what")
        if rng.random() < 0.01:
            archive.writestr("k.npy", npy_of(np.zeros((1, 2**20, 4), "f4")))
    data = file.getvalue()
    if rng.random() < 0.2:  # the sizes and flags of the directory
        at, value = data.rfind(b"PK\x01\x02"), pick(rng, (0, 1, 2**31, 2**32 - 2))
        where, size = pick(rng, ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4)))
        data = data[: at + where] + struct.pack("<I", value)[:size] + data[at + where + size :]
    return data


def npy_of(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


KINDS = (
    *("sketch: bytes", "sketch: header", "sketch: signed", "sketch: signed", "sketch: signed"),
    *(".npz: bytes", ".npz: members", ".safetensors"),
)


def build(number: int) -> tuple[str, bytes, Rng]:
    """The input of a number: what it is, its bytes, and where chance goes on."""
    rng = np.random.default_rng(number)
    kind = pick(rng, KINDS)
    if kind.startswith("sketch"):
        data, saved = pick(rng, sketches())
        if kind == "sketch: bytes":
            return kind, scramble(rng, data, pick(rng, sketches())[0]), rng
        return kind, (signed_sketch(rng, saved) if kind == "sketch: signed" else other_header(rng, data)), rng
    arrays = pick(rng, captures())
    if kind == ".npz: bytes":
        return kind, scramble(rng, npz(arrays), npz(captures()[0])), rng
    return kind, (npz_capture if kind == ".npz: members" else safetensors_capture)(rng, arrays), rng


# What must be true of each.

# Refusals by what was found, in the words of their messages; the first that fits.
CHECKS = {
    "no file that the reader takes": r"broken or foreign file \((\w+)",
    "no zip archive": "not an .npz file",
    "unpacks to too much": "would unpack to",
    "an array twice": "holds an array twice",
    "names are missing": r"and lacks \[",
    "shape or dtype of q, k, v": "has shape .* and dtype",
    "q, k, v do not fit": "do not fit|store one dtype|and another BF16",
    "NaN or infinity in q, k, v": r"\b[qkv] holds NaN or infinity$",
    "no sketch": "but no sketch",
    "version": "version",
    "checksum": "altered since it was written",
    "no configuration": "no configuration",
    "kind of sketch": "a sketch of kind",
    "parameters": r"holds no sketch \((ValueError|TypeError)",
    "parts are missing or of no use": r"holds no sketch \(\w+|is missing$|no such sketch has|arrays and no layout",
    "sizes": "by the parameters beside it|but for the second axis",
    "bfloat16 for NumPy": "holds bfloat16, which NumPy has no dtype for",
    "dtypes": "is .*, expected|expected one of float16",
    "other dtype does not hold it": "does not hold",
    "NaN or infinity in a state": "of a stream that was checked",
    "parts contradict each other": "contradicts itself",
}


def refused_by(message: str) -> str:
    for name, pattern in CHECKS.items():
        if re.search(pattern, message, re.DOTALL):
            return name
    raise AssertionError(f"a refusal of no known kind: {message}")


def try_sketch(path: Path, rng: Rng) -> str:
    like = np.zeros((), pick(rng, ("f2", "f4", "f8"))) if rng.random() < 0.2 else None
    try:
        sketch = subgen.load(path, like=like)
    except FileError as error:
        return refused_by(str(error))
    layout, n = sketch.layout, sketch.n_seen
    leading, d, e, dtype = ((2,), 4, 3, "f4")
    if layout is not None:
        leading, d, e, dtype = layout.leading, layout.head_dim, layout.value_dim, layout.example.dtype
        assert sketch.attend(np.ones((*leading, 2, d), dtype)).shape == (*leading, 2, e)
    keys, values = np.ones((*leading, 21, d), dtype), np.ones((*leading, 21, e), dtype)
    try:
        sketch.update(keys[..., :10, :], values[..., :10, :])
    except (MemoryError, ValueError) as error:
        # Nothing was seen yet, so that no array says what is possible; what was asked for is not.
        if layout is None and re.search(r"^Unable to allocate|Maximum allowed|holds no cluster", str(error)):
            assert sketch.n_seen == 0
            return "loaded empty, and asks for too much"
        raise
    except OverflowError as error:
        if n + 10 > MOST_TOKENS and "2**62 - 1 tokens" in str(error) and sketch.n_seen == n:
            return "loaded, and as long as can be"
        raise
    assert sketch.step(keys, keys, values).shape == (*leading, 21, e)
    assert sketch.n_seen == n + 31
    again = path.with_name("again.safetensors")
    sketch.save(again)
    assert subgen.load(again).n_seen == sketch.n_seen
    return "loaded, and works"


def try_capture(path: Path) -> str:
    try:
        capture = read_capture(path)
    except FileError as error:
        return refused_by(str(error))
    part = slice(0, 20)
    q, k, v = (x[:, part] for x in (capture.q, capture.k, capture.v))
    out = AttentionSketch(4, window=4).step(q, k, v)
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    return "loaded, and works"


def attempt(kind: str, data: bytes, rng: Rng, folder: Path) -> str:
    """Read an input: what came of it."""
    path = folder / f"input{'.npz' if kind.startswith('.npz') else '.safetensors'}"
    path.write_bytes(data)
    return try_sketch(path, rng) if kind.startswith("sketch") else try_capture(path)


class TooLongError(BaseException):
    """An input takes too long; no `Exception`, which the readers turn into a refusal."""


@contextlib.contextmanager
def limited() -> Iterator[Callable[[], None]]:
    """Bound memory, and give a function that starts the clock of an input."""
    import resource

    def too_long(*_: object) -> None:
        raise TooLongError(f"more than {SECONDS:g} s")

    def start() -> None:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)

    signal.signal(signal.SIGALRM, too_long)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)


def compile_loops() -> None:
    """Compile what sketches run, which takes longer than an input may."""
    for dtype in ("f2", "f4", "f8"):
        x = np.ones((2, 40, 4), dtype)
        for storage in ("input", "int8"):
            sketch = subgen.AttentionSketch(3, window=4, sink=1, storage=storage)
            sketch.update(x, x, queries=x)
            sketch.step(x, x, x)


def main(
    inputs: Annotated[int, typer.Option(min=1)] = 100_000,
    first: Annotated[int, typer.Option(min=0, help="The number of the first input.")] = 0,
) -> None:
    """Try so many inputs; print what came of them. Fails if one is a bug."""
    counts: Counter[tuple[str, str]] = Counter()
    bugs = []
    compile_loops()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, limited() as start, np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # of overflow, and of archives of odd make
        for number in range(first, first + inputs):
            start()
            kind = "not made"
            try:
                kind, data, rng = build(number)
                counts[kind, attempt(kind, data, rng, Path(folder))] += 1
            except (Exception, TooLongError) as error:
                bugs.append(number)
                where = traceback.extract_tb(error.__traceback__)[-1]
                print(
                    f"bug: input {number} ({kind}): {type(error).__name__}: {str(error)[:300]} "
                    f"({Path(where.filename).name}:{where.lineno})",
                    file=sys.stderr,
                )
    kinds = sorted({kind for kind, _ in counts})
    print("".join(f"{kind:>16}" for kind in kinds) + "  what came of it")
    for result in sorted(
        {result for _, result in counts},
        key=[
            "loaded, and works",
            "loaded, and as long as can be",
            "loaded empty, and asks for too much",
            *CHECKS,
        ].index,
    ):
        print("".join(f"{counts[kind, result]:>16,}" for kind in kinds) + f"  {result}")
    print(f"{inputs:,} inputs, {len(bugs)} bugs, {time.perf_counter() - begin:.0f} s")
    raise typer.Exit(1 if bugs else 0)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
