"""The project's frame holds: packaging is complete, the walls between the rooms stand, documents say what is there."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CODE_FOLDERS = ("broker", "meter_agent", "firmware_config", "tests/dengen_testing")
ROOMS_OF_BROKER = {"ledger", "market", "service", "certificates", "commands", "config", "cli", "database_copy"}


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def code_files() -> list[Path]:
    return sorted(path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*.py"))


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def shell_lines(document: Path) -> list[str]:
    """The command lines in a document's sh blocks, without prompts, comments and continuation."""
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", document.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").split(" #")[0].strip() for line in lines if line.strip()]


def python(*code: str) -> str:
    """What a fresh interpreter prints for these lines, run outside of the checkout."""
    finished = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], check=True, capture_output=True, text=True, cwd=os.sep, timeout=60
    )
    return finished.stdout


def test_every_package_folder_is_installed() -> None:
    folders = {str(path.parent.relative_to(ROOT)).replace("/", ".") for path in code_files()}
    found = {name.removeprefix("tests.") for name in folders}
    assert set(setup_cfg()["options"]["packages"].split()) == found


def test_every_package_folder_is_a_package() -> None:
    for folder in {path.parent for path in code_files()}:
        assert (folder / "__init__.py").exists(), f"{folder} has no __init__.py"


def test_a_built_wheel_carries_code_schemas_profiles_and_examples(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for folder in CODE_FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        + ["--wheel-dir", str(tmp_path), str(source)],
        check=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("dengen-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT)).removeprefix("tests/")
        for folder in CODE_FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".toml", ".cddl", ".yaml"} or path.name == "py.typed"
    }
    assert not expected - packed


def test_the_walls_between_the_rooms_stand() -> None:
    lint_imports = Path(sys.executable).with_name("lint-imports")
    finished = subprocess.run([lint_imports], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout[-3_000:]


def test_the_walls_name_every_room_of_the_broker() -> None:
    """A new room must be added to the contracts in setup.cfg (and here), or it would stand outside the walls."""
    found = {
        path.stem for path in (ROOT / "broker").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__", "protocol"} == ROOMS_OF_BROKER
    config = setup_cfg()
    for contract in ("protocol-is-alone", "agent-stays-small"):
        forbidden = set(config[f"importlinter:contract:{contract}"]["forbidden_modules"].split())
        assert {f"broker.{room}" for room in ROOMS_OF_BROKER} <= forbidden


def test_an_agent_loads_nothing_of_the_broker_but_the_protocol() -> None:
    names = [
        path.relative_to(ROOT).with_suffix("") for path in code_files() if path.is_relative_to(ROOT / "meter_agent")
    ]
    modules = ", ".join(".".join(name.parts) for name in names if name.stem not in ("__init__", "__main__"))
    loaded = python(f"import sys, {modules}", "print(*sys.modules)").split()
    of_broker = {name for name in loaded if name.startswith("broker.")}
    assert {name for name in of_broker if not name.startswith("broker.protocol")} == set()
    assert "broker.protocol.envelope" in of_broker


def test_the_simulated_meters_run_without_the_test_tools() -> None:
    """The demo uses them, and it installs the runtime only."""
    names = sorted(path.stem for path in (ROOT / "tests/dengen_testing/wire").glob("*.py") if path.stem != "__init__")
    imports = "import sys, " + ", ".join(f"dengen_testing.wire.{name}" for name in names)
    loaded = set(python(imports, "print(*sys.modules)").split())
    assert not loaded & {"pytest", "_pytest", "hypothesis"}


@pytest.mark.parametrize("path", code_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_public_names_are_documented(path: Path) -> None:
    """A module opens with what it is; each public class and function says what its name cannot.

    Excepted are `main`, and the rows of tables, which are described where their table is.
    """
    tree = ast.parse(path.read_text())
    if not tree.body:
        return
    assert ast.get_docstring(tree), f"{path} has no opening paragraph"
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not node.name.endswith("Row")
        and node.name != "main"
    ]
    missing = [node.name for node in public if not ast.get_docstring(node)]
    assert missing == []


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in documents():
        text = document.read_text()
        named = re.findall(r"`make ([a-z-]+)", text)
        named += [line.split()[1] for line in shell_lines(document) if re.match(r"make [a-z]", line)]
        assert set(named) <= targets, f"{document.name} names {set(named) - targets}"


def test_the_check_before_a_change_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in shell_lines(ROOT / "README.md")
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert re.search(r"^exec make (--no-print-directory )?test$", ci.read_text(), re.MULTILINE)


def test_commands_in_the_documents_exist() -> None:
    """Every `meter-agent …` and `energy-broker …` line: its subcommands answer --help."""
    commands = set()
    for document in documents():
        for line in shell_lines(document):
            words = line.removeprefix(".venv/bin/").split()
            if words and words[0] in ("meter-agent", "energy-broker"):
                subcommand = []
                for word in words[1:]:
                    if not re.fullmatch(r"[a-z][a-z-]*", word):
                        break
                    subcommand.append(word)
                commands.add((words[0], *subcommand))
    for command in sorted(commands):
        program = Path(sys.executable).with_name(command[0])
        finished = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True, timeout=60)
        assert finished.returncode == 0, f"{' '.join(command)}: {finished.stderr}"


def test_links_and_paths_in_the_documents_lead_somewhere() -> None:
    for document in documents():
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} links to {target}"
        for path in re.findall(r"`((?:broker|meter_agent|firmware_config|deploy|tests|docs)/[a-z0-9_./-]+)`", text):
            assert (ROOT / path).exists(), f"{document.name} names {path}"


def test_the_build_file_holds_only_what_setup_cfg_cannot() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())) == {"build-system", "tool"}
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]) == {"ruff"}


def test_set_up_prints_the_command_where_it_may_not_install(tmp_path: Path) -> None:
    """Nobody's user, no sudo, no mosquitto: the script says what to run, and fails."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "printf", "echo", "env"):
        found = shutil.which(name)
        if found is not None:
            (programs / name).symlink_to(found)
    (programs / "id").write_text("#!/bin/sh\necho 1000\n")
    (programs / "id").chmod(0o755)
    script = (ROOT / "deploy/setup/debian-packages").read_text().replace("/usr/sbin/mosquitto", "/nowhere/mosquitto")
    (tmp_path / "debian-packages").write_text(script)
    finished = subprocess.run(
        [programs / "sh", str(tmp_path / "debian-packages")],
        env={"PATH": str(programs)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert finished.returncode == 1
    assert (
        "apt-get update && apt-get install --yes --no-install-recommends mosquitto python3 python3-venv"
        in finished.stderr
    )


@pytest.mark.parametrize(("answer", "expected"), [("3.9", 1), ("3.11", 0)])
def test_set_up_refuses_a_python_that_is_too_old(tmp_path: Path, answer: str, expected: int) -> None:
    major, minor = answer.split(".")
    fake = tmp_path / "python-old"
    # It runs what it is given with another version in sys, as an old interpreter would.
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = -V ] && echo "Python {answer}" && exit\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({major}, {minor}); $2"\n'
    )
    fake.chmod(0o755)
    mosquitto = tmp_path / "mosquitto"
    mosquitto.write_text("#!/bin/sh\n")
    mosquitto.chmod(0o755)
    finished = subprocess.run(
        [ROOT / "deploy/setup/debian-packages"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(fake)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert finished.returncode == expected
    assert ("needs 3.11 or later" in finished.stderr) is (expected == 1)
