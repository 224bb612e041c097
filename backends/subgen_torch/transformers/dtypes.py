"""The dtype of a stream: one for all of its calls, whatever `torch.autocast` makes of queries, keys and values."""

from __future__ import annotations

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
    began_in_autocast : bool
        Whether the first call was under autocast.
    """

    stream: torch.dtype
    answer: torch.dtype
    began_in_autocast: bool

    @staticmethod
    def of(queries: Tensor, keys: Tensor, values: Tensor, before: Dtypes | None) -> Dtypes:
        """Return the dtypes of a call; ``before`` are those of the calls before it.

        Under autocast it is answered as by PyTorch's attention: in the dtype of autocast, except float64. Without
        autocast mixed dtypes are promoted.

        Raises
        ------
        TypeError
            If the dtype of the stream changed, and autocast is not the reason.
        """
        given = answer = queries.dtype
        if keys.dtype != given or values.dtype != given:
            given = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), values.dtype)
        autocast = _autocast_of(queries.device)
        if autocast is not None and given != torch.float64:
            given = answer = autocast
        if before is None:
            return Dtypes(given, answer, autocast is not None)
        if given != before.stream and autocast is None and not before.began_in_autocast:
            raise TypeError(
                f"the cache holds a stream of {before.stream}, got {given}: run the model in the dtype that it began "
                f"with, start another cache, or reset() this one"
            )
        return Dtypes(before.stream, answer, before.began_in_autocast)

    def cast(self, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return them in the dtype of the stream."""
        return queries.to(self.stream), keys.to(self.stream), values.to(self.stream)

    def answered(self, answer: Tensor) -> Tensor:
        """Return an answer in the dtype of this call."""
        return answer if answer.dtype == self.answer else answer.to(self.answer)


def _autocast_of(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast, if it is on for this kind of device."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype: torch.dtype = torch.get_autocast_dtype(kind)
        return dtype
    return None
