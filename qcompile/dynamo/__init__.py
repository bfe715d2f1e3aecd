"""The back end for `torch.compile(model, backend="qcompile")`.

When Dynamo compiles: backend.py (entry point), options.py -> trace.py (its graph as ATen; names.py, packed.py) ->
middle.py (the passes of export, then the lowering) -> inputs.py (weights as arguments) -> inductor.py.
When the model is called: compiled.py, which makes quantized weights again when the model's weights have changed, and
gradients.py. For the user: explain.py, and registry.py, which finds the graphs of a model.
"""
