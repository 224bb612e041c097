"""Samples of long-context tasks: the tasks of RULER (arXiv 2404.06654), and text to continue.

A sample is a context, which a method compresses, and questions about it. Equal arguments give equal samples, so that
methods that run in different environments answer the same questions. Words come from wonderwords (the extra
``evaluate``).
"""

from __future__ import annotations

import bisect
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import pairwise

from .._checks import check_choice, check_integer

__all__ = ["TASKS", "Question", "Sample", "draw_sample"]

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
# Depths of needles, evenly spaced.
_DEPTHS = 40
# Words of each kind in the list of common words, and how often they occur; fewer where the context is short.
_COMMON, _COMMON_TIMES, _RARE_TIMES = 10, 30, 3
# Exponent of the frequencies of coded words, and how many are asked for.
_ZETA, _FREQUENT = 2.0, 3
# Variables of a chain.
_CHAIN = 5


@dataclass(frozen=True)
class Question:
    """A question about a context.

    Attributes
    ----------
    text : str
        Follows the context.
    answer_prefix : str
        Begins the answer of the model.
    references : tuple of str
        What a complete answer contains. Of text to continue: the text.
    """

    text: str
    answer_prefix: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """A context with questions about it.

    Attributes
    ----------
    task : str
        One of `TASKS`.
    seed : int
        Number of the sample.
    context : str
        Instruction and haystack.
    questions : tuple of Question
    sequential : bool
        Whether the questions follow each other in one conversation; otherwise each is asked about the context alone.
    max_answer : int
        Tokens that an answer may have.
    """

    task: str
    seed: int
    context: str
    questions: tuple[Question, ...]
    sequential: bool = False
    max_answer: int = 0


@dataclass(frozen=True)
class _Draw:
    """What a task draws from.

    Attributes
    ----------
    random : random.Random
    text : str
        Haystack of essays.
    fits : callable
        Whether a text is no longer than the context may be.
    """

    random: random.Random
    text: str
    fits: Callable[[str], bool]


def draw_sample(task: str, seed: int, *, text: str, count_tokens: Callable[[str], int], length: int) -> Sample:
    """Draw one sample of a task.

    Parameters
    ----------
    task : str
        One of `TASKS`.
    seed : int
        Number of the sample.
    text : str
        Prose, in which needles are hidden or which is to be continued. At least a few times as long as the context.
    count_tokens : callable
        Number of tokens of a text, by the tokenizer of the model.
    length : int
        Tokens of context and question. The context is as long as fits, and sentences or words are not cut.

    Returns
    -------
    Sample

    Raises
    ------
    ImportError
        If wonderwords is not installed.
    ValueError
        If the task is unknown, or nothing fits into so few tokens, or the text is too short.

    Notes
    -----
    The tasks are those of Hsieh et al. 2024, with other wording where a prompt is longer than a sentence.

    Examples
    --------
    >>> sample = draw_sample("single_1", 0, text="", count_tokens=lambda x: len(x.split()), length=200)
    >>> sample.questions[0].references[0] in sample.context
    True
    """
    check_choice("task", task, TASKS)
    length = check_integer("length", length)
    drawn = random.Random(f"{task}, {length} tokens, {seed}")
    sample = _MAKERS[task](_Draw(drawn, text, lambda x: count_tokens(x) <= length))
    return replace(sample, task=task, seed=seed)


# Needles.


@dataclass(frozen=True)
class _Needles:
    """A task of needles in a haystack.

    Attributes
    ----------
    haystack : {"noise", "text", "needles"}
    keys, values : {"word", "number", "uuid"}
        What they look like.
    n_keys, n_values : int
        Keys hidden, and values of each.
    n_asked : int
        Keys asked for.
    together : bool
        Whether one question is about all of them.
    sequential : bool
        See `Sample`.
    """

    haystack: str
    keys: str = "word"
    values: str = "number"
    n_keys: int = 1
    n_values: int = 1
    n_asked: int = 1
    together: bool = True
    sequential: bool = False

    def __call__(self, draw: _Draw) -> Sample:
        kind = "uuids" if self.values == "uuid" else "numbers"
        keys = _different(draw.random, self.keys, self.n_keys)
        pairs = [(key, value) for key in keys for value in _different(draw.random, self.values, self.n_values)]
        asked = draw.random.sample(keys, self.n_asked)
        groups = [asked] if self.together else [[key] for key in asked]
        questions = tuple(_ask(group, pairs, kind) for group in groups)
        one = len(pairs) == 1 and self.haystack != "needles"
        what = f"A special magic {kind[:-1]} is" if one else f"Some special magic {kind} are"
        it = kind[:-1] if one else kind
        head = (
            f"{what} hidden within the following text. Make sure to memorize it. I will quiz you about the {it} "
            f"afterwards.\n"
        )
        lines = [_NEEDLE.format(kind=kind, key=key, value=value) for key, value in pairs]
        if self.haystack == "needles":
            units = _other_needles(draw.random, self.keys, self.values, kind, set(keys))
            between = "\n"
        else:
            units = (lambda n: [_NOISE] * n) if self.haystack == "noise" else _sentences_of(draw)
            between = "\n" if self.haystack == "noise" else " "
        depths = _depths(draw.random, len(lines))
        draw.random.shuffle(lines)

        def context(n: int) -> str:
            return head + between.join(_planted(units(n), lines, depths))

        longest = max((x.text + x.answer_prefix for x in questions), key=len)
        size = _fitted(lambda n: draw.fits(context(n) + longest))
        tokens = 48 if self.values == "uuid" else 16
        answer = tokens * max(len(x.references) for x in questions)
        return Sample("", 0, context(size), questions, self.sequential, answer)


def _ask(keys: Sequence[str], pairs: Sequence[tuple[str, str]], kind: str) -> Question:
    values = tuple(value for key, value in pairs if key in keys)
    names = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    if len(values) == 1:
        return Question(
            f"\nWhat is the special magic {kind[:-1]} for {names} mentioned in the provided text?",
            f" The special magic {kind[:-1]} for {names} mentioned in the provided text is",
            values,
        )
    return Question(
        f"\nWhat are all the special magic {kind} for {names} mentioned in the provided text?",
        f" The special magic {kind} for {names} mentioned in the provided text are",
        values,
    )


def _depths(drawn: random.Random, count: int) -> list[float]:
    """Draw different depths, from 0 to 1 in increasing order."""
    return [i / (_DEPTHS - 1) for i in sorted(drawn.sample(range(_DEPTHS), count))]


def _planted(units: list[str], lines: list[str], depths: list[float]) -> list[str]:
    """Put lines between units, at depths from 0 to 1 in increasing order."""
    planted, last = [], 0
    for line, depth in zip(lines, depths, strict=True):
        place = int(depth * len(units))
        planted += [*units[last:place], line]
        last = place
    return planted + units[last:]


def _sentences_of(draw: _Draw) -> Callable[[int], list[str]]:
    """Return a function that gives the next sentences of the text, from one drawn on; past the end it starts again."""
    sentences = _sentences(draw.text)
    start = draw.random.randrange(len(sentences))
    following = sentences[start:] + sentences[:start]

    def some(n: int) -> list[str]:
        if n > len(sentences):
            raise ValueError(
                f"the text has {len(sentences)} sentences and the context takes more: give a longer text, or a "
                f"smaller length"
            )
        return following[:n]

    return some


@lru_cache(maxsize=2)
def _sentences(text: str) -> list[str]:
    sentences = [x for x in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if x]
    if not sentences:
        raise ValueError("this task takes its words from a text, and the text is empty")
    return sentences


def _other_needles(
    drawn: random.Random, keys: str, values: str, kind: str, taken: set[str]
) -> Callable[[int], list[str]]:
    """Return a function that gives so many needles with other keys."""
    made: list[str] = []

    def some(n: int) -> list[str]:
        while len(made) < n:
            key = _one(drawn, keys)
            if key not in taken:
                taken.add(key)
                made.append(_NEEDLE.format(kind=kind, key=key, value=_one(drawn, values)))
        return made[:n]

    return some


# Variables, words, text.


def _variable_tracking(draw: _Draw) -> Sample:
    """Find the variables of a chain of assignments; an example comes first, as RULER gives one."""
    head = (
        "Memorize the chain of variable assignments hidden in the following text. Afterwards I will ask which "
        "variables have a value.\n"
    )
    example, answer = _chain(draw.random)
    shown = f"{' '.join(example)}\n{_which(answer[0])}{_which_prefix(answer[0])} {', '.join(answer[1])}.\n\n"
    lines, (value, names) = _chain(draw.random)
    question = Question(_which(value), _which_prefix(value), tuple(names))
    depths = _depths(draw.random, len(lines))

    def context(n: int) -> str:
        return head + shown + "\n".join(_planted([_NOISE] * n, lines, depths))

    size = _fitted(lambda n: draw.fits(context(n) + question.text + question.answer_prefix))
    return Sample("", 0, context(size), (question,), max_answer=8 * _CHAIN)


def _chain(drawn: random.Random) -> tuple[list[str], tuple[str, list[str]]]:
    value = str(drawn.randrange(10_000, 100_000))
    names: list[str] = []
    while len(names) < _CHAIN:
        name = "".join(drawn.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    lines = [f"VAR {names[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in pairwise(names)]
    return lines, (value, names)


def _which(value: str) -> str:
    return f"\nWhich variables have the value {value} in the text above?"


def _which_prefix(value: str) -> str:
    return f" The {_CHAIN} variables that have the value {value} are:"


def _common_words(draw: _Draw) -> Sample:
    """Find the ten words of a list that occur most often; where the context is short, each occurs less often."""
    words, order = draw.random.sample(_nouns(), len(_nouns())), draw.random.random()
    common, rare = words[:_COMMON], words[_COMMON:]
    head = "The following is a numbered list of words. Some of them occur more often. Memorize those.\n"
    question = Question(
        f"\nWhat are the {_COMMON} most common words in the list above?",
        f" The {_COMMON} most common words in the list are:",
        tuple(common),
    )

    def context(times: int, n: int) -> str:
        entries = common * times + rare[:n] * min(_RARE_TIMES, times - 1)
        random.Random(f"{order}, {times}, {n}").shuffle(entries)
        return head + " ".join(f"{i}. {word}" for i, word in enumerate(entries, 1))

    def fits(times: int, n: int) -> bool:
        return draw.fits(context(times, n) + question.text + question.answer_prefix)

    # At least as many other words as common ones.
    times = next((x for x in range(_COMMON_TIMES, 1, -1) if fits(x, _COMMON)), 0)
    if not times:
        raise ValueError("so few tokens hold no list of words: give a larger length")
    size = _fitted(lambda n: fits(times, n), most=len(rare))
    return Sample("", 0, context(times, size), (question,), max_answer=6 * _COMMON)


def _frequent_words(draw: _Draw) -> Sample:
    """Find the three most frequent of coded words, whose frequencies follow a zeta distribution."""
    words: list[str] = []
    while len(words) < 100:
        word = "".join(draw.random.choices(string.ascii_lowercase, k=6))
        if word not in words:
            words.append(word)
    weights, order = [(i + 1) ** -_ZETA for i in range(len(words))], draw.random.random()
    head = "Read the following coded text, and count how often each word occurs. Dots have no meaning.\n"
    question = Question(
        f"\nWhat are the {_FREQUENT} words that occur most often in the coded text above?",
        f" The {_FREQUENT} words that occur most often are:",
        tuple(words[:_FREQUENT]),
    )

    def context(n: int) -> str:
        # As often as expected, so that the order of frequencies is certain.
        total = sum(weights)
        entries = [word for word, weight in zip(words, weights, strict=True) for _ in range(int(n * weight / total))]
        random.Random(f"{order}, {n}").shuffle(entries)
        return head + " ".join(x for word in entries for x in (word, "..."))

    size = _fitted(lambda n: draw.fits(context(n) + question.text + question.answer_prefix))
    return Sample("", 0, context(size), (question,), max_answer=10 * _FREQUENT)


def _prose(draw: _Draw) -> Sample:
    """Continue a text: what follows the context is the reference, about a sixth as long."""
    some = _sentences_of(draw)

    def context(n: int) -> str:
        return " ".join(some(n))

    size = _fitted(lambda n: draw.fits(context(n)))
    more = some(size + max(1, size // 6))[size:]
    return Sample("", 0, context(size), (Question("", "", (" " + " ".join(more),)),))


# Draws, sizes.


def _one(drawn: random.Random, kind: str) -> str:
    if kind == "uuid":
        return str(uuid.UUID(int=drawn.getrandbits(128), version=4))
    if kind == "number":
        return str(drawn.randrange(10**6, 10**7))
    return f"{drawn.choice(_words('adjective'))}-{drawn.choice(_nouns())}"


def _different(drawn: random.Random, kind: str, n: int) -> list[str]:
    found: list[str] = []
    while len(found) < n:
        x = _one(drawn, kind)
        if x not in found:
            found.append(x)
    return found


def _nouns() -> list[str]:
    return _words("noun")


@cache
def _words(kind: str) -> list[str]:
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError(
            "subgen.evaluation.tasks needs wonderwords: pip install 'subgen-attention[evaluate]'"
        ) from error
    return sorted({x for x in RandomWord().filter(include_parts_of_speech=[f"{kind}s"]) if x.isalpha()})


def _fitted(fits: Callable[[int], bool], most: int | None = None) -> int:
    """Find the largest number that fits, at least 1; larger ones fit less."""
    if not fits(1):
        raise ValueError("the question and one unit of the haystack do not fit: give a larger length")
    high = 2
    while (most is None or high <= most) and fits(high):
        high *= 2
    high = high if most is None else min(high, most + 1)
    sizes = range(1, high)
    return sizes[bisect.bisect_left(sizes, True, lo=1, key=lambda n: not fits(n)) - 1]


_MAKERS: dict[str, Callable[[_Draw], Sample]] = {
    "single_1": _Needles("noise"),
    "single_2": _Needles("text"),
    "single_3": _Needles("text", values="uuid"),
    "multikey_1": _Needles("text", n_keys=4),
    "multikey_2": _Needles("needles"),
    "multikey_3": _Needles("needles", keys="uuid", values="uuid"),
    "multivalue": _Needles("text", n_values=4),
    "multiquery": _Needles("text", n_keys=4, n_asked=4),
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
    "prose": _prose,
    "questions": _Needles("text", n_keys=4, n_asked=4, together=False),
    "turns": _Needles("text", n_keys=2, n_asked=2, together=False, sequential=True),
}

#: Names of tasks: those of the paper, text to continue, several questions about one context, and two turns.
TASKS = tuple(_MAKERS)
