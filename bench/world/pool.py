"""Scenes rendered by other processes while a model learns from those that are there."""

import os
import queue
from multiprocessing import get_context
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from bench.world.tokenizer import TOKENS
from bench.world.train import SIZE, loosen_caption
from bench.world.worlds import TRAIN_SEEDS, WORLDS

CHUNK = 128  # scenes that come at a time
TELLINGS = 4  # captions of a scene: its own and looser ones
Chunk = tuple[np.ndarray, np.ndarray]  # [CHUNK, 3, H, W] uint8 and [CHUNK, TELLINGS, TOKENS] int16


def tokenise(tokenizer: CLIPTokenizer, captions: list[str]) -> np.ndarray:
    ids = tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True)["input_ids"]
    return np.array(ids, np.int16)


def render_chunk(name: str, tokenizer: CLIPTokenizer, number: int) -> Chunk:
    world, images, captions = WORLDS[name], [], []
    rng = np.random.default_rng([number, 0xF10])
    for seed in range(TRAIN_SEEDS + number * CHUNK, TRAIN_SEEDS + (number + 1) * CHUNK):
        view = world.view(seed, SIZE)
        images.append(view.image.transpose(2, 0, 1))
        captions += [view.caption, *(loosen_caption(view.scene, rng) for _ in range(TELLINGS - 1))]
    return np.stack(images), tokenise(tokenizer, captions).reshape(CHUNK, TELLINGS, TOKENS)


def render_forever(name: str, tokenizer: Path, numbers: range, chunks: "Queue[Chunk]", parent: int) -> None:
    """Puts chunks into the queue until all are rendered or the process that takes them has ended."""
    os.nice(10)
    words = CLIPTokenizer.from_pretrained(tokenizer)
    for number in numbers:
        chunk = render_chunk(name, words, number)
        while True:
            try:
                chunks.put(chunk, timeout=5)
                break
            except queue.Full:
                if os.getppid() != parent:
                    chunks.cancel_join_thread()  # nobody takes what is still in it
                    return


class Renderers:
    """Processes that render scenes from the chunk `first` on, each scene once."""

    def __init__(self, name: str, tokenizer: Path, first: int, last: int, workers: int):
        os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # read by the processes begun here
        context = get_context("spawn")
        self.chunks: Queue[Chunk] = context.Queue(2 * workers)
        self.expected = last - first
        self.processes = [
            context.Process(
                target=render_forever,
                args=(name, tokenizer, range(first + k, last, workers), self.chunks, os.getpid()),
                daemon=True,
            )
            for k in range(workers)
        ]
        for process in self.processes:
            process.start()

    def take(self, wait: bool) -> tuple[Tensor, Tensor] | None:
        """A chunk, or None where none is ready or all have come."""
        if not self.expected:
            return None
        while True:
            try:
                images, tokens = self.chunks.get(wait, 20 if wait else None)
            except queue.Empty:
                if wait and all(process.is_alive() for process in self.processes):
                    continue
                if wait:
                    raise RuntimeError("a process that renders scenes has ended") from None
                return None
            self.expected -= 1
            return torch.from_numpy(images), torch.from_numpy(tokens)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()


class ScenePool:
    """Scenes on the device that learns, as many as have come: values of each and its captions' tokens."""

    def __init__(self, capacity: int, values: Tensor, device: str):
        self.values = torch.empty(capacity, *values.shape[1:], dtype=values.dtype, device=device)
        self.tokens = torch.empty(capacity, TELLINGS, TOKENS, dtype=torch.int16, device=device)
        self.count = 0

    def add(self, values: Tensor, tokens: Tensor) -> None:
        end = self.count + len(values)
        self.values[self.count : end], self.tokens[self.count : end] = values, tokens
        self.count = end

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Values and tokens of random scenes, six in ten with their own caption, the others with a looser one."""
        device = self.values.device
        chosen = torch.randint(self.count, (rows,), generator=generator, device=device)
        looser = torch.randint(1, TELLINGS, (rows,), generator=generator, device=device)
        telling = torch.where(torch.rand(rows, generator=generator, device=device) < 0.6, 0, looser)
        return self.values[chosen], self.tokens[chosen, telling].long()
