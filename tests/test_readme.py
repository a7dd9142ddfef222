"""README.md: what it names exists, its commands parse, its numbers are today's."""

import functools
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


@functools.cache
def help_of(*command: str) -> str:
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_commands_exists(command):
    _, script, *words = shlex.split(command)
    stage = words[:1] if script in ("train.py", "evaluate.py") else []  # or kind of evaluation
    flags = {word for word in words if word.startswith("--")}
    said = help_of(str(ROOT / script), *stage)
    assert all(re.search(rf"{flag}\b", said) for flag in flags), flags


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
