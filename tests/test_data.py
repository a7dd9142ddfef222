"""data.py: images in and out, prompts, tokenizer, layout, batches, what a spec names."""

import resource
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, complaint, grey_levels, randn
from PIL import Image

import data
from data import Segment, collate, layout
from orthus import OrthusConfig

CONFIG = OrthusConfig.preset("tiny")
TINY = ROOT / "checkpoints" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return data.Tokenizer.from_pretrained(TINY)


def noisy(width: int, height: int) -> Image.Image:
    """A picture of smooth noise: what is resized wrongly shows."""
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


# --- Images --------------------------------------------------------------------------------------


def test_image_survives_the_way_to_a_tensor_and_back():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tensor = data.to_tensor(Image.fromarray(pixels), 64)
    assert tensor.shape == (3, 64, 64) and tensor.min() >= -1 and tensor.max() <= 1
    assert (np.asarray(data.to_image(tensor)) == pixels).all()
    extremes = torch.tensor([-3.0, 3.0, 0.0]).view(3, 1, 1)  # are clamped
    assert data.to_image(extremes).getpixel((0, 0)) == (0, 255, 128)


def test_hub_pixels_are_scaled_as_the_hubs_processor_does():
    white = Image.new("RGB", (64, 64), "white")
    assert (data.to_tensor(white, 64, hub_pixels=True) - 0.989).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_blended_on_white(mode, tmp_path):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0)).convert(mode)
    assert (data.to_tensor(clear, 64) == 1).all()
    Image.new("P", (64, 64)).save(tmp_path / "a.png", transparency=0)  # of a palette
    assert (data.to_tensor(tmp_path / "a.png", 64) == 1).all()


def test_sixteen_bit_greys_keep_their_brightness():
    big = Image.frombytes("I;16B", (64, 64), b"\x80\x80" * 64**2)
    assert data.to_tensor(big, 64).mean().abs() < 0.01
    grey = Image.fromarray(np.full((64, 64), 0x8080, dtype=np.uint16))
    assert data.to_tensor(grey, 64).mean() == pytest.approx(128 / 127.5 - 1, abs=0.01)


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (40, 56), (200, 64), (64, 72)])
def test_an_ordinary_photo_comes_out_as_resized_whole_and_then_cropped(width, height):
    """To few levels: what is cropped first is resized once, what is resized whole twice."""
    photo = noisy(width, height)
    scale = 64 / min(photo.size)
    whole = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS)
    left, top = ((side - 64) // 2 for side in whole.size)
    wanted = whole.crop((left, top, left + 64, top + 64))
    assert grey_levels(data.to_image(data.to_tensor(photo, 64)), wanted) <= 2


def test_a_very_long_strip_costs_little_memory(tmp_path):
    """Only what is kept is resized: the whole strip at 64 pixels would take 5 GB."""
    Image.new("L", (400_000, 1), 200).save(tmp_path / "strip.png")
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
    before = peak()
    assert data.to_tensor(tmp_path / "strip.png", 64).shape == (3, 64, 64)
    assert peak() - before < 100


def test_photos_are_turned_as_their_exif_data_say(tmp_path):
    photo, exif = noisy(64, 64), Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    photo.save(tmp_path / "a.png", exif=exif)
    turned = photo.transpose(Image.Transpose.ROTATE_270)
    assert grey_levels(data.open_image(tmp_path / "a.png"), turned) == 0


def test_pictures_stand_side_by_side():
    row = data.row_of([Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")])
    assert row.size == (24, 8)
    pixels = [row.getpixel((x, 4)) for x in (4, 12, 20)]
    assert pixels == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


# --- Prompts -------------------------------------------------------------------------------------


def test_images_stand_in_front_or_where_the_prompt_says(tmp_path):
    path = str(tmp_path / "a.png")
    noisy(64, 64).save(path)
    kinds = lambda *prompt: ["IMG" if s.is_image else s.content for s in data.read_prompt(*prompt)]
    assert kinds("What?", [path]) == ["IMG", "What?"]
    assert kinds("", [path]) == ["IMG"]
    assert kinds("From <image> to <image>.", [path, path]) == ["From ", "IMG", " to ", "IMG", "."]
    (segment,) = data.read_prompt("", [path])
    assert segment == Segment(tmp_path / "a.png")  # the path: no photo waits in memory


# --- Tokenizer -----------------------------------------------------------------------------------


TEXTS = ["a red circle left of a blue square", "How many stars are there?", "Make the star blue."]
TEXTS += ["An orange star meets a green square. Continue this story.", "7", "zero"]


@pytest.mark.parametrize("trained", [False, True])
def test_tokenizer_round_trips_text(tokenizer, trained):
    if trained:
        tokenizer = data.Tokenizer(data.train_tokenizer(TEXTS, 250), CONFIG)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) > CONFIG.image_id and max(ids) < CONFIG.vocab_size


def test_text_never_becomes_special_tokens_or_image_codes_and_they_never_text(tokenizer):
    for text in ("<s> </s> <pad>", "<image>", "\u00e4\u4e2d", "</s>" * 3):
        assert all(i == CONFIG.unk_id or i > CONFIG.image_id for i in tokenizer.encode(text))
    ids = [CONFIG.bos_id, CONFIG.boi_id, *tokenizer.encode("a star"), CONFIG.sep_id, 17]
    assert tokenizer.decode(ids) == "a star"


def test_a_letter_that_was_never_seen_is_unknown(tokenizer):
    assert CONFIG.unk_id in tokenizer.encode("\u4e2d")


def test_words_are_known_without_what_stands_around_them():
    texts = ['A "red" star,<image>isn\'t it? (no)', "A star!"]
    assert data.words_of(texts) == {"A", "red", "star", "isn't", "it", "(no)"}


# --- Layout and batches --------------------------------------------------------------------------


def conversation():
    picture = Image.new("RGB", (64, 64))
    asked = [Segment(picture), Segment("What colour is the star?"), Segment("red", output=True)]
    return [*asked, Segment("a circle"), Segment(picture, output=True)]


def test_layout_of_a_conversation(tokenizer):
    c, encode = CONFIG, tokenizer.encode
    picture = [c.boi_id, *[c.image_id] * c.latents_per_image, c.eoi_id]
    question = [c.bos_id, *picture, *encode("What colour is the star?"), c.sep_id]
    answer, prompt = [*encode("red"), c.sep_id], [*encode("a circle"), c.sep_id]
    sequence = layout(conversation(), tokenizer, c)
    assert sequence.tokens == question + answer + prompt + picture + [c.sep_id]
    unlabelled = [-100] * len(question), [-100] * len(prompt)
    assert sequence.labels == unlabelled[0] + answer + unlabelled[1] + picture + [c.sep_id]
    assert len(sequence.images) == 2


@pytest.mark.parametrize("pad_left", [False, True])
def test_batches_pad_on_either_side(tokenizer, pad_left):
    rows = [layout(conversation(), tokenizer, CONFIG), layout([Segment("a")], tokenizer, CONFIG)]
    batch = collate(rows, CONFIG, 64, pad_left)
    short = batch.tokens[1][-3:] if pad_left else batch.tokens[1][:3]
    assert short.tolist() == rows[1].tokens
    assert (batch.tokens[1] == CONFIG.pad_id).sum() == batch.tokens.shape[1] - 3
    assert (batch.labels[batch.tokens == CONFIG.pad_id] == -100).all()
    assert batch.images.shape == (2, 3, 64, 64)


def test_a_batch_moves_and_holds_no_images_where_there_are_none(tokenizer):
    batch = collate([layout([Segment("a star")], tokenizer, CONFIG)], CONFIG, 64).to("meta")
    assert batch.tokens.device.type == "meta" and batch.images.shape == (0, 3, 64, 64)


def test_batches_read_images_from_their_paths_and_take_latents_as_they_are(tokenizer, tmp_path):
    noisy(96, 64).save(tmp_path / "a.png")
    images = lambda *found: (
        collate([layout([Segment(image)], tokenizer, CONFIG) for image in found], CONFIG, 64).images
    )
    assert torch.equal(images(tmp_path / "a.png"), images(noisy(96, 64)))
    latents = randn(2, 16, 32)
    assert torch.equal(images(latents[0], latents[1]), latents)
    read = data.read_images([Segment(tmp_path / "a.png", True), Segment("a")], 64)
    assert read[0].content.size == (64, 64) and read[0].output and read[1] == Segment("a")


# --- Datasets: what a spec names -----------------------------------------------------------------


class Numbers:
    """Examples that say their index, and the seed and the words they were made with."""

    def __init__(self, seed=0, examples=0, word="n"):
        self.name, self.asked = f"{word} {seed} {examples}", []

    def example(self, index):
        self.asked.append(index)
        return [Segment(f"{self.name} {index}"), Segment("yes", output=True)]


class Few(Numbers):
    def __len__(self):
        return 40


@pytest.fixture
def module(monkeypatch):
    """Datasets in a module of the user's own."""
    own = types.ModuleType("own_data")
    own.numbers, own.few, own.plain = Numbers, Few, lambda word="n": Numbers(word=word)
    own.one = lambda: [[Segment("a")]]  # no dataset: a list has no example()
    monkeypatch.setitem(sys.modules, "own_data", own)
    return own


def said(dataset, index: int) -> str:
    return dataset.example(index)[0].content


def test_an_endless_dataset_has_another_seed_for_what_is_held_out(module):
    train, held_out = data.open_dataset("own_data:numbers", {"word": "w"}, seed=3, examples=90)
    assert said(train, 5) == "w 3 90 5" and said(held_out, 5) == f"w {3 + 2**32} 90 5"
    train, held_out = data.open_dataset("own_data:plain")  # which takes no seed
    assert said(train, 5) == "n 0 0 5" and said(held_out, 5) == f"n 0 0 {10**9 + 5}"


def test_of_a_dataset_with_a_length_a_twentieth_is_held_out_by_what_it_says(module):
    train, held_out = data.open_dataset("own_data:few", seed=1)
    sides = [{said(part, i) for i in range(len(part))} for part in (train, held_out)]
    assert len(train) + len(held_out) == 40 == len(sides[0] | sides[1]) and 1 <= len(held_out) <= 6
    assert said(train, len(train) + 1) == said(train, 1)  # indices wrap
    module.few = type("Few", (Numbers,), {"__len__": lambda self: 30})  # each stays on its side
    fewer, held = data.open_dataset("own_data:few", seed=1)
    assert {said(fewer, i) for i in range(len(fewer))} <= sides[0]
    module.few = type("One", (Numbers,), {"__len__": lambda self: 1})  # it is on both
    assert [len(part) for part in data.open_dataset("own_data:few")] == [1, 1]


def test_texts_come_from_the_first_4000_examples_or_from_fewer(module):
    endless, few = Numbers(), Few()
    assert len(data.texts_of(endless)) == 8000 and max(endless.asked) == 3999
    assert data.texts_of(few)[:2] == ["n 0 0 0", "yes"] and max(few.asked) == 39


def test_a_hash_is_of_all_that_an_example_says():
    image, latents = Image.new("RGB", (4, 4)), randn(4, 8)
    other = Image.new("RGB", (4, 4), (0, 0, 1))
    examples = [[Segment("a")], [Segment("a", True)], [Segment("b")], [Segment("a"), Segment("b")]]
    examples += [[Segment("ab")], [Segment(image)], [Segment(other)], [Segment(latents)]]
    examples += [[Segment(latents + 1)], [Segment(TINY / "samples.png")]]
    assert len({data.says(segments) for segments in examples}) == len(examples)
    assert data.says(examples[5]) == data.says([Segment(image.copy())])


BAD_SPECS = [  # a spec, its arguments, what the line must name
    ("nothing.jsonl", {}, "nothing.jsonl"),
    ("own_data", {}, "own_data"),
    ("own_data:nothing", {}, "nothing"),
    ("nowhere_at_all:numbers", {}, "nowhere_at_all"),
    ("own_data:numbers", {"wort": 1}, "wort"),
    ("", {}, "''"),
]


@pytest.mark.parametrize("spec, args, wanted", BAD_SPECS)
def test_a_spec_that_names_nothing_is_named(module, spec, args, wanted):
    assert wanted in complaint(lambda: data.open_dataset(spec, args))
