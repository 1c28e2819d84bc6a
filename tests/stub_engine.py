"""An engine of plain arithmetic behind the real protocol: every image depends on its own prompt and seed alone, in
microseconds.
"""

import re
import zlib
from types import SimpleNamespace

import torch

from datasetdm_fast.config import Defaults
from datasetdm_fast.data import Capture, Text
from datasetdm_fast.engine.backbones import Latents
from datasetdm_fast.engine.backbones.sd import SD
from datasetdm_fast.engine.decoders.config import SD1_LEVELS, DecoderConfig
from datasetdm_fast.engine.scenes import world

SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}
SMALL = {"score_threshold": 0.0}
CONFIGS = {
    "semantic": DecoderConfig("segmentation", "semantic", SD1_LEVELS, classes=world.CLASSES, **SMALL),
    "instance": DecoderConfig("segmentation", "instance", SD1_LEVELS, classes=world.THINGS, **SMALL),
    "depth": DecoderConfig("depth", "depth", SD1_LEVELS, max_depth=4.0),
    "pose": DecoderConfig("heatmap", "pose", SD1_LEVELS, joints=world.JOINTS, limbs=world.LIMBS, **SMALL),
    "open-vocabulary": DecoderConfig("open-vocabulary", "open-vocabulary", SD1_LEVELS, classes=world.THINGS, **SMALL),
}


class Tokenizer:
    """One token a word, between a start and an end mark."""

    model_max_length = 77

    def __call__(self, prompt, truncation=False):
        return SimpleNamespace(input_ids=[0, *prompt.split(), 1])

    def spans(self, prompt):
        return [(0, 0), *(word.span() for word in re.finditer(r"\S+", prompt)), (0, 0)]


class StubEngine:
    """A prompt with the word `broken` gives NaN; `log` holds every call."""

    name = "stub"
    device = torch.device("cpu")
    adjustments = {}

    def __init__(self, size=64, configs=CONFIGS, tasks=tuple(CONFIGS)):
        self.model = SimpleNamespace(
            name="stub",
            source="",
            tokenizer=Tokenizer(),
            scheduler=SCHEDULER,
            defaults=Defaults(size=size, steps=4, guidance=2.0, sampler="pndm"),
            scale=0.0,
            size=size,
            digests={"unet": "stub"},
            licence="none",
            backbone=SD,
            networks={},
            guidance="cfg",
            guidance_at=lambda guidance: "cfg",
            halves=2,
            has_negative=lambda guidance: True,
            latents=Latents(4, 8),
            flow={},
            latent_shape=lambda: (4, size // 8, size // 8),
        )
        self.decoders = {task: SimpleNamespace(config=configs[task.partition(":")[0]]) for task in tasks}
        self.log = []

    def encode_text(self, prompts):
        def one(prompt):
            if "broken" in prompt:
                return torch.full((77, 2), float("nan"))
            return torch.full((77, 2), zlib.crc32(prompt.encode()) % 997 / 997)

        return Text(torch.stack([one(prompt) for prompt in prompts]))

    def encode_classes(self, words):
        self.log.append(("encode_classes", tuple(words)))
        return torch.stack([self.encode_text([word]).context[0, 0] for word in words])

    def denoise(self, latents, timestep, text):
        self.log.append(("denoise", timestep, len(latents)))
        return torch.cat([latents, latents]) * 0.3 + text.context.mean((1, 2))[:, None, None, None]

    def denoise_and_capture(self, latents, timestep, text):
        noise = self.denoise(latents, timestep, text)
        self.log.append(("capture", timestep))
        joined = torch.cat(noise.chunk(2), 1)
        return noise, Capture(((joined,),) * 4, ((joined.flatten(2)[:, None].transpose(2, 3),),) * 4)

    denoise_and_capture_raw = denoise_and_capture

    def decode_image(self, latents):
        pixels = (latents[:, :3].nan_to_num().sigmoid() * 255).to(torch.uint8)
        return pixels.repeat_interleave(8, 2).repeat_interleave(8, 3).permute(0, 2, 3, 1)

    def decode_and_check(self, latents):
        return self.decode_image(latents), latents.isfinite().flatten(1).all(1)

    def suggested_batch(self):
        return 8

    def fp32_fallback(self):
        return None

    def encode_image(self, images, generators=None):
        small = images.permute(0, 3, 1, 2)[:, :, ::8, ::8].float() / 255
        return torch.cat([small, small[:, :1]], 1)

    def annotate(self, task, capture, text=None):
        cells, classes = capture.features[-1][0], self.decoders[task].config.classes  # [B, 8, h, w]
        task = self.decoders[task].config.task
        if task == "depth":
            return {"depth": cells[:, :1].sigmoid() * 4}
        if task == "pose":
            return {"heatmaps": cells[:, : len(world.JOINTS)].sigmoid()}
        logits = cells.mean((2, 3))
        if task == "open-vocabulary":
            masks = cells[:, None, :3] + text.sum(2)[:, :, None, None, None]
            return {"pred_logits": logits[:, None, :3, None].expand(-1, text.shape[1], -1, 3), "pred_masks": masks}
        return {
            "pred_logits": logits[:, :5, None] * torch.linspace(-3, 3, len(classes) + 1),
            "pred_masks": cells[:, :5],
        }

    def fingerprint(self):
        return {"engine": "stub", "dtype": "fp32", "device": "cpu"}


def install():
    """Puts the engine where a job opens one, in this process."""
    from datasetdm_fast.engine import engines

    def open_engine(model="demo", decoder="demo", tasks=None, **choices):
        chosen = tuple(tasks or CONFIGS)
        return StubEngine(choices.get("size") or 64, tasks=chosen), {
            task: {"digest": "stub", "licence": "none"} for task in chosen
        }

    engines.open_engine = open_engine
