"""Figures of the service in the text form of Prometheus."""

from __future__ import annotations

import resource
from bisect import bisect_left
from collections import Counter

from datasetdm_fast.service.batching import Batcher

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper ends of the buckets of latencies


class Metrics:
    """Counts answers by status, and their latencies."""

    def __init__(self, batcher: Batcher):
        self.batcher = batcher
        self.replies: Counter[tuple[str, int]] = Counter()  # by path and status
        self._buckets, self._seconds = [0] * (len(SECONDS) + 1), 0.0

    def add(self, path: str, status: int, seconds: float) -> None:
        self.replies[path, status] += 1
        self._buckets[bisect_left(SECONDS, seconds)] += 1
        self._seconds += seconds

    def text(self) -> str:
        batcher, lines, total = self.batcher, [], 0

        def add(name: str, kind: str, values: dict[str, float]) -> None:
            lines.append(f"# TYPE datasetdm_{name} {kind}")
            lines.extend(f"datasetdm_{name}{labels} {value:.9g}" for labels, value in values.items())

        replies = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(self.replies.items())}
        add("requests_total", "counter", replies)
        add("images_total", "counter", {"": batcher.images})
        add("batches_total", "counter", {"": batcher.batches})
        add("batch_size_mean", "gauge", {"": batcher.images / max(batcher.batches, 1)})
        add("queue_images", "gauge", {"": batcher.waiting})
        add("memory_bytes", "gauge", {"": memory_bytes(batcher)})
        buckets = {}
        for end, count in zip((*SECONDS, "+Inf"), self._buckets, strict=True):
            total += count
            buckets[f'_bucket{{le="{end}"}}'] = total
        add("request_seconds", "histogram", {**buckets, "_sum": self._seconds, "_count": total})
        return "\n".join(lines) + "\n"


def memory_bytes(batcher: Batcher) -> int:
    """Peak memory of the GPU that the engine uses, or of this process."""
    device = batcher.pipeline.engine.device
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
