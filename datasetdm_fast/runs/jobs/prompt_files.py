"""The prompts of a run, read from its settings, files and folders."""

import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import BACKGROUND, class_tables
from datasetdm_fast.engine.loop.prompts import (
    PromptLine,
    PromptSource,
    check_classes,
    check_line,
    shorten,
    split_prompts,
)
from datasetdm_fast.errors import Missing, Refused, nearest
from datasetdm_fast.runs.run_settings import PromptSettings
from datasetdm_fast.untrusted import documents
from datasetdm_fast.untrusted.json_stream import JsonStream

LARGEST_TABLE = 2**22  # bytes
NAME_A_TABLE = "Name the annotation file of LVIS or COCO, or a CSV file."


def listed_words(path: str, chosen: Sequence[str]) -> tuple[str, ...]:
    """The names of a table of the user's own in the order of their numbers, or those of them that are `chosen`."""
    table = own_table(path)
    if unknown := [name for name in chosen if name not in table.names]:
        raise Refused(
            f"--classes: {unknown[0]!r} is not in {path}{nearest(unknown[0], table.names)}",
            f"It has {', '.join(table.names[:20])}{' ...' if len(table.names) > 20 else ''}.",
        )
    numbered = sorted(table.classes, key=lambda word: len(table.classes) if word.number is None else word.number)
    return tuple(chosen) or tuple(word.name for word in numbered if word.name != BACKGROUND)


@cache  # an annotation file may have gigabytes
def own_table(path: str) -> class_tables.ClassTable:
    """The classes of a CSV file with the columns name, say and words, or of LVIS's or COCO's annotation file."""
    storage.check_given(Path(path), "--class-table", NAME_A_TABLE)
    try:
        if path.endswith(".json"):
            categories = [value for key, value, _, _ in JsonStream(Path(path)) if key == "categories"]
            return class_tables.of_categories(categories)
        return class_tables.parse(storage.read(Path(path), LARGEST_TABLE).decode("utf-8-sig"))
    except Refused as stop:  # of the file as a whole
        raise Refused(f"--class-table: {stop.cause}", stop.remedy) from stop
    except UnicodeDecodeError as error:
        raise Refused(f"--class-table {path}: not UTF-8 at byte {error.start}", "Save the file as UTF-8.") from error
    except ValueError as error:
        form = "The first line names the columns: number,name,say,colour,words."
        remedy = NAME_A_TABLE if path.endswith(".json") else form
        raise Refused(f"--class-table {path}: {error}", remedy) from error


LARGEST_FILE = 256 * 2**20  # bytes
LINES = 'Write lines such as {"prompt": "a red ball", "classes": ["ball"], "seed": 7}; only prompt is needed.'


def read_source(settings: PromptSettings, *, has_captions: bool) -> PromptSource:
    """The prompts of a run, checked as far as that needs no tokenizer; a model may have captions of its own."""
    classes = check_classes(settings.classes) if settings.classes else ()
    lines: tuple[PromptLine, ...] = ()
    if settings.per_class:
        if not classes:
            raise Refused(
                f"--per-class {settings.per_class}: there are no classes to make prompts for",
                "Name them: --classes ball,cube",
            )
        if settings.prompts:
            raise Refused(
                "--per-class makes its own prompts, so it cannot be combined with --prompts", "Drop one of the two."
            )
        name = "--classes"
    elif settings.prompts:
        path = _as_path(settings.prompts)
        if path is not None and path.is_dir():
            lines, name = _read_folder(path, settings.truncate_prompts), str(path)
        else:
            name, text = read_prompts(settings.prompts)
            split = parse_lines if path is not None and text.lstrip().startswith("{") else split_prompts
            lines = split(text, name, truncate=settings.truncate_prompts)
    elif has_captions:
        name = "the demo world"
    else:
        raise Refused(
            "no prompts were given, and only the models demo and demo-dit have captions of their own",
            "Add --prompts FILE, or --classes with --per-class.",
        )
    negative = check_line(settings.negative_prompt, "--negative-prompt") if settings.negative_prompt else ""
    table = own_table(settings.class_table) if settings.class_table else None
    return PromptSource(lines, name, classes, settings.per_class, negative, table=table)


def _read_folder(folder: Path, truncate: bool) -> tuple[PromptLine, ...]:
    """DatasetDM's layout: a file a class, named after it; general.txt names no class. Empty files are skipped."""
    if (folder / "classes.txt").exists():  # its lines are names of classes, not prompts of a class `classes`
        raise Refused(
            f"{folder}: holds classes.txt, so it is a data set and no folder of prompts",
            f"Name a file with one prompt per line, such as {folder / 'prompts.txt'}.",
        )
    lines = []
    for path in sorted(folder.glob("*.txt")):
        name, text = read_prompts(str(path))
        classes = () if path.stem == "general" else check_classes([path.stem])
        for prompt in split_prompts(text, name, truncate=truncate) if text.strip() else ():
            lines.append(prompt._replace(classes=classes, file=name))
    if not lines:
        raise Refused(f"{folder}: holds no prompt", "It needs files named CLASS.txt with one prompt per line.")
    return tuple(lines)


def parse_lines(text: str, name: str, *, truncate: bool = False) -> tuple[PromptLine, ...]:
    """Prompts from JSON lines such as those of `prompts` or of a run's samples.jsonl; other keys are left alone."""
    lines = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        value = documents.parse_json(line, where, LINES)
        try:
            documents.check_form(value, {"prompt": str})
            for key in ("negative", "class_prompt"):
                documents.check_form(value.get(key, ""), str, key)
            documents.check_form(value.get("classes", []), [str], "classes")
            seed = value.get("seed")
            if seed is not None and not (type(seed) is int and 0 <= seed < 2**63):
                raise ValueError(f"seed is {documents.quote(seed)}, expected a whole number from 0 to 2^63 - 1")
        except ValueError as error:
            raise Refused(f"{where}: {error}", LINES) from error
        if not value["prompt"].strip():
            raise Refused(f"{where}: holds no prompt", LINES)
        (only,) = split_prompts(re.sub("\r?\n", " ", value["prompt"]), name, truncate=truncate, first=number)
        classes = check_classes(value["classes"]) if "classes" in value else None
        negative = check_line(value["negative"], f"{where}: negative") if "negative" in value else None
        words = check_line(value.get("class_prompt", ""), f"{where}: class_prompt")
        lines.append(PromptLine(number, only.text, classes, seed, negative=negative, class_prompt=words))
    return tuple(lines)


def read_prompts(text_or_path: str) -> tuple[str, str]:
    """The name to call the prompts by, and their text: the file that the text names, or the text itself."""
    path = _as_path(text_or_path)
    if path is None:
        if not documents.is_unicode(text_or_path):
            raise Refused(f"--prompts: {shorten(text_or_path)} is not valid UTF-8", "Write UTF-8; set PYTHONUTF8=1.")
        return "--prompts", text_or_path
    try:
        data = storage.read(path, LARGEST_FILE)
    except Missing as error:
        raise Refused(
            f"{path}: the prompt file cannot be read ({getattr(error.__cause__, 'strerror', '')})"
            f"{'' if path.exists() else storage.named_alike(path)}",
            "Name a readable file with one prompt per line, or give the prompt itself.",
        ) from error
    try:
        return str(path), data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Refused(f"{path} line {line}: not valid UTF-8", "Save the file as UTF-8.") from error


def _as_path(text_or_path: str) -> Path | None:
    """The file that the text names, if it exists or its form can only be that of a path."""
    path = Path(text_or_path)
    try:
        if path.exists():
            return path
    except PermissionError:  # of a folder above it: what it holds is not known
        return path
    except (OSError, ValueError):
        return None
    looks_like_file = not re.search(r"\s", text_or_path) and (
        os.sep in text_or_path or re.search(r"\.[A-Za-z0-9]{1,5}$", text_or_path)
    )
    return path if looks_like_file else None
