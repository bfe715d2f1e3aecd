"""What a pass is: one rewrite of an FX graph that counts what it did and says why it declined the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from passes.contents import Contents
from passes.errors import PassError, QCompileError
from passes.graph import calls, module_path, place_of
from passes.observe import pipeline_trace
from passes.places import OwnPasses, stage_of
from passes.promises import Seen, broken, checks
from passes.subgraphs import graphs

__all__ = ["Decline", "Pass", "PassLog", "PassResult", "run_checked", "run_pipeline"]


@dataclass(frozen=True)
class Decline:
    """A place that a pass looked at and left as it was.

    Attributes:
        pass_name: class name of the pass.
        reason: what was found there, as a sentence for the user.
        module: path of the module that the place belongs to.
        nodes: names of the FX nodes concerned.
    """

    pass_name: str
    reason: str
    module: str
    nodes: tuple[str, ...]


@dataclass
class PassLog:
    """What the passes of a pipeline did.

    Attributes:
        fired: pass -> number of rewrites.
        declined: in the order they were met.
        notices: what was done, and is for the user to know.
        own: passes of the user that wait for the pipeline with their place: who shares the log shares them.
    """

    fired: Counter[str] = field(default_factory=Counter)
    declined: list[Decline] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    own: OwnPasses = field(default_factory=OwnPasses, compare=False, repr=False)


class Pass(PassBase):
    """One rewrite. A subclass implements `rewrite` and calls `fire` once for each place it changed.

    It is called for the graph and for each that passes work on in its calls (`passes.subgraphs`).

    A pass is used alone, `SomePass()(graph_module)`, or in a pipeline, where one log is shared. What goes wrong in it
    is a PassError that names the pass and, where known, the module and the node; a QCompileError stays as it is.

    Attributes:
        is_checked: what it requires and ensures is checked whenever a pipeline runs it, as it is for passes of a user,
            and that it writes to no constant.
        keeps_dtypes: whether the outputs of the graph keep theirs.
        clears: operators that no call is left of, but for those that it declined.
    """

    is_checked = False
    keeps_dtypes = True
    clears: Collection[Callable[..., Any]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.log = PassLog()
        self.recompiles = True

    @abstractmethod
    def rewrite(self, gm: GraphModule) -> None:
        """Change `gm.graph` in place; the base class lints, removes what became dead and recompiles."""

    def check_requires(self, gm: GraphModule) -> Iterable[str]:
        """What of *Requires* does not hold of `gm`, a sentence each: asked where passes are checked."""
        return ()

    def check_ensures(self, gm: GraphModule) -> Iterable[str]:
        """What of *Ensures* does not hold of `gm` after the pass, fired or not, a sentence each: here `clears`."""
        declined = {name for decline in self.log.declined for name in decline.nodes if decline.pass_name == self.name}
        left = (node for part in graphs(gm) for node in calls(part.graph, *self.clears))
        return [f"{node.target} is left at {place_of(node)}" for node in left if node.name not in declined]

    def call(self, graph_module: GraphModule) -> PassResult:
        start = self.log.fired[self.name]
        try:
            for gm in graphs(graph_module):
                before = self.log.fired[self.name]
                self.rewrite(gm)
                if self.log.fired[self.name] > before:
                    gm.graph.eliminate_dead_code(_stays)  # which lints first
                    if self.recompiles or gm is not graph_module:  # an Interpreter calls the graphs in calls as modules
                        gm.recompile()
        except QCompileError:  # raised on purpose: its sentence says what is wrong
            raise
        except Exception as error:  # a fault of the pass, wherever in torch it shows
            raise PassError(f"{self.name} failed{_where(error)}: {_said(error)}") from error
        return PassResult(graph_module, self.log.fired[self.name] > start)

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def stage(self) -> str:
        """The folder of `passes` that it is in; "own" for a pass of somebody else."""
        return stage_of(type(self))

    def fire(self, count: int = 1) -> None:
        self.log.fired[self.name] += count

    def decline(self, reason: str, *nodes: Node) -> None:
        """Record that `nodes` (the first one names the module) stay as they are, and why."""
        self.log.declined.append(Decline(self.name, reason, module_path(nodes[0]), tuple(n.name for n in nodes)))

    def notice(self, message: str) -> None:
        """Tell the user what was done to the numbers."""
        self.log.notices.append(message)


def _stays(node: Node) -> bool:
    """What torch asks of every node, and first, though it takes longer than to see that somebody reads it."""
    return bool(node.users) or node.is_impure()


def run_checked(instance: Pass, gm: GraphModule, before: Seen | None = None, *, requires: bool = True) -> Seen:
    """Run a pass, and raise a PassError where it breaks a promise (`passes.promises`).

    Args:
        before: what the last one returned, if nothing has touched the graph since.
        requires: check what it requires, too.
    """
    if requires:
        _refuse(instance, "it requires what does not hold", instance.check_requires(gm))
    before, fired = before or Seen.of(gm), instance.log.fired[instance.name]
    contents = Contents.of(gm) if instance.is_checked else None
    instance(gm)
    if contents is not None and (written := contents.written()):
        what = f"it wrote to {', '.join(written)} in place, and so to the model itself, which is another one now"
        how = "make a tensor, and put it in by passes.constants.replace_with_constant or add_constant"
        _refuse(instance, "it broke a promise", [f"{what}: {how}"])
    after, changed = Seen.of(gm), instance.log.fired[instance.name] > fired
    _refuse(instance, "it broke a promise", broken(before, after, changed, keeps_dtypes=instance.keeps_dtypes))
    _refuse(instance, "it did not ensure what it says", instance.check_ensures(gm))
    return after


def _refuse(instance: Pass, why: str, sentences: Iterable[str]) -> None:
    if found := list(sentences):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise PassError(f"{instance.name}: {why}: {found[0]}{more}")


def _where(error: Exception) -> str:
    """Module and name of the node that the pass was at: the last one that its functions held in a variable."""
    found: Node | None = None
    trace = error.__traceback__
    while trace is not None:
        held = trace.tb_frame.f_locals
        found = next((value for value in (held.get("node"), *held.values()) if isinstance(value, Node)), found)
        trace = trace.tb_next
    if found is None:
        return ""
    path = module_path(found)
    return f" at {path} (node {found.name})" if path else f" at node {found.name}"


def _said(error: Exception) -> str:
    """The first line of an error of another package, and what kind of error it is."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def run_pipeline(
    pipeline: Iterable[Callable[[], Pass]], gm: GraphModule, log: PassLog | None = None, *, recompile: bool = True
) -> PassLog:
    """Run the passes that `pipeline` makes (classes, or partials of those that take arguments) on `gm`, in place.

    Args:
        recompile: write the Python code of the graph at the end. Who runs it by an Interpreter, or goes on to another
            graph, saves the time.

    Returns what they did, added to `log` if one is given.
    """
    log = log if log is not None else PassLog()
    before, checking = log.fired.total(), checks()
    seen: Seen | None = None
    with pipeline_trace(gm) as trace:
        for make in log.own.into(pipeline) if log.own.waiting else pipeline:
            instance = make()
            instance.log, instance.recompiles = log, False  # Python code of the graphs in between would never be run
            with trace.around(instance.name, instance.stage, log, gm) if trace else nullcontext():
                if checking or instance.is_checked:
                    seen = run_checked(instance, gm, seen)
                else:
                    instance(gm)
                    seen = None
    if recompile and log.fired.total() > before:
        gm.recompile()
    return log
