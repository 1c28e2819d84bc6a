"""python -m datasetdm_fast.verify: compare the outputs of an engine with those of another, on this machine, with this
model and these decoders.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasetdm_fast.command_line.ending import command
from datasetdm_fast.command_line.flags import parse
from datasetdm_fast.command_line.output import print_lines, print_plan
from datasetdm_fast.command_line.progress import shows_bar
from datasetdm_fast.config import ENGINE_NAMES, TASKS
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.labels.names import by_task
from datasetdm_fast.engine.loop.checks import LARGEST_BATCH
from datasetdm_fast.errors import GateFailed, Refused
from datasetdm_fast.messages import count_noun
from datasetdm_fast.runs.run_folder.document import described, differences, engines_of
from datasetdm_fast.runs.run_folder.folder import note
from datasetdm_fast.runs.run_settings import PromptSettings
from datasetdm_fast.settings import (
    CommandSettings,
    EngineSettings,
    ModelSettings,
    OutputSettings,
    SamplingSettings,
    setting,
)

PROG = "python -m datasetdm_fast.verify"
EXAMPLES = (
    "--engine fast --against torch",
    "--model MODEL --decoder decoder --dtype fp16 --html worst.html",
)
MOST_IMAGES = 100_000  # to compare


@dataclass(frozen=True)
class VerifyConfig(ModelSettings, EngineSettings, PromptSettings, SamplingSettings, OutputSettings, CommandSettings):
    FLAGS = (
        "engine against model decoder task classes prompts number batch_size seed steps guidance sampler profile size "
        "dtype compile device engines trt_flavour provider threads html run dry_run allow_download json quiet"
    ).split()

    engine: str = setting("fast", "engine to check", choices=ENGINE_NAMES)
    against: str = setting("torch", "engine to compare with", choices=ENGINE_NAMES)
    decoder: str = setting(
        "demo", "folder of trained decoders, or none, to compare the features and maps themselves", metavar="DIR"
    )
    task: tuple[str, ...] = setting(
        (),
        "labels to compare, comma-separated, each TASK or TASK:NAME; default: every decoder of the folder",
        choices=TASKS,
        metavar="LIST",
        has_names=True,
    )
    classes: tuple[str, ...] = setting((), "class words for open-vocabulary labels", metavar="LIST")
    number: int = setting(8, "images to compare", metavar="N", least=1, most=MOST_IMAGES)
    batch_size: int = setting(4, "images per batch", metavar="N", least=1, most=LARGEST_BATCH)
    dtype: str = setting("auto", "precision of the engine to check", choices=("auto", "fp32", "tf32", "fp16", "bf16"))
    compile: bool = setting(False, "check the fast engine with torch.compile")
    html: str = setting("", "write a page with the worst samples side by side", metavar="FILE", output="file")
    run: str = setting("", "run folder in whose run.json the verdict is stored", metavar="RUN", output="folder")
    json: bool = setting(False, "the verdict as one JSON object on stdout")


@command
def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 where the engines agree, 4 where they do not."""
    config, _ = parse(arguments, VerifyConfig, PROG, __doc__, EXAMPLES)
    if config.run:
        described(Path(config.run))  # minutes before the verdict is to be stored there
    engine, reference, recipe, requests = _prepared(config)
    from tqdm import tqdm

    from datasetdm_fast.runs.agreement.page import page
    from datasetdm_fast.runs.agreement.verify import verify

    calls = -(-len(requests) // config.batch_size) * 3 * len(recipe.schedule)
    if config.dry_run:
        facts = {"number": len(requests), "calls": calls, "engine": config.engine, "against": config.against}
        images = count_noun(len(requests), "image")
        told = f"{images} of {config.engine} and {config.against}, {count_noun(calls, 'UNet call')}"
        places = ", ".join(place for place in (config.html, config.run and f"run.json of {config.run}") if place)
        return print_plan(config, facts, told, *([f"the verdict would be written to {places}"] if places else []))
    with tqdm(total=calls, unit="call", disable=not shows_bar(config.quiet), file=sys.stderr) as bar:
        verdict = verify(engine, reference, requests, recipe, config.batch_size, lambda: bar.update(1), is_whole=True)
    print(table(verdict), file=sys.stderr if config.json else sys.stdout)
    if config.json:
        print(json.dumps(verdict.document()))
    if config.html:
        storage.publish({Path(config.html): page(verdict).encode()})
    if config.run:
        note(Path(config.run), "verified", verdict.document())
    if not verdict.agrees:
        failed = [row.measure for row in verdict.rows if not row.is_passed]
        raise GateFailed(
            f"verify: outputs of {config.engine} do not match those of {config.against} in {', '.join(failed)}",
            "Try --dtype fp32 or another --engine; --html FILE shows the worst samples.",
        )
    return 0


def _prepared(config: VerifyConfig):
    """Both engines over one model, the recipe, and the requests."""
    from datasetdm_fast.engine.engines import build_engine, check_engine, opening
    from datasetdm_fast.engine.loop import checks, prompts
    from datasetdm_fast.engine.loop.plan import make_plan
    from datasetdm_fast.engine.loop.recipe import make_recipe, prompt_words
    from datasetdm_fast.runs.jobs.prompt_files import read_source

    plans = {"engines": config.engines, "trt_flavour": config.trt_flavour}
    own = {"provider": config.provider, "streams": config.streams, "compile": config.compile}
    of_reference = plans if config.against == "trt" else {}
    if config.engine == "trt" or not of_reference:
        own |= plans
    check_engine(config.against, **of_reference)
    check_engine(config.engine, **own)
    checks.check_numbers(threads=config.threads)
    checks.check_seed(config.seed, config.number)
    prompts.check_classes(config.classes)
    if config.task:
        checks.check_tasks(config.task)
    print_lines(config, f"loading {config.model} for {config.engine} and {config.against}")
    decoder = None if config.decoder == "none" else config.decoder
    options = dict(
        engine=config.against,
        device=config.device,
        size=config.size,
        allow_download=config.allow_download,
        threads=config.threads,
        **of_reference,
    )
    reference, decoders = opening.open_engine(config.model, decoder, config.task or None, **options)
    # Both read the modules of one loaded model: equal weights need not be assumed.
    engine = build_engine(
        config.engine, reference.model, reference.decoders, dtype=config.dtype, device=config.device, **own
    )
    if engine.fingerprint() == reference.fingerprint():
        raise Refused(
            f"--against {config.against}: it is the engine to check itself, in the same precision, so nothing can be "
            "compared",
            "Choose another engine for one of the two.",
        )
    if config.run:
        check_made_by(Path(config.run), engine, decoders)
    tasks = tuple(by_task(reference.decoders))
    chosen = {name: getattr(config, name) for name in ("sampler", "steps", "guidance", "profile", "classes")}
    recipe = make_recipe(reference, tasks, **chosen)
    words = recipe.words or prompt_words(reference, tasks, config.classes)
    source = read_source(config.group(PromptSettings), has_captions=True)
    plan = make_plan(
        source,
        reference.model.tokenizer,
        number=config.number,
        seed=config.seed,
        batch_size=config.number,
        words=words,
    )
    return engine, reference, recipe, [plan.request(k) for k in range(config.number)]


def check_made_by(run: Path, engine, decoders: Mapping[str, Mapping[str, str]]) -> None:
    """Refuses a run of another engine or of other weights: its run.json and card would say of them what was found out
    about these.
    """
    document, maker = described(run), engine.fingerprint()
    known = document["decoders"]
    told = [
        *differences(document["model"]["digests"], dict(engine.model.digests), "model"),
        *differences(
            {label: one["digest"] for label, one in known.items() if label in decoders},
            {label: one["digest"] for label, one in decoders.items() if label in known},
            "decoders",
        ),
        *differences(document["sampling"]["size"], engine.model.size, "size"),
    ]
    engines = engines_of(document)
    if not any(all(one.get(name) == maker[name] for name in ("engine", "dtype")) for one in engines):
        made = ", ".join(" ".join(filter(None, (one.get("engine"), one.get("dtype")))) for one in engines)
        told.append(f"engine: {made} there, {maker['engine']} {maker['dtype']} asked for")
    if told:
        raise Refused(
            f"--run {run}: it was made otherwise than what is to be compared ({'; '.join(told)})",
            "Give its own --model, --decoder, --size, --engine and --dtype, or drop --run.",
        )


def table(verdict) -> str:
    width = max(22, *(len(row.measure) + 2 for row in verdict.rows))
    lines = [f"{'measure':{width}}{'median':>10}{'p99':>10}{'limits':>20}{'own drift':>20}  worst"]
    for row in verdict.rows:
        limit, floor = (f"{pair[0]:.1e} {pair[1]:.1e}" if pair else "" for pair in (row.limit, row.floor))
        lines.append(
            f"{row.measure:{width}}{row.median:10.1e}{row.p99:10.1e}{limit:>20}{floor:>20}  "
            f"{row.worst:5}{'' if row.is_passed else '  FAILED'}"
        )
    said = "agree" if verdict.agrees else "DISAGREE"
    sides = [f"{side['engine']} ({side['dtype']}, {side['device_name']})" for side in (verdict.engine, verdict.against)]
    lines.append(
        f"{' and '.join(sides)} {said} on {count_noun(verdict.facts['number'], 'image')} of {verdict.facts['model']}, "
        f"{verdict.facts['calls']} calls each"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
