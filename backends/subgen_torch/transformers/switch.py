"""Switching a model to the attention "subgen", and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from .call import Calls
from .families import refuse_model

__all__ = ["NAME", "check_model", "disable", "enable", "switched"]

#: The name of the attention in transformers.
NAME = "subgen"


def enable(model: Any) -> None:
    """Switch a model's attention to "subgen": plain attention, until it is given a `SubGenCache`.

    All parts of a model of several (vision, audio, text) are switched; the plain attention is transformers' "sdpa".
    Two hooks on the model notify a SubGenCache when a forward pass begins and when it has succeeded.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Raises
    ------
    TypeError
        If it is not a model.
    ValueError
        If the model is of a family that cannot work; the message says why.
    """
    check_model("enable", model)
    refuse_model(model)
    before = [(config, config._attn_implementation) for config in _configs(model)]
    known = [pair for pair in _previous(model) if pair[0]._attn_implementation == NAME]
    if any(name != NAME for _, name in before):
        model.set_attn_implementation(NAME)
        model._subgen_previous = known + [pair for pair in before if pair[1] != NAME]
    if getattr(model, "_subgen_hooks", None) is None:
        model._subgen_hooks = (
            model.register_forward_pre_hook(_begin, with_kwargs=True),
            model.register_forward_hook(_end, with_kwargs=True, always_call=True),
        )


def disable(model: Any) -> None:
    """Give each part of a model back the attention it had before `enable`.

    Parameters
    ----------
    model : transformers.PreTrainedModel

    Raises
    ------
    TypeError
        If it is not a model.
    """
    check_model("disable", model)
    # A part that was switched to another attention since then keeps it.
    previous = {id(config): name for config, name in _previous(model) if config._attn_implementation == NAME}
    names = [(config, previous.get(id(config), config._attn_implementation)) for config in _configs(model)]
    for config, name in names:
        config._attn_implementation = name  # also that of its parts, which come after it
    for handle in getattr(model, "_subgen_hooks", None) or ():
        handle.remove()
    model._subgen_previous = model._subgen_hooks = None


def _previous(model: Any) -> list[tuple[Any, str | None]]:
    """Return the attention that parts of a model had before `enable`."""
    return getattr(model, "_subgen_previous", None) or []


def _configs(model: Any) -> list[Any]:
    """Return the configurations of a model and of its parts, each once, after the one that it is a part of."""
    found: dict[int, Any] = {}

    def walk(config: Any) -> None:
        if isinstance(config, PretrainedConfig) and id(config) not in found:
            found[id(config)] = config
            for name in getattr(config, "sub_configs", {}):
                walk(getattr(config, name, None))

    walk(model.config)
    for part in model.modules():
        walk(getattr(part, "config", None) if isinstance(part, PreTrainedModel) else None)
    return list(found.values())


@contextmanager
def switched(model: Any, name: str) -> Iterator[None]:
    """Switch a model to another attention inside the block, and back."""
    before = [(config, config._attn_implementation) for config in _configs(model)]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for config, previous in before:
            config._attn_implementation = previous  # also that of its parts, which come after it


def check_model(name: str, model: Any) -> None:
    """Refuse what is not a model of transformers."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "set_attn_implementation"):
        what = "its configuration" if isinstance(model, PretrainedConfig) else type(model).__name__
        raise TypeError(f"{name} takes a model of transformers, got {what}: pass the model itself, {name}(model)")


@torch.compiler.disable
def _begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for calls in _calls(args, kwargs):
        calls.begin_guarded()


@torch.compiler.disable
def _end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    for calls in _calls(args, kwargs):
        calls.end_guarded(failed=output is None)


def _calls(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Calls]:
    for value in (*kwargs.values(), *args):
        if isinstance(value, Cache) and isinstance(calls := getattr(value, "_calls", None), Calls):
            yield calls
