"""Figures of the service in the text form of Prometheus."""

from __future__ import annotations

import resource
from collections import Counter

from datasetdm_fast.service.batching import Batcher

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper ends of the buckets of latencies


class Metrics:
    """Counts replies by path and status, and their latencies."""

    def __init__(self, batcher: Batcher):
        self.batcher, self.seconds = batcher, 0.0
        self.replies: Counter[tuple[str, int]] = Counter()
        self.buckets: Counter[float] = Counter()

    def add(self, path: str, status: int, seconds: float) -> None:
        self.replies[path, status] += 1
        self.buckets.update(end for end in SECONDS if seconds <= end)
        self.seconds += seconds

    def text(self) -> str:
        batcher, replies = self.batcher, sorted(self.replies.items())
        total = sum(self.replies.values())
        families: dict[str, dict[str, float]] = {
            "images_total counter": {"": batcher.images},
            "batches_total counter": {"": batcher.batches},
            "queue_images gauge": {"": batcher.waiting},
            "peak_memory_bytes gauge": {"": peak_memory(batcher)},
            "requests_total counter": {f'{{path="{path}",status="{code}"}}': n for (path, code), n in replies},
            "request_seconds histogram": {
                **{f'_bucket{{le="{end}"}}': self.buckets[end] for end in SECONDS},
                **{'_bucket{le="+Inf"}': total, "_sum": self.seconds, "_count": total},
            },
        }
        lines = []
        for family, values in families.items():
            lines.append(f"# TYPE datasetdm_{family}")
            lines += [f"datasetdm_{family.split()[0]}{labels} {value:.12g}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"


def peak_memory(batcher: Batcher) -> int:
    """Bytes of the GPU that the engine uses, or of this process."""
    device = batcher.pipeline.engine.device
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
