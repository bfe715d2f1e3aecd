"""RNN, GRU and LSTM: a graph break at their call, so that layers before and behind them are captured.

Dynamo gives up on the whole function that reads one from an attribute. With `allow_rnn` it goes into them instead: it
unrolls them in the graph, and fails once a weight is replaced (2.13). While it compiles for this back end, and only
then, it may read them and finds their `forward` disabled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from qcompile.compat.dynamo import CallbackArgs, callback_handler, config, disable, enable

REASON = "Dynamo captures no RNN, GRU or LSTM"
_FORWARDS: tuple[Any, ...] = (nn.RNN.forward, nn.GRU.forward, nn.LSTM.forward)


class BreakAtRecurrent:
    """Lets compilations for this back end break the graph at recurrent layers.

    Args:
        ours: whether what this thread compiles is for this back end.
    """

    def __init__(self, ours: Callable[[], bool]) -> None:
        self._ours, self._changed = ours, False

    def watch(self) -> None:
        """Have Dynamo tell of compilations, if it does not yet: `torch._dynamo.reset` forgets who asked for that."""
        if self._start not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._start)
            callback_handler.register_end_callback(self._end)

    def _start(self, _: CallbackArgs) -> None:
        if self._ours() and not config.allow_rnn:
            self._changed = config.allow_rnn = True
            for forward in _FORWARDS:
                disable(forward, REASON)

    def _end(self, _: CallbackArgs) -> None:
        if self._changed:
            self._changed = config.allow_rnn = False
            for forward in _FORWARDS:
                enable(forward)
