"""The regular expressions of strangers: what `re` matches is matched, in bounded time."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.checkpoint.formats import regexes
from qcompile.checkpoint.formats.compressed_tensors_reader import CompressedTensorsReader
from qcompile.checkpoint.formats.regex_parts import Match
from qcompile.checkpoint.formats.regexes import Clock, Regex
from qcompile.errors import CheckpointError

EXPERT = "model.layers.11.mlp.experts.127.up_proj"


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    quantifiers = st.sampled_from(["*", "+", "?", "*?", "{2}", "{0,2}", "{1,3}"])
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("(?:{0[0]}|{0[1]})".format),
        st.tuples(inner, quantifiers).map("({0[0]}){0[1]}".format),
        st.tuples(st.sampled_from(["(?={})", "(?!{})", "(?i:{})"]), inner).map(lambda p: p[0].format(p[1])),
    )


LEAVES = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\b", "^", "$", "ab*", "[ab]+b", "(?<=a)", "(?<!ab)"]
PATTERNS = st.recursive(st.sampled_from(LEAVES), _grown, max_leaves=8)


@settings(deadline=None)
@given(pattern=PATTERNS, text=st.text("abA.\n", max_size=8))
def test_matches_are_those_of_re(pattern: str, text: str) -> None:
    expected, regex = re.match(pattern, text) is not None, Regex(pattern)
    assert regex.matches(text) == expected
    assert (Match(text).ends(regex._tree, 0) != 0) == expected  # whichever way is taken for short ones


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        (r"(.*\.)?layers\.\d+\.mlp\.experts\.\d+\.up_proj$", EXPERT, True),
        (r"^(?!.*experts).*proj$", EXPERT, False),
        (r"(a|aa)+$", "a" * 60 + "b", False),
        (r"(.*)*Q", EXPERT, False),
        (r"(?:a?){60}a{60}", "a" * 60, True),
        (r"(((((a{1000}){1000}){1000}){1000}){1000})", EXPERT, False),
        (r"(\w+\.?)+!", EXPERT, False),
        (r".*.*.*.*.*.*.*.*Q$", EXPERT, False),
    ],
)
def test_patterns_of_exponential_time(pattern: str, name: str, expected: bool) -> None:
    assert Regex(pattern).matches(name) is expected


@pytest.mark.parametrize(
    ("pattern", "name", "message"),
    [
        ("(", EXPERT, "is no regular expression: error: missing"),
        ("a{99999999999}", EXPERT, "is no regular expression: OverflowError"),
        ("(" * 499 + ")" * 499, EXPERT, "has at most 100 groups"),
        ("x" * 1_001, EXPERT, "has at most 1000 characters"),
        (r"(a*)*\1b", "a" * 60, "takes too long to match"),
        (r"(?:.*.*)*x", "a" * 5_000, "takes too long to match"),
    ],
)
def test_what_is_refused(pattern: str, name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Regex(pattern).matches(name)
    assert len(str(caught.value)) < 500


def test_all_matches_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regexes, "MOST_SECONDS", 0.0)
    with pytest.raises(CheckpointError, match="the regular expressions take more than 0 s"):
        for _ in range(1_000):
            Clock().matches(Regex("(.*)*x"), EXPERT)


def test_a_list_has_a_limit() -> None:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}
    config = {"format": "naive-quantized", "config_groups": {"g": group}}
    names = [f"model.layers.{i}.mlp" for i in range(5_000)]
    assert CompressedTensorsReader({**config, "ignore": names}).scheme(names[-1]) is None
    with pytest.raises(CheckpointError, match="5000 regular expressions in one list are more than 1000"):
        CompressedTensorsReader({**config, "ignore": [f"re:{name}" for name in names]})
