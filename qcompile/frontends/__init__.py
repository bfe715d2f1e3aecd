"""Models that another tool has quantized: one file for each tool, which knows that tool and nothing else.

The file of a tool has `is_quantized(model)`, which does not import the tool, and, where torch.export does not see
operators that `passes.canonicalize` knows by itself, `capture_ready(model)`, a context in which it does.
"""
