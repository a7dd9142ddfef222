"""checkpoint.py: fields and their ranges, our layout, filling a module, writing, and what command
lines share. The Hub's layout: test_hub.py; what is refused at a command line: test_errors.py."""

import argparse
import dataclasses
import json
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, complaint, edit_json, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import CONFIG, MODEL, Generation, open_checkpoint, setting
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

# --- Fields and their ranges ---------------------------------------------------------------------


@dataclass
class Fields:
    size: int = 3
    share: float = setting(0.5, "of all", float, 0, 1)
    rate: float = 1e-3
    limit: int | None = setting(None, "at most", int, 0, 9)
    kind: str = setting("a", "of two", "a", "b")
    widths: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = setting((0.9, 0.99), "of AdamW", float, 0, 1)
    words: list[str] = setting(list, "known", str)
    name: str = "x"
    on: bool = False


WRONG = dict(size=(0, -1, True, "3", 3.0, None, 2**24 + 1, 10**400, []), limit=(-1, 10, "1", 2.0))
WRONG |= dict(share=(-0.1, 1.1, float("nan"), float("inf"), "1", None, False), kind=("c", None, 1))
WRONG |= dict(rate=(0.0, -1.0, float("inf"), 10**400), pair=([0.9, "x"], 0.9, [2.0, 0.5]))
WRONG |= dict(widths=((), [], 3, "12", [1, "2"], [0], None), words=("word", [1], ["\ud800"]))
WRONG |= dict(name=(1, None, "\ud800"), on=(1, "yes", None))


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG.items() for v in values])
def test_a_field_of_another_type_or_range_is_named(name, value):
    message = complaint(lambda: checkpoint.check(Fields, {name: value}))
    assert message.startswith(f"{name} is ") and "want" in message and len(message) < 200


def test_good_fields_are_taken_and_lists_become_tuples():
    given = dict(size=2**24, share=1, limit=0, kind="b", widths=[3], pair=[1, 0.5])
    fields = checkpoint.build(Fields, given | dict(words=["é", "a b"], name="新", on=True), "here")
    assert fields.widths == (3,) and fields.pair == (1, 0.5) and fields.words == ["é", "a b"]
    assert checkpoint.build(Fields, {}, "here") == Fields()
    message = complaint(lambda: checkpoint.build(Fields, dict(size=0, kind="c"), "here"))
    assert message.startswith("here: ") and "size is 0" in message and "kind is 'c'" in message


def test_a_section_that_is_none_names_its_source():
    for section in ([], None, 3, "text", {"sise": 3}, {3: 3}):
        assert "here" in complaint(lambda: checkpoint.build(Fields, section, "here"))  # noqa: B023


def test_every_field_of_the_configs_has_a_type_that_is_checked():
    for kind in (OrthusConfig, VQVAEConfig, Generation):
        for f in dataclasses.fields(kind):
            message = complaint(lambda: checkpoint.check(kind, {f.name: object()}))  # noqa: B023
            assert f.name in message


# --- Our layout ----------------------------------------------------------------------------------

SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=2, vocab_size=64, num_codes=8, latent_channels=4, head_width=16)
SIZES |= dict(head_blocks=1, latents_per_image=4, eoi_id=12, boi_id=13, sep_id=14, image_id=15)
VAE = VQVAEConfig(8, 8, (1, 1, 1), 1, 4, 8, 8)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A model of ours with its autoencoder."""
    directory = tmp_path / "saved"
    randomise(Orthus(OrthusConfig(**SIZES))).save_pretrained(directory)
    fields = dataclasses.asdict(VAE)
    checkpoint.write(directory, {"vae": fields}, vae=randomise(VQVAE(VAE)).state_dict())
    return directory


def rewrite(path: Path, change) -> None:
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_a_directory_is_opened_once_and_says_what_it_lacks(saved):
    opened = open_checkpoint(saved)
    assert open_checkpoint(opened) is opened
    assert VQVAE.from_pretrained(opened).config == VAE
    for name, lacks in (
        ("tokenizer", lambda: opened.tokenizer),
        ("data", lambda: opened.section("data")),
    ):
        message = complaint(lacks)
        assert name in message and str(saved) in message


def test_a_run_stands_for_its_newest_save(saved, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    assert "nothing" in complaint(lambda: open_checkpoint(run))
    for step in (90, 1000):
        (run / f"step-{step:08d}").mkdir()
        (run / f"step-{step:08d}" / CONFIG).write_bytes((saved / CONFIG).read_bytes())
    (run / "step-x").mkdir()
    assert open_checkpoint(run).directory.name == "step-00001000"


@pytest.fixture
def sharded(saved) -> Path:
    """The model in three shards with an index, as the Hub has large ones."""
    tensors = load_file(saved / MODEL)
    files = {k: f"model-{i % 3}.safetensors" for i, k in enumerate(tensors)}
    for file in set(files.values()):
        save_file({k: t.clone() for k, t in tensors.items() if files[k] == file}, saved / file)
    (saved / MODEL).unlink()
    (saved / f"{MODEL}.index.json").write_text(json.dumps({"weight_map": files}))
    return saved


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "", 3, "model-9"])
def test_shards_are_read_by_their_index_from_the_same_folder_alone(sharded, file):
    model = Orthus(OrthusConfig(**SIZES))
    assert checkpoint.read_tensors(sharded / MODEL).keys() == model.state_dict().keys()
    save_file({"norm.weight": torch.ones(16)}, sharded.parent / "x")  # is there, but not to be read
    index = sharded / f"{MODEL}.index.json"
    edit_json(index, lambda c: c["weight_map"].update({"norm.weight": file}))
    message = complaint(lambda: checkpoint.read_tensors(sharded / MODEL))
    assert str(sharded) in message and ("weight_map" in message or "model-9" in message)


def test_what_the_index_and_the_shards_do_not_agree_on_is_named(sharded):
    (sharded / "model-1.safetensors").unlink()
    assert "model-1" in complaint(lambda: Orthus.from_pretrained(sharded))
    save_file({"surprise": torch.ones(1)}, sharded / "model-1.safetensors")
    message = complaint(lambda: Orthus.from_pretrained(sharded))
    assert "unexpected surprise" in message and "missing" in message


# --- Filling a module ----------------------------------------------------------------------------


def test_all_that_does_not_fit_is_listed(saved):
    def change(tensors):
        del tensors["layers.0.mlp.up_proj.weight"]
        tensors["layers.1.surprise.weight"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(64, 15)
        tensors["norm.weight"] = torch.ones(16, dtype=torch.int64)
        tensors["embed_tokens.weight"][3, 3] = torch.nan
        tensors["layers.1.mlp.down_proj.weight"][0, 0] = -torch.inf

    rewrite(saved / MODEL, change)
    message = complaint(lambda: Orthus.from_pretrained(saved))
    found = ["missing layers.0.mlp.up_proj.weight", "unexpected layers.1.surprise.weight"]
    found += ["lm_head.weight has shape [64, 15]", "norm.weight holds torch.int64"]
    found += ["embed_tokens.weight holds", "layers.1.mlp.down_proj.weight holds"]
    assert all(said in message for said in found)


def test_tensors_are_mapped_and_cast_only_when_asked(saved):
    halves = {name: tensor.half() for name, tensor in load_file(saved / MODEL).items()}
    checkpoint.write_tensors(saved / MODEL, halves)
    assert {p.dtype for p in Orthus.from_pretrained(saved).parameters()} == {torch.float16}
    model = Orthus.from_pretrained(saved, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    module = nn.Linear(2, 2, device="meta")
    tensors = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    checkpoint.assign(module, tensors, "here")
    assert module.weight.data_ptr() == tensors["weight"].data_ptr()


# --- Writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_file_appears_when_it_is_whole(tmp_path, error):
    path = tmp_path / "a"
    path.write_text("old")
    for keep in (False, True):
        with pytest.raises(error), checkpoint.whole_file(path, keep) as file:
            file.write(b"new")
            file.flush()
            assert path.read_text() == "old"
            raise error
        assert path.read_text() == "old" and (tmp_path / "a.part").exists() == keep
    with checkpoint.whole_file(path) as file:
        file.write(b"new")
    assert path.read_text() == "new" and not (tmp_path / "a.part").exists()


def test_links_are_replaced_and_not_followed(tmp_path):
    target = tmp_path / "precious"
    target.write_text("kept")
    for name in ("a.json", "a.json.part"):
        (tmp_path / name).symlink_to(target)
    checkpoint.write_json(tmp_path / "a.json", {"a": 1})
    assert target.read_text() == "kept" and not (tmp_path / "a.json").is_symlink()
    assert checkpoint.read_json(tmp_path / "a.json") == {"a": 1}


def test_a_full_disk_is_named_and_leaves_the_old_file(saved, monkeypatch):
    tensors, before = load_file(saved / MODEL), (saved / MODEL).read_bytes()

    def full(*args, **kwargs):
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=f"{MODEL}.*No space left"):
        checkpoint.write_tensors(saved / MODEL, tensors)
    assert (saved / MODEL).read_bytes() == before and not list(saved.glob("*.part"))
    with pytest.raises(OSError, match="a.json"):
        checkpoint.write_json(saved / "nowhere" / "a.json", {})


def test_a_model_is_written_over_the_file_it_is_mapped_from(saved):
    model = Orthus.from_pretrained(saved)
    wanted = {name: t.clone() for name, t in model.state_dict().items()}
    model.save_pretrained(saved)
    again = Orthus.from_pretrained(saved).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in wanted.items())
    assert "vae" in open_checkpoint(saved).config  # the other section stays


def test_written_files_are_as_readable_as_the_umask_says(saved):
    (saved / "plain").touch()
    assert len({stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}) == 1


@pytest.mark.parametrize("content", [b'{"a": 1}', b"\n\x0e"])
def test_a_tokenizer_is_named_by_what_it_is(saved, content):
    checkpoint.write(saved, {}, tokenizer=content)
    name = "tokenizer.json" if content[:1] == b"{" else "tokenizer.model"
    assert open_checkpoint(saved).tokenizer == saved / name


def test_a_directory_has_one_process_until_it_dies(tmp_path, monkeypatch):
    code = (
        f"import checkpoint, pathlib, time\nwith checkpoint.lock(pathlib.Path({str(tmp_path)!r})):"
    )
    code += "\n    print('in', flush=True)\n    time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()

    def enter():
        with checkpoint.lock(tmp_path):
            pass

    message = complaint(enter)
    assert str(tmp_path) in message and str(other.pid) in message
    with monkeypatch.context() as patch:  # where the system has no locks
        patch.setattr(checkpoint, "fcntl", None)
        enter()
    other.kill()
    other.wait()
    other.stdout.close()
    enter()
    enter()


# --- Command lines -------------------------------------------------------------------------------


def parsed(*args: str, names=None) -> argparse.Namespace:
    parser = checkpoint.Parser(prog="p")
    checkpoint.add_flags(parser, Fields, names)
    return parser.parse_args(args)


def test_flags_follow_the_fields():
    line = "--size 7 --share 0.5 --limit 0 --kind b --widths 1 2 3 --pair 1 0.5 --name y --no-on"
    args = parsed(*line.split())
    assert (args.size, args.share, args.limit, args.kind, args.on) == (7, 0.5, 0, "b", False)
    assert (args.widths, args.pair, args.name) == ([1, 2, 3], [1.0, 0.5], "y")
    assert set(vars(parsed()).values()) == {None}  # what is not given is None
    assert vars(parsed(names=["size"])) == {"size": None}


def test_a_bad_flag_is_one_line_and_exit_code_2(capsys):
    bad = ["--size 0", "--size x", "--size 1.5", "--share nan", "--share 2", "--limit 10"]
    for args in [*bad, "--kind c", "--pair 1", "--widths 0", "--unknown 3"]:
        with pytest.raises(SystemExit) as stop:
            parsed(*args.split())
        out, said = capsys.readouterr()
        assert (stop.value.code, out, said.count("\n")) == (2, "", 1)
        assert said.startswith("p: error: ") and args.split()[0] in said


ERRORS = [  # what happens, exit code, what is said
    (KeyboardInterrupt(), 130, "stopped"),
    (ValueError("a\n  b"), 2, "p: error: a b"),
    (OSError(28, "No space", "x"), 2, "x"),
    (RecursionError("deep"), 2, "deep"),
    (torch.OutOfMemoryError("memory"), 2, "memory"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "utf-8"),
]


@pytest.mark.parametrize("error, code, said", ERRORS)
def test_what_a_user_gets_wrong_is_one_line(monkeypatch, capsys, error, code, said):
    def action():
        raise error

    monkeypatch.setattr(sys, "argv", ["folder/p"])
    with pytest.raises(SystemExit) as stop:
        checkpoint.command_line(action, "stopped")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (code, "", 1) and said in err
