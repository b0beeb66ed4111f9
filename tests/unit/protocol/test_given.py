"""What people give: files, numbers, times, hosts; what is wrong with them is one sentence."""

import argparse
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dengen_testing.certificates import Authority
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.addresses import Address, Host, Port, Seconds, Topic
from broker.protocol.command_line import not_text, time_s, whole_number
from broker.protocol.errors import KeyFileError
from broker.protocol.files import read_file, refused_by_system
from broker.protocol.mqtt_link import MqttConfig, check_files


def test_a_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    content = bytes(range(256)) * 1_000
    file.write_bytes(content)
    assert read_file(file, len(content)) == content
    with pytest.raises(OSError, match="larger than 255999 bytes") as refused:
        read_file(file, len(content) - 1)
    assert refused.value.errno == errno.EFBIG


def test_a_device_without_end_is_no_file() -> None:
    with pytest.raises(OSError, match="larger than 1000000 bytes"):
        read_file(Path("/dev/zero"), 1_000_000)


@pytest.mark.parametrize(
    ("number", "next_step"),
    [
        (errno.ENOENT, "check the path, and that its directory is there"),
        (errno.EISDIR, "give a file"),
        (errno.EEXIST, "give another name, or move it away"),
        (errno.ENOSPC, "free disk space"),
        (errno.EACCES, "who may read and write there"),
    ],
)
def test_what_the_system_refuses_names_the_path_and_the_next_step(number: int, next_step: str) -> None:
    said = refused_by_system(OSError(number, "no", "some/where"))
    assert said.startswith("some/where: no; ")
    assert said.endswith(next_step)


def test_an_error_without_a_number_speaks_for_itself() -> None:
    assert refused_by_system(OSError("the link is down")) == "the link is down"


@given(st.integers(-1_000, 1_000))
def test_whole_numbers_within_their_limits_are_read(number: int) -> None:
    if -10 <= number <= 500:
        assert whole_number(-10, 500)(str(number)) == number
    else:
        with pytest.raises(argparse.ArgumentTypeError, match=f"a whole number from -10 to 500, got '{number}'"):
            whole_number(-10, 500)(str(number))


@pytest.mark.parametrize("text", ["", "1.5", "²", "٣", "1_000", " 1", "0x10", "nan", "9" * 17, "9" * 10_000])
def test_what_is_no_whole_number_is_said_in_one_line(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a whole number of 0 or more, got") as refused:
        whole_number(0)(text)
    assert len(str(refused.value)) < 120


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("soon", "a time as 2026-01-31T00:00:00Z, got 'soon'"),
        ("2026-13-45", "a time as"),
        ("2026-01-31T00:00:00", "with its zone, for example 2026-01-31T00:00:00Z"),
        ("1969-12-31T23:59:59Z", "from 1970 on"),
        ("0001-01-01T00:00:00+14:00", "expected a time"),
        ("2" * 5_000, "a time as"),
    ],
)
def test_what_is_no_time_of_the_market_is_said(text: str, said: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        time_s(text)
    assert said in str(refused.value)


def test_a_time_counts_from_1970_in_utc() -> None:
    assert time_s("1970-01-02T01:00:00+01:00") == 86_400


def test_arguments_in_another_encoding_are_told_as_such() -> None:
    assert not_text(["run", "--name", "münchen", "a\nb"]) is None
    assert not_text(["run", b"m\xfcnchen".decode(errors="surrogateescape")]) == (
        r"'m\udcfcnchen' is not UTF-8; type it anew, or rename the file"
    )


@pytest.mark.parametrize(
    ("rule", "fine", "wrong"),
    [
        (
            Host(),
            ["localhost", "a.example.", "10.0.0.1", "::1", "fe80::1", "gateway_1", "a" * 63],
            ["", "a b", "a:1", "http://a", "a..b", "-a", "a" * 64, "a." * 127 + "a", "a@b", "münchen", '"', "a\n"],
        ),
        (Seconds(), [1, 30, 65_535], [0, -1, 65_536]),
        (
            Topic(),
            ["dengen/v1", "a", "haus/küche 1"],
            ["", "/", "a/", "/a", "a//b", "a/#", "+/a", "$SYS", "a\0", "a\n", "ü" * 101],
        ),
        (Port(), [1, 1_883, 65_535], [0, -1, 65_536, 10**30]),
        (
            Address(),
            ["127.0.0.1:26657", ":0", "[::1]:1", "node-1.example:65535"],
            ["", "a", "a:", "a:65536", "::1:1", "a b:1", '":1', "tcp://a:1", "a:1 ", "a:²"],
        ),
    ],
)
def test_hosts_ports_topics_and_addresses(rule: Any, fine: list[Any], wrong: list[Any]) -> None:
    assert [value for value in fine if rule.check(value) is not None] == []
    for value in wrong:
        assert "got" in (rule.check(value) or ""), value


@pytest.mark.parametrize(
    ("key", "spoil", "said"),
    [
        ("password_file", lambda file: file.write_bytes(b"\xff"), "not text in UTF-8; give a file with the MQTT"),
        ("password_file", lambda file: file.write_bytes(bytes(70_000)), "larger than 65535 bytes"),
        ("password_file", lambda file: file.unlink(), "No such file or directory; give a file with the MQTT password"),
        ("ca_file", lambda file: file.write_text("hello"), "no certificates in PEM"),
        ("ca_file", lambda file: file.unlink(), "check ca_file"),
        ("certificate_file", lambda file: file.write_text("hello"), "check certificate_file and key_file"),
        ("key_file", lambda file: file.unlink(), "check certificate_file and key_file"),
    ],
)
def test_a_file_of_the_mqtt_settings_that_cannot_be_used_is_named(
    key: str, spoil: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    client = authority.client("broker")
    files = {"ca_file": authority.ca_file, "certificate_file": client.certificate, "key_file": client.key}
    files["password_file"] = tmp_path / "password"
    files["password_file"].write_text("secret\n")
    config = MqttConfig(username="broker", **files)
    check_files(config)
    spoil(files[key])
    with pytest.raises(KeyFileError) as refused:
        check_files(config)
    assert said in str(refused.value)
    assert str(tmp_path) in str(refused.value)
