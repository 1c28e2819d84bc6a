"""Exporters that turn a model's stages into ONNX graphs and TensorRT plans."""

if __name__ != "datasetdm_fast.export":
    raise ImportError(f"{__name__!r} is a source folder, not a module of its own: import datasetdm_fast.export instead")
