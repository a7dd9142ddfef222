"""sample.py: the decode loop on a small random model, and the command line."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import checkpoint
import data
import sample
from data import Segment
from orthus import Orthus, OrthusConfig
from sample import Request, generate
from vae import VQVAE, VQVAEConfig

SMALL = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_width=32,
    latent_scale=1.0,
    num_codes=32,
    vocab_size=320,
    eoi_id=36,
    boi_id=37,
    sep_id=38,
    image_id=39,
)
DEFAULTS = {
    "steps": 3,
    "cfg_scale": 2.0,
    "unconditional": "Generate an image.",
    "image_first": True,
    "max_tokens": 40,
}


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A checkpoint of a small random model in which every weight matters."""
    directory = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    config = OrthusConfig.preset("tiny", **SMALL)
    model = Orthus(config)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1 if "norm.weight" in name else 0, 0.15)
    vae = VQVAEConfig.preset("tiny")
    vae = dataclasses.replace(vae, base_channels=8, num_codes=32)
    tokenizer = directory / "tokenizer.model"
    tokenizer.write_bytes(data.train_tokenizer(data.shapes_texts(), 250))
    parts = {"model": dataclasses.asdict(config), "vae": dataclasses.asdict(vae)}
    parts["generation"] = DEFAULTS | {"words": data.shapes_words()}
    checkpoint.write(directory, parts, model.state_dict(), VQVAE(vae).state_dict(), tokenizer)
    return directory


@pytest.fixture(scope="module")
def pipeline(directory):
    return sample.load(directory)


def texts(*prompts: str, seed: int = 0) -> list[Request]:
    return [Request([Segment(p)], seed) for p in prompts]


def picture(seed: int) -> Image.Image:
    return data.render(data.Shapes(seed).example(0).things)


def grey_levels(a: Image.Image, b: Image.Image) -> int:
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max()


# --- The loop ---


def test_a_prompt_without_image_is_answered_with_one(pipeline):
    (answer,) = generate(pipeline, texts("a red circle"), progress=False)
    assert answer.images[0].size == (64, 64)


def test_same_seed_same_picture_and_other_seed_another(pipeline):
    run = lambda seed: generate(pipeline, texts("a star", seed=seed), progress=False)[0].images[0]
    assert grey_levels(run(1), run(1)) == 0
    assert grey_levels(run(1), run(2)) > 10


def test_same_seed_same_picture_alone_and_in_a_batch(pipeline):
    requests = texts("a star", "three green squares", seed=4)
    requests += [Request([Segment(picture(1)), Segment("What colour is the star?")], 4)]
    together = generate(pipeline, requests, progress=False)
    apart = [generate(pipeline, [r], progress=False)[0] for r in requests]
    for a, b in zip(together, apart, strict=True):
        assert a.text == b.text and len(a.images) == len(b.images)
        assert all(grey_levels(x, y) <= 2 for x, y in zip(a.images, b.images, strict=True))


def test_batch_size_changes_nothing(pipeline):
    requests = texts("a star", "two circles", "a red square")
    one = generate(pipeline, requests, batch_size=1, progress=False)
    two = generate(pipeline, requests, batch_size=2, progress=False)
    for a, b in zip(one, two, strict=True):
        assert grey_levels(a.images[0], b.images[0]) <= 2


def test_guidance_scale_one_is_no_guidance_and_the_unconditional_row_matters(pipeline, monkeypatch):
    run = lambda scale: generate(pipeline, texts("a star"), cfg_scale=scale, progress=False)
    plain, guided = run(1.0)[0].images[0], run(3.0)[0].images[0]
    assert grey_levels(plain, guided) > 3
    monkeypatch.setattr(sample, "guidance_weights", lambda scale: (1.0, 0.0))
    assert grey_levels(run(3.0)[0].images[0], plain) <= 2
    monkeypatch.undo()
    monkeypatch.setitem(pipeline.defaults, "unconditional", "a red circle")
    assert grey_levels(run(3.0)[0].images[0], guided) > 3


def test_the_prompt_and_its_image_change_the_answer(pipeline):
    draw = lambda prompt: generate(pipeline, [Request(prompt)], progress=False)[0].images[0]
    assert grey_levels(draw([Segment("a star")]), draw([Segment("a circle")])) > 3
    pipeline.defaults["image_first"] = True
    hidden = []
    for seed in (1, 2):
        rows = [data.layout([Segment(picture(seed)), Segment("a")], pipeline.tokenizer, CONFIG)]
        batch = data.collate(rows, CONFIG, 64)
        latents = pipeline.vae.encode(batch.images).flatten(0, 1)
        hidden.append(pipeline.model(batch.tokens, latents)[:, -1])
    assert (hidden[0] - hidden[1]).abs().max() > 1e-3


CONFIG = OrthusConfig.preset("tiny", **SMALL)


def decode(pipeline, requests, **changes):
    args = dict(steps=3, cfg_scale=2.0, temperature=0.0, top_p=1.0, max_tokens=60)
    with tqdm(total=0, disable=True) as bar:
        return sample.decode(pipeline, requests, **(args | changes), bar=bar)


def test_generate_then_rescore_gives_the_same_choices_and_latents(pipeline, monkeypatch):
    """Decode text-image-text with the cache, then run the whole sequence at once: each token is
    the one the full run prefers, each latent the one it predicts from the same noise."""
    written = []
    read_out = sample.read_out
    monkeypatch.setattr(
        sample, "read_out", lambda d, p: (written.append(list(d.written)), read_out(d, p))[1]
    )
    decode(pipeline, texts("a star", seed=9), cfg_scale=1.0, max_tokens=40)
    latents, tail = written[0][0], written[0][1:]
    prompt = data.layout([Segment("a star")], pipeline.tokenizer, CONFIG).tokens
    image = [CONFIG.boi_id, *[CONFIG.image_id] * 16, CONFIG.eoi_id]
    tokens = torch.tensor([prompt + image + tail])
    hidden = pipeline.model(tokens, latents)[0]
    noise = torch.randn(16, 64, generator=torch.Generator().manual_seed(9))
    start = len(prompt)
    before = hidden[start : start + 16, None]  # (16, 1, D): BOI's, then each latent's but the last
    again = pipeline.model.sample_latents(before, (1.0,), 3, noise)
    assert torch.allclose(again, latents, atol=1e-3)
    logits = pipeline.model.lm_head(hidden[start + 17 : -1])
    logits[:, : CONFIG.image_id + 1] = -torch.inf
    assert len(tail) > 3 and logits.argmax(-1).tolist() == tail


def test_image_codes_placeholder_pad_and_bos_are_never_written_as_text(pipeline):
    for seed in range(5):
        answer = decode(pipeline, texts("a", seed=seed), temperature=5.0)[0]
        assert answer.text  # hot enough to write something, and decode() would drop specials
    c = CONFIG
    written = []
    original = sample.pick_token
    try:
        sample.pick_token = lambda logits, *a: written.append(original(logits, *a)) or written[-1]
        decode(pipeline, texts("a", "b", "c", "d", seed=3), temperature=50.0)
    finally:
        sample.pick_token = original
    banned = {c.bos_id, c.pad_id, c.image_id, c.eoi_id, *range(4, 4 + c.num_codes)}
    assert len(written) > 20 and not banned & set(written)


@pytest.mark.parametrize("max_tokens", range(19, 60, 8))
def test_the_budget_never_cuts_an_image(pipeline, max_tokens, monkeypatch):
    """Whatever the budget, every image that was begun has all its latents."""
    boi = lambda logits, *a: CONFIG.boi_id if logits[CONFIG.boi_id] > -torch.inf else 60
    monkeypatch.setattr(sample, "pick_token", boi)
    answer = decode(pipeline, texts("a star"), max_tokens=max_tokens)[0]
    assert len(answer.images) == max(1, max_tokens // 18 - (max_tokens % 18 < 1))


def test_the_unconditional_context_restarts_at_each_image(pipeline, monkeypatch):
    """The second image's unconditional hidden state at BOI equals the first's: it has seen nothing
    but its own prompt and BOI."""
    seen = []
    original = pipeline.model.sample_latents
    monkeypatch.setattr(
        pipeline.model, "sample_latents", lambda h, *a: (seen.append(h), original(h, *a))[1]
    )
    boi = lambda logits, *a: CONFIG.boi_id if logits[CONFIG.boi_id] > -torch.inf else 60
    monkeypatch.setattr(sample, "pick_token", boi)
    decode(pipeline, texts("a star"), max_tokens=40)
    assert len(seen) == 32
    assert torch.allclose(seen[0][0, 1], seen[16][0, 1], atol=1e-5)
    assert not torch.allclose(seen[0][0, 0], seen[16][0, 0], atol=1e-2)


@pytest.mark.parametrize(
    "choice",
    [dict(image_head="mse"), dict(vision_embedding="argmin", image_head="tokens"),
     dict(vision_embedding="linear")],
)
def test_every_image_head_and_embedding_draws(pipeline, choice):
    torch.manual_seed(0)
    model = Orthus(OrthusConfig.preset("tiny", **SMALL, **choice))
    other = dataclasses.replace(pipeline, model=model)
    assert len(generate(other, texts("a star"), progress=False)[0].images) == 1


def test_top_p_keeps_the_most_likely_tokens():
    logits = torch.tensor([5.0, 4.0, 0.0, -5.0])
    rng = torch.Generator().manual_seed(0)
    drawn = {sample.pick_token(logits, 1.0, 0.9, rng) for _ in range(300)}
    assert drawn == {0, 1}
    assert {sample.pick_token(logits, 1.0, 1e-6, rng) for _ in range(50)} == {0}
    assert sample.pick_token(logits, 0.0, 1.0, rng) == 0


# --- Prompts and requests ---


def test_images_stand_in_front_or_where_the_prompt_says(tmp_path):
    path = str(tmp_path / "a.png")
    picture(0).save(path)
    kinds = lambda segments: [s.content if isinstance(s.content, str) else "IMG" for s in segments]
    assert kinds(sample.read_prompt("What?", [path])) == ["IMG", "What?"]
    assert kinds(sample.read_prompt("From <image> to <image>.", [path, path])) == [
        "From ", "IMG", " to ", "IMG", ".",
    ]
    with pytest.raises(ValueError, match="2 <image>.*1 image"):
        sample.read_prompt("<image> <image>", [path])


# --- The command line ---


@pytest.fixture
def run(monkeypatch, capsys):
    """Run sample.py with arguments -> (exit code, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        code = 0
        try:
            sample.main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_command_line_writes_pictures_in_prompt_order(run, directory, tmp_path):
    out = tmp_path / "new" / "folder"
    code, said, _ = run("--checkpoint", directory, "--prompt", "a star", "--prompt", "a circle",
                        "--num-images", 2, "--seed", 5, "--scale", 1, "--output", out)
    assert code == 0
    assert sorted(p.name for p in out.iterdir()) == [f"000{i}.png" for i in range(4)]
    assert Image.open(out / "0003.png").size == (64, 64)
    assert str(out / "0000.png") in said and "seed 6" in said and "seconds" in said


def test_requests_file_is_answered_line_by_line(run, directory, tmp_path):
    picture(3).save(tmp_path / "in.png")
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "What colour is the star?", "images": [str(tmp_path / "in.png")], "seed": 3},
        {"prompt": "a star", "seed": 0},
    ]
    requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
    requests.write_text("\n".join(map(json.dumps, lines)))
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    run("--checkpoint", directory, "--requests", requests, "--output", out, "--seed", 1)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [r["prompt"] for r in results] == [line["prompt"] for line in lines]
    assert [r["seed"] for r in results] == [1, 3, 0]
    assert all(set(r) == {"prompt", "text", "images", "seed"} for r in results)
    assert Path(results[0]["images"][0]).is_file()
    assert (out / "mine.txt").read_text() == "kept"


def test_unknown_words_are_named(run, directory, tmp_path):
    code, _, warned = run("--checkpoint", directory, "--prompt", "a purple dog",
                          "--output", tmp_path)
    assert code == 0 and "'dog'" in warned and "purple" in warned.split("it knows")[1]


BAD = {
    "missing checkpoint": (["--checkpoint", "/nowhere", "--prompt", "a"], "nowhere"),
    "no prompt": ([], "--prompt"),
    "empty prompt": (["--prompt", " "], "empty"),
    "unreadable image": (["--prompt", "a", "--image", __file__], "cannot be read"),
    "missing image": (["--prompt", "a", "--image", "no.png"], "no.png"),
    "unknown device": (["--prompt", "a", "--device", "quantum"], "quantum"),
    "absent device": (["--prompt", "a", "--device", "cuda:99"], "cuda:99"),
    "steps out of range": (["--prompt", "a", "--steps", "0"], "--steps"),
    "top-p out of range": (["--prompt", "a", "--top-p", "1.5"], "--top-p"),
    "unknown flag": (["--prompt", "a", "--stepz", "5"], "--stepz"),
    "images per request": (["--requests", __file__, "--num-images", "2"], "--num-images"),
    "missing requests": (["--requests", "no.jsonl"], "no.jsonl"),
    "too long a prompt": (["--prompt", "a star " * 400], "shorten"),
    "too small a budget": (["--prompt", "a star", "--max-tokens", "5"], "max tokens 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(run, case, directory, tmp_path):
    args, wanted = BAD[case]
    if "--checkpoint" not in args:
        args = ["--checkpoint", directory, *args]
    code, out, said = run(*args, "--output", tmp_path / "out")
    assert code == 2 and out == ""
    assert wanted in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["model.safetensors", "vae.safetensors", "config.json"])
@pytest.mark.parametrize("left", [None, 0.5])
def test_half_written_checkpoints_are_named(directory, tmp_path, damage, left):
    shutil.copytree(directory, tmp_path / "copy")
    file = tmp_path / "copy" / damage
    content = file.read_bytes()
    file.unlink()
    if left:
        file.write_bytes(content[: int(left * len(content))])
    with pytest.raises(ValueError, match=damage.split(".")[0]):
        sample.load(tmp_path / "copy")


def test_answers_never_overwrite_their_requests(run, directory, tmp_path):
    requests = tmp_path / "results.jsonl"
    requests.write_text('{"prompt": "a star"}')
    code, _, said = run("--checkpoint", directory, "--requests", requests, "--output", tmp_path)
    assert code == 2 and "overwrite" in said
    assert requests.read_text() == '{"prompt": "a star"}'


def test_missing_tokenizer_is_named(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="tokenizer"):
        sample.load(tmp_path / "copy")


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "JSON"),
        ('{"images": []}', "want"),
        ('{"prompt": ""}', "empty"),
        ("[1]", "want"),
        ('{"prompt": "a star", "seed": 1.5}', "whole number"),
        ('{"prompt": "a star", "seed": -1}', "whole number"),
        ('{"prompt": "a star", "images": "x.png"}', "list of paths"),
        ('{"prompt": "a star", "sed": 3}', "unknown.*sed"),
    ],
)
def test_bad_requests_name_the_line(tmp_path, line, said):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a star"}\n' + line)
    with pytest.raises(ValueError, match=f"line 2.*{said}"):
        sample.read_requests(str(path), 0)
