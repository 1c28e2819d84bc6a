"""SegFormer trained on samples that are made while it reads them."""

from functools import partial

import torch
from torch.utils.data import DataLoader
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from datasetdm_fast import Pipeline, SampleStream

prompts = ["a red ball on a table", "a blue cube beside a tree", "two cones and a star"]
pipe = partial(Pipeline.from_pretrained, "demo")
stream = SampleStream(pipe, prompts, "semantic", number=8, seed=7, steps=4, batch_size=4)
config = SegformerConfig(num_labels=len(stream.classes), depths=[1] * 4, hidden_sizes=[8, 16, 16, 32])
config.num_attention_heads, config.decoder_hidden_size = [1, 1, 2, 2], 32
network = SegformerForSemanticSegmentation(config)
optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
for images, labels in DataLoader(stream, batch_size=4):
    loss = network(pixel_values=images, labels=labels).loss
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"{loss.item():.3f}")
