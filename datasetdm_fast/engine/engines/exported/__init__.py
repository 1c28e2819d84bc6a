"""Engines that run exported stages: ONNX Runtime, OpenVINO and TensorRT."""
