"""What users get wrong at a command line: one line on stderr that names the culprit, exit code 2,
nothing on stdout, nothing written. A row says what is done, and what the line must name."""

import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, edit_json
from PIL import Image, PngImagePlugin

import sample
import train

TINY = ROOT / "checkpoints" / "tiny"
NAN, BIG = float("nan"), 10**12


@pytest.fixture
def refused(run_main, tmp_path):
    """Asserts that a command line is refused in one line that names `wanted`."""

    def refused(module, args, wanted, flag="--output"):
        out = tmp_path / "out"
        given = [] if flag in args else [flag, out]
        code, said, warned = run_main(module, *args, *given)
        assert code == 2 and warned.count("\n") == 1, (args, warned)
        assert said == "" or module is train, (args, said)  # which says what machine it takes
        assert warned.startswith(Path(module.__file__).name) and wanted in warned, (args, warned)
        assert not out.exists() or os.listdir(out) == [".lock"], args

    return refused


# --- sample.py: flags, prompts, requests ---------------------------------------------------------

A = ("--prompt", "a star")
NUMBERS = ["--steps 0", "--steps x", "--steps 1001", "--top-p 1.5", "--temperature nan"]
NUMBERS += ["--cfg-scale inf", "--cfg-image -1", "--noise-scale -1", "--num-images 0", "--seed -1"]
NUMBERS += ["--seed 9999999999", "--batch-size 0", "--scale 65", "--dtype int8", "--stepz 5"]
FLAGS = [  # arguments, what the line must name
    ([], "--prompt"),
    (["--prompt", " "], "empty"),
    (["--prompt", "\ud800"], "ud800"),
    (["--prompt", "a star " * 400], "shorten"),
    (["--prompt", "<image>"], "<image>"),
    ([*A, "more"], "more"),
    ([*A, "--image", ""], "image"),
    ([*A, "--checkpoint", "/nowhere"], "/nowhere"),
    ([*A, "--checkpoint", __file__], __file__),
    ([*A, "--checkpoint", "some/model"], "hf download some/model"),
    ([*A, "--vae", "/nowhere"], "/nowhere"),
    ([*A, "--vae", ""], "checkpoint"),
    *(([*A, "--device", name], name) for name in ("quantum", "cuda:99", "meta", "hpu")),
    ([*A, "--min-images", "3", "--max-images", "2"], "max_images"),
    ([*A, "--min-images", "3", "--max-tokens", "40"], "--max-tokens"),
    ([*A, "--min-images", "40"], "context 512"),
    ([*A, "--output", ""], "--output"),
    ([*A, "--output", __file__ + "/deep"], __file__),
    ([*A, "--output", "a\0b"], "null"),
    ([*A, "--requests", __file__], "--requests"),
    *((["--requests", name], name) for name in ("no.jsonl", "/tmp", "/dev/zero")),
    (["--requests", __file__], "line 1"),
    (["--requests", __file__, "--num-images", "2"], "--num-images"),
]


def test_bad_arguments_of_sample(refused):
    for flag in NUMBERS:
        refused(sample, [*A, *flag.split()], flag.split()[0])
    for args, wanted in FLAGS:
        refused(sample, args, wanted)


LINES = ["{", "[" * 100_000, '{"prompt": ""}', "{}", "[1]", "null", '{"prompt": 1}', '"a star"']
LINES += [
    '{"prompt": "a", "seed": 1.5}',
    '{"prompt": "a", "seed": -1}',
    '{"prompt": "a", "sed": 3}',
]
LINES += ['{"prompt": "a", "seed": true}', '{"prompt": "a", "seed": NaN}', '{"prompt": "\\ud800"}']
LINES += ['{"prompt": "a", "images": "x.png"}', '{"prompt": "a", "images": [1]}']
LINES += ['{"prompt": "a", "images": null}', '{"prompt": "a", "images": ["x.png"]}']
LINES += ['{"prompt": "a", "images": ["\\u0000"]}', '{"prompt": "a <image>"}']


def test_bad_requests_name_their_line(refused, tmp_path):
    path = tmp_path / "requests.jsonl"
    for line in LINES:
        path.write_text('{"prompt": "a star"}\n' + line)
        refused(sample, ["--requests", path], "line 2")
    path.write_bytes(b'{"prompt": "\xff"}')
    refused(sample, ["--requests", path], "UTF-8")
    path.write_text("\n\n")
    refused(sample, ["--requests", path], str(path))
    path = tmp_path / "results.jsonl"
    path.write_text('{"prompt": "a star"}')  # which the answers would overwrite
    refused(sample, ["--requests", path, "--output", tmp_path], str(path))
    assert path.read_text() == '{"prompt": "a star"}'


def bad_images(folder: Path) -> list:
    """Files that are no images to read, and paths that are no files."""
    picture = Image.effect_noise((64, 64), 50)
    for name, size in (("huge", (13_000, 13_000)), ("long", (60_000_000, 2))):
        picture.save(folder / f"{name}.png")  # whose header says that it is large
        content = bytearray((folder / f"{name}.png").read_bytes())
        content[16:24] = struct.pack(">II", *size)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
        (folder / f"{name}.png").write_bytes(content)
    (folder / "cut.png").write_bytes((folder / "huge.png").read_bytes()[:-300])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("F", (64, 64)).save(folder / "float.tif")
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "a" * 10_000_000, zip=True)  # 10 MB when it is unpacked
    picture.save(folder / "note.png", pnginfo=note)
    os.mkfifo(folder / "fifo")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    return [*folder.iterdir(), folder / "missing", "a" * 5000]


def test_what_is_no_readable_image_is_named(refused, tmp_path):
    (tmp_path / "images").mkdir()
    for path in bad_images(tmp_path / "images"):
        refused(sample, ["--image", path], str(path))


# --- sample.py: checkpoints ----------------------------------------------------------------------

DAMAGE = {  # values of fields of config.json, by section
    "model": dict(hidden_size=[0, -1, "6", None, 64.0, 1e30, BIG, NAN, [64], 6], nonsense=[1])
    | dict(num_hidden_layers=[0, 10**7, "2"], head_blocks=[0, 10**7], num_codes=[0, 10**6])
    | dict(max_position_embeddings=[0, BIG], rms_norm_eps=[0, "x", NAN], rope_theta=[-1.0])
    | dict(swin_norm=[1, "no"], image_head=["nose", 3, None, []], vision_embedding=["nose", None])
    | dict(tau=[0.0, NAN], latent_scale=[0, NAN], num_attention_heads=[3, 0], eoi_id=[20])
    | dict(num_key_value_heads=[3], bos_id=[1, -1, 2304, 1.0], image_id=[2304, BIG])
    | dict(latents_per_image=[15, 2**20]),
    "vae": dict(resolution=[63, 0, "64"], groups=[7, 0], num_res_blocks=[10**7])
    | dict(channel_multiplier=[[], [0], "x", 3, [2**24]]),
    "generation": dict(steps=[0, 1001, "3", None, 2.5], cfg_scale=[NAN, "x", None], scale=[0, 65])
    | dict(noise_scale=[-1, "x"], unconditional=[None, 3, "\ud800"], image_first=[1, "yes"])
    | dict(interleaved=[[], {"steps": 0}, {"cfg_scale": "x"}, {"nonsense": 1}])
    | dict(max_tokens=[0, BIG], words=["abc", [1]]),
}


@pytest.fixture
def damaged(tmp_path):
    """The shipped checkpoint, its files being links."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in TINY.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_every_field_of_a_checkpoints_config_is_checked(refused, damaged):
    for section, fields in DAMAGE.items():
        for change in ({name: value} for name, values in fields.items() for value in values):
            edit_json(damaged / "config.json", lambda c: c[section].update(change))  # noqa: B023
            refused(sample, [*A, "--checkpoint", damaged], str(damaged))
            (damaged / "config.json").unlink()
            (damaged / "config.json").symlink_to(TINY / "config.json")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
WEIGHTS = "model.safetensors", "vae.safetensors"
PICKLE = pickle.dumps({"weight": [1.0]})
FILES = [  # file, what it holds instead (None: it is missing), what the line names
    *(("config.json", text, "config") for text in (b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 10**5)),
    *(("config.json", text, "damaged") for text in (b'{"model": 3, "vae": {}}', b'{"model": {}}')),
    *(("config.json", text, "config") for text in (b'{"a": ' + b"9" * 5000 + b"}", POINTER, None)),
    *((name, text, name) for name in WEIGHTS for text in (None, b"", b"\xff" * 8, POINTER, PICKLE)),
    *((name, b"\x02\0\0\0\0\0\0\0{}", "0 tensors") for name in WEIGHTS),
    *(("tokenizer.model", text, "tokenizer") for text in (None, b"", b"garbage", b"{", POINTER)),
]


def replace(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)


def test_damaged_files_of_a_checkpoint_are_named(refused, damaged):
    halves = [(name, (TINY / name).read_bytes(), name) for name in (*WEIGHTS, "config.json")]
    for name, content, wanted in FILES + [(n, c[: len(c) // 2], w) for n, c, w in halves]:
        replace(damaged, name, content)
        refused(sample, [*A, "--checkpoint", damaged], wanted)
        replace(damaged, name, None)
        (damaged / name).symlink_to(TINY / name)
    for name in (*WEIGHTS, "config.json"):
        (damaged / name).unlink()
        (damaged / name).mkdir()
        refused(sample, [*A, "--checkpoint", damaged], name)
        (damaged / name).rmdir()
        os.mkfifo(damaged / name)  # which would be waited for
        refused(sample, [*A, "--checkpoint", damaged], name)
        (damaged / name).unlink()
        (damaged / name).symlink_to(TINY / name)


def foreign(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints of other kinds, and what the line must name."""
    for name in ("meta", "meta/models/7b", "meta/tokenizer", "shard", "empty", "run"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name in ("meta/models/7b", "shard"):
        (folder / name / "params.json").write_text("{}")
    torch.save({}, folder / "meta" / "tokenizer" / "vqgan.ckpt")
    (folder / "run" / "run.json").write_text("{}")
    convert = "python -m lab.convert"
    found = [(name, convert) for name in ("meta", "shard", "meta/tokenizer")]
    found += [("meta/tokenizer/vqgan.ckpt", convert), ("empty", "config.json"), ("run", "nothing")]
    return [(folder / name, wanted) for name, wanted in found]


def test_checkpoints_of_other_kinds_are_named_with_the_command_for_them(refused, tmp_path):
    for path, wanted in foreign(tmp_path):
        refused(sample, [*A, "--checkpoint", path], wanted)
        refused(sample, [*A, "--vae", path], wanted)


# --- train.py: flags and data --------------------------------------------------------------------

TRAIN = [  # arguments, what the line must name
    *(
        ([*args.split()], args.split()[-2])
        for args in ("vae --steps 0", "vae --lr nan", "all --steps 3")
    ),
    (["dream"], "dream"),
    ([], "stage"),
    (["vae", "--image-head", "mse"], "--image-head"),  # which another stage reads
    (["base", "--init", TINY, "--image-head", "mse"], "Chameleon"),
    (["vae", "--preset", "huge"], "huge"),
    (["all", "--preset", "7b"], "7b"),
    (["vae", "--batch-size", "4", "--micro-batches", "9"], "micro"),
    (["vae", "--optimizer", "nowhere:f"], "nowhere"),
    (["vae", "--device", "quantum"], "quantum"),
    (["vae", "--resume"], "--resume"),
    (["posttrain"], "--init"),
    (["posttrain", "--init", "/nowhere"], "/nowhere"),
    *((["vae", "--data", spec], spec) for spec in ("no.jsonl", "lab.shapes:nothing", "nowhere:f")),
    *((["vae", "--data-args", args], "--data-args") for args in ("{", "[]", "3")),
    (["vae", "--data-args", '{"colour": 3}'], "colour"),
]
DATA = [  # a file of data
    *("", "{", "7", "[]", '{"segments": []}', '{"segments": 3}', '{"prompt": "a"}'),
    *('{"segments": [{"text": "a"}]}', '{"segments": [{"text": "a", "output": true}]}'),
    *('{"segments": [{"text": ""}, {"text": "b", "output": true}]}', POINTER.decode()),
    *('{"segments": [{"image": "x.png"}, {"text": "b", "output": true}]}', "\0" * 100),
]


def test_bad_arguments_of_train(refused, monkeypatch):
    monkeypatch.setattr(train.Trainer, "run", None)  # what is not refused raises here
    for args, wanted in TRAIN:
        refused(train, args, wanted, "--out")


def test_data_that_hold_no_example_are_named(refused, tmp_path):
    path, folder = tmp_path / "mine.jsonl", tmp_path / "pictures"
    folder.mkdir()
    for content in DATA:
        path.write_text(content)
        refused(train, ["posttrain", "--init", TINY, "--data", path], path.name, "--out")
    refused(train, ["posttrain", "--init", TINY, "--data", folder], folder.name, "--out")
    Image.new("RGB", (8, 8)).save(folder / "a.png")  # which has no caption
    refused(train, ["posttrain", "--init", TINY, "--data", folder], folder.name, "--out")
