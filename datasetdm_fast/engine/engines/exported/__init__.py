"""Engines that run exported stages: ONNX Runtime, OpenVINO and TensorRT."""

import sys

# `import openvino` tells its maker about it over the network, unless this library cannot be imported
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
