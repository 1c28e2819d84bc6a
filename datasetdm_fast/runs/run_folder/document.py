"""run.json: its form, how it is read and checked, and how two of them differ."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datasetdm_fast.config import INVERSION, LABELS, MOST_TRIES, SHARD_SIZE
from datasetdm_fast.disk import storage
from datasetdm_fast.disk.sqlite import RESTORE
from datasetdm_fast.engine.labels import check_numbers, check_palette, class_tables, kind_of, task_of_label
from datasetdm_fast.errors import GateFailed, Missing, Refused, quote
from datasetdm_fast.messages import count_noun
from datasetdm_fast.untrusted import documents, images

FORMAT = 3  # of the folder's layout; a reader refuses what it does not know
DOCUMENT, LEDGER, LOCK = "run.json", "state/ledger.sqlite", "state/lock"
DROPPED = "state/dropped/"  # where the files of samples lie that were dropped
CLAIMS = "claims"  # folder of files that tell which process makes which part of a run in progress
SHARDS = "shards"  # folder of the tar files of a run in shards, and the name of that layout
MANIFEST = "manifest"  # folder of a run in shards, with an entry for each that is complete
EXPORTS = "exports"  # where convert writes the exports of a run by default
QUARANTINE = "doubtful/"  # files of samples that --keep trusted or --accept quarantines
# that make run folders, and single samples of them again
COMMANDS = ("generate", "splice", "edit", "vary", "label", "merge", "compat.showlab")
FORM = {
    "versions": {"datasetdm_fast": str},
    "config": {"task": [str], "image_format": str, "sampler": str, "seed": int},
    "plan": {"number": int, "batch_size": int},
    "sampling": {"size": int, "steps": int, "calls": int, "guidance": float},
    "model": {"name": str, "source": str, "licence": str, "digests": dict},
    "decoders": dict,
    "engine": dict,
    "labels": dict,
    "classes": [str],
}
GROWING = ("number", "per_class", "prompts")  # settings that may differ where a run is to have more images
SAMPLED = ("sampler", "steps", "guidance", "size")  # settings whose default is the model's own figure
LARGEST_DOCUMENT = 2**26  # bytes; that of a merged run has the settings of all its parts
RESTORE_DOCUMENT = "Restore run.json from a copy; the ledger of a run folder holds its content under notes."
COMPOSITION_FORM = {"told": str, "sides": str, "source": {"path": str, "digests": dict}}  # of runs made of others
DECODER_FORM = {"digest": str, "licence": str}
DIGEST = re.compile(r"(sha256:)?[0-9a-f]{64}")


class NotInstalled(Missing):
    """A run has a label of a package that is not installed."""


def read_document(folder: Path) -> dict[str, Any] | None:
    """run.json, or None where `folder` is not a run folder yet; a folder that holds anything else is refused."""
    path = folder / DOCUMENT
    with storage.refusing(folder):
        if not path.exists():
            # A process killed right at the start leaves no more than its lock and a half-written description. Another
            # may have begun the run since the first look.
            inside = folder.iterdir() if folder.is_dir() else ()
            if any(each.name != "state" and not storage.is_temporary(each) for each in inside) and not path.exists():
                raise Refused(
                    f"{folder}: the folder is not empty and holds no {DOCUMENT}, so it is not a run folder",
                    "Choose another --out; nothing is ever overwritten.",
                )
            if (run := run_around(folder)) is not None:
                raise Refused(f"{folder}: it lies inside the run folder {run}", "Choose another --out.")
            return None
    try:
        content = storage.read(path, LARGEST_DOCUMENT)
    except Refused as stop:
        raise Refused(stop.cause, RESTORE) from stop
    return parse_document(content, str(path))


def parse_document(content: bytes, path: str) -> dict[str, Any]:
    """The content of a run.json; anything else is refused."""
    document = documents.parse_object(content, path, RESTORE)
    if document.get("format") != FORMAT:
        raise Refused(
            f"{path}: format {documents.quote(document.get('format'))}, this version reads {FORMAT}",
            "Read it with the version that wrote it.",
        )
    try:
        check_document(document)
    except ValueError as error:
        raise Refused(f"{path}: not the description of a run ({error})", RESTORE) from error
    except NotInstalled as stop:
        raise NotInstalled(f"{path}: {stop.cause}", stop.remedy) from stop
    return document


def run_around(folder: Path) -> Path | None:
    """The run folder that `folder` lies in, None where it lies in none."""
    return next((above for above in folder.resolve().parents if (above / LEDGER).exists()), None)


def require_document(folder: Path) -> dict[str, Any]:
    """run.json of a folder that must be a run folder."""
    document = read_document(folder) if (folder / DOCUMENT).exists() else None
    if document is None:
        alike = "" if folder.exists() else storage.named_alike(folder)
        raise Refused(f"{folder}: holds no {DOCUMENT}, so it is not a run folder{alike}", "Name the folder of a run.")
    return document


def refuse_shards(folder: Path) -> None:
    """Refuses a run in shards, for commands that read or change the ledger of a run folder."""
    if (folder / MANIFEST).is_dir():
        raise Refused(
            f"{folder}: its samples are in shards, which this command does not read",
            "Write the samples in another layout with convert, or make the run without --layout shards.",
        )


def is_sharded(document: Mapping[str, Any]) -> bool:
    return document["config"].get("layout") == SHARDS


def shard_size(config: Mapping[str, Any]) -> int:
    """Samples of a shard of a run of these settings."""
    size = config.get("shard_size", SHARD_SIZE)
    if not isinstance(size, int) or size < 1:
        raise Refused(f"run.json: shard_size is {documents.quote(size)}", "Restore it from a copy.")
    return size


def check_document(document: Mapping[str, Any]) -> None:
    """A ValueError where it is not the content of a run.json, NotInstalled where a package that it needs is not."""
    documents.check_form(document, FORM)
    tasks, size = document["config"]["task"], document["sampling"]["size"]
    if len(set(tasks)) < len(tasks):
        raise ValueError("config.task names a label twice")
    _check_installed(document)
    for name, entry in document["decoders"].items():
        documents.check_form(entry, DECODER_FORM, f"decoders.{name}")
    if "class_table" in document:
        class_tables.of_rows(document["class_table"])
    if "composition" in document:
        documents.check_form(document["composition"], COMPOSITION_FORM, "composition")
    for task in tasks:
        try:
            kind = kind_of(task)
        except ValueError as error:
            raise ValueError(f"config.task names {documents.quote(task)}: {error}") from error
        documents.check_form(table := document["labels"].get(task), kind.table_form, f"labels.{task}")
        joints = range(len(table.get("joints", ())))
        if any(len(limb) != 2 or not all(joint in joints for joint in limb) for limb in table.get("limbs", ())):
            raise ValueError(f"labels.{task}.limbs are not pairs of its {len(joints)} joints")
        try:
            check_palette(document["labels"][task])
        except ValueError as error:
            raise ValueError(f"labels.{task}: {error}") from error
    check_numbers(document["classes"], {task: document["labels"][task] for task in tasks})
    documents.check_form(document.get("mixed", []), [{"engine": dict, "number": int}], "mixed")
    documents.check_form(document["config"].get("combine", []), [str], "config.combine")
    if made_by(document) not in COMMANDS:
        raise ValueError(f"command is {documents.quote(document['command'])}, expected {', '.join(COMMANDS)}")
    if document["config"]["image_format"] not in ("png", "jpg"):
        raise ValueError(
            f"config.image_format is {documents.quote(document['config']['image_format'])}, expected png or jpg"
        )
    if (
        not 0 < size**2 <= images.MOST_PIXELS
        or not 0 < document["plan"]["number"] < 2**48
        or not 0 < document["plan"]["batch_size"] < 2**31
    ):
        raise ValueError("a number in sampling or plan is out of range")


def _check_installed(document: Mapping[str, Any]) -> None:
    """Refuses a run with a label that another package makes, where that package is not installed."""
    labellers, packages = document["sampling"].get("labellers", {}), document.get("packages", {})
    documents.check_form(labellers, dict, "sampling.labellers")
    documents.check_form(packages, dict, "packages")
    packages = {**packages, **labellers}
    for label in document["config"]["task"]:
        if task_of_label(label) in LABELS or not (label in packages or label in document["decoders"]):
            continue
        package = f"the package {documents.quote(packages[label])}" if label in packages else "another package"
        raise NotInstalled(
            f"the label {documents.quote(label)} is made by {package}, which is not installed here",
            "Install that package, then run the same command again.",
        )


def table_of(stored: Mapping[str, Any]) -> class_tables.ClassTable | None:
    """The user's own class words that run.json holds, if any."""
    return class_tables.of_rows(stored["class_table"]) if "class_table" in stored else None


def quarantines(config: Mapping[str, Any]) -> bool:
    """Whether a run of these settings quarantines samples and makes others in their place."""
    return config.get("keep") == "trusted" or bool(config.get("accept"))


def most_samples(config: Mapping[str, Any], number: int) -> int:
    """Samples that a run of `number` makes at most."""
    return number * (config.get("most_tries", MOST_TRIES) if quarantines(config) else 1)


def made_by(document: Mapping[str, Any]) -> str:
    """The command that made a run folder."""
    return document.get("command", COMMANDS[0])


def maker(document: Mapping[str, Any]) -> str:
    """The command line, without its flags, that made a run folder."""
    return f"python -m datasetdm_fast.{made_by(document)}"


def to_see_damage(run: str | Path) -> str:
    """What to do about a run with damaged files, for a refusal."""
    return f"See what is damaged with: python -m datasetdm_fast.audit {quote(run)}"


def damage_failure(run: str | Path, name: str) -> GateFailed:
    """What a command ends with that needs a file, or a row, which is not as it was written."""
    return GateFailed(f"{run}: {name} is missing or has changed since it was written", to_see_damage(run))


def without_ledger(folder: Path, document: Mapping[str, Any]) -> Refused:
    """The refusal of a run folder whose ledger is not there."""
    return Refused(f"{folder}: holds no {LEDGER}", f"Run {maker(document)} with its flags again: it resumes.")


def sides(document: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a sample's image: those of its row where the images of the run have several sizes."""
    height, width = recipe.get("sides") or [document["sampling"]["size"]] * 2
    if not (isinstance(height, int) and isinstance(width, int) and 0 < height * width <= images.MOST_PIXELS):
        raise ValueError(f"its row has the sides {documents.quote([height, width])}")
    return height, width


def size_in_words(document: Mapping[str, Any]) -> str:
    """Width and height of the images of a run, for a reader."""
    size = document["sampling"]["size"]
    return document["composition"]["sides"] if "composition" in document else f"{size} × {size} pixels"


def runs_of(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The runs that a merged run, or a composition of one, was made from; of any other run itself."""
    source = document.get("composition", {}).get("source", {})
    if "runs" in source:
        for run in source["runs"]:
            yield from runs_of(run)
    elif "composition" in source:
        yield from runs_of({**document, "composition": source["composition"]})
    else:
        yield document


def engines_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The engines that computed the samples, each once: also those that continued a run, or made a merged one."""
    engines = {}
    for run in runs_of(document):
        for engine in (run.get("engine", document["engine"]), *(entry["engine"] for entry in run.get("mixed", ()))):
            engines.setdefault(json.dumps(engine, sort_keys=True), engine)
    return list(engines.values())


def engine_names(document: Mapping[str, Any]) -> list[str]:
    """The names of these engines, each once."""
    return list(dict.fromkeys(engine.get("engine", "") for engine in engines_of(document)))


def sampler_in_words(document: Mapping[str, Any]) -> str:
    """Sampler, steps, calls and guidance for a reader; of a merged run those of all its runs."""
    lines = []
    for run in (run if "sampling" in run else document for run in runs_of(document)):
        sampling = run["sampling"]
        name = sampling.get("sampler", run["config"]["sampler"])
        steps = f"{count_noun(sampling['steps'], 'step')} in " if sampling["steps"] else ""  # pictures have none
        lines.append(
            f"{name}, {steps}{count_noun(sampling['calls'], 'call')}"
            + f", guidance {sampling['guidance']:g}" * (name != INVERSION)
        )
    return "; ".join(dict.fromkeys(lines))


def figures_in_words(figures: Iterable[Mapping[str, Any]]) -> str:
    """The figures of the labels of an approximate speed, each with that of exact images."""
    return ", ".join(f"{row['measure']} {row['speed']:.4f} for {row['exact']:.4f}" for row in figures)


def speed_in_words(document: Mapping[str, Any]) -> str:
    """The approximations by which a run, or the runs of a merged one, were made, and how their labels were judged;
    empty of exact ones.
    """
    lines = (
        f"{verdict['name']}, approximate; labels of {verdict['number']} images against exact ones: "
        f"{figures_in_words(verdict['measures'])}"
        for run in runs_of(document)
        if (verdict := run.get("speed"))
    )
    return "; ".join(dict.fromkeys(lines))


def differences(stored: Any, requested: Any, name: str = "") -> list[str]:
    """One line per setting that differs, with both values where a reader can tell them apart."""
    if isinstance(stored, Mapping) and isinstance(requested, Mapping):
        keys = sorted(set(stored) | set(requested))
        return [
            line
            for key in keys
            for line in differences(stored.get(key), requested.get(key), f"{name}.{key}" if name else key)
        ]
    if stored == requested:
        return []
    if all(isinstance(value, str) and DIGEST.fullmatch(value) for value in (stored, requested)):
        return [f"{name}: other content there than asked for"]
    return [f"{name}: {_short(stored)} there, {_short(requested)} asked for"]


def _short(value: Any) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 48 else text[:45] + "..."


def check_same(
    folder: Path | str, stored: Mapping[str, Any], requested: Mapping[str, Any], what: str = "a run"
) -> None:
    """Refuses to resume a folder of `what` that differs in any of the parts of `requested`."""
    if "command" in requested and stored["command"] != requested["command"]:  # whose settings are all others
        raise Refused(
            f"{folder}: it holds a run of {stored['command']}, not of {requested['command']}", "Choose another --out."
        )
    lines = {
        part: differences(stored.get(part), requested[part], "" if part == "config" else part) for part in requested
    }
    changed = {part for part, differing in lines.items() if differing}
    summary = "; ".join(line for differing in lines.values() for line in differing)
    if changed == {"source"}:
        raise Refused(
            f"{folder}: it holds {what} made of other samples ({summary})",
            "Name the runs that it was made of, undo what changed them (restore brings dropped samples back), or "
            "choose another --out.",
        )
    if changed:
        raise Refused(
            f"{folder}: it holds {what} with other settings ({summary})",
            "Choose another --out, or give the flags that it was started with.",
        )


def grows(stored: Mapping[str, Any], requested: Mapping[str, Any]) -> bool:
    """Whether the requested settings are of more images than the stored ones."""
    number = stored.get("number")
    return isinstance(number, int) and requested.get("number", 0) > number


def check_config(folder: Path | str, stored: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Refuses settings that are not those of a run folder; only GROWING ones may differ, where it is to grow."""
    changed = (
        {name: requested[name] for name in GROWING if name in requested} if grows(stored["config"], requested) else {}
    )
    stored_config = stored["config"] | changed
    differing = [name for name in SAMPLED if name in requested and requested[name] != stored_config.get(name)]
    stored_config |= {name: stored["sampling"][name] for name in differing if name in stored["sampling"]}
    requested = {**requested, **{name: requested[name] or None for name in differing}}
    check_same(
        folder, {"command": made_by(stored), "config": stored_config}, {"command": COMMANDS[0], "config": requested}
    )


def pretty(document: Mapping[str, Any]) -> bytes:
    """The bytes of a JSON file that a person may read, one spelling for one value."""
    text = json.dumps(document, ensure_ascii=False, indent=2, sort_keys=True, allow_nan=False)
    return f"{documents.encodable(text)}\n".encode()


def row_facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """How a sample was made, for its row: with prompt and seed enough to make it again."""
    return {
        **document["sampling"],
        "batch_size": document["plan"]["batch_size"],
        "model": {"name": document["model"]["name"], **document["model"]["digests"]},
        "decoders": {task: decoder["digest"] for task, decoder in document["decoders"].items()},
        "engine": document["engine"],
    }
