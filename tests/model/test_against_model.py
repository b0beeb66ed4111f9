"""The real rules against the model: whatever is said to both, they answer alike and hold the same books.

Quick in `make test`; with DENGEN_FULL=1 hypothesis and the seeds go on for much longer.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from model.author import KINDS, Author, SeededChoices
from model.drive import Pair, assert_blocks_do_not_matter, found, talk

FULL = os.environ.get("DENGEN_FULL") == "1"
SEEDS = 400 if FULL else 12
BATCHES = 400


class DrawnChoices:
    """Decisions by hypothesis, which can shrink them."""

    def __init__(self) -> None:
        self.data: st.DataObject | None = None

    def number(self, low: int, high: int) -> int:
        assert self.data is not None
        return self.data.draw(st.integers(low, high))


class BothLedgers(RuleBasedStateMachine):
    """Each rule says one batch to both; after each the answers and all rows are compared (`Pair.say`)."""

    def __init__(self) -> None:
        super().__init__()
        self.choices = DrawnChoices()
        self.author = Author(self.choices)
        self.pair = Pair()
        found(self.pair)

    @rule(data=st.data(), kind=st.sampled_from(sorted(set(KINDS))))
    def one_kind(self, data: st.DataObject, kind: str) -> None:
        self.choices.data = data
        batch = self.author.batch(self.pair.model, kind)
        if batch is not None:
            self.pair.say(batch)

    @rule(data=st.data())
    def mixed(self, data: st.DataObject) -> None:
        self.choices.data = data
        talk(self.author, self.pair, 3)

    def teardown(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="dengen-model-"))
        try:
            assert_blocks_do_not_matter(
                self.pair.raws, self.pair.step.state_hash, SeededChoices(len(self.pair.raws)), folder
            )
        finally:
            shutil.rmtree(folder)


BothLedgers.TestCase.settings = settings(max_examples=1_500 if FULL else 50, stateful_step_count=60 if FULL else 30)
TestBothLedgers = BothLedgers.TestCase


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_long_talk_leaves_both_with_the_same_books(seed, tmp_path):
    choices = SeededChoices(seed)
    pair = Pair()
    found(pair)
    talk(Author(choices), pair, BATCHES)
    assert_blocks_do_not_matter(pair.raws, pair.step.state_hash, choices, tmp_path)
