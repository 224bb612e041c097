"""The directive ``command-line``: every command of ``subgen`` with its options, read from the program itself."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective
from typer.models import ArgumentInfo

from subgen.__main__ import app as program


class CommandLine(SphinxDirective):
    """A section for each command: what it does, how it is called, and its arguments and options."""

    def run(self) -> list[nodes.Node]:
        """Make the sections."""
        return [
            self._section(command.name or command.callback.__name__, command.callback)
            for command in program.registered_commands
            if command.callback is not None
        ]

    def _section(self, name: str, function: Callable[..., Any]) -> nodes.section:
        section = nodes.section(ids=[f"subgen-{name}"])
        section += nodes.title(text=f"subgen {name}")
        for paragraph in (inspect.getdoc(function) or "").split("\n\n"):
            section += nodes.paragraph(text=" ".join(paragraph.split()))
        rows = list(_rows(function))
        arguments = "".join(f" {names}" if stated else f" [{names}]" for names, _, _, stated in rows if names.isupper())
        usage = f"subgen {name}{arguments}{' [OPTIONS]' if rows else ''}"
        section += nodes.literal_block(usage, usage, language="none")
        if rows:
            listing = nodes.definition_list(classes=["options"])
            listing.extend(_item(names, kind, words) for names, kind, words, _ in rows)
            section += listing
        return section


def _rows(function: Callable[..., Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield names, type, words, and whether it must be given, of each argument and option."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        flag = "--" + name.replace("_", "-")
        names = name.upper() if isinstance(info, ArgumentInfo) else ", ".join(info.param_decls or [flag])
        default = parameter.default
        required = default is inspect.Parameter.empty
        stated = "" if required or default is None or default is False else f" Default: {default}."
        yield names, _kind(kind), f"{info.help}{stated}", required


def _kind(kind: Any) -> str:
    """Name a type as a reader would: without None, and nothing for a flag."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(typing.get_args(kind))
    if typing.get_origin(kind) is list:
        kind = typing.get_args(kind)[0]
    return {bool: "", str: "text"}.get(kind, kind.__name__.lower())


def _item(names: str, kind: str, words: str) -> nodes.definition_list_item:
    term = nodes.term("", "", nodes.literal(text=names))
    if kind:
        term += nodes.Text(" ")
        term += nodes.emphasis(text=kind)
    return nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph(text=words)))


def setup(app: Any) -> dict[str, bool]:
    """Register the directive with Sphinx."""
    app.add_directive("command-line", CommandLine)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
