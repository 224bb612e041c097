"""Every code block of the site and the README runs, each page as a program of its own, in the page's folder.

Blocks with a prompt are doctests; the others, and the cells of executed pages, are one script for each page, in their
order. ``<!-- before: ... -->`` holds code that a reader brings along: a model, inputs.
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

BLOCK = re.compile(
    r"^<!-- before:\n(?P<before>.*?)^-->$"
    r"|^```(?:\{code-cell\} )?python\n(?:---\n.*?^---\n)?(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

# Pages that measure are made smaller: `make docs` runs them as they are.
SMALLER = {
    "budget.md": [("budgets = [0.025, 0.05, 0.1, 0.2, 0.4]", "budgets = [0.05, 0.1]")],
    "clusters.md": [("max_iter=350", "max_iter=250"), ("vectors[layer, 0, ::2]", "vectors[layer, 0, ::8]")],
    "retrieval.md": [("(384, 768, 1152), (0.05, 0.1, 0.25)", "(384,), (0.1,)"), ("count=6", "count=1")],
    "scaling.md": [("range(9, 17)", "range(9, 11)")],
}


def blocks(page: Path) -> list[str]:
    """Code of a page that has no prompts, in order."""
    found = (match["before"] or match["code"] for match in BLOCK.finditer(page.read_text()))
    return [code for code in found if ">>> " not in code]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_code_of_a_page_runs(page: Path, tmp_path: Path) -> None:
    code = "\n".join(blocks(page))
    for text, smaller in SMALLER.get(page.name, []) if page.parent.name == "reproductions" else []:
        assert text in code, f"{page.name} has changed: say anew how to make it smaller"
        code = code.replace(text, smaller)
    script = tmp_path / "page.py"
    script.write_text(code)
    environment = {**os.environ, "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # What torchrun would say to one process.
    environment |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    ran = subprocess.run([sys.executable, script], cwd=page.parent, env=environment, capture_output=True, text=True)
    if ran.stderr.startswith("skip: "):
        pytest.skip(ran.stderr.removeprefix("skip: ").strip())
    assert ran.returncode == 0, ran.stderr[-3000:]


@pytest.mark.parametrize("page", [page for page in PAGES if ">>> " in page.read_text()], ids=name)
def test_examples_of_a_page_give_what_they_say(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page.parent)
    failures, tried = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert tried
    assert not failures


def test_every_python_block_is_found() -> None:
    fences = sum(len(re.findall(r"^```(?:\{code-cell\} )?python$", page.read_text(), re.MULTILINE)) for page in PAGES)
    found = sum(match["code"] is not None for page in PAGES for match in BLOCK.finditer(page.read_text()))
    assert fences == found


def test_the_site_is_checked_for_links_and_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from check_site import check

    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a> <img src="x.png" alt="a picture of it">')
    (tmp_path / "b.html").write_text('<p id="here"></p> <a href="https://elsewhere.example/none">not looked at</a>')
    (tmp_path / "x.png").touch()
    assert check(tmp_path) == []
    (tmp_path / "a.html").write_text('<a href="b.html#there">b</a> <a href="c.html">c</a> <img src="x.png" alt="x">')
    assert len(check(tmp_path)) == 3


def test_a_public_name_that_the_reference_lacks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    from check_site import public_names, unexplained

    found = {names[0] for names in public_names()}
    assert {"subgen.AttentionSketch", "subgen.default.absorb.store", "subgen_torch.transformers.SubGenCache"} <= found
    (tmp_path / "reference").mkdir()
    page = tmp_path / "reference" / "all.html"
    page.write_text("".join(f'<p id="{name}"></p>' for name in found))
    assert unexplained(tmp_path) == []
    page.write_text("".join(f'<p id="{name}"></p>' for name in found - {"subgen.evaluation.cover.k_center_radii"}))
    assert unexplained(tmp_path) == ["subgen.evaluation.cover.k_center_radii is not in the reference"]
