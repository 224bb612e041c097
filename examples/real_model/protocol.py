"""Ask a model about contexts that are held in compressed caches, and score the answers.

`evaluate.py` and `presses.py` run it, each in an environment of its own, on the same samples. A context is read once
with exact attention; every method then compresses the same keys and values. Two protocols: the context alone is
compressed and the question follows ("question excluded"), or the question is part of what is compressed ("question
included") and only the answer follows.
"""

from __future__ import annotations

import copy
import inspect
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from subgen.evaluation.scores import share_found
from subgen.evaluation.tasks import Question, Sample, draw_sample

__all__ = [
    "EXACT",
    "Budgets",
    "Filled",
    "Folder",
    "Haystack",
    "Lengths",
    "Protocols",
    "Row",
    "Samples",
    "Tasks",
    "cache_name",
    "load",
    "numbers",
    "read",
    "read_rows",
    "run",
]

EXACT = "exact cache"
_PROTOCOLS = ("excluded", "included")

# Arguments and options of both programs.
Folder = Annotated[Path, typer.Argument(help="Of a model of transformers, with its tokenizer.")]
Haystack = Annotated[Path, typer.Argument(help="A text file, or a folder of .txt files.")]
Tasks = Annotated[str, typer.Option(help="Names, with commas; see subgen.evaluation.tasks.")]
Lengths = Annotated[str, typer.Option(help="Tokens of context and question, with commas.")]
Budgets = Annotated[str, typer.Option(help="Shares of the bytes kept, with commas.")]
Protocols = Annotated[str, typer.Option(help="excluded, included, or both with a comma.")]
Samples = Annotated[int, typer.Option(help="Of each task, length and protocol.")]
# Tokens of a reference that are scored.
_SCORED = 256
# Stands between context and question while the chat template is applied.
_CUT = "\N{SYMBOL FOR UNIT SEPARATOR}"


@dataclass(frozen=True)
class Filled:
    """A cache that has read a context.

    Attributes
    ----------
    method : str
    kept : float
        Share of the bytes of an exact cache that the method was to keep.
    cache : transformers.Cache
    nbytes : int
        Bytes held.
    seconds : float
        To read the context and compress it.
    answering : callable
        Gives a context manager in which the model must run.
    """

    method: str
    kept: float
    cache: Any
    nbytes: int
    seconds: float
    answering: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


@dataclass(frozen=True)
class Row:
    """The answer of one method to one question.

    Attributes
    ----------
    method, kept, nbytes, prompt_seconds
        See `Filled`.
    protocol, task : str
    length, seed, question : int
        Tokens of the context asked for, number of the sample and of the question.
    tokens : int
        Read, of the context.
    exact_nbytes : int
        Bytes of an exact cache of the context.
    found : float or None
        Share of the references in the answer; ``None`` for text to continue.
    loss : float
        Nats a token, on the right answer.
    token_seconds : float or None
        To generate a token of the answer.
    answer : str
    """

    method: str
    kept: float
    protocol: str
    task: str
    length: int
    seed: int
    question: int
    tokens: int
    nbytes: int
    exact_nbytes: int
    prompt_seconds: float
    found: float | None
    loss: float
    token_seconds: float | None
    answer: str

    @property
    def sample(self) -> tuple[str, str, int, int]:
        """What is done once for all methods."""
        return (self.protocol, self.task, self.length, self.seed)


def load(folder: Path, *, dtype: str = "float32") -> tuple[Any, Any]:
    """Load a model and its tokenizer."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def read(model: Any, ids: Tensor, cache: Any, start: int) -> Tensor:
    """Read tokens at positions from ``start`` on, after those that a cache holds.

    Returns
    -------
    Tensor, shape (rows, tokens, vocabulary)
        Logits.
    """
    # A cache that dropped tokens does not know how long the context was.
    places = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    logits: Tensor = model(ids, **{cache_name(model): cache}, position_ids=places, use_cache=True).logits
    return logits


def cache_name(model: Any) -> str:
    """Return the name of the argument: transformers 5.24 renamed it, and the presses run on an older release."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _read_text(path: Path) -> str:
    """Read a text file, or all in a folder in the order of their names."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def numbers(listed: str) -> list[float]:
    """Read numbers with commas; none from an empty text."""
    return [float(x) for x in listed.split(",") if x]


def read_rows(path: Path) -> list[Row]:
    """Read what earlier runs have written; a line that an interrupted run left unfinished is dropped."""
    if not path.exists():
        return []
    text = path.read_text()
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    return [Row(**json.loads(line)) for line in text.splitlines()]


def run(
    model: Any,
    tokenizer: Any,
    fill: Callable[[Tensor], Iterator[Filled]],
    *,
    tasks: Tasks,
    lengths: Lengths,
    protocols: Protocols,
    samples: Samples,
    text: Haystack,
    path: Path,
) -> None:
    """Ask all questions, and append a line of JSON for each answer; samples that are in the file are left out.

    Parameters
    ----------
    model, tokenizer
        From `load`.
    fill : callable
        From the tokens of a context, shape (1, n), to the caches of all methods, one after the other.
    tasks, lengths, protocols, samples, text
        See the options.
    path : Path
        Where the lines are.
    """
    haystack = _read_text(text)
    done = {row.sample for row in read_rows(path)}
    # Samples first: a run that is stopped has some of every task.
    wanted = [
        (protocol, task, length, seed)
        for seed in range(samples)
        for length in map(int, lengths.split(","))
        for protocol in _PROTOCOLS
        if protocol in protocols.split(",")
        for task in tasks.split(",")
        if not (protocol == "included" and task in ("prose", "questions", "turns"))
    ]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    path.parent.mkdir(parents=True, exist_ok=True)
    with Progress(*columns) as progress, torch.inference_mode():
        job = progress.add_task("", total=len(wanted))
        for key in wanted:
            protocol, task, length, seed = key
            progress.update(job, description=f"{task}, {length} tokens")
            if key not in done:
                sample = draw_sample(
                    task, seed, text=haystack, count_tokens=lambda x: _count(tokenizer, x), length=length
                )
                rows = list(_ask_all(model, tokenizer, fill, sample, protocol, length))
                with path.open("a") as file:
                    file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
            progress.advance(job)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def _ids(tokenizer: Any, text: str) -> Tensor:
    ids: Tensor = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    return ids.long()


def _parts(tokenizer: Any, sample: Sample, protocol: str) -> tuple[str, list[str]]:
    """Cut a prompt into what is compressed, and what follows for each question, in the words of the chat template."""
    first = sample.questions[0]
    if not first.text:
        return sample.context, [""]
    message = [{"role": "user", "content": sample.context + _CUT + first.text}]
    template = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    context, rest = template.split(_CUT)
    end = rest.removeprefix(first.text)
    if protocol == "included":
        return context + first.text + end, [first.answer_prefix]
    following = [question.text + end + question.answer_prefix for question in sample.questions]
    if sample.sequential:
        # The turn before ends, and the user speaks again, as the template says it.
        both = [*message, {"role": "assistant", "content": _CUT}, {"role": "user", "content": _CUT}]
        _, _, between, _ = tokenizer.apply_chat_template(both, tokenize=False, add_generation_prompt=True).split(_CUT)
        following = [following[0], *(between + x.lstrip("\n") for x in following[1:])]
    return context, following


def _ask_all(
    model: Any, tokenizer: Any, fill: Callable[[Tensor], Iterator[Filled]], sample: Sample, protocol: str, length: int
) -> Iterator[Row]:
    context, following = _parts(tokenizer, sample, protocol)
    ids = _ids(tokenizer, context)
    exact_nbytes = 0
    for filled in fill(ids):
        if filled.method == EXACT:
            exact_nbytes = filled.nbytes
        with filled.answering():
            for number, answer in enumerate(_answers(model, tokenizer, filled.cache, ids.shape[1], sample, following)):
                yield Row(
                    filled.method,
                    filled.kept,
                    protocol,
                    sample.task,
                    length,
                    sample.seed,
                    number,
                    ids.shape[1],
                    filled.nbytes,
                    exact_nbytes,
                    filled.seconds,
                    **answer,
                )


def _answers(
    model: Any, tokenizer: Any, cache: Any, start: int, sample: Sample, following: Sequence[str]
) -> Iterable[dict[str, Any]]:
    for number, (question, text) in enumerate(zip(sample.questions, following, strict=False)):
        last = number == len(following) - 1
        own = cache if sample.sequential or last else copy.deepcopy(cache)
        answer, start_after = _answer(model, tokenizer, own, start, question, text, sample.max_answer)
        start = start_after if sample.sequential else start
        yield answer


def _answer(
    model: Any, tokenizer: Any, cache: Any, start: int, question: Question, text: str, most: int
) -> tuple[dict[str, Any], int]:
    """Score the right answer and a generated one; return the position behind the latter, too."""
    ids = _ids(tokenizer, text) if text else torch.zeros((1, 0), dtype=torch.long)
    right = _ids(tokenizer, _right(question))[:, :_SCORED]
    if not most:
        logits = read(model, right, cache, start)[0, :-1]
        loss = float(cross_entropy(logits.float(), right[0, 1:]))
        return {"found": None, "loss": loss, "token_seconds": None, "answer": ""}, start
    first = read(model, ids, cache, start)[:, -1:]
    start += ids.shape[1]
    more = read(model, right[:, :-1], copy.deepcopy(cache), start)
    loss = float(cross_entropy(torch.cat([first, more], dim=1)[0].float(), right[0]))
    began, said, found, logits = time.perf_counter(), [], 0.0, first
    # Once all references are in the answer the rest of it changes nothing.
    while len(said) < most and found < 1:
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
        logits = read(model, torch.tensor([[token]]), cache, start + len(said) - 1)
        found = share_found(tokenizer.decode(said), question.references)
    seconds = (time.perf_counter() - began) / max(1, len(said))
    answer = {"found": found, "loss": loss, "token_seconds": seconds, "answer": tokenizer.decode(said)}
    return answer, start + len(said)


def _right(question: Question) -> str:
    return question.references[0] if not question.text else " " + ", ".join(question.references)
