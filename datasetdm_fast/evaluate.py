"""python -m datasetdm_fast.evaluate: measure the labels of trained decoders against ground truth."""

import json
import sys
from collections.abc import Mapping
from typing import Any

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import CountProgress, print_end, print_lines
from datasetdm_fast.engine.engines import check_sources
from datasetdm_fast.messages import count_noun
from datasetdm_fast.training.evaluation.settings import ANY_SIZE, EvaluateConfig, ScoreSettings
from datasetdm_fast.training.truth.selection import EVERYTHING
from datasetdm_fast.untrusted.documents import one_line

EXAMPLES = (
    '--decoder decoder --data "folder:photos[val]"',
    "--decoder decoder --data 'voc:VOC[val],coco:COCO[val]' --task semantic --class-names auto",
)


@command_with(EvaluateConfig, EXAMPLES)
def main(config: EvaluateConfig, command: CommandLine) -> int:
    config.check()
    check_sources(config.model, config.decoder, config.allow_download)
    # A bad data set is refused before a model loads; a selection reads images, and comes later unless it is all.
    selection = config.selection() if config.dry_run else EVERYTHING
    sources = {address: config.open_data(address, ANY_SIZE, config.tasks, selection) for address in config.addresses}
    from datasetdm_fast.training.evaluation import naming

    print_lines(config, *(f"{address}: {source.layout}" for address, source in sources.items() if source.layout))
    names = naming.parse_names(config.class_names, sources.values())
    if config.dry_run:
        images = {address: len(source) for address, source in sources.items()}
        lines = (f"{address}: {count_noun(count, 'image')} would be judged" for address, count in images.items())
        return print_end(config, {"images": images}, "\n".join(lines))
    from datasetdm_fast.training.evaluation.measure import evaluate_decoders, figures_table

    engine, results, skipped = config.open_engine(config.decoder), {}, {}
    for address, source in sources.items():
        with CountProgress(config.quiet, address, len(source), "image") as progress:
            results[address], bad = evaluate_decoders(
                *(engine, config.decoder, address, source.tasks, config.task),
                lambda address, labels: config.open_data(address, engine.model.size, labels, config.selection()),
                config.group(ScoreSettings),
                names=names if config.class_names else None,
                is_auto=naming.AUTO in config.class_names,
                on_images=progress.on_count,
                on_message=lambda line: print_lines(config, line),
            )
        skipped |= bad
        if not config.json:
            if len(sources) > 1:
                print(address)
            print(figures_table(results[address], config.level))
    return _finish(config, {"data": results} if len(sources) > 1 else results[config.addresses[0]], skipped)


def _finish(config: EvaluateConfig, result: Mapping[str, Any], skipped: Mapping[str, str]) -> int:
    if config.json:
        print(json.dumps({**result, "skipped": skipped} if config.skip_bad else result))
    if skipped:
        verb = "was" if len(skipped) == 1 else "were"
        reasons = (f"  {one_line(reason)}" for reason in skipped.values())
        print_lines(config, f"{count_noun(len(skipped), 'image')} {verb} skipped:", *reasons)
    return 0


if __name__ == "__main__":
    sys.exit(main())
