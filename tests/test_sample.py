"""sample.py: the two loops against a naive reference, and the command line."""

import contextlib
import copy
import dataclasses
import functools
import json
import random
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, close, complaint, grey_levels, seeded
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import checkpoint
import data
import sample
from data import Segment
from orthus import KVCache, Orthus, OrthusConfig
from sample import Request, generate
from vae import VQVAE, VQVAEConfig

SMALL = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_width=32, latent_scale=1.0, num_codes=32, vocab_size=320,
    eoi_id=36, boi_id=37, sep_id=38, image_id=39,
)  # fmt: skip
CONFIG = OrthusConfig.preset("tiny", **SMALL)
C, L = CONFIG.latent_channels, CONFIG.latents_per_image
DEFAULTS = sample.Generation(steps=3, cfg_scale=2.0, image_first=True, max_tokens=40)
WORDS = "a red green blue purple circle star square stars What Which colour is the Make Once On"
FEW = 6  # grey levels: fp32 sums in another order, through a random model that amplifies them
WORD = 60  # the id of some piece of text


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A checkpoint of a small random model in which every weight matters."""
    directory = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    model = Orthus(CONFIG)
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1 if "norm.weight" in name else 0, 0.15)
    vae = dataclasses.replace(VQVAEConfig.preset("tiny"), base_channels=8, num_codes=32)
    texts = [WORDS, "Continue this story. Generate an image. How many?", "0123456789"]
    pieces = data.train_tokenizer(texts, 250)
    generation = dataclasses.replace(DEFAULTS, words=WORDS.split())
    parts = {"model": CONFIG, "vae": vae, "generation": generation}
    config = {name: dataclasses.asdict(part) for name, part in parts.items()}
    checkpoint.write(directory, config, model.state_dict(), VQVAE(vae).state_dict(), pieces)
    return directory


@pytest.fixture(scope="session")
def loaded(directory):
    return sample.load(directory)


@pytest.fixture
def pipeline(loaded, monkeypatch):
    """What is replaced in its modules by a test is put back."""
    for module in (loaded.model, loaded.model.image_head, loaded.vae):
        monkeypatch.setattr(module, "__dict__", dict(vars(module)))
    return loaded


@functools.cache
def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


def request(*prompt: str | int, seed: int = 0) -> Request:
    """Text as it is, and pictures by their seeds."""
    segments = [Segment(s if isinstance(s, str) else picture(s)) for s in prompt]
    return Request(segments, seed)


def answer(pipeline, *requests: Request, **options) -> list[sample.Answer]:
    return generate(pipeline, list(requests), progress=False, **options)


def image_of(pipeline, *prompt, seed=0, **options) -> Image.Image:
    """The one picture of an answer."""
    options = dict(min_images=1, max_images=1) | options
    return answer(pipeline, request(*prompt, seed=seed), **options)[0].images[0]


def script(monkeypatch, *tokens: int) -> None:
    """What each row writes, one token after the other, then <sep>; <boi> only where it may."""
    at = {}

    def choose(row, logits, config, options):
        at[row] = at.get(row, -1) + 1
        token = tokens[at[row]] if at[row] < len(tokens) else config.sep_id
        return token if logits[token] > -torch.inf else config.sep_id

    monkeypatch.setattr(sample, "choose_token", choose)


def always(token: int, monkeypatch) -> None:
    """Make the model want one token wherever it is allowed, else an ordinary word."""
    pick = lambda logits, *a: token if logits[token] > -torch.inf else WORD
    monkeypatch.setattr(sample, "pick_token", pick)


@pytest.fixture
def fed(pipeline, monkeypatch):
    """Records (rows, positions) of every call of the transformer."""
    calls, transformer = [], pipeline.model.transformer

    def record(x, *rest):
        calls.append(tuple(x.shape[:2]))
        return transformer(x, *rest)

    monkeypatch.setattr(pipeline.model, "transformer", record)
    return calls


# --- Against a loop without cache, batch, or anything computed ahead -----------------------------


def naive_latent(head, hidden, weights, noise, steps: int):
    """DDIM by the book: hidden (D,) of each context, noise (C,) -> latent (C,)."""
    levels = torch.cat([head.schedule.alphas_cumprod.double(), torch.ones(1).double()])
    level = lambda t: levels[t]  # -1: no noise
    times = [round(1000 - k * 1000 / steps) - 1 for k in range(steps)]
    x = noise
    for t, after in zip(times, [*times[1:], -1], strict=True):
        outputs = [head(x[None], torch.tensor([t]), h[None])[0] for h in hidden]
        v = sum(w * o for w, o in zip(weights, outputs, strict=True))
        signal, sigma = level(t).sqrt(), (1 - level(t)).sqrt()
        clean, eps = signal * x - sigma * v, sigma * x + signal * v
        x = (level(after).sqrt() * clean + (1 - level(after)).sqrt() * eps).float()
    return x / head.latent_scale


def naive_images(pipeline, prompt, said, seed, text_weight, image_weight, steps, drawn):
    """Latents (L, C) of every image of an answer that says said[j] ahead of image j; each latent
    follows those that were `drawn`, since a random model amplifies what rounding makes of them."""
    model, encode, c = pipeline.model, pipeline.tokenizer.encode, CONFIG
    picture_ids = [c.boi_id, *[c.image_id] * L, c.eoi_id]

    def read(segments):  # -> tokens, and latents of the images among them
        tokens, latents = [c.bos_id], [torch.zeros(0, C)]
        for s in segments:
            tokens += picture_ids if s.is_image else encode(s.content)
            if s.is_image:
                latents.append(pipeline.vae.encode(data.to_tensor(s.content, 64)[None])[0])
        return [*tokens, c.sep_id], torch.cat(latents)

    full, images = read(prompt), read([s for s in prompt if s.is_image])
    empty = read([Segment("Generate an image.")])
    has_images, has_text = len(images[1]) > 0, any(not s.is_image for s in prompt)
    if has_images and has_text:  # e + s_image (i - e) + s_text (f - i)
        weights = text_weight, image_weight - text_weight, 1 - image_weight
        contexts = [full, images, empty]
    else:  # e + s (f - e)
        s = image_weight if has_images else text_weight
        weights, contexts = (s, 1 - s), [full, empty]
    (tokens, latents), *others = contexts
    noise, images = seeded(seed), []
    for words, own in zip(said, drawn, strict=True):
        tokens = [*tokens, *words, c.boi_id]
        fresh = [(tokens, latents), *(([*t, c.boi_id], z) for t, z in others)]
        image, starts = [], torch.randn(L, C, generator=noise)
        for n in range(L):
            hidden = [model(torch.tensor([t + [c.image_id] * n]), torch.cat([z, own[:n]]))[0, -1]
                      for t, z in fresh]  # fmt: skip
            image.append(naive_latent(model.image_head, hidden, weights, starts[n], steps))
        tokens, latents = tokens + picture_ids[1:], torch.cat([latents, own])
        images.append(torch.stack(image))
    return images


@torch.inference_mode()
def test_latents_are_those_of_the_naive_loop(pipeline, monkeypatch):
    """Two images of a text prompt, an edit and an in-context edit, in one batch: each as without
    cache and batch. Image j takes the seed's j-th noise; the guiding contexts restart at it."""
    requests = [request("a star", seed=4), request(1, "Make the star blue.", seed=5),
                request(1, 2, 3, seed=5), request("a circle", seed=6)]  # fmt: skip
    script(monkeypatch, WORD, CONFIG.boi_id, WORD, WORD + 1, CONFIG.boi_id)
    options = dict(cfg_scale=3.0, cfg_image=1.5, max_tokens=60, min_images=2)
    answers = answer(pipeline, *requests, **options)
    said = [[WORD], [WORD, WORD + 1]]
    for own, asked in zip((a.latents for a in answers), requests, strict=True):
        wanted = naive_images(pipeline, asked.prompt, said, asked.seed, 3.0, 1.5, 3, own)
        close(torch.stack(own), torch.stack(wanted), atol=1e-3)
        assert (own[0] - own[1]).abs().max() > 0.1


@torch.inference_mode()
def test_the_text_after_an_image_is_what_the_whole_sequence_prefers(pipeline, monkeypatch):
    picked, pick = [], sample.pick_token
    monkeypatch.setattr(sample, "pick_token", lambda *a: picked.append(pick(*a)) or picked[-1])
    (told,) = answer(pipeline, request("a star", seed=9), max_tokens=40, max_images=1)
    prompt = data.layout([Segment("a star")], pipeline.tokenizer, CONFIG).tokens
    tokens = [*prompt, CONFIG.boi_id, *[CONFIG.image_id] * L, CONFIG.eoi_id, *picked]
    hidden = pipeline.model(torch.tensor([tokens]), told.latents[0])[0]
    logits = pipeline.model.lm_head(hidden[len(prompt) + L + 1 : -1]).clone()
    logits[:, : CONFIG.image_id + 1] = -torch.inf
    assert len(picked) > 3 and logits.argmax(-1).tolist() == picked


class Operators(TorchDispatchMode):
    """Names of the operators that run inside, and the devices of their tensors."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.names.append(str(function))
        self.devices |= {t.device.type for t in tensors}
        return result


class Conversions(TorchFunctionMode):
    """Tensors that are made of Python's numbers: as_tensor runs no operator that is seen."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        makers = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
        self.made += function in makers and not isinstance(args[0], torch.Tensor)
        return function(*args, **(kwargs or {}))


class Watch(contextlib.ExitStack):
    """Whether a number goes from the host to the device, or back, between start and stop."""

    def start(self) -> None:
        self.operators = self.enter_context(Operators())
        self.conversions = self.enter_context(Conversions())

    def waits(self) -> bool:
        asked = any("_local_scalar" in name for name in self.operators.names)
        return asked or self.conversions.made > 0 or self.operators.devices != {"meta"}


def test_nothing_inside_an_image_waits_for_the_device(loaded, monkeypatch):
    """draw_image on a device of its own, from one latent to the next: nothing but its tensors."""
    model = copy.deepcopy(loaded.model).to("meta")
    pipeline = dataclasses.replace(loaded, model=model)
    watch, calls, head_sample = Watch(), [], model.image_head.sample

    def record(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            watch.start()
        elif len(calls) == 3:
            watch.close()
        return head_sample(*args, **kwargs)

    monkeypatch.setattr(model.image_head, "sample", record)
    monkeypatch.setattr(sample, "prefill", lambda *_: None)  # which is ahead of the loop
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # meta has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    options = sample.Options(cfg_scale=3.0, cfg_image=1.5)
    row = sample.Row(pipeline, request(1, "On."), options, lambda *_: None)
    row.slots = [0, 1, 2]
    cache = KVCache(CONFIG, 3, 60, "meta")
    with torch.inference_mode(), tqdm(disable=True, total=0) as bar, pytest.raises(RuntimeError):
        sample.draw_image(pipeline, [row], cache, 3, bar)  # whose end asks for numbers
    assert len(calls) == L and len(watch.operators.names) > 100 and not watch.waits()


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor])
def test_a_copy_from_the_host_is_seen(make):
    for act in (lambda: make([1.5], device="meta"), lambda: torch.zeros(2).to("meta")):
        with Watch() as watch:
            watch.start()
            act()
        assert watch.waits()


# --- The loops -----------------------------------------------------------------------------------


def test_same_seed_same_picture_and_other_seed_another(pipeline):
    run = lambda seed: image_of(pipeline, "a star", seed=seed)
    assert run(1).size == (64, 64) and grey_levels(run(1), run(1)) == 0
    assert grey_levels(run(1), run(2)) > 5 * FEW


def test_same_seed_same_picture_alone_and_in_a_batch(pipeline):
    requests = [request("a star", seed=4), request("three green squares", seed=4),
                request(1, "What colour is it?", seed=4), request(1, 2, 3, seed=5)]  # fmt: skip
    options = dict(min_images=1, max_images=2, cfg_image=1.5)
    whole = answer(pipeline, *requests, **options)
    twos = answer(pipeline, *requests, batch_size=2, **options)
    apart = [answer(pipeline, r, **options)[0] for r in requests]
    for answers in (whole, twos):
        for a, b in zip(answers, apart, strict=True):
            assert a.text == b.text and len(a.images) == len(b.images) > 0
            assert all(grey_levels(x, y) <= FEW for x, y in zip(a.images, b.images, strict=True))


def test_a_batch_that_does_not_fit_the_memory_says_what_to_lower(pipeline, monkeypatch):
    def scarce(config, rows, *rest):
        if rows > 4:
            raise torch.OutOfMemoryError
        return KVCache(config, rows, *rest)

    monkeypatch.setattr(sample, "KVCache", scarce)
    requests = [request(t) for t in ("a star", "two circles", "stars")]  # two contexts each
    assert "--batch-size" in complaint(lambda: answer(pipeline, *requests))
    assert len(answer(pipeline, *requests, batch_size=2)) == 3


def test_the_prompt_and_its_image_change_the_answer(pipeline):
    draw = functools.partial(image_of, pipeline)
    assert grey_levels(draw("a star"), draw("a circle")) > 3
    text = "Make the star blue."
    assert grey_levels(draw(1, text), draw(2, text)) > 3


def test_temperature_and_seed_change_the_text(pipeline):
    write = lambda seed, **o: answer(pipeline, request(1, "What?", seed=seed), **o)[0].text
    assert write(0) == write(1)  # greedy
    hot = [write(seed, temperature=1.0, max_images=0) for seed in (0, 0, 1, 2)]
    assert hot[0] == hot[1] and len(set(hot)) == 3
    assert hot[0] != write(0, temperature=2.0, max_images=0)
    narrow = [write(s, temperature=1.0, top_p=1e-6, max_images=0) for s in (0, 1)]
    assert narrow == [write(0, max_images=0)] * 2


def test_a_photo_is_read_as_its_exif_data_turn_it(pipeline, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1).save(tmp_path / "a.png", exif=exif)
    ask = lambda image: Request([Segment(image), Segment("On.")], seed=3)
    draw = lambda image: answer(pipeline, ask(image), min_images=1)[0].images[0]
    turned = draw(picture(1).transpose(Image.Transpose.ROTATE_270))
    assert grey_levels(draw(tmp_path / "a.png"), turned) <= 1
    assert grey_levels(draw(picture(1)), turned) > FEW


def test_image_codes_placeholder_pad_and_bos_are_never_written_as_text(pipeline, monkeypatch):
    picked, pick = [], sample.pick_token
    monkeypatch.setattr(sample, "pick_token", lambda *a: picked.append(pick(*a)) or picked[-1])
    answers = answer(pipeline, *(request("a", seed=s) for s in range(8)), temperature=50.0)
    c = CONFIG
    banned = {c.bos_id, c.pad_id, c.unk_id, c.image_id, c.eoi_id, *range(4, 4 + c.num_codes)}
    assert len(picked) > 60 and not banned & set(picked) and all(a.text for a in answers)
    for first in sorted(banned):
        picked.clear()
        wants = 9.0 * (torch.arange(c.vocab_size) == first) + (torch.arange(c.vocab_size) == WORD)
        monkeypatch.setattr(pipeline.model.lm_head, "forward", lambda h, w=wants: w + 0 * h[:, :1])
        answer(pipeline, request(1, "What?"), max_tokens=1)
        assert picked == [WORD]


# --- Who is fed what -----------------------------------------------------------------------------


def test_a_question_is_one_row_however_it_is_guided(pipeline, fed, monkeypatch):
    script(monkeypatch, WORD, WORD)
    answer(pipeline, request(1, "What colour is the star?"), cfg_scale=3.0, cfg_image=2.0)
    assert [rows for rows, _ in fed] == [1, 1, 1]


def test_guidance_contexts_are_read_when_an_image_begins_and_only_then(pipeline, fed, monkeypatch):
    script(monkeypatch, WORD, CONFIG.boi_id, WORD, CONFIG.boi_id)
    answer(pipeline, request(1, "On."), cfg_scale=3.0, cfg_image=2.0, max_tokens=60)
    prompt, longest = fed[0][1], 1 + L + 2 + 1  # <bos>, the image, <sep>
    image = [(2, longest), (3, 1), *[(3, 1)] * L]  # contexts, <boi>, latents
    assert fed == [(1, prompt), (1, 1), *image, (1, 1), (1, 1), *image, (1, 1)]


def test_rows_that_do_not_write_are_not_fed(pipeline, fed, monkeypatch):
    words = {1: 1, 2: 4}  # how many, by seed
    choose = lambda row, *_: WORD if len(row.ids) < words[row.request.seed] else CONFIG.sep_id
    monkeypatch.setattr(sample, "choose_token", choose)
    answer(pipeline, request(1, "What?", seed=1), request(1, "What?", seed=2))
    assert [rows for rows, _ in fed] == [2, 2, 1, 1, 1]


def test_a_prompt_without_images_runs_no_encoder(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline.vae, "encode", None)
    assert answer(pipeline, request("a star"))[0].images


def test_images_of_a_batch_are_decoded_in_one_call(pipeline, monkeypatch):
    decode, shapes = pipeline.vae.decode, []
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: shapes.append(z.shape) or decode(z))
    answer(pipeline, request("a star"), request("a circle"), request("a square"), max_images=1)
    assert shapes == [(3, L, C)]


def test_photos_are_read_when_their_batch_begins(pipeline, tmp_path, monkeypatch):
    """Those of a long file are never in memory together."""
    picture(1).save(tmp_path / "a.png")
    lines = [json.dumps({"prompt": "What?", "images": [str(tmp_path / "a.png")]})] * 6
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    read = data.read_requests(str(tmp_path / "r.jsonl"))
    requests = [sample.Request(line.segments) for line in read]
    assert all(isinstance(s.content, Path) for r in requests for s in r.images)
    open_image, happened = data.open_image, []
    monkeypatch.setattr(data, "open_image", lambda p: happened.append("open") or open_image(p))
    watch = lambda number, answer: happened.append("end") if answer.complete else None
    script(monkeypatch, WORD)
    generate(pipeline, requests, batch_size=2, progress=False, watch=watch)
    assert happened == ["open", "open", "end", "end"] * 3


# --- Budgets, notes, progress --------------------------------------------------------------------


@pytest.mark.parametrize("max_tokens", [19, 27, 35, 36, 37, 54, 55])
def test_the_budget_never_cuts_an_image(pipeline, max_tokens, monkeypatch):
    """Whatever the budget, every image that was begun has all its latents."""
    always(CONFIG.boi_id, monkeypatch)
    (told,) = answer(pipeline, request("a star"), max_tokens=max_tokens)
    assert len(told.images) == max(1, max_tokens // 18 - (max_tokens % 18 < 1))


def test_an_answer_ends_where_the_model_says_so_or_with_its_budget(pipeline, monkeypatch):
    question = request(1, "What?")
    for end in (CONFIG.sep_id, CONFIG.eos_id):
        always(end, monkeypatch)
        (told,) = answer(pipeline, question)
        assert told.complete and not told.segments and not told.notes
        assert "would have stopped" in answer(pipeline, question, min_images=1)[0].notes[0]
    always(WORD, monkeypatch)
    for most in (1, 3):
        (told,) = answer(pipeline, question, max_tokens=most)
        assert told.text == pipeline.tokenizer.decode([WORD] * most)
    row = sample.Row(pipeline, question, sample.Options(max_tokens=10**6))
    assert row.budget + len(row.contexts[0].tokens) == CONFIG.max_position_embeddings


def test_half_a_character_is_shown_when_it_is_whole(pipeline, monkeypatch):
    script(monkeypatch, *[WORD] * 3)
    said, seen = {1: "a", 2: "a\ufffd", 3: "a\u00e9"}, []
    tokenizer = types.SimpleNamespace(
        decode=lambda ids: said[len(ids)], encode=pipeline.tokenizer.encode
    )
    watch = lambda _, answer: seen.append(answer.text)
    answer(dataclasses.replace(pipeline, tokenizer=tokenizer), request(1, "What?"), watch=watch)
    assert seen == ["a", "a", "a\u00e9", "a\u00e9"]


def test_images_that_are_missing_are_forced_and_said_so(pipeline, monkeypatch):
    always(CONFIG.sep_id, monkeypatch)
    question = request(1, "What colour is the star?")
    assert not answer(pipeline, question)[0].images
    (told,) = answer(pipeline, question, min_images=2)
    assert len(told.images) == 2 and len(told.notes) == 2
    assert "would have stopped" in told.notes[0] and "--min-images" in told.notes[0]
    always(WORD, monkeypatch)  # a babbler, stopped while there is room
    (told,) = answer(pipeline, question, min_images=2, max_tokens=50)
    assert len(told.images) == 2 and "tokens are left" in told.notes[0]
    assert told.segments[0].content and "cut" in told.notes[-1]
    (told,) = answer(pipeline, question, min_images=2, max_tokens=37)  # they and <sep> fill it
    assert told.segments[0].is_image and len(told.images) == 2


def test_no_image_is_begun_past_the_maximum(pipeline, monkeypatch):
    wants_boi = 9.0 * (torch.arange(CONFIG.vocab_size) == CONFIG.boi_id)
    monkeypatch.setattr(pipeline.model.lm_head, "forward", lambda h: wants_boi + 0 * h[:, :1])
    for most in (0, 1, 2):
        (told,) = answer(pipeline, request("a star"), max_images=most, max_tokens=60)
        assert len(told.images) == most
        left_out = f"image {most + 1} was left out: --max-images is {most}"
        assert sum(left_out in note for note in told.notes) == 1
    notes = answer(pipeline, request("a star"), max_tokens=30)[0].notes
    assert sum("image 2 was left out: it takes 19 tokens" in note for note in notes) == 1


def test_what_fits_is_told_before_the_start(pipeline):
    def told(**options):
        options = sample.Options(**options)
        row = sample.Row(pipeline, request("a star"), options)
        return sample.budget_line(pipeline, [row], options.max_images)

    assert "3 images x 18 + text fits 74" in told(max_images=3)
    assert "2 images x 18 + text fits 40" in told(max_tokens=40)
    assert "only 2 of 5 images x 18 + text fits 40" in told(max_tokens=40, max_images=5)
    assert "needs 55" in complaint(lambda: told(max_tokens=40, min_images=3))


def test_an_answer_is_watched_as_it_grows(pipeline, monkeypatch):
    """Token after token; an image is begun before it is finished."""
    script(monkeypatch, 60, 61, 62, CONFIG.boi_id, 70, 71)
    seen = []
    watch = lambda _, a: seen.append((a.text, len(a.images), a.drawing, a.complete))
    (told,) = answer(pipeline, request(1, "What?"), watch=watch)
    decode = pipeline.tokenizer.decode
    before = [decode([60, 61, 62][:n]) for n in (1, 2, 3)]
    after = [" ".join([before[2], decode([70, 71][:n])]) for n in (1, 2)]
    assert seen == [
        *((text, 0, False, False) for text in before),
        (before[2], 0, True, False), (before[2], 1, False, False), (before[2], 1, False, False),
        *((text, 1, False, False) for text in after), (after[1], 1, False, True),
    ]  # fmt: skip
    assert [s.is_image for s in told.segments] == [False, True, False] and len(told.latents) == 1


def test_top_p_keeps_the_most_likely_tokens():
    logits = torch.tensor([5.0, 4.0, 0.0, -5.0])
    drawn = {sample.pick_token(logits, 1.0, 0.9, rng) for rng in [seeded(0)] for _ in range(300)}
    assert drawn == {0, 1}
    assert {sample.pick_token(logits, 1.0, 1e-6, seeded(s)) for s in range(50)} == {0}
    assert sample.pick_token(logits, 0.0, 1.0, seeded(0)) == 0
    assert sample.pick_token(logits, 1e-308, 1.0, seeded(0)) == 0
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, wanted in ((4.0, {0, 1}), (1.0, {0})):  # of what is drawn from
        draw = functools.partial(sample.pick_token, logits, temperature, 0.6)
        assert {draw(rng) for rng in [seeded(0)] for _ in range(100)} == wanted


# --- Guidance ------------------------------------------------------------------------------------


def test_contexts_of_an_edit_are_the_whole_prompt_its_images_and_nothing():
    image, text = Segment(picture(1)), Segment("Make the star blue.")
    rows = lambda prompt, d=DEFAULTS, **o: sample.contexts(Request(prompt), d, sample.Options(**o))
    both, pair, empty = [image, text], [image] * 2, [Segment("Generate an image.")]
    assert rows(both, cfg_scale=4.0, cfg_image=1.5) == [(both, 4.0), ([image], -2.5), (empty, -0.5)]
    assert rows(both, cfg_scale=4.0, cfg_image=1.0) == [(both, 4.0), ([image], -3)]
    assert rows(both, cfg_scale=4.0, cfg_image=4.0) == [(both, 4.0), (empty, -3)]
    assert rows(both, cfg_scale=1.0) == [(both, 1.0)]
    assert rows(pair, cfg_scale=4.0, cfg_image=2.0) == [(pair, 2.0), (empty, -1)]
    two = dataclasses.replace(DEFAULTS, interleaved={"cfg_scale": 2.0, "cfg_image": 2.0})
    assert rows(pair, two, cfg_scale=4.0) == [(pair, 4.0), (empty, -3)]
    assert rows([text], cfg_scale=4.0) == [([text], 4.0), (empty, -3)]
    three = dataclasses.replace(two, cfg_scale=3.0)
    assert rows([text], three, min_images=1)[0][1] == 3.0  # an image, then perhaps text
    assert rows([text], three, min_images=2) == [([text], 2.0), (empty, -1)]
    assert rows(both, three) == [(both, 2.0), (empty, -1)]
    assert rows(both, two, cfg_scale=1.5) == [(both, 1.5), (empty, -0.5)]  # not more to images
    plain = sample.Generation()  # no guidance, unless a checkpoint asks for it
    assert len(rows([text], plain)) == len(rows(both, plain)) == 1


def test_guidance_scale_one_is_no_guidance_and_the_unconditional_prompt_matters(pipeline):
    plain, guided = (image_of(pipeline, "a star", cfg_scale=s) for s in (1.0, 3.0))
    assert grey_levels(plain, guided) > 3
    assert grey_levels(image_of(pipeline, "a star", cfg_scale=1.0, steps=1), plain) > 3
    defaults = dataclasses.replace(pipeline.defaults, unconditional="a red circle")
    other = dataclasses.replace(pipeline, defaults=defaults)
    assert grey_levels(image_of(other, "a star", cfg_scale=1.0), plain) == 0
    assert grey_levels(image_of(other, "a star", cfg_scale=3.0), guided) > 3


def test_three_way_guidance_reduces_to_two_way_and_to_none(pipeline, monkeypatch):
    """A context with a weight of zero changes nothing against one that is left out."""
    draw = functools.partial(image_of, pipeline, 1, "Make the star blue.", seed=3)
    contexts = sample.contexts
    keep_all = lambda r, d, o: [
        *contexts(r, d, o),
        *[(prompt, 0.0) for prompt in ([r.prompt[0]], [Segment("Generate an image.")])],
    ]
    for text, images in ((3.0, 1.0), (3.0, 3.0), (1.0, 1.0)):
        plain = draw(cfg_scale=text, cfg_image=images)
        with monkeypatch.context() as patch:
            patch.setattr(sample, "contexts", keep_all)
            assert grey_levels(draw(cfg_scale=text, cfg_image=images), plain) <= 2
    assert grey_levels(draw(cfg_scale=3.0, cfg_image=2.0), plain) > 3


@pytest.mark.parametrize(
    "choice",
    [dict(image_head="mse"), dict(vision_embedding="argmin", image_head="tokens"),
     dict(vision_embedding="linear")],
)  # fmt: skip
def test_every_image_head_and_embedding_draws(pipeline, choice):
    torch.manual_seed(0)
    model = Orthus(OrthusConfig.preset("tiny", **SMALL, **choice))
    other = dataclasses.replace(pipeline, model=model)
    assert len(answer(other, request("a star"))[0].images) == 1


# --- The shipped model ---------------------------------------------------------------------------


def test_the_shipped_model_draws_what_is_asked(tmp_path):
    """Two captions of each of GenEval's kinds: at least 10 of 12 right by the detector."""
    from evaluate import detect, judge
    from shapes import Shapes

    rng, world = random.Random("shipped"), Shapes(12345)
    kinds = ("one object", "two objects", "counting", "colours", "position", "binding")
    examples = [world.text_to_image(rng, kind) for kind in kinds for _ in range(2)]
    requests = [Request(e.segments[:1], seed) for seed, e in enumerate(examples)]
    answers = answer(sample.load(ROOT / "checkpoints" / "tiny"), *requests)
    right = [judge(e, detect(a.images[0])) for e, a in zip(examples, answers, strict=True)]
    assert sum(right) >= 10, right


# --- The Python API ------------------------------------------------------------------------------


NAN = float("nan")
WRONG = {
    "batch_size": [0, -1, 1.5, "x", None, True], "steps": [0, 1001, "x", 2.0, NAN],
    "temperature": [NAN, -1, float("inf"), "x", None], "cfg_scale": [NAN, -1, "x"],
    "cfg_image": [NAN, [1]], "top_p": [0, 1.1, NAN], "max_tokens": [0, 1e9, "x"],
    "min_images": [-1, None, 0.5], "max_images": [-1, "x"],
}  # fmt: skip


def test_wrong_options_raise_with_name_and_value(pipeline):
    for name, values in WRONG.items():
        for value in values:
            message = complaint(lambda: answer(pipeline, request("a"), **{name: value}))  # noqa: B023
            assert name in message and repr(value) in message


def test_wrong_requests_raise_with_the_value():
    for prompt in ("a star", None, [], ["a star"], Segment("a star")):
        assert repr(prompt)[:40] in complaint(lambda: Request(prompt))  # noqa: B023
    for seed in (-1, 1.5, "x", None, 2**32):
        assert repr(seed) in complaint(lambda: Request([Segment("a")], seed))  # noqa: B023


def test_numbers_that_are_not_finite_stop_the_drawing(directory, tmp_path, monkeypatch):
    """Small checkpoints are checked as they are read, large ones where the numbers come out."""
    shutil.copytree(directory, tmp_path / "copy")
    path = tmp_path / "copy" / checkpoint.MODEL
    for name, part in (("image_head.input_proj.weight", "latent"), ("lm_head.weight", "logits")):
        tensors = load_file(directory / checkpoint.MODEL)
        tensors[name][0] = NAN
        save_file(tensors, path)
        assert name in complaint(lambda: sample.load(tmp_path / "copy"))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "SMALL", 0)
            broken = sample.load(tmp_path / "copy")
            message = complaint(lambda: answer(broken, request("a star")))  # noqa: B023
            assert part in message and "not finite" in message


# --- The command line ----------------------------------------------------------------------------


@pytest.fixture
def run(run_main, directory):
    """sample.py with arguments, few steps, and the small model."""

    def run(*args):
        given = () if "--checkpoint" in args else ("--checkpoint", directory)
        return run_main(sample, *given, "--device", "cpu", *args)

    return run


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_command_line_writes_pictures_in_prompt_order(run, pipeline, tmp_path, monkeypatch):
    script(monkeypatch)
    out = tmp_path / "new" / "folder"
    code, said, _ = run("--prompt", "a star", "--prompt", "a circle", "--num-images", 2,
                        "--seed", 5, "--scale", 1, "--output", out)  # fmt: skip
    assert code == 0 and names(out) == {f"000{i}.png" for i in range(4)}
    assert str(out / "0000.png") in said and "seed 6" in said and "seconds" in said
    last = Image.open(out / "0003.png")
    whole = answer(pipeline, request("a circle", seed=6))[0]
    assert last.size == (64, 64) and grey_levels(last, whole.images[0]) <= FEW


def test_a_checkpoints_own_scale_and_pixels_and_the_steps_and_no_image(run, damaged, tmp_path):
    config = checkpoint.read_json(damaged / checkpoint.CONFIG)
    config["generation"] |= {"scale": 2, "hub_pixels": True}
    (damaged / checkpoint.CONFIG).unlink()
    (damaged / checkpoint.CONFIG).write_text(json.dumps(config))
    run("--checkpoint", damaged, "--prompt", "a star", "--max-images", 1, "--output", tmp_path)
    assert Image.open(tmp_path / "0000.png").size == (128, 128)
    run("--prompt", "a star", "--max-images", 0, "--output", tmp_path / "none")
    assert names(tmp_path / "none") == set()
    pipeline = sample.load(damaged, dtype=torch.bfloat16)
    assert pipeline.vae.post_quant_conv.weight.dtype == torch.float32
    seen, encode = [], pipeline.vae.encode
    pipeline.vae.encode = lambda images: seen.append(images) or encode(images)
    answer(pipeline, request(1, "What?"), max_tokens=1)
    assert torch.equal(seen[0][0], data.to_tensor(picture(1), 64, hub_pixels=True))


def test_scale_device_and_dtype(run_main, directory, tmp_path):
    more = ("--device", "auto"), ("--dtype", "float16", "--vae", directory)
    for scale, flags in enumerate(more, 1):
        args = "--checkpoint", directory, "--prompt", "a star", "--scale", scale, *flags
        assert run_main(sample, *args, "--output", tmp_path)[0] == 0
        assert Image.open(tmp_path / "0000.png").size == (64 * scale, 64 * scale)
    assert checkpoint.pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")


def test_a_film_has_a_frame_for_each_latent_and_one_before(run, tmp_path, monkeypatch):
    interleaved(monkeypatch)
    flags = "--film", "--scale", 2, "--min-images", 2, "--output", tmp_path
    run("--prompt", "Once", *flags)
    for name in ("0000", "0001"):
        with Image.open(tmp_path / f"{name}.gif") as film:
            assert film.n_frames == L + 1 and film.size == (128, 128)
            assert film.info["duration"] < 200
            film.seek(L)
            last = film.convert("RGB")
            assert film.info["duration"] == 2000
        whole = Image.open(tmp_path / f"{name}.png")
        assert np.abs(np.asarray(last, int) - np.asarray(whole, int)).mean() < 12  # 256 colours


@torch.inference_mode()
def test_what_a_film_has_not_drawn_yet_is_the_mean_latent(pipeline):
    latents = torch.randn(L, C, generator=seeded(0))
    frames, mean = sample.film(pipeline.vae, latents), latents.mean(0).expand(L, C)
    for drawn in (0, 1, 3, L):
        own = torch.cat([latents[:drawn], mean[drawn:]])
        wanted = data.to_image(pipeline.vae.decode(own[None])[0])
        assert grey_levels(frames[drawn], wanted) <= 1


def test_compiled_steps_draw_the_same_picture(run, tmp_path, monkeypatch):
    calls = []
    script(monkeypatch)

    def compile(step, **_):
        return lambda *args: calls.append(step.__qualname__) or step(*args)

    monkeypatch.setattr(torch, "compile", compile)
    _, _, warned = run("--prompt", "a star", "--compile", "--output", tmp_path / "fast")
    run("--prompt", "a star", "--output", tmp_path / "slow")
    fast, slow = (Image.open(tmp_path / f / "0000.png") for f in ("fast", "slow"))
    assert grey_levels(fast, slow) == 0 and "warning" not in warned
    assert calls.count("DiffusionHead.step") == L * 3
    assert calls.count("Orthus.step") == 1 + L + 1  # <boi>, latents, <eoi>
    sample.compile_steps(Orthus(dataclasses.replace(CONFIG, image_head="mse")))  # has no steps


def test_without_a_compiler_one_line_says_so(run, tmp_path, monkeypatch):
    def compile(step, **_):
        def fail(*_):
            raise RuntimeError("no C++ compiler\nfound anywhere")

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    code, _, warned = run("--prompt", "a star", "--compile", "--output", tmp_path)
    lines = [line for line in warned.split("\n") if "no C++ compiler" in line]
    assert code == 0 and len(lines) == 1 and (tmp_path / "0000.png").is_file()


def interleaved(monkeypatch, images: int = 2) -> None:
    """A model that writes a word, an image, a word, an image, ..."""
    script(monkeypatch, *[WORD, CONFIG.boi_id] * images)


def test_a_story_is_written_with_its_pictures(run, tmp_path, monkeypatch):
    interleaved(monkeypatch)
    picture(3).save(tmp_path / "in.png")
    out = tmp_path / "out"
    code, said, _ = run("--image", tmp_path / "in.png", "--prompt", "Continue this story.",
                        "--max-images", 2, "--output", out)  # fmt: skip
    assert code == 0 and "2 images x 18 + text fits" in said
    assert names(out) == {"0000.png", "0001.png", "story.md", "story.png"}
    story = (out / "story.md").read_text()
    assert story.startswith("> `<image>` Continue this story.")
    assert story.index("(0000.png)") < story.index("(0001.png)")
    assert Image.open(out / "story.png").width > 3 * 64  # the prompt's image and both of the answer
    before = (out / "story.png").read_bytes()
    run("--image", out / "story.png", "--prompt", "On.", "--max-images", 2, "--output", out)
    assert (out / "story.png").read_bytes() == before and (out / "story_.png").is_file()


@pytest.mark.parametrize("prompts", [1, 2])
def test_ctrl_c_keeps_what_is_finished(run, tmp_path, monkeypatch, prompts):
    interleaved(monkeypatch, 3)
    decode_image, made = VQVAE.decode, []

    def decode(self, latents):
        made.append(len(list(tmp_path.glob("*.png"))))
        if len(made) == 2:
            raise KeyboardInterrupt
        return decode_image(self, latents)

    monkeypatch.setattr(VQVAE, "decode", decode)
    code, said, warned = run(*["--prompt", "Once more."] * prompts, "--min-images", 3,
                             "--output", tmp_path)  # fmt: skip
    assert code == 130 and "interrupted" in warned and "\n(seed" not in said
    assert made == [0, 1]  # the first was on disk before the second was finished
    pictures = {f"000{i}.png" for i in range(prompts)}  # the first of each answer
    assert names(tmp_path) == {*pictures, "story.md", "story.png"}


@pytest.mark.parametrize("name", ["0000.png", "0000.gif"])
def test_an_answer_does_not_overwrite_its_own_picture(run, tmp_path, name):
    picture(3).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    run("--image", tmp_path / name, "--min-images", 1, "--max-images", 1, "--film",
        "--output", tmp_path)  # fmt: skip
    assert (tmp_path / name).read_bytes() == before
    assert names(tmp_path) - {"story.md", "story.png"} == {name, "0001.png", "0001.gif"}


@pytest.mark.parametrize("images", [0, 2])
def test_text_is_whole_on_a_terminal(run, pipeline, tmp_path, monkeypatch, images):
    """What the progress bar writes to the same terminal never wipes a line of the answer."""
    script(monkeypatch, 60, 61, *[CONFIG.boi_id, 62] * images)
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # one terminal for both
    picture(3).save(tmp_path / "in.png")
    _, said, _ = run("--image", tmp_path / "in.png", "--prompt", "What?", "--output", tmp_path)
    lines = [line.rstrip("\r").split("\r")[-1] for line in said.split("\n")]
    words = pipeline.tokenizer.decode([60, 61])
    assert any(line.startswith(words) for line in lines), said


def test_images_of_a_batch_are_numbered_in_prompt_order(pipeline, directory, tmp_path):
    """The second answer is finished first: it waits for its turn."""
    requests = [(text, request(text)) for text in ("a star", "a circle")]
    args = sample.parse_args(["--prompt", "x", "--output", str(tmp_path), "--scale", "1"])
    assert (args.seed, args.num_images) == (0, 1)
    with open(tmp_path / "results.jsonl", "wb") as results:
        writer = sample.Writer(pipeline, requests, args, results)
        for number, colour in ((1, "blue"), (0, "red")):
            told = sample.Answer([Segment(Image.new("RGB", (8, 8), colour))])
            writer.take(number, told)
            told.complete = True
            writer.take(number, told)
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    images = [json.loads(line)["images"] for line in lines]
    assert images == [[str(tmp_path / "0000.png")], [str(tmp_path / "0001.png")]]
    assert Image.open(images[0][0]).getpixel((0, 0)) == (255, 0, 0)


@pytest.fixture
def requests_file(tmp_path):
    picture(3).save(tmp_path / "in.png")
    lines = [
        {"prompt": "a red circle"},
        {"prompt": "What colour is the star?", "images": [str(tmp_path / "in.png")], "seed": 3},
        {"prompt": "a star", "seed": 0},
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "requests.jsonl"


def test_requests_file_is_answered_line_by_line(run, requests_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    run("--requests", requests_file, "--output", out, "--seed", 1)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in requests_file.read_text().splitlines()]
    assert [r["prompt"] for r in results] == [line["prompt"] for line in lines]
    assert [r["seed"] for r in results] == [1, 3, 0]
    assert all(set(r) == {"prompt", "text", "images", "seed"} for r in results)
    assert Path(results[0]["images"][0]).is_file()
    assert (out / "mine.txt").read_text() == "kept" and "results.jsonl.part" not in names(out)


def test_earlier_results_stay_until_new_ones_are_whole(run, requests_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.jsonl").write_text("earlier")
    seen, decode = [], VQVAE.decode

    def stop(self, latents):
        seen.append((out / "results.jsonl").read_text())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(VQVAE, "decode", stop)
    args = "--requests", requests_file, "--batch-size", 1, "--output", out
    assert run(*args)[0] == 130
    assert (out / "results.jsonl").read_text() == "earlier" and set(seen) == {"earlier"}
    finished = (out / "results.jsonl.part").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in finished][:1] == ["a red circle"]
    monkeypatch.setattr(VQVAE, "decode", decode)
    assert run(*args)[0] == 0 and len((out / "results.jsonl").read_text().splitlines()) == 3


def test_a_folder_belongs_to_one_run_at_a_time(run, tmp_path):
    with checkpoint.lock(tmp_path):
        code, _, said = run("--prompt", "a star", "--output", tmp_path)
    assert code == 2 and said.count("\n") == 1 and str(tmp_path) in said and "in use" in said
    assert names(tmp_path) == set()
    assert run("--prompt", "a star", "--output", tmp_path)[0] == 0


def test_links_in_the_folder_are_not_followed(run, requests_file, tmp_path):
    out, victim = tmp_path / "out", tmp_path / "victim"
    out.mkdir()
    victim.write_text("kept")
    for name in ("results.jsonl", "results.jsonl.part", "0000.png", "0000.png.part"):
        (out / name).symlink_to(victim)
    (out / "0001.png").symlink_to(out / "0001.png")  # a link to itself
    assert run("--requests", requests_file, "--output", out)[0] == 0
    assert victim.read_text() == "kept" and not (out / "0000.png").is_symlink()


def test_the_budget_is_told_where_images_are_asked_for(run, tmp_path):
    asked = "--prompt", "a star", "--output", tmp_path
    _, said, _ = run(*asked, "--min-images", 1, "--max-tokens", 40)
    assert said.startswith("budget: 2 images x 18 + text fits 40\n")
    assert "budget:" not in run(*asked)[1]


def test_unknown_words_are_named(run, tmp_path, capsys):
    code, _, warned = run("--prompt", "a purple dog", "--output", tmp_path)
    assert code == 0 and "'dog'" in warned and "purple" in warned.split("it knows")[1]
    sample.warn_unknown_words({"a purple dog"}, [])  # a large model, whose words are not listed
    assert capsys.readouterr().err == ""


# --- One line and exit code 2 --------------------------------------------------------------------

A = ("--prompt", "a star")
BAD = [  # arguments, what the line must name
    ([], "--prompt"), (["--prompt", " "], "empty"), (["--prompt", "\ud800"], "ud800"),
    (["--prompt", "a star " * 400], "shorten"), (["--prompt", "<image>"], "<image>"),
    ([*A, "--image", __file__], "test_sample.py"), ([*A, "--image", "no.png"], "no.png"),
    ([*A, "--image", ""], "image"), ([*A, "--image", "/dev/zero"], "/dev/zero"),
    ([*A, "--checkpoint", "/nowhere"], "/nowhere"), ([*A, "--checkpoint", __file__], __file__),
    ([*A, "--vae", "/nowhere"], "/nowhere"), ([*A, "--vae", ""], "checkpoint"),
    ([*A, "--device", "quantum"], "quantum"), ([*A, "--device", "cuda:99"], "cuda:99"),
    ([*A, "--device", "meta"], "meta"), ([*A, "--device", "hpu"], "hpu"),
    ([*A, "--seed", "9999999999"], "from 0 to 2147483648"),
    ([*A, "--dtype", "int8"], "int8"), ([*A, "--stepz", "5"], "--stepz"), ([*A, "more"], "more"),
    ([*A, "--steps", "0"], "--steps"), ([*A, "--steps", "x"], "'x'"), ([*A, "--steps", ""], "''"),
    ([*A, "--top-p", "1.5"], "--top-p"), ([*A, "--temperature", "nan"], "nan"),
    ([*A, "--cfg-scale", "inf"], "inf"), ([*A, "--cfg-image", "-1"], "-1"),
    ([*A, "--seed", "-1"], "-1"), ([*A, "--num-images", "0"], "--num-images"),
    ([*A, "--batch-size", "0"], "--batch-size"), ([*A, "--scale", "65"], "--scale"),
    ([*A, "--min-images", "3", "--max-images", "2"], "--max-images 2"),
    ([*A, "--min-images", "3", "--max-tokens", "40"], "--max-tokens"),
    ([*A, "--min-images", "40"], "context 512"), ([*A, "--max-tokens", "5"], "max tokens 5"),
    ([*A, "--output", ""], "--output"), ([*A, "--output", __file__], "test_sample.py"),
    ([*A, "--output", __file__ + "/deep"], "test_sample.py"), ([*A, "--output", "a\0b"], "null"),
    ([*A, "--requests", __file__], "--requests"), (["--requests", "no.jsonl"], "no.jsonl"),
    (["--requests", "/tmp"], "/tmp"), (["--requests", "/dev/zero"], "/dev/zero"),
    (["--requests", __file__], "line 1"),
    (["--requests", __file__, "--num-images", "2"], "--num-images"),
]  # fmt: skip


def refused(run, out: Path, args, wanted: str) -> None:
    given = () if "--output" in args else ("--output", out)
    code, said, warned = run(*args, *given)
    assert code == 2 and said == "" and warned.count("\n") == 1 and wanted in warned, (args, warned)
    assert not out.exists()


def test_bad_arguments_are_one_line_and_exit_code_2(run, tmp_path):
    for args, wanted in BAD:
        refused(run, tmp_path / "out", args, wanted)


LINES = [
    ("{", "JSON"), ("[" * 100_000, "JSON"), ('{"prompt": ""}', "empty"), ("{}", "prompt"),
    ("[1]", "[1]"), ("null", "None"), ('{"prompt": 1}', "prompt is 1"),
    ('{"prompt": "a", "seed": 1.5}', "1.5"), ('{"prompt": "a", "seed": -1}', "-1"),
    ('{"prompt": "a", "seed": true}', "True"), ('{"prompt": "a", "seed": NaN}', "nan"),
    ('{"prompt": "a", "images": "x.png"}', "x.png"), ('{"prompt": "a", "images": [1]}', "[1]"),
    ('{"prompt": "a", "images": null}', "None"), ('{"prompt": "a", "images": ["x.png"]}', "x.png"),
    ('{"prompt": "a", "images": ["\\u0000"]}', "image"), ('{"prompt": "a", "sed": 3}', "sed"),
    ('{"prompt": "\\ud800"}', "prompt"),
]  # fmt: skip


def test_bad_requests_name_their_line(run, tmp_path):
    path = tmp_path / "requests.jsonl"
    for line, wanted in LINES:
        path.write_text('{"prompt": "a star"}\n' + line)
        refused(run, tmp_path / "out", ["--requests", path], wanted)
        assert "line 2" in complaint(lambda: data.read_requests(str(path)))
    path.write_bytes(b'{"prompt": "\xff"}')
    refused(run, tmp_path / "out", ["--requests", path], "UTF-8")
    path.write_text("\n\n")
    refused(run, tmp_path / "out", ["--requests", path], "no request")


def test_answers_never_overwrite_their_requests(run, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"prompt": "a star"}')
    code, _, said = run("--requests", path, "--output", tmp_path)
    assert code == 2 and "overwrite" in said and path.read_text() == '{"prompt": "a star"}'


BIG = 10**12
DAMAGE = [  # section and field of config.json, values; the line names field or value
    ("model", "hidden_size", [0, -1, "6", None, 64.0, 1e30, BIG, NAN, [64], 6]),
    ("model", "num_hidden_layers", [0, 10**7, "2"]), ("model", "head_blocks", [0, 10**7]),
    ("model", "max_position_embeddings", [0, BIG]), ("model", "num_codes", [0, 10**6]),
    ("model", "rms_norm_eps", [0, "x", NAN]), ("model", "rope_theta", [-1.0]),
    ("model", "swin_norm", [1, "no"]), ("model", "image_head", ["nose", 3, None]),
    ("model", "tau", [0.0, NAN]), ("model", "latent_scale", [0, NAN]),
    ("model", "num_attention_heads", [3, 0]), ("model", "num_key_value_heads", [3]),
    ("model", "bos_id", [1, -1, 320, 1.0]), ("model", "eoi_id", [20]),
    ("model", "image_id", [320, BIG]), ("model", "nonsense", [1]),
    ("model", "latents_per_image", [15, 2**20]),
    ("vae", "resolution", [63, 0, "64"]),
    ("vae", "channel_multiplier", [[], [0], "x", 3, [2**24]]),
    ("vae", "groups", [7, 0]), ("vae", "num_res_blocks", [10**7]),
    ("generation", "steps", [0, 1001, "3", None, 2.5]),
    ("generation", "cfg_scale", [NAN, "x", None]),
    ("generation", "unconditional", [None, 3, "\ud800"]), ("generation", "image_first", [1, "yes"]),
    ("generation", "interleaved", [[], {"steps": 0}, {"cfg_scale": "x"}, {"nonsense": 1}]),
    ("generation", "max_tokens", [0, BIG]), ("generation", "scale", [0, 65]),
    ("generation", "words", ["abc", [1]]),
]  # fmt: skip


@pytest.fixture
def damaged(directory, tmp_path):
    """A checkpoint directory to damage; its files are links."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in directory.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_every_field_of_a_checkpoints_config_is_checked(run, damaged, tmp_path):
    config = checkpoint.read_json(damaged / checkpoint.CONFIG)
    (damaged / checkpoint.CONFIG).unlink()
    for section, name, values in DAMAGE:
        for value in values:
            changed = config | {section: config[section] | {name: value}}
            (damaged / checkpoint.CONFIG).write_text(json.dumps(changed))
            refused(run, tmp_path / "out", [*A, "--checkpoint", damaged], str(damaged))


WEIGHTS = "model.safetensors", "vae.safetensors"
FILES = [  # file, what it holds instead (None: it is missing), what the line names
    *(("config.json", text, "config") for text in (b"", b"{", b"[]", b"\xff", b"[" * 10**5)),
    *(("config.json", text, "damaged") for text in (b'{"model": 3, "vae": {}}', b'{"model": {}}')),
    *((name, text, name) for name in WEIGHTS for text in (None, b"", b"\xff" * 8)),
    *((name, b"\x02\0\0\0\0\0\0\0{}", "0 tensors") for name in WEIGHTS),
    *(("tokenizer.model", text, "tokenizer") for text in (None, b"", b"garbage", b"{")),
]  # fmt: skip


def test_damaged_files_of_a_checkpoint_are_named(run, damaged, directory, tmp_path):
    for name, content, wanted in FILES:
        (damaged / name).unlink()
        if content is not None:
            (damaged / name).write_bytes(content)
        refused(run, tmp_path / "out", [*A, "--checkpoint", damaged], wanted)
        (damaged / name).unlink(missing_ok=True)
        (damaged / name).symlink_to(directory / name)
    for name in (*WEIGHTS, "config.json"):
        whole = (directory / name).read_bytes()
        (damaged / name).unlink()
        (damaged / name).write_bytes(whole[: len(whole) // 2])  # half-written
        refused(run, tmp_path / "out", [*A, "--checkpoint", damaged], name)
        (damaged / name).unlink()
        (damaged / name).symlink_to(directory / name)
