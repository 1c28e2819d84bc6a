"""8-bit forms of exported products and convolutions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, external_data_helper, helper, numpy_helper

GRAPH = "denoise.fp8.onnx"
WATCHED = "denoise.watched.onnx"
LARGEST_E4M3 = 448.0  # of E4M3
LEAST_SCALE = 2.0**-14  # the smallest normal fp16
ZERO = "fp8.zero"
NARROWEST = 16  # channels of a layer that is worth it; also leaves the first and last convolution as they are
LAYERS = {"Conv": 1, "MatMul": 1}  # kind of node -> place of its weight
OPSET, IR = 21, 10  # the first with eight-bit floats of fp16 scale in every reader


# Graphs ---------------------------------------------------------------------------------------------------------------
def quantisable(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The UNet's layers with constant fp16 weights, without the narrow first and last ones, which decide colours."""
    weights = {one.name: one for one in model.graph.initializer}
    found = []
    for node in model.graph.node:
        weight = weights.get(node.input[LAYERS[node.op_type]]) if node.op_type in LAYERS else None
        if weight is None or weight.data_type != TensorProto.FLOAT16 or not node.name.startswith("unet."):
            continue
        if len(weight.dims) >= 2 and min(weight.dims[:2]) >= NARROWEST:
            found.append(node)
    return found


def layers_read(layers: Sequence[onnx.NodeProto]) -> list[str]:
    """The activations the layers read, each once."""
    return list(dict.fromkeys(node.input[0] for node in layers))


def watching(model: onnx.ModelProto, layers: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """The graph with the largest magnitude of each of these activations as an output of its own."""
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    for place, name in enumerate(layers_read(layers)):
        magnitude, narrow, largest = ([f"{kind}.{place}"] for kind in ("magnitude", "narrow", "largest"))
        watched.graph.node.append(helper.make_node("Abs", [name], magnitude))
        watched.graph.node.append(helper.make_node("ReduceMax", magnitude, narrow, keepdims=0))
        watched.graph.node.append(helper.make_node("Cast", narrow, largest, to=TensorProto.FLOAT))
        watched.graph.output.append(helper.make_tensor_value_info(f"largest.{place}", TensorProto.FLOAT, []))
    return watched


def quantised(
    model: onnx.ModelProto, layers: Sequence[onnx.NodeProto], largest: Mapping[str, float], folder: Path
) -> onnx.ModelProto:
    """The graph with eight-bit weights and activations in these layers; the largest one becomes E4M3's largest."""
    return _Quantising(model, folder).result(layers, largest)


class _Quantising:
    """A copy of a graph on its way to eight bits."""

    def __init__(self, model: onnx.ModelProto, folder: Path):
        self.folder, self.weights = folder, {one.name: one for one in model.graph.initializer}
        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        self.model.ir_version = IR
        for one in self.model.opset_import:
            one.version = OPSET if one.domain in ("", "ai.onnx") else one.version
        self.graph, self.before = self.model.graph, {}  # what was narrowed -> the nodes that do it
        self.graph.initializer.append(helper.make_tensor(ZERO, TensorProto.FLOAT8E4M3FN, [], [0.0]))

    def result(self, layers: Sequence[onnx.NodeProto], largest: Mapping[str, float]) -> onnx.ModelProto:
        chosen = {node.name for node in layers}
        for node in [node for node in self.graph.node if node.name in chosen]:
            source, weight = node.input[0], node.input[LAYERS[node.op_type]]
            if source not in self.before:
                self._scale(source, largest[source])
                self.before[source] = [self._node("QuantizeLinear", source, "", ".e4m3"), self._widening(source)]
            if weight not in self.before:
                self._narrow(weight)
                self.before[weight] = [self._widening(weight)]
            node.input[0], node.input[LAYERS[node.op_type]] = f"{source}.fp8", f"{weight}.fp8"
        _insert(self.graph, self.before)
        read = {name for node in self.graph.node for name in node.input}
        kept = [one for one in self.graph.initializer if one.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        return self.model

    def _node(self, kind: str, name: str, read: str, made: str) -> onnx.NodeProto:
        return helper.make_node(kind, [name + read, f"{name}.scale", ZERO], [name + made], name=f"{name}/{kind}")

    def _widening(self, name: str) -> onnx.NodeProto:
        return self._node("DequantizeLinear", name, ".e4m3", ".fp8")

    def _narrow(self, name: str) -> None:
        """Stores a weight in eight bits beside its scale."""
        values = self._stored(name)
        steps = _e4m3(values / self._scale(name, float(np.abs(values).max())))
        narrow = helper.make_tensor(f"{name}.e4m3", TensorProto.FLOAT8E4M3FN, values.shape, steps, raw=True)
        self.graph.initializer.append(narrow)

    def _scale(self, name: str, magnitude: float) -> np.float32:
        value = np.array(max(magnitude / LARGEST_E4M3, LEAST_SCALE), np.float16)
        self.graph.initializer.append(numpy_helper.from_array(value, f"{name}.scale"))
        return value.astype(np.float32)

    def _stored(self, name: str) -> np.ndarray:
        """A weight in fp32, from the data file where it lies there."""
        tensor = TensorProto()
        tensor.CopyFrom(self.weights[name])
        if tensor.data_location == TensorProto.EXTERNAL:
            external_data_helper.load_external_data_for_tensor(tensor, str(self.folder))
            tensor.data_location = TensorProto.DEFAULT
        return numpy_helper.to_array(tensor).astype(np.float32)


def _e4m3(values: np.ndarray) -> bytes:
    import ml_dtypes

    return np.clip(values, -LARGEST_E4M3, LARGEST_E4M3).astype(ml_dtypes.float8_e4m3fn).tobytes()


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
