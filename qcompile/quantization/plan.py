"""What becomes of a graph before a number of it is looked at: normalized, its sites found, and all in their places."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import Decline, PassLog, run_pipeline
from passes.dependence import fixed_nodes
from passes.formats import FP8
from passes.pipelines import CANONICALIZE, NORMALIZE, place_pipeline, rotate_pipeline
from passes.places import Pipeline
from passes.quantize.insert import Quantizer, misfit
from passes.quantize.sites import Site, find_sites
from passes.reading import Operand
from passes.subgraphs import graphs
from qcompile.algorithms.base import Algorithm, make
from qcompile.algorithms.scales import has_constant, scale_of
from qcompile.errors import RecipeError
from qcompile.frontends.quantized import refuse_quantized_graph
from qcompile.messages import some
from qcompile.quantization.convolutions import idle, unadded, unfit
from qcompile.quantization.edges import check_edges
from qcompile.quantization.paying import none_pays
from qcompile.recipe import (
    QuantizerConfig,
    QuantizerName,
    Recipe,
    check_quantizes,
    format_of,
    resolve,
    unsupported,
)
from qcompile.recipe.notices import Notice
from qcompile.report.record import SITES, UNREACHED

logger = logging.getLogger("qcompile")


@dataclass
class Work:
    """A graph on its way through the passes: whatever pipeline it meets, it is run here.

    Attributes:
        gm: the graph, which is changed in place.
        log: what the passes did so far.
    """

    gm: GraphModule
    log: PassLog = field(default_factory=PassLog)

    def run(self, pipeline: Pipeline) -> int:
        """Run the passes of `pipeline`. Returns how often they fired."""
        before = self.log.fired.total()
        run_pipeline(pipeline, self.gm, self.log, recompile=False)
        return self.log.fired.total() - before


@dataclass(frozen=True)
class Plan:
    """What is wanted of a normalized graph.

    Attributes:
        configs: the quantizers that are switched on.
        name: of the recipe, for the report.
        steps: the algorithms that choose scales; for what they leave, it is the largest magnitude.
        power_of_two: constant scales that no step chooses are rounded up to one.
        fuses: which attentions get a quantizer for their softmax: those that have one among `configs`, or, if True, all
            whose operands are quantized.
        notices: rules of the recipe that had no effect, or that say why they are there.
        quantizes: something is expected of it, so that a result without any codes is worth a warning.
    """

    configs: Mapping[Site, QuantizerConfig]
    name: str
    steps: tuple[Algorithm[Any], ...] = ()
    power_of_two: bool = False
    fuses: bool = False
    notices: list[Notice] = field(default_factory=list)
    quantizes: bool = True

    @property
    def activations(self) -> Plan:
        """This plan less the weights, for who wants nothing but ranges."""
        return replace(self, configs={s: config for s, config in self.configs.items() if s.operand != "weight"})

    def uncalibrated(self, config: QuantizerConfig) -> Quantizer:
        """What needs no calibration: a scale of run time, or a range that the recipe says or that is known."""
        if not has_constant(config):
            return Quantizer(format_of(config), None)
        largest = torch.tensor(config.constant_amax or 1.0, dtype=torch.float32)  # probabilities are at most 1
        return Quantizer(format_of(config), scale_of(largest, config, self.power_of_two))

    def without(self, unreached: Mapping[Site, str], log: PassLog) -> Plan:
        """This plan less all operands of the layers and attentions in `unreached`, which has the reason for each: the
        other operands would be quantized for nothing.

        They are listed as declined in `log`, and a warning says so.
        """
        reasons: dict[Node, list[tuple[Site, str]]] = defaultdict(list)
        for site, reason in unreached.items():
            reasons[site.consumer].append((site, reason))
        for consumer, found in reasons.items():
            told = "; ".join(f"{site.suffix}: {reason}" for site, reason in found)
            log.declined.append(Decline(UNREACHED, f"not quantized: {told}", found[0][0].module, (consumer.name,)))
        if reasons:
            told = some([f"{found[0][0].module or 'the root'} ({found[0][1]})" for found in reasons.values()])
            logger.warning(
                "not quantized, as calibration gave no range: %s; calibrate with data that reaches them", told
            )
        return replace(self, configs={s: config for s, config in self.configs.items() if s.consumer not in reasons})


Planner = Callable[[Work], Plan]


def planned(work: Work, recipe: Recipe, *, whole: bool = False) -> Plan:
    """Normalize the graph, find what `recipe` quantizes, and put attention scales and rotations where quantizers see
    them.

    Args:
        whole: it is the graph of a whole model, so that a recipe which quantizes nothing of it is an error.

    Raises:
        QCompileError: the graph is quantized already. RecipeError: what the recipe wants is not supported.
    """
    refuse_quantized_graph(work.gm)
    work.run(NORMALIZE)
    sites = find_sites(work.gm)
    names = [QuantizerName(site.name, site.module_class, site.operator.kind) for site in sites]
    resolution = resolve(recipe, names)
    if whole:
        check_quantizes(recipe, names, resolution)
    configs = {site: resolution.configs[site.name] for site in sites if site.name in resolution.configs}
    _check_supported(configs)
    check_edges(work.gm, configs)
    configs = _useful(work, configs, recipe.convolutions)
    for notice in resolution.notices:
        logger.log(logging.WARNING if notice.is_warning else logging.INFO, "%s", notice)

    queries = {site.consumer for site in configs if site.operand == "q"}
    formats = {site: format_of(config) for site, config in configs.items()}
    blocks = {
        s.consumer: f.sizes[-1] for s, f in formats.items() if f.whole_blocks and s.operand in ("input", "weight")
    }
    work.run(place_pipeline(queries, blocks))
    # not where `InsertQdq` will decline: a rotation that nothing is quantized behind is a product for nothing
    rotated = {s.consumer for s, config in configs.items() if config.rotate and not misfit(s.tensor, formats[s])}
    work.run(rotate_pipeline(rotated))
    steps = make(recipe.steps)
    return Plan(configs, recipe.metadata.name, steps, recipe.power_of_two, notices=resolution.notices)


def unquantized(work: Work) -> Plan:
    """Change nothing but the dtype that is computed in."""
    refuse_quantized_graph(work.gm)
    work.run(NORMALIZE)
    work.run(place_pipeline(set(), {}))
    return Plan({}, "", quantizes=False)


def quantized_elsewhere(work: Work, *, queries: bool = False, fuses: bool = True) -> Plan:
    """Write what another tool, or `quantize`, made of a graph in the IR, in the places of our own.

    Args:
        queries: there is data to calibrate the queries of attentions with whose keys and values are in FP8, as in
            checkpoints with an FP8 key/value cache. fuses: as of `Plan`.
    """
    work.run(CANONICALIZE)
    found = _unquantized_queries(work.gm) if queries else []
    work.run(place_pipeline({site.consumer for site in found}, {}))
    return Plan(dict.fromkeys(found, QuantizerConfig(FP8.name)), "as imported", fuses=fuses)


def _useful(work: Work, configs: Mapping[Site, QuantizerConfig], convolutions: str) -> dict[Site, QuantizerConfig]:
    """`configs` less what gives the same at every call, which back ends store, and layers that would gain nothing."""
    fixed = {node for part in graphs(work.gm) for node in fixed_nodes(part)}
    reasons = {site: reason for site, config in configs.items() if (reason := site.idle or unfit(site, config))}
    reasons |= dict.fromkeys((site for site in configs if site.consumer in fixed), "no user input reaches it")
    unpaid = idle(_less(configs, reasons), convolutions)
    reasons |= unpaid
    kept = _less(configs, reasons)
    if convolutions == "where_it_pays" and (told := none_pays(unpaid, kept)) is not None:
        logger.warning("%s", told)
    reasons |= {site: reason for site, config in kept.items() if (reason := unadded(site, kept, config))}
    left = {site.consumer: (site.module, reason) for site, reason in reasons.items()}
    for node, (module, reason) in left.items():
        work.log.declined.append(Decline(SITES, f"not quantized: {reason}", module, (node.name,)))
    return _less(configs, reasons)


def _less(configs: Mapping[Site, QuantizerConfig], reasons: Iterable[Site]) -> dict[Site, QuantizerConfig]:
    """`configs` less all operands of the layers in `reasons`."""
    left = {site.consumer for site in reasons}
    return {site: config for site, config in configs.items() if site.consumer not in left}


def _check_supported(configs: Mapping[Site, QuantizerConfig]) -> None:
    for site, config in configs.items():
        reason = unsupported(config)
        if reason:
            raise RecipeError(f"{site.name}: {reason}")


def _unquantized_queries(gm: GraphModule) -> list[Site]:
    """The queries of attentions whose keys and values are in FP8."""
    sites = (site for site in find_sites(gm) if site.operand == "q")
    return [s for s in sites if [_is_fp8(operand) for operand in s.consumer.args[:3]] == [False, True, True]]


def _is_fp8(operand: object) -> bool:
    quantized = Operand.read(operand)
    return quantized is not None and quantized.format == FP8
