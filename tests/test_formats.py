"""lab/formats.py: a generated fixture of every format with good rows and odd ones: what becomes of
them, and how many are skipped for which reasons."""

import io
import json
import tarfile

import pytest
from conftest import complaint
from PIL import Image
from test_files import opened, told

from lab import files, formats


def picture(red: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (red, 0, 0)).save(file, kind)
    return file.getvalue()


@pytest.fixture
def home(tmp_path):
    """A folder `in` with the pictures a.png to d.png."""
    (tmp_path / "in").mkdir()
    for i, name in enumerate("abcd"):
        (tmp_path / "in" / f"{name}.png").write_bytes(picture(60 * i))
    return tmp_path


def converted(capsys, kind: str, source, **options) -> tuple[list, list[int]]:
    """Convert -> the examples as lab.files opens them, all, and the numbers of what was skipped."""
    out = source.parent / "new" / "out.jsonl"
    formats.convert(kind, str(source), str(out), **options)
    first, reasons = told(capsys)
    examples = opened(out)
    assert first == f"{source}: {len(examples)} examples, {sum(reasons)} skipped"
    assert told(capsys) == (f"{out}: {len(examples)} examples, 0 skipped", [])
    return examples, reasons


# --- LLaVA ---------------------------------------------------------------------------------------

ASK, SAY = ("human", "What?"), ("gpt", "A fox.")


def llava(*turns, **more) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in turns]} | more


IN, OUT = ("What?", False), ("A fox.", True)
KIND, KINDLY = ("system", "Be kind."), ("Be kind.", False)
B, C, D = (60, False), (120, False), (180, False)
PICK, LISTED = ("human", "<image> or <image>"), ["b.png", "c.png", "d.png"]
TALK = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A fox."}]
GOOD = [  # rows, and what becomes of each
    (llava(("human", "<image>\nWhat?"), SAY, image="b.png", id=7), [B, IN, OUT]),
    (llava(("human", "What?\n<image>"), SAY, image="b.png"), [IN, B, OUT]),
    (llava(ASK, SAY, ASK, SAY, image="b.png"), [B, IN, OUT, IN, OUT]),
    (llava(ASK, SAY), [IN, OUT]),
    (llava(ASK, KIND, SAY, image=None), [KINDLY, IN, OUT]),
    (llava(KIND, ASK, SAY, image=LISTED), [KINDLY, B, C, D, IN, OUT]),
    (llava(PICK, ("gpt", "<image>"), images=LISTED), [B, ("or", False), C, (180, True)]),
    ({"messages": TALK}, [IN, OUT]),
]
ODD = [  # by reason
    [llava(("human", "<image>"), SAY), llava(("human", "<image><image>"), SAY, image="a.png")],
    [llava(ASK, SAY, video="a.mp4"), llava(("human", "<video>What?"), SAY)],
    [llava(ASK, ("tool", "4")), llava(ASK, ("gpt", None)), llava((["human"], "What?"), SAY)],
    [llava(ASK, SAY, image="gone.png"), llava(ASK, SAY, image="a" * 30)],
    [llava(ASK), llava(SAY, ASK), llava(), llava(KIND)],
    [llava(ASK, ("gpt", " "))],
    [{"id": 5}, {"conversations": [5]}, {"conversations": "What?"}],
    [5, [], "{", None],
    [llava(ASK, SAY, image=5), llava(ASK, SAY, image="https://x.org/a.png")],
]


@pytest.mark.parametrize("layout", ["list", "lines"])
def test_llava(home, capsys, layout):
    rows = [row for row, _ in GOOD] + [row for rows in ODD for row in rows]
    text = json.dumps(rows, indent=1)
    if layout == "lines":
        text = "\r\n".join(map(json.dumps, rows)) + "\n{\n"
    (home / "in" / "x.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    examples, reasons = converted(capsys, "llava", home / "in" / "x.json")
    assert examples == [wanted for _, wanted in GOOD]
    assert reasons == sorted([*map(len, ODD), *[1] * (layout == "lines")])


# --- Stories, edits ------------------------------------------------------------------------------


@pytest.mark.parametrize("frames, chunks", [(21, [10, 10]), (12, [10, 2]), (2, [2])])
def test_stories_come_in_chunks_whose_first_frame_is_given(home, capsys, frames, chunks):
    for i in range(frames):
        (home / "in" / f"{i}.png").write_bytes(picture(i))
    names, texts = [f"{i}.png" for i in range(frames)], [f"frame {i}" for i in range(frames)]
    odd = [(["a.png"], ["one"]), (["a.png"] * 2, ["one"]), (["a.png"] * 2, [1, 2]), (None, None)]
    rows = [dict(images=i, captions=c, id=1) for i, c in [(names, texts), *odd, (["x"] * 2, "ab")]]
    (home / "story.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = str(home / "in")
    found, reasons = converted(capsys, "storystream", home / "story.jsonl", images=images)
    wanted = []
    for begin, size in zip((0, 10), chunks):
        wanted.append([(begin, False), (f"frame {begin}", False)])
        for i in range(begin + 1, begin + size):
            wanted[-1] += [(f"frame {i}", True), (i, True)]
    assert found == wanted and reasons == [1, 4]


def test_edits_are_pairs_of_one_folder_and_their_instruction(home, capsys):
    prompts = [dict(input="a fox", edit="go", output="a red fox"), dict(instruction="go")]
    prompts += [dict(caption="go"), dict(input="a fox", output="a red fox"), None, dict(edit="go")]
    for i, prompt in enumerate(prompts):
        folder = home / "edits" / "shard" / str(i)
        folder.mkdir(parents=True)
        for j in (0, 1) if i < 5 else (0,):
            name = f"{i}_{j}.{'JPG' if i == 1 else 'png'}"
            (folder / name).write_bytes(picture(100 * j, "JPEG" if i == 1 else "PNG"))
        if prompt is not None:
            (folder / "prompt.json").write_text(json.dumps(prompt))
    (home / "edits" / "shard" / "0" / "12_0.webp").write_bytes(picture(0, "WEBP"))
    examples, reasons = converted(capsys, "instructpix2pix", home / "edits")
    assert [[round(x, -1) if x != "go" else x for x, _ in e] for e in examples] == [
        [0, "go", 100]
    ] * 3
    assert [output for _, output in examples[0]] == [False, False, True]
    assert reasons == [1, 1, 2]  # no plain instruction, no prompt.json, half a pair


# --- Archives ------------------------------------------------------------------------------------


def write_tar(path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_tar_shards(home, capsys):
    said = lambda text: json.dumps(
        {"caption": text, "url": "https://x.org", "status": "?"}
    ).encode()
    first = {"0.jpg": picture(0, "JPEG"), "0.txt": b"a\r\nfox", "0.json": said("no"), "1.txt": b"x"}
    first |= {"2.json": said("a hare"), "3.json": said(None), "2.PNG": picture(60)}
    first |= {"3.png": picture(0), "4.png": b"\x89PNG", "4.txt": b"x", "5.json": said("x")}
    (home / "tars").mkdir()
    write_tar(home / "tars" / "0.tar", first)
    write_tar(home / "tars" / "1.tar", {"0.png": picture(120), "0.txt": b"a bear"})
    (home / "tars" / "2.tar").write_bytes(b"no tar")
    examples, reasons = converted(capsys, "tar", home / "tars")
    fox, hare, bear = [[("a\nfox", False), (0, True)], [("a hare", False), (60, True)], "a bear"]
    assert examples == [fox, hare, [(bear, False), (120, True)]]
    assert reasons == [1, 1, 1, 2]  # a broken image, no caption, no tar, no image
    assert len(list((home / "new" / "out_images").iterdir())) == 3


def test_a_tar_that_is_cut_gives_what_stands_before(home, capsys):
    members = {f"{i}.{kind}": picture(60) for i in range(3) for kind in ("png", "txt")}
    members = {k: b"a fox" if k.endswith("txt") else v for k, v in members.items()}
    write_tar(home / "x.tar", members)
    (home / "x.tar").write_bytes((home / "x.tar").read_bytes()[:4000])
    examples, reasons = converted(capsys, "tar", home / "x.tar")
    assert len(examples) == 2 and sum(reasons) > 0


def test_parquet(home, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name: str, rows: list[dict]) -> None:
        parquet.write_table(pa.Table.from_pylist(rows), home / "tables" / f"{name}.parquet")

    hub = lambda red: {"bytes": picture(red), "path": "x.png"}
    (home / "tables").mkdir()
    edit = dict(original_image=hub(0), edit_prompt="go", edited_image=hub(60), original_prompt="x")
    write("edits", [edit, edit | {"edited_image": None}, edit | {"edit_prompt": None}])
    named = {"bytes": None, "path": "d.png"}
    write("hub", [dict(image=hub(60), text="b"), dict(image=named, text="d"), dict(image=None)])
    write("raw", [dict(image=picture(0), caption=["a", "A"]), dict(image=b"", caption=["a"])])
    write("talk", [llava(ASK, SAY, images=[hub(120)])])
    write("urls", [dict(url="https://x.org/a.png", caption="a")])
    (home / "tables" / "x.parquet").write_bytes(b"PAR1")
    images = str(home / "in")
    examples, reasons = converted(capsys, "parquet", home / "tables", images=images)
    pairs = [
        [(text, False), (red, True)] for text, red in (("b", 60), ("d", 180), ("a", 0), ("A", 0))
    ]
    edited, talk = [(0, False), ("go", False), (60, True)], [(120, False), IN, OUT]
    assert examples == [edited, *pairs, talk]
    assert reasons == [1] * 6  # half a pair, no instruction, no image, no bytes, a URL, no parquet


def test_without_pyarrow_one_line_says_what_to_install(home, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (home / "x.parquet").write_bytes(b"PAR1")
    out = str(home / "out.jsonl")
    assert "pyarrow" in complaint(lambda: formats.convert("parquet", str(home / "x.parquet"), out))


# --- The command line ----------------------------------------------------------------------------


@pytest.mark.parametrize("more", [["--strict"], ["--images", "/missing"], ["onnx"], None])
def test_a_conversion_that_fails_is_one_line_and_leaves_nothing(home, run_main, more):
    write_tar(home / "x.tar", {"0.png": picture(0), "0.txt": b"a", "1.txt": b"x"})
    kept, out = sorted(home.iterdir()), home / "out.jsonl"
    call = ["tar", home / "x.tar", out, *(more or [])]
    if more is None:  # nothing in it can be used
        call = ["llava", home / "x.tar", out]
    code, said, error = run_main(formats, *call)
    assert (code, said, error.count("\n")) == (2, "", 1)
    assert sorted(home.iterdir()) == kept


def test_what_is_there_already_stays(home, run_main):
    write_tar(home / "x.tar", {"0.png": picture(0), "0.txt": b"a"})
    assert run_main(formats, "tar", home / "x.tar", home / "y.jsonl")[0] == 0
    assert len(files.open(home / "y.jsonl")) == 1
    assert run_main(formats, "tar", home / "x.tar", home / "y.jsonl")[0] == 2
    assert len(files.open(home / "y.jsonl")) == 1
