"""`qcompile completion`: what a shell needs to complete our commands and options."""

from __future__ import annotations

from typing import Literal


def completion(shell: Literal["bash", "zsh", "fish", "powershell"], /) -> int:
    """Print a script that completes commands, options and their choices. Nothing is written or installed.

    ```
    source <(qcompile completion bash)                                         # for this shell; in ~/.bashrc for all
    qcompile completion zsh > ~/.zfunc/_qcompile                               # a folder of $fpath
    qcompile completion fish > ~/.config/fish/completions/qcompile.fish
    ```

    Parameters
    ----------
    shell:
        Which one.
    """
    from qcompile.cli.app import app

    print(app.generate_completion(shell=shell))
    return 0
