"""Rule resolution against a naive oracle; notices; what a kind of quantizer cannot be."""

from __future__ import annotations

import itertools
import re
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.capabilities import PRODUCTS
from passes.operators import OPERATORS
from qcompile.errors import RecipeError
from qcompile.recipe import QuantizerConfig, QuantizerName, Recipe, format_of, load_recipe, resolve, unsupported
from qcompile.recipe.globs import KINDS, alternatives, glob_matches, possible_kinds
from qcompile.recipe.rule import Rule

Data = dict[str, Any]
W, X, Q = "a.b.weight_quantizer", "a.b.input_quantizer", "a.q_bmm_quantizer"


def recipe(*rules: Data) -> Recipe:
    return load_recipe({"metadata": {"name": "mine", "description": "a test"}, "rules": list(rules)})


def names(*texts: str, module_class: str | None = None) -> list[QuantizerName]:
    return [QuantizerName(text, module_class) for text in texts]


def oracle_glob(name: str, pattern: str) -> bool:
    """`*` and `?` only, one character at a time; a leading `*.` may also be nothing."""

    def match(text: str, glob: str) -> bool:
        if not glob:
            return not text
        if glob[0] == "*":
            return any(match(text[i:], glob[1:]) for i in range(len(text) + 1))
        return bool(text) and glob[0] in (text[0], "?") and match(text[1:], glob[1:])

    return match(name, pattern) or match("." + name, pattern if pattern.startswith("*.") else "\0")


paths = st.lists(st.sampled_from(["a", "b", "head", "fc1"]), max_size=3).map(".".join)
kinds = st.sampled_from(KINDS[1:])  # without inputs, as INT8 weights of FP8 inputs are an error
quantizers = st.builds(lambda path, kind: f"{path}.{kind}" if path else kind, paths, kinds)
globs = st.one_of(
    st.sampled_from(["*", "*.weight_quantizer", "a.*", "*.head.*", "*_quantizer"]),  # often hit the same quantizer
    quantizers,
    st.lists(
        st.sampled_from(["*", "*.", ".", "?", "a", "head", "_quantizer", "weight", "b"]), min_size=1, max_size=5
    ).map("".join),
)
actions: st.SearchStrategy[Data] = st.sampled_from([{"format": "fp8"}, {"format": "int8"}, {"enable": False}])
classes = st.sampled_from([None, "torch.nn.Linear", "my.Head", "Embedding"])
class_globs = st.sampled_from([None, None, None, None, None, "*", "Linear", "torch.nn.*", "*e*d*"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(globs, st.none() | globs, class_globs, actions | st.just({"enable": True})), min_size=2, max_size=6
    ),
    st.lists(st.tuples(quantizers, classes), min_size=1, max_size=6, unique_by=lambda pair: pair[0]),
)
def test_the_last_matching_rule_wins(
    rules: list[tuple[str, str | None, str | None, Data]], model: list[tuple[str, str | None]]
) -> None:
    everything: list[tuple[str, str | None, str | None, Data]] = [("*", None, None, {"format": "fp8"}), *rules]
    data = [{"quantizer": g, "unless": not_g, "module_class": c, **action} for g, not_g, c, action in everything]
    result = resolve(recipe(*data), [QuantizerName(*pair) for pair in model])

    expected: dict[str, str] = {}
    off: dict[str, int] = {}
    for name, cls in model:
        form, on = None, False
        for index, (glob, not_glob, cls_glob, action) in enumerate(everything):
            ends = [] if cls is None else [cls, cls.split(".")[-1]]
            if not_glob is not None and oracle_glob(name, not_glob):
                continue
            if not oracle_glob(name, glob) or not (cls_glob is None or any(oracle_glob(e, cls_glob) for e in ends)):
                continue
            form = action.get("format", form)
            on = action.get("enable", True)
            off[name] = index
        if on and form:
            expected[name] = form
    assert {name: config.format for name, config in result.configs.items()} == expected
    disabled = [name for name, _ in model if name not in expected]
    assert {name: rule.where.file for name, rule in result.disabled.items()} == {
        name: f"rules[{off[name]}]" for name in disabled
    }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(globs, actions), min_size=1, max_size=5),
    st.lists(quantizers, max_size=5, unique=True),
)
def test_a_rule_has_a_notice_exactly_if_it_decides_nothing(rules: list[tuple[str, Data]], model: list[str]) -> None:
    """Without `enable: true`: a rule is idle if it matches nothing, or others decide all that has a format at all."""
    data = [{"quantizer": glob, **action} for glob, action in rules]
    result = resolve(recipe(*data), names(*model))
    noticed = {notice.file: notice.kind for notice in result.notices if notice.kind != "undone"}
    deciding = {config.source for config in result.configs.values()}
    deciding |= {str(rule.where) for rule in result.disabled.values()}
    for index, (glob, _) in enumerate(rules):
        hits = [name for name in model if oracle_glob(name, glob)]
        formatted = [n for n in hits if any("format" in act and oracle_glob(n, other) for other, act in rules)]
        idle = bool(formatted) and f"rules[{index}]" not in deciding
        expected = "overridden" if idle else None
        assert noticed.get(f"rules[{index}]") == (expected if hits else "matches_nothing")


@given(globs, quantizers)
def test_globs_and_the_kinds_they_can_reach(glob: str, name: str) -> None:
    assert glob_matches(name, glob) == oracle_glob(name, glob)
    if oracle_glob(name, glob) and "?" not in glob:
        assert name.rpartition(".")[2] in possible_kinds(glob)


@given(st.lists(st.lists(globs, min_size=1, max_size=3), min_size=1, max_size=3), quantizers)
def test_braces_stand_for_either(choices: list[list[str]], name: str) -> None:
    glob = "".join("{" + ",".join(options) + "}" for options in choices)
    plain = ["".join(option) for option in itertools.product(*choices)]
    assert glob_matches(name, glob) == any(glob_matches(name, each) for each in plain)
    assert set(possible_kinds(glob)) == {kind for each in plain for kind in possible_kinds(each)}


def test_nested_and_empty_alternatives() -> None:
    assert alternatives("a{b,{c,d}e}{,f}") == ("ab", "abf", "ace", "acef", "ade", "adef")


@pytest.mark.parametrize(
    ("glob", "kinds"),
    [
        ("*", KINDS),
        ("*.mlp.*{weight,input}_quantizer", ("weight_quantizer", "input_quantizer")),
        ("*.mlp.*", KINDS),
        ("*.weight_quantizer", ("weight_quantizer",)),
        ("weight_quantizer", ("weight_quantizer",)),
        ("*weight_quantizer", ("weight_quantizer",)),
        ("*[qk]_bmm_quantizer", ("q_bmm_quantizer", "k_bmm_quantizer")),
        ("*.[qk]_bmm_quantizer", ("q_bmm_quantizer", "k_bmm_quantizer")),
        ("*_bmm_quantizer", KINDS[4:8]),
        ("a.fc1.input_quantizer", ("input_quantizer",)),
        ("*.lm_head", ()),
        ("*.weight_quantiser", ()),
    ],
)
def test_kinds_that_a_glob_can_reach(glob: str, kinds: tuple[str, ...]) -> None:
    reached = possible_kinds(glob)
    assert set(kinds) <= set(reached)
    if glob != "*[qk]_bmm_quantizer":  # without the dot, `*` may end inside "softmax"
        assert set(reached) == set(kinds)


def test_a_leading_star_dot_also_matches_at_the_start() -> None:
    rules = recipe({"quantizer": "*.head.*", "format": "fp8"})
    model = names(
        *(f"{path}.weight_quantizer" for path in ("head", "model.head", "multihead", "model.multihead.x", "heads"))
    )
    assert list(resolve(rules, model).configs) == ["head.weight_quantizer", "model.head.weight_quantizer"]


def test_case_matters() -> None:
    assert not resolve(recipe({"quantizer": "*Head*", "format": "fp8"}), names("head.weight_quantizer")).configs


def test_a_module_class_matches_by_qualified_or_last_name() -> None:
    for glob, hit in [("Linear", True), ("torch.nn.modules.*", True), ("*Router", False), ("linear", False)]:
        rules = recipe({"quantizer": "*", "module_class": glob, "format": "fp8"})
        assert bool(resolve(rules, names(W, module_class="torch.nn.modules.linear.Linear")).configs) is hit
        assert not resolve(rules, names(W)).configs  # an unknown class matches no rule that asks for one


def test_every_field_of_a_rule_reaches_the_config() -> None:
    rules = recipe(
        {"quantizer": W, "format": "fp8", "granularity": "per_block", "block_shape": [128, 64]},
        {"quantizer": X, "format": "int8", "granularity": "per_token", "dynamic": True, "rotate": False},
        {"quantizer": Q, "format": "fp8"},
    )
    assert resolve(rules, names(W, X, Q)).configs == {
        W: QuantizerConfig("fp8", "per_block", (128, 64)),
        X: QuantizerConfig("int8", "per_token", dynamic=True),
        Q: QuantizerConfig("fp8"),
    }


def test_block_formats_bring_their_own_layout() -> None:
    for form, block in [("nvfp4", (1, 16)), ("mxfp8", (1, 32)), ("mxfp4", (1, 32))]:
        configs = resolve(recipe({"quantizer": "*", "format": form, "rotate": True}), names(W, X)).configs
        assert configs[W] == QuantizerConfig(form, "per_block", block, dynamic=False, rotate=True)
        assert configs[X] == QuantizerConfig(form, "per_block", block, dynamic=True, rotate=True)


def test_enable_brings_back_the_earlier_format() -> None:
    rules = recipe(
        {"quantizer": "*", "format": "fp8"},
        {"quantizer": "a.*", "enable": False},
        {"quantizer": W, "enable": True},
    )
    result = resolve(rules, names(W, X))
    assert result.configs == {W: QuantizerConfig("fp8")}
    assert result.configs[W].source == "rules[0], switched on at rules[2]"
    assert result.disabled == {X: rules.rules[1]}
    assert result.notices == []


def test_enable_without_any_format_is_an_error() -> None:
    rules = recipe({"quantizer": X, "format": "fp8"}, {"quantizer": "*.[wq]*_quantizer", "enable": True})
    with pytest.raises(RecipeError, match=r"^rules\[1\]: `enable: true` on .* matches a.b.weight_quantizer and 1 more"):
        resolve(rules, names(W, X, Q))


def test_a_format_after_a_switch_is_on_again() -> None:
    rules = recipe(
        {"quantizer": "*", "format": "fp8"},
        {"quantizer": "*", "enable": False},
        {"quantizer": W, "format": "int8"},
    )
    result = resolve(rules, names(W, X))
    assert result.configs == {W: QuantizerConfig("int8")}
    assert list(result.disabled) == [X]
    assert [notice.file for notice in result.notices] == ["rules[0]"]


def test_quantizers_that_no_rule_names_are_in_neither_table() -> None:
    result = resolve(recipe({"quantizer": X, "format": "fp8"}), names(W, X))
    assert (list(result.configs), result.disabled) == ([X], {})


def test_notices_name_file_line_and_winner(tmp_path: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "metadata: {name: n, description: d}\n"
        "rules:\n"
        '- {quantizer: "*.weight_quantizer", format: fp8}\n'
        '- {quantizer: "*lm_head*", enable: false}\n'
        '- {quantizer: "*.lm_head", enable: false}\n'
        '- {quantizer: "*", module_class: Router, enable: false}\n'
        '- {quantizer: "*.input_quantiser", enable: false}\n'
        '- {quantizer: "a.*", format: int8}\n'
    )
    assert [str(notice) for notice in resolve(load_recipe(path), names(W)).notices] == [
        f"{path}:3: the rule for '*.weight_quantizer' is wholly overridden by 'a.*' ({path}:8)",
        f"{path}:4: the glob '*lm_head*' matches nothing in this model",
        f"{path}:5: the glob '*.lm_head' can match no quantizer of any model; a name ends in a quantizer, "
        "so add `.*` to name a module",
        f"{path}:6: the glob '*' with module_class 'Router' matches nothing in this model",
        f"{path}:7: the glob '*.input_quantiser' can match no quantizer of any model; did you mean 'input_quantizer'?",
    ]


def test_a_model_that_needs_what_its_kind_cannot_do() -> None:
    rules = recipe({"quantizer": "a.*", "format": "nvfp4"})
    message = "rules[0]: attention operands have one scale per tensor, so q_bmm_quantizer cannot be nvfp4 in blocks"
    with pytest.raises(RecipeError, match=re.escape(f"{message}; the glob 'a.*' matches {Q}")):
        resolve(rules, names(W, Q))
    later = {"quantizer": "*_bmm_quantizer", "format": "fp8"}
    assert resolve(recipe({"quantizer": "a.*", "format": "nvfp4"}, later), names(W, Q)).configs[Q].format == "fp8"


def test_rotating_one_side_is_an_error() -> None:
    rules: list[Data] = [{"quantizer": W, "format": "nvfp4", "rotate": True}, {"quantizer": X, "format": "nvfp4"}]
    with pytest.raises(RecipeError, match=r"^a\.b: `rotate` must be the same .*weight: rules\[0\]; input: rules\[1\]"):
        resolve(recipe(*rules), names(W, X))
    assert resolve(recipe(rules[0]), names(W, X)).configs[W].rotate  # weight-only: the input has no quantizer
    alone = {"quantizer": X, "format": "nvfp4", "rotate": True}
    with pytest.raises(RecipeError, match=r"^a\.b: `rotate` on the input \(rules\[0\]\) needs a weight quantizer"):
        resolve(recipe(alone), names(W, X))


BLOCK_WEIGHT = {"quantizer": W, "format": "fp8", "granularity": "per_block", "block_shape": [128, 128]}
BLOCK_INPUT = {"quantizer": X, "format": "fp8", "granularity": "per_block", "block_shape": [1, 128], "dynamic": True}


def test_fp8_in_blocks_is_multiplied_with_its_like() -> None:
    assert len(resolve(recipe(BLOCK_WEIGHT, BLOCK_INPUT), names(W, X)).configs) == 2
    assert len(resolve(recipe(BLOCK_WEIGHT), names(W, X)).configs) == 1  # weight-only
    assert len(resolve(recipe(BLOCK_INPUT), names(W, X)).configs) == 1


@pytest.mark.parametrize(
    ("weight", "activation", "layouts"),
    [
        (BLOCK_WEIGHT, {"quantizer": X, "format": "fp8"}, ("fp8 per_block [128, 128]", "fp8 per_tensor")),
        (
            BLOCK_WEIGHT,
            {"quantizer": X, "format": "fp8", "granularity": "per_token", "dynamic": True},
            ("fp8 per_block [128, 128]", "fp8 per_token"),
        ),
        (BLOCK_WEIGHT, {"quantizer": X, "format": "int8"}, ("fp8 per_block [128, 128]", "int8 per_tensor")),
        ({"quantizer": W, "format": "fp8"}, BLOCK_INPUT, ("fp8 per_tensor", "fp8 per_block [1, 128]")),
        (
            {"quantizer": W, "format": "fp8", "granularity": "per_channel"},
            BLOCK_INPUT,
            ("fp8 per_channel", "fp8 per_block [1, 128]"),
        ),
        ({"quantizer": W, "format": "nvfp4"}, {"quantizer": X, "format": "fp8"}, ("nvfp4", "fp8 per_tensor")),
        ({"quantizer": W, "format": "fp8"}, {"quantizer": X, "format": "nvfp4"}, ("fp8 per_tensor", "nvfp4")),
        ({"quantizer": W, "format": "nvfp4"}, {"quantizer": X, "format": "int8"}, ("nvfp4", "int8 per_tensor")),
        ({"quantizer": W, "format": "int8"}, {"quantizer": X, "format": "fp8"}, ("int8 per_tensor", "fp8 per_tensor")),
        (
            {"quantizer": W, "format": "int8", "granularity": "per_channel"},
            {"quantizer": X, "format": "fp8", "granularity": "per_token", "dynamic": True},
            ("int8 per_channel", "fp8 per_token"),
        ),
    ],
)
def test_operands_that_no_target_multiplies_are_an_error(
    weight: Data, activation: Data, layouts: tuple[str, str]
) -> None:
    what = (
        f"a.b: no target multiplies a weight in {layouts[0]} with an input in {layouts[1]} (weight: rules[0]; input: "
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(what)}"):
        resolve(recipe(weight, activation), names(W, X))


def test_every_pair_that_a_kernel_takes_is_in_the_table() -> None:
    """The lowerings know their pairs, too: what they take for a weight and an input is what the table allows."""
    layers = {
        "fp8": {"quantizer": W, "format": "fp8", "granularity": "per_channel"},
        "int8": {"quantizer": W, "format": "int8", "granularity": "per_channel"},
        "fp8_128x128": BLOCK_WEIGHT,
        **{name: {"quantizer": W, "format": name} for name in ("nvfp4", "mxfp8", "mxfp4")},
    }
    inputs = {
        "fp8": {"quantizer": X, "format": "fp8"},
        "fp8_per_token": {"quantizer": X, "format": "fp8", "granularity": "per_token", "dynamic": True},
        "fp8_1x128": BLOCK_INPUT,
        "int8": {"quantizer": X, "format": "int8"},
        "int8_per_token": {"quantizer": X, "format": "int8", "granularity": "per_token", "dynamic": True},
        **{name: {"quantizer": X, "format": name} for name in ("nvfp4", "mxfp8", "mxfp4")},
    }
    allowed = {(product.weight.name, product.input.name) for product in PRODUCTS}
    assert {weight for weight, _ in allowed} == set(layers) and {x for _, x in allowed} == set(inputs)
    for weight, x in itertools.product(layers, inputs):
        both = recipe(layers[weight], inputs[x])
        if (weight, x) in allowed:
            configs = resolve(both, names(W, X)).configs
            assert [format_of(config).name for config in configs.values()] == [weight, x]
        else:
            with pytest.raises(RecipeError, match="no target multiplies"):
                resolve(both, names(W, X))


def test_activations_have_blocks_of_one_row() -> None:
    with pytest.raises(RecipeError, match="blocks of 128 rows are for weights, those of activations are"):
        recipe({**BLOCK_WEIGHT, "quantizer": X})


@pytest.mark.parametrize("kind", ["output_quantizer", "q_bmm_quantizer"])
def test_what_is_no_operand_of_a_linear_is_not_rotated(kind: str) -> None:
    rules = recipe({"quantizer": "a.*", "format": "fp8", "rotate": True})
    with pytest.raises(RecipeError, match=f"`rotate` is for the weight and input of a linear, not for {kind}"):
        resolve(rules, names(f"a.{kind}"))


def test_a_reason_is_told_with_what_the_rule_decided() -> None:
    rules = recipe(
        {"quantizer": "*.{weight,input}_quantizer", "format": "nvfp4"},
        {"quantizer": "a.*", "format": "fp8", "why": "first"},
        {"quantizer": "*", "enable": False, "module_class": "Conv2d", "why": "second"},
    )
    assert [str(n) for n in resolve(rules, names(W, X, "a.c.weight_quantizer", "d.weight_quantizer")).notices] == [
        "rules[1]: 2 modules fp8 (a.b, a.c): first",
        "rules[2]: the glob '*' with module_class 'Conv2d' matches nothing in this model",
    ]
    off = [*names(W, X, "a.b.output_quantizer", module_class="torch.nn.Conv2d"), *names("d.weight_quantizer")]
    assert [str(n) for n in resolve(rules, off).notices][1:] == ["rules[2]: 1 module not quantized (a.b): second"]
    unformatted = [*names("a.n.output_quantizer", module_class="torch.nn.Conv2d"), *names(W)]
    assert len(resolve(recipe(rules.rules[0].model_dump(), rules.rules[2].model_dump()), unformatted).notices) == 0


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (QuantizerConfig("fp8"), None),
        (QuantizerConfig("int8", "per_channel"), None),
        (QuantizerConfig("fp8", "per_token", dynamic=True), None),
        (QuantizerConfig("nvfp4", "per_block", (1, 16), dynamic=True), None),
        (QuantizerConfig("fp8", "per_block", (128, 128)), None),
        (
            QuantizerConfig("fp8", "per_block", (64, 64), source="r.yaml:3"),
            "r.yaml:3: not supported yet: per_block fp8",
        ),
        (QuantizerConfig("fp8", dynamic=True), "dynamic per_tensor scales"),
    ],
)
def test_what_this_version_cannot_run(config: QuantizerConfig, reason: str | None) -> None:
    found = unsupported(config)
    assert found is None if reason is None else reason in str(found)


def test_a_name_that_is_no_quantizer() -> None:
    with pytest.raises(ValueError, match=r"'a\.b\.weight' does not end in a quantizer's name"):
        QuantizerName("a.b.weight")


def test_a_rule_can_be_for_what_a_layer_is_in_the_graph() -> None:
    """A patch embedding is a linear there, and a convolution in the model."""
    rules = recipe(
        {"quantizer": "*.weight_quantizer", "format": "fp8"},
        {"quantizer": "*", "operator": "convolution", "enable": False},
    )
    owner = "torch.nn.modules.conv.Conv2d"
    found = [QuantizerName(f"{n}.weight_quantizer", owner, n) for n in ("linear", "convolution", "norm")]
    result = resolve(rules, [*found, QuantizerName("unknown.weight_quantizer", owner)])
    assert list(result.configs) == ["linear.weight_quantizer", "norm.weight_quantizer", "unknown.weight_quantizer"]
    assert list(result.disabled) == ["convolution.weight_quantizer"]
    nothing = resolve(rules, found[:1]).notices
    assert [n.message for n in nothing] == ["the glob '*' with operator 'convolution' matches nothing in this model"]


def test_a_rule_knows_every_kind_of_the_table() -> None:
    kinds = {row.kind for row in OPERATORS.values() if row.operands}
    assert kinds == set(get_args(get_args(Rule.model_fields["operator"].annotation)[0]))
