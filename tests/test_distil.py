"""bench.world.distil: a student learns to do in a call what its teacher does in several guided steps."""

import copy

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from bench.world import distil, mmdit
from bench.world.tokenizer import build_tokenizer
from bench.world.train import DemoTraining, TrainingLog
from datasetdm_fast.engine.pipeline import Pipeline

ROWS = 4
PROMPT = "a red ball and a blue cube on a pink table"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a tiny model with seeded weights."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    net = SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=128, caption_projection_dim=32, pooled_projection_dim=128,
        pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    text = mmdit.build_text(build_tokenizer(folder / "tokenizer"))
    autoencoder = mmdit.build_autoencoder(4)
    autoencoder.register_to_config(shift_factor=0.25)
    mmdit.store_parts(folder / "parts", "demo", net, text, autoencoder)
    mmdit.assemble(folder / "parts", folder / "model")
    return folder / "model"


class EndingLog(TrainingLog):
    """A log with which training ends after its first walk."""

    def add(self, run, **figures):
        if run.step == distil.PASSES * distil.CALLS:
            run.save()
            raise KeyboardInterrupt


def learn(folder, teacher, student, steps=16, rate=2e-3, log=TrainingLog):
    folder.mkdir(exist_ok=True)
    run = DemoTraining(folder / "distil.pt", {"net": student}, rate, steps, decay=0.9, hold=0.4)
    distil.distil(run, student, teacher, ROWS, log(folder / "log.jsonl", "distil"))
    return run


@torch.no_grad()
def error(teacher, student):
    """How far the student's velocities are from those that lead where the teacher arrives."""
    texts, draw = teacher.read(distil.tell_scenes(900, 16)), torch.Generator().manual_seed(1)
    before, levels, wanted = distil.walk_together(student, teacher, texts, 0.0, draw)
    every = texts[0].repeat(distil.CALLS, 1, 1), texts[1].repeat(distil.CALLS, 1)
    return float((distil.velocity(student, before, levels, every) - wanted).square().mean())


def test_a_walk_ends_where_the_stock_pipeline_does(teacher):
    """What the student is taught: so many guided steps in all, with the teacher's prompt and noise."""
    model = distil.Teacher(teacher, "cpu")
    before, levels, wanted = distil.walk_together(
        model.net, model, model.read([PROMPT]), 0.0, torch.Generator().manual_seed(1)
    )
    ends = before + wanted * -0.25
    assert levels.tolist() == distil.LEVELS[:-1]
    assert torch.allclose(ends[:-1], before[1:], atol=1e-6)
    pipeline = StableDiffusion3Pipeline.from_pretrained(teacher, **mmdit.WITHOUT_T5)
    pipeline.set_progress_bar_config(disable=True)
    steps = distil.CALLS * distil.INNER
    theirs = pipeline(
        PROMPT, guidance_scale=distil.GUIDANCE, sigmas=np.linspace(1, 1 / steps, steps).tolist(),
        num_inference_steps=steps, max_sequence_length=0, latents=before[:1], output_type="latent",
    ).images  # fmt: skip
    assert torch.allclose(ends[-1:], theirs, atol=0.02 * theirs.abs().max())  # in 16 bits where the CPU has them


def test_rows_go_on_from_the_students_own_calls(teacher):
    model = distil.Teacher(teacher, "cpu")
    texts = model.read([PROMPT] * 2)
    student = copy.deepcopy(model.net)
    torch.nn.init.zeros_(student.proj_out.weight), torch.nn.init.zeros_(student.proj_out.bias)  # which stays in place
    draw = torch.Generator().manual_seed(1)
    before, _, _ = distil.walk_together(student, model, texts, 1.0, draw)
    assert torch.equal(before, before[:2].repeat(distil.CALLS, 1, 1, 1))


def test_resumed_student_has_the_same_weights(teacher, tmp_path):
    model = distil.Teacher(teacher, "cpu")
    whole, begun, resumed = (copy.deepcopy(model.net).requires_grad_(True) for _ in range(3))
    run = learn(tmp_path / "whole", model, whole)
    assert run.step == 16 and run.samples == 16 * ROWS
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "parted", model, begun, log=EndingLog)
    learn(tmp_path / "parted", model, resumed)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_student_comes_nearer_to_its_teacher(teacher, tmp_path):
    model = distil.Teacher(teacher, "cpu")
    student = copy.deepcopy(model.net).requires_grad_(True)
    learn(tmp_path / "run", model, student, steps=40, rate=1e-2)
    assert error(model, student) < 0.9 * error(model, model.net)  # of captions and noise that it has not learned from


def test_command_makes_a_folder_that_the_stock_pipeline_draws_as_ours_does(teacher, tmp_path):
    line = ["--out", str(tmp_path / "model"), "--teacher", str(teacher), "--minutes", "0.001", "--batch", "2"]
    assert distil.main([*line, "--device", "cpu"]) == 0
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", **mmdit.WITHOUT_T5)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT, num_inference_steps=4, guidance_scale=1, max_sequence_length=0,
        generator=torch.Generator().manual_seed(1),
    ).images[0]  # fmt: skip
    assert pipeline.scheduler.sigmas.tolist() == distil.LEVELS
    ours = Pipeline.from_pretrained(str(tmp_path / "model"), engine="torch")(PROMPT, seeds=[1], steps=4, guidance=1.0)
    assert np.abs(np.asarray(ours.images[0], int) - np.asarray(theirs, int)).max() <= 1
    assert not (tmp_path / "model" / "README.md").exists()
