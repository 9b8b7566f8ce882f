"""The vision encoder as ONNX, and the engines that run it."""
