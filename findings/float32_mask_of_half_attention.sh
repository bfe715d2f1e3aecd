#!/usr/bin/env bash
# torch.onnx.export writes a file that no reader takes where a half model gives scaled_dot_product_attention a float32 mask.
#
# Versions: torch 2.13.0, onnxscript 0.7.2, onnx-ir 1.1.0, onnx 1.23.2, onnxruntime 1.31.1.
# On the CPU torch takes an additive float32 mask beside float16 or bfloat16 queries and gives a result of the queries'
# dtype, so that a model.half() whose mask is made by torch.zeros(...) or stays a float32 input runs and is exported.
# Up to opset 22 the exporter spells attention out and adds the mask to the scores without a cast: Add of float16 and
# float32, which onnx.checker and ONNX Runtime refuse. With opset 23 and its Attention operator the file is fine.
# What helps: mask.to(query.dtype) in the model, or opset 23 where the reader has it (TensorRT-RTX 1.7 does not fuse it).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 onnxscript==0.7.2 onnx-ir==1.1.0 onnx==1.23.2 onnxruntime==1.31.1 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import onnx
import onnxruntime
import torch


class Attention(torch.nn.Module):
    def forward(self, x, mask):
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def readers(mask_dtype, opset):
    """What onnx.checker and ONNX Runtime say of the exported file: "reads", or the end of their sentence."""
    args = torch.ones(1, 2, 4, 8, dtype=torch.float16), torch.zeros(4, 4, dtype=mask_dtype)
    assert Attention()(*args).dtype is torch.float16
    exported = torch.onnx.export(Attention(), args, dynamo=True, opset_version=opset, verbose=False).model_proto
    said = []
    for read in (
        lambda: onnx.checker.check_model(exported, full_check=True),
        lambda: onnxruntime.InferenceSession(exported.SerializeToString()),
    ):
        try:
            read()
            said.append("reads")
        except Exception as error:
            said.append("types of Add" if "Add" in str(error) and "type" in str(error).lower() else str(error))
    return said


found = {(str(dtype), opset): readers(dtype, opset) for dtype in (torch.float32, torch.float16) for opset in (18, 21, 23)}
for (dtype, opset), said in found.items():
    print(f"mask {dtype}, opset {opset}: onnx.checker {said[0]}, ONNX Runtime {said[1]}")
refused = {key for key, said in found.items() if said == ["types of Add"] * 2}
read = {key for key, said in found.items() if said == ["reads"] * 2}
as_seen = refused == {("torch.float32", 18), ("torch.float32", 21)} and len(read) == 4
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
