"""Out of here and in from elsewhere: standalone code, ONNX, older checkpoints."""
