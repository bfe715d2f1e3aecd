"""`qcompile generate`: text from a directory that `qcompile export --cache` wrote."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Group, Parameter

from qcompile.cli.console import err, step
from qcompile.cli.options import UsageError
from qcompile.cli.parameters import SEVERAL, SWITCH
from qcompile.messages import visible

if TYPE_CHECKING:
    from qcompile.generation.generator import Generation

_SAMPLING = Parameter(group=Group("Sampling", sort_key=2))


def generate(
    directory: Path,
    /,
    *,
    prompt: Annotated[list[str], SEVERAL] = [],  # noqa: B006  # nobody changes it
    tokens: str | None = None,
    chat: Annotated[bool, SWITCH] = False,
    max_new_tokens: int = 128,
    tokenizer: Path | None = None,
    stream: bool = True,
    temperature: Annotated[float, _SAMPLING] = 0.0,
    top_k: Annotated[int, _SAMPLING] = 0,
    top_p: Annotated[float, _SAMPLING] = 1.0,
    seed: Annotated[int | None, _SAMPLING] = None,
) -> int:
    """Go on from a prompt, in ONNX Runtime on the CPU, until the text ends.

    The text goes to stdout as it comes, and how many tokens there were in a second to stderr.

    ```
    qcompile generate llama-fp8/ --prompt "The capital of France is" --max-new-tokens 32
    qcompile generate llama-fp8/ --prompt "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9 --seed 1
    qcompile generate llama-fp8/ --prompt "One" "Two" --no-stream
    qcompile generate llama-fp8/ --tokens 1,450,7483
    ```

    Parameters
    ----------
    directory:
        What `qcompile export --cache` wrote, or an ONNX file with such inputs and outputs.
    prompt:
        What to go on from; "-" reads it from stdin. Several make one batch.
    tokens:
        Token ids in the place of a prompt, with commas between; new ones are printed in the same way.
    chat:
        A prompt is what a user says, in the chat template of the tokenizer.
    max_new_tokens:
        Where to stop at the latest.
    tokenizer:
        Hugging Face directory whose tokenizer is used. Default: that of the directory.
    stream:
        Print text as it comes, and not when it is complete. Several prompts are never streamed.
    temperature:
        0 takes the likeliest token each time; above it one is drawn.
    top_k:
        Draw from the k likeliest tokens. Default: from all.
    top_p:
        Draw from the likeliest tokens that have this much of the probability together.
    seed:
        Draw the same again.
    """
    if bool(prompt) == bool(tokens):
        raise UsageError("say what to go on from: --prompt TEXT, or --tokens with numbers")
    prompts = [[_token(text) for text in tokens.split(",")]] if tokens else [_read(text) for text in prompt]

    from qcompile.generation.generator import Generator

    step(f"loading {directory}")
    generator = Generator(directory, tokenizer=tokenizer)
    streams = stream and not tokens and len(prompts) == 1
    found = generator.generate(
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
        on_text=_write if streams else None,
    )
    for row, text in zip(found.tokens, found.texts or [""] * len(found.tokens), strict=True):
        if streams:
            _write("\n")
        else:
            _write(f"{','.join(map(str, row)) if tokens else text}\n")
    _tell_speed(found)
    return 0


def _token(text: str) -> int:
    if not text.strip().isdecimal():
        raise UsageError(f"--tokens: {text!r} is no token: write them as 1,450,7483")
    return int(text)


def _read(text: str) -> str:
    return sys.stdin.read() if text == "-" else text


def _write(text: str) -> None:
    """What a model says is shown, and obeyed by no terminal."""
    sys.stdout.write("\n".join(visible(line) for line in text.split("\n")))
    sys.stdout.flush()


def _tell_speed(found: Generation) -> None:
    new = sum(map(len, found.tokens))
    err().print(
        f"prompt: {found.prompt_tokens} tokens, {found.prompt_tokens_per_second:.1f} a second; new: {new} tokens,"
        f" {found.tokens_per_second:.1f} a second",
        style="dim",
        markup=False,
        soft_wrap=True,
    )
