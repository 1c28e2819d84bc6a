"""What a rehearsal runs: each way in which an engine on a GPU is used, as a function of the simulated machine that
says how many samples came out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bench.rehearsal import teaching
from bench.rehearsal.machine import NAMED, OPEN, PROMPT, SIMCC, TASKS, WORDS, Machine, decoders_of
from bench.rehearsal.timeline import LOAD
from bench.runs import prepare
from datasetdm_fast.command_line.run_settings import label_spec
from datasetdm_fast.config import ATTENTION, LABELLER_KINDS, LABELS, SAMPLERS, UNDECODED, LabellerKind
from datasetdm_fast.data import Annotation, Batch, Quarantined, Sample, SemanticMap
from datasetdm_fast.engine import engines
from datasetdm_fast.engine import labels as label_kinds
from datasetdm_fast.engine.engines import cuda_graph
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.loop import driver, inverting
from datasetdm_fast.engine.loop import recipe as recipes
from datasetdm_fast.engine.pictures.framing import pictures_in_memory
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.engine.sampling.schedule import open_sampler
from datasetdm_fast.engine.tasks.labeller import Labeller, LabellerInput
from datasetdm_fast.kernels.transfer import to_host
from datasetdm_fast.plugins import GROUP
from datasetdm_fast.runs.compositions import redraw
from datasetdm_fast.runs.compositions.composition import SquareSource
from datasetdm_fast.runs.compositions.edit import Edits
from datasetdm_fast.runs.compositions.settings import EditSettings, VarySettings
from datasetdm_fast.runs.compositions.vary import Variants
from datasetdm_fast.runs.jobs.labelling import open_pictures, prepare_labelling
from datasetdm_fast.runs.jobs.writing import write_missing
from datasetdm_fast.runs.run_settings import LabelConfig, RunConfig

MOST_AT_ONCE = 2  # images that the GPU of `memory` takes
RECORDED_CALLS = "_plain", "_capture_projected", "_pixels", "run"  # of U-Net, autoencoder and decoders, by their names


def decoders(machine: Machine) -> int:
    """What generate does, with the four decoders of most runs."""
    engine = machine.engine(*TASKS)
    return machine.made(engine, machine.recipe(engine, TASKS))


def attention(machine: Machine) -> int:
    """Labels from attention alone; then beside a decoder, and over other cells, by the same engine."""
    engine = machine.engine()
    found = machine.made(engine, machine.recipe(engine, (ATTENTION,), classes=WORDS))
    side = engine.model.levels[-1].side
    others = {"self_cells": side // 4, "cross_cells": side // 2}
    found += machine.made(engine, machine.recipe(engine, (ATTENTION,), classes=WORDS, **others))
    engine = machine.engine("depth")
    return found + machine.made(engine, machine.recipe(engine, ("depth", ATTENTION), classes=WORDS, ask="all"))


def words(machine: Machine) -> int:
    """Decoders of class words and of a prompt's words, joints by bins, one label within another."""
    labels = (OPEN, NAMED, SIMCC)
    engine, within = machine.engine(*labels), f"{OPEN} within {NAMED}:{WORDS[0]}"
    return machine.made(engine, machine.recipe(engine, labels, classes=WORDS, combine=(within,)))


def label(machine: Machine) -> int:
    """Labels of pictures that exist, by a decoder and by attention."""
    engine = machine.engine("depth")
    recipe = machine.recipe(engine, ("depth", ATTENTION), classes=WORDS)
    pictures = pictures_in_memory([blank(engine.model.size) for _ in range(machine.batch * machine.batches)])
    recipe = inverting.inversion_recipe(recipe, engine, (100, 300))
    return machine.made(engine, recipe, inverting.inversion_generator(pictures))


def tiles(machine: Machine) -> int:
    """Labels of pictures larger than the model, tile by tile; one thread makes captures and labels."""
    labels = "instance", ATTENTION
    engine = machine.engine("instance")
    machine.timeline.thread.work = "labels"
    with run_folders(engine) as folder:
        images = folder / "images"
        images.mkdir()
        for place in range(machine.batches):
            Image.fromarray(blank(engine.model.size, engine.model.size * 3 // 2)).save(images / f"{place}.png")
        config = LabelConfig(
            images=str(images), tiles=True, task=labels, classes=WORDS, timesteps=("100",), batch_size=2,
            out=str(folder / "run"),
        )  # fmt: skip
        job = prepare_labelling(label_spec(config), None, open_pictures(config.images, ""), (100,), has_tiles=True)
        return write_missing(job).done


def labeller(machine: Machine) -> int:
    """A labeller of another package, which reads a captured call: of drawn images, then of pictures that exist."""
    engine = machine.engine("depth")
    point = EntryPoint("bright", f"{__name__}:BRIGHT", f"{GROUP}labellers")
    with (
        mock.patch.dict(LABELLER_KINDS.others, bright=point),
        mock.patch.dict(LABEL_KINDS.others, bright=LABELLER_KINDS),
        mock.patch.object(recipes, "UNDECODED", (*UNDECODED, "bright")),
        mock.patch.object(label_kinds, "LABELS", (*LABELS, "bright")),
    ):
        recipe = machine.recipe(engine, ("depth", "bright"))
        found = machine.made(engine, recipe)
        pictures = pictures_in_memory([blank(engine.model.size)] * machine.batch * machine.batches)
        recipe = inverting.inversion_recipe(recipe, engine, ())
        return found + machine.made(engine, recipe, inverting.inversion_generator(pictures))


class Bright(Labeller):
    """Which pixels are brighter than latents and features, all on the run's device."""

    classes = ("dark", "bright")
    reads_capture = True

    def label(self, given: LabellerInput) -> list[Annotation]:
        highest = given.capture.features[-1][0].float().mean((1, 2, 3)) + given.latents.mean((1, 2, 3))
        grey = given.images.float().mean(3) / 255
        is_bright = (grey > highest[:, None, None]).to(torch.uint8)
        return [SemanticMap(*both, self.classes) for both in zip(*to_host(is_bright, grey), strict=True)]


BRIGHT = LabellerKind("datasetdm_fast.engine.labels.semantic:SemanticKind", f"{__name__}:Bright")


def files(machine: Machine) -> int:
    """The command generate down to the files of its run folder, and the commands edit and vary on these."""
    engine = machine.engine("semantic", "instance")
    with run_folders(engine) as folder:
        number, source = machine.batch * machine.batches, str(folder / "drawn")
        config = RunConfig(
            prompts=PROMPT, task=tuple(engine.decoders), steps=machine.steps, number=number, batch_size=machine.batch,
            out=source,
        )  # fmt: skip
        found = write_missing(prepare(config)).done
        for kind, chosen in (
            (Edits, EditSettings(prompt="a cat", box="8,8,64,64")),
            (Variants, VarySettings(domain=("fog",))),
        ):
            settings = replace(chosen, run=source, out=str(folder / kind.command), steps=machine.steps)
            machine.timeline.phase = LOAD
            found += write_missing(redraw.prepare(kind(SquareSource(Path(source)), settings), Path(settings.out))).done
        return found


def library(machine: Machine) -> int:
    """The library with the arguments of diffusers: latents changed after every call, latents as the answer."""
    engine = machine.engine("depth")

    def changed(pipeline: Pipeline, call: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"] * 0.9}

    generators = [torch.Generator().manual_seed(k) for k in range(machine.batch * machine.batches - 1)]
    machine.timeline.phase = LOAD
    size = min(machine.batch, engine.suggested_batch())
    answer = Pipeline(engine).diffuse(
        [PROMPT] * len(generators), num_inference_steps=machine.steps, generator=generators, output_type="latent",
        callback_on_step_end=changed, batch_size=size,
    )  # fmt: skip
    return len(answer.samples)


def features(machine: Machine) -> int:
    """What the library tells of one image: features and maps, and what decoders make of them."""
    engine = machine.engine("depth")
    pipeline, image, count = Pipeline(engine), blank(engine.model.size), 0
    machine.timeline.phase = "batch 0"
    for given in ({"image": image}, {"prompt": PROMPT, "steps": machine.steps}):
        for is_projected in (False, True):
            count += len(pipeline.features(**given, projected=is_projected))
    return count


def samplers(machine: Machine) -> int:
    """Images without labels by every sampler, without guidance and by a part of the schedule."""
    engine, found = machine.engine(), 0
    for sampler in (name for name in SAMPLERS if open_sampler(name).calls):
        for choices in ({"guidance": 1.0}, {"strength": 0.6, "profile": "0.3.0"}):
            recipe = machine.recipe(engine, (), sampler=sampler, **{"steps": machine.steps + 1, **choices})
            found += machine.made(engine, recipe)
    return found


def retry(machine: Machine) -> int:
    """A chunk whose pixels leave the range of fp16, and a sample that is made again in fp32."""
    engine, timeline = machine.engine("depth"), machine.timeline
    machine.operations.truths.append(False)  # whether all pixels of the first chunk are finite
    machine.operations.flags.append(False)  # whether latents, features, image and labels of the first batch are

    class Second(driver.BatchGenerator):
        """What makes a batch in fp32 is an engine's first batch, and in one thread."""

        def make(self, batch: Batch) -> list[Sample | Quarantined]:
            with machine.of(self.engine.precision), machine.within("batch 0"):
                timeline.thread.work = "labels"
                made = super().make(batch)
                timeline.thread.work = ""
                return made

    def fallback() -> FastEngine | None:
        with machine.within(LOAD):
            found = FastEngine.fp32_fallback(engine)
            if found is not None:
                found.prepare(1)  # its weights are read then
            return found

    with mock.patch.object(engine, "fp32_fallback", fallback):
        return machine.made(engine, machine.recipe(engine, ("depth",)), Second)


def between(machine: Machine) -> int:
    """A caller that uses the engine between two batches of a run, while the labels of the next are made."""
    engine, found = machine.engine("depth"), 0
    recipe = machine.recipe(engine, ("depth",))
    own = driver.BatchGenerator(engine, recipe, lambda: None)
    for batch, results in driver.generate(map(machine.batch_of, range(machine.batches)), engine, recipe):
        with machine.within("batch 0"):
            machine.timeline.thread.work = "labels"
            found += len(results) + len(own.make(Batch(0, batch.requests[:1])))
            machine.timeline.thread.work = ""
    return found


def memory(machine: Machine) -> int:
    """A GPU that takes fewer images at once than a batch has."""
    engine, record = machine.engine("depth"), cuda_graph.StepGraph

    def recorded(run: Callable, inputs: Sequence[Tensor], *others: Any, **named: Any) -> Any:
        if len(inputs[0]) > MOST_AT_ONCE and run.__name__ in RECORDED_CALLS:
            raise torch.OutOfMemoryError("simulated")
        return record(run, inputs, *others, **named)

    with mock.patch.object(cuda_graph, "StepGraph", recorded):
        machine.batch = 2 * MOST_AT_ONCE
        return machine.made(engine, machine.recipe(engine, ("depth",)))


def cards(machine: Machine) -> int:
    """Two engines in one process, on a GPU each, batch by batch."""
    runs = []
    for device in ("cuda:1", "cuda:0"):
        engine = machine.engine("depth", device=device)
        batches = map(machine.batch_of, range(machine.batches))
        runs.append(driver.generate(batches, engine, machine.recipe(engine, ("depth",))))
    return sum(isinstance(one, Sample) for both in zip(*runs) for _, results in both for one in results)


def verify(machine: Machine) -> int:
    """The engine compared with the reference engine on the same GPU, labels from attention included; the host waits for
    every stage.
    """
    from datasetdm_fast.runs.agreement.comparing import compare_with_reference  # whose libraries take seconds

    engine = machine.engine("semantic")
    with run_folders(engine) as folder:
        config = RunConfig(
            prompts=PROMPT, task=("semantic", ATTENTION), classes=WORDS, steps=machine.steps, number=2, batch_size=2,
            out=str(folder / "run"),
        )  # fmt: skip
        return len(compare_with_reference(prepare(config), 2).rows)


def joint(machine: Machine) -> int:
    """A small MM-DiT: depth by a decoder, then labels from its attention to the prompt."""
    engine = machine.joint_engine("depth")
    found = machine.made(engine, machine.recipe(engine, ("depth",)))
    return found + machine.made(engine, machine.recipe(engine, (ATTENTION,), classes=WORDS))


def joint_verify(machine: Machine) -> int:
    """A small MM-DiT compared with its reference, which is opened first, as the command `verify` does it."""
    from datasetdm_fast.engine.engines import build_engine
    from datasetdm_fast.runs.agreement import verify as agreement

    model = machine.small_joint_model()
    decoders = decoders_of(model, ("depth",))
    reference = build_engine("torch", model, decoders, device=machine.device)
    engine = build_engine("fast", model, decoders, device=machine.device)
    recipe = machine.recipe(engine, ("depth",))
    return len(agreement.verify(engine, reference, machine.batch_of(0).requests[:2], recipe, 2, is_whole=True).rows)


SCENARIOS: Mapping[str, Callable[[Machine], int]] = {  # those of command.py
    "decoders": decoders,
    "attention": attention,
    "words": words,
    "label": label,
    "tiles": tiles,
    "labeller": labeller,
    "files": files,
    "library": library,
    "features": features,
    "samplers": samplers,
    "retry": retry,
    "between": between,
    "memory": memory,
    "cards": cards,
    "verify": verify,
    "joint": joint,
    "joint-verify": joint_verify,
    **teaching.SCENARIOS,
}


def blank(height: int, width: int = 0) -> np.ndarray:  # [H, W, 3] uint8
    return np.zeros((height, width or height, 3), np.uint8)


@contextmanager
def run_folders(engine: FastEngine) -> Iterator[Path]:
    """A folder for run folders; commands that open an engine get this one."""
    told = {label: {"digest": f"seeded: {label}", "licence": "none"} for label in engine.decoders}
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(engines, "open_engine", lambda *arguments, **named: (engine, told)):
            yield Path(folder)
