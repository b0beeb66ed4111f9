"""That the mutation run deletes what it says, and that each guard's fault is asserted by some test.

`make mutate` runs all mutants; here a few of them, so that a broken run is noticed at once.
"""

import ast
import random

import pytest

from broker.ledger.faults import Fault
from mutate.equivalent import EQUIVALENT
from mutate.mutants import guards, mutants
from mutate.run import CHECKOUT, all_mutants, found_by, judge_all, modules, scratch_copy

SOURCE = """
def rule(state, a, b):
    if a < b <= 9 or not a:
        refuse(a)
    if b:
        return
    state.put(a, b)
"""


def test_each_guard_condition_edge_return_and_write_is_deleted_once():
    assert [(mutant.kind, mutant.removed) for mutant in mutants("rules.py", SOURCE)] == [
        ("guard", "if a < b <= 9 or not a"),
        ("return", "if b"),
        ("write", "state.put(a, b)"),
        ("edge", "the edge of a < b <= 9"),
        ("edge", "the edge of a < b <= 9"),
        ("condition", "a < b <= 9"),
        ("condition", "not a"),
        ("condition", "the first link of a < b <= 9"),
        ("condition", "the last link of a < b <= 9"),
    ]


def test_a_mutant_differs_from_its_source_in_that_one_thing():
    first, *_, last = mutants("rules.py", SOURCE)
    assert "refuse" not in first.source
    assert "return" in first.source
    assert "a < b or" in last.source


def test_every_fault_is_named_by_a_guard_and_asserted_by_a_plain_test():
    rules = "".join(path.read_text(encoding="utf-8") for path in modules())
    opening = (CHECKOUT / "broker" / "ledger" / "opening.py").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (CHECKOUT / "tests/unit/ledger").glob("test_*.py"))
    for fault in Fault:
        assert f"Fault.{fault.name}" in rules + opening, f"no guard raises {fault.name}"
        assert f"Fault.{fault.name}" in tests, f"no test of tests/unit/ledger asserts {fault.name}"


def test_no_known_equivalent_has_outlived_its_reason():
    assert set(EQUIVALENT) <= {mutant.name for mutant in all_mutants()}


def test_every_rule_module_has_its_guards():
    for path in modules():
        source = path.read_text(encoding="utf-8")
        raising = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
        assert guards(source) or not raising, path


def test_the_tests_run_against_the_scratch_copy(tmp_path):
    copy = scratch_copy(tmp_path / "copy")
    (copy / "broker" / "ledger" / "merkle.py").write_text("raise ImportError('the copy')", encoding="utf-8")
    assert found_by(copy) is not None


@pytest.mark.parametrize("seed", range(2))
def test_a_few_mutants_are_found(seed, tmp_path):
    chosen = random.Random(seed).sample([one for one in all_mutants() if one.name not in EQUIVALENT], 4)
    assert [verdict.mutant.name for verdict in judge_all(chosen, tmp_path, 1) if verdict.found_by is None] == []
