"""The task: unseen Python source in which numbers are stated once and asked for once, far away.

Both sides of the comparison, SubGen and the baselines, run it, each in an environment of its own: this file needs torch
and NumPy alone, and gives every one the same samples.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["MODEL", "Sample", "Score", "evaluate", "read", "samples", "source"]

#: A byte-level Llama of 2.8M parameters, trained on the standard library's source for this project.
MODEL = Path(__file__).parent / "tiny_llama"


@dataclass(frozen=True)
class Sample:
    """Bytes as token ids.

    Attributes
    ----------
    prompt : Tensor, shape (prompt,)
        States the numbers: ``#put 123=4567`` on lines of their own.
    rest : Tensor, shape (rest,)
        Goes on, and asks for each once: ``#get 123=`` with the four digits.
    is_digit, is_text : bool Tensor, shape (rest,)
        The digits asked for; what is in no line that was planted.
    """

    prompt: torch.Tensor
    rest: torch.Tensor
    is_digit: torch.Tensor
    is_text: torch.Tensor


@dataclass(frozen=True)
class Score:
    """Of one method at one budget.

    Attributes
    ----------
    text_loss, digit_loss : float
        Nats a byte, on text and on the digits asked for.
    right_digits : float
        Share of the digits that are the model's first choice, given the right digits before.
    """

    text_loss: float
    digit_loss: float
    right_digits: float


def source(limit: int = 4_000_000) -> bytes:
    """Return Python source that the model was not trained on: NumPy's own files, in order of their names."""
    folder = Path(np.__file__).parent
    text = bytearray()
    for path in sorted(folder.rglob("*.py")):
        if "tests" not in path.parts:
            text += path.read_bytes()
    return bytes(text[:limit])


def samples(count: int, *, prompt: int = 1024, rest: int = 128, numbers: int = 4, seed: int = 0) -> list[Sample]:
    """Draw samples; equal arguments give equal ones.

    Parameters
    ----------
    count : int
    prompt, rest : int
        Bytes of each part.
    numbers : int
        How many are stated in the first three quarters of the prompt, and asked for in the rest.
    seed : int

    Returns
    -------
    list of Sample
    """
    draw, text = random.Random(seed), source()
    made = []
    for _ in range(count):
        keys = draw.sample(range(100, 1000), numbers)
        pairs = [(key, draw.randrange(1000, 10000)) for key in keys]
        start = draw.randrange(len(text) - 4 * (prompt + rest))
        start = text.index(b"\n", start) + 1
        said = [b"#put %d=%d\n" % pair for pair in pairs]
        first, _, used = _plant(draw, text[start:], said, prompt, 0.75)
        start += used
        asked = [b"#get %d=%d\n" % pair for pair in draw.sample(pairs, numbers)]
        second, planted, _ = _plant(draw, text[start:], asked, rest, 1.0)
        made.append(
            Sample(
                torch.tensor(list(first)),
                torch.tensor(list(second)),
                torch.from_numpy(planted == 2),
                torch.from_numpy(planted == 0),
            )
        )
    return made


def _plant(draw: random.Random, text: bytes, lines: list[bytes], size: int, share: float) -> tuple[bytes, Any, int]:
    """Plant lines at beginnings of lines of the first share of a text, and cut it to a size.

    Also tells of each byte whether it is text (0), planted (1) or a planted digit (2), and how much text was used.
    """
    room = size - sum(map(len, lines))
    body = text[:room]
    starts = [i + 1 for i, byte in enumerate(body[: int(room * share)]) if byte == ord("\n")] or [0]
    places = sorted(draw.choices(starts, k=len(lines)))
    out, kind, last = bytearray(), [], 0
    for place, line in zip(places, lines, strict=True):
        out += body[last:place] + line
        kind += [0] * (place - last) + [1] * (len(line) - 5) + [2] * 4 + [1]
        last = place
    out += body[last:]
    kind += [0] * (len(body) - last)
    return bytes(out), np.asarray(kind), room


def read(model: Any, ids: torch.Tensor, cache: Any, **options: Any) -> torch.Tensor:
    """Read tokens after those that a cache holds.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    ids : Tensor, shape (rows, tokens)
    cache : transformers.Cache
    **options
        What else the model is given.

    Returns
    -------
    Tensor, shape (rows, tokens, vocabulary)
        Logits.
    """
    # Transformers 5.24 renamed the argument, and the baselines run on an older release.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    logits: torch.Tensor = model(ids, **{name: cache}, **options).logits
    return logits


def evaluate(
    drawn: list[Sample],
    answer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    tell: Callable[[int], None] = lambda done: None,
    batch: int = 8,
) -> Score:
    """Score a method on samples.

    Parameters
    ----------
    drawn : list of Sample
    answer : callable
        From prompts (rows, prompt) and rests (rows, rest) to the logits (rows, rest, vocabulary) that predict
        each token of the rests.
    tell : callable
        Is told after each batch how many samples are done.
    batch : int
        Samples at once.

    Returns
    -------
    Score
    """
    sums = np.zeros(3)
    counts = np.zeros(2)
    for start in range(0, len(drawn), batch):
        part = drawn[start : start + batch]
        rests = torch.stack([sample.rest for sample in part])
        with torch.inference_mode():
            logits = answer(torch.stack([sample.prompt for sample in part]), rests).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rests.flatten(), reduction="none").double()
        right = (logits.argmax(dim=-1) == rests).flatten()
        digit = torch.stack([sample.is_digit for sample in part]).flatten()
        text = torch.stack([sample.is_text for sample in part]).flatten()
        sums += [float(loss[text].sum()), float(loss[digit].sum()), float(right[digit].sum())]
        counts += [int(text.sum()), int(digit.sum())]
        tell(start + len(part))
    text_loss, digit_loss, right_digits = sums / counts[[0, 1, 1]]
    return Score(float(text_loss), float(digit_loss), float(right_digits))
