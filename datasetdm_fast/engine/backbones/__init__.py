"""Families of diffusion models, one record and one file each."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasetdm_fast.disk import storage
from datasetdm_fast.engine.backbones.record import ANOTHER, Backbone, BackboneReference
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.plugins import Registry, load_place
from datasetdm_fast.stages import LEVELS, Level
from datasetdm_fast.untrusted import documents

_SD = "datasetdm_fast.engine.backbones.sd:SD"
_SDXL = "datasetdm_fast.engine.backbones.sdxl:SDXL"
_SD3 = "datasetdm_fast.engine.backbones.sd3:SD3"
_FLUX1 = "datasetdm_fast.engine.backbones.flux1:FLUX1"
_FLUX2 = "datasetdm_fast.engine.backbones.flux2_klein:FLUX2_KLEIN"
_Z_IMAGE = "datasetdm_fast.engine.backbones.z_image:Z_IMAGE"
OWN_PIPELINES = {  # diffusers' pipeline class, as model_index.json names it -> module:record
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusion3Pipeline": _SD3,
    "FluxPipeline": _FLUX1,
    "Flux2KleinPipeline": _FLUX2,
    "ZImagePipeline": _Z_IMAGE,
    "QwenImagePipeline": "datasetdm_fast.engine.backbones.qwen_image:QWEN_IMAGE",
}
RANDOM_MODELS = {  # preset of full size with random weights -> module:record
    "random-sd14": _SD,
    "random-sdxl": _SDXL,
    "random-sd35": _SD3,
    "random-flux": _FLUX1,
    "random-klein": _FLUX2,
    "random-zimage": _Z_IMAGE,
}
OWN_MODELS = ("demo", "demo-dit", "tiny", *RANDOM_MODELS)
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PIPELINES = Registry("backbones", OWN_PIPELINES, Backbone)


def every_backbone() -> list[Backbone]:
    """The records of all families of this package."""
    return [load_place(place) for place in dict.fromkeys(OWN_PIPELINES.values())]


def pipeline_of(backbone: Backbone) -> str:
    """The class of diffusers' pipeline that a record of this package is of."""
    return next(name for name, place in OWN_PIPELINES.items() if load_place(place) is backbone)


def list_supported() -> str:
    """What can be loaded, as the end of a sentence."""
    titles = [backbone.title for backbone in every_backbone()]
    return f"supported are text-to-image models of {', '.join(titles)}, as diffusers folders or single files"


def check_source(name: str, allow_download: bool) -> None:
    """Refuses a model that is neither one of this package's nor a path that is there, nor may be downloaded."""
    path = Path(name)
    if name in OWN_MODELS or path.is_dir() or path.is_file():
        return
    alike = nearest(name, OWN_MODELS) or storage.named_alike(path)
    if not HUB_NAME.fullmatch(name):
        raise Refused(
            f"model: {name!r} is neither one of {', '.join(OWN_MODELS)} nor an existing folder or file{alike}",
            list_supported(),
        )
    if not allow_download:
        raise Refused(
            f"model: {name!r} is not a folder here{alike}, and as a name on the hub it would have to be downloaded",
            "Add --allow-download, or give a local folder.",
        )


def open_backbone(pipeline: object, source: object) -> Backbone:
    """The record of the family of a pipeline of diffusers."""
    if not isinstance(pipeline, str):  # a list names a file of the folder and a class in it
        raise Refused(
            f"model: {source}: its pipeline is code of its own, {documents.quote(pipeline)}, which is not run here",
            "Take the model as its authors publish it for diffusers, or name another with --model.",
        )
    if pipeline not in PIPELINES:
        raise Refused(
            f"model: {source} holds a {pipeline}{nearest(pipeline, PIPELINES)}; {list_supported()}",
            ANOTHER,
        )
    entry: str | Backbone = PIPELINES[pipeline]
    if isinstance(entry, str):
        record: Backbone = load_place(entry)
        return record
    return PIPELINES.guard(pipeline, lambda: _check_record(pipeline, entry))


def _check_record(pipeline: str, record: Backbone) -> Backbone:
    """The record of another package with the name of that. What it refers to is there; its levels are checked when they
    are asked for, which takes the configs of a model.
    """
    reference = load_place(record.reference)
    needed = {name for name in vars(BackboneReference) if not name.startswith("_")}
    if not (record.has_averages or record.has_text_maps):
        needed.remove("predict_and_average")
    if not record.has_deep_features:
        needed -= {"predict_and_keep", "predict_from"}
    if absent := sorted(name for name in needed if not hasattr(reference, name)):
        raise TypeError(f"{record.reference} has no {', '.join(absent)}")
    for place in filter(None, (record.fast, record.network_plan, record.text_network)):
        load_place(place)

    def levels(*arguments: Any) -> tuple[Level, ...]:
        return PIPELINES.guard(pipeline, lambda: _check_levels(record.levels(*arguments)), "fails")

    return replace(record, levels=levels, package=PIPELINES.package(pipeline))


def _check_levels(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    if [level.name for level in levels if isinstance(level, Level)] != [*LEVELS]:
        raise TypeError(f"its levels are {levels!r}, expected a Level for each of {', '.join(LEVELS)}")
    return levels
