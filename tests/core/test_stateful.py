"""A pool of sketches, and anything that can be done to them, in any order; beside each, all of its tokens.

The model of a sketch is the list of its tokens: whatever happened on the way, the sketch is to the last bit the one
that reads these tokens from scratch, and while nothing has been absorbed it is exact attention. Longer: ``make fuzz``.
"""

from __future__ import annotations

import copy
import itertools
import pickle
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from sketches import VARIANTS, assert_same, feed, make, stream

import subgen
from subgen import AttentionSketch, attention

# Tokens that there are, by number; a sketch may see one several times.
TOKENS, MOST = 300, 400
SIZES = st.sampled_from([0, 1, 1, 1, 2, 3, 7, 8, 9, 30, 64])
WAYS = ("copy", "deepcopy", "pickle", "file")


@dataclass(frozen=True)
class Model:
    """What a sketch has seen.

    Attributes
    ----------
    tokens : tuple of int
    has_query : tuple of bool
        Whether each came with its query.
    rows : tuple of int
        Rows of the batch, by those of the stream.
    merged : tuple of Model
        What the first tokens were merged from; none or two.
    """

    tokens: tuple[int, ...] = ()
    has_query: tuple[bool, ...] = ()
    rows: tuple[int, ...] = (0, 1)
    merged: tuple[Model, ...] = ()

    def more(self, tokens: list[int], with_queries: bool) -> Model:
        has_query = (*self.has_query, *[with_queries] * len(tokens))
        return replace(self, tokens=(*self.tokens, *tokens), has_query=has_query)


class Pool(RuleBasedStateMachine):
    """Rules append to `sketches` and `models` in step."""

    def __init__(self) -> None:
        super().__init__()
        self.sketches: list[AttentionSketch] = []
        self.models: list[Model] = []
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        for i in range(len(self.sketches)):
            self.is_what_its_tokens_make(i)
        self.folder.cleanup()

    @initialize(
        variant=st.sampled_from(["default", "paper", *VARIANTS]),
        dtype=st.sampled_from(["float16", "float32", "float64"]),
        seed=st.integers(0, 2**32),
    )
    def begin(self, variant: str, dtype: str, seed: int) -> None:
        self.variant = variant
        self.q, self.k, self.v = (x.astype(dtype) for x in stream(seed, (2, 2), TOKENS, group=2))
        self.add(make(variant), Model())

    def add(self, sketch: AttentionSketch, model: Model) -> None:
        if len(self.sketches) < 5:
            self.sketches.append(sketch)
            self.models.append(model)
        else:
            self.sketches[-1], self.models[-1] = sketch, model

    def block(self, model: Model, tokens: Any) -> list[np.ndarray]:
        """Queries, keys and values of tokens, for the rows of a sketch."""
        return [x[list(model.rows)][..., list(tokens), :] for x in (self.q, self.k, self.v)]

    def rebuilt(self, model: Model) -> AttentionSketch:
        """From scratch: in one pass, or one for each run of tokens with queries, or without."""
        sketch, start = make(self.variant), sum(len(part.tokens) for part in model.merged)
        if model.merged:
            sketch = subgen.merge(*(self.rebuilt(replace(part, rows=model.rows)) for part in model.merged))
        for with_queries, run in itertools.groupby(model.has_query[start:]):
            size = len(list(run))
            q, k, v = self.block(model, model.tokens[start : start + size])
            sketch.update(k, v, queries=q if with_queries else None)
            start += size
        return sketch

    def is_what_its_tokens_make(self, i: int) -> None:
        sketch, model = self.sketches[i], self.models[i]
        again = self.rebuilt(model)
        assert sketch.n_seen == len(model.tokens)
        assert repr(sketch) == repr(again)
        if self.variant != "paper" and model.tokens:
            assert_same(sketch.state, again.state)
        if model.tokens:
            q, _, _ = self.block(model, range(3))
            np.testing.assert_array_equal(sketch.attend(q), again.attend(q))

    def one(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.sketches) - 1), label="sketch")

    def is_exact(self, model: Model) -> bool:
        """Whether sinks and window, of 2 and 8 tokens, still hold everything."""
        return self.variant != "paper" and len(model.tokens) <= 10

    def tolerance(self) -> float:
        return 2e-3 if self.k.dtype == np.float16 else 1e-5

    @rule(data=st.data(), n=SIZES, first=st.integers(0, TOKENS - 1), with_queries=st.booleans())
    def update(self, data: st.DataObject, n: int, first: int, with_queries: bool) -> None:
        i = self.one(data)
        sketch, model = self.sketches[i], self.models[i]
        if len(model.tokens) + n > MOST:
            return
        tokens = [(first + j) % TOKENS for j in range(n)]
        q, k, v = self.block(model, tokens)
        if n == 0:
            self.refuses(i, ValueError, lambda: sketch.update(k, v, queries=q if with_queries else None))
            return
        sketch.update(k, v, queries=q if with_queries else None)
        self.models[i] = model.more(tokens, with_queries)

    @rule(data=st.data(), n=SIZES, first=st.integers(0, TOKENS - 1))
    def step(self, data: st.DataObject, n: int, first: int) -> None:
        i = self.one(data)
        sketch, model = self.sketches[i], self.models[i]
        if len(model.tokens) + n > MOST:
            return
        tokens = [(first + j) % TOKENS for j in range(n)]
        q, k, v = self.block(model, tokens)
        if n == 0:
            self.refuses(i, ValueError, lambda: sketch.step(q, k, v))
            return
        out = sketch.step(q, k, v)
        self.models[i] = model = model.more(tokens, True)
        assert out.shape == (*q.shape[:-1], v.shape[-1])
        assert np.isfinite(out).all()
        if self.is_exact(model):
            _, k, v = self.block(model, model.tokens)
            np.testing.assert_allclose(out, attention(q, k, v, causal=True), rtol=0, atol=self.tolerance())

    @rule(data=st.data(), m=st.integers(0, 40), first=st.integers(0, TOKENS - 1))
    def attend(self, data: st.DataObject, m: int, first: int) -> None:
        i = self.one(data)
        sketch, model = self.sketches[i], self.models[i]
        q, _, _ = self.block(model, [(first + j) % TOKENS for j in range(m)])
        if not model.tokens or m == 0:
            self.refuses(i, RuntimeError if not model.tokens else ValueError, lambda: sketch.attend(q))
            return
        state = sketch.state
        out = sketch.attend(q)
        assert sketch.state is state
        assert np.isfinite(out).all()
        if self.is_exact(model):
            _, k, v = self.block(model, model.tokens)
            np.testing.assert_allclose(out, attention(q, k, v), rtol=0, atol=self.tolerance())

    @rule(data=st.data(), way=st.sampled_from(WAYS), replaces=st.booleans())
    def again(self, data: st.DataObject, way: str, replaces: bool) -> None:
        """Copy, pickle, or save and load; go on with both, or with the new one alone."""
        i = self.one(data)
        sketch = self.sketches[i]
        if way == "file":
            path = Path(self.folder.name) / "a.safetensors"
            sketch.save(path)
            other = subgen.load(path)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(sketch))
        else:
            other = getattr(copy, way)(sketch)
        if replaces:
            self.sketches[i] = other
        else:
            self.add(other, self.models[i])

    @rule(data=st.data(), rows=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def take(self, data: st.DataObject, rows: list[int]) -> None:
        i = self.one(data)
        sketch, model = self.sketches[i], self.models[i]
        rows = [row % len(model.rows) for row in rows]
        if not model.tokens:
            self.refuses(i, RuntimeError, lambda: sketch.take(rows))
            return
        if self.variant == "bytes":
            return  # the budget is that of all rows together: other rows, other clusters
        if self.variant == "paper" or "delta" in VARIANTS.get(self.variant, {}):
            # Arrays have room for the row with most clusters; the others keep it when they are taken alone.
            rows = [*rows, *(row for row in range(len(model.rows)) if row not in rows)]
        self.add(sketch.take(rows), replace(model, rows=tuple(model.rows[row] for row in rows)))

    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        i, j = self.one(data), self.one(data)
        pair, models = (self.sketches[i], self.sketches[j]), (self.models[i], self.models[j])
        tokens, has_query = (sum((getattr(model, name) for model in models), ()) for name in ("tokens", "has_query"))
        if len(tokens) > MOST:
            return
        filled = all(model.tokens for model in models)
        if filled and len(models[0].rows) != len(models[1].rows):
            for number in (i, j):
                self.refuses(number, ValueError, lambda: subgen.merge(*pair))
            return
        if filled and models[0].rows != models[1].rows:
            return  # of different streams, which nobody can tell
        rows = models[0].rows if models[0].tokens else models[1].rows
        states = [sketch.state for sketch in pair]
        self.add(subgen.merge(*pair), Model(tokens, has_query, rows, models))
        assert all(sketch.state is state for sketch, state in zip(pair, states, strict=True))

    @precondition(lambda self: any(model.tokens for model in self.models))
    @rule(
        data=st.data(), how=st.sampled_from(["nan", "dtype", "heads", "head_dim", "queries", "list", "rows", "length"])
    )
    def bad_call(self, data: st.DataObject, how: str) -> None:
        i = data.draw(st.sampled_from([i for i, model in enumerate(self.models) if model.tokens]))
        sketch = self.sketches[i]
        q, k, v = self.block(self.models[i], range(5))
        bad: dict[str, Any] = {
            "nan": (np.where(np.arange(5)[:, None] == 3, np.nan, k).astype(k.dtype), v, q),
            "dtype": (k.astype(np.longdouble), v.astype(np.longdouble), None),
            "heads": (k[:, :1], v[:, :1], None),
            "head_dim": (k[..., :3], v, None),
            "queries": (k, v, q[:, :3]),
            "list": (k.tolist(), v, None),
            "rows": (np.concatenate([k, k]), np.concatenate([v, v]), None),
            "length": (k, v[..., :4, :], None),
        }
        self.refuses(i, (ValueError, TypeError), lambda: feed(sketch, *bad[how]))
        keys, values, queries = bad[how]
        self.refuses(i, (ValueError, TypeError), lambda: sketch.step(q if queries is None else queries, keys, values))

    def refuses(self, i: int, kind: Any, call: Any) -> None:
        """A call raises, and the sketch is as it was."""
        sketch = self.sketches[i]
        before = sketch.state, sketch.layout
        with pytest.raises(kind):
            call()
        assert sketch.state is before[0]
        assert sketch.layout is before[1]

    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        self.is_what_its_tokens_make(self.one(data))


TestPool = Pool.TestCase
TestPool.settings = settings(
    settings.default, stateful_step_count=40, max_examples=max(60, settings.default.max_examples)
)
