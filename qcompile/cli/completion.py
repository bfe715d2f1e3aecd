"""`qcompile completion`: what a shell needs to complete our commands and options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from cyclopts import App

Shell = Literal["bash", "zsh", "fish", "powershell"]


def completion_of(app: App) -> Callable[[Shell], int]:
    """The command for all that `app` has when it is called."""

    def completion(shell: Shell, /) -> int:
        """Print a script that completes commands, options and their choices. Nothing is written or installed.

        ```
        source <(qcompile completion bash)                                     # for this shell; in ~/.bashrc for all
        qcompile completion zsh > ~/.zfunc/_qcompile                           # a folder of $fpath
        qcompile completion fish > ~/.config/fish/completions/qcompile.fish
        ```

        Parameters
        ----------
        shell:
            Which one.
        """
        print(app.generate_completion(shell=shell))
        return 0

    return completion
