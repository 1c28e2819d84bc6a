"""What clients send, checked before anything waits for the engine, and samples as answers hold them."""

import base64
import binascii
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from PIL import Image

from datasetdm_fast.data import Request, Sample
from datasetdm_fast.engine.labels import kind_of, label_files, number_classes
from datasetdm_fast.engine.loop.recipe import Recipe, label_tables
from datasetdm_fast.engine.pipeline import Pipeline
from datasetdm_fast.errors import Refused, nearest
from datasetdm_fast.messages import count_noun
from datasetdm_fast.service.batching import PendingImage
from datasetdm_fast.untrusted import documents, images

LABELLING = {"model": str, "prompt": str, "labels": [str], "classes": [str], "seed": int, "preview": bool}
IMAGE = {**LABELLING, "image": str}
GENERATION = {  # first what OpenAI's clients send
    **{"n": int, "size": str, "response_format": str, "user": str, "output_format": str},
    **{**LABELLING, "seeds": [int], "negative_prompt": str, "steps": int, "guidance": float, "sampler": str},
    **{"deterministic": bool, "stream": bool},
}
RECIPE = ("labels", "classes", "steps", "guidance", "sampler")  # fields that images of one batch have in common
MOST_IMAGES = 10  # of one request, as OpenAI's


@dataclass(frozen=True)
class Work:
    """The images of a request, and what their answer is made from."""

    items: list[PendingImage]
    tables: Mapping[str, Any]  # of the labels, as run.json holds them
    has_previews: bool
    is_streamed: bool = False


def read_generation(body: Mapping[str, Any], pipeline: Pipeline, most_steps: int) -> Work:
    """The images of POST /v1/images/generations."""
    _check_fields(body, GENERATION, "prompt", pipeline)
    side = pipeline.engine.model.size
    allowed = {"response_format": ["b64_json"], "output_format": ["png"], "size": ["auto", f"{side}x{side}"]}
    for name, values in allowed.items():
        if body.get(name, values[0]) not in values:
            raise Refused(f"{name}: {documents.quote(body[name])} is not {' or '.join(values)}", "Leave it out.")
    number, seeds = body.get("n", len(body.get("seeds", [0]))), body.get("seeds")
    for name, value, most in (("n", number, MOST_IMAGES), ("steps", body.get("steps", 1), most_steps)):
        if not 1 <= value <= most:
            raise Refused(f"{name}: {value} is not within 1 .. {most}", "Choose another number.")
    if seeds is None:
        first = body.get("seed", secrets.randbelow(2**31))
        seeds = [first + k for k in range(number)]
    elif "seed" in body or len(seeds) != number:
        sent = "both they and seed were" if "seed" in body else len(seeds)
        raise Refused(f"seeds: {sent} sent for {count_noun(number, 'image')}", "Send one per image, and no seed.")
    recipe, requests = pipeline.prepare(
        [body["prompt"]] * number,
        seeds,
        negative_prompt=body.get("negative_prompt", ""),
        tasks=body.get("labels"),
        **{name: body[name] for name in RECIPE if name in body and name != "labels"},
    )
    group, is_alone = json.dumps([body.get(name) for name in RECIPE]), body.get("deterministic", False)
    items = [PendingImage(recipe, request, group, is_alone) for request in requests]
    return Work(items, _tables(pipeline, recipe), body.get("preview", False), body.get("stream", False))


def read_labelling(body: Mapping[str, Any], pipeline: Pipeline) -> Work:
    """The picture of POST /v1/label."""
    _check_fields(body, IMAGE, "image", pipeline)
    try:
        picture = images.decode_image(base64.b64decode(body["image"], validate=True), "image")
    except binascii.Error as error:
        raise Refused(f"image: not base64 ({error})", "Send the bytes of a PNG or JPEG in base64.") from error
    choices = {"tasks": body.get("labels"), "classes": body.get("classes", ())}
    recipe, _ = pipeline.prepare([], [], **choices)
    seed = body.get("seed", 0)
    label = partial(_label, pipeline, picture, prompts=body.get("prompt", ""), seed=seed, **choices)
    item = PendingImage(recipe, Request(0, "", 0), "", True, label)
    return Work([item], _tables(pipeline, recipe), body.get("preview", False))


def _label(pipeline: Pipeline, picture: Image.Image, **choices: Any) -> Any:
    return pipeline.label(picture, **choices).samples[0]


def _tables(pipeline: Pipeline, recipe: Recipe) -> Mapping[str, Any]:
    return number_classes(label_tables(pipeline.engine, recipe))["labels"]


def _check_fields(body: Any, form: Mapping[str, Any], required: str, pipeline: Pipeline) -> None:
    documents.check_form(body, {required: form[required]}, "")
    for name, value in body.items():
        if name not in form:
            raise Refused(f"{documents.quote(name)} is no field of this request{nearest(name, form)}", "Leave it out.")
        documents.check_form(value, form[name], name)
    if body.get("model", (served := pipeline.engine.model.name)) != served:
        raise Refused(f"model: {documents.quote(body['model'])} is not served, {served!r} is", "Leave it out.")


def encode_sample(sample: Sample, tables: Mapping[str, Any], has_previews: bool) -> dict[str, Any]:
    """The image as OpenAI's clients read it, and each label with the bytes and records of a run folder."""
    files, records = label_files.encode(sample, "png", tables)
    request = sample.request
    labels: dict[str, Any] = {}
    answer = {"b64_json": _base64(files["image"][1]), "seed": request.seed, "prompt": request.prompt, "labels": labels}
    if sample.trust is not None:
        answer["doubts"] = list(sample.trust.reasons)
    for task, record in records.items():
        kind, table = kind_of(task), tables[task]
        label: dict[str, Any] = {"files": {role: _base64(files[role][1]) for role in kind.roles}}
        labels[task] = label
        if kind.coco_file:
            label["coco"] = _coco(sample, record, kind.categories(table))
        else:
            label |= {"classes": {str(number): name for number, name in kind.names(table).items()}, "record": record}
        if has_previews:
            picture = kind.picture(sample.annotations[task], sample.image)
            label["preview"] = _base64(label_files.encode_picture(picture, "PNG"))
    return answer


def _coco(sample: Sample, record: list[dict[str, Any]], categories: list[dict[str, Any]]) -> dict[str, Any]:
    """A file in COCO's form of this image alone."""
    height, width, _ = sample.image.shape
    fields = {"image_id": 1, "iscrowd": 0, "category_id": categories[0]["id"] if categories else 0}  # a person has none
    annotations = [{"id": number, **fields, **each} for number, each in enumerate(record, 1)]
    image = {"id": 1, "width": width, "height": height, "file_name": f"{sample.request.id}.png"}
    return {"images": [image], "annotations": annotations, "categories": categories}


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
