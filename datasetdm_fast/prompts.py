"""python -m datasetdm_fast.prompts --set voc --per-class 200 --out prompts.jsonl: a list of prompts, balanced over
classes, from a built-in grammar or a language model.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_plan
from datasetdm_fast.command_line.progress import PromptProgress
from datasetdm_fast.config import dry_run_setting, setting
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels import class_tables
from datasetdm_fast.engine.labels.class_file import own_table, refuse_files
from datasetdm_fast.engine.scenes import world
from datasetdm_fast.errors import Missing, Refused, nearest, quote
from datasetdm_fast.runs.prompting import balance, language_model, vocabulary
from datasetdm_fast.runs.prompting.grammar import DemoGrammar, Grammar, PlaceGrammar, Sentence
from datasetdm_fast.runs.prompting.measures import measure
from datasetdm_fast.untrusted import documents

PROG = "python -m datasetdm_fast.prompts"
EXAMPLES = ("--set voc --per-class 200 --out prompts.jsonl", "--classes owl,lamp --per-class 50 --pairs 0.3")
SETS = ("voc", "coco", "cityscapes", "deepfashion", "pose", "nyu", "kitti", "demo")
MOST_PROMPTS = 10_000_000
LARGEST_COUNTS = 2**24  # bytes
COUNTS = 'Write a whole number for each class: {"cat": 40, "dog": 25}.'


@dataclass(frozen=True)
class PromptsConfig:
    set: str = setting("demo", "set of classes that the prompts are for", choices=SETS)
    classes: tuple[str, ...] = setting((), "only these classes of the set, or words of your own", metavar="LIST")
    class_table: str = setting(
        "", "classes of your own: a CSV file (name,say,words) or LVIS's annotation file", metavar="FILE"
    )
    per_class: int = setting(0, "prompts for each class; 0 = 100, or as --target-counts or --balance say", metavar="N")
    target_counts: str = setting(
        "", 'JSON file with the number of prompts for each class: {"cat": 40, ...}', metavar="FILE"
    )
    balance: str = setting(
        "", "labelled images, such as coco:PATH; their rarer classes get more prompts", metavar="DATA"
    )
    pairs: float = setting(0.0, "share of the prompts that name two classes, 0 to 1", metavar="SHARE")
    seed: int = setting(0, "seed of the sentences", metavar="N")
    out: str = setting(
        "prompts.jsonl",
        "file to write, one JSON object per line, for generate --prompts",
        metavar="FILE",
        output="file",
    )
    llm_url: str = setting("", "ask the language model of an OpenAI-compatible endpoint", metavar="URL")
    llm_model: str = setting("", "name of the model at that endpoint", metavar="NAME")
    llm_command: str = setting("", "ask a program that reads a request on stdin and writes its reply", metavar="LINE")
    llm_requests: int = setting(1000, "maximum number of requests to the language model", metavar="N")
    dry_run: bool = dry_run_setting()
    json: bool = setting(False, "statistics of the list as one JSON object on stdout")
    quiet: bool = setting(False, "show no progress")


@command
def main(arguments: Sequence[str]) -> int:
    config, given = parse(arguments, PromptsConfig, PROG, __doc__, EXAMPLES)
    _check(config)
    grammar = _grammar(config, "set" in given)
    counts = _counts(config, grammar.classes)
    total = sum(counts.values())
    if config.dry_run:
        told = "\n".join(f"{name:24} {count:8,}" for name, count in counts.items())
        return print_plan(config, {"out": config.out, "classes": counts, "asked_for": total}, told)
    reasons: Counter[str] = Counter()
    if config.llm_url or config.llm_command:
        sentences, reasons = _asked(config, grammar.classes, counts)
    else:
        sentences = balance.sentences(grammar, counts, config.pairs, config.seed)
    if not sentences:
        why = ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3))
        raise Missing(f"{config.out}: no usable prompt came back: {why}", "Try another model, or leave it out.")
    text = "".join(json.dumps(_row(sentence), ensure_ascii=False) + "\n" for sentence in sentences)
    storage.remove_parts_of([Path(config.out)])
    storage.publish({Path(config.out): text.encode()})
    _tell(config, sentences, total, reasons)
    return 0


def _check(config: PromptsConfig) -> None:
    ways = [flag for flag in ("per_class", "target_counts", "balance") if getattr(config, flag)]
    if len(ways) > 1:
        shown = " and ".join("--" + flag.replace("_", "-") for flag in ways)
        raise Refused(f"{shown}: each sets the number of prompts per class", "Keep one of them.")
    for flag, most in (("per_class", MOST_PROMPTS), ("llm_requests", 1_000_000)):
        if not 0 <= getattr(config, flag) <= most:
            name = "--" + flag.replace("_", "-")
            raise Refused(f"{name} {getattr(config, flag)}: expected 0 to {most:,}", "Choose another number.")
    if not 0 <= config.pairs <= 1:
        raise Refused(f"--pairs {config.pairs:g}: expected a share from 0 to 1", "For example --pairs 0.3.")
    if config.llm_url and config.llm_command:
        raise Refused("--llm-url and --llm-command: two ways to ask a language model", "Keep one of them.")
    if config.llm_url and not config.llm_model:
        raise Refused("--llm-url: the name of the model is missing", "Add --llm-model NAME.")
    if not config.llm_url and config.llm_model:
        raise Refused(f"--llm-model {config.llm_model}: no endpoint to ask", "Add --llm-url https://HOST/v1.")
    refuse_files(config.classes)
    for word in config.classes:
        if not documents.is_unicode(word):
            raise Refused(f"--classes: {word!r} is not valid Unicode", "Write the class words in UTF-8.")
    out = Path(config.out)
    if out.is_dir() or not out.name:
        raise Refused(f"--out {config.out}: is a folder", "Name a file, for example prompts.jsonl.")


def _grammar(config: PromptsConfig, is_set_given: bool) -> Grammar | DemoGrammar | PlaceGrammar:
    if config.class_table:
        own = own_table(config.class_table)
        return Grammar(_chosen(config.classes, own.names), config.seed, own)
    if config.classes and not is_set_given:
        return Grammar(config.classes, config.seed)
    if config.set == "nyu":
        return PlaceGrammar(_chosen(config.classes, vocabulary.ROOMS), vocabulary.ROOM, config.seed)
    if config.set == "kitti":
        return PlaceGrammar(_chosen(config.classes, vocabulary.STREETS), vocabulary.SCENERY, config.seed)
    if config.set == "demo":
        return DemoGrammar(_chosen(config.classes, world.THINGS), config.seed)
    if config.set == "pose":
        return Grammar(_chosen(config.classes, ("person",)), config.seed)
    names = tuple(name for name in class_tables.table(config.set).names if name != "background")
    return Grammar(_chosen(config.classes, names), config.seed)


def _chosen(asked: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    for name in asked:
        if name not in names:
            raise Refused(
                f"--classes: {name!r} is not in this set{nearest(name, names)}", f"It has {', '.join(names)}."
            )
    return tuple(asked) or tuple(names)


def _counts(config: PromptsConfig, classes: Sequence[str]) -> dict[str, int]:
    if config.target_counts:
        found = documents.read_object(Path(config.target_counts), most=LARGEST_COUNTS, remedy=COUNTS)
        for name, count in found.items():
            if name not in classes:
                raise Refused(
                    f"{config.target_counts}: {name!r} is not a class of this list{nearest(name, classes)}",
                    f"The classes are {', '.join(classes)}.",
                )
            if type(count) is not int or not 0 <= count <= MOST_PROMPTS:
                raise Refused(f"{config.target_counts}: {name!r} has {count!r}", COUNTS)
        counts = {name: found.get(name, 0) for name in classes}
    elif config.balance:
        present = _present(config.balance)
        counts = balance.lacking(present, classes)
        if not any(counts.values()):
            if not any(present.get(name) for name in classes):
                raise Refused(
                    f"--balance {config.balance}: no image shows a class of this list",
                    "Give --classes, in the words of the data, or --per-class.",
                )
            raise Refused(
                f"--balance {config.balance}: every class of this list is in as many images",
                "Say how many prompts you want with --per-class.",
            )
    else:
        counts = dict.fromkeys(classes, config.per_class or 100)
    if not 0 < sum(counts.values()) <= MOST_PROMPTS:
        raise Refused(f"{sum(counts.values()):,} prompts: expected 1 to {MOST_PROMPTS:,}", "Ask for another number.")
    return counts


def _present(address: str) -> dict[str, int]:
    """In how many labelled images each class is."""
    from datasetdm_fast.training.readers import open_data

    try:
        source = open_data(address, 64)
    except Refused as stop:
        raise Refused(stop.cause.replace("--data", "--balance", 1), stop.remedy) from stop
    return dict(Counter(name for record in source.order for name in source.guarded(source.areas, record)))


def _asked(
    config: PromptsConfig, classes: Sequence[str], counts: Mapping[str, int]
) -> tuple[list[Sentence], Counter[str]]:
    key = language_model.key_of(os.environ)
    if config.llm_url:
        ask = language_model.Endpoint(config.llm_url, config.llm_model, key)
    else:
        ask = language_model.Program(config.llm_command)
    replies = language_model.Replies(
        Path(f"{config.out}.replies"), ask, config.llm_requests, key if config.llm_url else ""
    )
    plan = list(balance.planned(counts, config.pairs, config.seed))
    own = own_table(config.class_table) if config.class_table else None
    with PromptProgress(len(plan), config.quiet) as progress:
        return language_model.written(plan, classes, replies, lambda done: progress.on_reply(done, replies.asked), own)


def _row(sentence: Sentence) -> dict[str, object]:
    return {"prompt": sentence.prompt, "classes": list(sentence.classes), "group": sentence.group}


def _tell(config: PromptsConfig, sentences: Sequence[Sentence], total: int, reasons: Mapping[str, int]) -> None:
    found = measure(sentences)
    if config.json:
        print(json.dumps({"out": config.out, **found, "asked_for": total, "left_out": dict(reasons)}))
        return
    if config.quiet:
        print(config.out)
        return
    named, repeated = found["classes"], found["near_duplicates"]
    print(f"prompts    {len(sentences):,}, {repeated:.1%} near duplicates, distinct-2 {found['distinct_2']:.3f}")
    if named:
        rarest, commonest = min(named, key=named.get), max(named, key=named.get)
        least, most = (f"{named[name]:,} ({name})" for name in (rarest, commonest))
        each = f"{named[rarest]:,} {'prompt' if named[rarest] == 1 else 'prompts'} each"
        told = each if named[rarest] == named[commonest] else f"from {least} to {most}"
        print(f"classes    {len(named)}, {told}")
    for first, second, count in found["together"][:3]:
        print(f"together   {first} and {second}: {count:,}")
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        print(f"left out   {count:,}: {reason}")
    print(f"{config.out}; python -m datasetdm_fast.generate --prompts {quote(config.out)}")


if __name__ == "__main__":
    sys.exit(main())
