"""Kill a process that does nothing but save, at random moments, and look at the file. ``make crash-test``.

The process says after every save how many tokens were in it; the file must be that save, or the next one, which was
under way, bit for bit.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

import subgen
from subgen import AttentionSketch

START, TOKENS, STREAMS, HEAD_DIM = 400, 20_000, 2, 16
# Seconds from the first save on: a few saves, or none that was finished.
LONGEST = 0.05


def keys_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(STREAMS, TOKENS, HEAD_DIM)).astype(np.float32)


def make(seed: int) -> AttentionSketch:
    return AttentionSketch(200, window=16, seed=seed)


def save_for_ever(path: str, seed: int) -> None:
    """Save after every token, and say so."""
    keys, sketch = keys_of(seed), make(seed)
    sketch.update(keys[:, :START], keys[:, :START])
    print(START, flush=True)
    for i in range(START, TOKENS):
        sketch.update(keys[:, i : i + 1], keys[:, i : i + 1])
        sketch.save(path)
        print(i + 1, flush=True)


@dataclass(frozen=True)
class Saved:
    """A save, by what it must hold."""

    seed: int
    tokens: int


def kill_while_saving(path: Path, times: int, seed: int = 0) -> Counter[str]:
    """Start, kill and look, so many times; count what the files were.

    Raises
    ------
    AssertionError
        If a file is none of those it may be, or a kill left more than one other file.
    """
    rng, found, before = np.random.default_rng(seed), Counter[str](), None
    for i in range(times):
        process = subprocess.Popen([sys.executable, __file__, "save", str(path), str(i)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(float(rng.uniform(0.0, LONGEST)))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the process did not live until it was killed"
        reported = process.stdout.read().split()
        process.stdout.close()
        # A number may have been cut short; the save it tells of was whole.
        tokens = START + len(reported)
        last = Saved(i, tokens) if reported else before
        following = Saved(i, tokens + 1)
        before = _which(path, last, following)
        found["no file yet" if before is None else "the last save" if before == last else "the save under way"] += 1
    left = list(path.parent.glob(f".{path.name}.*.tmp"))
    assert len(left) <= times
    assert {*path.parent.iterdir()} <= {path, *left}, "files that are neither"
    found["temporary files left"] = len(left)
    return found


def _which(path: Path, *candidates: Saved | None) -> Saved | None:
    """Which of the saves the file is, to the last bit."""
    from sketches import assert_same  # pytest, which the process that saves need not wait for

    if not path.exists():
        assert None in candidates, "the file is gone"
        return None
    loaded = subgen.load(path)
    for saved in candidates:
        if saved is None or saved.tokens != loaded.n_seen or saved.seed != loaded.method.seed:
            continue
        keys, again = keys_of(saved.seed)[:, : saved.tokens], make(saved.seed)
        again.update(keys, keys)
        assert_same(loaded.state, again.state)
        np.testing.assert_array_equal(loaded.attend(keys[:, -5:]), again.attend(keys[:, -5:]))
        return saved
    raise AssertionError(f"the file holds {loaded.n_seen} tokens, expected one of {candidates}")


app = typer.Typer(add_completion=False)
app.command("save")(save_for_ever)


@app.command()
def kill(times: Annotated[int, typer.Option(min=1)] = 1000, seed: int = 0) -> None:
    """Kill so many times, and print what the files were."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_while_saving(Path(folder) / "sketch.safetensors", times, seed)
    for what, number in found.items():
        print(f"{number:6} {what}")
    print(f"{times} kills in {time.perf_counter() - begin:.0f} s: every file whole")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        app()
