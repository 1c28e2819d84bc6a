"""Eight-bit floats for the UNet call, with scales measured on the user's own prompts; the captured call, which is the
last, stays in fp16.

This changes results (class B), so it is asked for by name and its drift in images and labels is measured and told.
Convolutions and linear layers read E4M3 values with one scale a tensor; norms, softmax and the attention products keep
their types.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from datasetdm_fast.data import Request
from datasetdm_fast.disk import storage
from datasetdm_fast.engine.decoders.trunk import Decoder
from datasetdm_fast.engine.engines.fast import FastEngine
from datasetdm_fast.engine.loading.model import Model
from datasetdm_fast.engine.loop import prompts
from datasetdm_fast.engine.loop.recipe import make_recipe
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export.manifest import NAME, FileInfo, Manifest
from datasetdm_fast.export.onnx import to_onnx
from datasetdm_fast.export.onnx.eight_bits import GRAPH, WATCHED, layers_read, quantisable, quantised, watching
from datasetdm_fast.export.staging import alone
from datasetdm_fast.runs.agreement import gates, observe
from datasetdm_fast.runs.agreement.distances import free_running_distances
from datasetdm_fast.runs.jobs import prompt_files as texts

RECORD = "calibration.json"
BATCH = 4


def export(
    model: Model,
    decoders: Mapping[str, Decoder],
    folder: Path,
    prompts: Sequence[str],
    steps: int,
    *,
    told: Callable[[str], None] = lambda line: None,
) -> tuple[Manifest, list[dict[str, Any]]]:
    """The manifest of `folder` with a UNet call in eight bits, and its drift: one row for each measure.

    A folder that was calibrated on these very prompts already is left as it is.
    """
    _check_libraries()
    wish = {"source": to_onnx.source_digest(model, decoders), "prompts": list(prompts)}
    wish["steps"] = steps or model.defaults.steps
    with alone(folder):
        if there := _there(folder, wish):
            return there
    manifest = to_onnx.export(model, decoders, folder, precision="fp16", told=told)
    told(f"calibrating on {len(prompts)} prompts")
    with alone(folder):
        drift = _calibrate(model, decoders, folder, manifest, prompts, wish["steps"])
        record = json.dumps(wish | {"drift": drift}, indent=1).encode()
        storage.publish({folder / RECORD: record})
        manifest = _rewritten(folder, manifest)
        storage.publish({folder / NAME: manifest.to_json().encode()})
    return manifest, drift


def _check_libraries() -> None:
    for module in ("onnxruntime", "ml_dtypes"):
        try:
            __import__(module)
        except ImportError:
            raise Missing(
                f"--precision fp8: calibrating needs the module {module}",
                "Install it with: pip install 'datasetdm-fast[ort]'.",
            ) from None


def _there(folder: Path, wish: Mapping[str, Any]) -> tuple[Manifest, list[dict[str, Any]]] | None:
    try:
        manifest = Manifest.read(folder)
        if manifest.precision != "fp8":
            return None
        manifest.check_files(folder)
        record = json.loads((folder / RECORD).read_bytes())
    except (Missing, Refused, OSError, ValueError):
        return None
    return (manifest, record.pop("drift")) if {name: record.get(name) for name in wish} == dict(wish) else None


def _rewritten(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the eight-bit graph in the place of the one it was made from."""
    paths = (folder / GRAPH, folder / RECORD)
    made = {path.name: FileInfo(storage.sha256_of(path), path.stat().st_size) for path in paths}
    call = dataclasses.replace(manifest.stages["denoise"], file=GRAPH)
    return dataclasses.replace(
        manifest, precision="fp8", stages={**manifest.stages, "denoise": call}, files={**manifest.files, **made}
    )


def _calibrate(
    model: Model, decoders: Mapping[str, Decoder], folder: Path, manifest: Manifest, prompts: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    """Writes the eight-bit graph; returns how far its images and labels are from those of the graph before."""
    plain = onnx.load(str(manifest.graph(folder, "denoise")), load_external_data=False)
    layers = quantisable(plain)
    if not layers:
        raise Refused("--precision fp8: no layer of the UNet is wide enough", "Use --precision fp16.")
    watched = folder / WATCHED
    try:
        onnx.save(watching(plain, layers), str(watched))
        exact = _Through(model, decoders, watched)
        recipe = make_recipe(exact.engine, tuple(decoders), steps=steps)
        requests = [Request(k, prompt, k) for k, prompt in enumerate(prompts)]
        truth = _observed(exact, requests, recipe)
    finally:
        watched.unlink(missing_ok=True)
    largest = dict(zip(layers_read(layers), exact.largest, strict=True))
    del exact
    gc.collect()
    storage.publish({folder / GRAPH: quantised(plain, layers, largest, folder).SerializeToString(deterministic=True)})
    onnx.checker.check_model(str(folder / GRAPH))
    found = _observed(_Through(model, decoders, folder / GRAPH), requests, recipe)
    distances: dict[str, list[np.ndarray]] = {}
    for mine, right in zip(found, truth, strict=True):
        for name, values in free_running_distances(mine, right).items():
            distances.setdefault(name, []).append(values)
    joined = {name: np.concatenate(parts)[None] for name, parts in distances.items() if name != "text"}
    rows = gates.judge(joined, gates.ROUNDED, {})
    return [
        {"measure": row.measure.removeprefix("free "), "median": row.median, "p99": row.p99, "of_fp16": list(row.limit)}
        for row in rows
    ]


def _observed(through: _Through, requests: Sequence[Request], recipe) -> list:
    starts = range(0, len(requests), BATCH)
    return [observe.observe(through, requests[first : first + BATCH], recipe) for first in starts]


class _Through:
    """The fast engine in fp32 whose UNet calls without capture go through a session, which may watch activations."""

    def __init__(self, model: Model, decoders: Mapping[str, Decoder], graph: Path):
        import onnxruntime

        self.engine = FastEngine(model, decoders, dtype="fp32", device="cpu")
        self.session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
        self.largest = np.zeros(len(self.session.get_outputs()) - 1)  # of each watched activation

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def denoise(self, latents, timestep: float, context):
        given = {"latents": latents.numpy(), "timestep": np.array(timestep, np.float32), "context": context.numpy()}
        noise, *seen = self.session.run(None, given)
        self.largest = np.maximum(self.largest, [float(value) for value in seen])
        return torch.from_numpy(noise)


def table(drift: Sequence[Mapping[str, Any]]) -> str:
    """The drift for a terminal, beside what the 16-bit engines are allowed against fp32."""
    lines = [f"{'drift of fp8':22}{'median':>10}{'p99':>10}{'limits of fp16':>20}"]
    lines += [
        f"{row['measure']:22}{row['median']:10.1e}{row['p99']:10.1e}{row['of_fp16'][0]:>12.1e}{row['of_fp16'][1]:>8.1e}"
        for row in drift
    ]
    return "\n".join(lines)


def read_prompts(given: str, model: Model) -> tuple[str, ...]:
    """The prompts to calibrate on, each of a length the model takes."""
    name, text = texts.read_prompts(given)
    lines = prompts.split_prompts(text, name)
    return tuple(prompts.fit_prompt(prompt.text, model.tokenizer, f"{name} line {prompt.line}") for prompt in lines)
