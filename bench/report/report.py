"""python -m bench report: draws the charts and writes the marked sections of README.md and bench/README.md from the
newest result files.
"""

import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.machine.machine import ROOT
from bench.options import FULL_SIZE_MODEL
from bench.peers import OURS
from bench.proof.claims import page as claims
from bench.proof.claims import training_free, tuned_page
from bench.report import probed
from bench.report.results import (
    FEWER,
    PEERLESS,
    REPEATED,
    SUITES,
    cpu_suite,
    measured,
    newest,
    newest_of_each_machine,
    read,
    rows_of,
)
from bench.report.tables import MOST_SPREAD, Cells, Table, aligned, markdown, number, percent, span, unsteady
from bench.rows import MEASUREMENTS, whole_run
from bench.rows.peers import ratios
from bench.rows.race import ratio
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.errors import GateFailed, Missing, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.settings import setting

PROG = "python -m bench report"
PAGES = ("README.md", "bench/README.md", "docs/*.md")
CHARTS = Path("bench", "charts")
MARK = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
WIDTH = 120  # of a line of prose
SHORT = {  # columns of the peers that the front page shows, and their headings there
    "method": "method",
    "precision": "precision",
    "batch": "batch",
    "images/s": "images/s",  # and with how many calls
    "share of peak": "share of peak matmul throughput",
    "our speed-up": "speed-up of datasetdm_fast",  # and in which precision and batch
    "one image each": "with one image, too",
}
DEVICES = {"cpu": "a CPU", "untuned": "a GPU with Triton", "without triton": "a GPU without Triton"}
VERSIONS = ("torch", "diffusers", "onnxruntime")
NO_FULL_SIZE = "Not measured yet: `python -m bench sd14`."
NOT_TUNED = "Not measured yet: `python -m bench claims --tuned`."
NO_CLAIMS = "The claims have not been measured yet: `python -m bench claims`."
FULL_SIZE = cpu_suite(FULL_SIZE_MODEL)
FULL_SIZE_COLUMNS = ("method", "precision", "s/image", "s/UNet call", "share of peak", "memory", "load")
FULL_SIZE_COLUMNS += ("our speed-up", "in a UNet call")
FRONT_HEAD = ["CPU", "datasetdm_fast: s/U-Net call (share of peak)", "peer: s/U-Net call (share of peak)"]
FRONT_HEAD += ["memory, ours : peer", "speed-up in a call", "speed-up of an image"]
GPU_BEFORE = "gpu before"  # suites: earlier races on a GPU, the newest first
NO_GPU = "No race of ours has been measured on a GPU yet."
GPU_COLUMNS = ("method", "precision", "batch", "images/s", "share of peak", "memory", "J/image", "our speed-up")
PAPER_SIDE = 512  # pixels of a side
PAPER_GPUS = (1, 8, 1000)
PAPER_BATCH = 16
PAPER_CLOSING = "Finally, one process closes the run in {} ms per sample, which the last column includes."
PAPER_NOT_CLOSED = "Closing the run was not measured with these, and the last column leaves it out."
PAPER_HEAD = ["GPUs", "images per second", "cores for the loop and files", "files per second"]
PAPER_HEAD += [f"load of one ledger, batches of {PAPER_BATCH}", "time for a million images"]

Document = dict[str, Any]
Documents = dict[str, Document]  # by suite


@dataclass(frozen=True)
class ReportConfig:
    check: bool = setting(False, "write nothing; exit 4 where a page or a chart disagrees with the newest result file")


def main(arguments: Sequence[str]) -> int:
    config, _ = parse(arguments, ReportConfig, PROG, __doc__)
    files = wanted(ROOT)
    stale = [path for path, text in files.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
    if config.check and stale:
        raise GateFailed(
            f"bench: {names} disagree with the newest result file",
            "run `python -m bench report` and commit what it writes",
        )
    if not config.check:
        for path in stale:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files[path], encoding="utf-8")
        print(f"written: {names}" if stale else "nothing has changed")
    return 0


def wanted(root: Path) -> dict[Path, str]:
    """Every page and chart as the newest result files of `root` would have it."""
    folder = root / "bench" / "results"
    found = {suite: read(path) for suite in (*SUITES, *PEERLESS) if (path := newest(suite, folder))}
    found |= {f"{GPU_BEFORE} {k}": read(path) for k, path in enumerate(reversed(measured("gpu", folder)[:-1]))}
    found |= {f"{FULL_SIZE} {k}": read(path) for k, path in enumerate(newest_of_each_machine(FULL_SIZE, folder))}
    of_claims = [read(path) for path in measured("claims", folder)]
    if before := [one for one in of_claims if one["scale"]["steps"] != of_claims[-1]["scale"]["steps"]]:
        found["claims before"] = before[-1]
    if not any(suite in found for suite in SUITES):
        raise Missing(f"{folder}: holds no result file", "measure first: python -m bench")
    files = {
        root / CHARTS / f"{suite}-{name}.svg": text
        for suite in SUITES
        for pictures in (drawn(found[suite]).values() if suite in found else ())
        for name, text in pictures.items()
    }
    if "claims" in found:
        files[root / CHARTS / "claims.svg"] = claims.chart(found["claims"])
    for path in (path for pattern in PAGES for path in sorted(root.glob(pattern))):
        files[path] = filled(path, found, root)
    return files


def drawn(document: Document) -> dict[str, dict[str, str]]:
    """Measurement -> the charts of it that there are rows for, by name."""
    found = {}
    for name, measurement in MEASUREMENTS.items():
        if any(row.get("status", "ok") == "ok" for row in rows_of(document, name)):
            found[name] = {chart: draw(document) for chart, draw in measurement.charts.items()}
    return found


def filled(path: Path, found: Documents, root: Path) -> str:
    """A page with its marked sections written anew."""
    charts = os.path.relpath(root / CHARTS, path.parent)

    def section(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise Refused(f"{path.name}: marks a section {match[2]!r}", f"there are {', '.join(SECTIONS)}")
        return f"{match[1]}{wrapped(SECTIONS[match[2]](found, charts).strip())}\n{match[3]}"

    return MARK.sub(section, path.read_text(encoding="utf-8"))


def wrapped(text: str) -> str:
    """The same text with its prose broken into lines; tables, pictures and headings stay."""
    return "\n".join(
        line
        if line.startswith(("|", "!", "#"))
        else textwrap.fill(line, WIDTH, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def summary(found: Documents, charts: str) -> str:
    """The peers of the suite on a CPU in short."""
    if "cpu" not in found:
        return ""
    document = found["cpu"]
    rows = [row for row in rows_of(document, "peers") if row["status"] != "absent"]
    steady = [row for row in rows if not unsteady(row)]
    counts = [len(row["seconds_per_image"]["rounds"]) for row in steady if row["status"] == "ok"]
    facts = f"{source(document)}; {setting_line(document)}. Speed-ups are medians (and ranges) over pairs "
    facts += f"of neighbouring rounds, at least {min(counts, default=0)}."
    if len(steady) < len(rows):
        left = count_noun(len(rows) - len(steady), "row")
        facts += f" Omitted because the machine was busy or the rounds differed: {left}."
    ours = next((row for row in rows if row["peer"] == OURS), {})
    headings = SHORT | {"images/s": f"images/s, {document['setting']['calls']} UNet calls each"}
    headings["our speed-up"] += f" in {ours.get('dtype', 'fp32')}, {count_noun(ours.get('batch', 1), 'image')}"
    table = narrowed(with_single_images(MEASUREMENTS["peers"].tables[0], rows), headings)
    return "\n\n".join([picture("cpu", "peers", charts), facts, markdown(table.cells(steady))])


def source(document: Document) -> str:
    """Command, day, device, versions and commit of a result file."""
    machine = document["machine"]
    versions = "".join(f", {name} {machine['versions'][name]}" for name in VERSIONS if name in machine["versions"])
    made = f"`{document['command']}`, {document['date'][:10]}, {machine['device']}{versions}"
    return f"{made}, commit {machine['commit']}"


def with_single_images(table: Table, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table with a column of how many times as fast ours is where both make one image at a time."""
    alone = next((row for row in rows if row["peer"] == f"{OURS}-1" and row["status"] == "ok"), None)

    def cell(row: Mapping[str, Any]) -> str:
        is_single = row["status"] == "ok" and row["batch"] == 1 and alone is not None and row is not alone
        return f"{number(ratio(alone, row))}×" if is_single else ""

    return replace(table, columns=table.columns | {"one image each": cell})


def narrowed(table: Table, columns: Mapping[str, str]) -> Table:
    """Some columns of a table under other headings."""
    return replace(table, columns={heading: table.columns[name] for name, heading in columns.items()})


def whole(suite: str) -> Callable[[Documents, str], str]:
    """Everything of one suite's newest file."""

    def section(found: Documents, charts: str) -> str:
        if suite not in found:
            return NO_GPU.replace("GPU", suite.upper())
        document, pictures = found[suite], drawn(found[suite])
        parts = [f"`{document['command']}`, {document['date']}. {limit_line(document)}. {setting_line(document)}."]
        for name, title, cells in tables_of(document):
            parts.append(f"### {title}")
            parts += [picture(suite, chart, charts) for chart in pictures.pop(name, ())]
            parts.append(markdown(cells))
        return "\n\n".join(parts)

    return section


def tables_of(document: Document) -> list[tuple[str, str, Cells]]:
    """Measurement, title and cells of every table that has rows."""
    found = []
    for name, measurement in MEASUREMENTS.items():
        for table in measurement.tables:
            cells = table.cells(rows_of(document, name))
            if cells[1]:
                found.append((name, table.title or measurement.title, cells))
    return found


def picture(suite: str, name: str, folder: str) -> str:
    return f"![{suite.upper()}: {name}]({folder}/{suite}-{name}.svg)"


def limit_line(document: Document) -> str:
    """The machine and its measured limits in one sentence."""
    found, machine = rows_of(document, "limits")[0], document["machine"]
    products = ", ".join(f"{rate:g} TFLOP/s in {name}" for name, rate in found["tflops"].items())
    exps = f", {found['gexps']:g} G exponentials/s" if found["gexps"] else ""
    where = f"{machine['device']}, torch {machine['versions']['torch']}, commit {machine['commit']}"
    return f"{where}: matrix products {products}; copies {found['gbps']:g} GB/s{exps}"


def setting_line(document: Document) -> str:
    found = document["setting"]
    model = found["model"] + ("" if found["trained"] else ", seeded weights")
    work = f"{found['calls']} UNet calls, {found['tflop_per_image']:g} TFLOP an image"
    return f"{model}, {found['size']} pixels, {work}; labels: {', '.join(found['tasks'])}"


def terminal(document: Document, is_coloured: bool = False) -> str:
    parts = [limit_line(document), setting_line(document)]
    parts += [f"{title}\n{aligned(cells, is_coloured)}" for _, title, cells in tables_of(document)]
    names = ", ".join(f"{name} {value:g}" for name, value in ratios(document).items())
    return "\n\n".join([*parts, f"parity {parity(document)}{'; ' + names if names else ''}"])


def parity(document: Document) -> str:
    """`fail` where outputs differ, `incomplete` where a peer failed before or after they were compared."""
    rows = [row for part in document["parts"].values() for row in part.get("rows", [])]
    failed = [row for row in rows if row.get("status") == "failed"]
    if any("peer" not in row or not all(one["passed"] for one in row.get("parity", ())) for row in failed):
        return "fail"
    return "incomplete" if failed else "pass"


def paper(found: Documents, charts: str) -> str:
    """What many GPUs would need, computed from the costs that were measured."""
    cpu = found.get("cpu") or found["gpu"]
    raced = rows_of(found["gpu"], "peers") if "gpu" in found else []
    rate = next((row.get("images_per_second") for row in raced if row["peer"] == OURS and row["status"] == "ok"), None)
    if rate is None:
        return NO_GPU
    device = found["gpu"]["machine"]["device"]
    scale = {name: [row for row in rows_of(cpu, "scale") if name in row] for name in ("ms", "written", "commit_ms")}
    if not all(scale.values()):
        return "The part `scale` has not been measured yet."
    closed = next((row["closing_ms"] for row in rows_of(cpu, "scale") if "closed" in row), None)
    own, disk = scale["ms"][-1]["ms"]["own"], scale["commit_ms"][0]
    scene = min(scale["written"], key=lambda row: abs(row["pixels"] - PAPER_SIDE))
    written = scene["core_ms"] * (PAPER_SIDE / scene["pixels"]) ** 2
    rows = []
    for count in PAPER_GPUS:
        total = rate * count
        hours, busy = (1e6 / total + 1e3 * (closed or 0)) / 3600, total / PAPER_BATCH * disk["commit_ms"] / 1e3
        took = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"
        rates = [f"{total:,.1f}", f"{total * (own + written) / 1e3:,.2f}", f"{total * disk['files']:,.0f}"]
        rows.append([f"{count:,}", *rates, percent(busy), took])
    return (
        f"One {device} makes {number(rate)} images per second. Measured on this CPU: the generation loop's own "
        f"work is {number(own)} ms of one core per image, encoding and writing {number(written)} ms for {PAPER_SIDE} "
        f"pixels and four kinds of labels; one commit of a batch takes {number(disk['commit_ms'])} ms. Ranks do not "
        "communicate, so throughput grows with the number of GPUs as long as there are the cores of the third column, "
        "a disk that can write the files of the fourth, and a ledger that can take the commits. The ledger takes them "
        "one after the other, so its load must stay well below 100 %; otherwise divide the prompts among "
        f"several run folders. {PAPER_CLOSING.format(number(closed)) if closed else PAPER_NOT_CLOSED}"
        "\n\n"
    ) + markdown((PAPER_HEAD, rows))


def forms_table() -> Cells:
    """Which operation runs as which form on which device, from the kernels' own files."""
    from datasetdm_fast.kernels import OPS
    from datasetdm_fast.kernels.choice import form_on

    measured = sorted({device for op in OPS.values() for device in getattr(op, "DEVICES", {})} - set(DEVICES))
    rows = []
    for op, module in OPS.items():
        plain = "plain" if hasattr(module, "plain") else "reference"
        forms = [*(form_on(op, name) for name in DEVICES), *(form_on(op, name, "untuned") for name in measured)]
        rows.append([op, *(plain if form == "plain" else form for form in forms)])
    return ["operation", *DEVICES.values(), *measured], rows


def full_size(found: Documents, charts: str) -> str:
    """The peers at the size of Stable Diffusion 1.4 on each CPU that was measured, one image at a time."""
    table, tables = narrowed(MEASUREMENTS["peers"].tables[0], {name: name for name in FULL_SIZE_COLUMNS}), []
    for document in (found[suite] for suite in found if suite.startswith(f"{FULL_SIZE} ")):
        rows = [row for row in rows_of(document, "peers") if row["status"] != "absent"]
        tables.append(f"{source(document)}; {setting_line(document)}.\n\n{markdown(table.cells(rows))}")
    return "\n\n".join(tables) or NO_FULL_SIZE


def front(found: Documents, charts: str) -> str:
    """Each peer that raced at the size of Stable Diffusion 1.4 beside ours in its precision, as README shows them;
    races of which a row is unsteady are marked, and come last.
    """
    rows, sources = [], []
    races = [found[suite] for suite in found if suite.startswith(f"{FULL_SIZE} ")]
    for document in sorted(races, key=lambda race: any(map(unsteady, timed_rows(race)))):
        name, _, clock = document["machine"]["device"].replace("(R)", "").partition(" @ ")
        device = f"{' '.join(name.split()[:2]).strip(',')} {clock.partition(',')[0]}".strip()
        raced = [row for row in timed_rows(document) if "call_s" in row]
        ours = {row["dtype"]: row for row in raced if row["peer"].startswith(OURS)}
        peers = [row for row in raced if not row["peer"].startswith(OURS) and row["dtype"] in ours]
        rows += [front_row(device, ours[peer["dtype"]], peer) for peer in peers]
        sources.append(f"{document['date'][:10]} ({document['machine']['commit']})")
    made = f"`python -m bench sd14`: {', '.join(sources)}. Peak is that of matrix products. Unsteady: "
    made += f"the rounds of a row differed by over {percent(MOST_SPREAD)}."
    return f"{markdown((FRONT_HEAD, rows))}\n\n{made}" if rows else NO_FULL_SIZE


def front_row(device: str, ours: Mapping[str, Any], peer: Mapping[str, Any]) -> list[str]:
    """What ours and a peer took for a U-Net call and an image, and how many times as fast ours was."""
    mark = " (unsteady)" if unsteady(ours) or unsteady(peer) else ""
    calls = [f"{number(row['call_s']['median'])} ({percent(row['share_of_products'])})" for row in (ours, peer)]
    memory = f"{ours['peak_mib'] / 1024:.1f} : {peer['peak_mib'] / 1024:.1f} GiB"
    title = peer["title"].partition(",")[0]
    speedups = [span(peer[times], unit="×") for times in ("call_over", "ours_over")]
    return [f"{device}, {ours['dtype']}{mark}", calls[0], f"{title} {calls[1]}", memory, *speedups]


def gpu_front(found: Documents, charts: str) -> str:
    """The race and the whole run on a GPU in one table, with what the card was set to and drew; peers that raced before
    on such a card are beside their own source.
    """
    if "gpu" not in found:
        return NO_GPU
    document, rows = found["gpu"], {row["peer"]: row for row in timed_rows(found["gpu"])}
    what = f"{document['setting']['model']}, {document['setting']['calls']} UNet calls an image with all labels"
    sources = [f"{what}, {card_line(document)}{run_line(rows.get(whole_run.PEER))}."]
    earlier = []
    for before in (found[suite] for suite in found if suite.startswith(f"{GPU_BEFORE} ")):
        if before["machine"]["device"] != document["machine"]["device"]:
            continue
        others = [row for row in timed_rows(before) if row["peer"] not in rows]
        rows |= {row["peer"]: row for row in others}
        titles = " and ".join(row["title"] for row in others)
        earlier += [f"{titles} ({before['machine']['commit']})"] if others else []
    sources += [f"Earlier races with ours: {'; '.join(earlier)}."] if earlier else []
    table = narrowed(MEASUREMENTS["peers"].tables[0], {name: name for name in GPU_COLUMNS})
    slowest_first = sorted(rows.values(), key=lambda row: row["images_per_second"])
    return markdown(table.cells(slowest_first)) + "\n\n" + " ".join(sources)


def timed_rows(document: Document) -> list[dict[str, Any]]:
    return [row for row in rows_of(document, "peers") if row["status"] == "ok" and "images_per_second" in row]


def card_line(document: Document) -> str:
    """Day, card with what it may draw, versions and commit."""
    machine, clocks = document["machine"], document["machine"]["clocks"]
    names = [name for name in ("torch", "diffusers") if name in machine["versions"]]
    versions = "".join(f", {name} {machine['versions'][name]}" for name in names)
    return (
        f"{document['date'][:10]}, {machine['device']} ({clocks['power_limit_w']} W and {clocks['graphics_most_mhz']} "
        f"MHz at most), driver {machine['driver']}, CUDA {machine['versions']['cuda']}{versions}, commit "
        f"{machine['commit']}"
    )


def run_line(row: Mapping[str, Any] | None) -> str:
    """What the row of a whole run covers, and what the card drew meanwhile."""
    if row is None:
        return ""
    cut = " when its time was up" if row.get("is_left") else ""
    drew = f", at {row['watts']} W and {row['mhz']} MHz" if "watts" in row and "mhz" in row else ""
    counted = row.get("counted", row["images"] - row["batch"])
    which = "all" if counted == row["images"] else f"the last {counted}"
    return f"; the whole run had made {row['images']} images{cut}, and {which} count{drew}"


def tuned_front(found: Documents, charts: str) -> str:
    """The table of the front page: what generated images are worth, each training set with its best recipe."""
    return tuned_page.front(tuned_of(found)) if "tuned" in found else NOT_TUNED


def tuned_gains(found: Documents, charts: str) -> str:
    """What remains of the gains with the best training recipe found for every training set."""
    return tuned_page.section(tuned_of(found), tuned_of(found, REPEATED)) if "tuned" in found else NOT_TUNED


def tuned_of(found: Documents, ending: str = "") -> list[Document]:
    """The usual number of real scenes, and a smaller one where that was measured."""
    return [found[suite + ending] for suite in ("tuned", FEWER) if suite + ending in found]


def earlier_claims(found: Documents, charts: str) -> str:
    """The claims as they were measured before their rows were changed, and with other steps."""
    return claims.figures(found["claims before"]) if "claims before" in found else "There are none."


def training_free_row(found: Documents, charts: str) -> str:
    """What labels from attention teach beside those of a decoder."""
    if training_free.NAME not in found:
        return f"Not measured yet: `python -m bench claims --rows {training_free.NAME}`."
    return training_free.section(found[training_free.NAME])


SECTIONS: dict[str, Callable[[Documents, str], str]] = {
    "front": front,
    "summary": summary,
    "cpu": whole("cpu"),
    "gpu": whole("gpu"),
    "gpu-front": gpu_front,
    "probed": lambda found, charts: probed.section(found["probe"]) if "probe" in found else probed.NONE,
    "full-size": full_size,
    "paper": paper,
    "tuned-front": tuned_front,
    "tuned": tuned_gains,
    "training-free": training_free_row,
    "claims": lambda found, charts: claims.section(found["claims"], charts) if "claims" in found else NO_CLAIMS,
    "earlier-claims": earlier_claims,
    "forms": lambda found, charts: markdown(forms_table()),
}
