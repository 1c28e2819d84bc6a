"""python -m datasetdm_fast.verify: whether an engine says what another one says, on this machine, with this model and these decoders."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasetdm_fast import __version__
from datasetdm_fast.config import ENGINES, FLAVOURS, PROFILES, PROVIDERS, SAMPLERS, TASKS, RunConfig, setting
from datasetdm_fast.errors import GateFailed, Refused

if TYPE_CHECKING:
    from datasetdm_fast.agreement import Observation, Row
    from datasetdm_fast.driver import Recipe

PROG = "python -m datasetdm_fast.verify"
SHOWN = 4  # worst samples on the page
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}table{border-collapse:collapse}"
    "td,th{padding:.2rem .8rem;text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    ".failed{color:#b00020;font-weight:600}figure{display:inline-block;margin:.4rem}img{width:13rem;image-rendering:pixelated;display:block}"
)


@dataclass(frozen=True)
class VerifyConfig:
    engine: str = setting("fast", "the engine to judge", choices=ENGINES)
    against: str = setting("torch", "the engine it is to agree with", choices=ENGINES)
    model: str = setting("demo", "demo, random-sd14, tiny, a diffusers folder or a .safetensors/.ckpt file", metavar="MODEL")
    decoder: str = setting("demo", "folder of trained decoders, or none: then features and maps themselves are compared", metavar="DIR")
    task: tuple[str, ...] = setting((), "labels to compare, comma-separated; default: every decoder of the folder", choices=TASKS, metavar="LIST")
    classes: tuple[str, ...] = setting((), "class words for open-vocabulary labels", metavar="LIST")
    prompts: str = setting("", "a prompt, or a UTF-8 file with one prompt a line; default: captions of the demo world", metavar="FILE|TEXT")
    number: int = setting(8, "images to compare", metavar="N")
    batch_size: int = setting(4, "images made together", metavar="N")
    seed: int = setting(0, "seed of image 0; image k has seed + k", metavar="N")
    steps: int = setting(0, "sampling steps, 0 = what the model was made for", metavar="N")
    guidance: float = setting(0.0, "guidance scale, 0 = what the model was made for", metavar="G")
    sampler: str = setting("pndm", "sampler", choices=SAMPLERS)
    profile: str = setting("0.3.0", "which diffusers version's PNDM timesteps to follow", choices=PROFILES)
    size: int = setting(0, "pixels of a side, a multiple of 64; 0 = what the model was made for", metavar="N")
    dtype: str = setting("auto", "arithmetic of the engine to judge", choices=("auto", "fp32", "fp16", "bf16", "fp8"))
    compile: bool = setting(False, "judge the fast engine with torch.compile")
    device: str = setting("auto", "cpu, cuda or cuda:N", metavar="DEVICE")
    engines: str = setting("", "folder of exported stages and plans for --engine trt; default: a cache", metavar="ENGINES")
    trt_flavour: str = setting("auto", "which TensorRT, where both are installed", choices=FLAVOURS)
    provider: str = setting("auto", "what ONNX Runtime runs on with --engine ort", choices=PROVIDERS)
    threads: int = setting(0, "CPU threads, 0 = all cores", metavar="N")
    html: str = setting("", "write a page with the worst samples side by side", metavar="FILE")
    run: str = setting("", "run folder whose run.json is to hold the verdict", metavar="RUN")
    allow_download: bool = setting(False, "let --model name a model hub repository")
    json: bool = setting(False, "the verdict as one JSON object on stdout")
    quiet: bool = setting(False, "no progress")


@dataclass(frozen=True)
class Verdict:
    """What came out, and the material of the page."""

    rows: list[Row]
    engine: dict[str, str]
    against: dict[str, str]
    facts: dict[str, Any]
    truth: list[Observation]  # per batch, each engine on its own
    found: list[Observation]
    prompts: list[str]

    @property
    def agrees(self) -> bool:
        return all(row.is_passed for row in self.rows)

    def document(self) -> dict[str, Any]:
        """The verdict as JSON holds it."""
        rows = [asdict(row) | {"passed": row.is_passed} for row in self.rows]
        return {"agrees": self.agrees, "engine": self.engine, "against": self.against, **self.facts, "measures": rows}


def verify(engine, reference, requests: Sequence, recipe: Recipe, batch_size: int, stepped: Callable[[], None] = lambda: None) -> Verdict:
    """Every request through both engines: led by the reference and on its own, judged by the gates of the engine's precision."""
    import numpy as np

    from datasetdm_fast.agreement import EXACT, ROUNDED, Rounded, free_distances, judge, led_distances, observe
    from datasetdm_fast.engines.fast import DTYPES

    dtype = engine.fingerprint()["dtype"]
    rounded = Rounded(reference, DTYPES.get(dtype, DTYPES["fp16"])) if dtype != "fp32" and reference.name == "torch" else None
    collected: dict[str, list[np.ndarray]] = {}
    drift: dict[str, list[np.ndarray]] = {}
    truths, founds = [], []
    for first in range(0, len(requests), batch_size):
        batch = requests[first : first + batch_size]
        truth = observe(reference, batch, recipe, stepped=stepped)
        found = observe(engine, batch, recipe, stepped=stepped)
        _gather(collected, led_distances(observe(engine, batch, recipe, truth, stepped), truth) | free_distances(found, truth), len(batch))
        if rounded and not first:  # one batch tells what the precision costs; the reference is slow
            _gather(drift, led_distances(observe(rounded, batch, recipe, truth), truth) | free_distances(observe(rounded, batch, recipe), truth), len(batch))
        truths.append(truth)
        founds.append(found)
    joined, floors = ({name: np.concatenate(parts, 1) for name, parts in kind.items()} for kind in (collected, drift))
    rows = judge(joined, EXACT if dtype == "fp32" else ROUNDED, floors)
    rows.insert(0, weights_row(engine, reference))
    facts = {
        "model": engine.model.name,
        "decoders": sorted(engine.decoders),
        "number": len(requests),
        "calls": len(recipe.schedule),
        "versions": {"datasetdm_fast": __version__, "python": platform.python_version()},
    }
    return Verdict(rows, engine.fingerprint(), reference.fingerprint(), facts, truths, founds, [request.prompt for request in requests])


def weights_row(engine, reference) -> Row:
    """Whether both hold the same weights, up to how the engine stores them: at a low precision a small change hides in what rounding does anyway."""
    from datasetdm_fast.agreement import Row
    from datasetdm_fast.engines.fast import state_distance

    pairs = [(engine.decoders[task], reference.decoders[task]) for task in engine.decoders if task in reference.decoders]
    if engine.model is not reference.model:
        pairs += [(getattr(engine.model, part), getattr(reference.model, part)) for part in ("text_encoder", "unet", "vae")]
    farthest = engine.weight_distance() if hasattr(engine, "weight_distance") else 0.0
    for ours, theirs in pairs:
        held = ours.state_dict()
        farthest = max([farthest, *(state_distance(held[key].cpu(), value.cpu()) for key, value in theirs.state_dict().items())])
    return Row("weights", farthest, farthest, (0.0, 0.0), None, 0)


def _gather(collected: dict, distances: dict, batch: int) -> None:
    """Adds distances as [calls or 1, images]."""
    for name, values in distances.items():
        collected.setdefault(name, []).append(values.reshape(-1, batch))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 where the engines agree, 4 where they do not."""
    from datasetdm_fast.command_line.ending import run_command

    return run_command(_run, arguments)


def _run(arguments: Sequence[str]) -> int:
    from datasetdm_fast.command_line.flags import parse

    config, _ = parse(arguments, VerifyConfig, PROG, __doc__)
    if config.number < 1 or config.batch_size < 1:
        raise Refused(f"--number {config.number}, --batch-size {config.batch_size}: expected 1 or more", "Choose another number.")
    engine, reference, recipe, requests = _prepared(config)
    from tqdm import tqdm

    calls = -(-len(requests) // config.batch_size) * 3 * len(recipe.schedule)
    with tqdm(total=calls, unit="call", disable=config.quiet or None, file=sys.stderr) as bar:
        verdict = verify(engine, reference, requests, recipe, config.batch_size, lambda: bar.update(1))
    print(table(verdict), file=sys.stderr if config.json else sys.stdout)
    if config.json:
        print(json.dumps(verdict.document()))
    if config.html:
        from datasetdm_fast.disk import storage

        storage.publish({Path(config.html): page(verdict).encode()})
    if config.run:
        record(Path(config.run), verdict)
    if not verdict.agrees:
        failed = [row.measure for row in verdict.rows if not row.is_passed]
        raise GateFailed(
            f"verify: {config.engine} does not say what {config.against} says in {', '.join(failed)}", "Try --dtype fp32; --html FILE shows the worst samples."
        )
    return 0


def _prepared(config: VerifyConfig):
    """Both engines over one model, the recipe, and the requests."""
    from datasetdm_fast import job, prompts
    from datasetdm_fast.engines import build_engine, check_engine, opening

    check_engine(config.engine, config.trt_flavour, config.provider)
    check_engine(config.against, config.trt_flavour)
    where = {"engines": config.engines, "trt_flavour": config.trt_flavour}
    decoder = None if config.decoder == "none" else config.decoder
    options = dict(engine=config.against, device=config.device, size=config.size, allow_download=config.allow_download, threads=config.threads, **where)
    reference, _ = opening.open_engine(config.model, decoder, config.task or None, **options)
    # Both read the modules of one loaded model: equal weights need not be assumed.
    chosen = dict(dtype=config.dtype, device=config.device, provider=config.provider, compile=config.compile, **where)
    engine = build_engine(config.engine, reference.model, reference.decoders, **chosen)
    tasks = tuple(task for task in TASKS if task in reference.decoders)
    chosen = {name: getattr(config, name) for name in ("sampler", "steps", "guidance", "profile", "classes")}
    recipe = job.make_recipe(reference, tasks, **chosen)
    words = recipe.words or job.class_words(reference, tasks, config.classes)
    source = prompts.read_source(RunConfig(model="demo", prompts=config.prompts, classes=config.classes))
    plan = prompts.make_plan(source, reference.model.tokenizer, number=config.number, seed=job.check_seed(config.seed), batch_size=config.number, words=words)
    return engine, reference, recipe, [plan.request(k) for k in range(config.number)]


def table(verdict: Verdict) -> str:
    """The verdict for a terminal."""
    lines = [f"{'measure':22}{'median':>10}{'p99':>10}{'limits':>20}{'own drift':>20}  worst"]
    for row in verdict.rows:
        limit, floor = (f"{pair[0]:.1e} {pair[1]:.1e}" if pair else "" for pair in (row.limit, row.floor))
        lines.append(f"{row.measure:22}{row.median:10.1e}{row.p99:10.1e}{limit:>20}{floor:>20}  {row.worst:5}{'' if row.is_passed else '  FAILED'}")
    said = "agree" if verdict.agrees else "DISAGREE"
    sides = [f"{side['engine']} ({side['dtype']}, {side['device_name']})" for side in (verdict.engine, verdict.against)]
    lines.append(f"{' and '.join(sides)} {said} on {verdict.facts['number']} images of {verdict.facts['model']}, {verdict.facts['calls']} calls each")
    return "\n".join(lines)


def record(folder: Path, verdict: Verdict) -> None:
    """Writes the verdict into the run.json of a run folder."""
    from datasetdm_fast.run_folder.folder import note

    note(folder, "verified", verdict.document())


def page(verdict: Verdict) -> str:
    """An HTML page of its own: the table, and the samples that are worst in any measure, both engines side by side."""
    judged = [row for row in verdict.rows if row.limit[1]]  # weights belong to no sample
    worst = list(dict.fromkeys(row.worst for row in sorted(judged, key=lambda row: -row.p99 / row.limit[1])))[:SHOWN]
    samples = "".join(_sample(verdict, k) for k in worst)
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
    rows = "".join(
        f"<tr{'' if row.is_passed else ' class=failed'}><td>{html.escape(row.measure)}</td><td>{row.median:.2e}</td><td>{row.p99:.2e}</td>"
        f"<td>{row.limit[0]:.1e}</td><td>{row.limit[1]:.1e}</td><td>{row.worst}</td></tr>"
        for row in verdict.rows
    )
    facts = html.escape(json.dumps({"engine": verdict.engine, "against": verdict.against, **verdict.facts}, ensure_ascii=False))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>Agreement of two engines</title><style>{STYLE}</style></head><body><h1>The engines {'agree' if verdict.agrees else 'disagree'}</h1>"
        "<table><tr><th>measure</th><th>median</th><th>p99</th><th>limit of median</th><th>limit of p99</th><th>worst sample</th></tr>"
        f"{rows}</table><p>{facts}</p><h2>Worst samples</h2>{samples}</body></html>\n"
    )


def _sample(verdict: Verdict, place: int) -> str:
    """One sample, each engine on its own: reference, engine, and where the images differ."""
    import numpy as np

    truth, found = _located(verdict.truth, place), _located(verdict.found, place)
    (right, k), (ours, _) = truth, found
    spread = np.clip(np.abs(right.images[k].astype(int) - ours.images[k]) * 16, 0, 255).astype(np.uint8)
    figures = [("reference", _png(right.images[k])), ("engine", _png(ours.images[k])), ("difference, 16 times", _png(spread))]
    for task in right.labels:
        for side, observed in (("reference", right), ("engine", ours)):
            if picture := _label_picture(observed.labels[task][k]):
                figures.append((f"{task}, {side}", picture))
    shown = "".join(
        f'<figure><img alt="" src="data:image/png;base64,{base64.b64encode(data).decode()}"><figcaption>{name}</figcaption></figure>' for name, data in figures
    )
    return f"<section><h3>Sample {place}: {html.escape(verdict.prompts[place])}</h3>{shown}</section>"


def _located(observations: Sequence[Observation], place: int) -> tuple[Observation, int]:
    for observed in observations:
        if place < len(observed.images):
            return observed, place
        place -= len(observed.images)
    raise AssertionError("a sample of no batch")


def _png(image) -> bytes:
    from datasetdm_fast.labels.label_files import image_bytes

    return image_bytes(image, "png")


def _label_picture(label) -> bytes | None:
    """Class maps and depth in colour; masks and joints have no picture of their own here."""
    import numpy as np

    from datasetdm_fast.data import DepthMap, SemanticMap
    from datasetdm_fast.labels.label_files import MILLIMETRES, index_png
    from datasetdm_fast.labels.pictures import depth_png

    if isinstance(label, SemanticMap):
        return index_png(label.labels)
    return depth_png((label.metres * MILLIMETRES).astype(np.int32)) if isinstance(label, DepthMap) else None


if __name__ == "__main__":
    sys.exit(main())
