"""What reads bytes off a wire, fuzzed for a short time (`make fuzz` goes on); and that fuzzing finds things."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.__main__ import MAX_GROWN_BLOCKS, REPLAYS, fuzz_by_hypothesis, grown_blocks
from fuzz.targets import TARGETS, Broken, feed_stream, parse_message
from support.telegrams import P1_TELEGRAM

from meter_agent.framing.p1 import P1Framer, parse_telegram
from meter_agent.framing.telegram import MalformedTelegram

TESTS = Path(__file__).parents[1]
SECONDS = 60 if os.environ.get("DENGEN_FULL") == "1" else 2


@pytest.mark.parametrize("name", TARGETS)
def test_no_bytes_do_harm(name, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-m", "fuzz", name, "--runs", "1000000000", "--seconds", str(SECONDS)],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS + 60,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Done" in finished.stdout


class Hoarder(P1Framer):
    held_bytes = 100_000


class Deaf(P1Framer):
    def feed(self, data):
        return ()


@pytest.mark.parametrize(("framer", "reason"), [(Hoarder, "holds 100000"), (Deaf, "not found")])
def test_a_framer_that_keeps_too_much_or_loses_the_next_telegram_is_found(framer, reason):
    with pytest.raises(Broken, match=reason):
        feed_stream(b"\x00abc", framer, parse_telegram, P1_TELEGRAM, 8_198)


def test_any_exception_but_the_declared_one_is_found():
    def parse(data):
        raise IndexError if data == b"\x01" else MalformedTelegram("as declared")

    parse_message(b"\x00", parse)
    with pytest.raises(IndexError):
        parse_message(b"\x01", parse)


def test_memory_that_grows_from_input_to_input_is_found():
    kept = []
    inputs = [b"a", b"b", b"c"]
    assert grown_blocks(lambda data: kept.append(bytearray(data)), inputs) >= len(inputs) * REPLAYS > MAX_GROWN_BLOCKS
    assert grown_blocks(lambda data: None, inputs) <= MAX_GROWN_BLOCKS


def test_without_atheris_hypothesis_does_what_it_can(capsys):
    assert fuzz_by_hypothesis("sml", 200, 60) == 0
    assert "Done 200 runs by hypothesis" in capsys.readouterr().err
