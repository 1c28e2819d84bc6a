"""Settings of the command convert, in groups."""

from dataclasses import dataclass

from datasetdm_fast.config import EXPORT_FORMATS, LABELS
from datasetdm_fast.settings import CommandSettings, OutputSettings, setting

LEAST_QUALITY, BEST_QUALITY = 75, 100
OTHER_NAMES = {  # of formats, as their libraries call themselves
    "webdataset": "wds",
    "huggingface": "hf",
    "imagefolder": "hf",
    "datasets": "hf-parquet",
    "parquet": "hf-parquet",
    "pascal": "voc",
    "mmsegmentation": "mmseg",
    "mmpose": "coco",
    "mask2former": "coco",
    "depthformer": "nyu",
    "labelstudio": "label-studio",
}


@dataclass(frozen=True)
class PictureSettings:
    """What is exported of a sample, and its image file."""

    least_score: float = setting(
        0.0, "leave out instances and people with a lower score, 0 to 1", metavar="X", least=0, most=1
    )
    image_format: str = setting(
        "same", "image files; same: as the run has them, where the format allows it", choices=("same", "png", "jpg")
    )
    quality: int = setting(
        95,
        f"quality of JPEG files, {LEAST_QUALITY} to {BEST_QUALITY}",
        metavar="N",
        least=LEAST_QUALITY,
        most=BEST_QUALITY,
    )


@dataclass(frozen=True)
class LayoutSettings:
    """Choices that single formats leave open."""

    polygons: bool = setting(
        False, "coco and lvis: polygons instead of run lengths; coco keeps these for instances with holes"
    )
    parts: str = setting(
        "joined", "yolo-seg: a line for each instance, parts joined, or for each part", choices=("joined", "split")
    )
    border: int = setting(
        0, "voc: pixels of the border of 255 around each object, 5 in the original", metavar="N", least=0, most=64
    )
    shard: int = setting(1000, "wds and hf-parquet: samples per file", metavar="N", least=1, most=2**31)


@dataclass(frozen=True)
class ExportSettings(PictureSettings, LayoutSettings, OutputSettings, CommandSettings):
    FLAGS = (
        "run to out task classes where kept part least_score image_format quality polygons parts border shard copy "
        "push_to_hub dry_run threads json quiet"
    ).split()

    run: str = setting(
        "", "run folder whose samples are written", metavar="RUN", positional=True, identity=False, required=True
    )
    to: tuple[str, ...] = setting(
        (),
        f"formats, comma-separated: {', '.join(EXPORT_FORMATS.names)}",
        choices=EXPORT_FORMATS.names,
        metavar="LIST",
        required=True,
        other_names=OTHER_NAMES,
    )
    out: str = setting(
        "", "folder or URL of the export; default: exports in RUN", metavar="DIR", output="place", identity=False
    )
    task: tuple[str, ...] = setting(
        (), "labels to take where RUN has several of a kind: TASK:NAME", choices=LABELS, has_names=True, metavar="LIST"
    )
    classes: tuple[str, ...] = setting(
        (), "other names for classes, as old=new; old= leaves a class out", metavar="LIST"
    )
    part: str = setting(
        "", "take only the k-th of n parts of the samples, so that n machines write n exports", metavar="K/N"
    )
    where: str = setting(
        "", "take the samples for which this holds, such as 'score>=0.6 and duplicate==0'", metavar="CONDITION"
    )
    kept: bool = setting(False, "take only the samples that filter keeps")
    copy: bool = setting(False, "copy files that need no change, instead of linking to them", identity=False)
    push_to_hub: str = setting(
        "", "upload the export to this data set of the Hugging Face Hub, OWNER/NAME", metavar="REPO", identity=False
    )
    threads: int = setting(
        0, "samples worked on at once, 0 = all cores", metavar="N", identity=False, least=0, most=1024
    )
