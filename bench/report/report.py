"""python -m bench report: draws the charts and writes the marked sections of README.md and bench/README.md from the
newest result files.
"""

from __future__ import annotations

import re
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
SHORT = ("who", "type", "batch", "images/s", "of the products' limit", "ours is")
ASSUMED = 4.5  # images a second of one GPU, the first release's aim, where none was measured yet
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
    """A page with its marked sections written anew."""

    def section(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise Refused(f"{page}: marks a section {match[2]!r}", f"there are {', '.join(SECTIONS)}")
        return f"{match[1]}{SECTIONS[match[2]](found).strip()}\n{match[3]}"

    return MARK.sub(section, text)


def summary(found: dict[str, dict[str, Any]]) -> str:
    """What the front page says: the peers of every suite in short."""
    parts = []
    for suite, document in found.items():
        if suite not in SUITES:
            continue
        parts += [
            picture(suite, "peers", "bench/charts"),
            f"{tables.setting_line(document)}; {document['machine']['device']}.",
            tables.markdown(short(document)),
        ]
    return "\n\n".join(parts)


def short(document: dict[str, Any]) -> tables.Table:
    """The peers that could run here, in few columns."""
    head, rows = tables.peer_table(document)
    kept = [head.index(name) for name in SHORT]
    there = [row for row in rows if not row[3].startswith("not here")]
    return list(SHORT), [[row[k] for k in kept] for row in there]


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
            pictures = [
                picture(suite, chart, "charts") for chart in drawn if chart == name or charts.NEEDS.get(chart) == name
            ]
            if table[1]:
                parts += [f"### {title}", *pictures, tables.markdown(table)]
        return "\n\n".join(parts)

    return section


def picture(suite: str, name: str, folder: str) -> str:
    return f"![{suite.upper()}: {name}]({folder}/{suite}-{name}.svg)"


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
        "not speak with each other, so images "
        "a second grow with the GPUs as long as there are the cores of the third column, a disk that takes the files "
        "of the fourth, and ledgers that take "
        "the commits: one ledger takes them one after the other, so its share of time must stay well below 100 %; "
        "above, the prompts are split over as "
        "many run folders."
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
    return (
        claims.section(found["claims"])
        if "claims" in found
        else "The claims have not been measured yet: `python -m bench claims`."
    )


SECTIONS: dict[str, Callable[[dict[str, dict[str, Any]]], str]] = {
    "summary": summary,
    "cpu": whole("cpu"),
    "gpu": whole("gpu"),
    "paper": paper,
    "claims": claimed,
}
