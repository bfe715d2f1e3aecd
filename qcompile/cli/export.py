"""`qcompile export`: from a model to a verified ONNX file and, on request, an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from qcompile.cli.data import NO_DATA, DataOptions
from qcompile.cli.options import UsageError, cache_of, check_cache, parse_expect, parse_profiles
from qcompile.cli.parameters import MODEL, QUANTIZATION, SEVERAL, SWITCH, check_sizes
from qcompile.outputs import check_distinct, check_writable

_ONNX = Parameter(group=Group("ONNX file", sort_key=5))
_GENERATION = Parameter(group=Group("Generation", sort_key=6))
_ENGINE = Parameter(group=Group("Engine", sort_key=7))


def export(
    source: str,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=("--output", "-o"))] = None,
    report: Path | None = None,
    dry_run: Annotated[bool, SWITCH] = False,
    random_weights: Annotated[int | None, MODEL] = None,
    batch: Annotated[int, MODEL] = 1,
    submodule: Annotated[str | None, MODEL] = None,
    input_: Annotated[list[str], MODEL, SEVERAL, Parameter(name="--input")] = [],  # noqa: B006
    dynamic: Annotated[list[str], MODEL, SEVERAL] = [],  # noqa: B006  # nobody changes it
    dynamic_batch: Annotated[bool, MODEL, SWITCH] = False,
    recipe: Annotated[str | None, QUANTIZATION] = None,
    set_: Annotated[list[str], QUANTIZATION, SEVERAL, Parameter(name="--set")] = [],  # noqa: B006
    dtype: Annotated[Literal["float16", "bfloat16", "float32"] | None, QUANTIZATION] = None,
    save_program: Annotated[Path | None, QUANTIZATION] = None,
    data: DataOptions = NO_DATA,
    onnx_target: Annotated[Literal["tensorrt", "portable"] | None, _ONNX] = None,
    opset: Annotated[int | None, _ONNX] = None,
    block_fp8: Annotated[Literal["k_split", "per_channel"], _ONNX] = "k_split",
    io_dtype: Annotated[Literal["float16", "bfloat16", "float32"] | None, _ONNX] = None,
    compare: Annotated[bool, _ONNX] = True,
    cache: Annotated[Literal["dynamic", "static"] | None, _GENERATION] = None,
    cache_length: Annotated[int | None, _GENERATION] = None,
    logits: Annotated[Literal["all", "last"], _GENERATION] = "all",
    engine: Annotated[Path | None, _ENGINE] = None,
    target: Annotated[str | None, _ENGINE] = None,
    profile: Annotated[list[str], _ENGINE, SEVERAL] = [],  # noqa: B006
    expect: Annotated[list[str], _ENGINE, SEVERAL] = [],  # noqa: B006
) -> int:
    """Quantize a model and export it to an ONNX file, checked and compared; build an engine from it on request.

    A quantized Hugging Face directory, for vLLM, SGLang and transformers, is written by `qcompile checkpoint`.

    ```
    qcompile export ./vit-base -o vit.onnx --calibration photos/ --engine vit.engine --target sm89
    qcompile export ./vit-base -o vit.onnx --random-weights 0 --calibration random
    qcompile export ./vit-base -o vit.onnx --recipe nvfp4 --dry-run
    qcompile export ./bert -o bert.onnx --recipe fp8_per_channel_per_token --dynamic-batch
    qcompile export ./llama -o llama.onnx --recipe nvfp4_fp8_attention --calibration texts.jsonl --target sm120
    qcompile export ./llama -o llama-fp8/ --recipe fp8+fp8_kv --cache --calibration texts.jsonl
    qcompile export my_package.models:make -o model.onnx --calibration photos/ --image-size 224 --image-std 0.5
    qcompile export my_package.models:make -o model.onnx --calibration my_package.data:batches
    ```

    Nothing is written but the files that are named, and each only when it is complete and good. What cannot work (a
    format that the target lacks, an opset, a package, a directory, a full disk) is said before the model is worked on.

    Parameters
    ----------
    source:
        A Hugging Face directory (config.json, weights); a .pt2 file that torch.export.save wrote, which may hold
        tensors, numbers, text, names and operators, and no other objects or code; or
        package.module:factory, a function that returns (model, example inputs[, dynamic_shapes]), or with --input the
        model alone. What is quantized already (a checkpoint in a format of `qcompile checkpoint`, a model of
        nvidia-modelopt, torchao or pt2e) keeps its codes and scales, and takes no recipe; calibration data is for the q
        of attentions whose k and v it has in FP8.
    output:
        Where to write the ONNX file. Above 1.8 GB its weights go to a second file, OUTPUT.HASH.data. With --cache, what
        does not end in .onnx is a directory: model.onnx, the tokenizer, config.json, generation_config.json, and
        genai_config.json for onnxruntime-genai.
    report:
        Write what was quantized, what was not and why, the checks and the engine's kernels to this JSON file.
    dry_run:
        Show what would be captured, quantized, declined and written, and stop there. Nothing is calibrated, and no data
        are needed.
    random_weights:
        Make up the weights of a Hugging Face directory with this seed; they need not be there.
    batch:
        Batch size of a directory's example inputs, which is that of the file unless the batch is dynamic.
    submodule:
        Take this part of a directory's model, such as model.encoder of Whisper.
    input_:
        Declare an example input, as name=shape:dtype: x=2x8x64:float32 ids=2:int64. What is declared is all that the
        model is called with: for directories whose inputs are not known, functions that return a model alone, and
        programs that were saved without examples.
    dynamic:
        Make an axis of an input dynamic, as input:axis=dimension[:least:largest]: input_ids:1=seq:1:512
        attention_mask:1=seq. A model with a table of positions needs the range.
    dynamic_batch:
        Make axis 0 of every input dynamic.
    recipe:
        Name of a shipped recipe (fp8, nvfp4_fp8_attention, fp8_qkvo-nvfp4_mlp, ...: "qcompile recipes list" has all) or
        path of a YAML file; fragments may follow, as in fp8+fp8_kv. Default: fp8; none for a program that is quantized
        already. "none" quantizes nothing, and writes the model in --dtype.
    set_:
        Change the recipe, as path=value: `'rules[+]={quantizer: "*.layers.0.*", enable: false}'`; with a Hadamard
        rotation, `'rules[format=nvfp4].rotate=true'`.
    dtype:
        What is not quantized is computed in this type. Default: the model's own if it is half precision, else float16,
        which ends at 65504: a model that goes beyond in calibration is refused, and takes bfloat16.
    save_program:
        Also save the quantized program to this .pt2 file, which is a source in its turn.
    onnx_target:
        tensorrt: the forms that fuse best there; portable: standard operators only. Default: tensorrt; portable for a
        directory.
    opset:
        ONNX opset, 19 to 23. Default: 21; 22 for a bfloat16 program and 23 for NVFP4, which need it.
    block_fp8:
        How weights in blocks of 128 x 128 (fp8_block) are multiplied. k_split: block by block, which is exact and
        writes the products of all blocks to memory; per_channel: quantized once more, with one scale for each channel
        of the weight and each token.
    io_dtype:
        Type of the file's floating-point inputs and outputs. Default: those of the model, whatever --dtype is.
    compare:
        Compare the file with the program, layer by layer, on one batch; with --cache also step by step: prefills, and
        32 tokens behind each. Exit code 1 if it generates something else.
    cache:
        Give a decoder its keys and values of former tokens as inputs, and the longer ones as outputs. dynamic (also
        without a word behind it): what is new is appended; static: written into a buffer of --cache-length tokens. The
        recipes' fragments fp8_kv and int8_kv quantize it. All sizes are dynamic.
    cache_length:
        Tokens that a static cache holds.
    logits:
        Of all new tokens, or of the last one alone, which is all that generation reads.
    engine:
        Also build a TensorRT engine, and write it here.
    target:
        GPU to build for, such as sm89 or sm120; without --engine the engine is judged and not kept. Default: the GPU of
        this machine.
    profile:
        For each dynamic dimension its least, usual and largest size, as dimension=min,opt,max: seq=32,128,512; or for
        an input its shapes: input_ids=1x32,4x128,8x512. What differs between several profiles is given several times.
    expect:
        What the engine must reach, as key=count: attention_fp8, attention_int8, attention, gemm_fp8, gemm_fp4,
        gemm_int8, gemm_int4, convolution_fp8 and convolution_int8 are least counts, kernels is a largest one. A
        shortfall is exit code 1.
    """
    check_sizes({"--batch": batch})
    data.check()
    if random_weights is not None and not 0 <= random_weights < 2**63:
        raise UsageError(f"--random-weights {random_weights}: a seed is 0 or more, and less than 2**63")
    sizes = {"--batch": batch != 1, "--sequence": data.sequence}
    if input_ and (given := [name for name, value in sizes.items() if value]):
        raise UsageError(f"{', '.join(given)}: not with --input, which has the sizes")
    if output is None:
        raise UsageError("say what to write: --output FILE; `qcompile checkpoint` writes a Hugging Face directory")
    folder, output = _place(output, cache)
    check_cache(cache, {"--dynamic": dynamic, "--dynamic-batch": dynamic_batch, "--input": input_})
    check_writable(output, parents=folder is not None)
    check_writable(report, engine, save_program)
    outputs = {"--output": output, "--engine": engine, "--save-program": save_program, "--report": report}
    inputs = [("the model", source), ("the calibration data", data.calibration), ("the recipe", recipe)]
    check_distinct(outputs, inputs)
    if recipe == "none" and set_:
        raise UsageError("--set is for a recipe, and --recipe none is none")
    profiles, expected = parse_profiles(profile), parse_expect(expect)
    builds = engine is not None or target is not None or expected is not None
    if profiles and not builds:
        raise UsageError("--profile is for an engine: give --engine FILE, or --target to build one and not keep it")

    import torch

    import qcompile
    from qcompile.cli.route import Wanted, export_onnx
    from qcompile.source import parse_inputs

    return export_onnx(
        Wanted(
            source=source,
            random_weights=random_weights,
            batch=batch,
            sequence=data.sequence,
            submodule=submodule,
            inputs=parse_inputs(input_),
            dynamic=dynamic,
            dynamic_batch=dynamic_batch,
            recipe=None if recipe == "none" else qcompile.load_recipe(recipe or "fp8", set_),
            given=bool(recipe or set_),
            calibration=data.calibration,
            samples=data.samples,
            preparation=data.preparation(),
            dtype=getattr(torch, dtype) if dtype else None,
            save_program=save_program,
            output=output,
            onnx_target=onnx_target or ("portable" if folder is not None else "tensorrt"),
            cache=cache_of(cache, cache_length, logits),
            folder=folder,
            opset=opset,
            block_fp8=block_fp8,
            io_dtype=getattr(torch, io_dtype) if io_dtype else None,
            compare=compare,
            builds=builds,
            engine=engine,
            target=target,
            profiles=profiles,
            expect=expected,
            report=report,
            dry_run=dry_run,
        )
    )


def _place(output: Path, cache: str | None) -> tuple[Path | None, Path]:
    """The directory that is written, if one is, and the ONNX file."""
    if cache is None or output.suffix == ".onnx":
        return None, output
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file, and no directory: name a new one, or a file that ends in .onnx")
    return output, output / "model.onnx"
