"""Check a built site: every link within it leads somewhere, every picture has words. No network.

``python docs/check_site.py build/docs``
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["check", "main"]


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
    pages = {}
    for path in sorted(site.rglob("*.html")):
        pages[path.resolve()] = page = _Page()
        page.feed(path.read_text(encoding="utf-8"))
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


def main() -> None:
    """Check the site named on the command line; exit status 1 if anything is wrong."""
    if len(sys.argv) != 2:
        sys.exit("usage: python docs/check_site.py FOLDER")
    wrong = check(Path(sys.argv[1]))
    print("\n".join(wrong) or "all links within the site lead somewhere, and all pictures have words")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
