"""checkpoint.py: fields and their ranges, reading, filling a module, writing, command lines."""

import argparse
import dataclasses
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from conftest import ROOT, complaint, randomise
from safetensors.torch import load_file, save_file
from torch import nn

import checkpoint
from checkpoint import CONFIG, MODEL, open_checkpoint, within
from orthus import Orthus, OrthusConfig
from vae import VQVAE, VQVAEConfig

# --- Fields and their ranges ---------------------------------------------------------------------


@dataclass
class Fields:
    size: int = 3
    share: float = within(0.5, 0, 1, "of all")
    rate: float = 1e-3
    limit: int | None = within(None, 0, 9)
    kind: Literal["a", "b"] = "a"
    widths: tuple[int, ...] = (1, 2)
    pair: tuple[float, float] = (0.9, 0.99)
    words: list[str] = dataclasses.field(default_factory=list)
    mix: dict[str, float] = dataclasses.field(default_factory=dict)
    name: str = "x"
    on: bool = False

    def __post_init__(self):
        checkpoint.check_fields(self)


WRONG = {
    "size": (0, -1, True, "3", 3.0, None, 2**24 + 1, 10**400, []),
    "share": (-0.1, 1.1, float("nan"), float("inf"), "1", None, False),
    "rate": (0.0, -1.0, float("inf"), 10**400),
    "limit": (-1, 10, "1", 2.0),
    "kind": ("c", None, 1),
    "widths": ((), [], 3, "12", [1, "2"], [0], None),
    "pair": ([0.9, "x"], 0.9),
    "words": ("word", [1], ("a",), ["\ud800"]),
    "mix": ([], {"a": "x"}, {"a": float("nan")}),
    "name": (1, None, "\ud800"),
    "on": (1, "yes", None),
}


@pytest.mark.parametrize("name, value", [(n, v) for n, values in WRONG.items() for v in values])
def test_a_field_of_another_type_or_range_is_named(name, value):
    message = complaint(lambda: Fields(**{name: value}))
    assert message.startswith(f"{name} is ") and "want" in message and len(message) < 200


def test_good_fields_are_taken_and_lists_become_tuples():
    fields = Fields(size=2**24, share=1, limit=0, widths=[3], pair=[1, 2], words=["é", "a b"],
                    mix={"a": 1}, on=True, name="新")  # fmt: skip
    assert fields.widths == (3,) and fields.pair == (1, 2)
    message = complaint(lambda: Fields(size=0, kind="c"))  # all of them at once
    assert "size is 0" in message and "kind is 'c'" in message


BAD_SECTIONS = ([], None, 3, "text", {"sise": 3}, {"size": 0})


@pytest.mark.parametrize("section", BAD_SECTIONS)
def test_a_section_that_does_not_fit_names_its_source(section):
    assert "here" in complaint(lambda: checkpoint.build(Fields, section, "here"))


def test_a_section_must_have_what_has_no_default():
    needy = dataclasses.make_dataclass("Needy", [("size", int)])
    assert "'size'" in complaint(lambda: checkpoint.build(needy, {}, "here"))
    assert checkpoint.build(needy, {"size": 2}, "here").size == 2


# --- Reading -------------------------------------------------------------------------------------

SIZES = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, vocab_size=64, num_codes=8, latent_channels=4, head_width=16,
             head_blocks=1, eoi_id=12, boi_id=13, sep_id=14, image_id=15,
             latents_per_image=4)  # fmt: skip


@pytest.fixture
def saved(tmp_path) -> Path:
    """A model of ours with its autoencoder."""
    vae = VQVAEConfig(resolution=8, base_channels=8, channel_multiplier=(1, 1, 1), groups=8,
                      num_res_blocks=1, latent_channels=4, num_codes=8)  # fmt: skip
    directory = tmp_path / "saved"
    randomise(Orthus(OrthusConfig(**SIZES))).save_pretrained(directory)
    fields = dataclasses.asdict(vae)
    checkpoint.write(directory, {"vae": fields}, vae=randomise(VQVAE(vae)).state_dict())
    return directory


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite(path: Path, change) -> None:
    tensors = {k: t.clone() for k, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_a_directory_is_opened_once_and_says_what_it_lacks(saved):
    opened = open_checkpoint(saved)
    assert open_checkpoint(opened) is opened
    assert {"model", "vae"} <= opened.config.keys()
    assert VQVAE.from_pretrained(opened).config.resolution == 8
    for action, said in (
        (lambda: opened.tokenizer, "tokenizer"),
        (lambda: opened.section("generation"), "generation"),
        (lambda: open_checkpoint(saved / "nothing"), "nothing"),
        (lambda: open_checkpoint(saved / MODEL), MODEL),
    ):
        message = complaint(action)
        assert said in message and str(saved) in message


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


CONTENTS = {"empty": b"", "text": b"{not", "deep": b"[" * 10**5, "UTF-16": b"\xff\xfe{}",
            "list": b"[]", "digits": b'{"a": ' + b"9" * 5000 + b"}", "number": b"7",
            "no section": b"{}", "number as section": b'{"model": 3}'}  # fmt: skip


@pytest.mark.parametrize("content", [*CONTENTS, "pipe", "directory", "missing"])
@pytest.mark.parametrize("name", [CONFIG, MODEL])
def test_a_file_that_is_none_is_named(saved, name, content):
    path = saved / name
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "directory":
        path.mkdir()
    elif content in CONTENTS:
        path.write_bytes(CONTENTS[content])
    assert str(saved) in complaint(lambda: Orthus.from_pretrained(saved))


CONFIG_DAMAGE = {
    "text": dict(hidden_size="16"), "null": dict(vocab_size=None), "half": dict(head_width=16.5),
    "no layers": dict(num_hidden_layers=0), "unknown": dict(colour=3), "id": dict(sep_id=10**6),
    "many layers": dict(num_hidden_layers=10**7), "wide": dict(hidden_size=2**24),
    "an id twice": dict(sep_id=12), "long": dict(max_position_embeddings=10**12),
    "tau": dict(tau=0.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIG_DAMAGE)
def test_a_damaged_config_is_named_at_once(saved, case):
    edit(saved / CONFIG, lambda c: c["model"].update(CONFIG_DAMAGE[case]))
    started = time.perf_counter()
    assert str(saved) in complaint(lambda: Orthus.from_pretrained(saved))
    assert time.perf_counter() - started < 1  # before anything is built


@pytest.mark.parametrize("left", [0, 7, 0.5, -1])
def test_a_file_cut_off_is_named(saved, left):
    content = (saved / MODEL).read_bytes()
    end = int(left * len(content)) if isinstance(left, float) else left
    (saved / MODEL).write_bytes(content[:end])
    assert MODEL in complaint(lambda: Orthus.from_pretrained(saved))


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


INDEX_DAMAGE = {  # change of the index, what the message names
    "leaves": (lambda c: c["weight_map"].update({"norm.weight": "../x"}), "../x"),
    "absolute": (lambda c: c["weight_map"].update({"norm.weight": "/etc/passwd"}), "/etc/passwd"),
    "above": (lambda c: c["weight_map"].update({"norm.weight": ".."}), ".."),
    "no shard": (lambda c: c["weight_map"].update({"norm.weight": "model-9"}), "model-9"),
    "not its": (lambda c: c["weight_map"].pop("norm.weight"), "norm.weight"),
    "surprise": (lambda c: c["weight_map"].update(surprise="model-0.safetensors"), "surprise"),
    "number": (lambda c: c.update(weight_map=3), "weight_map"),
    "file": (lambda c: c["weight_map"].update({"norm.weight": 3}), "weight_map"),
}
OUTSIDE = ("leaves", "absolute", "above")


def test_shards_are_read_by_their_index(sharded):
    assert len(checkpoint.read_tensors(sharded / MODEL)) == len(Orthus(OrthusConfig(**SIZES))
                                                                .state_dict())  # fmt: skip


@pytest.mark.parametrize("case", INDEX_DAMAGE)
def test_an_index_that_does_not_fit_is_named(sharded, case):
    change, wanted = INDEX_DAMAGE[case]
    edit(sharded / f"{MODEL}.index.json", change)
    save_file({"norm.weight": torch.ones(16)}, sharded.parent / "x")  # is there, but not to be read
    message = complaint(lambda: checkpoint.read_tensors(sharded / MODEL))
    assert wanted in message and ("outside" in message or case not in OUTSIDE)


def test_importing_is_cheap():
    """No compiler, no tokenizers, no other layouts: they are imported where they are used."""
    code = ("import sys, checkpoint; "
            "print(*{'torch._dynamo', 'tokenizers', 'released'} & {*sys.modules})")
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.strip() == ""


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
    for said in ("missing layers.0.mlp.up_proj.weight", "unexpected layers.1.surprise.weight",
                 "lm_head.weight has shape [64, 15]", "norm.weight holds torch.int64",
                 "embed_tokens.weight holds numbers that are not finite",
                 "layers.1.mlp.down_proj.weight holds numbers that are not"):  # fmt: skip
        assert said in message


def test_of_a_large_checkpoint_the_norms_alone_are_read(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "SMALL", 1)
    rewrite(saved / MODEL, lambda tensors: tensors["lm_head.weight"].fill_(torch.inf))
    Orthus.from_pretrained(saved)
    rewrite(saved / MODEL, lambda tensors: tensors["norm.weight"].fill_(torch.inf))
    assert "norm.weight" in complaint(lambda: Orthus.from_pretrained(saved))


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, 1e38])
def test_large_numbers_are_finite(saved, value):
    rewrite(saved / MODEL, lambda tensors: tensors["lm_head.weight"].fill_(value))
    Orthus.from_pretrained(saved)


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


@pytest.mark.parametrize("content, name", [(b'{"a": 1}', "tokenizer.json"),
                                           (b"\n\x0e", "tokenizer.model")])  # fmt: skip
def test_a_tokenizer_is_named_by_what_it_is(saved, content, name):
    checkpoint.write(saved, {}, tokenizer=content)
    assert open_checkpoint(saved).tokenizer == saved / name


def test_a_directory_has_one_process_until_it_dies(tmp_path):
    code = ("import checkpoint, pathlib, time\n"
            f"with checkpoint.lock(pathlib.Path({str(tmp_path)!r})):\n"
            "    print('in', flush=True)\n    time.sleep(60)")  # fmt: skip
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    other.stdout.readline()

    def enter():
        with checkpoint.lock(tmp_path):
            pass

    message = complaint(enter)
    assert str(tmp_path) in message and str(other.pid) in message
    other.kill()
    other.wait()
    other.stdout.close()
    enter()
    enter()


# --- Command lines -------------------------------------------------------------------------------


def parsed(*args: str) -> argparse.Namespace:
    parser = checkpoint.Parser(prog="p")
    checkpoint.add_flags(parser, Fields)
    return parser.parse_args(args)


def test_flags_follow_the_fields():
    line = "--size 7 --share 0.5 --limit 0 --kind b --widths 1 2 3 --pair 1 2 --mix a=0.5,b --no-on"
    args = parsed(*line.split())
    assert (args.size, args.share, args.limit, args.kind, args.on) == (7, 0.5, 0, "b", False)
    assert (args.widths, args.pair, args.mix) == ([1, 2, 3], [1.0, 2.0], {"a": 0.5, "b": 1.0})
    assert set(vars(parsed()).values()) == {None}  # what is not given is None
    some = checkpoint.Parser()
    checkpoint.add_flags(some, Fields, ["size"])
    assert vars(some.parse_args([])) == {"size": None}


BAD_FLAGS = (["--size", "0"], ["--size", "x"], ["--size", "1.5"], ["--share", "nan"],
             ["--share", "2"], ["--limit", "10"], ["--kind", "c"], ["--pair", "1"],
             ["--mix", "a=x"], ["--unknown", "3"])  # fmt: skip


@pytest.mark.parametrize("args", BAD_FLAGS)
def test_a_bad_flag_is_one_line_and_exit_code_2(capsys, args):
    with pytest.raises(SystemExit) as stop:
        parsed(*args)
    out, said = capsys.readouterr()
    assert (stop.value.code, out, said.count("\n")) == (2, "", 1)
    assert said.startswith("p: error: ") and args[0] in said


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, "stopped"), (ValueError("a\n  b"), 2, "p: error: a b"),
    (OSError(28, "No space", "x"), 2, "x"), (RecursionError("deep"), 2, "deep"),
    (torch.OutOfMemoryError("memory"), 2, "memory"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 2, "utf-8"),
])  # fmt: skip
def test_what_a_user_gets_wrong_is_one_line(capsys, error, code, said):
    def action():
        raise error

    with pytest.raises(SystemExit) as stop:
        checkpoint.command_line("p", action, "stopped")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (code, "", 1) and said in err
