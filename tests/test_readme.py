"""README.md: what it names exists, its commands parse, its numbers are today's."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for line in README.replace("\\\n", " ").splitlines()
    if re.match(r"\s{4}(\.venv/bin/)?python \w+\.py", line)
]


def test_line_counts_are_right():
    rows = re.findall(r"^\| (\w+\.py) \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for name, lines in rows:
        assert int(lines) == len((ROOT / name).read_text(encoding="utf-8").splitlines()), name


def test_every_name_of_the_tables_exists():
    names = re.findall(r"`((?:orthus|vae|data|sample|train|evaluate)\.[A-Z\w.]+)`", README)
    assert len(names) > 15
    for name in names:
        module, *attributes = name.split(".")
        thing = importlib.import_module(module)
        for attribute in attributes:
            thing = getattr(thing, attribute)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_commands_exists(command):
    _, script, *words = shlex.split(command)
    command = [sys.executable, str(ROOT / script), "--help"]
    if script in ("train.py", "evaluate.py"):
        command.insert(2, words[0])  # the stage, the kind of evaluation
    done = subprocess.run(command, capture_output=True, text=True)
    flags = {word for word in words if word.startswith("--")}
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"{flag}\b", done.stdout) for flag in flags), flags


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
