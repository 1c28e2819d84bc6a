"""Home of the exporters that turn an engine's stages into ONNX graphs and TensorRT plans; none is written yet, so importing it gives no names."""

if __name__ != "datasetdm_fast.export":
    raise ImportError(f"{__name__!r} is a source folder, not a module of its own: import datasetdm_fast.export instead")
