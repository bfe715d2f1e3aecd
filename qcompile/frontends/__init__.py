"""Models that another tool has quantized: one file for each tool, which knows that tool and nothing else.

The file of a tool whose models are modules has two functions: `is_quantized(model)`, which does not import the tool,
and `capture_ready(model)`, a context in which torch.export sees operators that `passes.canonicalize` knows.
"""
