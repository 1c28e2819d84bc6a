"""python -m datasetdm_fast.verify: compare the outputs of an engine with those of another, on this machine, with this
model and these decoders.
"""

import json
import sys
from dataclasses import dataclass

from datasetdm_fast.command_line.ending import CommandLine, command_with
from datasetdm_fast.command_line.output import CountProgress, print_end, print_lines
from datasetdm_fast.config import ENGINE_NAMES, EXACT, FP8, SPEEDS, TASKS
from datasetdm_fast.engine.engines import check_installed, check_sources
from datasetdm_fast.engine.loop.recipe import LARGEST_BATCH
from datasetdm_fast.errors import GateFailed
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_settings import PromptSettings
from datasetdm_fast.settings import (
    CommandSettings,
    EngineSettings,
    ModelSettings,
    OutputSettings,
    SamplingSettings,
    setting,
)

EXAMPLES = ("--engine fast --against torch", "--model MODEL --decoder decoder --dtype fp16 --number 16")
MOST_IMAGES = 100_000  # to compare


@dataclass(frozen=True)
class VerifyConfig(ModelSettings, EngineSettings, PromptSettings, SamplingSettings, OutputSettings, CommandSettings):
    FLAGS = (
        "engine against model decoder task classes prompts number batch_size seed steps guidance sampler profile speed "
        "size dtype compile device provider threads dry_run allow_download json quiet"
    ).split()

    engine: str = setting("fast", "engine to check", choices=ENGINE_NAMES)
    against: str = setting("torch", "engine to compare with", choices=ENGINE_NAMES)
    decoder: str = setting(
        "demo", "folder of trained decoders, or none, to compare the features and maps themselves", metavar="DIR"
    )
    task: tuple[str, ...] = setting(
        (), "labels to compare, TASK or TASK:NAME; default: all", choices=TASKS, metavar="LIST", has_names=True
    )
    classes: tuple[str, ...] = setting((), "class words for open-vocabulary labels", metavar="LIST")
    number: int = setting(8, "images to compare", metavar="N", least=1, most=MOST_IMAGES)
    batch_size: int = setting(4, "images per batch", metavar="N", least=1, most=LARGEST_BATCH)
    speed: str = setting(
        EXACT,
        "exact, or an approximate speed by which both sample",
        choices=tuple(speed for speed in SPEEDS if speed != FP8),
    )
    dtype: str = setting("auto", "precision of the engine to check", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    compile: bool = setting(False, "check the fast engine with torch.compile")
    json: bool = setting(False, "the verdict as one JSON object on stdout")


@command_with(VerifyConfig, EXAMPLES)
def main(config: VerifyConfig, command: CommandLine) -> int:
    """The exit code: 0 where the engines agree, 4 where they do not."""
    settings = config.group(EngineSettings)
    for name in (config.engine, config.against):  # before torch is loaded
        check_installed(name, settings)
    check_sources(config.model, None if config.decoder == "none" else config.decoder, config.allow_download)
    print_lines(config, f"loading {config.model} for {config.engine} and {config.against}")
    from datasetdm_fast.runs.agreement.comparing import choose_requests, open_pair
    from datasetdm_fast.runs.agreement.verify import verify

    engine, reference = open_pair(config.group(ModelSettings), settings, config.against, config.task)
    recipe, requests = choose_requests(engine, reference, config.group(PromptSettings), config.group(SamplingSettings))
    calls = -(-len(requests) // config.batch_size) * 3 * len(recipe.schedule)
    if config.dry_run:
        facts = {"number": len(requests), "calls": calls, "engine": config.engine, "against": config.against}
        images = count_noun(len(requests), "image")
        plan = f"{images} of {config.engine} and {config.against}, {count_noun(calls, 'UNet call')}"
        return print_end(config, facts, plan)
    with CountProgress(config.quiet, "verify", calls) as on_unet_call:
        verdict = verify(engine, reference, requests, recipe, config.batch_size, on_unet_call, is_whole=True)
    print(verdict.table(), file=sys.stderr if config.json else sys.stdout)
    if config.json:
        print(json.dumps(verdict.document()))
    if not verdict.agrees:
        raise GateFailed(
            f"verify: outputs of {config.engine} do not match those of {config.against} in {', '.join(verdict.failed)}",
            verdict.remedy,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
