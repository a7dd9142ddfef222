"""lab/files.py: users' JSONL and folders of captioned pictures, what is skipped of them and why."""

import json
import os

import pytest
from conftest import complaint
from PIL import Image

import data
from lab import files

RABBIT = [{"image": "a.png"}, {"text": "What is this?"}, {"text": "a rabbit", "output": True}]
TEXTS = [{"text": "in"}, {"text": "out", "output": True}]


@pytest.fixture
def home(tmp_path):
    """A folder with the pictures a.png to d.png."""
    for i, name in enumerate("abcd"):
        Image.new("RGB", (20, 16), (60 * i, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def write_lines(path, *rows) -> str:
    """A jsonl file of segments; what is bytes is a line as it is."""
    lines = [r if isinstance(r, bytes) else json.dumps({"segments": r}).encode() for r in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def opened(path) -> list[list]:
    """All examples, each as (text or the red of a picture, is it output)."""
    dataset = files.open(str(path))
    examples = [data.read_images(dataset.example(i), 16) for i in range(len(dataset))]
    red = lambda s: s.content.getpixel((0, 0))[0] if s.is_image else s.content
    return [[(red(s), s.output) for s in segments] for segments in examples]


def told(capsys) -> tuple[str, list[int]]:
    """The line on a source, and how many rows each line on a reason is about."""
    first, *reasons = capsys.readouterr().out.splitlines()
    assert all(line.startswith("  ") and len(line) < 400 for line in reasons)
    return first, sorted(int(line.split()[0]) for line in reasons)


# --- JSONL ---------------------------------------------------------------------------------------


def test_lines_are_conversations_whose_images_are_named_from_the_files_folder(home, monkeypatch):
    path = write_lines(home / "own.jsonl", RABBIT, TEXTS)
    monkeypatch.chdir("/")
    wanted = [(0, False), ("What is this?", False), ("a rabbit", True)]
    assert opened(path) == [wanted, [("in", False), ("out", True)]]


def test_blank_lines_a_byte_order_mark_and_windows_line_ends_do_not_matter(home):
    row = json.dumps({"segments": RABBIT}).encode()
    path = home / "own.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n \n" + row)
    assert len(opened(path)) == 2 and opened(path)[0] == opened(path)[1]


BAD = [b'{"segments": [', b'{"segments": [{"text": "\xff"}]}', b"[" * 50_000, b'{"segment": []}']
BAD += [[], [None, *TEXTS], TEXTS[:1], TEXTS[1:]]  # no output, no input
BAD += [[*TEXTS, {"text": "a", "ouput": True}], [*TEXTS, {"text": "a", "output": "yes"}]]
for wrong in (" \n", "\ud800", 5, None):
    BAD.append([{"text": wrong}, *TEXTS])
for wrong in ("missing.png", "", "\ud800.png", "a\0.png", "a" * 5000, "own.jsonl", 5):
    BAD.append([{"image": wrong}, *TEXTS])
BAD.append([{"text": "a", "image": "a.png"}, *TEXTS])


@pytest.mark.parametrize("row", BAD, ids=range(len(BAD)))
def test_a_row_that_cannot_be_used_is_skipped_and_said(home, capsys, row):
    path = write_lines(home / "own.jsonl", row, RABBIT)
    assert len(files.open(path)) == 1
    assert told(capsys) == (f"{path}: 1 examples, 1 skipped", [1])


def test_nesting_of_any_depth_is_skipped(home):
    """Also near the limit of Python's stack, where it can be read, and is shown in a message."""
    nested = [b'{"segments": [{"text": %s%s}]}' % (b"[" * n, b"]" * n) for n in range(900, 1000, 3)]
    assert len(files.open(write_lines(home / "own.jsonl", RABBIT, *nested))) == 1


def test_a_line_for_each_reason_says_how_many_and_the_first_places(home, capsys):
    missing = [[{"image": f"missing {i}.png"}, *TEXTS] for i in range(5)]
    path = write_lines(home / "own.jsonl", RABBIT, *missing, b"", b"{", b"{")
    files.open(path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{path}: 1 examples, 7 skipped"
    assert lines[1].startswith("  5 skipped (line 2, line 3, line 4): ")
    assert lines[2].startswith("  2 skipped (line 8, line 9): ") and len(lines) == 3


def test_the_pass_reads_no_pixels_and_holds_no_text(home, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("were read"))
    dataset = files.open(write_lines(home / "own.jsonl", *[RABBIT] * 50))
    assert dataset.places.itemsize * len(dataset) == 400


# --- Folders of captioned pictures ---------------------------------------------------------------


def test_captions_stand_beside_pictures_under_endings_of_any_case(home, capsys):
    (home / "in" / "it").mkdir(parents=True)
    (home / "b.png").rename(home / "in" / "it" / "000.PNG")
    (home / "in" / "it" / "000.TXT").write_text("a fox")
    (home / "c.caption").write_text("a hare")
    (home / "d.Caption").write_text("not this")
    (home / "d.txt").write_text("a bear")
    wanted = [[("a hare", False), (120, True)], [("a bear", False), (180, True)]]
    assert opened(home) == [*wanted, [("a fox", False), (60, True)]]
    assert told(capsys) == (f"{home}: 3 examples, 1 skipped", [1])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_caption_may_have_several_lines_and_any_mark(home, encoding):
    (home / "b.txt").write_bytes("ein grüner\r\nHase \r\n".encode(encoding))
    assert opened(home) == [[("ein grüner\nHase", False), (60, True)]]


def test_a_hub_folder_has_its_captions_in_metadata(home, capsys):
    """jsonl and csv, each in its own folder; what they do not name may have a caption beside it."""
    for name, inner in (("b", "train"), ("c", "test")):
        (home / inner).mkdir()
        (home / f"{name}.png").rename(home / inner / f"{name}.png")
    rows = [{"file_name": "b.png", "text": "a fox"}, {"file_name": "b.png"}, {"text": "alone"}]
    lines = [json.dumps(row) for row in rows] + ["[]", ""]
    (home / "train" / "metadata.jsonl").write_text("\n".join(lines))
    table = '\ufefffile_name,text\r\nc.png,"a hare,\r\nbrown"\r\ngone.png,a bear\r\n'
    (home / "test" / "metadata.csv").write_bytes(table.encode())
    (home / "d.txt").write_text("a bear")
    wanted = [[("a hare,\nbrown", False), (120, True)], [("a fox", False), (60, True)]]
    assert opened(home) == [*wanted, [("a bear", False), (180, True)]]
    # without caption: b's second row and a.png; no name; no object; a missing picture
    assert told(capsys) == (f"{home}: 3 examples, 5 skipped", [1, 1, 1, 2])


ODD = ["no caption", "empty caption", "a folder", "a pipe", "no UTF-8", "no picture", "no image"]


@pytest.mark.parametrize("what", ODD)
def test_a_caption_or_a_picture_that_cannot_be_used_is_said(home, capsys, what):
    for name in "bcd":
        (home / f"{name}.txt").write_text("a fox")
    caption = home / "a.txt"
    if what == "a folder":
        caption.mkdir()
    elif what == "a pipe":
        os.mkfifo(caption)
    elif what == "no picture":
        (home / "a.png").rename(caption)
    elif what != "no caption":
        caption.write_bytes({"empty caption": b"\n", "no UTF-8": b"\xff"}.get(what, b"a fox"))
    if what == "no image":
        (home / "a.png").write_bytes(b"\x89PNG")
    assert len(files.open(home)) == 3
    assert told(capsys) == (f"{home}: 3 examples, 1 skipped", [1])


# --- What is none of these -----------------------------------------------------------------------

FORMS = [("llava", "x", b'[\n{"conversations": []}]'), ("storystream", "x", b'{"captions"')]
FORMS += [("parquet", "x", b"PAR1"), ("parquet", "", b""), ("tar", "", b"")]


@pytest.mark.parametrize("kind, name, content", [*FORMS, ("instructpix2pix", "", b"")])
def test_another_form_comes_with_the_command_that_converts_it(home, kind, name, content):
    inside = {"instructpix2pix": "prompt.json", "tar": "0.tar", "parquet": "0.parquet"}
    (home / (name or inside[kind])).write_bytes(content)
    assert f"lab.formats {kind} {home / name} " in complaint(lambda: files.open(home / name))


@pytest.mark.parametrize("content", [b"", b"a fox\n{}\n", b"\x89PNG\r\n\0", b'{"segments": []}'])
def test_what_is_no_data_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert str(tmp_path / "x.json") in complaint(lambda: files.open(tmp_path / "x.json"))
    assert str(tmp_path) in complaint(lambda: files.open(tmp_path))
    assert "missing" in complaint(lambda: files.open(tmp_path / "missing"))


def test_data_opens_paths_by_this_file(home):
    train, held_out = data.open_dataset(write_lines(home / "own.jsonl", RABBIT, TEXTS))
    assert len(train) == len(held_out) == 1
