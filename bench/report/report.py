"""python -m bench report: draws the charts and writes the marked sections of README.md and bench/README.md from the
newest result files.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.claims import page as claims
from bench.machine.machine import ROOT
from bench.report import charts, tables
from bench.report.results import SUITES, newest, read, rows_of
from datasetdm_fast.config import setting
from datasetdm_fast.errors import GateFailed, Missing, Refused

PROG = "python -m bench report"
PAGES = ("README.md", "bench/README.md")
MARK = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
CHARTS = "bench/charts"
WIDTH = 120  # of a line of prose
SHORT = {  # columns of the peers that the front page shows, and what it calls them
    "who": "who",
    "type": "type",
    "batch": "batch",
    "images/s": "images/s",
    "of the products' limit": "share of peak matmul throughput",
    "ours is": "speed-up of datasetdm_fast in fp32",
}
GAINS = {  # the same of the claims
    "claim": "claim",
    "figure": "figure",
    "real alone": "real images",
    "both": "real and generated",
    "gain (95 %)": "gain (95 % interval)",
    "asked for": "asked for",
    "holds": "holds",
}
VERSIONS = ("torch", "diffusers", "onnxruntime")
ASSUMED = 4.5  # images a second of one GPU, the first release's aim, where none was measured yet
NO_CLAIMS = "The claims have not been measured yet: `python -m bench claims`."
PAPER_SIDE = 512  # pixels of a side
PAPER_GPUS = (1, 8, 1000)
PAPER_BATCH = 16


@dataclass(frozen=True)
class ReportConfig:
    check: bool = setting(False, "write nothing; exit 4 where a page or a chart disagrees with the newest result file")


def main(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, ReportConfig, PROG, __doc__)
    stale = [
        path for path, text in wanted(ROOT).items() if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if config.check:
        if stale:
            raise GateFailed(
                f"bench: {names} disagree with the newest result file",
                "run `python -m bench report` and commit what it writes",
            )
        return 0
    for path, text in wanted(ROOT).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"written: {names}" if stale else "nothing has changed")
    return 0


def wanted(root: Path) -> dict[Path, str]:
    """Every page and chart as the newest result files of `root` would have it."""
    folder = root / "bench" / "results"
    found = {suite: read(path) for suite in SUITES if (path := newest(suite, folder))}
    if not found:
        raise Missing(f"{folder}: holds no result file", "measure first: python -m bench")
    files = {
        root / "bench" / "charts" / f"{suite}-{name}.svg": text
        for suite, document in found.items()
        for name, text in charts.drawn(document).items()
    }
    if path := newest("claims", folder):
        found["claims"] = read(path)
        files[root / "bench" / "charts" / "claims.svg"] = claims.chart(found["claims"])
    for page in PAGES:
        path = root / page
        files[path] = filled(path.read_text(encoding="utf-8"), found, page)
    return files


def filled(text: str, found: dict[str, dict[str, Any]], page: str) -> str:
    """A page with its marked sections written anew, their charts addressed from where the page lies."""
    folder = Path(os.path.relpath(CHARTS, Path(page).parent)).as_posix()

    def section(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise Refused(f"{page}: marks a section {match[2]!r}", f"there are {', '.join(SECTIONS)}")
        written = SECTIONS[match[2]](found).strip().replace(f"]({CHARTS}/", f"]({folder}/")
        return f"{match[1]}{wrapped(written)}\n{match[3]}"

    return MARK.sub(section, text)


def wrapped(text: str) -> str:
    """The same text with its prose broken into lines; tables, pictures and headings stay."""
    return "\n".join(
        line
        if line.startswith(("|", "!", "#"))
        else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def summary(found: dict[str, dict[str, Any]]) -> str:
    """What the front page says of speed: the peers of every suite in short."""
    parts = []
    for suite, document in found.items():
        if suite not in SUITES:
            continue
        parts += [
            picture(suite, "peers"),
            f"{source(document)}; {tables.setting_line(document)}. A speed-up is the median over pairs of "
            "neighbouring rounds, with the least and the most in brackets.",
            tables.markdown(short(document)),
        ]
    return "\n\n".join(parts)


def source(document: dict[str, Any]) -> str:
    """Command, day, device, versions and commit of a result file."""
    machine = document["machine"]
    versions = "".join(f", {name} {machine['versions'][name]}" for name in VERSIONS if name in machine["versions"])
    return (
        f"`{document['command']}`, {document['date'][:10]}, {machine['device']}{versions}, commit {machine['commit']}"
    )


def short(document: dict[str, Any]) -> tables.Table:
    """The peers that could run here, in few columns."""
    head, rows = tables.peer_table(document)
    there = [[cell.replace(" x (", "× (") for cell in row] for row in rows if not row[3].startswith("not here")]
    return narrowed((head, there), SHORT)


def narrowed(table: tables.Table, columns: dict[str, str]) -> tables.Table:
    """Some columns of a table under other headings."""
    head, rows = table
    kept = [head.index(name) for name in columns]
    return list(columns.values()), [[row[k] for k in kept] for row in rows]


def gains(found: dict[str, dict[str, Any]]) -> str:
    """What the front page says of the worth of generated images: figure and verdict of every claim, and of one that has
    several rows the row with the least gain.
    """
    if "claims" not in found:
        return NO_CLAIMS
    document, least = found["claims"], {}
    head, rows = claims.table(document)
    for (title, row), cells in zip(claims.lines(document), rows, strict=True):
        claim = title.partition(",")[0]
        if row["synthetic"] is not None and (claim not in least or row["gain"] < least[claim][0]):
            least[claim] = row["gain"], [*cells[:-1], cells[-1].partition(":")[0]]
    text = f"{source(document)}: {claims.setting_line(document)}."
    return f"{text}\n\n{tables.markdown(narrowed((head, [cells for _, cells in least.values()]), GAINS))}"


def whole(suite: str) -> Callable[[dict[str, dict[str, Any]]], str]:
    """Everything of one suite's newest file."""

    def section(found: dict[str, dict[str, Any]]) -> str:
        if suite not in found:
            return f"No {suite.upper()} has been measured yet."
        document = found[suite]
        parts = [
            f"`{document['command']}`, {document['date']}. {tables.limit_line(document)}. "
            f"{tables.setting_line(document)}."
        ]
        drawn = charts.drawn(document)
        for name, (title, build) in tables.TABLES.items():
            table = build(document)
            pictures = [picture(suite, chart) for chart in drawn if chart == name or charts.NEEDS.get(chart) == name]
            if table[1]:
                parts += [f"### {title}", *pictures, tables.markdown(table)]
        return "\n\n".join(parts)

    return section


def picture(suite: str, name: str) -> str:
    return f"![{suite.upper()}: {name}]({CHARTS}/{suite}-{name}.svg)"


def paper(found: dict[str, dict[str, Any]]) -> str:
    """The model on paper: what many GPUs would need, from the constants that were measured."""
    cpu = found.get("cpu") or next(iter(found.values()))
    gpu = found.get("gpu")
    rate = tables.peers(gpu)["ours"].get("images_per_second") if gpu else None
    scale = {name: [row for row in rows_of(cpu, "scale") if name in row] for name in ("ms", "written", "commit_ms")}
    if not all(scale.values()):
        return "The part `scale` has not been measured yet."
    own, disk = scale["ms"][-1]["ms"]["own"], scale["commit_ms"][0]
    scene = min(scale["written"], key=lambda row: abs(row["pixels"] - PAPER_SIDE))
    written = scene["core_ms"] * (PAPER_SIDE / scene["pixels"]) ** 2
    each = rate or ASSUMED
    source = "measured" if rate else "assumed, as none was measured yet"
    costs = (
        f"the driver's own work is {tables.number(own)} ms of one core an image, encoding and writing "
        f"{tables.number(written)} ms "
        f"for {PAPER_SIDE} pixels and four kinds of labels, one commit of a batch {tables.number(disk['commit_ms'])} ms"
    )
    said = (
        f"One GPU makes {tables.number(each)} images a second ({source}). Measured on this CPU: {costs}. Ranks do "
        "not communicate, so images a second grow with the GPUs as long as there are the cores of the third column, a "
        "disk that takes the files of the fourth, and a ledger that takes the commits: it takes them one after the "
        "other, so the share of its time must stay well below 100 %; where it does not, the prompts are divided among "
        "several run folders."
    )
    head = [
        "GPUs",
        "images a second",
        "cores for driver and files",
        "files a second",
        f"time of one ledger, batches of {PAPER_BATCH}",
        "a million images",
    ]
    rows = []
    for count in PAPER_GPUS:
        total = each * count
        hours = 1e6 / total / 3600
        took = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        cores, busy = total * (own + written) / 1e3, total / PAPER_BATCH * disk["commit_ms"] / 1e3
        rows.append(
            [
                f"{count:,}",
                f"{total:,.1f}",
                f"{cores:,.2f}",
                f"{total * disk['files']:,.0f}",
                tables.percent(busy),
                took,
            ]
        )
    return f"{said}\n\n{tables.markdown((head, rows))}"


def claimed(found: dict[str, dict[str, Any]]) -> str:
    """Whether generated images help a student."""
    return claims.section(found["claims"]) if "claims" in found else NO_CLAIMS


SECTIONS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "summary": summary,
    "cpu": whole("cpu"),
    "gpu": whole("gpu"),
    "paper": paper,
    "gains": gains,
    "claims": claimed,
}
