"""python -m bench.world.distil --out DIR: demo-dit in four calls without guidance, learned from its own guided
steps for so many minutes; the same command resumes.

Each call of the student learns to land where four guided steps of the teacher land (Salimans and Ho 2022; Meng et al.
2023), more and more from where its own calls have led it. No scene is rendered. The folder is the teacher's with other
weights of the transformer and its own noise levels, for `--steps 4 --guidance 1`.
"""

import argparse
import copy
import json
import os
import shutil
import sys
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from bench.world.flow import TimedTraining
from bench.world.mmdit import encode
from bench.world.pool import tokenise
from bench.world.train import SEED, DemoTraining, TrainingLog, loosen_caption
from bench.world.worlds import TRAIN_SEEDS, WORLDS
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.engine.engines.device import half_of
from datasetdm_fast.engine.loading.folder import DEMO_DIT, INDEX

CALLS, INNER, GUIDANCE = 4, 4, 2.5  # of the student; steps of the teacher for each, and their guidance
PASSES = 2  # over what a walk has given
OWN = 0.75  # share of rows that go on from the student's own calls, at the end of the training
LEVELS = torch.linspace(1, 0, CALLS + 1).tolist()
Texts = tuple[Tensor, Tensor]  # [B, T, C] and [B, C]


class Teacher:
    """A trained flow and its text encoder, as they lie in a model folder."""

    def __init__(self, folder: Path, device: str):
        whole = {"dtype": torch.float32}
        self.net = SD3Transformer2DModel.from_pretrained(folder / "transformer", **whole).to(device).eval()
        self.text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", **whole).to(device).eval()
        self.tokenizer, self.device = CLIPTokenizer.from_pretrained(folder / "tokenizer"), device
        self.net.requires_grad_(False), self.text.requires_grad_(False)
        self.empty = self.read([""])

    @torch.no_grad()
    def read(self, captions: list[str]) -> Texts:
        return encode(self.text, torch.from_numpy(tokenise(self.tokenizer, captions)).to(self.device).long())

    @torch.no_grad()
    def walk(self, latents: Tensor, start: float, end: float, texts: Texts) -> Tensor:
        """The latents after guided Euler steps from one noise level to another."""
        both = [torch.cat([empty.expand_as(given), given]) for empty, given in zip(self.empty, texts)]
        for here, there in pairwise(torch.linspace(start, end, INNER + 1).tolist()):
            levels = latents.new_full((2 * len(latents),), here)
            plain, told = velocity(self.net, torch.cat([latents, latents]), levels, (both[0], both[1])).chunk(2)
            latents = latents + (there - here) * (plain + GUIDANCE * (told - plain))
        return latents


def velocity(net: SD3Transformer2DModel, latents: Tensor, levels: Tensor, texts: Texts) -> Tensor:
    """[B, C, H, W] at noise levels [B], computed in 16 bits where the device is fast at that."""
    given = {"encoder_hidden_states": texts[0], "pooled_projections": texts[1], "timestep": levels * 1000}
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=bool(half_of(latents.device))):
        return net(latents, **given).sample.float()


def tell_scenes(first: int, count: int) -> list[str]:
    """Captions of so many training scenes, six in ten their own, the others looser."""
    scenes, rng = (
        [WORLDS["demo"].sample_scene(TRAIN_SEEDS + first + k) for k in range(count)],
        np.random.default_rng(first),
    )
    return [scene.caption if rng.random() < 0.6 else loosen_caption(scene, rng) for scene in scenes]


def walk_together(
    student: SD3Transformer2DModel, teacher: Teacher, texts: Texts, own: float, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents before each call, the calls' noise levels, and the velocities that lead where the teacher arrives. After
    a call the share `own` of the rows goes on from where the student arrives.
    """
    rows, config = len(texts[0]), teacher.net.config
    shape = (rows, config.in_channels, config.sample_size, config.sample_size)
    latents, found = torch.randn(shape, generator=draw, device=teacher.device), []
    for start, end in pairwise(LEVELS):
        levels, target = latents.new_full((rows,), start), teacher.walk(latents, start, end, texts)
        found.append((latents, levels, (target - latents) / (end - start)))
        is_own = torch.rand(rows, generator=draw, device=teacher.device) < own
        with torch.no_grad():
            arrived = latents + (end - start) * velocity(student, latents, levels, texts)
        latents = torch.where(is_own[:, None, None, None], arrived, target)
    before, levels, wanted = map(torch.cat, zip(*found))
    return before, levels, wanted


def distil(run: DemoTraining, student: SD3Transformer2DModel, teacher: Teacher, batch: int, log: TrainingLog) -> None:
    """Trains until the run's share is one."""
    while run.share < 1:
        draw = torch.Generator(teacher.device).manual_seed(SEED + run.step)
        texts = teacher.read(tell_scenes(run.samples, batch))
        before, levels, wanted = walk_together(student, teacher, texts, OWN * run.share, draw)
        for _ in range(PASSES):
            order = torch.randperm(len(before), generator=draw, device=teacher.device)
            for some in order.split(batch):
                some_texts = texts[0][some % batch], texts[1][some % batch]
                loss = F.mse_loss(velocity(student, before[some], levels[some], some_texts), wanted[some])
                run.advance(loss, len(some))
                log.add(run, loss=loss.detach())
    run.save()


def export(teacher: Path, student: SD3Transformer2DModel, folder: Path) -> None:
    """The teacher's folder without its card, with the student's weights in fp16 and its noise levels."""
    shutil.copytree(teacher, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("README.md", "transformer"))
    index = json.loads((teacher / INDEX).read_text()) | {"max_sequence_length": 0}  # it learned without zeros for T5
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy.deepcopy(student).half().save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(shift_terminal=LEVELS[-2]).save_pretrained(folder / "scheduler")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.distil", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished model; the checkpoint lies in OUT.work"
    )
    parser.add_argument("--teacher", type=Path, default=DEMO_DIT, help="folder of the model to learn from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training, earlier processes counted in")
    parser.add_argument("--batch", type=int, default=256, help="captions of a walk, and rows of a training step")
    parser.add_argument("--rate", type=float, default=5e-4, help="learning rate")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("high")
    work = options.out.with_name(options.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(options.teacher, options.device)
    student = copy.deepcopy(teacher.net).requires_grad_(True)
    run = TimedTraining(work / "distil.pt", {"net": student}, options.rate, options.minutes, decay=0.999)
    if options.device != "cpu":
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        for block in (*teacher.net.transformer_blocks, *student.transformer_blocks):
            block.compile(dynamic=False)
    distil(
        run,
        student,
        teacher,
        options.batch,
        TrainingLog(work / "log.jsonl", "distil", 100 if options.device != "cpu" else 8),
    )
    run.average.swap()
    export(options.teacher, student, options.out)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
