"""`qcompile export`: from a model to a verified ONNX file and, on request, an engine; or to a quantized checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter

from qcompile.cli.build import Several, build_and_show
from qcompile.cli.checkpoint import write_checkpoint
from qcompile.cli.console import out, step, write_json
from qcompile.cli.options import UsageError, parse_expect, parse_profiles
from qcompile.outputs import check_writable
from qcompile.tables import show_export

_MODEL = Parameter(group=Group("Model", sort_key=2))
_QUANTIZATION = Parameter(group=Group("Quantization", sort_key=3))
_ONNX = Parameter(group=Group("ONNX file", sort_key=4))
_ENGINE = Parameter(group=Group("Engine", sort_key=5))
_CHECKPOINT = Parameter(group=Group("Checkpoint", sort_key=6))
_NO = Parameter(negative="", show_default=False)


def export(
    source: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    report: Path | None = None,
    random_weights: Annotated[int | None, _MODEL] = None,
    batch: Annotated[int, _MODEL] = 1,
    sequence: Annotated[int | None, _MODEL] = None,
    submodule: Annotated[str | None, _MODEL] = None,
    dynamic: Annotated[list[str], _MODEL, Several] = [],  # noqa: B006  # nobody changes it
    dynamic_batch: Annotated[bool, _MODEL, _NO] = False,
    recipe: Annotated[str | None, _QUANTIZATION] = None,
    set_: Annotated[list[str], _QUANTIZATION, Several, Parameter(name="--set")] = [],  # noqa: B006
    calibration: Annotated[str | None, _QUANTIZATION] = None,
    dtype: Annotated[Literal["float16", "bfloat16", "float32"] | None, _QUANTIZATION] = None,
    save_program: Annotated[Path | None, _QUANTIZATION] = None,
    onnx_target: Annotated[Literal["tensorrt", "portable"], _ONNX] = "tensorrt",
    opset: Annotated[int | None, _ONNX] = None,
    block_fp8: Annotated[Literal["k_split", "per_channel"], _ONNX] = "k_split",
    compare: Annotated[bool, _ONNX] = True,
    engine: Annotated[Path | None, _ENGINE] = None,
    target: Annotated[str | None, _ENGINE] = None,
    profile: Annotated[list[str], _ENGINE, Several] = [],  # noqa: B006
    expect: Annotated[list[str], _ENGINE, Several] = [],  # noqa: B006
    to_checkpoint: Annotated[Path | None, _CHECKPOINT] = None,
    format: Annotated[Literal["fp8", "modelopt", "modelopt_mixed", "compressed-tensors"] | None, _CHECKPOINT] = None,
) -> int:
    """Quantize a model and export it to an ONNX file, checked and compared; build an engine from it on request.

    Or quantize a Hugging Face directory to another one, for vLLM, SGLang and transformers.

    ```
    qcompile export ./vit-base -o vit.onnx --calibration images.safetensors --engine vit.engine --target sm89
    qcompile export ./vit-base -o vit.onnx --random-weights 0 --calibration random
    qcompile export ./bert -o bert.onnx --recipe fp8_per_channel_per_token --dynamic-batch
    qcompile export ./llama -o llama.onnx --recipe nvfp4_fp8_attention --calibration ids.safetensors --target sm120
    qcompile export my_package.models:make -o model.onnx --calibration my_package.data:batches
    qcompile export ./llama --to-checkpoint ./llama-fp8 --format fp8
    qcompile export ./llama --to-checkpoint ./llama-fp4 --format modelopt --recipe nvfp4 --calibration ids.safetensors
    ```

    Nothing is written but the files that are named, and each only when it is complete and good. What cannot work (a
    format that the target lacks, an opset, a package, a directory, a full disk) is said before the model is worked on.

    Parameters
    ----------
    source:
        A Hugging Face directory (config.json, weights); a .pt2 file that torch.export.save wrote; or
        package.module:factory, a function that returns (model, example inputs[, dynamic_shapes]). What is quantized
        already (a checkpoint in one of the formats below, a model of nvidia-modelopt, torchao or pt2e) keeps its codes
        and scales, and takes no recipe; calibration data is for the q of attentions whose k and v it has in FP8.
    output:
        Where to write the ONNX file. Above 1.8 GB its weights go to a second file, OUTPUT.data. Not needed with
        --to-checkpoint.
    report:
        Write what was quantized, what was not and why, the checks and the engine's kernels to this JSON file.
    random_weights:
        Make up the weights of a Hugging Face directory with this seed; they need not be there.
    batch:
        Batch size of a directory's example inputs, which is that of the file unless the batch is dynamic.
    sequence:
        Tokens in a directory's example inputs. Default: 128, or what the model takes if that is less.
    submodule:
        Take this part of a directory's model, such as model.encoder of Whisper.
    dynamic:
        Make an axis of an input dynamic, as input:axis=dimension[:least:largest]: input_ids:1=seq:1:512
        attention_mask:1=seq. A model with a table of positions needs the range.
    dynamic_batch:
        Make axis 0 of every input dynamic.
    recipe:
        Name of a shipped recipe (fp8, nvfp4_fp8_attention, fp8_qkvo-nvfp4_mlp, ...: "qcompile recipes list" has all) or
        path of a YAML file. Default: fp8; none for a program that is quantized already.
    set_:
        Change the recipe, as path=value: `'rules[+]={quantizer: "*.layers.0.*", enable: false}'`; with a Hadamard
        rotation, `'rules[format=nvfp4].rotate=true'`.
    calibration:
        Data that fixes the ranges of activations: a .safetensors, .npz or .pt file with a tensor for each input, by
        name, samples on the first axis; a .npy file for a model with one input; package.module:function, which returns
        an iterable of batches; or "random", to try out without data (the file is then of no other use).
    dtype:
        What is not quantized is computed in this type. Default: the model's own if it is half precision, else float16,
        which ends at 65504: a model that goes beyond in calibration is refused, and takes bfloat16.
    save_program:
        Also save the quantized program to this .pt2 file, which is a source in its turn.
    onnx_target:
        tensorrt: the forms that fuse best there; portable: standard operators only.
    opset:
        ONNX opset, 19 to 23. Default: 21; 22 for a bfloat16 program and 23 for NVFP4, which need it.
    block_fp8:
        How weights in blocks of 128 x 128 (fp8_block) are multiplied. k_split: block by block, which is exact and
        writes the products of all blocks to memory; per_channel: quantized once more, with one scale for each channel
        of the weight and each token.
    compare:
        Compare the file with the program, layer by layer, on one batch.
    engine:
        Also build a TensorRT engine, and write it here.
    target:
        GPU to build for, such as sm89 or sm120; without --engine the engine is judged and not kept. Default: the GPU of
        this machine.
    profile:
        For each input with dynamic dimensions its least, usual and largest shape, as input=min,opt,max:
        input_ids=1x32,4x128,8x512.
    expect:
        What the engine must reach, as key=count: attention_fp8, attention_int8, attention, gemm_fp8, gemm_fp4 and
        gemm_int8 are least counts, kernels is a largest one. A shortfall is exit code 1.
    to_checkpoint:
        Write a quantized checkpoint to this directory, which is new or empty. The source is a Hugging Face directory;
        it is read one tensor at a time and may be larger than memory. Recipes with static activations (fp8, nvfp4) need
        --calibration, which loads the model in float32; recipes for weights or with dynamic activations need none.
    format:
        Of the checkpoint. fp8: FP8 in blocks of 128 x 128, activations dynamic (recipe fp8_block, which is the default
        then); modelopt: FP8, NVFP4 and mixtures of them; modelopt_mixed: these with the algorithm of each layer,
        as MIXED_PRECISION, also where all have one; compressed-tensors: all of these, blocks beside NVFP4, and
        INT8. Default: fp8.
    """
    for name, size in {"--batch": batch, "--sequence": sequence}.items():
        if size is not None and size < 1:
            raise UsageError(f"{name} {size}: a size is 1 or more")
    if to_checkpoint is not None:
        others = {
            "--output": output,
            "--random-weights": random_weights is not None,
            "--submodule": submodule,
            "--dynamic": dynamic,
            "--dynamic-batch": dynamic_batch,
            "--dtype": dtype,
            "--save-program": save_program,
            "--onnx-target": onnx_target != "tensorrt",
            "--opset": opset,
            "--block-fp8": block_fp8 != "k_split",
            "--no-compare": not compare,
            "--engine": engine,
            "--target": target,
            "--profile": profile,
            "--expect": expect,
        }
        if given := [name for name, value in others.items() if value]:
            raise UsageError(f"{', '.join(given)}: not with --to-checkpoint, which writes that and no ONNX file")
        check_writable(report)
        if calibration is not None:
            from qcompile.source import check_calibration

            check_calibration(calibration)
        written = write_checkpoint(source, to_checkpoint, format, recipe, set_, calibration, batch, sequence)
        if report is not None:
            write_json(report, {"source": source, "checkpoint": written})
        return 0
    if output is None:
        raise UsageError("say what to write: --output FILE for an ONNX file, --to-checkpoint DIR for a checkpoint")
    if format is not None:
        raise UsageError("--format is for a checkpoint: give --to-checkpoint DIR, too")
    check_writable(output, report, engine, save_program)
    profiles, expected = parse_profiles(profile), parse_expect(expect)
    builds = engine is not None or target is not None or expected is not None
    if profiles and not builds:
        raise UsageError("--profile is for an engine: give --engine FILE, or --target to build one and not keep it")

    import torch

    import qcompile
    from qcompile.cli.ahead import Wanted, check_before_loading, check_before_quantizing
    from qcompile.cli.quantize import MADE_UP, imported, quantized, save
    from qcompile.source import load_source, with_dynamic_shapes

    wanted = Wanted(
        source=source,
        recipe=qcompile.load_recipe(recipe or "fp8", set_),
        given=bool(recipe or set_),
        calibration=calibration,
        dtype=getattr(torch, dtype) if dtype else None,
        opset=opset,
        block_fp8=block_fp8,
        compare=compare,
        dynamic=dynamic,
        builds=builds,
        target=target,
        profiles=profiles,
        expect=expected,
        outputs=[path for path in (output, save_program, engine) if path is not None],
    )
    check_before_loading(wanted)
    step(f"loading {source}")
    loaded = load_source(source, random_weights=random_weights, batch=batch, sequence=sequence, submodule=submodule)
    loaded = with_dynamic_shapes(loaded, dynamic, batch=dynamic_batch)
    if check_before_quantizing(wanted, loaded):
        program, first = imported(loaded, calibration, wanted.dtype)
    else:
        program, first = quantized(loaded, wanted.recipe, calibration, wanted.dtype)
    if save_program is not None:
        save(program, save_program)
    step(f"exporting to {output}")
    batch_to_compare = (first if first is not None else loaded.example_batch) if compare else None
    exported = qcompile.export_onnx(
        program, output, target=onnx_target, opset=opset, block_fp8=block_fp8, compare=batch_to_compare
    )
    data: dict[str, Any] = {"source": loaded.name, "export": json.loads(exported.to_json()), "engine": None}
    if calibration == "random":
        data["export"]["notices"].insert(0, MADE_UP)
    show_export(out(), data["export"])
    if builds:
        step("building the engine")
        data["engine"] = build_and_show(output, engine, target, profiles, expected)
    if report is not None:
        write_json(report, data)
    return 0
