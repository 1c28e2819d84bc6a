"""python -m bench.world.flow --out DIR: a model of a world in the form of Stable Diffusion 3, an MM-DiT trained by
flow matching for so many minutes; the same command resumes.

Scenes are rendered while the model learns from those that are there. Stages: autoencoder (where minutes are given
for one; otherwise the demo model's is used as it is), flow, export.
"""

import argparse
import json
import math
import os
import sys
import textwrap
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel
from PIL import Image, ImageDraw, ImageFont
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from bench.world.mmdit import (
    WITHOUT_T5,
    CountedAttention,
    assemble,
    build_autoencoder,
    build_text,
    build_transformer,
    draw_counts,
    encode,
    store_parts,
    zero_tokens,
)
from bench.world.pool import CHUNK, Renderers, ScenePool, tokenise
from bench.world.tokenizer import build_tokenizer
from bench.world.train import SEED, SIZE, DemoTraining, TrainingLog, edges, scaled
from bench.world.worlds import ASKED, WORLDS
from datasetdm_fast.command_line.ending import run_command

WAITED_FOR = 64  # chunks that are there before the training begins
MEASURED = 4096  # scenes whose latents give scale and shift
MOST_PICTURES = 1024  # chunks that an autoencoder learns from
DROPPED = 0.1  # share of empty captions
STORED_EVERY = 60  # seconds between two files of weights


class TimedTraining(DemoTraining):
    """A training stage that ends after so many minutes, those of earlier processes counted in."""

    def __init__(self, path: Path, modules: dict[str, torch.nn.Module], rate: float, minutes: float, decay: float):
        self.minutes = minutes
        super().__init__(path, modules, rate, 0, decay, hold=0.4)

    @property
    def share(self) -> float:
        return min(self.seconds / 60 / self.minutes, 1.0) if self.minutes > 0 else 1.0


def to_device(values: torch.Tensor, device: str) -> torch.Tensor:
    """Without waiting for what the device still has to do."""
    return values.pin_memory().to(device, non_blocking=True) if device.startswith("cuda") else values


def train_autoencoder(
    work: Path, parts: Path, model: AutoencoderKL, renderers: Renderers, minutes: float, batch: int, device: str
) -> ScenePool:
    """Trains the model on renders as they come, and returns these with their captions."""
    run = TimedTraining(work / "autoencoder.pt", {"autoencoder": model}, 2e-3, minutes, decay=0.995)
    log = TrainingLog(parts / "log.jsonl", "autoencoder", 100 if device != "cpu" else 10)
    capacity = min(renderers.expected, MOST_PICTURES) * CHUNK
    pool = ScenePool(capacity, torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8), device)
    generator = torch.Generator(device).manual_seed(SEED + run.step)
    model.train().to(memory_format=torch.channels_last)
    while run.share < 1:
        if pool.count < capacity and (chunk := renderers.take(wait=not pool.count)):
            pool.add(*(to_device(part, device) for part in chunk))
        target = scaled(pool.draw(batch, generator)[0]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(target.device.type, torch.bfloat16, enabled=device != "cpu" and run.share < 0.9):
            posterior = model.encode(target).latent_dist
            output = model.decode(posterior.sample()).sample
        output = output.float()
        squared = (output - target).pow(2).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        run.advance((output - target).abs().mean() + squared + edges(output, target) + 2e-3 * kl, batch)
        log.add(run, squared=squared.detach(), kl=kl.detach())
    run.save()
    run.average.swap()
    return pool


@torch.no_grad()
def latents_of(model: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    return model.encode(scaled(images)).latent_dist.mean.half()


def fill(pool: ScenePool, model: AutoencoderKL, renderers: Renderers, device: str, wait: bool = False) -> None:
    """Takes a chunk of scenes into a pool of latents."""
    if chunk := renderers.take(wait):
        images, tokens = (to_device(part, device) for part in chunk)
        pool.add(latents_of(model, images), tokens)


def measure_latents(path: Path, pool: ScenePool) -> dict[str, float]:
    """The factor and the shift that give latents unit variance and mean zero, the same after a restart."""
    if not path.exists():
        some = pool.values[: min(pool.count, MEASURED)].float()
        path.write_text(json.dumps({"scaling_factor": float(1 / some.std()), "shift_factor": float(some.mean())}))
    return json.loads(path.read_text())


def flow_loss(
    net: SD3Transformer2DModel,
    text: CLIPTextModelWithProjection,
    clean: torch.Tensor,
    tokens: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Mean squared error of the velocity at logit-normal times (Esser et al. 2024, eq. 19), stratified."""
    rows, device = len(clean), clean.device
    places = (torch.rand(rows, generator=generator, device=device) + torch.arange(rows, device=device)) / rows
    sigma = torch.special.ndtri(places.clamp(1e-4, 1 - 1e-4)).sigmoid()
    noise = torch.randn(clean.shape, generator=generator, device=device)
    mixed = torch.lerp(clean, noise, sigma[:, None, None, None])
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
        context, pooled = encode(text, tokens)
        context, bias = zero_tokens(context, draw_counts(rows, generator, str(device)))
        given = {"encoder_hidden_states": context, "pooled_projections": pooled, "timestep": sigma * 1000}
        velocity = net(mixed, **given, joint_attention_kwargs={"attention_mask": bias}).sample
    return F.mse_loss(velocity.float(), noise - clean)


def train_flow(
    work: Path,
    parts: Path,
    world: str,
    net: SD3Transformer2DModel,
    text: CLIPTextModelWithProjection,
    autoencoder: AutoencoderKL,
    empty: torch.Tensor,
    pool: ScenePool,
    renderers: Renderers,
    minutes: float,
    batch: int,
    rate: float,
    device: str,
) -> None:
    run = TimedTraining(work / "flow.pt", {"net": net, "text": text}, rate, minutes, decay=0.999)
    log, stored = TrainingLog(parts / "log.jsonl", "flow", 100 if device != "cpu" else 10), time.monotonic()
    net.set_attn_processor(CountedAttention())
    if device != "cpu":
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled runs as it is
        for block in net.transformer_blocks:
            block.compile(dynamic=False)
    factors, generator = autoencoder.config, torch.Generator(device).manual_seed(SEED + run.step)
    net.train(), text.train()
    while run.share < 1:
        fill(pool, autoencoder, renderers, device)
        latents, tokens = pool.draw(batch, generator)
        is_dropped = torch.rand(batch, generator=generator, device=device) < DROPPED
        clean = (latents.float() - factors.shift_factor) * factors.scaling_factor
        loss = flow_loss(net, text, clean, torch.where(is_dropped[:, None], empty, tokens), generator)
        run.advance(loss, batch)
        log.add(run, loss=loss.detach(), scenes=pool.count)
        if time.monotonic() - stored > STORED_EVERY:
            run.average.swap()
            store_parts(parts, world, net, text, autoencoder)
            run.average.swap()
            stored = time.monotonic()
    run.save()
    run.average.swap()
    store_parts(parts, world, net, text, autoencoder)


@torch.no_grad()
def draw_sheet(folder: Path, world: str, path: Path, device: str, count: int = 16) -> None:
    """Pictures of captions of unseen scenes, as the stock pipeline draws them from the model folder."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **WITHOUT_T5).to(device)
    captions = [WORLDS[world].sample_scene(ASKED + k).caption for k in range(count)]
    noise = torch.Generator().manual_seed(SEED)
    images = pipeline(captions, num_inference_steps=28, guidance_scale=4.0, generator=noise).images
    side, head, across = 2 * SIZE, 48, 4
    page = Image.new("RGB", (across * side, math.ceil(count / across) * (side + head)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for k, (caption, image) in enumerate(zip(captions, images)):
        left, top = k % across * side, k // across * (side + head)
        pen.multiline_text((left + 4, top + 2), "\n".join(textwrap.wrap(caption, 42)[:3]), "black", font=font)
        page.paste(image.resize((side, side), Image.Resampling.BICUBIC), (left, top + head))
    page.save(path)


def main(arguments: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m bench.world.flow", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the finished model; checkpoints lie in OUT.work"
    )
    parser.add_argument(
        "--parts", type=Path, help="folder of the weights in two files, a sheet and the log (default: OUT.work/parts)"
    )
    parser.add_argument("--world", choices=tuple(WORLDS), default="demo", help="world of the training scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="from the start of the program to the end of the training"
    )
    parser.add_argument(
        "--autoencoder-minutes", type=float, default=0.0, help="of these; 0: the demo model's, as it is"
    )
    parser.add_argument("--channels", type=int, default=4, help="of the latents; other than 4 needs such minutes")
    parser.add_argument("--scenes", type=int, default=600_000, help="at most so many are rendered")
    parser.add_argument("--workers", type=int, default=max((os.cpu_count() or 2) - 1, 1), help="renderers")
    parser.add_argument("--batch", type=int, default=512, help="latents per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    options = parser.parse_args(arguments)
    if options.channels != 4 and not options.autoencoder_minutes:
        parser.error(f"--channels {options.channels}: the demo model's autoencoder has 4, give --autoencoder-minutes")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device, work = options.device, options.out.with_name(options.out.name + ".work")
    parts = options.parts or work / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    tokenizer: CLIPTokenizer = build_tokenizer(work / "tokenizer", WORLDS[options.world])
    autoencoder = build_autoencoder(options.channels).to(device)
    text = build_text(tokenizer).to(device)
    net = build_transformer(options.channels, text.config.hidden_size).to(device)
    capacity = math.ceil(options.scenes / CHUNK) * CHUNK
    renderers = Renderers(options.world, work / "tokenizer", 0, capacity // CHUNK, options.workers)
    cells = SIZE // 8
    pool = ScenePool(capacity, torch.empty(0, options.channels, cells, cells, dtype=torch.float16), device)
    if options.autoencoder_minutes:
        seen = train_autoencoder(
            work, parts, autoencoder, renderers, options.autoencoder_minutes, options.batch // 8, device
        )
        autoencoder.eval()
        for start in range(0, seen.count, CHUNK):
            some = slice(start, start + CHUNK)
            pool.add(latents_of(autoencoder, seen.values[some]), seen.tokens[some])
        del seen
    autoencoder.eval().requires_grad_(False)
    while pool.count < min(WAITED_FOR * CHUNK, capacity):
        fill(pool, autoencoder, renderers, device, wait=True)
    autoencoder.register_to_config(**measure_latents(work / "latents.json", pool))
    empty = torch.from_numpy(tokenise(tokenizer, [""])).to(device).long()
    train_flow(
        work, parts, options.world, net, text, autoencoder, empty, pool, renderers,
        options.minutes - (time.monotonic() - begun) / 60, options.batch, options.rate, device,
    )  # fmt: skip
    renderers.close()
    assemble(parts, options.out)
    draw_sheet(options.out, options.world, parts / "sheet.png", device)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
