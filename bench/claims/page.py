"""The result for a reader: the table, a chart of every seed, and a page with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.claims.rows import CLAIMS
from bench.report.charts import MARGIN, WIDTH, Drawing
from bench.report.tables import Table, aligned, markdown
from datasetdm_fast.labels.colours import colour

KINDS = {"real": "c1", "synthetic": "c5", "both": "c0"}
NAMES = {"real": "real alone", "synthetic": "synthetic alone", "both": "both"}
PARITY_NAMES = {"real": "torch", "both": "fast"}
LEFT, RIGHT, HEAD, LANE, GAP = 230, 40, 84, 19, 30
ZOOM = 2
SHOWN = 8  # pictures in a row of a sheet

CSS = """
body{font:15px/1.5 system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;color:#1f2328;background:#fff;max-width:1120px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;width:100%;font-size:14px}td,th{border-bottom:1px solid #d1d9e0;padding:.4em .6em;text-align:left;vertical-align:top}
th{background:#f6f8fa}.figures td{min-width:5em}.figures td:nth-child(n+3):nth-child(-n+6){white-space:nowrap}
.yes{color:#1a7f37;font-weight:600}.no{color:#bc4c00;font-weight:600}.dim{color:#59636e}
img{max-width:100%;image-rendering:pixelated}figure{margin:1em 0}figcaption{color:#59636e;font-size:14px}svg{max-width:100%;height:auto;margin:1.5em 0}
@media (prefers-color-scheme:dark){body{color:#f0f6fc;background:#0d1117}th{background:#161b22}td,th{border-color:#3d444d}
.dim,figcaption{color:#9aa4b0}.yes{color:#3fb950}.no{color:#f0883e}}
"""


def write(folder: Path, document: Mapping[str, Any], bench: Any) -> list[Path]:
    """Page, chart and sheets of pictures in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sheets = drawn_sheets(bench) if {"semantic", "depth", "pose"} & set(document["rows"]) else {}
    for name, (picture, _) in sheets.items():
        picture.save(folder / f"{name}.png")
    (folder / "claims.svg").write_text(chart(document), encoding="utf-8")
    (folder / "index.html").write_text(
        page(document, {name: words for name, (_, words) in sheets.items()}), encoding="utf-8"
    )
    return [folder / "index.html"]


def figure(row: Mapping[str, Any], value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if row["figure"].startswith("REL") else f"{value:.1f}"


def with_spread(row: Mapping[str, Any], arm: str) -> str:
    """Mean and standard deviation over the seeds."""
    return "–" if row[arm] is None else f"{figure(row, row[arm])} ± {figure(row, row['spread'][arm])}"


def change(row: Mapping[str, Any]) -> str:
    """Gain and its 95 % interval."""
    low, high = row["interval"]
    return (
        f"{'+' if row['gain'] >= 0 else '−'}{figure(row, abs(row['gain']))} ({signed(row, low)} to {signed(row, high)})"
    )


def signed(row: Mapping[str, Any], value: float) -> str:
    return f"{'+' if value >= 0 else '−'}{figure(row, abs(value))}"


def lines(document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every line of the table: a row, or each of its cells."""
    found = []
    for name, row in document["rows"].items():
        if "cells" in row:
            found += [
                (f"{CLAIMS[name].title}, {cell['student']} student, {cell['real_scenes']} real", cell)
                for cell in row["cells"]
            ]
        else:
            real = row["images"].get("real", document["setting"]["real"])
            found.append((CLAIMS[name].title + (f", {real} real" if real != document["setting"]["real"] else ""), row))
    return found


def table(document: Mapping[str, Any]) -> Table:
    head = ["claim", "figure", "real alone", "synthetic alone", "both", "gain (95 %)", "asked for", "holds"]
    rows = [
        [
            title,
            row["figure"],
            *(with_spread(row, arm) for arm in NAMES),
            change(row),
            row["target"],
            "yes" if row["holds"] else f"no: {row['reason']}",
        ]
        for title, row in lines(document)
    ]
    return head, rows


def setting_line(document: Mapping[str, Any]) -> str:
    scale = document["setting"]
    return (
        f"{scale['real']} real scenes where no other number is given, always the same that taught the labeller; "
        f"{scale['synthetic']:,} generated images; "
        f"{scale['seeds']} students of each kind, up to {scale['steps']:,} steps of each; {scale['test']:,} unseen "
        "scenes; mean ± deviation over students"
    )


def terminal(document: Mapping[str, Any]) -> str:
    return f"{setting_line(document)}\n\n{aligned(table(document))}"


def section(document: Mapping[str, Any]) -> str:
    """What the front page says."""
    machine = document["machine"]
    text = f"`{document['command']}`, {document['date'][:10]}, {machine['device']}, commit {machine['commit']}: {setting_line(document)}."
    return (
        f"![The papers' claims in the demo world](bench/charts/claims.svg)\n\n{text} For parity the columns are the "
        "oracle's set and that of `fast`.\n\n" + markdown(table(document))
    )


def chart(document: Mapping[str, Any]) -> str:
    """One lane an arm: every student a dot, the mean a bar with its standard deviation."""
    drawing = Drawing(
        "What generated images add",
        f"{document['setting']['seeds']} students of each kind; dots are students, bars their mean",
    )
    found, top = lines(document), HEAD
    for title, row in found:
        arms = [arm for arm in NAMES if row[arm] is not None]
        names = PARITY_NAMES if row["target"].startswith("no further") else NAMES
        most = max(max(values) for values in row["seeds"].values()) * 1.12 or 1
        drawing.text(MARGIN, top, f"{title}: {row['figure']}", "head")
        verdict = "holds" if row["holds"] else "does not hold"
        drawing.text(WIDTH - RIGHT, top, f"{change(row)} {verdict}", "ink" if row["holds"] else "dim", "end")
        for place, arm in enumerate(arms):
            y = top + 12 + LANE * place
            span = WIDTH - RIGHT - LEFT - 60
            drawing.text(LEFT - 8, y + 11, names[arm], "dim", "end")
            drawing.box(LEFT, y + 1, span * row[arm] / most, LANE - 6, KINDS[arm])
            for value in row["seeds"][arm]:
                drawing.dot(LEFT + span * value / most, y + 7, "ink", 2.5)
            drawing.text(LEFT + span * max(row["seeds"][arm]) / most + 10, y + 11, with_spread(row, arm), "dim")
        top += 12 + LANE * len(arms) + GAP
    return drawing.svg(top - 6)


def page(document: Mapping[str, Any], captions: Mapping[str, str]) -> str:
    head, rows = table(document)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(_cell(cell, k == len(row) - 1) for k, cell in enumerate(row))}</tr>" for row in rows)
    facts = "".join(
        f"<tr><td>{escape(CLAIMS[name].title)}</td><td>{escape(row['paper'])}</td><td>{escape(_images(row))}</td></tr>"
        for name, row in document["rows"].items()
    )
    figures = "".join(
        f'<figure><img src="{name}.png" alt="{escape(words)}"><figcaption>{escape(words)}</figcaption></figure>'
        for name, words in captions.items()
    )
    machine = document["machine"]
    made = f"{document['command']}; {document['date']}; {machine['device']}; torch {machine['versions']['torch']}; commit {machine['commit']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Do generated images help?</title>'
        f"<style>{CSS}</style><h1>Do generated images help?</h1><p>{escape(setting_line(document))}.</p>"
        f'<table class="figures"><tr>{cells}</tr>{body}</table>{chart(document)}'
        f"<h2>What was compared</h2>"
        f"<table><tr><th>claim</th><th>in the papers</th><th>here</th></tr>{facts}</table>"
        f'<h2>Pictures</h2>{figures}<p class="dim">{escape(made)}</p></html>\n'
    )


def _cell(words: str, is_verdict: bool) -> str:
    kind = f' class="{"yes" if words == "yes" else "no"}"' if is_verdict else ""
    return f"<td{kind}>{escape(words)}</td>"


def _images(row: Mapping[str, Any]) -> str:
    images = row["images"]
    if "torch" in images:
        return f"the same prompts and seeds through both engines; {images['torch']} and {images['fast']} of the images are trusted; {row['steps']} steps"
    left_out = f"{images['left_out']} more left out, as something their prompt names is not to be seen"
    text = f"{images['real']} real scenes, {images['synthetic']} generated images ({left_out}), {row['steps']} steps"
    classes = f"; classes {', '.join(row['classes'])}" if "classes" in row else ""
    if "unseen" in row:
        classes += f"; both: seen {sum(row['seen']) / len(row['seen']):.1f}, unseen {sum(row['unseen']) / len(row['unseen']):.1f}"
    return text + classes


def drawn_sheets(bench: Any) -> dict[str, tuple[Image.Image, str]]:
    """Real scenes, generated images and what students say, side by side with labels."""
    from datasetdm_fast.evaluation import student

    arms = {name: bench.arm(name, sets()) for name, sets in bench.main_arms().items()}
    exam, (real, synthetic) = bench.exam(), arms["both"].sets
    images = exam.images[:SHOWN]
    truth = [item.semantic for item in exam.items[:SHOWN]]
    said = {
        name: [answer.semantic.labels for answer in student.answers(bench.record.student(arm, 0, exam), images)]
        for name, arm in arms.items()
    }
    rows = [images.numpy(), coloured(truth), *(coloured(labels) for labels in said.values())]
    names = ", ".join(f"the student taught by {NAMES[name].replace(' alone', ' scenes alone')}" for name in said)
    return {
        "real": (
            sheet([real.images[:SHOWN].numpy(), coloured(real.semantic[:SHOWN].numpy())]),
            "Real scenes and their labels.",
        ),
        "synthetic": (
            sheet([synthetic.images[:SHOWN].numpy(), coloured(synthetic.semantic[:SHOWN].numpy())]),
            "Generated images and the labels that are learnt from; pale pixels are not trusted.",
        ),
        "answers": (sheet(rows), f"Unseen scenes; from the top: image, truth, {names} (seed 0)."),
    }


def coloured(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Label maps [N, h, w] as colours."""
    table = np.array([colour(k) for k in range(256)], np.uint8)
    return table[np.stack([np.asarray(one) for one in labels])]


def sheet(rows: Sequence[np.ndarray]) -> Image.Image:
    """Rows of pictures, each enlarged to the same side."""
    side = max(row.shape[1] for row in rows) * ZOOM
    lanes = [
        np.concatenate(
            [np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)) for picture in row], 1
        )
        for row in rows
    ]
    return Image.fromarray(np.concatenate(lanes, 0))
