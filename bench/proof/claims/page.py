"""The result for a reader: the table, a chart of every seed, and a page with pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.proof.claims.experiments import Experiments
from bench.proof.claims.rows import CLAIMS
from bench.proof.students import student
from bench.report.charts import MARGIN, WIDTH, Drawing
from bench.report.tables import Cells, Row, Table, aligned, markdown, percent, text
from datasetdm_fast.engine.labels.class_tables import colour

KINDS = {"real": "c1", "synthetic": "c5", "both": "c0"}
NAMES = {"real": "real alone", "synthetic": "synthetic alone", "both": "both"}
PARITY_NAMES = {"real": "torch", "both": "fast"}
LEFT, RIGHT, HEAD, LANE, GAP = 230, 40, 84, 19, 30
ZOOM = 2
SHOWN = 8  # pictures in a row of a sheet
TITLE = "Do generated images help?"

CSS = """
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;color:#1f2328;background:#fff;
max-width:1280px;margin:2em auto;padding:0 1em}
h1{line-height:1.2}.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
td,th{border-bottom:1px solid #d1d9e0;padding:.4em .6em;text-align:left;vertical-align:top}
th{background:#f6f8fa}.words td{min-width:9em}.figures td{min-width:5em}
.figures td:nth-child(n+3):nth-child(-n+6){white-space:nowrap}.figures td:first-child{min-width:9em}
.figures td:nth-last-child(2){min-width:8em}.figures td:last-child{min-width:13em}
.yes{color:#1a7f37;font-weight:600}.no{color:#bc4c00}.dim{color:#59636e}
img{max-width:100%;image-rendering:pixelated}figure{margin:1em 0}figcaption{color:#59636e;font-size:14px}
svg{max-width:100%;min-width:640px;height:auto;margin:1.5em 0}
@media (prefers-color-scheme:dark){
body{color:#f0f6fc;background:#0d1117}th{background:#161b22}td,th{border-color:#3d444d}
.dim,figcaption{color:#9aa4b0}.yes{color:#3fb950}.no{color:#f0883e}}
"""


def write(folder: Path, document: Mapping[str, Any], experiments: Experiments) -> Path:
    """Page, chart and sheets of pictures in a folder; the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = drawn_sheets(experiments) if {"semantic", "depth", "pose"} & set(document["rows"]) else {}
    for name, (picture, _) in sheets.items():
        picture.save(folder / f"{name}.png")
    (folder / "claims.svg").write_text(chart(document), encoding="utf-8")
    captions = {name: words for name, (_, words) in sheets.items()}
    (folder / "index.html").write_text(page(document, captions), encoding="utf-8")
    return folder / "index.html"


def figure(row: Row, value: float) -> str:
    return f"{value:.3f}" if is_error(row) else f"{value:.1f}"


def is_error(row: Row) -> bool:
    """Whether less of a row's figure is better."""
    return row["figure"].startswith("REL")


def with_spread(row: Row, arm: str) -> str:
    """Mean and standard deviation over the seeds."""
    return "–" if row[arm] is None else f"{figure(row, row[arm])} ± {figure(row, row['spread'][arm])}"


def signed(row: Row, value: float) -> str:
    shown = figure(row, abs(value))
    return f"{'' if not float(shown) else '+' if value > 0 else '−'}{shown}"


def change(row: Row) -> str:
    """Gain and its 95 % interval."""
    low, high = row["interval"]
    return f"{signed(row, row['gain'])} ({signed(row, low)} to {signed(row, high)})"


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """Every row of the table with its title: a claim, or each of its cells."""
    found, usual = [], document["setting"]["real"]
    for name, row in document["rows"].items():
        title = CLAIMS[name].title
        for cell in row.get("cells", ()):
            found.append(cell | {"title": f"{title}, {cell['student']} student, {cell['real_scenes']} real"})
        if "cells" not in row:
            real = row["images"].get("real", usual)
            found.append(row | {"title": title if real == usual else f"{title}, {real} real"})
        if "variants" in row:
            found.append(row["variants"] | {"title": f"{title}, variants of day images"})
    return found


def claim(row: Row) -> str:
    """What is claimed; one that does not hold says so first."""
    return row["title"] if row["holds"] else f"**Does not hold:** {row['title']}"


def closed(row: Row) -> str:
    """The share of the gap between the row's real scenes and as many as there are generated images that these close; a
    dash where more real scenes are no better.
    """
    if row.get("ceiling") is None:
        return "–"
    way = row["ceiling"] - row["real"]
    is_better = way < 0 if is_error(row) else way > 0
    return percent((row["both"] - row["real"]) / way) if is_better else "–"


def verdict(row: Row) -> str:
    if not row["holds"]:
        return f"no: {row['reason']}"
    return "yes" if row["real"] or not row["target"].startswith("at least") else "cannot fail: real alone is 0"


COLUMNS = {"claim": claim, "figure": text("figure")}
COLUMNS |= {title: lambda row, arm=arm: with_spread(row, arm) for arm, title in NAMES.items()}
COLUMNS |= {"gain (95 %)": change}


def cells(document: Mapping[str, Any]) -> Cells:
    """The table's headings and rows; the gap is that to as many real scenes as there are generated images."""
    gap = f"gap to {document['setting']['synthetic']:,} real closed"
    last = {gap: closed, "required": text("target"), "holds": verdict}
    return Table(COLUMNS | last).cells(rows_of(document))


def setting_line(document: Mapping[str, Any]) -> str:
    scale = document["setting"]
    return (
        f"{scale['real']} real scenes unless the row gives another number, all from those that trained its labeller; "
        f"{scale['synthetic']:,} generated images; "
        f"{scale['seeds']} students of each kind, up to {scale['steps']:,} steps each; {scale['test']:,} unseen "
        "scenes; mean ± deviation over students"
    )


def terminal(document: Mapping[str, Any]) -> str:
    return f"{setting_line(document)}\n\n{aligned(cells(document))}"


def section(document: Mapping[str, Any], charts: str) -> str:
    picture = f"![The papers' claims in the demo world]({charts}/claims.svg)"
    return "\n\n".join([picture, figures(document)])


def figures(document: Mapping[str, Any]) -> str:
    """The table, with what it was made with."""
    machine = document["machine"]
    made = f"`{document['command']}`, {document['date'][:10]}, {machine['device']}, commit {machine['commit']}"
    engines = f"In the row {CLAIMS['parity'].title!r}, the columns are images of these engines."
    facts = f"{made}: {setting_line(document)}. {engines}"
    return f"{facts}\n\n{markdown(cells(document))}"


def chart(document: Mapping[str, Any]) -> str:
    """One lane an arm: every student a dot, the mean a bar with its standard deviation."""
    note = f"{document['setting']['seeds']} students of each kind; dots are students, bars their mean"
    drawing, top, width = Drawing("What generated images add", note), HEAD, WIDTH - RIGHT - LEFT - 60
    for row in rows_of(document):
        arms = [arm for arm in NAMES if row[arm] is not None]
        names = PARITY_NAMES if row["target"].startswith("no further") else NAMES
        most = max(max(values) for values in row["seeds"].values()) * 1.12 or 1
        drawing.text(MARGIN, top, f"{row['title']}: {row['figure']}", "head")
        verdict = "holds" if row["holds"] else "does not hold"
        drawing.text(WIDTH - RIGHT, top, f"{change(row)} {verdict}", "ink" if row["holds"] else "dim", "end")
        for place, arm in enumerate(arms):
            y = top + 12 + LANE * place
            drawing.text(LEFT - 8, y + 11, names[arm], "dim", "end")
            drawing.box(LEFT, y + 1, width * row[arm] / most, LANE - 6, KINDS[arm])
            for value in row["seeds"][arm]:
                drawing.dot(LEFT + width * value / most, y + 7, "ink", 2.5)
            drawing.text(LEFT + width * max(row["seeds"][arm]) / most + 10, y + 11, with_spread(row, arm), "dim")
        top += 12 + LANE * len(arms) + GAP
    return drawing.svg(top - 6)


def page(document: Mapping[str, Any], captions: Mapping[str, str]) -> str:
    head, rows = cells(document)
    claims = [[CLAIMS[name].title, row["paper"], _images(row)] for name, row in document["rows"].items()]
    pictures = "".join(
        f'<figure><img src="{name}.png" alt="{escape(words)}"><figcaption>{escape(words)}</figcaption></figure>'
        for name, words in captions.items()
    )
    machine = document["machine"]
    made = f"{document['command']}; {document['date']}; {machine['device']}; torch {machine['versions']['torch']}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{TITLE}</title>'
        f"<style>{CSS}</style><h1>{TITLE}</h1><p>{escape(setting_line(document))}.</p>"
        f"{_table(head, rows, 'figures')}{_wide(chart(document))}"
        f"<h2>What was compared</h2>{_table(('claim', 'in the papers', 'here'), claims, 'words')}"
        f'<h2>Pictures</h2>{pictures}<p class="dim">{escape(made)}; commit {escape(machine["commit"])}</p></html>\n'
    )


def _wide(content: str) -> str:
    """What is wider than a small window and scrolls by itself there, by keys too."""
    return f'<div class="wide" tabindex="0">{content}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str) -> str:
    """A table; a cell that says whether a claim holds is coloured."""
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    for row in rows:
        kinds = [{"yes": ' class="yes"', "no": ' class="no"'}.get(cell.partition(":")[0], "") for cell in row]
        row = [cell.replace("**", "") for cell in row]
        lines.append("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row)))
    return _wide(f'<table class="{kind}">{"".join(f"<tr>{line}</tr>" for line in lines)}</table>')


def _images(row: Row) -> str:
    images, steps = row["images"], f"{row['steps']} steps"
    if "torch" in images:
        trusted = f"{images['torch']} and {images['fast']} of the images are trusted"
        return f"the same prompts and seeds through both engines; {trusted}; {steps}"
    left_out = f"{images['left_out']} more left out, as something their prompt names is not to be seen"
    words = f"{images['real']} real scenes, {images['synthetic']} generated images ({left_out}), {steps}"
    if "classes" in row:
        words += f"; classes {', '.join(row['classes'])}"
    if "unseen" in row:
        seen, unseen = (sum(row[name]) / len(row[name]) for name in ("seen", "unseen"))
        words += f"; both: seen {seen:.1f}, unseen {unseen:.1f}"
    return words


def drawn_sheets(experiments: Experiments) -> dict[str, tuple[Image.Image, str]]:
    """Real scenes, generated images and what students answer, side by side with labels."""
    arms = {name: experiments.arm(name, sets()) for name, sets in experiments.arms().items()}
    seed = experiments.scale.students[0]
    test, (real, synthetic) = experiments.test_set(), arms["both"].sets
    images = test.images[:SHOWN]
    rows = [images.numpy(), coloured([item.semantic for item in test.items[:SHOWN]])]
    for arm in arms.values():
        found = student.answers(experiments.store.student(arm, seed, test), images)
        rows.append(coloured([answer.semantic.labels for answer in found]))
    names = ", ".join(f"the student taught by {NAMES[name].replace(' alone', ' scenes alone')}" for name in arms)
    generated = "Generated images and the labels that are learnt from; pale pixels are not trusted."
    return {
        "real": (labelled_sheet(real), "Real scenes and their labels."),
        "synthetic": (labelled_sheet(synthetic), generated),
        "answers": (sheet(rows), f"Unseen scenes; from the top: image, truth, {names} (seed {seed})."),
    }


def labelled_sheet(data: Any) -> Image.Image:
    return sheet([data.images[:SHOWN].numpy(), coloured(data.semantic[:SHOWN].numpy())])


def coloured(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Label maps [N, h, w] as colours."""
    return np.array([colour(k) for k in range(256)], np.uint8)[np.stack([np.asarray(one) for one in labels])]


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows of pictures, each enlarged to the same side."""
    side = max(row.shape[1] for row in rows) * ZOOM

    def enlarged(picture: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST))

    return Image.fromarray(np.concatenate([np.concatenate([enlarged(one) for one in row], 1) for row in rows], 0))
