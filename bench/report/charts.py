"""Charts of a result file, drawn as SVG by hand: small files that follow the reader's light or dark scheme."""

import math
from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import Any

from bench.report.results import rows_of
from bench.report.tables import number, unsteady

WIDTH, MARGIN, LINE, LETTERS = 820, 20, 17, 13
DESCENT = 4  # pixels of letters below their line
LABELS = 300  # pixels left of horizontal bars
STYLE = """
svg{font:13px system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif}
.card{fill:#fff;stroke:#d1d9e0}.ink{fill:#1f2328}.dim{fill:#59636e}.head{fill:#1f2328;font-weight:600;font-size:15px}
.grid{stroke:#e2e7ec}.axis{stroke:#818b98}.ghost{fill:#dfe4ea}.bad{fill:#cf222e}
.c0{fill:#0969da}.c1{fill:#9aa4af}.c2{fill:#bc4c00}.c3{fill:#1a7f37}.c4{fill:#8250df}.c5{fill:#bf8700}.c6{fill:#57606a}.c7{fill:#bf3989}
.s0{stroke:#0969da}.s1{stroke:#818b98}.s2{stroke:#bc4c00}.s3{stroke:#1a7f37}.s4{stroke:#8250df}.s5{stroke:#bf8700}.s6{stroke:#57606a}.s7{stroke:#bf3989}
@media (prefers-color-scheme:dark){
.card{fill:#0d1117;stroke:#3d444d}.ink{fill:#f0f6fc}.dim{fill:#9aa4b0}.head{fill:#f0f6fc}
.grid{stroke:#262c36}.axis{stroke:#767e89}.ghost{fill:#2a313c}.bad{fill:#f85149}
.c0{fill:#4493f8}.c1{fill:#6e7681}.c2{fill:#f0883e}.c3{fill:#3fb950}.c4{fill:#ab7df8}.c5{fill:#d29922}.c6{fill:#848d97}.c7{fill:#db61a2}
.s0{stroke:#4493f8}.s1{stroke:#8b949e}.s2{stroke:#f0883e}.s3{stroke:#3fb950}.s4{stroke:#ab7df8}.s5{stroke:#d29922}.s6{stroke:#848d97}.s7{stroke:#db61a2}}
""".strip()


class Drawing:
    """Shapes in the order they are drawn."""

    def __init__(self, title: str, note: str):
        self.shapes: list[str] = []
        self.title = title
        self.text(MARGIN, 30, title, "head")
        self.text(MARGIN, 50, note, "dim")

    def text(self, x: float, y: float, words: str, kind: str = "ink", anchor: str = "start") -> None:
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self.shapes.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}"{at}>{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        size = f'width="{max(width, 0):.1f}" height="{height:.1f}"'
        self.shapes.append(f'<rect x="{x:.1f}" y="{y:.1f}" {size} rx="2" class="{kind}"/>')

    def line(self, points: Sequence[tuple[float, float]], kind: str, width: float = 1, dash: str = "") -> None:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.shapes.append(f'<polyline points="{places}" fill="none" class="{kind}" stroke-width="{width}"{dashes}/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 4) -> None:
        self.shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" class="{kind}"/>')

    def svg(self, height: float) -> str:
        card = f'<rect x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="6" class="card"/>'
        size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(self.title)}</title>'
        return "\n".join([f"{head}<style>{STYLE}</style>", card, *self.shapes, "</svg>\n"])


def named(peer: str) -> str:
    """A peer as a reader knows it: result files call the product `ours`."""
    return peer.replace("ours", "datasetdm_fast")


def bar(drawing: Drawing, place: int, name: str) -> int:
    """The top of one horizontal bar, whose name is written beside it."""
    top = 70 + 30 * place
    drawing.text(LABELS - 8, top + 15, name, anchor="end")
    return top


def peers(document: dict[str, Any]) -> str:
    """Images a second by steady peer, ours coloured; a failed one says so in red."""
    rows = [row for row in rows_of(document, "peers") if row["status"] != "absent" and not unsteady(row)]
    rows = [row for row in rows if row["status"] == "failed" or "images_per_second" in row]  # not those of a cut race
    note = f"{where(document)}; every row agreed with the reference before it was timed"
    drawing = Drawing(f"Labelled samples a second, {document['setting']['calls']} UNet calls each", note)
    most = max((row["images_per_second"] for row in rows if row["status"] == "ok"), default=1.0)
    for place, row in enumerate(rows):
        top = bar(drawing, place, row["title"])
        if row["status"] == "failed":
            drawing.text(LABELS, top + 15, "failed, so it was not timed", "bad")
            continue
        length = (WIDTH - LABELS - 190) * row["images_per_second"] / most
        drawing.box(LABELS, top, length, 21, "c0" if row["peer"].startswith("ours") else "c1")
        rate = f"{number(row['images_per_second'])}/s, {row['dtype']}, batch {row['batch']}"
        drawing.text(LABELS + length + 8, top + 15, rate, "dim")
    return drawing.svg(84 + 30 * len(rows))


def ladder(document: dict[str, Any]) -> str:
    """Seconds an image, one technique a bar; what a technique saved stays visible in grey."""
    rows = [row for row in rows_of(document, "ladder") if row["status"] == "ok"]
    note = f"{where(document)}; seconds an image, each row with all before it"
    drawing = Drawing("From DatasetDM to datasetdm_fast", note)
    seconds = [row["seconds_per_image"]["median"] for row in rows]
    scale = (WIDTH - LABELS - 170) / max(seconds)
    for place, (row, taken) in enumerate(zip(rows, seconds)):
        top, before = bar(drawing, place, row["title"]), seconds[place - 1] if place else taken
        drawing.box(LABELS, top, scale * before, 21, "ghost")
        drawing.box(LABELS, top, scale * taken, 21, "c0" if place else "c1")
        gain = f", {before / taken:.2f}x" if place else ""
        drawing.text(LABELS + scale * max(before, taken) + 8, top + 15, f"{number(taken)} s{gain}", "dim")
    return drawing.svg(84 + 30 * len(rows))


def profile(document: dict[str, Any]) -> str:
    """Shares of kernel groups in one UNet call, a bar a peer."""
    rows = rows_of(document, "profile")
    drawing = Drawing("Where the time of one UNet call goes", where(document))
    groups = list(rows[0]["shares"])
    x = MARGIN
    for place, group in enumerate(groups):
        drawing.box(x, 62, 12, 12, f"c{place}" if place < len(groups) - 1 else "ghost")
        drawing.text(x + 17, 73, group, "dim")
        x += 34 + 7.5 * len(group)
    whole = WIDTH - 150 - 150
    for place, row in enumerate(rows):
        top, x = 90 + 34 * place, 140.0
        drawing.text(132, top + 16, named(row["peer"]), anchor="end")
        for k, group in enumerate(groups):
            length = whole * row["shares"][group]
            drawing.box(x, top, max(length - 1, 0), 23, f"c{k}" if k < len(groups) - 1 else "ghost")
            x += length
        drawing.text(140 + whole + 8, top + 16, f"{number(1e3 * row['call_s'])} ms an image", "dim")
    return drawing.svg(106 + 34 * len(rows))


class Axes:
    """A plot with logarithmic axes."""

    def __init__(self, drawing: Drawing, xs: tuple[float, float], ys: tuple[float, float], height: float = 300):
        self.drawing, self.xs, self.ys = drawing, xs, ys
        self.left, self.right, self.top, self.bottom = 80, WIDTH - 170, 92, 92 + height

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (math.log(x) - math.log(self.xs[0])) / (math.log(self.xs[1]) - math.log(self.xs[0]))
        up = (math.log(y) - math.log(self.ys[0])) / (math.log(self.ys[1]) - math.log(self.ys[0]))
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)

    def frame(self, xticks: Sequence[float], yticks: Sequence[float], xlabel: str, ylabel: str) -> None:
        for x in xticks:
            column = self.at(x, self.ys[0])[0]
            self.drawing.line([(column, self.top), (column, self.bottom)], "grid")
            self.drawing.text(column, self.bottom + 18, f"{x:g}", "dim", "middle")
        for y in yticks:
            row = self.at(self.xs[0], y)[1]
            self.drawing.line([(self.left, row), (self.right, row)], "grid")
            self.drawing.text(self.left - 8, row + 4, f"{y:g}", "dim", "end")
        self.drawing.line([(self.left, self.top), (self.left, self.bottom), (self.right, self.bottom)], "axis")
        self.drawing.text((self.left + self.right) / 2, self.bottom + 38, xlabel, "dim", "middle")
        self.drawing.text(self.left, self.top - 8, ylabel, "dim")


def batches(document: dict[str, Any]) -> str:
    """Images through one UNet call a second, by batch size."""
    rows = rows_of(document, "batches")
    rates = [1 / row["call_s"] for row in rows]
    sizes = sorted({row["batch"] for row in rows})
    drawing = Drawing("One UNet call by batch size", where(document))
    axes = Axes(drawing, (min(sizes) / 1.15, max(sizes) * 1.15), (min(rates) / 1.3, max(rates) * 1.3))
    axes.frame(sizes, ticks(*axes.ys), "images in a call", "images a second through one call")
    kinds, names, ends = cycle(range(2, 8)), list(dict.fromkeys(row["peer"] for row in rows)), {}
    for name in names:
        kind = 0 if name == "ours" else next(kinds)
        points = [axes.at(row["batch"], 1 / row["call_s"]) for row in rows if row["peer"] == name]
        drawing.line(points, f"s{kind}", 2)
        for x, y in points:
            drawing.dot(x, y, f"c{kind}")
        ends[name] = points[-1]
    for name, height in apart({name: y for name, (_, y) in ends.items()}).items():
        drawing.text(axes.right + 6, height + 4, named(name))
    return drawing.svg(axes.bottom + 56)


def beside(
    dots: dict[str, tuple[float, float]], others: Sequence[tuple[float, float]], lines: Sequence[float], right: float
) -> dict[str, tuple[float, float, str]]:
    """Where the name of each dot is written, and how anchored: the first place left of `right`, of those right of it,
    left of it, below and above, near and far, where it covers no other name, no dot and none of the level lines.
    """
    found: dict[str, tuple[float, float, str]] = {}
    taken = [(x - 4, x + 4, y + 4) for x, y in (*dots.values(), *others)]  # left and right end, and lower
    for name, (x, y) in dots.items():
        length = 7.0 * len(name)
        heights = (y + 19, y - 9, y + 32, y - 22)
        places = ((x + 8, y + 4, "start"), (x - 8, y + 4, "end"), *((x, height, "middle") for height in heights))
        spans = [(at - {"start": 0.0, "end": length, "middle": length / 2}[anchor], y) for at, y, anchor in places]
        is_free = [
            start + length <= right
            and not any(y - LETTERS < line < y + DESCENT for line in lines)
            and all(end <= start or start + length <= begin or abs(y - low) >= LETTERS for begin, end, low in taken)
            for start, y in spans
        ]
        place = is_free.index(True) if True in is_free else 1
        found[name] = places[place]
        taken.append((spans[place][0], spans[place][0] + length, spans[place][1]))
    return found


def apart(heights: dict[str, float], least: float = LINE) -> dict[str, float]:
    """The same heights, from the top down, moved so that words of one line each do not meet."""
    found: dict[str, float] = {}
    for name in sorted(heights, key=heights.get):
        found[name] = max([heights[name], *(height + least for height in found.values())])
    return found


def roofline(document: dict[str, Any]) -> str:
    """Layers and operations under the measured limits."""
    limits, layers = rows_of(document, "limits")[0], rows_of(document, "layers")
    # One row an operation: the case of most work in the form that is used, where it multiplies at all.
    multiplying = [row for row in rows_of(document, "ops") if row.get("tflops")]
    by_work = sorted(multiplying, key=lambda row: row["tflops"] * row["form_s"])
    ops = list({row["op"]: row for row in by_work}.values())
    note = f"{where(document)}; work counted as the reference is written"
    drawing = Drawing("Layers and operations under the measured limits", note)
    xs, ys = [row["flop_per_byte"] for row in [*layers, *ops]], [row["tflops"] for row in [*layers, *ops]]
    most, slope = max(limits["tflops"].values()), limits["gbps"] / 1e3  # TFLOP/s at one operation a byte
    least_x, most_x = min([limits["tflops"]["fp32"] / slope / 3, *xs]), max([2 * most / slope, *xs])
    axes = Axes(drawing, (least_x / 1.5, most_x * 1.5), (min(ys) / 1.5, max([most, *ys]) * 1.5))
    axes.frame(ticks(*axes.xs), ticks(*axes.ys), "operations a byte", "TFLOP/s")
    levels = [axes.at(axes.xs[1], rate)[1] for rate in limits["tflops"].values()]
    for place, (name, rate) in enumerate(limits["tflops"].items()):
        knee = max(1e3 * rate / limits["gbps"], axes.xs[0])
        drawing.line([axes.at(knee, rate), axes.at(axes.xs[1], rate)], f"s{place + 2}", 1.5, "6 4")
        drawing.text(axes.right + 6, axes.at(axes.xs[1], rate)[1] + 4, f"{name}, {number(rate)}", "dim")
    start, end = max(axes.xs[0], 1e3 * axes.ys[0] / limits["gbps"]), 1e3 * most / limits["gbps"]
    drawing.line([axes.at(start, start * slope), axes.at(end, most)], "s1", 1.5)
    drawing.text(axes.at(end, most)[0], axes.top - 8, f"copies, {number(limits['gbps'])} GB/s", "dim", "middle")
    others = [axes.at(row["flop_per_byte"], row["tflops"]) for row in layers]
    for row, place in zip(layers, others, strict=True):
        kind, radius = "c5" if row["layer"].startswith("conv") else "c3", 2.5 + 14 * row["of_work"] ** 0.5
        drawing.dot(*place, kind, radius)
    dots = {row["op"]: axes.at(row["flop_per_byte"], row["tflops"]) for row in ops}
    for name, (x, y, anchor) in beside(dots, others, levels, axes.right).items():
        drawing.dot(*dots[name], "c0")
        drawing.text(x, y, name, anchor=anchor)
    x = axes.left
    for kind, words in (("c5", "convolution"), ("c3", "linear"), ("c0", "operation of kernels/")):
        drawing.dot(x, axes.bottom + 58, kind)
        drawing.text(x + 10, axes.bottom + 62, words, "dim")
        x += 34 + 7.5 * len(words)
    return drawing.svg(axes.bottom + 80)


def ticks(least: float, most: float) -> list[float]:
    """1, 2, 5 of every power of ten between both, only the ones where there are many."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    found = [step * 10.0**power for power in powers for step in (1, 2, 5) if least <= step * 10.0**power <= most]
    return found if len(found) <= 7 else [tick for tick in found if f"{tick:e}".startswith("1.0")]


def where(document: dict[str, Any]) -> str:
    return f"{document['machine']['device']}, {document['setting']['model']}, {document['setting']['calls']} calls"
