"""The dtype of a stream: one for all of its calls, whatever `torch.autocast` makes of queries, keys and values."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dtypes"]


@dataclass(frozen=True)
class Dtypes:
    """Of one call of a stream.

    Attributes
    ----------
    stream : torch.dtype
        In which tokens are absorbed, since the first call.
    answer : torch.dtype
        In which this call is answered.
    autocast : str or None
        The kind of device whose autocast is on.
    began_in_autocast : bool
        Whether the first call was under autocast.
    """

    stream: torch.dtype
    answer: torch.dtype
    autocast: str | None
    began_in_autocast: bool

    @staticmethod
    def of(queries: Tensor, keys: Tensor, values: Tensor, before: Dtypes | None) -> Dtypes:
        """Return the dtypes of a call; ``before`` are those of the calls before it.

        Under autocast it is answered as PyTorch's attention would: in the dtype of autocast, but for float64. Without
        autocast mixed dtypes are promoted.

        Raises
        ------
        TypeError
            If the dtype of the stream changed, and autocast is not the reason.
        """
        autocast = None
        given = queries.dtype
        if keys.dtype != given or values.dtype != given:
            given = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), values.dtype)
        answer = queries.dtype
        device = queries.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            autocast = device
            if given != torch.float64:
                given = answer = torch.get_autocast_dtype(device)
        if before is None:
            return Dtypes(given, answer, autocast, autocast is not None)
        if given != before.stream and autocast is None and not before.began_in_autocast:
            raise TypeError(
                f"the cache holds a stream of {before.stream}, got {given}: run the model in the dtype that it began "
                f"with, start another cache, or reset() this one"
            )
        return Dtypes(before.stream, answer, autocast, before.began_in_autocast)

    def cast(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return them in the dtype of the stream."""
        return queries.to(self.stream), keys.to(self.stream), values.to(self.stream)

    def answered(self, answer: Tensor) -> Tensor:
        """Return an answer in the dtype of this call."""
        return answer if answer.dtype == self.answer else answer.to(self.answer)

    def without_autocast(self) -> AbstractContextManager[None]:
        """Compute in the dtypes that tensors have: a sketch widens where it must."""
        if self.autocast is None:
            return nullcontext()
        context: AbstractContextManager[None] = torch.autocast(self.autocast, enabled=False)
        return context
