"""Files from outside, checked before anything believes them: text, images, tensors, ONNX graphs, pickles."""
