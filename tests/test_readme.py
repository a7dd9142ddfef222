"""README.md and its fellows: commands parse, names exist, quoted lines stand in the code."""

import importlib
import re
import shlex

import pytest
from conftest import ROOT

PAGES = [
    "README.md",
    "checkpoints/tiny/README.md",
    *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md")),
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
LINES = [line.strip() for line in README.replace("\\\n", " ").splitlines()]
COMMAND = r"(?:\.venv/bin/)?(?:python(?: -m (lab\.\w+)| (\w+)\.py)|torchrun .*?-m (lab\.\w+))\b(.*)"
COMMANDS = sorted({line for line in LINES if re.match(COMMAND, line)})
QUOTED = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_is_something_to_check():
    assert len(COMMANDS) > 8 and len(QUOTED) > 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_the_commands_exists(command, run_main):
    """The command's own --help names its flags, in this process."""
    lab, top, distributed, rest = re.match(COMMAND, command).groups()
    words = shlex.split(rest, comments=True)
    first = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    module = importlib.import_module(lab or top or distributed)
    code, said, _ = run_main(module, *words[:first], "--help")  # after a stage, or a kind
    flags = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert code in (0, None) and said, command
    assert all(re.search(rf"(?<![\w-]){flag}(?![\w-])", said) for flag in flags), (flags, said)


def test_specs_of_data_name_functions():
    for module, name in re.findall(r"\b(lab\.\w+):(\w+)", README):
        assert callable(getattr(importlib.import_module(module), name)), name


@pytest.mark.parametrize("block", QUOTED)
def test_quoted_lines_stand_in_the_code_one_after_the_other(block):
    squeeze = lambda text: "\n".join(line.strip() for line in text.strip().splitlines())
    files = [*ROOT.glob("*.py"), *ROOT.glob("lab/*.py"), ROOT / "tests" / "reference.py"]
    assert any(squeeze(block) in squeeze(path.read_text()) for path in files), block


def test_every_name_of_the_tables_exists():
    names = re.findall(rf"`((?:{'|'.join(MODULES)})\.(?!py\b)[A-Za-z_][\w.]*)", README)
    assert names
    for name in names:
        module, *attributes = name.split(".")
        thing = importlib.import_module(module)
        for attribute in attributes:
            assert hasattr(thing, attribute), name
            thing = getattr(thing, attribute)


def test_every_file_at_the_top_is_in_the_reading_order():
    assert [name for name in MODULES if f"{name}.py" not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_linked_files_exist(page):
    for target in re.findall(r"\]\((?!http|#)([^)#\s]+)", TEXTS[page]):
        assert ((ROOT / page).parent / target).exists(), target
