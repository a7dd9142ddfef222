"""README.md and its fellows: what they name exists, commands parse, numbers are today's."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

PAGES = ["README.md", "RESULTS.md", "checkpoints/tiny/README.md"]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
COMMANDS = sorted({
    line.strip()
    for line in TEXTS["README.md"].replace("\\\n", " ").splitlines()
    if re.match(r"\s*(\.venv/bin/)?python \w+\.py", line)
})  # fmt: skip


def test_line_counts_are_right():
    rows = re.findall(r"^\| \W*(\w+\.py)\b[^|]*\|\s*([\d,]+)\s*\|", TEXTS["README.md"], re.M)
    assert sorted(name for name, _ in rows) == [f"{module}.py" for module in MODULES]
    for name, lines in rows:
        counted = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert int(lines.replace(",", "")) == counted, name


def has(thing, attribute: str) -> bool:
    """Of a module or class; of a class also what its fields and its __init__ set."""
    fields = getattr(thing, "__dataclass_fields__", {})
    set_inside = getattr(getattr(thing, "__init__", None), "__code__", None)
    return (hasattr(thing, attribute) or attribute in fields
            or attribute in getattr(set_inside, "co_names", ()))  # fmt: skip


def test_every_name_of_the_tables_exists():
    names = re.findall(rf"`((?:{'|'.join(MODULES)})\.(?!py\b)[A-Za-z_][\w.]*)", TEXTS["README.md"])
    assert len(names) > 15
    for name in names:
        module, *attributes = name.split(".")
        thing = importlib.import_module(module)
        for attribute in attributes:
            assert has(thing, attribute), name
            thing = getattr(thing, attribute, None)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_commands_exists(command, run_main):
    """The command's own --help names its flags, in this process."""
    _, script, *words = shlex.split(command, comments=True)
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    stage = words[:first]  # a stage of training, a kind of evaluation, or paths
    code, said, _ = run_main(importlib.import_module(script.removesuffix(".py")), *stage, "--help")
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert code in (0, None) and all(re.search(rf"{flag}\b", said) for flag in flags), flags


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", TEXTS[page]):
        assert ((ROOT / page).parent / target).exists(), target
