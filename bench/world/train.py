"""python -m bench.world.train --out DIR: the diffusion model of a world, from random weights or from those of
another model; the same command resumes.

Stages: tokenizer, autoencoder, latents, diffusion, polish (the autoencoder's decoder, its encoder frozen), export.
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from bench.world.optimiser import Average, Muon, matrices
from bench.world.tokenizer import TOKENS, build_tokenizer
from bench.world.worlds import TRAIN_SEEDS, WORLDS, World
from datasetdm_fast.command_line.ending import run_command
from datasetdm_fast.engine.engines.device import half_of
from datasetdm_fast.engine.loading import presets
from datasetdm_fast.engine.scenes.world import TableTop, join_names

SIZE, SEED = 128, 20261120
SHIPPED = presets.DEMO


def build_models(
    tokenizer: CLIPTokenizer, start: Path | None = None
) -> tuple[AutoencoderKL, UNet2DConditionModel, CLIPTextModel]:
    """Networks of the shapes that the shipped model has: fresh, or with the weights of the model in a folder."""
    config = CLIPTextConfig.from_pretrained(SHIPPED / "text_encoder")
    config.vocab_size, config.bos_token_id = len(tokenizer), tokenizer.bos_token_id
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(SEED)
    autoencoder, unet = (
        kind.from_config(kind.load_config(SHIPPED / part))
        for kind, part in ((AutoencoderKL, "vae"), (UNet2DConditionModel, "unet"))
    )
    text = CLIPTextModel(config)
    if start is not None:
        for model, part in ((autoencoder, "vae"), (unet, "unet")):
            given = type(model).from_pretrained(start / part, dtype=torch.float32)
            model.load_state_dict(given.state_dict())
        copy_text(start, tokenizer, text)
    return autoencoder, unet, text


def copy_text(start: Path, tokenizer: CLIPTokenizer, text: CLIPTextModel) -> None:
    """Gives a text model the weights of another, and each token that both know its row; a new token keeps its own."""
    given = CLIPTextModel.from_pretrained(start / "text_encoder", dtype=torch.float32)
    known = json.loads((start / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    pairs = [(number, known[token]) for token, number in tokenizer.get_vocab().items() if token in known]
    own, old = map(list, zip(*pairs))
    state, rows = given.state_dict(), text.get_input_embeddings().weight.detach().clone()
    rows[own] = given.get_input_embeddings().weight.detach()[old]
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    text.load_state_dict(state | {name: rows})


def loosen_caption(scene: TableTop, rng: np.random.Generator) -> str:
    """The caption in looser words: a colour, the table or the hour may be left out."""
    names = [thing.name if rng.random() < 0.8 else f"a {thing.kind}" for thing in scene.things]
    start = str(rng.choice(["", "", "a photo of ", "a picture of ", "a scene with "]))
    between = str(rng.choice([" and ", " beside ", " next to ", " near ", " with "]))
    place = f" on a {scene.table} table" if rng.random() < 0.6 else ""
    return start + join_names(names, between) + place + (scene.where if rng.random() < 0.7 else "")


def store(value: object, path: Path) -> None:
    torch.save(value, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


class DemoTraining:
    """Weights, optimisers and average of one training stage, saved and resumed as a whole."""

    def __init__(
        self, path: Path, modules: dict[str, torch.nn.Module], rate: float, total: int, decay: float, hold: float
    ):
        self.path, self.modules, self.total, self.rate, self.hold = path, modules, total, rate, hold
        self.trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        turned = matrices(modules)
        rest = [p for p in self.trained if not any(p is matrix for matrix in turned)]
        self.optimisers = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, foreach=True),
            Muon(turned, lr=rate),
        ]
        self.average = Average(list(modules.values()), decay)
        self.step, self.samples, self.saved = 0, 0, time.monotonic()
        self.begun = self.saved  # less the seconds of earlier processes
        if path.exists():
            state = torch.load(path, weights_only=True, map_location=self.trained[0].device)
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
            for optimiser, saved in zip(self.optimisers, state["optimisers"]):
                optimiser.load_state_dict(saved)
            self.average.values, self.average.count = state["average"], state["count"]
            self.step, self.samples = state["step"], state["samples"]
            self.begun -= state.get("seconds", 0)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    @property
    def share(self) -> float:
        """How much of the run is done."""
        return self.step / self.total

    def scheduled_rate(self) -> float:
        """Warm-up over 100 steps, constant for the share `hold` of the run, then a cosine to 2 %."""
        tail = max(self.share - self.hold, 0) / (1 - self.hold)
        return self.rate * min(1, (self.step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(tail, 1))))

    def advance(self, loss: torch.Tensor, samples: int) -> None:
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.scheduled_rate()
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.average.update()
        self.step += 1
        self.samples += samples
        if time.monotonic() - self.saved > 120:
            self.save()

    def save(self) -> None:
        state = {"modules": {name: module.state_dict() for name, module in self.modules.items()}}
        state |= {"optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}
        state |= {"average": self.average.values, "count": self.average.count}
        state |= {"step": self.step, "samples": self.samples, "seconds": self.seconds}
        store(state, self.path)
        self.saved = time.monotonic()


class TrainingLog:
    """Means of a few figures, printed and appended to a JSON-lines file every `every` steps."""

    def __init__(self, path: Path, stage: str, every: int = 50):
        self.path, self.stage, self.every = path, stage, every
        self.sums, self.count, self.start = {}, 0, time.monotonic()

    def add(self, run: DemoTraining, **figures: float | torch.Tensor) -> None:
        self.count += 1
        for name, value in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if run.step % self.every and run.step != run.total:
            return
        means = {name: round(float(total) / self.count, 5) for name, total in self.sums.items()}
        seconds = (time.monotonic() - self.start) / self.count
        row = {"stage": self.stage, "step": run.step, "share": round(run.share, 4), "samples": run.samples}
        row |= means | {"seconds_per_step": round(seconds, 4), "seconds": round(run.seconds, 1)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.sums, self.count, self.start = {}, 0, time.monotonic()


def pictures(world: World, seeds: range) -> torch.Tensor:
    """[N, 3, H, W] uint8 renders."""
    images = [torch.from_numpy(world.view(seed, SIZE).image) for seed in seeds]
    return torch.stack(images).permute(0, 3, 1, 2).contiguous()


def scaled(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1


def edges(images: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of the horizontal and vertical gradients."""
    difference = images - other
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def train_autoencoder(
    folder: Path,
    model: AutoencoderKL,
    world: World,
    steps: int,
    batch: int,
    renders: int,
    rate: float,
    device: str,
    polish: bool,
) -> None:
    stage = "polish" if polish else "autoencoder"
    for part in (model.encoder, model.quant_conv):
        part.requires_grad_(not polish)
    run = DemoTraining(folder / f"{stage}.pt", {"autoencoder": model}, rate, steps, decay=0.995, hold=0.3)
    if run.step >= steps:
        return run.average.swap()
    log = TrainingLog(folder / "log.jsonl", stage)
    images = pictures(world, range(TRAIN_SEEDS, TRAIN_SEEDS + renders)).to(device)
    is_short = bool(half_of(torch.device(device)))  # a CPU without bf16 takes 2.7 times as long to emulate it
    model.train().to(memory_format=torch.channels_last)
    while run.step < steps:
        generator = torch.Generator().manual_seed(SEED + run.step)
        chosen = images[torch.randint(len(images), (batch,), generator=generator)]
        target = scaled(chosen).contiguous(memory_format=torch.channels_last)
        # The last part is in fp32 everywhere, for the fine tones.
        with torch.autocast(target.device.type, torch.bfloat16, enabled=is_short and run.step < 0.9 * steps):
            posterior = model.encode(target).latent_dist
            latent = posterior.mean if polish else posterior.sample()
            output = model.decode(latent).sample
        output = output.float()
        difference = output - target
        squared = difference.pow(2).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = difference.abs().mean() + squared + edges(output, target) + 2e-3 * kl
        run.advance(loss, batch)
        log.add(run, loss=loss.item(), psnr=10 * math.log10(4 / squared.item()), kl=kl.item())
    run.save()
    run.average.swap()


@torch.no_grad()
def cache_latents(
    folder: Path, model: AutoencoderKL, world: World, count: int, device: str
) -> tuple[torch.Tensor, float]:
    """Posterior means of `count` renders in fp16 and the factor that gives them unit variance."""
    path = folder / "latents.pt"
    model.eval()
    done = torch.empty(0, 4, SIZE // 8, SIZE // 8, dtype=torch.float16)
    if path.exists():
        done = torch.load(path, weights_only=True)
    while len(done) < count:
        parts = []
        for start in range(len(done), min(len(done) + 4096, count), 64):
            some = range(TRAIN_SEEDS + start, TRAIN_SEEDS + min(start + 64, count))
            images = pictures(world, some).to(device)
            parts.append(model.encode(scaled(images)).latent_dist.mean.half().cpu())
        done = torch.cat([done, *parts])
        store(done, path)
        print(json.dumps({"stage": "latents", "done": len(done), "of": count}), file=sys.stderr, flush=True)
    return done, float(1 / done[:4096].float().std())


def train_diffusion(
    folder: Path,
    unet,
    text,
    tokenizer,
    world: World,
    latents: torch.Tensor,
    steps: int,
    batch: int,
    rate: float,
    device: str,
) -> None:
    run = DemoTraining(folder / "diffusion.pt", {"unet": unet, "text": text}, rate, steps, decay=0.9985, hold=0.35)
    if run.step >= steps:
        return run.average.swap()
    log = TrainingLog(folder / "log.jsonl", "diffusion")
    alphas = PNDMScheduler.from_pretrained(SHIPPED / "scheduler").alphas_cumprod.to(device)
    scenes = [world.sample_scene(TRAIN_SEEDS + k) for k in range(len(latents))]
    unet.train(), text.train()
    while run.step < steps:
        generator = torch.Generator().manual_seed(SEED + run.step)
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        rng = np.random.default_rng([SEED, run.step])
        retold = [scenes[k].caption if rng.random() < 0.6 else loosen_caption(scenes[k], rng) for k in chosen]
        captions = ["" if rng.random() < 0.1 else caption for caption in retold]
        options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens = tokenizer(captions, **options).input_ids.to(device)
        clean = latents[chosen].to(device)
        # Stratified timesteps: each batch covers the whole schedule.
        places = (torch.rand(batch, generator=generator) + torch.arange(batch)) * (1000 / batch)
        times = places.long().clamp(max=999).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        kept, mixed = alphas[times].sqrt()[:, None, None, None], (1 - alphas[times]).sqrt()[:, None, None, None]
        guess = unet(kept * clean + mixed * noise, times, text(tokens).last_hidden_state).sample
        loss = F.mse_loss(guess, kept * noise - mixed * clean)
        run.advance(loss, batch)
        log.add(run, loss=loss.item())
    run.save()
    run.average.swap()


def export(folder: Path, tokenizer_folder: Path, autoencoder, unet, text, factor: float) -> None:
    """The model as a diffusers folder in fp16, loadable by the stock StableDiffusionPipeline."""
    from diffusers import StableDiffusionPipeline

    autoencoder.register_to_config(scaling_factor=factor)
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    vae, scheduler = autoencoder.half().to(memory_format=torch.contiguous_format), SHIPPED / "scheduler"
    parts = {"vae": vae, "text_encoder": text.half(), "tokenizer": tokenizer, "unet": unet.half()}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline(**parts, scheduler=PNDMScheduler.from_pretrained(scheduler), **absent)
    pipeline.save_pretrained(folder, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((tokenizer_folder / name).read_bytes())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.world.train", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished model; checkpoints lie in OUT.work"
    )
    parser.add_argument("--world", choices=tuple(WORLDS), default="demo", help="world of the training scenes")
    parser.add_argument(
        "--start",
        default="",
        help="initial weights, of a model with this architecture: demo, or a folder (default: random)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = torch's choice")
    parser.add_argument("--renders", type=int, default=8000, help="training scenes of the autoencoder")
    parser.add_argument("--autoencoder-steps", type=int, default=1850, help="training steps of the autoencoder")
    parser.add_argument("--autoencoder-batch", type=int, default=16, help="pictures per step")
    parser.add_argument("--latents", type=int, default=24576, help="training scenes of the diffusion model")
    parser.add_argument("--diffusion-steps", type=int, default=2900, help="training steps of the diffusion model")
    parser.add_argument("--diffusion-batch", type=int, default=48, help="latents per step")
    parser.add_argument("--rate", type=float, default=1.5e-3, help="learning rate of the diffusion model")
    parser.add_argument(
        "--polish-steps", type=int, default=600, help="training steps of the autoencoder's decoder at the end"
    )
    stages = ("autoencoder", "latents", "diffusion", "polish", "export")
    parser.add_argument("--until", choices=stages, default="export", help="last stage to run")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    start = SHIPPED if options.start == "demo" else Path(options.start) if options.start else None
    if start is not None and not (start / "model_index.json").exists():
        parser.error(
            f"--start {options.start}: no diffusers model is there; name demo or a folder with model_index.json"
        )
    work, world = options.out.with_name(options.out.name + ".work"), WORLDS[options.world]
    tokenizer = build_tokenizer(work / "tokenizer", world)
    autoencoder, unet, text = (model.to(options.device) for model in build_models(tokenizer, start))
    wanted = stages[: stages.index(options.until) + 1]
    seen = (options.autoencoder_batch, options.renders)
    train_autoencoder(work, autoencoder, world, options.autoencoder_steps, *seen, 2e-3, options.device, polish=False)
    if "latents" in wanted:
        latents, factor = cache_latents(work, autoencoder, world, options.latents, options.device)
    if "diffusion" in wanted:
        schedule = (options.diffusion_steps, options.diffusion_batch, options.rate)
        train_diffusion(work, unet, text, tokenizer, world, latents.float() * factor, *schedule, options.device)
    if "polish" in wanted:
        train_autoencoder(work, autoencoder, world, options.polish_steps, *seen, 1.5e-3, options.device, polish=True)
    if "export" in wanted:
        export(options.out, work / "tokenizer", autoencoder, unet, text, factor)
        print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
