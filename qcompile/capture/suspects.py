"""What a captured program must not have, or what has to be said of it: it would be wrong, or random, without a word."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.graph import argument, module_class, place_of
from passes.randomness import draws
from qcompile.errors import CaptureError
from qcompile.messages import some

logger = logging.getLogger("qcompile")


def check_inputs(program: ExportedProgram) -> None:
    """Say which example inputs nothing reads: torch.export takes one tensor that is given twice for one input.

    Raises:
        CaptureError: that has happened, as the examples that it keeps show.
    """
    unread = {node.name for node in program.graph.find_nodes(op="placeholder") if not node.users}
    inputs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    examples = pytree.tree_leaves(program.example_inputs)
    known = [(spec, program.state_dict.get(spec.target or "")) for spec in program.graph_signature.input_specs]
    known = [*known, *zip(inputs, examples, strict=False)]
    for spec, example in zip(inputs, examples, strict=False):
        for other, tensor in known:
            if tensor is example and isinstance(tensor, torch.Tensor) and other.arg.name != spec.arg.name:
                names = spec.arg.name, other.target or other.arg.name
                if spec.arg.name in unread or other.arg.name in unread:
                    raise CaptureError(
                        f"this program was exported with one tensor for {names[0]} and for {names[1]}, which"
                        " torch.export takes for one input, so that one of them is never read: export again with a"
                        " clone() of it"
                    )
    ignored = [spec.arg.name for spec in inputs if spec.arg.name in unread and isinstance(spec.arg, TensorArgument)]
    if not ignored:
        return
    logger.warning(
        "nothing in this program reads its input %s: right if the model ignores it; if its example was a tensor that"
        " stands in another place, too, torch.export took the two for one: export again with a clone() of it",
        some(ignored),
    )


def check_inference(program: ExportedProgram, *, exported: bool) -> None:
    """Raises for what only training does in a program that was `exported` by the user; warns of what else is random."""
    random = [node for node in _calls(program) if draws(node)]
    training = [node for node in _calls(program) if (node in random and _is_dropout(node)) or _is_training_norm(node)]
    if exported and training:
        raise CaptureError(
            f"this program was exported in training mode: {_told(training)}; its results are random, or depend on the"
            " batch: call model.eval() before torch.export.export. A model that draws dropout in eval mode, too, is"
            " taken as a module"
        )
    if random:
        logger.warning(
            "the model draws random numbers%s, so no two runs of it or of its program agree: %s",
            "" if exported else " in eval mode, too",
            _told(random),
        )


def _is_dropout(node: Node) -> bool:
    """Whether `node` draws for training only: dropout in any form, stochastic depth, rrelu."""
    words = f"{node.target} {module_class(node)}".lower()
    return any(word in words for word in ("drop", "stochastic", "rrelu")) or any(
        argument(node, name) for name in ("dropout_p", "dropout")
    )


def _is_training_norm(node: Node) -> bool:
    """Whether `node` is a batch norm that has running statistics and takes those of the batch."""
    if not isinstance(node.target, torch._ops.OpOverload) or "batch_norm" not in str(node.target):
        return False
    return bool(argument(node, "training")) and argument(node, "running_mean") is not None


def _told(nodes: list[Node]) -> str:
    return some(list(dict.fromkeys(f"{place_of(node)} ({node.target})" for node in nodes)))


def _calls(program: ExportedProgram) -> Iterator[Node]:
    parts = (part for part in program.graph_module.modules() if isinstance(part, GraphModule))
    return (node for part in parts for node in part.graph.nodes if node.op == "call_function")
