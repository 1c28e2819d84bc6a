"""Where the outlines of labels come from: a decoder's own masks, or the colours of the image near them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from datasetdm_fast.config import FROM_IMAGE
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.labels import LABEL_KINDS
from datasetdm_fast.engine.tasks import TASKS


def read_labels(
    raw: dict[str, Tensor], images: Iterable[np.ndarray], config: DecoderConfig, size: int, **options: Any
) -> list[Any]:
    """The labels in a decoder's raw tensors, with their outlines; `options` as the task's postprocess has it."""
    return with_outlines(TASKS[config.task].postprocess(raw, config, size, **options), images, config)


def with_outlines(labels: Sequence[Any], images: Iterable[np.ndarray], config: DecoderConfig) -> list[Any]:
    """A decoder's labels of images [H, W, 3] uint8, whose colours their outlines follow where its configuration says
    so.
    """
    if config.outlines != FROM_IMAGE:
        return list(labels)
    kind = LABEL_KINDS[config.task]
    pairs = zip(labels, images, strict=True)
    return [kind.follow_colours(label, np.ascontiguousarray(image)) for label, image in pairs]
