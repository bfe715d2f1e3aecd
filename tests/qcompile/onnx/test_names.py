"""Module paths as the exporter writes them."""

from __future__ import annotations

import pytest
from onnx import helper

from qcompile.onnx.names import NAME_SCOPES, describe, module_path


@pytest.mark.parametrize(
    ("scopes", "path", "words"),
    [
        ("['', 'vit', 'vit.layers.0.q_proj', 'linear_3']", "vit.layers.0.q_proj", " (module 'vit.layers.0.q_proj')"),
        ("['', 'add']", "", " (root module)"),
        ("['add']", "", " (root module)"),
        ("['_empty_nn_module_stack_from_metadata_hook', 'sym_size']", None, ""),
        ("[broken", None, ""),
        (None, None, ""),
    ],
)
def test_module_path(scopes: str | None, path: str | None, words: str) -> None:
    node = helper.make_node("Add", ["a", "b"], ["c"], name="n")
    if scopes is not None:
        node.metadata_props.add(key=NAME_SCOPES, value=scopes)
    assert module_path(node) == path
    assert describe(node) == f"Add 'n'{words}"


def test_a_node_without_a_name_goes_by_its_output() -> None:
    assert describe(helper.make_node("F", [], ["c"], domain="trt")) == "trt::F 'c'"
