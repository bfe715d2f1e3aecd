"""The verifier's checks, one small function each; `qcompile.onnx.verify.CHECKS` puts them in order."""
