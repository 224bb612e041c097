"""Samples of long-context tasks, and scores of answers."""

from __future__ import annotations

import math
import random
import re

import pytest

from subgen.evaluation.scores import share_found, wilson_interval
from subgen.evaluation.tasks import TASKS, Sample, draw_sample

pytest.importorskip("wonderwords")

# Sentences of one to eight words that are no words of needles.
_RANDOM = random.Random(0)
TEXT = " ".join(
    " ".join(f"w{_RANDOM.randrange(5000)}" for _ in range(_RANDOM.randrange(1, 9))).capitalize() + "."
    for _ in range(3000)
)


def words(text: str) -> int:
    return len(text.split())


def drawn(task: str, seed: int = 0, length: int = 700) -> Sample:
    return draw_sample(task, seed, text=TEXT, count_tokens=words, length=length)


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_as_long_as_fits_and_states_what_it_asks_for(task: str) -> None:
    sample = drawn(task)
    assert (sample.task, sample.seed) == (task, 0)
    longest = max(words(sample.context + x.text + x.answer_prefix) for x in sample.questions)
    # The largest unit is a line of noise, of 20 words; coded words come in shares of the whole.
    assert 700 - 25 <= longest <= 700
    for question in sample.questions:
        assert question.references
        for reference in question.references:
            # Text to continue follows the context; all else is in it.
            assert (reference in sample.context) != (task == "prose")


@pytest.mark.parametrize("task", TASKS)
def test_equal_arguments_give_equal_samples_and_other_seeds_other_ones(task: str) -> None:
    assert drawn(task, 3) == drawn(task, 3)
    assert drawn(task, 3).questions != drawn(task, 4).questions


@pytest.mark.parametrize(
    ("task", "needles", "questions", "references"),
    [
        ("single_1", 1, 1, 1),
        ("single_2", 1, 1, 1),
        ("single_3", 1, 1, 1),
        ("multikey_1", 4, 1, 1),
        ("multivalue", 4, 1, 4),
        ("multiquery", 4, 1, 4),
        ("questions", 4, 4, 1),
        ("turns", 2, 2, 1),
    ],
)
def test_needles_are_hidden_between_units(task: str, needles: int, questions: int, references: int) -> None:
    sample = drawn(task)
    lines = re.findall(r"One of the special magic (?:numbers|uuids) for [\w-]+ is: [\w-]+\.", sample.context)
    assert len(lines) == needles
    assert len(sample.questions) == questions
    assert [len(x.references) for x in sample.questions] == [references] * questions
    assert sample.sequential == (task == "turns")
    rest = sample.context
    for line in lines:
        rest = rest.replace(line, "")
    assert "magic" not in rest.split("\n", 1)[1]


def test_a_haystack_of_needles_has_no_key_twice() -> None:
    for task in ("multikey_2", "multikey_3"):
        keys = re.findall(r"for ([\w-]+) is:", drawn(task).context)
        assert len(keys) == len(set(keys)) > 20


def test_depths_of_needles_cover_the_context() -> None:
    samples = [drawn("single_1", seed) for seed in range(60)]
    depths = [x.context.index("One of the special") / len(x.context) for x in samples]
    # 60 draws from 40 depths: that none is in the first or the last fifth has a probability below 1e-5.
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_variables_follow_from_one_to_the_next() -> None:
    sample = drawn("variable_tracking")
    (question,) = sample.questions
    first, *others = question.references
    value = re.search(r"VAR (\w+) = (\d+)(?!.*VAR \w+ = \d)", sample.context, re.DOTALL)
    assert value is not None
    assert value[1] == first
    assert value[2] in question.text
    lines = [f"VAR {name} = VAR {before}" for before, name in zip(question.references, others, strict=False)]
    places = [sample.context.index(line) for line in lines]
    assert places == sorted(places)


def test_common_words_are_more_common_than_all_others() -> None:
    sample = drawn("common_words")
    entries = re.findall(r"\d+\. (\w+)", sample.context)
    counts = {word: entries.count(word) for word in set(entries)}
    common = sample.questions[0].references
    assert len(common) == 10
    assert min(counts[x] for x in common) > max((n for x, n in counts.items() if x not in common), default=0)


def test_frequent_words_are_the_most_frequent() -> None:
    sample = drawn("frequent_words")
    entries = [x for x in sample.context.split("\n", 1)[1].split() if x != "..."]
    counts = sorted({x: entries.count(x) for x in set(entries)}.items(), key=lambda pair: -pair[1])
    assert tuple(word for word, _ in counts[:3]) == sample.questions[0].references


def test_prose_continues() -> None:
    sample = drawn("prose")
    following = sample.questions[0].references[0].strip()
    assert sample.context + " " + following in TEXT + " " + TEXT


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"task": "needle"}, "single_1"),
        ({"length": 0}, "at least 1"),
        ({"length": 12}, "larger length"),
        ({"text": ""}, "text is empty"),
        ({"text": "One. Two. Three."}, "longer text"),
        ({"task": "common_words", "length": 20}, "larger length"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, object], match: str) -> None:
    given = {"task": "single_2", "text": TEXT, "length": 700, **change}
    with pytest.raises(ValueError, match=match):
        draw_sample(given.pop("task"), 0, count_tokens=words, **given)  # type: ignore[arg-type]


def test_the_share_of_references_found() -> None:
    assert share_found("It is 12, and BLUE", ["blue", "12"]) == 1
    assert share_found("It is 12", ["blue", "12"]) == 0.5
    with pytest.raises(ValueError, match="at least one"):
        share_found("It is 12", [])


def test_the_interval_covers_the_true_share() -> None:
    """Exactly, by the binomial distribution: 95% on average over shares."""
    n, shares = 50, [i / 40 for i in range(1, 40)]
    intervals = [wilson_interval(k / n, n) for k in range(n + 1)]
    covered = [
        sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, (low, high) in enumerate(intervals) if low <= p <= high)
        for p in shares
    ]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.01)
    with pytest.raises(ValueError, match="mean"):
        wilson_interval(1.1, 5)
    with pytest.raises(ValueError, match="n must"):
        wilson_interval(0.5, 0)
