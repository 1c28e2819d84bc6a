"""The domain of a trained decoder, measured on captures of its pictures as they are."""

import numpy as np
import torch

from datasetdm_fast.engine.decoders.domain import LEAST_IMAGES, Domain, learn_domain
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.tasks import TASKS
from datasetdm_fast.training.predictions import BATCH_SIZE
from datasetdm_fast.training.session import TrainingSession
from datasetdm_fast.training.trainer import project

MOST_IMAGES = 200  # that are measured, evenly over all
DRAWS = 4  # noises of each


def measure_domain(session: TrainingSession, decoder: Decoder) -> Domain | None:
    """The domain of the session's pictures as this decoder, which was loaded for inference, reads them; None where they
    are too few.
    """
    task, numbers = decoder.config.task, session.numbers
    if len(numbers) < LEAST_IMAGES:
        return None
    count = min(len(numbers), MOST_IMAGES)
    chosen = [numbers[k * len(numbers) // count] for k in range(count)]
    views = session.views(task, chosen, DRAWS)
    sketches, labels = [], []
    decoder = decoder.to(session.engine.device)
    with torch.inference_mode():
        for start in range(0, len(views), BATCH_SIZE):
            batch = range(start, min(start + BATCH_SIZE, len(views)))
            levels = [level.to(session.engine.device) for level in views.captures.batch(batch)]
            sketches.append(decoder.sketch(project(decoder, levels)).cpu().numpy())
            labels += [TASKS[task].truth(session.source, views.item(view)) for view in batch]
    return learn_domain(np.concatenate(sketches), labels, [view // DRAWS for view in range(len(views))])
