"""A recipe as YAML, with every import resolved."""

from __future__ import annotations

import yaml

from qcompile.recipe.schema import Recipe


def expanded_yaml(recipe: Recipe) -> str:
    """The recipe as a file without imports; a comment above each rule has its index and where it was written."""
    data = recipe.model_dump(mode="json", exclude_unset=True)
    rules = data.pop("rules")
    lines = [yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True) + "rules:"]
    for index, (rule, item) in enumerate(zip(recipe.rules, rules, strict=True)):
        text = yaml.safe_dump(item, sort_keys=False, width=1000, default_flow_style=True, allow_unicode=True)
        lines += [f"# rules[{index}], {' '.join(str(rule.where).split())}", f"- {text.strip()}"]
    return "\n".join(lines) + "\n"
