"""sample.py: the decode loop on a small random model, and the command line."""

import dataclasses
import functools
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
from orthus import KVCache, Orthus, OrthusConfig
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


OPTIONS = sample.Options(cfg_image=1.5)
FEW = 6  # grey levels: fp32 sums in another order, through a random model that amplifies them


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
    assert grey_levels(run(1), run(2)) > 5 * FEW


def test_same_seed_same_picture_alone_and_in_a_batch(pipeline):
    requests = texts("a star", "three green squares", seed=4)
    requests += [Request([Segment(picture(1)), Segment("What colour is the star?")], 4)]
    requests += [Request([Segment(picture(i)) for i in (1, 2, 3)], 5)]
    options = dict(min_images=1, max_images=2, cfg_image=1.5, progress=False)
    together = generate(pipeline, requests, **options)
    apart = [generate(pipeline, [r], **options)[0] for r in requests]
    assert len({len(sample.contexts(r, DEFAULTS, OPTIONS)) for r in requests}) == 2
    for a, b in zip(together, apart, strict=True):
        assert a.text == b.text and len(a.images) == len(b.images) > 0
        assert all(grey_levels(x, y) <= FEW for x, y in zip(a.images, b.images, strict=True))


def test_a_batch_that_does_not_fit_the_memory_is_split(pipeline, monkeypatch):
    requests = texts("a star", "two circles", "a red square", "a circle", "three stars")
    one_by_one = generate(pipeline, requests, batch_size=1, progress=False)
    tried = []

    def scarce(config, rows, *rest):
        tried.append(rows)
        if rows > 4:
            raise torch.OutOfMemoryError
        return KVCache(config, rows, *rest)

    monkeypatch.setattr(sample, "KVCache", scarce)
    answers = generate(pipeline, requests, batch_size=5, progress=False)
    assert tried == [10, 4, 4, 2]  # two contexts each
    for a, b in zip(answers, one_by_one, strict=True):
        assert grey_levels(a.images[0], b.images[0]) <= FEW
    monkeypatch.setattr(sample, "KVCache", lambda *_: scarce(None, 5))
    with pytest.raises(ValueError, match="an answer does not fit.*--max-tokens"):
        generate(pipeline, requests, progress=False)


def test_batch_size_changes_nothing(pipeline):
    requests = texts("a star", "two circles", "a red square")
    one = generate(pipeline, requests, batch_size=1, progress=False)
    two = generate(pipeline, requests, batch_size=2, progress=False)
    for a, b in zip(one, two, strict=True):
        assert grey_levels(a.images[0], b.images[0]) <= FEW


def test_guidance_scale_one_is_no_guidance_and_the_unconditional_row_matters(pipeline, monkeypatch):
    run = lambda scale: generate(pipeline, texts("a star"), cfg_scale=scale, progress=False)
    plain, guided = run(1.0)[0].images[0], run(3.0)[0].images[0]
    assert grey_levels(plain, guided) > 3
    contexts = sample.contexts
    unweighted = lambda *a: [(c[0], w) for c, w in zip(contexts(*a), (1.0, 0.0), strict=True)]
    monkeypatch.setattr(sample, "contexts", unweighted)
    assert grey_levels(run(3.0)[0].images[0], plain) <= 2
    monkeypatch.undo()
    monkeypatch.setitem(pipeline.defaults, "unconditional", "a red circle")
    assert grey_levels(run(3.0)[0].images[0], guided) > 3


def test_the_prompt_and_its_image_change_the_answer(pipeline):
    draw = lambda prompt: generate(pipeline, [Request(prompt)], progress=False)[0].images[0]
    assert grey_levels(draw([Segment("a star")]), draw([Segment("a circle")])) > 3
    edit = lambda seed: [Request([Segment(picture(seed)), Segment("Make the star blue.")])]
    image = lambda seed: decode(pipeline, edit(seed), min_images=1, max_images=1)[0].images[0]
    assert grey_levels(image(1), image(2)) > 3


CONFIG = OrthusConfig.preset("tiny", **SMALL)


def decode(pipeline, requests, **changes):
    options = sample.Options(**(dict(steps=3, cfg_scale=2.0, max_tokens=60) | changes))
    answers = [sample.Answer() for _ in requests]
    with tqdm(total=0, disable=True) as bar:
        for event in sample.decode(pipeline, requests, options, bar):
            answers[event.request].add(event)
    return answers


@pytest.fixture
def latents_drawn(pipeline, monkeypatch):
    """Records (hidden, latents) of each call of sample_latents."""
    drawn = []
    original = pipeline.model.sample_latents

    def record(hidden, *args):
        drawn.append((hidden, original(hidden, *args)))
        return drawn[-1][1]

    monkeypatch.setattr(pipeline.model, "sample_latents", record)
    return drawn


@pytest.fixture
def tokens_picked(monkeypatch):
    """Records every token that pick_token chose."""
    picked = []
    original = sample.pick_token
    record = lambda *args: picked.append(original(*args)) or picked[-1]
    monkeypatch.setattr(sample, "pick_token", record)
    return picked


def test_generate_then_rescore_gives_the_same_choices_and_latents(
    pipeline, latents_drawn, tokens_picked
):
    """Decode text-image-text with the cache, then run the whole sequence at once: each token is
    the one the full run prefers, each latent the one it predicts from the same noise."""
    decode(pipeline, texts("a star", seed=9), cfg_scale=1.0, max_tokens=40)
    latents, tail = torch.cat([drawn for _, drawn in latents_drawn]), list(tokens_picked)
    prompt = data.layout([Segment("a star")], pipeline.tokenizer, CONFIG).tokens
    image = [CONFIG.boi_id, *[CONFIG.image_id] * 16, CONFIG.eoi_id]
    tokens = torch.tensor([prompt + image + tail])
    with torch.inference_mode():
        hidden = pipeline.model(tokens, latents)[0]
        rng = torch.Generator().manual_seed(9)
        noise = torch.randn(16, CONFIG.latent_channels, generator=rng)
        start = len(prompt)
        before = hidden[start : start + 16, None]  # (16, 1, D): BOI's, then each latent's
        again = pipeline.model.sample_latents(before, (1.0,), 3, noise)
        assert torch.allclose(again, latents, atol=1e-3)
        logits = pipeline.model.lm_head(hidden[start + 17 : -1]).clone()
        logits[:, : CONFIG.image_id + 1] = -torch.inf
        assert len(tail) > 3 and logits.argmax(-1).tolist() == tail


def test_image_codes_placeholder_pad_and_bos_are_never_written_as_text(pipeline, tokens_picked):
    for seed in range(5):
        answer = decode(pipeline, texts("a", seed=seed), temperature=5.0)[0]
        assert answer.text  # hot enough to write something, and decode() would drop specials
    decode(pipeline, texts("a", "b", "c", "d", seed=3), temperature=50.0)
    c = CONFIG
    banned = {c.bos_id, c.pad_id, c.image_id, c.eoi_id, *range(4, 4 + c.num_codes)}
    assert len(tokens_picked) > 20 and not banned & set(tokens_picked)


def always(token: int, monkeypatch) -> None:
    """Make the model want one token wherever it is allowed, else an ordinary word."""
    pick = lambda logits, *a: token if logits[token] > -torch.inf else 60
    monkeypatch.setattr(sample, "pick_token", pick)


@pytest.mark.parametrize("max_tokens", range(19, 60, 8))
def test_the_budget_never_cuts_an_image(pipeline, max_tokens, monkeypatch):
    """Whatever the budget, every image that was begun has all its latents."""
    always(CONFIG.boi_id, monkeypatch)
    answer = decode(pipeline, texts("a star"), max_tokens=max_tokens)[0]
    assert len(answer.images) == max(1, max_tokens // 18 - (max_tokens % 18 < 1))


def test_images_that_are_missing_are_forced_and_said_so(pipeline, monkeypatch):
    always(CONFIG.sep_id, monkeypatch)
    question = Request([Segment(picture(1)), Segment("What colour is the star?")])
    assert not decode(pipeline, [question])[0].images
    answer = decode(pipeline, [question], min_images=2)[0]
    assert len(answer.images) == 2 and len(answer.notes) == 2
    assert "would have stopped" in answer.notes[0] and "--min-images" in answer.notes[0]
    always(60, monkeypatch)  # a babbler, stopped while there is room
    answer = decode(pipeline, [question], min_images=2, max_tokens=50)[0]
    assert len(answer.images) == 2 and "tokens are left" in answer.notes[0]
    assert answer.segments[0].content and "cut" in answer.notes[-1]


def test_no_image_is_begun_past_the_maximum(pipeline, monkeypatch):
    always(CONFIG.boi_id, monkeypatch)
    for most in (0, 1, 2):
        answer = decode(pipeline, texts("a star"), max_images=most)[0]
        assert len(answer.images) == most
    wants_boi = 9.0 * (torch.arange(CONFIG.vocab_size) == CONFIG.boi_id)
    monkeypatch.setattr(pipeline.model.lm_head, "forward", lambda h: wants_boi + 0 * h[:, :1])
    notes = decode(pipeline, texts("a star"), max_images=2)[0].notes
    assert sum("image 3 was left out: --max-images is 2" in note for note in notes) == 1
    notes = decode(pipeline, texts("a star"), max_tokens=30)[0].notes
    assert sum("image 2 was left out: it takes 19 tokens" in note for note in notes) == 1


def test_the_budget_is_told_before_the_start(pipeline):
    told = lambda **o: sample.check_budget(pipeline, texts("a star")[0], sample.Options(**o))
    assert told(max_images=3) == "3 images x 18 + text fits 74"
    assert told(max_tokens=40) == "2 images x 18 + text fits 40"
    assert told(max_tokens=40, max_images=5) == "only 2 of 5 images x 18 fit 40 tokens"
    with pytest.raises(ValueError, match="needs 55"):
        told(max_tokens=40, min_images=3)


def test_the_unconditional_context_restarts_at_each_image(pipeline, latents_drawn, monkeypatch):
    """The second image's unconditional hidden state at BOI equals the first's: it has seen nothing
    but its own prompt and BOI. So does that of the prompt's images alone."""
    always(CONFIG.boi_id, monkeypatch)
    edit = Request([Segment(picture(1)), Segment("Make the star blue.")])
    for request, contexts in ((texts("a star")[0], 2), (edit, 3)):
        latents_drawn.clear()
        decode(pipeline, [request], max_tokens=40, cfg_image=1.5)
        first, second = latents_drawn[0][0][0], latents_drawn[16][0][0]  # (G, D)
        assert len(latents_drawn) == 32 and len(first) == contexts
        assert torch.allclose(first[1:], second[1:], atol=1e-5)
        assert not torch.allclose(first[0], second[0], atol=1e-2)


def test_contexts_of_an_edit_are_the_whole_prompt_its_images_and_nothing(pipeline):
    image, text = Segment(picture(1)), Segment("Make the star blue.")
    rows = lambda prompt, **o: sample.contexts(Request(prompt), DEFAULTS, sample.Options(**o))
    empty = [Segment("Generate an image.")]
    assert rows([image, text], cfg_scale=4.0, cfg_image=1.5) == [
        ([image, text], 4.0), ([image], -2.5), (empty, -0.5),
    ]
    both = [image, text]
    assert rows(both, cfg_scale=4.0, cfg_image=1.0) == [(both, 4.0), ([image], -3)]
    assert rows(both, cfg_scale=4.0, cfg_image=4.0) == [(both, 4.0), (empty, -3)]
    assert rows(both, cfg_scale=1.0) == [(both, 1.0)]
    assert rows([image] * 2, cfg_scale=4.0, cfg_image=2.0) == [([image] * 2, 2.0), (empty, -1)]
    defaults = DEFAULTS | {"interleaved": {"cfg_scale": 2.0, "cfg_image": 2.0}}
    guided = Request([image] * 2), defaults, sample.Options(cfg_scale=4.0)
    assert sample.contexts(*guided) == [([image] * 2, 4.0), (empty, -3)]
    assert rows([text], cfg_scale=4.0) == [([text], 4.0), (empty, -3)]


def test_chameleon_is_not_guided_by_default(pipeline):
    for prompt in ([Segment("a star")], [Segment(picture(1)), Segment("Make the star blue.")]):
        defaults = checkpoint.CHAMELEON_GENERATION
        assert len(sample.contexts(Request(prompt), defaults, sample.Options())) == 1


def test_three_way_guidance_reduces_to_two_way_and_to_none(pipeline, monkeypatch):
    """A context with a weight of zero changes nothing against one that is left out."""
    always(CONFIG.boi_id, monkeypatch)
    edit = [Request([Segment(picture(1)), Segment("Make the star blue.")], 3)]
    image = lambda **o: decode(pipeline, edit, max_images=1, **o)[0].images[0]
    contexts = sample.contexts
    keep_all = lambda r, d, o: [
        *contexts(r, d, o),
        *[(prompt, 0.0) for prompt in ([r.prompt[0]], [Segment("Generate an image.")])],
    ]
    for weights in (dict(cfg_scale=3.0, cfg_image=1.0), dict(cfg_scale=3.0, cfg_image=3.0),
                    dict(cfg_scale=1.0, cfg_image=1.0)):
        plain = image(**weights)
        monkeypatch.setattr(sample, "contexts", keep_all)
        assert grey_levels(image(**weights), plain) <= 2
        monkeypatch.setattr(sample, "contexts", contexts)
    assert grey_levels(image(cfg_scale=3.0, cfg_image=2.0), plain) > 3


def test_text_and_images_are_given_out_as_they_are_made(pipeline, monkeypatch):
    """The pieces of text add up to the answer's; an image is begun before it is finished."""
    script = iter([60, 61, 62, CONFIG.boi_id, 70, 71, CONFIG.sep_id])
    monkeypatch.setattr(sample, "pick_token", lambda *a: next(script))
    question = [Request([Segment(picture(1)), Segment("What colour is the star?")])]
    happened = list(sample.stream(pipeline, question, progress=False))
    kinds = [e.kind for e in happened]
    assert kinds == ["text"] * 3 + ["drawing", "image"] + ["text"] * 2 + ["end"]
    said = pipeline.tokenizer.decode([60, 61, 62])
    assert "".join(e.content for e in happened[:3]) == said
    answer = sample.Answer()
    for event in happened:
        answer.add(event)
    assert answer.segments[0].content == said and answer.complete
    assert [isinstance(s.content, str) for s in answer.segments] == [True, False, True]


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


def test_a_picture_with_broken_exif_data_is_opened(tmp_path):
    picture(3).save(tmp_path / "a.png", exif=b"Exif\x00\x00garbage!")
    assert grey_levels(sample.open_image(str(tmp_path / "a.png")), picture(3)) == 0


@pytest.fixture
def run(run_main):
    return functools.partial(run_main, sample)


def test_command_line_writes_pictures_in_prompt_order(run, directory, tmp_path):
    out = tmp_path / "new" / "folder"
    code, said, _ = run("--checkpoint", directory, "--prompt", "a star", "--prompt", "a circle",
                        "--num-images", 2, "--seed", 5, "--scale", 1, "--output", out)
    assert code == 0
    assert sorted(p.name for p in out.glob("0*")) == [f"000{i}.png" for i in range(4)]
    assert Image.open(out / "0003.png").size == (64, 64)
    assert str(out / "0000.png") in said and "seed 6" in said and "seconds" in said


def interleaved(monkeypatch, images: int = 2) -> None:
    """A model that writes a word, an image, a word, an image, ..."""
    script = [60, CONFIG.boi_id] * images + [CONFIG.sep_id]
    turns = iter(script * 20)
    monkeypatch.setattr(sample, "pick_token", lambda *a: next(turns))


def test_a_story_is_written_with_its_pictures(run, directory, tmp_path, monkeypatch):
    interleaved(monkeypatch)
    picture(3).save(tmp_path / "in.png")
    out = tmp_path / "out"
    code, said, _ = run("--checkpoint", directory, "--image", tmp_path / "in.png", "--prompt",
                        "Continue this story.", "--output", out)
    assert code == 0 and "images x 18 + text fits" in said
    assert {p.name for p in out.iterdir()} == {"0000.png", "0001.png", "story.md", "story.png"}
    story = (out / "story.md").read_text()
    assert story.startswith("> `<image>` Continue this story.")
    assert story.index("(0000.png)") < story.index("(0001.png)")
    assert Image.open(out / "story.png").width > 3 * 64  # the prompt's image and both of the answer
    before = (out / "story.png").read_bytes()
    run("--checkpoint", directory, "--image", out / "story.png", "--prompt", "On.", "--output", out)
    assert (out / "story.png").read_bytes() == before and (out / "story_.png").is_file()


@pytest.mark.parametrize("prompts", [1, 2])
def test_ctrl_c_keeps_what_is_finished(run, directory, tmp_path, monkeypatch, prompts):
    interleaved(monkeypatch, 3)
    decode_image, made = VQVAE.decode, []

    def decode(self, latents):
        made.append(len(list(tmp_path.glob("*.png"))))
        if len(made) == 2:
            raise KeyboardInterrupt
        return decode_image(self, latents)

    monkeypatch.setattr(VQVAE, "decode", decode)
    code, said, warned = run("--checkpoint", directory, *["--prompt", "Once more."] * prompts,
                             "--min-images", 3, "--output", tmp_path, "--save-every-image")
    assert code == 130 and "interrupted" in warned
    assert made == [0, 1]  # the first was on disk before the second was finished
    assert {p.name for p in tmp_path.iterdir()} == {"0000.png", "story.md", "story.png"}


def test_an_answer_does_not_overwrite_its_own_picture(run, directory, tmp_path):
    picture(3).save(tmp_path / "0000.png")
    before = (tmp_path / "0000.png").read_bytes()
    run("--checkpoint", directory, "--image", tmp_path / "0000.png", "--prompt", "a star",
        "--min-images", 1, "--max-images", 1, "--output", tmp_path)
    assert (tmp_path / "0000.png").read_bytes() == before and (tmp_path / "0001.png").is_file()


@pytest.mark.parametrize("images", [0, 2])
def test_text_is_whole_on_a_terminal(run, directory, tmp_path, monkeypatch, images):
    """What the progress bar writes to the same terminal never wipes a line of the answer."""
    script = iter([60, 61] + [CONFIG.boi_id, 62] * images + [CONFIG.sep_id])
    monkeypatch.setattr(sample, "pick_token", lambda *a: next(script))
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # one terminal for both
    picture(3).save(tmp_path / "in.png")
    _, said, _ = run("--checkpoint", directory, "--image", tmp_path / "in.png", "--prompt",
                     "What colour is the star?", "--output", tmp_path)
    lines = [line.rstrip("\r").split("\r")[-1] for line in said.split("\n")]
    tokenizer = data.Tokenizer.from_pretrained(directory)
    words = tokenizer.decode([60, 61])
    assert any(line.startswith(words) for line in lines), said


def test_images_of_a_batch_are_numbered_in_prompt_order(run, directory, tmp_path):
    """The second answer is finished first: it waits for its turn."""
    lines = [{"prompt": "a star", "seed": 1}, {"prompt": "a circle", "seed": 2}]
    (tmp_path / "r.jsonl").write_text("\n".join(map(json.dumps, lines)))
    requests = [(line["prompt"], Request([Segment(line["prompt"])], 0)) for line in lines]
    results = open(tmp_path / "results.jsonl", "w")
    writer = sample.Writer(requests, tmp_path, 1, False, results)
    for number, colour in ((1, "blue"), (0, "red")):
        writer.take(sample.Event(number, "image", Image.new("RGB", (8, 8), colour)))
        writer.take(sample.Event(number, "end"))
    results.close()
    names = [json.loads(x)["images"] for x in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert names == [[str(tmp_path / "0000.png")], [str(tmp_path / "0001.png")]]
    assert Image.open(names[0][0]).getpixel((0, 0)) == (255, 0, 0)


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
    "fewer than the fewest": (
        ["--prompt", "a", "--min-images", "3", "--max-images", "2"], "--max-images 2"
    ),
    "images that do not fit": (
        ["--prompt", "a", "--min-images", "3", "--max-tokens", "40"], "--max-tokens"
    ),
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
