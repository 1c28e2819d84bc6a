"""Engines that run exported stages: ONNX Runtime and TensorRT."""
