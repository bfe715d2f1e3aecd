"""What is to be read off any ONNX file, by whichever tool: below the lowerings to ONNX and to engines."""
