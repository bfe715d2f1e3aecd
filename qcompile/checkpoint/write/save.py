"""`qcompile.save_checkpoint`: a model, or a quantized program of it, to a directory that servers load."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import ExportedProgram

from qcompile.checkpoint.files.directory import carry_over, check_new, new_directory, write_configs
from qcompile.checkpoint.files.shards import ShardWriter, parse_size
from qcompile.checkpoint.formats import CheckpointFormat, Contents, format_called
from qcompile.checkpoint.hub.layout import Layer, Part
from qcompile.checkpoint.hub.origin import Origin
from qcompile.checkpoint.read.written import check_written
from qcompile.checkpoint.write.codes import Advance, quantize_weight
from qcompile.checkpoint.write.job import Job, layers_of, notices_of, read_job
from qcompile.checkpoint.write.plan import contents_of, estimated_bytes, parts_by_key
from qcompile.checkpoint.write.program import slice_weight
from qcompile.checkpoint.write.report import CheckpointReport
from qcompile.checkpoint.write.solve import Solver
from qcompile.errors import CheckpointError
from qcompile.outputs import check_room
from qcompile.progress import progress_bar
from qcompile.recipe import Recipe
from qcompile.schemes.layer import QuantizedWeight

FormatName = Literal["fp8", "modelopt", "modelopt_mixed", "compressed-tensors"]


def save_checkpoint(
    model: str | os.PathLike[str] | torch.nn.Module | ExportedProgram,
    directory: str | os.PathLike[str],
    *,
    format: FormatName = "fp8",
    recipe: str | Recipe | Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] | torch.nn.Module | None = None,
    max_shard_size: int | str = "1GB",
    progress: bool = True,
) -> CheckpointReport:
    """Write a quantized checkpoint that vLLM, SGLang and transformers load.

    Args:
        model: a Hugging Face directory, which is read one tensor and written one shard at a time, so that it may be
            larger than memory, with no forward pass; a `PreTrainedModel` in memory; or what `qcompile.quantize`
            returned, whose codes and scales are taken bit by bit. Codes made here are those of
            `qcompile.quantize(..., dtype=torch.float32)`. A model in memory is not changed: DataParallel and
            torch.compile are taken off, adapters of peft merged, computed weights (normed, pruned, parametrized)
            written as values, and what a reader would leave out is an error.
        directory: where to write; it must not exist, or be empty. Everything is written to `<directory>.partial`,
            which is renamed when it is complete and the reader of the format finds in it, by names and shapes, what the
            architecture needs and nothing else; it is removed after an error. A second run starts clean. The tokenizer
            and other small files of a source directory go along; weights in other forms, hidden files,
            subdirectories (but additional_chat_templates) and links out of it do not, and a notice lists them.
        format: "fp8" (blocks of 128 x 128, dynamic activations), "modelopt", "modelopt_mixed" (which lists the
            algorithm of each layer as MIXED_PRECISION also where all have one) or "compressed-tensors".
        recipe: as of `quantize`, for weights only or with dynamic activations; static ones need calibration, which is
            what `quantize` is for. None is fp8_block for the format fp8. Not with a program.
        source: the directory or the model that a program was made from: its configuration, its other tensors, each in
            its own dtype, and its tokenizer. Only with a program.
        max_shard_size: of one file, as a number of bytes or "1GB"; a larger tensor has a file of its own. The codes of
            one shard are kept in memory.
        progress: show a bar on stderr.

    Returns:
        What was quantized, what was not, and which files there are.

    Raises:
        CheckpointError: names the file, tensor or layer that is wrong, or that the format cannot say. RecipeError.
    """
    start = time.perf_counter()
    chosen, largest = format_called(format), parse_size(max_shard_size)
    check_new(Path(directory))
    job = read_job(model, source, recipe, format)
    contents, shapes = contents_of(job.plan, job.origin.hub)
    chosen.check(contents, shapes)
    factors = [
        factor for weight in (job.weights.layers.values() if job.weights else ()) for factor in weight.low_rank or ()
    ]
    size = estimated_bytes(job.plan, job.origin, chosen) + sum(factor.nbytes for factor in factors)
    check_room({Path(directory).resolve(): size}, CheckpointError)
    job.plan.notices += notices_of(chosen, contents, shapes)
    _check_ties(job.origin)
    with new_directory(Path(directory)) as partial, _bar(job, progress) as advance:
        writer = ShardWriter(partial, largest)
        _write_tensors(job, chosen, writer, advance)
        writer.close()
        notices = job.plan.all_notices + _write_rest(job.origin, chosen, contents, partial)
        check_written(partial, contents.schemes, job.origin.hub.unknown, job.origin.architecture)
        files = sorted(path.name for path in partial.iterdir() if not path.name.startswith("."))
    return CheckpointReport(
        **layers_of(job.plan, job.origin, job.declined),
        format=format,
        recipe=job.recipe,
        kv_cache=contents.kv_cache,
        notices=notices,
        files=files,
        bytes=writer.bytes,
        seconds=time.perf_counter() - start,
    )


def _check_ties(origin: Origin) -> None:
    """What is dropped as tied has to be the same: transformers unties weights that differ, and says so in its log."""
    stored = origin.stored
    for dropped, kept in origin.hub.tied.items():
        pair = [
            next((stored[key] for key in (f"{name}.weight", name) if key in stored), None) for name in (dropped, kept)
        ]
        first, second = pair
        if first is None or second is None:
            continue
        if (first.dtype, first.shape) != (second.dtype, second.shape) or any(
            a != b for a, b in zip(first.chunks(), second.chunks(), strict=True)
        ):
            raise CheckpointError(
                f"{first.where} is not {second.where}, to which config.json ties it: put"
                ' "tie_word_embeddings": false into config.json, or take one of them out of the files'
            )


def _write_tensors(job: Job, chosen: CheckpointFormat, writer: ShardWriter, advance: Advance) -> None:
    stored, parts = job.origin.stored, parts_by_key(job.plan, job.origin.hub)
    solver = job.solver()
    for key, tensor in stored.items():
        if key in job.origin.hub.dropped:
            continue
        if key in parts:
            layer, part = parts[key]
            writer.add(chosen.tensors(part.name, _quantized(job, layer, part, solver, advance)))
        else:
            edited = job.weights.edited.get(key) if job.weights else None
            writer.add({key: tensor if edited is None else edited.to(tensor.dtype)})
            advance(tensor.nbytes)
    for attention, (k_scale, v_scale) in job.kv_scales.items():
        writer.add(chosen.kv_tensors(attention, k_scale, v_scale))


def _quantized(job: Job, layer: Layer, part: Part, solver: Solver, advance: Advance) -> QuantizedWeight:
    tensor = job.origin.stored[part.key]
    if job.weights is not None:
        weight = slice_weight(job.weights.layers[layer.name], part)
        columns = weight.codes.shape[1] * (2 if weight.scheme.weight.packed else 1)
        if (weight.codes.shape[0], columns) != tensor.shape:
            raise CheckpointError(
                f"{layer.name} is {[weight.codes.shape[0], columns]} in the program and {tensor.where} is"
                f" {list(tensor.shape)}: give the directory or the model that the program was made from"
            )
        advance(tensor.nbytes)
        return weight
    quantized = quantize_weight(tensor, job.plan.schemes[layer.name], solver.quantizer(layer.name, part), advance)
    quantized.input_scale = job.plan.input_scales.get(layer.name)
    return quantized


def _write_rest(origin: Origin, chosen: CheckpointFormat, contents: Contents, partial: Path) -> list[str]:
    """All files but the weights; config.json comes last. Returns notices."""
    notices = []
    files = dict(chosen.files(contents))
    if origin.directory is not None:
        if left := carry_over(origin.directory, partial):
            notices.append(f"not carried over from {origin.directory}: {', '.join(left)}")
    else:
        notices.append("made from a model in memory: the tokenizer is to be saved beside it")
        if origin.generation is not None:
            files["generation_config.json"] = dict(origin.generation)
    if origin.hub.unknown:
        count = f"{len(origin.hub.unknown)} tensors ({origin.hub.unknown[0]}, ...)"
        notices.append(f"{count} belong to no module that transformers makes: they are copied as they are")
    write_configs(partial, origin.config, files)
    return notices


@contextmanager
def _bar(job: Job, show: bool) -> Iterator[Advance]:
    """A progress bar over the bytes that are done with."""
    stored = job.origin.stored
    total = sum(tensor.nbytes for key, tensor in stored.items() if key not in job.origin.hub.dropped)
    with progress_bar("writing the checkpoint", total, show, of_bytes=True) as bar:
        yield bar.advance
