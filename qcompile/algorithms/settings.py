"""What a step of calibration can say in a recipe.

Algorithms import torch, and reading a recipe takes no such time: so the settings of those that shipped recipes can name
are here. Those of another one may stand beside it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qcompile.schemes.strict import Strict


class Settings(Strict):
    """What every step of calibration can say. An algorithm names itself in `algorithm`, and adds its own."""

    algorithm: str
    """How scales are chosen."""
    power_of_two: bool = False
    """Round every constant scale up to a power of two: division by it is then exact, so that all runtimes make the same
    codes in any precision, at the price of up to one bit of range. Scales of blocks stay what their blocks measure."""


class MaxSettings(Settings):
    """`max`: the largest magnitude, of weights and of what calibration data shows."""

    algorithm: Literal["max"] = "max"
    """`max`: the largest magnitude seen in the calibration data."""


class SearchSettings(Settings):
    """What a search for scales can be told."""

    smallest: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=False)] = 0.5
    """The least scale of a weight that is tried, as a part of that of `max`: what is larger then saturates."""
    largest: Annotated[float, Field(ge=1, le=4, allow_inf_nan=False, strict=False)] = 1.75
    """The largest scale of a weight that is tried: a block whose largest number becomes 4 and not 6 may lose less."""
    candidates: Annotated[int, Field(ge=2, le=1000)] = 32
    """How many scales of a weight are tried, beside that of `max`. The scales of nvfp4's blocks are e4m3 numbers, of
    which all in the range are."""


class MseSettings(SearchSettings):
    """`mse`: scales by the squared error of what they round."""

    algorithm: Literal["mse"]
    """`mse`: the scale with the least squared error, of each weight by its numbers, of activations with a constant
    scale by a histogram of the calibration data. Weights need no data."""
    smallest_range: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False, strict=False)] = 0.05
    """The least range of an activation that is tried, as a part of the largest magnitude that was seen; 1 leaves them
    to `max`. Four times as many `candidates` are tried as for a weight."""


class HessianMseSettings(SearchSettings):
    """`hessian_mse`: scales by the squared error of what they round, weighed by the inputs."""

    algorithm: Literal["hessian_mse"]
    """`hessian_mse`: the scale of a weight whose rounding changes the layer's results least, as far as the second
    moment of its inputs tells that, in blocks of 16. Ranges of activations stay those of `max`."""
    sequential: bool = False
    """Solve the blocks that the model repeats one after another, each with inputs as quantized ones before it give
    them: data is walked once for each block, half the model on average."""


Scales = Literal["max", "mse", "hessian_mse"]


class GptqSettings(Settings):
    """`gptq`: weights are rounded a column at a time, and what is left makes up for the error."""

    algorithm: Literal["gptq"]
    """`gptq`: codes of weights, rounded a column at a time, so that the columns that are left make up for the error as
    far as the second moment of the layer's inputs tells (Frantar et al. 2022). Ranges of activations stay those of
    `max`."""
    scales: Scales = "hessian_mse"
    """How the scales that weights are rounded with are found."""
    damping: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)] = 0.01
    """What is added to the diagonal of the second moment, as a part of its mean: the more, the nearer the codes are to
    those next to the weight. Ten times as much is added where that is singular."""
    order: Literal["block", "activation", "none"] = "block"
    """Which columns are rounded first: those with the largest inputs (`activation`), whole blocks of columns with the
    largest inputs (`block`; the same where blocks along a row have no scales of their own), or from left to right. But
    with `activation` the scales of such blocks are found when the first of their columns is rounded."""
    block: Annotated[int, Field(ge=1, le=8192)] = 128
    """How many columns are rounded before their errors are added to all others. It does not change what is computed,
    only how fast."""
    double: bool = False
    """Compute in float64: twice the time and memory, and in general the same codes but for a few in a million."""
    sequential: bool = False
    """Solve the blocks that the model repeats one after another, each with inputs as quantized ones before it give
    them: data is walked once for each block, half the model on average."""
    memory: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=False)] = 4e9
    """How many bytes second moments may take, 16 for each pair of features of a tensor that layers read. Where all of
    them take more, weights are solved in parts, and data is walked once for each: the codes are the same. Those of one
    tensor are kept whatever they take."""
    without_data: Literal["error", "mse"] = "error"
    """What to do where there is no calibration data, as in a directory of weights or a model with given ranges:
    refuse, or round weights to the nearest with scales as `mse` finds them, which a notice says."""


class PercentileSettings(Settings):
    """`percentile`: ranges of activations without the largest few numbers."""

    algorithm: Literal["percentile"]
    """`percentile`: the range of an activation with a constant scale ends where so many percent of the magnitudes that
    calibration shows are below; the rest saturates. Weights are left to other steps. Where outliers carry meaning, as
    in transformers, it is worse than `max`: measure."""
    percentile: Annotated[float, Field(gt=50, le=100, allow_inf_nan=False, strict=False)] = 99.99
    """How many percent."""


class SmoothingSettings(Settings):
    """What `smoothquant` and `awq` can say."""

    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=False)] | None = None
    """The exponent of how large a channel gets, the same for all layers; without it one is searched for each group of
    layers that read one tensor, by the error of their outputs, and a group that none helps stays as it is."""
    steps: Annotated[int, Field(ge=1, le=100)] = 20
    """How fine exponents from 0 to 1 are told apart: 20 is to .05. Every fourth is tried, then those near the best."""
    rows: Annotated[int, Field(ge=1, le=1 << 16)] = 256
    """How many rows (tokens) of the calibration data exponents are judged on. They stay in memory, for every group."""
    multiply: bool = True
    """Whether a factor that no norm and no layer can take may stay in the model as a multiplication, which checkpoints
    cannot hold. Without it such a group is left alone."""
    without_data: Literal["error", "skip"] = "error"
    """What to do where there is no calibration data, as in a directory of weights or a model with given ranges:
    refuse, or leave this step out, which a notice says."""


class SmoothQuantSettings(SmoothingSettings):
    """`smoothquant`: channels of activations and columns of weights meet in between."""

    algorithm: Literal["smoothquant"]
    """`smoothquant`: divide each channel of a linear layer's input by max|x|^alpha / max|w|^(1 - alpha), and multiply
    the column of the weight by it. Scales are left to the step behind it, or to `max`."""


class AwqSettings(SmoothingSettings):
    """`awq`: columns of weights by how large the activations are that they meet."""

    algorithm: Literal["awq"]
    """`awq`: multiply each column of a linear layer's weight by the mean magnitude of its channel of the input, to the
    power of alpha, and divide the channel by it. Scales are left to the step behind it, or to `max`."""
    separate: bool = False
    """Give every layer a factor of its own, also those that read one tensor (q, k and v; gate and up). Each is then a
    multiplication and a quantizer in front of its layer, where one for all costs nothing or a kernel."""


class SvdquantSettings(Settings):
    """`svdquant`: the largest part of weights stays in half."""

    algorithm: Literal["svdquant"]
    """`svdquant`: the part of the weights with the largest singular values stays in half, as a product of two thin
    matrices beside the quantized rest. Two products more for each group of layers that read one tensor; scales are for
    the steps behind it to choose."""
    rank: Annotated[int, Field(ge=1, le=4096)] = 32
    """Of the part, for each layer: q, k and v, which read one tensor, have three times that together. Multiples of 16
    are what hardware multiplies; others are padded. It is halved, down to 8, for a group whose factors would take more
    bytes than its codes save."""
    weighting: Literal["inputs", "none"] = "inputs"
    """What makes a part the largest: `inputs` weighs each column of a weight by the root mean square of its inputs in
    the calibration data; `none` needs no data."""
    iterations: Annotated[int, Field(ge=0, le=100)] = 4
    """How often what rounding the rest loses is taken into the low-rank part, and the rest is taken anew."""


SHIPPED: dict[str, type[Settings]] = {
    "max": MaxSettings,
    "mse": MseSettings,
    "hessian_mse": HessianMseSettings,
    "gptq": GptqSettings,
    "percentile": PercentileSettings,
    "smoothquant": SmoothQuantSettings,
    "awq": AwqSettings,
    "svdquant": SvdquantSettings,
}
"""The algorithms that recipes of ours name, and users read at once."""
