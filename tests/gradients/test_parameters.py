"""Which parameters count, by the patterns of their names."""

from __future__ import annotations

from rapidin.gradients.parameters import exact_pattern, matches


def test_the_pattern_of_one_parameter_matches_no_other() -> None:
    for name in ("a.weight", "experts[0].weight", "*.bias"):
        assert matches(name, [exact_pattern(name)])
        assert not matches(f"b.{name}", [exact_pattern(name)])
        assert not matches(f"{name}_g", [exact_pattern(name)])
