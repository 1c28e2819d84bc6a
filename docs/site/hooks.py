"""Pages of the site that are no files of docs/: messages, the notebook, and pages from elsewhere in the repository."""

import ast
import json
import re
import sys
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {  # page of the site -> file of the repository
    "bench.md": "bench/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
}
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Files, config) -> Files:
    """Adds the pages that are no files of docs/."""
    sys.path.insert(0, str(Path(__file__).parent))
    from pages import messages_page

    texts = {page: (ROOT / path).read_text(encoding="utf-8") for page, path in ELSEWHERE.items()}
    texts = {page: relinked(text, Path(ELSEWHERE[page]).parent) for page, text in texts.items()}
    texts |= {"messages.md": messages_page(), "notebook.md": notebook_page(ROOT / "docs" / "tour.ipynb")}
    for name, text in texts.items():
        files.append(File.generated(config, name, content=text))
    for name in ("iframe-worker.js", "wide.css"):
        text = (ROOT / "docs" / "site" / name).read_text(encoding="utf-8")
        files.append(File.generated(config, f"assets/{name}", content=text))
    for chart in sorted((ROOT / "bench" / "charts").glob("*.svg")):
        files.append(File.generated(config, f"charts/{chart.name}", content=chart.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """A page with the table of rooms, and with links that hold on the site."""
    if "<!-- rooms -->" in markdown:
        markdown = markdown.replace("<!-- rooms -->", room_table())
    return markdown if page.file.src_uri in ELSEWHERE else relinked(markdown, Path("docs"))


def relinked(text: str, folder: Path) -> str:
    """A page of `folder` with links that hold on the site: to its pages; files of the repository are named."""
    pages = {path: page for page, path in ELSEWHERE.items()}

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = (ROOT / folder / target).resolve().relative_to(ROOT).as_posix()
        if path in pages:
            return f"[{text}]({pages[path]}{anchor})"
        if path.startswith("bench/charts/"):
            return f"[{text}]({path.removeprefix('bench/')})"
        if path == "docs/tour.ipynb":
            return f"[{text}](notebook.md)"
        if path.startswith("docs/") and path.endswith((".md", ".png", ".jpg", ".svg")):
            return f"[{text}]({path.removeprefix('docs/')}{anchor})"
        return f"{text} (`{path}`)"  # a file of the repository, which is no page

    return LINK.sub(link, text)


def notebook_page(path: Path) -> str:
    """A notebook as a page: its texts and its code."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join([*parts, "The notebook is `docs/tour.ipynb` of the repository.", ""])


def sentence(path: Path) -> str:
    """The first paragraph of a file's docstring, without the command line that it may begin with."""
    words = " ".join(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).split("\n\n")[0].split())
    return re.sub(r"^python -m [\w.]+( [^:]+)?: ", "", words)


def room_table() -> str:
    """The storeys from the top down, and in each its rooms: folders, and files that lie flat in it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from layers import PACKAGE, STOREYS, modules, room_of, storey_of

    rooms: dict[str, dict[str, Path]] = {storey: {} for storey in STOREYS}
    for module, path in modules(ROOT).items():
        if module != PACKAGE and not module.startswith("bench"):
            room = room_of(module)
            if room not in rooms[storey_of(module)] or path.name == "__init__.py" and module.endswith(f".{room}"):
                rooms[storey_of(module)][room] = path
    lines = ["| storey | room | what it is for |", "|---|---|---|"]
    for storey, found in rooms.items():
        for room, path in found.items():
            if room != storey:
                place = path.parent if path.name == "__init__.py" else path
                name = place.relative_to(ROOT).as_posix() + ("/" if place.is_dir() else "")
                lines.append(f"| {storey} | `{name}` | {sentence(path).replace('|', '&#124;')} |")
    return "\n".join(lines) + "\n"
