"""The ONNX back end: lowering, the verifier, execution and comparison."""
