"""The pages match the sources: generated pages, links, lines that fit, the order of the site.

`python tests/test_docs.py` writes docs/flags.md and docs/files.md.
"""

import ast
import doctest
import re
import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from layers import HERE, PACKAGE

from datasetdm_fast.gallery import GalleryConfig

sys.path.append(str(HERE / "docs" / "site"))  # conftest.py does so for tests; this file is a program, too
import pages  # noqa: E402

PAGES = sorted(
    [
        *(HERE / name for name in ("README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md")),
        *(HERE / "bench").glob("*/**/README.md"),
        *(HERE / "docs").glob("*.md"),
    ]
)
README_LINES = 100
LONGEST_LINE = 120


@pytest.mark.parametrize("name", pages.PAGES)
def test_generated_pages_are_those_of_the_sources(name):
    written = (HERE / "docs" / name).read_text(encoding="utf-8")
    assert written.splitlines() == pages.PAGES[name]().splitlines(), "run `python tests/test_docs.py`"


@cache
def stops(path):
    return list(pages.stops(path))


@pytest.mark.parametrize("path", pages.sources(), ids=lambda path: path.relative_to(HERE).as_posix())
def test_every_refusal_says_what_to_do(path):
    assert [cause for _, cause, remedy in stops(path) if not remedy] == []
    short = [
        node.lineno
        for node in ast.walk(pages.parsed(path))
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in pages.STOPS
        and (len(node.args) + len(node.keywords) != 2 or any(isinstance(one, ast.Starred) for one in node.args))
    ]
    assert short == [], "a refusal has a cause and a remedy"


def test_the_page_of_refusals_follows_names_of_remedies():
    told = {}
    for path in pages.sources():
        told |= {cause: remedy for _, cause, remedy in stops(path)}
    again, chosen = "Get the file again and compare its checksum.", "Choose one of these with --device, such as cuda:0."
    assert told["device: NAME is none of auto, cpu, cuda, cuda:N"] == chosen  # written in the call
    assert told["PATH is truncated or not a safetensors file (REASON)"] == again  # a constant of another module
    assert told["PATH: not readable as JSON (byte PLACE: REASON)"] == again  # named as documents.GET_AGAIN
    assert told["FLAG: no sample of TABLES has the score agreement"].startswith("It needs two kinds")  # of a table
    assert told["model: PATH holds KIND; VALUE"].count("Or: ") == 1  # either of two
    assert "Name the folder with --prompt_root. Or: " in told["WHAT: PATH is not there"]  # what the callers give


EXAMPLES = [path for path in sorted((HERE / PACKAGE).rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_in_docstrings_say_what_comes_out(path):
    name = path.relative_to(HERE).with_suffix("").as_posix().replace("/", ".")
    failed, tried = doctest.testmod(import_module(name))
    assert tried and not failed


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link can name after the #, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_links_and_pictures_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_no_page_has_both_sides_of_a_merge(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"(<{7}|>{7}|\|{7}) |={7}$", line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))
def test_lines_fit(page):
    long = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > LONGEST_LINE]
    assert [
        line for line in long if not line.startswith(("|", "!", "#"))
    ] == []  # tables, pictures and headings cannot be broken


def test_flags_on_the_page_of_the_gallery_are_its_own():
    """But for one of `drop` and one of `train`."""
    own = {f"--{name.replace('_', '-')}" for name in GalleryConfig.__dataclass_fields__}
    text = re.sub(r"```.*?```", "", (HERE / "docs" / "gallery.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {flag for code in re.findall(r"`([^`]*)`", text) for flag in re.findall(r"(?:^| )(--[a-z-]+)", code)}
    assert named - own == {"--file", "--data"}


def test_the_readme_is_short_and_leads_to_every_page():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= README_LINES
    for page in PAGES:
        assert page.name == "README.md" or f"]({page.relative_to(HERE).as_posix()}" in text, page.name


def test_the_site_has_every_page():
    config = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    entries = config["nav"]
    named = set(re.findall(r"[\w-]+\.md", str(entries)))
    assert len(entries) == 10 and named >= {path.name for path in (HERE / "docs").glob("*.md")}
    assert named - {path.name for path in (HERE / "docs").glob("*.md")} == {
        *("messages.md", "notebook.md", "bench.md", "contributing.md", "changelog.md", "security.md")
    }


def test_pictures_of_pages_are_pictures_on_the_site(monkeypatch):
    monkeypatch.setitem(sys.modules, "mkdocs.structure.files", SimpleNamespace(File=None, Files=None))
    hooks = import_module("hooks")
    for path in (HERE / "docs").glob("*.md"):
        assert hooks.relinked(prose(path), Path("docs")).count("![") == prose(path).count("!["), path.name


def test_the_search_of_the_site_needs_no_network():
    """Not from a disk either: the plug-in `offline` takes a script from unpkg.com, unless one of this name is there."""
    config = yaml.safe_load((HERE / "mkdocs.yml").read_text(encoding="utf-8"))
    (script,) = config["extra"]["polyfills"]
    assert "offline" in config["plugins"] and script == "assets/iframe-worker.js"
    assert (HERE / "docs/site/iframe-worker.js").is_file()
    assert '"iframe-worker.js"' in (HERE / "docs/site/hooks.py").read_text(encoding="utf-8")


if __name__ == "__main__":
    for name, text in pages.PAGES.items():
        (HERE / "docs" / name).write_text(text(), encoding="utf-8")
