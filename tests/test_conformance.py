"""Every family of checkpoints against logits and patterns that the reference implementation made."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments" / "benchmarks"))
import conformance


@pytest.mark.parametrize("case", conformance.cases())
def test_logits_patterns_and_folded_scores_are_those_of_the_reference(case):
    for kind, error in conformance.errors(case).items():
        assert error <= 1e-4, kind


def test_every_family_has_a_checkpoint():
    assert {case.split("_")[0] for case in conformance.cases()} == {name.split("_")[0] for name in conformance.FAMILIES}
