"""A step of training on a run, with torch's own loader."""

import torch
from torch.utils.data import DataLoader

from datasetdm_fast import open_run

run = open_run("runs/demo")
network = torch.nn.Conv2d(3, len(run.classes), 3, padding=1)
optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
for images, labels in DataLoader(run.as_dataset("semantic"), batch_size=4, shuffle=True):
    loss = torch.nn.functional.cross_entropy(network(images), labels.long(), ignore_index=255)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    print(f"{loss.item():.3f}")
