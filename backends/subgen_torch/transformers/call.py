"""Forward passes of models over a cache: what one does to the layers counts when all of it has succeeded."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .operation import Operation, StateLayer

__all__ = ["Call", "Calls", "HandOver"]


class Call:
    """One forward pass, layer after layer.

    Parameters
    ----------
    layers : sequence of StateLayer
    guarded : bool
        Whether a hook of the model says when the pass has succeeded (`Calls.end_guarded`). If not, it has when the
        last layer is done.
    """

    def __init__(self, layers: Sequence[StateLayer[Any]], guarded: bool) -> None:
        self.layers = layers
        self.guarded = guarded
        self.operation = Operation()
        self.thread = threading.get_ident()
        self.next = 0
        self.waiting: HandOver | None = None
        self.over = False

    @staticmethod
    def alone(layer: StateLayer[Any]) -> Call:
        """Return a pass over one layer, at its turn."""
        call = Call([layer], guarded=False)
        call.next = 1
        return call

    @property
    def complete(self) -> bool:
        """Whether every layer is done."""
        return self.next == len(self.layers) and self.waiting is None

    def hand_over(self, layer: StateLayer[Any]) -> HandOver:
        """Note that a layer's new keys and values are on their way to attention."""
        self.waiting = HandOver(self, layer)
        return self.waiting

    def propose(self, layer: StateLayer[Any], state: Any) -> None:
        """Note what a layer is after this pass."""
        layer.propose(self.operation, state)
        self.waiting = None
        if self.complete and not self.guarded:
            self.finish()

    def finish(self) -> None:
        """Make what was proposed count, in all layers at once."""
        self.operation.finished = True
        self.over = True
        for layer in self.layers:
            layer.settle()

    def abandon(self) -> None:
        """Drop the proposals: the layers keep the state before the pass."""
        self.over = True
        self.waiting = None
        for layer in self.layers:
            layer.drop(self.operation)


class HandOver:
    """New keys and values of a layer on their way from the cache to attention, which calls `attend`.

    Parameters
    ----------
    call : Call
    layer : StateLayer
    """

    __slots__ = ("call", "layer")

    def __init__(self, call: Call, layer: StateLayer[Any]) -> None:
        self.call = call
        self.layer = layer

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Answer the tokens, and propose the layer's state after them; see `SubGenLayer.answered`.

        Raises
        ------
        RuntimeError
            If another call began meanwhile.
        """
        if self.call.over or self.call.waiting is not self:
            raise RuntimeError(_TWO_CALLS)
        answer: Tensor
        answer, state = self.layer.answered(queries, keys, values, mask, scale)
        self.call.propose(self.layer, state)
        return answer

    def abandon(self) -> None:
        """Give up the whole pass."""
        self.call.abandon()


class Calls:
    """The forward passes over one cache, one at a time.

    Parameters
    ----------
    layers : list of StateLayer
        Of the cache.
    """

    def __init__(self, layers: list[StateLayer[Any]]) -> None:
        self.layers = layers
        self._current: Call | None = None
        # The thread in which a model is called that will say when it is done, until its first layer begins a pass.
        self._guard: int | None = None
        self._succeeded = 0

    @property
    def succeeded(self) -> int:
        """Passes that succeeded since the cache was empty."""
        return self._succeeded + (self._current is not None and self._current.operation.finished)

    def forget(self) -> None:
        """Drop the current pass and its counts: the cache is reset."""
        if self._current is not None:
            self._current.abandon()
        self._current, self._guard, self._succeeded = None, None, 0

    def next_layer(self, number: int) -> Call:
        """Return the pass that a layer's new keys belong to; the first layer begins one.

        Raises
        ------
        RuntimeError
            If the keys of an earlier layer were never attended to, an earlier pass did not end, or another
            layer comes next. The layers keep the state before the pass.
        """
        call = self._begin() if number == 0 else self._current
        if call is None or call.over or call.thread != threading.get_ident():
            raise RuntimeError(_TWO_CALLS)
        if call.waiting is not None:
            call.abandon()
            raise RuntimeError(f"layer {number - 1} {_NOT_TAKEN}")
        if number != call.next:
            call.abandon()
            raise RuntimeError(
                f"the model handed over the keys of layer {number}, where those of layer {call.next} come next, of "
                f"{len(self.layers)}: a SubGenCache is for models that run each of the layers in their config once, "
                f"from first to last. Use the model's own cache"
            )
        call.next += 1
        return call

    def _begin(self) -> Call:
        before, guarded = self._current, self._guard == threading.get_ident()
        if before is not None and not before.over and not guarded:
            if before.waiting is not None and not before.guarded:
                raise RuntimeError(f"layer {before.next - 1} {_NOT_TAKEN}. The cache must be reset() before it is used")
            before.abandon()
            raise RuntimeError(
                "an earlier call of the model did not end: an error or an interrupt stopped it, another thread is "
                "still in it, or the model runs its layers twice in a call. The cache keeps the state before it: "
                "repeat the call"
            )
        self._succeeded = self.succeeded
        if guarded:
            self._guard = None
        self._current = Call(self.layers, guarded)
        return self._current

    def begin_guarded(self) -> None:
        """Note that a model is called which will say when it is done."""
        if self._current is not None and self._current.guarded and not self._current.over:
            self._current.abandon()
        self._guard = threading.get_ident()

    def end_guarded(self, failed: bool) -> None:
        """Note that a model is done.

        Raises
        ------
        RuntimeError
            If it has not run all layers, or if another thread used the cache meanwhile.
        """
        thread, call = threading.get_ident(), self._current
        if self._guard == thread:  # the model did not use the cache
            self._guard = None
            return
        if call is None:
            return
        if failed:
            if call.thread == thread and not call.over:
                call.abandon()
            return
        if call.thread != thread or (call.over and not call.operation.finished):
            raise RuntimeError(_TWO_CALLS)
        if call.over:
            return
        if not call.complete:
            number, waiting = call.next - 1, call.waiting
            call.abandon()
            if waiting is not None:
                raise RuntimeError(f"layer {number} {_NOT_TAKEN}")
            raise RuntimeError(
                f"the model's call ended after layer {number} of {len(self.layers)}: a SubGenCache is for models that "
                f"run each of the layers in their config once. The cache keeps the state before the call"
            )
        call.finish()

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_current": None, "_guard": None, "_succeeded": self.succeeded}


_TWO_CALLS = (
    "two calls of the model use this SubGenCache at once, or one of its layers alone was called: make one call after "
    "the other, and give each thread its own cache (copy.deepcopy). The cache keeps the state before this call"
)
_NOT_TAKEN = (
    "received keys that no attention call used: the answers would be silently wrong. SubGenCache needs "
    "subgen_torch.transformers.enable(model) first; if the model is enabled, its family changes keys between the cache "
    "and attention and cannot use a SubGenCache"
)
