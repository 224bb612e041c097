"""Check a built site: links within it lead somewhere, pictures have words, public names are explained. No network.

``python docs/check_site.py build/docs``
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["check", "main", "public_names", "unexplained"]


class _Page(HTMLParser):
    """Links, anchors and pictures of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.without_words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("id", "name"):
            if given.get(name):
                self.anchors.add(str(given[name]))
        target = given.get("href") if tag in ("a", "link") else given.get("src")
        if target:
            self.links.append(target)
        words = given.get("alt") or ""
        # A picture's own file name is what is written where nobody gave it words.
        if tag == "img" and (len(words.split()) < 3 or words.startswith("../")):
            self.without_words.append(f"{given.get('src')} (alt: {words!r})")


def _read(folder: Path) -> dict[Path, _Page]:
    """Read the pages of a folder and the folders in it."""
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
    return pages


def check(site: Path) -> list[str]:
    """Return what is wrong, a line each; nothing if all is well.

    Parameters
    ----------
    site : Path
        Folder of the HTML.

    Returns
    -------
    list of str
    """
    pages = _read(site)
    wrong = []
    for path, page in pages.items():
        name = path.relative_to(site.resolve())
        wrong += [f"{name}: a picture without words: {picture}" for picture in page.without_words]
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                wrong.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                wrong.append(f"{name}: {link}: the page has no such place")
    if not pages:
        wrong.append(f"{site}: no pages")
    return wrong


def public_names() -> Iterator[tuple[str, ...]]:
    """Yield each public class and function, under every name it may have: those that modules list in ``__all__``."""
    import subgen

    inner = (found.name for found in pkgutil.walk_packages(subgen.__path__, "subgen."))
    modules = ["subgen", *inner, "subgen_torch.transformers", "subgen_torch.distributed", "subgen_cupy"]
    for path in modules:
        if any(part.startswith("_") for part in path.split(".")):
            continue
        module = importlib.import_module(path)
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                yield f"{path}.{name}", f"{thing.__module__}.{name}", f"subgen.{name}"


def unexplained(site: Path) -> list[str]:
    """Return the public names that the reference of a site, the folder of its HTML, does not have, a line each."""
    anchors = {anchor for page in _read(site / "reference").values() for anchor in page.anchors}
    return [f"{names[0]} is not in the reference" for names in public_names() if anchors.isdisjoint(names)]


def main() -> None:
    """Check the site named on the command line; exit status 1 if anything is wrong."""
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/check_site.py FOLDER")
    site = Path(sys.argv[1])
    wrong = check(site) + unexplained(site)
    well = "all links within the site lead somewhere, all pictures have words, all public names are in the reference"
    print("\n".join(wrong) or well)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
