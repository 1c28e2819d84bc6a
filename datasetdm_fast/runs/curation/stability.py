"""How far the class maps of an image stay the same under other noise at the capture; it needs the model of the run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from datasetdm_fast.data import Instances, SemanticMap
from datasetdm_fast.engine.labels.trust import named_map
from datasetdm_fast.errors import Refused
from datasetdm_fast.runs.run_folder.document import check_same
from datasetdm_fast.runs.run_folder.reader import Run, StoredSample
from datasetdm_fast.runs.run_folder.scores import agreement

OTHER_NOISE = (10**9 + 7, 2 * 10**9 + 11)  # added to a sample's seed; a generator reads no more than its last 32 bits
LARGEST_SEED = 2**63
BATCH = 8


class Stability:
    """The model of a run, and its decoders with fixed classes."""

    def __init__(self, run: Run, threads: int):
        from datasetdm_fast.engine.engines.opening import open_engine

        config: Mapping[str, Any] = run.document["config"]
        if run.document.get("command") == "label":
            raise Refused(f"--stability: {run.path} holds pictures that were given to label", "Drop the flag.")
        if run.document.get("command") or not config.get("model"):
            raise Refused(f"--stability: {run.path} was not made by generate", "Score the run that it was made from.")
        self.engine, decoders = open_engine(
            config["model"],
            config["decoder"] if run.document["decoders"] else None,
            tuple(run.document["decoders"]),
            engine=config["engine"],
            dtype=config["dtype"],
            size=config["size"],
            threads=threads,
            lora=tuple(config.get("lora", ())),
            outlines=config.get("outlines", "auto"),
        )
        weights = {"model": {"digests": dict(self.engine.model.digests)}, "decoders": decoders}
        stored = {"model": {"digests": run.document["model"]["digests"]}, "decoders": run.document["decoders"]}
        check_same(run.path, stored, weights)
        configs = {label: decoder.config for label, decoder in self.engine.decoders.items()}
        self.configs = {label: config for label, config in configs.items() if config.classes and not config.has_text}
        if not self.configs:
            raise Refused(f"--stability: {run.path} has no semantic or instance labels of a decoder", "Drop the flag.")

    def scores(self, samples: Sequence[StoredSample]) -> list[float]:
        """Of the pixels that either of two draws calls a thing, the share that both call the same, mean over labels."""
        scores: list[float] = []
        for start in range(0, len(samples), BATCH):
            block = samples[start : start + BATCH]
            first, second = (self._maps(block, shift) for shift in OTHER_NOISE)
            for k in range(len(block)):
                values = [
                    agreement([named_map(first[label][k]), named_map(second[label][k])]) for label in self.configs
                ]
                known = [value for value in values if value is not None]
                scores.append(round(sum(known) / len(known), 6) if known else 1.0)
        return scores

    def _maps(self, samples: Sequence[StoredSample], shift: int) -> dict[str, list[SemanticMap | Instances]]:
        import torch

        from datasetdm_fast.engine.loop.inversion import invert
        from datasetdm_fast.engine.tasks.captions import held_to
        from datasetdm_fast.engine.tasks.outlines import read_labels

        prompts, named = [sample.prompt for sample in samples], [sample.classes for sample in samples]
        images = torch.from_numpy(np.stack([sample.image for sample in samples]))
        seeds, labels = [(sample.seed + shift) % LARGEST_SEED for sample in samples], {}
        for timestep in {config.capture_timestep or 0 for config in self.configs.values()}:
            capture = invert(self.engine, images, prompts, timestep, seeds)
            for label, config in self.configs.items():
                if (config.capture_timestep or 0) == timestep:
                    raw, tokenizer = self.engine.annotate(label, capture, None), self.engine.model.tokenizer
                    raw = held_to(raw, config, prompts, named=named, tokenizer=tokenizer)
                    pixels = (sample.image for sample in samples)
                    labels[label] = read_labels(raw, pixels, config, self.engine.model.size)
        return labels
