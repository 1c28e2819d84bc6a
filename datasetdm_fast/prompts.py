"""python -m datasetdm_fast.prompts --set voc --per-class 200 --out prompts.jsonl: a list of prompts, balanced over
classes, from a built-in grammar or a language model.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_plan
from datasetdm_fast.command_line.progress import PromptProgress
from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Refused, quote, renamed_flags
from datasetdm_fast.runs.jobs.class_file import own_table
from datasetdm_fast.runs.prompting import balance, language_model
from datasetdm_fast.runs.prompting.endpoints import open_model, read_key
from datasetdm_fast.runs.prompting.grammar import check_words, open_grammar, to_lines
from datasetdm_fast.runs.prompting.measures import measure, report_lines
from datasetdm_fast.runs.prompting.settings import PromptsConfig

PROG = "python -m datasetdm_fast.prompts"
EXAMPLES = ("--set voc --per-class 200 --out prompts.jsonl", "--classes owl,lamp --per-class 50 --pairs 0.3")


@command
def main(arguments: Sequence[str]) -> int:
    config, flags = parse(arguments, PromptsConfig, PROG, __doc__, EXAMPLES)
    check_words(config.classes)
    table = own_table(config.class_table) if config.class_table else None
    is_own = table is not None or (config.classes and "set" not in flags)
    grammar = open_grammar("" if is_own else config.set, config.classes, config.seed, table)
    ways = {"--target-counts": config.target_counts, "--balance": config.balance, "--per-class": config.per_class}
    if len(used := [flag for flag, value in ways.items() if value]) > 1:
        raise Refused(f"{' and '.join(used)}: each sets the number of prompts per class", "Keep one of them.")
    images = _count_classes(config.balance) if config.balance else None
    counts = balance.count_prompts(grammar.classes, config.per_class, config.target_counts, images)
    total = sum(counts.values())
    if config.dry_run:
        plan = "\n".join(f"{name:24} {count:8,}" for name, count in counts.items())
        return print_plan(config, {"out": config.out, "classes": counts, "asked_for": total}, plan)
    key, rejected = read_key(os.environ), Counter()
    if model := open_model(config.llm_url, config.llm_model, key):
        replies = language_model.Replies(Path(f"{config.out}.replies"), model, config.llm_requests, key)
        classes = list(balance.plan_classes(counts, config.pairs, config.seed))
        with PromptProgress(len(classes), config.quiet) as progress:
            sentences, rejected = language_model.collect_sentences(
                classes, grammar.classes, replies, lambda done: progress.on_reply(done, replies.sent), table
            )
        language_model.check_any(config.out, sentences, rejected)
    else:
        sentences = balance.build_list(grammar, counts, config.pairs, config.seed)
    storage.remove_parts_of([Path(config.out)])
    storage.publish({Path(config.out): to_lines(sentences).encode()})
    measures = measure(sentences)
    if config.json:
        print(json.dumps({"out": config.out, **measures, "asked_for": total, "left_out": dict(rejected)}))
    elif config.quiet:
        print(config.out)
    else:
        print(*report_lines(measures, rejected), sep="\n")
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
