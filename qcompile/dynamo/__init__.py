"""The back end for `torch.compile(model, backend="qcompile")`.

backend.py (entry point) -> trace.py (Dynamo's graph as ATen) -> middle.py (the same passes as export) -> inductor.py,
and at run time compiled.py, which makes quantized weights again when the model's weights have changed.
"""
