"""Families of diffusion models, one record and one file each."""

from datasetdm_fast.engine.backbones.record import Backbone
from datasetdm_fast.plugins import load_place

PIPELINES: dict[str, str] = {  # diffusers' pipeline class, as model_index.json names it -> module:record
}


def open_backbone(pipeline: str) -> Backbone:
    """The record of the family of a pipeline, which is one of PIPELINES."""
    record: Backbone = load_place(PIPELINES[pipeline])
    return record
