"""python -m datasetdm_fast.prompts --set voc --per-class 200 --out prompts.jsonl: write a balanced list of prompts."""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import CountProgress, print_end
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused, quote, renamed_flags
from datasetdm_fast.runs.jobs.prompt_files import own_table
from datasetdm_fast.runs.prompting import balance, language_model
from datasetdm_fast.runs.prompting.grammar import SETS, check_words, open_grammar
from datasetdm_fast.settings import OutputSettings, setting


@dataclass(frozen=True)
class PromptsConfig(OutputSettings):
    set: str = setting("demo", "set of classes that the prompts are for", choices=SETS)
    classes: tuple[str, ...] = setting((), "only these classes of the set, or words of your own", metavar="LIST")
    class_table: str = setting(
        "", "classes of your own: a CSV file (name,say,words) or LVIS's annotation file", metavar="FILE"
    )
    per_class: int = setting(
        0, "prompts for each class; 0 = 100, or as other flags say", metavar="N", least=0, most=balance.MOST_PROMPTS
    )
    target_counts: str = setting(
        "", 'JSON file with the number of prompts for each class: {"cat": 40, ...}', metavar="FILE"
    )
    balance: str = setting(
        "", "labelled images, such as coco:PATH; their rarer classes get more prompts", metavar="DATA"
    )
    pairs: float = setting(0.0, "share of the prompts that name two classes, 0 to 1", metavar="SHARE", least=0, most=1)
    seed: int = setting(0, "seed of the sentences", metavar="N")
    out: str = setting(
        "prompts.jsonl", "file to write, JSON lines, for generate --prompts", metavar="FILE", output="file"
    )
    llm_url: str = setting("", "ask the language model of an OpenAI-compatible endpoint", metavar="URL")
    llm_model: str = setting("", "name of the model at that endpoint", metavar="NAME")
    llm_requests: int = setting(
        1000, "maximum number of requests to the language model", metavar="N", least=0, most=10**6
    )
    json: bool = setting(False, "statistics of the list as one JSON object on stdout")


EXAMPLES = ("--set voc --per-class 200 --out prompts.jsonl", "--classes owl,lamp --per-class 50 --pairs 0.3")


@command_with(PromptsConfig, EXAMPLES)
def main(config: PromptsConfig, command: CommandLine) -> int:
    check_words(config.classes)
    table = own_table(config.class_table) if config.class_table else None
    is_own = table is not None or (config.classes and "set" not in command.provided)
    grammar = open_grammar("" if is_own else config.set, config.classes, config.seed, table)
    ways = {"--target-counts": config.target_counts, "--balance": config.balance, "--per-class": config.per_class}
    if len(used := [flag for flag, value in ways.items() if value]) > 1:
        raise Refused(f"{' and '.join(used)}: each sets the number of prompts per class", "Keep one of them.")
    images = _count_classes(config.balance) if config.balance else None
    counts = balance.count_prompts(grammar.classes, config.per_class, config.target_counts, images)
    total = sum(counts.values())
    if config.dry_run:
        plan = "\n".join(f"{name:24} {count:8,}" for name, count in counts.items())
        return print_end(config, {"out": config.out, "classes": counts, "asked_for": total}, plan)
    if bool(config.llm_url) != bool(config.llm_model):
        raise Refused("--llm-url and --llm-model: one needs the other", "Add both: --llm-url URL --llm-model NAME.")
    rejected, planned = Counter[str](), list(balance.plan_classes(counts, config.pairs, config.seed))
    with CountProgress(config.quiet, "prompts", len(planned), "prompt") as progress:
        on_count = partial(progress.on_count, total=len(planned))
        if config.llm_url:
            # of the environment alone, where no process list shows it
            key = next(filter(None, (os.environ.get(name, "").strip() for name in language_model.KEY_VARIABLES)), "")
            model = language_model.Endpoint(config.llm_url, config.llm_model, key)
            path = Path(f"{config.out}.replies")
            replies = language_model.Replies(path, model, config.llm_requests, key, config.llm_model)
            sentences, rejected = language_model.collect_sentences(planned, grammar.classes, replies, on_count, table)
        else:
            sentences = balance.build_list(grammar, planned, on_count)
    if not sentences:
        why = ", ".join(f"{reason} ({count})" for reason, count in rejected.most_common(3))
        raise Missing(f"{config.out}: no usable prompt came back: {why}", "Try another model, or leave it out.")
    out = Path(config.out)
    content = "".join(json.dumps(asdict(sentence), ensure_ascii=False) + "\n" for sentence in sentences).encode()
    if out.exists() and (out.stat().st_size != len(content) or out.read_bytes() != content):
        raise Refused(f"--out {out}: it holds something other than this list", "Choose another --out, or delete it.")
    storage.remove_parts_of([out])
    storage.publish({out: content})
    measures = balance.measure(sentences)
    if config.json:
        print(json.dumps({"out": config.out, **measures, "asked_for": total, "left_out": dict(rejected)}))
    elif config.quiet:
        print(config.out)
    else:
        print(*balance.report_lines(measures, rejected), sep="\n")
        print(f"{config.out}; python -m datasetdm_fast.generate --prompts {quote(config.out)}")
    return 0


def _count_classes(address: str) -> dict[str, int]:
    """In how many labelled images each class is."""
    from datasetdm_fast.training.readers import open_data

    with renamed_flags({"--data": "--balance"}):
        source = open_data(address, 64)
    return dict(Counter(name for record in source.order for name in source.guard(source.areas, record)))


if __name__ == "__main__":
    sys.exit(main())
