"""The command export: its flags, calibration for fp8, and building, listing and deleting TensorRT plans."""
