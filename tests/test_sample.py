"""sample.py: the two loops against a naive reference, and the command line."""

import contextlib
import copy
import dataclasses
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import orthus
import pytest
import reference
import torch
from conftest import ROOT, OwnHead, close, complaint, edit_json, grey_levels, randomise, seeded
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import checkpoint
import data
import sample
from checkpoint import Generation
from data import Segment
from orthus import KVCache, Orthus, OrthusConfig
from sample import Request, generate
from vae import VQVAE, VQVAEConfig

SMALL = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
SMALL |= dict(num_key_value_heads=2, head_width=32, latent_scale=1.0, num_codes=32, vocab_size=320)
SMALL |= dict(eoi_id=36, boi_id=37, sep_id=38, image_id=39)
CONFIG = OrthusConfig.preset("tiny", **SMALL)
C, L, BOI, SEP = CONFIG.latent_channels, CONFIG.latents_per_image, CONFIG.boi_id, CONFIG.sep_id
DEFAULTS = Generation(steps=3, cfg_scale=2.0, image_first=True, max_tokens=40)
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
    sections = {"model": CONFIG, "vae": vae, "generation": generation}
    config = {name: dataclasses.asdict(section) for name, section in sections.items()}
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
    return Request([Segment(s if isinstance(s, str) else picture(s)) for s in prompt], seed)


def answer(pipeline, *requests: Request, **settings) -> list[sample.Answer]:
    return generate(pipeline, list(requests), progress=False, **settings)


def image_of(pipeline, *prompt, seed=0, **settings) -> Image.Image:
    """The one picture of an answer."""
    settings = dict(min_images=1, max_images=1) | settings
    return answer(pipeline, request(*prompt, seed=seed), **settings)[0].images[0]


def script(monkeypatch, *tokens: int, **others: tuple[int, ...]) -> None:
    """What each row writes, one token after the other, then <sep>; others: by its prompt's text."""
    left = {}

    def choose(row, logits, config):
        text = str(row.request.prompt[-1].content)
        rest = left.setdefault(row, list(others.get(text, tokens)))
        return rest.pop(0) if rest else SEP

    monkeypatch.setattr(sample, "choose_token", choose)


def always(monkeypatch, token: int) -> None:
    """Make the model want one token wherever it is allowed, else an ordinary word."""
    pick = lambda logits, *_: token if logits[token] > -torch.inf else WORD
    monkeypatch.setattr(sample, "pick_token", pick)


def wants(pipeline, monkeypatch, token: int) -> None:
    """The same from the LM head on: what chooses among its logits stays as it is."""
    logits = 9.0 * (torch.arange(CONFIG.vocab_size) == token)
    logits += torch.arange(CONFIG.vocab_size) == WORD
    monkeypatch.setattr(pipeline.model.lm_head, "forward", lambda h: logits + 0 * h[:, :1])


@pytest.fixture
def picked(monkeypatch) -> list[int]:
    """The tokens that were picked, all rows together."""
    tokens, pick = [], sample.pick_token
    monkeypatch.setattr(sample, "pick_token", lambda *a: tokens.append(pick(*a)) or tokens[-1])
    return tokens


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


def naive_images(pipeline, prompt, said, seed, text_scale, image_scale, drawn):
    """Latents (L, C) of every image of an answer that says said[j] ahead of image j; each latent
    follows those that were `drawn`, since a random model amplifies what rounding makes of them."""
    model, weights, c = pipeline.model, pipeline.model.image_head.state_dict(), CONFIG
    picture_ids = [BOI, *[c.image_id] * L, c.eoi_id]

    def read(segments):  # -> tokens, and latents of the images among them
        tokens, latents = [c.bos_id], [torch.zeros(0, C)]
        for s in segments:
            tokens += picture_ids if s.is_image else pipeline.tokenizer.encode(s.content)
            if s.is_image:
                latents.append(pipeline.vae.encode(data.to_tensor(s.content, 64)[None])[0])
        return [*tokens, SEP], torch.cat(latents)

    full, images = read(prompt), read([s for s in prompt if s.is_image])
    empty, has_images = read([Segment("Generate an image.")]), any(s.is_image for s in prompt)
    has_text = any(not s.is_image for s in prompt)
    others = [images, empty] if has_images and has_text else [empty, empty]
    text_scale = text_scale if has_text else image_scale
    image_scale = image_scale if has_images and has_text else 1.0
    combine = lambda f, i, e: reference.guidance(f, i, e, text_scale, image_scale)
    (tokens, latents), noise, found = full, seeded(seed), []
    for words, own in zip(said, drawn):
        tokens = [*tokens, *words, BOI]
        fresh = [(tokens, latents), *(([*t, BOI], z) for t, z in others)]
        image, starts = [], torch.randn(L, C, generator=noise)
        for n in range(L):  # each time the whole sequence again
            rows = [
                (torch.tensor([t + [c.image_id] * n]), torch.cat([z, own[:n]])) for t, z in fresh
            ]
            hidden = [model(*row)[0, -1] for row in rows]
            latent = reference.draw_latent(weights, c, hidden, combine, starts[n], steps=3)
            image.append(latent)
        tokens, latents = tokens + picture_ids[1:], torch.cat([latents, own])
        found.append(torch.stack(image))
    return torch.stack(found)


@torch.inference_mode()
def test_latents_are_those_of_the_naive_loop(pipeline, monkeypatch):
    """Two images of a text prompt, an edit and an in-context edit, in one batch: each as without
    cache and batch. Image j takes the seed's j-th noise; the guiding contexts restart at it."""
    requests = [request("a star", seed=4), request(1, "Make the star blue.", seed=5)]
    requests += [request(1, 2, 3, seed=5), request("a circle", seed=6)]
    script(monkeypatch, WORD, BOI, WORD, WORD + 1, BOI)
    settings = dict(cfg_scale=3.0, cfg_image=1.5, max_tokens=60, min_images=2)
    for told, asked in zip(answer(pipeline, *requests, **settings), requests):
        own, said = torch.stack(told.latents), [[WORD], [WORD, WORD + 1]]
        wanted = naive_images(pipeline, asked.prompt, said, asked.seed, 3.0, 1.5, own)
        close(own, wanted, atol=1e-3)
        assert (own[0] - own[1]).abs().max() > 0.1


@torch.inference_mode()
def test_the_text_after_an_image_is_what_the_whole_sequence_prefers(pipeline, picked):
    (told,) = answer(pipeline, request("a star", seed=9), max_tokens=40, max_images=1)
    prompt = data.layout([Segment("a star")], pipeline.tokenizer, CONFIG).tokens
    tokens = [*prompt, BOI, *[CONFIG.image_id] * L, CONFIG.eoi_id, *picked]
    hidden = pipeline.model(torch.tensor([tokens]), told.latents[0])[0]
    logits = pipeline.model.lm_head(hidden[len(prompt) + L + 1 : -1]).clone()
    logits[:, : CONFIG.image_id + 1] = -torch.inf
    assert len(picked) > 3 and logits.argmax(-1).tolist() == picked


class Devices(TorchDispatchMode):
    """The devices of all tensors that operators inside read or make. What makes one of Python's
    numbers runs no operator that is seen here: it counts as the CPU."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        for name in ("tensor", "as_tensor", "asarray", "from_numpy"):
            monkeypatch.setattr(torch, name, functools.partial(self.make, getattr(torch, name)))

    def make(self, maker, content, *args, **kwargs):
        self.seen += [] if isinstance(content, torch.Tensor) else ["cpu"]
        return maker(content, *args, **kwargs)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.seen += [t.device.type for t in tensors]
        return result


def test_nothing_inside_an_image_waits_for_the_device(loaded, monkeypatch):
    """draw_image on "meta", where whatever asks for a number raises: from one latent to the next
    no operator reads from the host."""
    model = copy.deepcopy(loaded.model).to("meta")
    pipeline = dataclasses.replace(loaded, model=model)
    devices, calls, head_sample = Devices(monkeypatch), [], model.image_head.sample

    def record(*args, **kwargs):
        calls.append(len(devices.seen))
        return head_sample(*args, **kwargs)

    monkeypatch.setattr(model.image_head, "sample", record)
    monkeypatch.setattr(sample, "prefill", lambda *_: None)  # which is ahead of the loop
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # meta has no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    row = sample.Row(pipeline, request(1, "On."), dict(cfg_scale=3.0, cfg_image=1.5))
    row.cache_rows = [0, 1, 2]
    cache, bar = KVCache(CONFIG, 3, 60, "meta"), tqdm(disable=True, total=0)
    with torch.inference_mode(), devices, pytest.raises(RuntimeError):
        sample.draw_image(pipeline, [row], cache, bar)  # whose end asks for numbers
    inside = devices.seen[calls[1] : calls[-1]]  # the first makes what all others use
    assert len(calls) == L and len(inside) > 1000 and set(inside) == {"meta"}
    for act in (lambda: torch.zeros(2).to("meta"), lambda: torch.as_tensor([1.5], device="meta")):
        devices.seen.clear()
        with devices:
            act()
        assert "cpu" in devices.seen  # or this test would show nothing


# --- The loops -----------------------------------------------------------------------------------


def test_same_seed_same_picture_alone_and_in_a_batch_and_other_seed_another(pipeline):
    """Rows whose guidance is alike are drawn together, unless steps or noise are not."""
    defaults = dataclasses.replace(DEFAULTS, interleaved=dict(steps=2, noise_scale=0.5))
    other = dataclasses.replace(pipeline, defaults=defaults)
    settings = dict(min_images=1, max_images=2)
    requests = [request("a star", seed=4), request("three green squares", seed=4)]
    requests += [request(1, "What colour is it?", seed=4), request(1, 2, 3, seed=5)]
    apart = [answer(other, r, **settings)[0] for r in requests]
    for size in (16, 2):
        for a, b in zip(answer(other, *requests, batch_size=size, **settings), apart):
            assert len(a.images) == len(b.images) > 0
            assert all(grey_levels(x, y) <= FEW for x, y in zip(a.images, b.images))
    (again,) = answer(other, request("a star", seed=3), **settings)
    assert grey_levels(again.images[0], apart[0].images[0]) > 5 * FEW


def test_a_batch_that_does_not_fit_the_memory_says_what_to_lower(pipeline, monkeypatch):
    def scarce(config, rows, *rest):
        if rows > 4:
            raise torch.OutOfMemoryError
        return KVCache(config, rows, *rest)

    monkeypatch.setattr(sample, "KVCache", scarce)
    requests = [request(t) for t in ("a star", "two circles", "stars")]  # two contexts each
    assert "--batch-size" in complaint(lambda: answer(pipeline, *requests))
    assert len(answer(pipeline, *requests, batch_size=2)) == 3


def test_the_prompt_and_its_image_change_the_answer(pipeline, tmp_path):
    draw = functools.partial(image_of, pipeline)
    assert grey_levels(draw("a star"), draw("a circle")) > 3
    first = draw(1, "Make the star blue.")
    assert grey_levels(first, draw(2, "Make the star blue.")) > 3
    exif = Image.Exif()
    exif[0x0112] = 6  # a photo is read as its Exif data turn it
    picture(1).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    turned = Request([Segment(tmp_path / "a.png"), Segment("Make the star blue.")])
    (told,) = answer(pipeline, turned, min_images=1, max_images=1)
    assert grey_levels(told.images[0], first) <= 1


def test_temperature_and_seed_change_the_text(pipeline):
    write = lambda seed, **o: answer(pipeline, request(1, "What?", seed=seed), **o)[0].text
    assert write(0) == write(1)  # greedy
    hot = [write(seed, temperature=1.0, max_images=0) for seed in (0, 0, 1, 2)]
    assert hot[0] == hot[1] and len(set(hot)) == 3
    assert hot[0] != write(0, temperature=2.0, max_images=0)
    narrow = [write(s, temperature=1.0, top_p=1e-6, max_images=0) for s in (0, 1)]
    assert narrow == [write(0, max_images=0)] * 2


def test_image_codes_placeholder_pad_and_bos_are_never_written_as_text(
    pipeline, picked, monkeypatch
):
    answers = answer(pipeline, *(request("a", seed=s) for s in range(8)), temperature=50.0)
    c = CONFIG
    banned = {c.bos_id, c.pad_id, c.unk_id, c.image_id, c.eoi_id, *range(4, 4 + c.num_codes)}
    assert len(picked) > 60 and not banned & set(picked) and any(a.text for a in answers)
    for first in sorted(banned):
        picked.clear()
        wants(pipeline, monkeypatch, first)
        answer(pipeline, request(1, "What?"), max_tokens=1)
        assert picked == [WORD]


def test_the_noise_of_every_latent_is_times_its_scale(pipeline):
    """Which MAR calls the head's temperature; 1 changes nothing, 0 leaves nothing to chance."""
    draw = lambda seed, **o: image_of(pipeline, "a star", seed=seed, **o)
    assert grey_levels(draw(1), draw(1, noise_scale=1.0)) == 0
    assert grey_levels(draw(1), draw(1, noise_scale=0.7)) > 3
    assert grey_levels(draw(1, noise_scale=0.0), draw(2, noise_scale=0.0)) <= 1
    defaults = dataclasses.replace(pipeline.defaults, noise_scale=0.7)  # of the checkpoint
    other = dataclasses.replace(pipeline, defaults=defaults)
    assert grey_levels(image_of(other, "a star", seed=1), draw(1, noise_scale=0.7)) == 0


# --- Who is fed what -----------------------------------------------------------------------------


def test_a_question_is_one_row_however_it_is_guided(pipeline, fed, monkeypatch):
    script(monkeypatch, WORD, WORD)
    answer(pipeline, request(1, "What colour is the star?"), cfg_scale=3.0, cfg_image=2.0)
    assert [rows for rows, _ in fed] == [1, 1, 1]


def test_guidance_contexts_are_read_when_an_image_begins_and_only_then(pipeline, fed, monkeypatch):
    script(monkeypatch, WORD, BOI, WORD, BOI)
    answer(pipeline, request(1, "On."), cfg_scale=3.0, cfg_image=2.0, max_tokens=60)
    prompt, longest = fed[0][1], 1 + L + 2 + 1  # <bos>, the image, <sep>
    image = [(2, longest), (3, 1), *[(3, 1)] * L]  # contexts, <boi>, latents
    assert fed == [(1, prompt), (1, 1), *image, (1, 1), (1, 1), *image, (1, 1)]


def test_rows_that_do_not_write_are_not_fed(pipeline, fed, monkeypatch):
    script(monkeypatch, WORD, **{"What?": (WORD,) * 4})
    answer(pipeline, request(1, "Which?"), request(1, "What?"))
    assert [rows for rows, _ in fed] == [2, 2, 1, 1, 1]


def test_encoder_and_decoder_run_once_a_batch_and_only_where_there_are_images(
    pipeline, monkeypatch
):
    decode, shapes = pipeline.vae.decode, []
    monkeypatch.setattr(pipeline.vae, "encode", None)
    monkeypatch.setattr(pipeline.vae, "decode", lambda z: shapes.append(z.shape) or decode(z))
    answer(pipeline, request("a star"), request("a circle"), request("a square"), max_images=1)
    assert shapes == [(3, L, C)]


def test_photos_are_read_when_their_batch_begins(pipeline, tmp_path, monkeypatch):
    """Those of a long file are never in memory together."""
    picture(1).save(tmp_path / "a.png")
    requests = [Request(data.read_prompt("What?", [str(tmp_path / "a.png")])) for _ in range(6)]
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
    always(monkeypatch, BOI)
    (told,) = answer(pipeline, request("a star"), max_tokens=max_tokens)
    assert len(told.images) == max(1, max_tokens // 18 - (max_tokens % 18 < 1))


def test_an_answer_ends_where_the_model_says_so_or_with_its_budget(pipeline, monkeypatch):
    question = request(1, "What?")
    for end in (SEP, CONFIG.eos_id):
        always(monkeypatch, end)
        (told,) = answer(pipeline, question)
        assert told.complete and not told.segments and not told.notes
        assert len(answer(pipeline, question, min_images=1)[0].notes) == 1
    always(monkeypatch, WORD)
    for most in (1, 3):
        (told,) = answer(pipeline, question, max_tokens=most)
        assert told.text == pipeline.tokenizer.decode([WORD] * most)
    row = sample.Row(pipeline, question, dict(max_tokens=10**6))
    assert row.budget + len(row.contexts[0].tokens) == CONFIG.max_position_embeddings
    row = sample.Row(pipeline, question, dict(max_images=5))  # there is room for all, and text
    assert row.budget > 5 * (L + 2)
    assert "needs 55" in complaint(lambda: answer(pipeline, question, max_tokens=40, min_images=3))


def test_half_a_character_is_shown_when_it_is_whole(pipeline, monkeypatch):
    script(monkeypatch, *[WORD] * 3)
    said, seen = {1: "a", 2: "a\ufffd", 3: "a\u00e9"}, []
    encode = pipeline.tokenizer.encode
    tokenizer = types.SimpleNamespace(decode=lambda ids: said[len(ids)], encode=encode)
    watch = lambda _, answer: seen.append(answer.text)
    answer(dataclasses.replace(pipeline, tokenizer=tokenizer), request(1, "What?"), watch=watch)
    assert seen == ["a", "a", "a\u00e9", "a\u00e9"]


def test_images_that_are_missing_are_forced_and_said_so(pipeline, monkeypatch):
    always(monkeypatch, SEP)
    question = request(1, "What colour is the star?")
    assert not answer(pipeline, question)[0].images
    (told,) = answer(pipeline, question, min_images=2)
    assert len(told.images) == 2 and len(told.notes) == 2
    assert "would have stopped" in told.notes[0] and "--min-images" in told.notes[0]
    always(monkeypatch, WORD)  # a babbler, stopped while there is room
    (told,) = answer(pipeline, question, min_images=2, max_tokens=50)
    assert len(told.images) == 2 and "tokens are left" in told.notes[0]
    assert told.segments[0].content and "cut" in told.notes[-1]
    (told,) = answer(pipeline, question, min_images=2, max_tokens=37)  # they and <sep> fill it
    assert told.segments[0].is_image and len(told.images) == 2


def test_no_image_is_begun_past_the_maximum(pipeline, monkeypatch):
    wants(pipeline, monkeypatch, BOI)
    for most in (0, 1, 2):
        (told,) = answer(pipeline, request("a star"), max_images=most, max_tokens=60)
        assert len(told.images) == most
        left_out = f"image {most + 1} was left out: --max-images is {most}"
        assert sum(left_out in note for note in told.notes) == 1
    notes = answer(pipeline, request("a star"), max_tokens=30)[0].notes
    assert sum("image 2 was left out: it takes 19 tokens" in note for note in notes) == 1


def test_an_answer_is_watched_as_it_grows(pipeline, monkeypatch):
    """Token after token; an image is begun before it is finished."""
    script(monkeypatch, 60, 61, 62, BOI, 70, 71)
    seen, decode = [], pipeline.tokenizer.decode
    watch = lambda _, a: seen.append((a.text, len(a.images), a.drawing, a.complete))
    (told,) = answer(pipeline, request(1, "What?"), watch=watch)
    before = [decode([60, 61, 62][:n]) for n in (1, 2, 3)]
    after = [" ".join([before[2], decode([70, 71][:n])]) for n in (1, 2)]
    wanted = [(text, 0, False, False) for text in before] + [(before[2], 0, True, False)]
    wanted += [(before[2], 1, False, False)] * 2 + [(text, 1, False, False) for text in after]
    assert seen == [*wanted, (after[1], 1, False, True)]
    assert [s.is_image for s in told.segments] == [False, True, False] and len(told.latents) == 1


def test_top_p_keeps_the_most_likely_tokens():
    logits = torch.tensor([5.0, 4.0, 0.0, -5.0])
    drawn = {sample.pick_token(logits, 1.0, 0.9, rng) for rng in [seeded(0)] for _ in range(300)}
    assert drawn == {0, 1}
    assert {sample.pick_token(logits, 1.0, 1e-6, seeded(s)) for s in range(50)} == {0}
    assert {sample.pick_token(logits, t, 1.0, seeded(0)) for t in (0.0, 1e-308)} == {0}
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature, wanted in ((4.0, {0, 1}), (1.0, {0})):  # of what is drawn from
        draw = functools.partial(sample.pick_token, logits, temperature, 0.6)
        assert {draw(rng) for rng in [seeded(0)] for _ in range(100)} == wanted


# --- Guidance and other settings -----------------------------------------------------------------

EMPTY = [Segment("Generate an image.")]


def contexts(prompt, defaults=DEFAULTS, **given):
    asked = Request(prompt)
    return sample.contexts(asked, sample.settings_of(asked, defaults, given))


def test_contexts_of_an_edit_are_the_whole_prompt_its_images_and_nothing():
    text, both = [Segment("a star")], [Segment(picture(1)), Segment("Make the star blue.")]
    images = both[:1]
    assert contexts(both, cfg_scale=4.0, cfg_image=1.5) == [
        (both, 4.0),
        (images, -2.5),
        (EMPTY, -0.5),
    ]
    assert contexts(both, cfg_scale=4.0, cfg_image=1.0) == [(both, 4.0), (images, -3.0)]
    assert contexts(both, cfg_scale=4.0, cfg_image=4.0) == [(both, 4.0), (EMPTY, -3.0)]
    assert contexts(both, cfg_scale=1.0) == [(both, 1.0)]
    pair = images * 2
    assert contexts(pair, cfg_scale=4.0, cfg_image=2.0) == [(pair, 2.0), (EMPTY, -1.0)]
    assert contexts(text, cfg_scale=4.0) == [(text, 4.0), (EMPTY, -3.0)]
    assert len(contexts(text, Generation())) == len(contexts(both, Generation())) == 1
    for found in (contexts(both), contexts(text), contexts(pair, cfg_image=7.5)):
        assert abs(sum(weight for _, weight in found) - 1) < 1e-6


def test_of_two_scales_the_one_that_is_not_given_follows_one_rule():
    """Neither: the checkpoint's. cfg_scale alone: it is both. cfg_image alone: the checkpoint's
    scale beside it. Where text and images alternate, the checkpoint may have other values."""
    edit, plain = request(1, "Make the star blue."), request("a star")
    interleaved = dict(cfg_scale=5.0, cfg_image=1.5, unconditional="generate images")
    defaults = dataclasses.replace(DEFAULTS, cfg_scale=3.0, interleaved=interleaved)

    def scales(asked, defaults=defaults, **given):
        settings = sample.settings_of(asked, defaults, given)
        return settings.cfg_scale, settings.cfg_image

    assert scales(plain) == (3.0, 3.0) and scales(edit) == (5.0, 1.5)
    assert scales(edit, DEFAULTS) == (2.0, 2.0)  # one scale says both
    assert scales(plain, cfg_scale=4.0) == scales(edit, cfg_scale=4.0) == (4.0, 4.0)
    assert scales(edit, cfg_image=2.5) == (5.0, 2.5) and scales(plain, cfg_image=2.5) == (3.0, 2.5)
    assert scales(edit, cfg_scale=4.0, cfg_image=0.0) == (4.0, 0.0)
    assert scales(plain, min_images=1) == (3.0, 3.0)  # an image, then perhaps text
    assert scales(plain, min_images=2) == (5.0, 1.5)
    assert contexts(plain.prompt, defaults, min_images=2)[1][0][0].content == "generate images"


def test_scale_one_is_no_guidance_and_the_unconditional_prompt_matters(pipeline):
    plain, guided = (image_of(pipeline, "a star", cfg_scale=s) for s in (1.0, 3.0))
    assert grey_levels(plain, guided) > 3
    assert grey_levels(image_of(pipeline, "a star", cfg_scale=1.0, steps=1), plain) > 3
    defaults = dataclasses.replace(pipeline.defaults, unconditional="a red circle")
    other = dataclasses.replace(pipeline, defaults=defaults)
    assert grey_levels(image_of(other, "a star", cfg_scale=1.0), plain) == 0
    assert grey_levels(image_of(other, "a star", cfg_scale=3.0), guided) > 3


CHOICES = [dict(image_head="mse"), dict(vision_embedding="argmin", image_head="tokens")]
CHOICES += [dict(vision_embedding="linear"), dict(image_head="own")]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_image_head_and_embedding_draws_a_users_own_too(pipeline, choice, monkeypatch):
    monkeypatch.setitem(orthus.HEADS, "own", OwnHead)
    model = randomise(Orthus(OrthusConfig.preset("tiny", **SMALL, **choice)))
    other = dataclasses.replace(pipeline, model=model)
    assert len(answer(other, request("a star"))[0].images) == 1


def test_a_setting_out_of_its_range_is_named(pipeline):
    for name in ("steps", "cfg_scale", "noise_scale", "top_p", "max_tokens", "min_images", "sed"):
        for value in (-1, "x", float("nan")):
            message = complaint(lambda: answer(pipeline, request("a"), **{name: value}))  # noqa: B023
            assert name in message


@pytest.mark.parametrize("name", ["image_head.input_proj.weight", "lm_head.weight"])
def test_numbers_that_are_not_finite_stop_the_answer(loaded, name):
    """Small checkpoints are checked as they are read, large ones where the numbers come out."""
    model = copy.deepcopy(loaded.model)
    model.get_parameter(name).data[0] = torch.nan
    broken = dataclasses.replace(loaded, model=model)
    assert "not finite" in complaint(lambda: answer(broken, request("a star")))


# --- The shipped model ---------------------------------------------------------------------------


def ink(image: Image.Image) -> list[float]:
    """The mean colour of what is not background."""
    pixels = np.asarray(image).reshape(-1, 3).astype(float)
    return pixels[np.abs(pixels - (250, 248, 242)).max(1) > 100].mean(0).tolist()


def test_the_shipped_model_draws_answers_and_edits():
    shipped, colours = sample.load(ROOT / "checkpoints" / "tiny"), [(220, 40, 40), (45, 80, 220)]
    drawn = answer(shipped, request("a red circle"), request("a blue square"))
    images = [a.images[0] for a in drawn]
    for image, colour in zip(images, colours):
        assert np.abs(np.array(ink(image)) - colour).max() < 40
    ask = lambda image, text: Request([Segment(image), Segment(text)])
    questions = [
        ask(images[0], "What colour is the circle?"),
        ask(images[1], "Is there a red star?"),
    ]
    edit = ask(images[0], "Make the circle blue.")
    *answers, edited = answer(shipped, *questions, edit)
    assert [a.text for a in answers] == ["red", "no"]
    assert np.abs(np.array(ink(edited.images[0])) - colours[1]).max() < 40


# --- The command line ----------------------------------------------------------------------------


@pytest.fixture
def run(run_main, directory, tmp_path):
    """sample.py with arguments, the small model, and a folder that is `out`."""

    def run(*args, out=tmp_path / "out"):
        given = () if "--checkpoint" in args else ("--checkpoint", directory)
        return run_main(sample, *given, "--device", "cpu", "--output", out, *args)

    return run


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def interleaved(monkeypatch, images: int = 2) -> None:
    """A model that writes a word, an image, a word, an image, ..."""
    script(monkeypatch, *[WORD, BOI] * images)


def test_command_line_writes_pictures_in_prompt_order(run, pipeline, tmp_path, monkeypatch):
    """The second prompt is answered first: it waits for its turn."""
    script(monkeypatch, BOI, **{"a star": (BOI, BOI)})
    prompts, out = ("--prompt", "a star", "--prompt", "a circle"), tmp_path / "new" / "folder"
    flags = "--num-images", 2, "--seed", 5, "--scale", 1, "--min-images", 2
    code, said, _ = run(*prompts, *flags, out=out)
    assert code == 0 and names(out) == {*(f"000{i}.png" for i in range(6)), "story.md"}
    lines = [line for line in said.split("\n") if "seed" in line]
    assert lines == [f"{out}/000{i}.png (seed {seed})" for i, seed in enumerate((5, 5, 6, 6, 5, 6))]
    last = Image.open(out / "0005.png")
    whole = answer(pipeline, request("a circle", seed=6), min_images=2)[0]
    assert last.size == (64, 64) and grey_levels(last, whole.images[0]) <= FEW


def test_flags_reach_the_settings(run, pipeline, out, monkeypatch):
    flags = "--steps 2 --cfg-scale 1.5 --cfg-image 1.25 --noise-scale 0.5 --max-images 1"
    run("--prompt", "a star", "--scale", 1, *flags.split())
    names = "steps", "cfg_scale", "cfg_image", "noise_scale", "max_images"
    settings = dict(zip(names, (2, 1.5, 1.25, 0.5, 1)))
    wanted = answer(pipeline, request("a star"), **settings)[0].images[0]
    assert grey_levels(Image.open(out / "0000.png"), wanted) <= FEW


@pytest.fixture
def copied(directory, tmp_path):
    """A checkpoint directory whose files are links."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in directory.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def test_a_checkpoints_own_scale_and_pixels_and_no_image(run, copied, out, tmp_path):
    change = {"scale": 2, "hub_pixels": True}
    edit_json(copied / checkpoint.CONFIG, lambda c: c["generation"].update(change))
    run("--checkpoint", copied, "--prompt", "a star", "--max-images", 1)
    assert Image.open(out / "0000.png").size == (128, 128)
    run("--prompt", "a star", "--max-images", 0, out=tmp_path / "none")
    assert names(tmp_path / "none") == set()
    pipeline = sample.load(copied, dtype=torch.bfloat16)
    assert pipeline.vae.post_quant_conv.weight.dtype == torch.float32
    seen, encode = [], pipeline.vae.encode
    pipeline.vae.encode = lambda images: seen.append(images) or encode(images)
    answer(pipeline, request(1, "What?"), max_tokens=1)
    assert torch.equal(seen[0][0], data.to_tensor(picture(1), 64, hub_pixels=True))


def test_scale_device_dtype_and_another_autoencoder(run, directory, out):
    for scale, flags in enumerate(
        (["--device", "auto"], ["--dtype", "float16", "--vae", directory]), 1
    ):
        assert run("--prompt", "a star", "--scale", scale, *flags)[0] == 0
        assert Image.open(out / "0000.png").size == (64 * scale, 64 * scale)
    assert checkpoint.pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")


def test_a_film_has_a_frame_for_each_latent_and_one_before(run, out, monkeypatch):
    interleaved(monkeypatch)
    run("--prompt", "Once", "--film", "--scale", 2, "--min-images", 2)
    for name in ("0000", "0001"):
        with Image.open(out / f"{name}.gif") as film:
            assert film.n_frames == L + 1 and film.size == (128, 128)
            assert film.info["duration"] < 200
            film.seek(L)
            last = film.convert("RGB")
            assert film.info["duration"] == 2000
        whole = Image.open(out / f"{name}.png")
        assert np.abs(np.asarray(last, int) - np.asarray(whole, int)).mean() < 12  # 256 colours


@torch.inference_mode()
def test_what_a_film_has_not_drawn_yet_is_the_mean_latent(pipeline):
    latents = torch.randn(L, C, generator=seeded(0))
    frames, mean = sample.film(pipeline.vae, latents), latents.mean(0).expand(L, C)
    for drawn in (0, 1, 3, L):
        own = torch.cat([latents[:drawn], mean[drawn:]])
        wanted = data.to_image(pipeline.vae.decode(own[None])[0])
        assert grey_levels(frames[drawn], wanted) <= 1


def test_compiled_parts_draw_the_same_picture(run, tmp_path, monkeypatch):
    calls = []
    script(monkeypatch)

    def compile(part, **_):
        return lambda *args: calls.append(part.__qualname__) or part(*args)

    monkeypatch.setattr(torch, "compile", compile)
    run("--prompt", "a star", "--compile", out=tmp_path / "fast")
    assert calls.count("Orthus.step") == 1 + L + 1  # <boi>, latents, <eoi>
    assert sum(name.startswith("DiffusionHead.") for name in calls) >= L
    run("--prompt", "a star", out=tmp_path / "slow")
    fast, slow = (Image.open(tmp_path / f / "0000.png") for f in ("fast", "slow"))
    assert grey_levels(fast, slow) == 0


def test_a_story_is_written_with_its_pictures(run, out, tmp_path, monkeypatch):
    interleaved(monkeypatch)
    picture(3).save(tmp_path / "in.png")
    asked = "--image", tmp_path / "in.png", "--prompt", "Continue this story."
    assert run(*asked, "--max-images", 2)[0] == 0
    assert names(out) == {"0000.png", "0001.png", "story.md"}
    story = (out / "story.md").read_text()
    assert story.startswith("> `<image>` Continue this story.")
    assert story.index("(0000.png)") < story.index("(0001.png)")


@pytest.mark.parametrize("prompts", [1, 2])
def test_ctrl_c_keeps_what_is_finished(run, out, monkeypatch, prompts):
    interleaved(monkeypatch, 3)
    decode_image, made = VQVAE.decode, []

    def decode(self, latents):
        made.append(len(list(out.glob("*.png"))))
        if len(made) == 2:
            raise KeyboardInterrupt
        return decode_image(self, latents)

    monkeypatch.setattr(VQVAE, "decode", decode)
    code, said, warned = run(*["--prompt", "Once more."] * prompts, "--min-images", 3)
    assert code == 130 and "interrupted" in warned.split("\n")[-2]
    assert made == [0, 1]  # the first was on disk before the second was finished
    pictures = {f"000{i}.png" for i in range(prompts)}  # the first of each answer
    assert names(out) == {*pictures, "story.md"} and said.endswith("\n")


@pytest.mark.parametrize("name", ["0000.png", "0000.gif"])
def test_an_answer_does_not_overwrite_its_own_picture(run, out, name):
    out.mkdir()
    picture(3).save(out / name)
    before = (out / name).read_bytes()
    run("--image", out / name, "--min-images", 1, "--max-images", 1, "--film")
    assert (out / name).read_bytes() == before
    assert names(out) - {"story.md"} == {name, "0001.png", "0001.gif"}


@pytest.mark.parametrize("images", [0, 2])
def test_text_is_whole_on_a_terminal(run, pipeline, tmp_path, monkeypatch, images):
    """What the progress bar writes to the same terminal never wipes a line of the answer."""
    script(monkeypatch, 60, 61, *[BOI, 62] * images)
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # one terminal for both
    picture(3).save(tmp_path / "in.png")
    _, said, _ = run("--image", tmp_path / "in.png", "--prompt", "What?")
    lines = [line.rstrip("\r").split("\r")[-1] for line in said.split("\n")]
    words = pipeline.tokenizer.decode([60, 61])
    assert any(line.startswith(words) for line in lines), said


def test_text_is_on_the_screen_before_the_answer_is_over(run, pipeline, capsys, monkeypatch):
    script(monkeypatch, 60, 61, BOI, 62)
    shown, decode = [], VQVAE.decode
    look = lambda self, latents: shown.append(capsys.readouterr().out) or decode(self, latents)
    monkeypatch.setattr(VQVAE, "decode", look)
    run("--prompt", "Once", "--min-images", 2)
    assert shown[0] == pipeline.tokenizer.decode([60, 61]) + "\n"


@pytest.fixture
def requests_file(tmp_path):
    picture(3).save(tmp_path / "in.png")
    question = {
        "prompt": "What colour is the star?",
        "images": [str(tmp_path / "in.png")],
        "seed": 3,
    }
    lines = [{"prompt": "a red circle"}, question, {"prompt": " a star", "seed": 0}]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "requests.jsonl"


def results_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_requests_file_is_answered_line_by_line(run, requests_file, out):
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    run("--requests", requests_file, "--seed", 1)
    results = results_of(out)
    lines = [json.loads(line) for line in requests_file.read_text().splitlines()]
    assert [r["prompt"] for r in results] == [line["prompt"] for line in lines]
    assert [r["seed"] for r in results] == [1, 3, 0]
    assert all(set(r) == {"prompt", "text", "images", "seed"} for r in results)
    assert Path(results[0]["images"][0]).is_file()
    assert (out / "mine.txt").read_text() == "kept" and "results.jsonl.part" not in names(out)


def test_earlier_results_stay_until_new_ones_are_whole(run, requests_file, out, monkeypatch):
    out.mkdir()
    (out / "results.jsonl").write_text("earlier")
    seen, decode = [], VQVAE.decode

    def stop(self, latents):
        seen.append((out / "results.jsonl").read_text())
        if len(seen) == 2:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(VQVAE, "decode", stop)
    args = "--requests", requests_file, "--batch-size", 1
    assert run(*args)[0] == 130
    assert (out / "results.jsonl").read_text() == "earlier" and set(seen) == {"earlier"}
    finished = (out / "results.jsonl.part").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in finished][:1] == ["a red circle"]
    monkeypatch.setattr(VQVAE, "decode", decode)
    assert run(*args)[0] == 0 and len(results_of(out)) == 3


def test_a_folder_belongs_to_one_run_at_a_time(run, out):
    out.mkdir()
    with checkpoint.lock(out):
        code, _, said = run("--prompt", "a star")
    assert code == 2 and said.count("\n") == 1 and str(out) in said
    assert names(out) == set()
    assert run("--prompt", "a star")[0] == 0


def test_unknown_words_are_named_where_the_known_ones_are_listed(run, copied):
    code, _, warned = run("--prompt", "a purple dog")
    assert code == 0 and "'dog'" in warned and "purple" in warned.split("it knows")[1]
    edit_json(copied / checkpoint.CONFIG, lambda c: c["generation"].update(words=[]))
    assert "dog" not in run("--checkpoint", copied, "--prompt", "a purple dog")[2]
