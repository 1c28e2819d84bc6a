"""A pipeline of diffusers that is in memory makes labels, too."""

import torch
from diffusers import StableDiffusionPipeline

from datasetdm_fast import Pipeline
from datasetdm_fast.engine.loading.folder import DEMO

theirs = StableDiffusionPipeline.from_pretrained(DEMO, safety_checker=None)  # your own folder
pipe = Pipeline.from_diffusers(theirs, decoder="demo")
out = pipe.diffuse(
    "a red ball",
    num_inference_steps=10,
    generator=torch.Generator().manual_seed(7),
    output_type="pil",
    tasks=("semantic",),
)
out.images[0].save("ball.png")
print(out.semantic[0].labels.shape)
