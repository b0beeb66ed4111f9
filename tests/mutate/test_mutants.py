"""That the mutation run deletes what it says, and that each guard's fault is asserted by some test.

`make mutate` runs all mutants; here a few of them, so that a broken run is noticed at once.
"""

import ast
import os
import subprocess
import sys

from broker.ledger.faults import Fault
from mutate.equivalent import EQUIVALENT
from mutate.mutants import guards, mutants
from mutate.run import CHECKOUT, all_mutants, modules

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
        ("edge", "edge 1 of a < b <= 9"),
        ("edge", "edge 2 of a < b <= 9"),
        ("condition", "a < b <= 9 of a < b <= 9 or not a"),
        ("condition", "not a of a < b <= 9 or not a"),
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


def test_every_mutant_has_a_name_of_its_own():
    names = [mutant.name for mutant in all_mutants()]
    assert len(set(names)) == len(names)


def test_no_known_equivalent_has_outlived_its_reason():
    assert set(EQUIVALENT) <= {mutant.name for mutant in all_mutants()}


def test_every_rule_module_has_its_guards():
    for path in modules():
        source = path.read_text(encoding="utf-8")
        raising = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
        assert guards(source) or not raising, path


def test_a_few_mutants_are_found():
    done = run_mutate("--sample", "6", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 survived" in done.stdout


def run_mutate(*options: str) -> subprocess.CompletedProcess[str]:
    """`make mutate` with these options; it forks, so it has a process of its own."""
    path = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "tests")])
    command = [sys.executable, "-m", "mutate", "--workers", "1", *options]
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
