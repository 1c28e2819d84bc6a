"""The tables of the tuned comparison: rows with training recipes, what was tried, and what the front page shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.proof.claims.page import figure, signed
from bench.proof.claims.search import QUESTIONS, Question
from bench.proof.claims.tuned import ARMS, LONGEST
from bench.report.tables import Cell, Row, Table, markdown, percent, text

MODEL_HAS_SEEN = 24_576, 139_200  # captioned scenes of this world, and how often one was drawn while it was trained
FRONT = {  # the arms that the front page shows, and their headings there
    "real": "real",
    "both": "and generated",
    "labelled": "and unlabelled real, labelled by the decoder",
    "self": "and the same, labelled by the student",
    "many": "ten times as many real",
}


def _claim(row: Row) -> str:
    """What is asked; a row whose gain is not outside 2 sigma says so first."""
    if not (gain := row["gains"].get("both")):
        return row["title"]
    if gain["students"] < 2:
        return f"**One student of each kind:** {row['title']}"
    return row["title"] if gain["holds"] else f"**Does not hold:** {row['title']}"


def _cell(name: str, has_course: bool) -> Cell:
    def told(row: Row) -> str:
        if name not in row["arms"]:
            return "–"
        cell = row["arms"][name]
        around = "" if cell["spread"] is None else f" ± {figure(row, cell['spread'])}"
        course = f" ({cell['course']}; {'/'.join(f'{step:,}' for step in cell['steps'])})" if has_course else ""
        return f"{figure(row, cell['mean'])}{around}{course}"

    return told


def _gain(name: str) -> Cell:
    def told(row: Row) -> str:
        if name not in row["gains"]:
            return "–"
        found = row["gains"][name]
        shown = signed(row, found["gain"])
        if "interval" in found:
            shown += f" ({' to '.join(signed(row, value) for value in found['interval'])})"
        return shown

    return told


def _closed(name: str) -> Cell:
    return lambda row: percent(row["gains"].get(name, {}).get("closed"))


def table(rows: Mapping[str, Row]) -> Table:
    """Every training set there is, with its training recipe and the steps of each student."""
    arms = [name for name in ARMS if any(name in row["arms"] for row in rows.values())]
    columns = {"claim": _claim, "figure": text("figure")}
    columns |= {ARMS[name]: _cell(name, has_course=True) for name in arms}
    for name in (name for name in arms if name not in ("real", "many")):
        columns |= {f"gain of {ARMS[name]} (95 %)": _gain(name), f"gap closed by {ARMS[name]}": _closed(name)}
    return Table(columns)


def front_table() -> Table:
    """The arms of the front page, the gain of generated images, and the share of the gap that they close."""
    columns = {"claim": _claim, "figure": text("figure")}
    columns |= {heading: _cell(name, has_course=False) for name, heading in FRONT.items()}
    return Table(columns | {"gain of generated (95 % interval)": _gain("both"), "gap closed": _closed("both")})


def _best_look(question: Question, key: str) -> Cell:
    best = min if question.less_is_better else max
    return lambda row: figure({"figure": question.figure}, best(look[key] for look in row["looks"].values()))


def search_table() -> Table:
    """Every training recipe that was tried, with its best figure on the validation scenes."""
    columns = {"real scenes": text("real"), "training set": lambda row: ARMS[row["arm"]], "recipe": text("course")}
    columns["student"] = lambda row: f"{'chosen' if row['is_chosen'] else 'search'}, {row['seed']}"
    columns["steps"] = lambda row: f"{max(map(int, row['looks'])):,}"
    return Table(columns | {f"{one.title}, {one.figure}": _best_look(one, key) for key, one in QUESTIONS.items()})


def setting_line(document: Mapping[str, Any]) -> str:
    scale, (scenes, drawn) = document["setting"], MODEL_HAS_SEEN
    students = max(
        (len(cell["seeds"]) for row in document["rows"].values() for cell in row["arms"].values()), default=0
    )
    count = real_scenes(document)
    unlabelled = ", as many unlabelled scenes" if count == scale["real"] else ""
    return (
        f"{count} real scenes, {scale['synthetic']:,} generated images{unlabelled}; "
        f"{students} students of each kind, {scale['test']:,} unseen scenes, mean ± deviation. "
        f"Each figure is for the best training recipe tried, at most {LONGEST * scale['steps']:,} steps. The diffusion "
        f"model was trained on {scenes:,} captioned scenes of this world ({drawn:,} examples), as Stable Diffusion "
        f"was on images of the web, and its decoders on the {count} real scenes{_missing(document)}"
    )


def _missing(document: Mapping[str, Any]) -> str:
    missing = document["missing"]
    return f". **Not finished:** {missing} students are missing" if missing else ""


def real_scenes(document: Mapping[str, Any]) -> int:
    return document["tried"][0]["real"] if document["tried"] else document["setting"]["real"]


def source(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    return f"`{document['command']}`, {document['date'][:10]}, {machine['device']}, commit {machine['commit']}"


def front(documents: Sequence[Mapping[str, Any]]) -> str:
    """What the front page shows: the fewest real scenes first."""
    usual, *fewer = documents
    facts = f"{source(usual)}: {setting_line(usual)}"
    for one in fewer:
        made = f"`{one['command']}`, commit {one['machine']['commit']}"
        facts += f"; for rows with {real_scenes(one)} real scenes ({made}), on those{_missing(one)}"
    rows = [row for one in fewer for row in one["rows"].values()]
    rows += [{**row, "title": f"{row['title']}, {real_scenes(usual)} real"} for row in usual["rows"].values()]
    return f"{facts}.\n\n{markdown(front_table().cells(rows))}"


def section(documents: Sequence[Mapping[str, Any]], repeated: Sequence[Mapping[str, Any]] = ()) -> str:
    """Rows with courses, what repetitions say of them, and what was tried, for the page of the bench."""
    parts = []
    for one in documents:
        parts += [
            f"{source(one)}: {setting_line(one)}.",
            markdown(table(one["rows"]).cells(list(one["rows"].values()))),
        ]
    for one in repeated:
        cells = front_table().cells(list(one["rows"].values()))
        facts = f"The same with other images, unlabelled, validation and unseen scenes, and students. {source(one)}"
        parts += [f"{facts}: {setting_line(one)}.", markdown(cells)]
    tried = [row for one in documents for row in one["tried"]]
    return "\n\n".join(
        [*parts, "The best figures of every student on the validation scenes:", markdown(search_table().cells(tried))]
    )
