"""External files, checked before use: text, images, tensors, ONNX graphs, pickles."""
