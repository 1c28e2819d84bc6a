"""Settings of the commands that put samples through the network again, in groups."""

from dataclasses import dataclass
from typing import Any

from datasetdm_fast.engine.loop.recipe import LARGEST_BATCH, LARGEST_GUIDANCE
from datasetdm_fast.settings import CommandSettings, EngineSettings, OutputSettings, setting

OF_EDIT = "run ids prompt alone class_ instance mask box grow feather strength seed only number".split()
SHARED = (
    "steps guidance batch_size out limit kept dry_run engine dtype device model decoder allow_download threads compile "
    "provider streams json quiet"
).split()


def strength_setting(default: float, remark: str) -> Any:
    help = f"share of the sampling steps that is repeated, 0 to 1{remark}"
    return setting(default, help, metavar="S", least=0, most=1)


@dataclass(frozen=True)
class RedrawSettings(EngineSettings, OutputSettings, CommandSettings):
    """Settings that edit and vary share; zeros stand for what the source was made with."""

    run: str = setting(
        "", "run folder whose samples are taken", identity=False, metavar="RUN", positional=True, required=True
    )
    out: str = setting("", "run folder", identity=False, metavar="RUN", output="folder")
    ids: tuple[str, ...] = setting(
        (), "ids of samples to take, such as 00000003; default: all", metavar="ID", positional=True, identity=False
    )
    kept: bool = setting(False, "use only the samples that filter keeps", identity=False)
    only: tuple[str, ...] = setting((), "take only these samples of RUN", metavar="LIST")
    number: int = setting(0, "take the first N samples, 0 = all", identity="if given", metavar="N", least=0)
    strength: float = strength_setting(1.0, "")
    steps: int = setting(0, "sampling steps of a whole image, 0 = those of RUN", metavar="N", least=0)
    guidance: float = setting(0.0, "guidance scale, 0 = that of RUN", metavar="G", least=0, most=LARGEST_GUIDANCE)
    batch_size: int = setting(
        0, "images per batch (rounding only); 0 = as many as fit into memory", metavar="N", least=0, most=LARGEST_BATCH
    )
    model: str = setting("", "current path of RUN's model, if it was moved", identity=False, metavar="MODEL")
    decoder: str = setting("", "current path of RUN's decoders, if they were moved", identity=False, metavar="DIR")
    allow_download: bool = setting(False, "allow the model to come from the model hub, if RUN's did", identity=False)
    limit: int = setting(0, "stop after N new images; the same command resumes", identity=False, metavar="N", least=0)


@dataclass(frozen=True)
class VarySettings(RedrawSettings):
    """The variants of a sample."""

    FLAGS = ["run", "ids", "domain", "number", "strength", "only", *SHARED]

    domain: tuple[str, ...] = setting(
        (), "domains, comma-separated; one image per sample and domain: night,fog", metavar="LIST", required=True
    )
    strength: float = strength_setting(0.4, ": a larger share changes more")
    out: str = setting("runs/varied", "run folder", identity=False, metavar="RUN", output="folder")


@dataclass(frozen=True)
class EditSettings(RedrawSettings):
    """The region of a sample that is made again, and what is drawn there."""

    FLAGS = [*OF_EDIT, *SHARED]

    prompt: str = setting(
        "", "what to draw; it replaces the class in the sample's own prompt", metavar="TEXT", required=True
    )
    alone: bool = setting(False, "give the model only --prompt, as when no class is named")
    class_: str = setting("", "regenerate the pixels of this class", metavar="CLASS")
    instance: int = setting(0, "regenerate this instance: the id of its annotation in instances.json", metavar="ID")
    mask: str = setting("", "regenerate the white area of this picture, which has the size of a sample", metavar="FILE")
    box: str = setting("", "regenerate this box of pixels; X1 and Y1 are not part of it", metavar="X0,Y0,X1,Y1")
    grow: int = setting(0, "pixels by which the region is grown on all sides", metavar="N")
    feather: int = setting(
        -1, "pixels inside the region over which old and new image blend, -1 = a 128th of a side", metavar="N"
    )
    strength: float = strength_setting(1.0, ": 1 starts from pure noise")
    seed: int = setting(-1, "seed of the noise of image 0; image k has seed + k; -1 = that of its source", metavar="N")
    out: str = setting("runs/edited", "run folder", identity=False, metavar="RUN", output="folder")
