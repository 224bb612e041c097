"""Turns of a long block, `subgen.blocks`: launches that are made once, and replayed for every turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from subgen.absorbing import Exact, Settled, means_and_exact
from subgen.blocks import Tokens, Turn, Turned
from subgen.merging import Means
from subgen.rounding import Codes

from ._absorbing import Stored, Turns, collect, key_moment, query_moment, settle_into, stored_like
from ._launch import Array, Device, Launch
from ._merging import shrink

__all__ = ["FEWEST_TURNS", "Recorder", "absorb_blocks"]

#: With fewer turns than this, recording them takes as long as it saves.
FEWEST_TURNS = 8


class CopiedError(RuntimeError):
    """What was to be recorded made a copy, which a replay would not make."""


@dataclass(frozen=True)
class Recorder:
    """A device that keeps what is launched and what it works on, so that it can be launched again.

    Parameters
    ----------
    device : Device
        Where it runs, at once as well.
    """

    device: Device
    launches: list[Launch] = field(default_factory=list)
    kept: list[Array] = field(default_factory=list)

    @property
    def xp(self) -> Any:
        """The namespace of the arrays."""
        return self.device.xp

    @property
    def multiprocessors(self) -> int:
        """How many processors the blocks of a kernel are spread over."""
        return self.device.multiprocessors

    @property
    def clusters(self) -> bool:
        """Whether blocks of a cluster may write into each other's shared memory."""
        return self.device.clusters

    @property
    def recordable(self) -> bool:
        """It is being recorded already."""
        return False

    def empty(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Return an array that is kept."""
        self.kept.append(self.device.empty(shape, dtype))
        return self.kept[-1]

    def upload(self, x: Any) -> Array:
        """Refuse: a replay would not copy."""
        raise CopiedError(f"an array of shape {x.shape} comes from the host while launches are recorded")

    def packed(self, x: Array, dtype: str | None = None) -> Array:
        """Return the array, which must be packed."""
        return self._same(x, self.device.packed(x, dtype))

    def streams(self, x: Array) -> tuple[Array, int]:
        """Return the array, whose streams must be packed."""
        packed, step = self.device.streams(x)
        return self._same(x, packed), step

    def pointer(self, x: Array) -> int:
        """Return the address of the first element."""
        return self.device.pointer(x)

    def run(self, launch: Launch) -> None:
        """Launch, and keep the launch."""
        self.launches.append(launch)
        self.device.run(launch)

    def replayed(self, launches: Sequence[Launch]) -> Callable[[], None]:
        """Return what launches them again."""
        return self.device.replayed(launches)

    def _same(self, given: Array, packed: Array) -> Array:
        if packed is not given:
            raise CopiedError(f"an array of shape {tuple(given.shape)} is copied while launches are recorded")
        return given


def _parts(stored: Stored, clusters: int, remember: bool, asked: tuple[bool, ...]) -> tuple[Means, Exact]:
    """Return the parts of a sketch as the kernels are given them."""
    mean_keys, mean_values, exact = means_and_exact(stored, clusters, asked)
    means = Means(
        mean_keys,
        mean_values,
        stored.counts,
        stored.spread,
        stored.importance,
        nearest=stored.nearest if remember else None,
    )
    return means, exact


def absorb_blocks(
    device: Device,
    held: Means,
    exact: Exact,
    tokens: Tokens,
    scale: float | None,
    leave: int,
    turns: Sequence[Turn],
) -> Turned:
    """Take the turns of `subgen.blocks.absorb_blocks`; from the fourth on they are replayed, two at a time.

    The first reads the sketch where it is and writes one set of arrays. The second writes another, the third the first
    again; what these two launched serves for all others. What differs between turns is a table on the device, and
    kernels count the turns. The kernels must take such arrays without copies: rows of whole 16 bytes.

    Parameters
    ----------
    device : Device
    held, exact, tokens, scale, leave, turns
        As in `subgen.blocks.absorb_blocks`, with at least three turns.

    Returns
    -------
    subgen.blocks.Turned
    """
    asked, remember, clusters = tokens.queries is not None, held.nearest is not None, held.counts.shape[1]
    sets = [stored_like(device, held, exact, isinstance(held.keys, Codes), whole=True) for _ in range(2)]
    tokens = _packed(device, tokens)
    table = device.upload(np.array([_numbers(turn) for turn in turns]))
    counters = device.upload(np.zeros(2, dtype=np.int64))

    def turn(device: Device, held: Means, exact: Exact, new: Stored, odd: bool) -> None:
        at = Turns(table, counters, odd)
        keys, values = exact.window
        metric = query_moment(device, exact.queries, keys.shape[1]) if asked else key_moment(device, keys, scale)
        pool, unit = collect(device, held, keys, values, leave, turns=at)
        merged, _ = shrink(device, pool, metric, unit, clusters, clusters)
        settle_into(device, new, merged, exact, leave, turns=at, coming=tokens)

    turn(device, held, exact, sets[0], False)
    recorder = Recorder(device)
    turn(recorder, *_parts(sets[0], clusters, remember, exact.asked), sets[1], True)
    first = list(recorder.launches)
    turn(recorder, *_parts(sets[1], clusters, remember, exact.asked), sets[0], False)
    replay = device.replayed(recorder.launches)
    pairs, one_more = divmod(len(turns) - 3, 2)
    for _ in range(pairs):
        replay()
    if one_more:
        for launch in first:
            device.run(launch)
    last = sets[one_more]
    codes = last.key_codes, last.value_codes
    settled = Settled(last.keys, last.values, last.spread, last.importance, *codes, last.queries)
    return Turned(settled, last.counts, last.nearest if remember else None)


def _packed(device: Device, tokens: Tokens) -> Tokens:
    """Copy once what kernels do not read as it lies."""
    codes = tokens.queries
    if codes is not None:
        codes = Codes(device.packed(codes.codes), device.packed(codes.scales, "float32"))
    return Tokens(device.streams(tokens.keys)[0], device.streams(tokens.values)[0], codes)


def _numbers(turn: Turn) -> list[float]:
    """Return a row of the table; see `subgen_cupy._absorbing.Turns`."""
    drawn = (getattr(turn.dithers, field.name).drawn for field in fields(turn.dithers))
    return [turn.weight, *drawn, float(turn.anew)]
