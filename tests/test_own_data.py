"""data.py: users' own files, in the five formats, as examples to train on and to hold out."""

import json
import os

import numpy as np
import pytest
from conftest import complaint, grey_levels
from PIL import Image
from test_data import bad_images, noisy

import data

RABBIT = {"segments": [{"image": "a.png"}, {"text": "What is this?"},
                       {"text": "a rabbit", "output": True}]}  # fmt: skip
TEXTS = [{"text": "in"}, {"text": "out", "output": True}]


@pytest.fixture
def home(tmp_path):
    """A folder with the pictures a.png to d.png."""
    for i, name in enumerate("abcd"):
        Image.new("RGB", (80, 64), (60 * i, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def write_lines(path, *rows) -> str:
    """A jsonl file; what is bytes is a line as it is."""
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def many(number: int, text: str = "text") -> list[dict]:
    return [{"segments": [{"text": f"{text} {i}"}, TEXTS[1]]} for i in range(number)]


def story(images: list, captions: list) -> dict:
    return {"id": 102, "images": images, "captions": captions, "orders": [0]}


def llava(*turns, **more) -> dict:
    return {"conversations": [{"from": f, "value": v} for f, v in turns]} | more


def open_all(*paths, **options) -> list[list]:
    """All examples of both sides, each as (text or the red of a picture, is it output)."""
    train, held_out = data.open_dataset([str(p) for p in paths], 16, **options)
    sides = [train, held_out] if len({*train.rows, *held_out.rows}) > 1 else [train]
    return [told(side.example(i)) for side in sides for i in range(len(side))]


def told(segments) -> list[tuple]:
    return [(s.content.getpixel((0, 0))[0] if s.is_image else s.content, s.output)
            for s in segments]  # fmt: skip


# --- Formats ---


def test_our_lines_are_conversations_of_input_and_output(home, monkeypatch):
    path = write_lines(home / "own.jsonl", RABBIT)
    monkeypatch.chdir("/")  # images are named from the file's folder, wherever one stands
    assert open_all(path) == [[(0, False), ("What is this?", False), ("a rabbit", True)]]


def test_a_folder_of_captioned_pictures(home):
    (home / "b.txt").write_bytes("\ufeffein grüner Hase\n".encode())
    (home / "c.txt").write_text("a fox")
    for name in "ad":
        (home / f"{name}.png").unlink()
    wanted = [[("a fox", False), (120, True)], [("ein grüner Hase", False), (60, True)]]
    assert sorted(open_all(home)) == wanted
    (home / "in" / "it").mkdir(parents=True)
    for name in ("c.txt", "c.png"):
        (home / name).rename(home / "in" / "it" / name)
    (home / "in" / "alone.txt").write_text("no picture")
    assert sorted(open_all(home)) == wanted
    with pytest.raises(ValueError, match="'in/alone.png'"):
        data.open_dataset([str(home)], 16, strict=True)


def test_llavas_human_asks_and_gpt_answers(home):
    turns = [("human", "<image>\nWhat is this?"), ("gpt", "A fox."), ("human", "Really?"),
             ("gpt", "Yes.")]  # fmt: skip
    rows = [llava(*turns, id=7, image="b.png"), llava(*turns[2:], id=8)]
    (home / "llava.json").write_text(json.dumps(rows, indent=1))
    answers = [("Really?", False), ("Yes.", True)]
    wanted = [[(60, False), ("What is this?", False), ("A fox.", True), *answers], answers]
    assert sorted(open_all(home / "llava.json"), key=len, reverse=True) == wanted


def test_edits_are_pairs_of_one_folder(home):
    for folder, seeds in (("0001", (12, 3)), ("0002", (5,))):
        (home / folder).mkdir()
        prompt = {"input": "a fox", "edit": f"make it {folder}", "output": "a red fox"}
        (home / folder / "prompt.json").write_text(json.dumps(prompt))
        for i, seed in enumerate(seeds):
            for j in (0, 1):
                picture = Image.new("RGB", (16, 16), (100 * i + 50 * j, 0, 0))
                picture.save(home / folder / f"{seed}_{j}.jpg")
    wanted = [[(0, False), ("make it 0001", False), (50, True)],
              [(100, False), ("make it 0001", False), (150, True)],
              [(0, False), ("make it 0002", False), (50, True)]]  # fmt: skip
    found = [[(x if isinstance(x, str) else round(x, -1), output) for x, output in example]
             for example in open_all(home)]  # JPEG may be a level off  # fmt: skip
    assert sorted(found, key=str) == sorted(wanted, key=str)


@pytest.mark.parametrize("frames, chunks",
                         [(30, [10] * 3), (31, [10] * 3), (12, [10, 2]), (2, [2])])  # fmt: skip
def test_stories_come_in_chunks_whose_first_frame_is_given(home, frames, chunks):
    for i in range(frames):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(home / f"{i}.png")
    row = story([f"{i}.png" for i in range(frames)], [f"frame {i}" for i in range(frames)])
    found = sorted(open_all(write_lines(home / "story.jsonl", row)), key=lambda story: story[0][0])
    wanted = []
    for begin, size in zip(range(0, frames, 10), chunks, strict=False):
        wanted.append([(begin, False), (f"frame {begin}", False)])
        for i in range(begin + 1, begin + size):
            wanted[-1] += [(f"frame {i}", True), (i, True)]
    assert found == wanted


def test_images_may_lie_in_another_folder(home):
    (home / "lists").mkdir()
    path = write_lines(home / "lists" / "own.jsonl", RABBIT)
    assert "image" in complaint(lambda: open_all(path))
    assert open_all(path, images=str(home))[0][0] == (0, False)
    (home / "lists" / "b.txt").write_text("a fox")
    assert open_all(home / "lists", format="captions", images=str(home))[0][1] == (60, True)


def test_an_ending_in_capitals_is_that_of_a_picture_too(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "A.JPG")
    (tmp_path / "A.txt").write_text("a fox")
    assert open_all(tmp_path) == [[("a fox", False), (0, True)]]


def test_pictures_of_edits_may_lie_in_another_folder(tmp_path):
    for folder in ("prompts/1", "pictures/1"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "prompts/1/prompt.json").write_text('{"edit": "make it red"}')
    for j in (0, 1):
        Image.new("RGB", (16, 16)).save(tmp_path / f"pictures/1/5_{j}.jpg")
    found = open_all(tmp_path / "prompts", images=str(tmp_path / "pictures"))
    assert found == [[(0, False), ("make it red", False), (0, True)]]


def test_paths_of_several_formats_are_one_dataset(home):
    (home / "b.txt").write_text("a fox")
    path = write_lines(home / "own.jsonl", RABBIT)
    assert len(open_all(path, home)) == 2


def test_all_texts_are_told_for_the_tokenizer(home):
    train, _ = data.open_dataset([write_lines(home / "own.jsonl", RABBIT)], 16)
    assert train.texts() == ["What is this?", "a rabbit"]


def test_a_fingerprint_is_of_texts_and_of_pictures(home):
    """By it latents that were encoded ahead are known to be of these files."""
    row, seen = write_lines(home / "own.jsonl", RABBIT), []
    for picture in (None, noisy(80, 64), None):
        if picture:
            picture.save(home / "a.png")
        seen.append(data.open_dataset([row], 16)[0].fingerprint())
    assert seen[0] != seen[1] == seen[2]
    write_lines(home / "own.jsonl", {"segments": [{"image": "a.png"}, *TEXTS]})
    assert data.open_dataset([row], 16)[0].fingerprint() != seen[2]


def test_pictures_are_turned_and_brought_to_the_resolution(home):
    photo, exif = noisy(80, 64), Image.Exif()
    exif[0x0112] = 6
    photo.save(home / "a.png", exif=exif)
    train, _ = data.open_dataset([write_lines(home / "own.jsonl", RABBIT)], 32)
    (picture,) = (s.content for s in train.example(0) if s.is_image)
    turned = photo.transpose(Image.Transpose.ROTATE_270)
    assert picture.size == (32, 32)
    assert grey_levels(picture, data.to_image(data.to_tensor(turned, 32))) == 0


# --- What cannot be used ---


OWN = {
    "no JSON": b'{"segments": [',
    "no UTF-8": b'{"segments": [{"text": "\xff"}]}',
    "nested deeply": b"[" * 100_000,
    "a list": b"[]",
    "no segments": {"segment": TEXTS},
    "segments are none": {"segments": None},
    "a segment is none": {"segments": [None, *TEXTS]},
    "nothing": {"segments": []},
    "no output": {"segments": TEXTS[:1]},
    "no input": {"segments": TEXTS[1:]},
    "empty text": {"segments": [{"text": " \n"}, *TEXTS]},
    "half a letter": {"segments": [{"text": "\ud800"}, *TEXTS]},
    "half a letter in a name": {"segments": [{"image": "\ud800.png"}, *TEXTS]},
    "text and image": {"segments": [{"text": "a", "image": "a.png"}, *TEXTS]},
    "neither": {"segments": [{}, *TEXTS]},
    "a slip of the pen": {"segments": [*TEXTS, {"text": "a", "ouput": True}]},
    "output is no truth value": {"segments": [*TEXTS, {"text": "a", "output": "yes"}]},
    "text is a number": {"segments": [{"text": 5}, *TEXTS]},
    "image is missing": {"segments": [{"image": "missing.png"}, *TEXTS]},
    "image has no name": {"segments": [{"image": ""}, *TEXTS]},
    "image has a zero in its name": {"segments": [{"image": "a\0.png"}, *TEXTS]},
}
STORIES = {
    "too few captions": story(["a.png", "b.png"], ["one"]),
    "a single frame": story(["a.png"], ["one"]),
    "no frame": story([], []),
    "captions are numbers": story(["a.png", "b.png"], [1, 2]),
    "an empty caption": story(["a.png", "b.png"], ["one", " "]),
    "a missing frame": story(["a.png", "missing.png"], ["one", "two"]),
}
LLAVA = {
    "no image for <image>": llava(("human", "<image> What?"), ("gpt", "A fox.")),
    "no <image> for an image": llava(("human", "What?"), ("gpt", "A fox."), image="a.png"),
    "two <image>": llava(("human", "<image><image> What?"), ("gpt", "A fox."), image="a.png"),
    "somebody else": llava(("human", "What?"), ("system", "A fox.")),
    "no answer": llava(("human", "What?")),
    "an empty answer": llava(("human", "What?"), ("gpt", ""), ("human", "So?"), ("gpt", "Yes.")),
    "an answer without question": llava(("gpt", "A fox."), ("human", "What?")),
    "no turns": {"id": 5},
    "no row": 5,
}
BAD = [(kind, row) for kind, rows in (("jsonl", OWN), ("storystream", STORIES), ("llava", LLAVA))
       for row in rows.values()]  # fmt: skip
NAMES = [*OWN, *STORIES, *LLAVA]


@pytest.mark.parametrize("kind, row", BAD, ids=NAMES)
def test_a_row_that_cannot_be_used_is_skipped_and_strict_stops_at_it(home, capsys, kind, row):
    good = {"jsonl": RABBIT, "storystream": story(["a.png", "b.png"], ["one", "two"]),
            "llava": llava(("human", "What?"), ("gpt", "A fox."))}[kind]  # fmt: skip
    path = str(home / "own")
    if kind == "llava":
        (home / "own").write_text(json.dumps([good, row]))
    else:
        write_lines(home / "own", good, row)
    place = "entry 2" if kind == "llava" else "line 2"
    assert len(open_all(path)) == 1
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == f"{path!r} ({kind}): 1 examples, 1 skipped"
    assert second.startswith(f"  1 skipped ({place}): ") and len(second) < 350
    second.encode()  # can be printed
    message = complaint(lambda: open_all(path, strict=True))
    assert path in message and place in message


def test_one_line_for_each_reason_with_the_first_three_places(home, capsys):
    missing = [{"segments": [{"image": f"missing {i}.png"}, *TEXTS]} for i in range(5)]
    path = write_lines(home / "own.jsonl", RABBIT, *missing, b"", b"{")
    open_all(path)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert not said.err  # the pass was too short for a bar
    assert lines[0] == f"{path!r} (jsonl): 1 examples, 6 skipped"
    assert lines[1].startswith("  5 skipped (line 2, line 3, line 4): image ")
    assert "missing 0.png" in lines[1]
    assert lines[2].startswith("  1 skipped (line 8): it is not valid JSON")
    assert lines[3] == "1 examples to train on, 1 held out"


def test_nesting_of_any_depth_is_skipped(home):
    """Also near the limit of Python's stack, where it can be read, and is shown in a message."""
    nested = (b'{"segments": [{"text": %s%s}]}' % (b"[" * n, b"]" * n) for n in range(900, 1000))
    assert len(open_all(write_lines(home / "own.jsonl", RABBIT, *nested))) == 1


def test_pictures_that_cannot_be_trained_on_are_skipped(home, capsys):
    """What is only damaged in its pixels shows when it is used."""
    (home / "bad").mkdir()
    bad = [p for p in map(str, bad_images(home / "bad")) if not p.endswith("cut.png")]
    frames = [noisy(16, 16), noisy(24, 16).resize((16, 16))]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        frames[0].save(home / name, save_all=True, append_images=frames[1:])
        bad.append(name)
    frames[0].save(home / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    rows = [{"segments": [{"image": p}, *TEXTS]} for p in [*bad, "phone.jpg"]]
    assert len(open_all(write_lines(home / "own.jsonl", *rows))) == 1
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) < 400  # however long a name
    assert f"1 examples, {len(bad)} skipped" in said
    assert f"3 skipped (line {len(rows) - 3}, " in said and "animated" in said


def test_the_pass_does_not_read_pixels(home, monkeypatch):
    path = write_lines(home / "own.jsonl", RABBIT)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were read"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", Image.Image.load)
    assert len(data.open_dataset([path], 16)[0]) == 1


def test_a_picture_that_fails_later_gives_way_to_the_next_example(home, capsys):
    rows = [{"segments": [{"image": f"{n}.png"}, {"text": n}, TEXTS[1]]} for n in "abcd"]
    train, _ = data.open_dataset([write_lines(home / "own.jsonl", *rows)], 16)
    number = len(train)
    names = [told(train.example(i))[1][0] for i in range(number)]
    (home / f"{names[1]}.png").write_bytes(noisy(64, 64).tobytes()[:90])
    capsys.readouterr()
    for _ in range(2):
        again = [told(train.example(i))[1][0] for i in range(number)]
        assert again == [names[0], names[2 % number], *names[2:]]
    warning = capsys.readouterr().out
    assert warning.count("\n") == 1 and f"{names[1]}.png" in warning
    for name in "abcd":
        (home / f"{name}.png").unlink()
    assert "any more" in complaint(lambda: train.example(0))


@pytest.mark.parametrize("row", ["no caption", "empty caption", "caption is a folder",
                                 "caption is a pipe", "no UTF-8", "no picture"])  # fmt: skip
def test_captions_and_pictures_that_lack_each_other(home, capsys, row):
    for name in "bcd":
        (home / f"{name}.txt").write_text("a fox")
    caption = home / "a.txt"
    {"no caption": lambda: None, "empty caption": lambda: caption.write_text("\n"),
     "caption is a folder": caption.mkdir, "caption is a pipe": lambda: os.mkfifo(caption),
     "no UTF-8": lambda: caption.write_bytes(b"\xff\xfe"),
     "no picture": lambda: (home / "a.png").rename(caption)}[row]()  # fmt: skip
    assert len(open_all(home)) == 3
    said = capsys.readouterr().out
    assert "3 examples, 1 skipped" in said and "1 skipped ('a.png'): " in said


@pytest.mark.parametrize("what", ["no prompt", "prompt is a pipe", "no edit", "no picture", "one"])
def test_folders_that_are_no_edits(home, capsys, what):
    for name in "ab":
        (home / name).mkdir()
        prompt = {} if what == "no edit" and name == "b" else {"edit": "make it red"}
        (home / name / "prompt.json").write_text(json.dumps(prompt))
        for j in (0, 1):
            noisy(16, 16).save(home / name / f"5_{j}.jpg")
    bad = home / "b"
    if "prompt" in what:
        (bad / "prompt.json").unlink()
    if "pipe" in what:
        os.mkfifo(bad / "prompt.json")
    if what in ("no picture", "one"):
        (bad / ("5_0.jpg" if what == "no picture" else "5_1.jpg")).unlink()
    assert len(open_all(home)) == 1
    assert "  1 skipped ('b'): " in capsys.readouterr().out


def test_a_caption_that_the_system_does_not_give_is_skipped(home, monkeypatch, capsys):
    for name in "abcd":
        (home / f"{name}.txt").write_text("a fox")
    read = type(home).read_bytes

    def refuse(path):
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(type(home), "read_bytes", refuse)
    assert len(open_all(home)) == 3 and "Permission denied" in capsys.readouterr().out


def write(path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def make_pipe(path) -> str:
    os.mkfifo(path)
    return str(path)


@pytest.mark.parametrize("make, words", [
    (lambda p: str(p / "missing"), "no file and no folder"),
    (lambda p: "", "no file and no folder"),
    (lambda p: "a" * 5000, "no file and no folder"),
    (lambda p: make_pipe(p / "pipe"), "no file and no folder"),
    (lambda p: "/dev/zero", "no file and no folder"),
    (lambda p: str(p), "no example of format captions"),
    (lambda p: write(p / "empty", b""), "no format that is known"),
    (lambda p: write(p / "text", b"a fox\n{}\n"), "no format that is known"),
    (lambda p: write(p / "picture", b"\x89PNG\r\n\x1a\n\0\0"), "no format that is known"),
    (lambda p: write(p / "list", b'[\n{"a": 1},\n]'), "line 3"),
    (lambda p: write(p / "deep", b"[" * 100_000), "not valid JSON"),
    (lambda p: write(p / "none", b"[]"), "no example of format llava"),
    (lambda p: write_lines(p / "bad", {"segments": []}), "give what does: 1 skipped (line 1)"),
])  # fmt: skip
def test_what_is_no_data_is_refused_in_one_line(tmp_path, make, words):
    assert words in complaint(lambda: open_all(make(tmp_path)))


@pytest.mark.parametrize("options, words", [
    ({"format": "parquet"}, "jsonl, captions, llava, instructpix2pix, storystream"),
    ({"format": "captions"}, "wants one"),
    ({"format": "instructpix2pix"}, "wants one"),
    ({"format": "llava"}, "not valid JSON"),
    ({"format": "storystream"}, "no example of format storystream"),
    ({"images": "/missing"}, "/missing"),
    ({"images": ""}, "images ''"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(home, options, words):
    path = write_lines(home / "own.jsonl", RABBIT, RABBIT)
    assert words in complaint(lambda: open_all(path, **options))
    for kind in ("jsonl", "llava", "storystream"):
        assert "wants one" in complaint(lambda kind=kind: open_all(home, format=kind))
    assert "want a list" in complaint(lambda: open_all(write(home / "a", b"{}"), format="llava"))


def test_a_damaged_first_line_does_not_hide_the_format(home):
    path = write_lines(home / "own.jsonl", b"{", b"5", RABBIT)
    assert len(open_all(path)) == 1


def test_a_byte_order_mark_does_not_matter(home):
    line = json.dumps(RABBIT).encode()
    assert len(open_all(write_lines(home / "own.jsonl", b"\xef\xbb\xbf" + line))) == 1
    row = json.dumps([llava(("human", "What?"), ("gpt", "A fox."))]).encode()
    assert len(open_all(write(home / "llava.json", b"\xef\xbb\xbf\n " + row))) == 1


# --- Held out ---


def sides(path, **options) -> tuple[set, set]:
    return tuple({e.rows[i][1] for i in range(len(e))}
                 for e in data.open_dataset([str(path)], 16, **options))  # fmt: skip


def test_one_in_twenty_is_held_out(tmp_path):
    train, held_out = sides(write_lines(tmp_path / "own.jsonl", *many(2000)))
    assert not train & held_out and len(train | held_out) == 2000
    assert 70 < len(held_out) < 130
    assert 900 < len(sides(tmp_path / "own.jsonl", share=0.5)[1]) < 1100


def test_other_rows_and_their_order_move_none_to_the_other_side(tmp_path):
    before = sides(write_lines(tmp_path / "own.jsonl", *many(200)))
    rows = np.random.default_rng(0).permutation(many(200) + many(300, "other")).tolist()
    (tmp_path / "moved").mkdir()
    after = sides(write_lines(tmp_path / "moved" / "other.jsonl", *rows))
    assert all(len(side) > 1 for side in before)
    assert before[0] <= after[0] and before[1] <= after[1]


def test_a_copy_is_on_the_side_of_its_original(tmp_path):
    train, held_out = sides(write_lines(tmp_path / "own.jsonl", *many(100), *many(100)))
    assert not train & held_out


def test_a_picture_of_another_name_is_another_example(home):
    rows = [{"segments": [{"image": f"{n}.png"}, *TEXTS]} for n in "abcd"]
    train, held_out = sides(write_lines(home / "own.jsonl", *rows), share=0.5)
    assert train and held_out and len(train | held_out) == 4


@pytest.mark.parametrize("share", [1e-9, 1.0])
@pytest.mark.parametrize("number", [2, 3])
def test_there_is_one_example_at_least_on_either_side(tmp_path, number, share):
    train, held_out = sides(write_lines(tmp_path / "own.jsonl", *many(number)), share=share)
    assert min(len(train), len(held_out)) == 1 and not train & held_out


def test_a_single_example_is_on_both_sides(tmp_path):
    path = write_lines(tmp_path / "own.jsonl", *many(1), *many(1))
    train, held_out = data.open_dataset([path], 16)
    assert len(train) == len(held_out) == 2
    assert told(held_out.example(10**9)) == [("text 0", False), ("out", True)]
