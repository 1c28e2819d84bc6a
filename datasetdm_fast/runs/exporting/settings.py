"""Settings of the command convert."""

from dataclasses import dataclass
from typing import Any

from datasetdm_fast.config import EXPORT_FORMATS, LABELS
from datasetdm_fast.errors import Refused
from datasetdm_fast.settings import CommandSettings, dry_run_setting, json_values, setting

PARTS = ("joined", "split")
LEAST_QUALITY, BEST_QUALITY = 75, 100


@dataclass(frozen=True)
class ExportSettings(CommandSettings):
    FLAGS = (
        "runs to out task classes where kept least_score image_format quality resize polygons parts border shard copy "
        "dry_run threads json quiet"
    ).split()

    runs: tuple[str, ...] = setting(
        (), "run folders, whose samples are numbered in this order", metavar="RUN", positional=True, identity=False
    )
    to: tuple[str, ...] = setting(
        (), f"formats, comma-separated: {', '.join(EXPORT_FORMATS.names)}", choices=EXPORT_FORMATS.names, metavar="LIST"
    )
    out: str = setting(
        "",
        "folder of the export, with a sub-folder for each format; default: exports in RUN, for a single RUN",
        metavar="DIR",
        output="folder",
        identity=False,
    )
    task: tuple[str, ...] = setting(
        (),
        "labels to take, where RUN has several of a kind: TASK or TASK:NAME; default: the first of each kind",
        choices=LABELS,
        has_names=True,
        metavar="LIST",
    )
    classes: tuple[str, ...] = setting(
        (), "other names for classes, as old=new; old= leaves a class out", metavar="LIST"
    )
    where: str = setting(
        "", "take the samples for which this holds, such as 'score>=0.6 and duplicate==0'", metavar="CONDITION"
    )
    kept: bool = setting(False, "take only the samples that filter keeps")
    least_score: float = setting(0.0, "leave out instances and people with a lower score, 0 to 1", metavar="X")
    image_format: str = setting(
        "same", "image files; same: as the run has them, where the format allows it", choices=("same", "png", "jpg")
    )
    quality: int = setting(95, f"quality of JPEG files, {LEAST_QUALITY} to {BEST_QUALITY}", metavar="N")
    resize: int = setting(0, "pixels of the longer side of the images, 0 = as they are", metavar="N")
    polygons: bool = setting(
        False, "coco and lvis: polygons instead of run lengths; coco keeps these for instances with holes"
    )
    parts: str = setting(
        "joined",
        "yolo-seg: one line per instance, whose parts are joined by lines of zero width, or one line per part",
        choices=PARTS,
    )
    border: int = setting(0, "voc: pixels of the border of 255 around each object, 5 in the original", metavar="N")
    shard: int = setting(1000, "wds and hf-parquet: samples per file", metavar="N")
    copy: bool = setting(False, "copy files that need no change, instead of linking to them", identity=False)
    dry_run: bool = dry_run_setting()
    threads: int = setting(0, "samples worked on at once, 0 = all cores", metavar="N", identity=False)
    json: bool = setting(False, "machine-readable result on stdout", identity=False)
    quiet: bool = setting(False, "show no progress", identity=False)

    def check(self) -> None:
        """Refuses what cannot be."""
        for name, least, most in (
            ("quality", LEAST_QUALITY, BEST_QUALITY),
            ("border", 0, 64),
            ("shard", 1, 2**31),
            ("threads", 0, 1024),
            ("least_score", 0, 1),
        ):
            if not least <= (value := getattr(self, name)) <= most:
                flag = "--" + name.replace("_", "-")
                raise Refused(f"{flag} {value:g}: expected {least} to {most}", "Choose another number.")
        if self.resize and not 16 <= self.resize <= 4096:
            raise Refused(f"--resize {self.resize}: expected 16 to 4096, or 0", "Choose another number.")

    def described(self) -> dict[str, Any]:
        """The settings that decide the bytes, as an export keeps them."""
        return json_values(self.identity())
