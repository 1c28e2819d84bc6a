"""Eight-bit floats for the UNet call, with scales measured on the user's own prompts; the captured call, which is the last, stays in fp16.

This changes results (class B), so it is asked for by name and its drift in images and labels is measured and told. Convolutions and linear
layers read E4M3 values with one scale a tensor; norms, softmax and the attention products keep their types.
"""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from datasetdm_fast.disk import storage
from datasetdm_fast.errors import Missing, Refused
from datasetdm_fast.export import to_onnx
from datasetdm_fast.export.manifest import NAME, FileInfo, Manifest
from datasetdm_fast.export.staging import alone

if TYPE_CHECKING:
    import onnx
    import onnxruntime

    from datasetdm_fast.data import Request
    from datasetdm_fast.decoders.trunk import Decoder
    from datasetdm_fast.loading.model import Model

GRAPH = "denoise.fp8.onnx"
RECORD = "calibration.json"
WATCHED = "denoise.watched.onnx"
LARGEST = 448.0  # of E4M3
LEAST_SCALE = 2.0**-14  # the smallest normal fp16
ZERO = "fp8.zero"
NARROWEST = 16  # channels of a layer that is worth it; also leaves the first and last convolution as they are
LAYERS = {"Conv": 1, "MatMul": 1}  # kind of node -> place of its weight
OPSET, IR = 21, 10  # the first with eight-bit floats of fp16 scale in every reader
BATCH = 4


def export(
    model: Model, decoders: Mapping[str, Decoder], folder: Path, prompts: Sequence[str], steps: int, *, told: Callable[[str], None] = lambda line: None
) -> tuple[Manifest, list[dict[str, Any]]]:
    """The manifest of `folder` with a UNet call in eight bits, and its drift: one row for each measure.

    A folder that was calibrated on these very prompts already is left as it is.
    """
    _check_libraries()
    wish = {"source": to_onnx.source_digest(model, decoders), "prompts": list(prompts), "steps": steps or model.defaults.steps}
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
            raise Missing(f"--precision fp8: calibrating needs the module {module}", "Install it with: pip install 'datasetdm-fast[ort]'.") from None


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
    made = {name: FileInfo(storage.sha256_of(folder / name), (folder / name).stat().st_size) for name in (GRAPH, RECORD)}
    call = dataclasses.replace(manifest.stages["denoise"], file=GRAPH)
    return dataclasses.replace(manifest, precision="fp8", stages={**manifest.stages, "denoise": call}, files={**manifest.files, **made})


def _calibrate(model: Model, decoders: Mapping[str, Decoder], folder: Path, manifest: Manifest, prompts: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Writes the eight-bit graph; returns how far its images and labels are from those of the graph it was made from."""
    import onnx

    from datasetdm_fast import agreement, job
    from datasetdm_fast.data import Request

    plain = onnx.load(str(folder / manifest.stages["denoise"].file), load_external_data=False)
    layers = quantisable(plain)
    if not layers:
        raise Refused("--precision fp8: no layer of the UNet is wide enough", "Use --precision fp16.")
    watched = folder / WATCHED
    try:
        onnx.save(watching(plain, layers), str(watched))
        exact = _Through(model, decoders, _session(watched))
        recipe = job.make_recipe(exact.engine, tuple(decoders), steps=steps)
        requests = [Request(k, prompt, k) for k, prompt in enumerate(prompts)]
        truth = _observed(exact, requests, recipe)
    finally:
        watched.unlink(missing_ok=True)
    largest = dict(zip(layers_read(layers), exact.largest, strict=True))
    del exact
    gc.collect()
    storage.publish({folder / GRAPH: quantised(plain, layers, largest, folder).SerializeToString(deterministic=True)})
    onnx.checker.check_model(str(folder / GRAPH))
    found = _observed(_Through(model, decoders, _session(folder / GRAPH)), requests, recipe)
    distances: dict[str, list[np.ndarray]] = {}
    for mine, right in zip(found, truth, strict=True):
        for name, values in agreement.free_distances(mine, right).items():
            distances.setdefault(name, []).append(values)
    rows = agreement.judge({name: np.concatenate(parts)[None] for name, parts in distances.items() if name != "text"}, agreement.ROUNDED, {})
    return [{"measure": row.measure.removeprefix("free "), "median": row.median, "p99": row.p99, "of_fp16": list(row.limit)} for row in rows]


def _observed(through: _Through, requests: Sequence[Request], recipe) -> list:
    from datasetdm_fast import agreement

    return [agreement.observe(through, requests[first : first + BATCH], recipe) for first in range(0, len(requests), BATCH)]


def _session(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


class _Through:
    """The fast engine in fp32, but for the calls of the UNet that are not captured: these go through a session, which may report on its activations."""

    def __init__(self, model: Model, decoders: Mapping[str, Decoder], session: onnxruntime.InferenceSession):
        from datasetdm_fast.engines.fast import FastEngine

        self.engine, self.session = FastEngine(model, decoders, dtype="fp32", device="cpu"), session
        self.largest = np.zeros(len(session.get_outputs()) - 1)  # of each watched activation

    def __getattr__(self, name: str):
        return getattr(self.engine, name)

    def denoise(self, latents, timestep: float, context):
        import torch

        given = {"latents": latents.numpy(), "timestep": np.array(timestep, np.float32), "context": context.numpy()}
        noise, *seen = self.session.run(None, given)
        self.largest = np.maximum(self.largest, [float(value) for value in seen])
        return torch.from_numpy(noise)


# Graphs ----------------------------------------------------------------------------------------------------------------------------


def quantisable(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The UNet's layers with constant fp16 weights, but for narrow ones: the first and the last convolution decide colours."""
    import onnx

    weights = {one.name: one for one in model.graph.initializer}
    found = []
    for node in model.graph.node:
        weight = weights.get(node.input[LAYERS[node.op_type]]) if node.op_type in LAYERS else None
        if weight is None or weight.data_type != onnx.TensorProto.FLOAT16 or not node.name.startswith("unet."):
            continue
        if len(weight.dims) >= 2 and min(weight.dims[:2]) >= NARROWEST:
            found.append(node)
    return found


def layers_read(layers: Sequence[onnx.NodeProto]) -> list[str]:
    """The activations the layers read, each once."""
    return list(dict.fromkeys(node.input[0] for node in layers))


def watching(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """The graph with the largest magnitude of each of these activations as an output of its own."""
    import onnx
    from onnx import helper

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    for place, name in enumerate(layers_read(layers)):
        watched.graph.node.extend(
            [
                helper.make_node("Abs", [name], [f"magnitude.{place}"]),
                helper.make_node("ReduceMax", [f"magnitude.{place}"], [f"narrow.{place}"], keepdims=0),
                helper.make_node("Cast", [f"narrow.{place}"], [f"largest.{place}"], to=onnx.TensorProto.FLOAT),
            ]
        )
        watched.graph.output.append(helper.make_tensor_value_info(f"largest.{place}", onnx.TensorProto.FLOAT, []))
    return watched


def quantised(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], largest: Mapping[str, float], folder: Path) -> onnx.ModelProto:
    """The graph with eight-bit weights and activations in these layers; the largest magnitude of an activation becomes the largest of E4M3."""
    return _Quantising(model, folder).result(layers, largest)


class _Quantising:
    """A copy of a graph on its way to eight bits."""

    def __init__(self, model: onnx.ModelProto, folder: Path):
        import onnx
        from onnx import helper

        self.folder, self.weights = folder, {one.name: one for one in model.graph.initializer}
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.model.ir_version = IR
        for one in self.model.opset_import:
            one.version = OPSET if one.domain in ("", "ai.onnx") else one.version
        self.graph, self.before = self.model.graph, {}  # what was narrowed -> the nodes that do it
        self.graph.initializer.append(helper.make_tensor(ZERO, onnx.TensorProto.FLOAT8E4M3FN, [], [0.0]))

    def result(self, layers: Sequence[onnx.NodeProto], largest: Mapping[str, float]) -> onnx.ModelProto:
        chosen = {node.name for node in layers}
        for node in [node for node in self.graph.node if node.name in chosen]:
            source, weight = node.input[0], node.input[LAYERS[node.op_type]]
            if source not in self.before:
                self.before[source] = self._of_activation(source, largest[source])
            if weight not in self.before:
                self.before[weight] = self._of_weight(weight)
            node.input[0], node.input[LAYERS[node.op_type]] = f"{source}.fp8", f"{weight}.fp8"
        _insert(self.graph, self.before)
        read = {name for node in self.graph.node for name in node.input}
        kept = [one for one in self.graph.initializer if one.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        return self.model

    def _of_activation(self, name: str, magnitude: float) -> list[onnx.NodeProto]:
        from onnx import helper

        narrow = helper.make_node("QuantizeLinear", [name, self._scale(name, magnitude), ZERO], [f"{name}.e4m3"], name=f"{name}/QuantizeLinear")
        return [narrow, self._widening(name)]

    def _of_weight(self, name: str) -> list[onnx.NodeProto]:
        import onnx
        from onnx import helper, numpy_helper

        values = self._stored(name)
        self._scale(name, float(np.abs(values).max()))
        step = numpy_helper.to_array(self.graph.initializer[-1]).astype(np.float32)
        self.graph.initializer.append(helper.make_tensor(f"{name}.e4m3", onnx.TensorProto.FLOAT8E4M3FN, values.shape, _e4m3(values / step), raw=True))
        return [self._widening(name)]

    def _widening(self, name: str) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("DequantizeLinear", [f"{name}.e4m3", f"{name}.scale", ZERO], [f"{name}.fp8"], name=f"{name}/DequantizeLinear")

    def _scale(self, name: str, magnitude: float) -> str:
        from onnx import numpy_helper

        value = np.array(max(magnitude / LARGEST, LEAST_SCALE), np.float16)
        self.graph.initializer.append(numpy_helper.from_array(value, f"{name}.scale"))
        return f"{name}.scale"

    def _stored(self, name: str) -> np.ndarray:
        """A weight in fp32, from the data file where it lies there."""
        import onnx
        from onnx import external_data_helper, numpy_helper

        tensor = onnx.TensorProto()
        tensor.CopyFrom(self.weights[name])
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
            tensor.data_location = onnx.TensorProto.DEFAULT
        return numpy_helper.to_array(tensor).astype(np.float32)


def _e4m3(values: np.ndarray) -> bytes:
    import ml_dtypes

    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).tobytes()


def _insert(graph: onnx.GraphProto, before: Mapping[str, Sequence[onnx.NodeProto]]) -> None:
    """Puts the nodes in front of the first that reads what they make, as ONNX wants its nodes in order."""
    made = {node.output[0]: name for name, nodes in before.items() for node in nodes}
    ordered, placed = [], set()
    for node in graph.node:
        for name in node.input:
            if name in made and made[name] not in placed:
                placed.add(made[name])
                ordered.extend(before[made[name]])
        ordered.append(node)
    del graph.node[:]
    graph.node.extend(ordered)


def table(drift: Sequence[Mapping[str, Any]]) -> str:
    """The drift for a terminal, beside what the 16-bit engines are allowed against fp32."""
    lines = [f"{'drift of fp8':22}{'median':>10}{'p99':>10}{'limits of fp16':>20}"]
    lines += [f"{row['measure']:22}{row['median']:10.1e}{row['p99']:10.1e}{row['of_fp16'][0]:>12.1e}{row['of_fp16'][1]:>8.1e}" for row in drift]
    return "\n".join(lines)


def read_prompts(given: str, model: Model) -> tuple[str, ...]:
    """The prompts to calibrate on, each of a length the model takes."""
    from datasetdm_fast import prompts

    name, text = prompts.read_prompts(given)
    return tuple(prompts.fit(prompt, model.tokenizer, f"{name} line {line}") for line, prompt in prompts.split_prompts(text, name))
