"""Whether a taught decoder's labels get outlines that follow the image, by what that does to images it learnt from."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from datasetdm_fast.config import FROM_IMAGE
from datasetdm_fast.data import Annotation
from datasetdm_fast.engine.decoders.config import DecoderConfig
from datasetdm_fast.engine.tasks.outlines import outlined
from datasetdm_fast.training import held_out
from datasetdm_fast.training.captures.views import TrainingViews
from datasetdm_fast.training.evaluation.metrics import METRICS
from datasetdm_fast.training.settings import TrainConfig

MOST_IMAGES = 100  # that are looked at


def chosen(
    config: TrainConfig,
    own: DecoderConfig,
    lessons: TrainingViews,
    answers: Callable[[Sequence[int]], Sequence[Annotation]],
) -> DecoderConfig:
    """The decoder's own configuration with the outlines of the settings; with `auto` those of the image where they are
    nearer the truth in the first view of every image, which they never are with `--preset upstream`. `answers` gives
    the decoder's labels of some views.
    """
    if config.outlines != "auto" or config.preset == "upstream":
        return own if config.outlines == "auto" else replace(own, outlines=config.outlines)
    views = lessons.first_views(MOST_IMAGES)
    plain = answers(views)
    following = replace(own, outlines=FROM_IMAGE)
    redrawn = outlined(plain, (lessons.item(view).image for view in views), following)
    name = METRICS[own.task].figure
    before, after = (held_out.score(own.task, lessons, labels, views).result().get(name) for labels in (plain, redrawn))
    is_nearer = before is not None and after is not None and held_out.is_better(own.task, after, before)
    return following if is_nearer else own
