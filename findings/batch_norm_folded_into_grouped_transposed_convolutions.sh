#!/usr/bin/env bash
# torch folds BatchNorm into a grouped transposed convolution never, and into a square one wrongly if transpose is not said.
#
# Version: torch 2.13.0.
# torch.nn.utils.fusion.fuse_conv_bn_eval(conv, bn, transpose=True) multiplies axis 1 of the weight [in, out / groups, ...]
# by a factor for each of `out` channels. With groups the axis has out / groups elements: it raises "The size of tensor a
# must match the size of tensor b" or, for a depthwise one, gives a weight of another shape whose call raises.
# transpose is False by default, also for a ConvTranspose: where in == out the fold scales the wrong axis, without a word,
# and the results are off; where they differ it raises. Only depthwise ones come out right that way.
# What helps: scale the weight as [groups, in / groups, out / groups, ...] by the factor as [groups, 1, out / groups].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval


def pair(inputs, outputs, groups):
    torch.manual_seed(0)
    conv, norm = torch.nn.ConvTranspose2d(inputs, outputs, 3, groups=groups), torch.nn.BatchNorm2d(outputs)
    with torch.no_grad():
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    return conv.eval(), norm.eval()


def by_hand(conv, norm):
    """The fold with the axes of the groups told apart."""
    folded, factor = copy.deepcopy(conv), norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = conv.weight.unflatten(0, (conv.groups, -1)) * factor.reshape(conv.groups, 1, -1, 1, 1)
    folded.weight = torch.nn.Parameter(weight.flatten(0, 1))
    folded.bias = torch.nn.Parameter((conv.bias - norm.running_mean) * factor + norm.bias)
    return folded


@torch.no_grad()
def outcome(conv, norm, fold):
    x = torch.randn(1, conv.in_channels, 5, 5)
    try:
        error = (fold(conv, norm)(x) - norm(conv(x))).abs().max()
    except RuntimeError as raised:
        return f"raises: {str(raised)[:60]}"
    return "right" if error < 1e-4 else f"off by {error:.2f}"


folds = {
    "transpose=True": lambda conv, norm: fuse_conv_bn_eval(conv, norm, transpose=True),
    "default": fuse_conv_bn_eval,
    "by hand": by_hand,
}
found = {}
for inputs, outputs, groups in ((4, 4, 1), (4, 6, 1), (4, 4, 2), (4, 6, 2), (4, 4, 4)):
    for name, fold in folds.items():
        found[inputs, outputs, groups, name] = outcome(*pair(inputs, outputs, groups), fold)
        print(f"{inputs} -> {outputs} channels, {groups} groups, {name}: {found[inputs, outputs, groups, name]}")
kinds = {key: value.split()[0].strip(":") for key, value in found.items()}
as_seen = all(kind == "right" for (*_, name), kind in kinds.items() if name == "by hand")
as_seen &= all(kinds[i, o, g, "transpose=True"] == ("right" if g == 1 else "raises") for i, o, g, _ in kinds)
as_seen &= [kinds[i, o, g, "default"] for i, o, g in ((4, 4, 1), (4, 6, 1), (4, 4, 2), (4, 4, 4))] == [
    "off", "raises", "off", "right",
]
raise SystemExit(0 if as_seen else "behaviour has changed")
PYTHON
