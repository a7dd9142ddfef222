"""data.py: images in and out, prompts, tokenizer, layout, batches, pages of pictures."""

import os
import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, complaint, grey_levels
from PIL import Image, PngImagePlugin

import checkpoint
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


# --- Images ---


def test_image_survives_the_way_to_a_tensor_and_back():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tensor = data.to_tensor(Image.fromarray(pixels), 64)
    assert tensor.shape == (3, 64, 64) and tensor.min() >= -1 and tensor.max() <= 1
    assert (np.asarray(data.to_image(tensor)) == pixels).all()


def test_values_outside_the_range_are_clamped():
    extremes = torch.tensor([-3.0, 3.0, 0.0]).view(3, 1, 1)
    assert data.to_image(extremes).getpixel((0, 0)) == (0, 255, 128)


def test_hub_pixels_are_scaled_as_the_hubs_processor_does():
    white = Image.new("RGB", (64, 64), "white")
    assert (data.to_tensor(white, 64, hub_pixels=True) - 0.989).abs().max() < 1e-6


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_blended_on_white(mode):
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0)).convert(mode)
    assert (data.to_tensor(clear, 64) == 1).all()


def test_transparency_of_a_palette_is_blended_on_white(tmp_path):
    image = Image.new("P", (64, 64))
    image.save(tmp_path / "a.png", transparency=0)
    assert (data.to_tensor(tmp_path / "a.png", 64) == 1).all()


def test_sixteen_bit_greys_keep_their_brightness():
    big = Image.frombytes("I;16B", (64, 64), b"\x80\x80" * 64**2)
    assert data.to_tensor(big, 64).mean().abs() < 0.01
    grey = Image.fromarray(np.full((64, 64), 0x8080, dtype=np.uint16))
    assert data.to_tensor(grey, 64).mean() == pytest.approx(128 / 127.5 - 1, abs=0.01)


def test_short_side_is_resized_and_centre_cropped():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (100, 0, 200, 100))
    middle = data.to_tensor(wide, 64)
    assert middle.shape == (3, 64, 64)
    assert middle[1:, :, 3:-3].max() < -0.9  # the red square fills the crop
    high = data.to_tensor(wide.transpose(Image.Transpose.ROTATE_90), 64)
    assert high[1:, 3:-3].max() < -0.9


@pytest.mark.parametrize("width, height", [(640, 480), (480, 640), (40, 56), (200, 64), (64, 72)])
def test_an_ordinary_photo_comes_out_as_resized_whole_and_then_cropped(width, height):
    """To one level, but for where the two round the middle of the picture differently."""
    photo = noisy(width, height)
    scale = 64 / min(photo.size)
    whole = photo.resize([round(side * scale) for side in photo.size], Image.Resampling.LANCZOS)
    left, top = ((side - 64) // 2 for side in whole.size)
    wanted = whole.crop((left, top, left + 64, top + 64))
    assert grey_levels(data.to_image(data.to_tensor(photo, 64)), wanted) <= 1


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
    photo.save(tmp_path / "a.png", exif=b"Exif\x00\x00garbage!")
    assert grey_levels(data.open_image(tmp_path / "a.png"), photo) == 0


def claim(path, width: int, height: int) -> None:
    """A small PNG whose header says that it is large."""
    noisy(64, 64).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def bad_images(folder) -> list:
    """Files that are no images to read, and paths that are no files."""
    os.mkfifo(folder / "fifo")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    claim(folder / "huge.png", 13_000, 13_000)  # Pillow would only warn
    claim(folder / "huger.png", 50_000, 50_000)
    claim(folder / "long.png", 60_000_000, 2)
    noisy(64, 64).save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-300])
    Image.new("F", (64, 64)).save(folder / "float.tif")
    note = PngImagePlugin.PngInfo()
    note.add_text("note", "a" * 10_000_000, zip=True)  # 10 MB when it is unpacked
    Image.new("L", (8, 8)).save(folder / "note.png", pnginfo=note)
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    return [*folder.iterdir(), folder / "missing", "/dev/zero", "", "a" * 5000]


def test_what_is_no_readable_image_is_refused_in_one_line(tmp_path, recwarn):
    for path in bad_images(tmp_path):
        message = complaint(lambda path=path: data.open_image(path))
        assert str(path) in message, path
        assert "pixels" in message or not str(path).endswith(("huge.png", "huger.png", "long.png"))
    assert not recwarn.list


# --- Prompts ---


def test_images_stand_in_front_or_where_the_prompt_says(tmp_path):
    path = str(tmp_path / "a.png")
    noisy(64, 64).save(path)
    kinds = lambda *prompt: ["IMG" if s.is_image else s.content for s in data.read_prompt(*prompt)]
    assert kinds("What?", [path]) == ["IMG", "What?"]
    assert kinds("", [path]) == ["IMG"]
    assert kinds("From <image> to <image>.", [path, path]) == ["From ", "IMG", " to ", "IMG", "."]


@pytest.mark.parametrize("text, images", [("<image>", 0), ("<image> <image>", 1), ("<image>", 2)])
def test_as_many_images_as_places_for_them(tmp_path, text, images):
    noisy(64, 64).save(tmp_path / "a.png")
    message = complaint(lambda: data.read_prompt(text, [str(tmp_path / "a.png")] * images))
    assert text in message and str(images) in message


@pytest.mark.parametrize("text", ["", " ", "\n", "a \ud800 star"])
def test_prompts_that_say_nothing_or_no_text_are_refused(text):
    assert "prompt" in complaint(lambda: data.read_prompt(text, []))


def test_a_prompt_keeps_paths_not_photos(tmp_path):
    noisy(64, 64).save(tmp_path / "a.png")
    (segment,) = data.read_prompt("", [str(tmp_path / "a.png")])
    assert segment == Segment(tmp_path / "a.png")


# --- Tokenizer ---


TEXTS = ["a red circle left of a blue square", "How many stars are there?", "Make the star blue.",
         "An orange star meets a green square. Continue this story.", "7", "zero"]  # fmt: skip


@pytest.mark.parametrize("trained", [False, True])
def test_tokenizer_round_trips_text(tokenizer, trained):
    if trained:
        tokenizer = data.Tokenizer(data.train_tokenizer(TEXTS, 250), CONFIG)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) > CONFIG.image_id and max(ids) < CONFIG.vocab_size


def test_text_never_becomes_special_tokens_or_image_codes(tokenizer):
    for text in ("<s> </s> <pad>", "<image>", "\u00e4\u4e2d", "</s>" * 3):
        assert all(i == CONFIG.unk_id or i > CONFIG.image_id for i in tokenizer.encode(text))


def test_decoding_skips_special_tokens(tokenizer):
    ids = [CONFIG.bos_id, CONFIG.boi_id, *tokenizer.encode("a star"), CONFIG.sep_id, 17]
    assert tokenizer.decode(ids) == "a star"


@pytest.mark.parametrize("content", [b"", b"garbage", b"{", b"{}"])
def test_a_tokenizer_that_is_not_whole_is_named(tmp_path, content):
    config = checkpoint.read_json(TINY / checkpoint.CONFIG)
    checkpoint.write_json(tmp_path / checkpoint.CONFIG, {"model": config["model"]})
    for name in checkpoint.TOKENIZERS:
        (tmp_path / name).write_bytes(content)
        assert name in complaint(lambda: data.Tokenizer.from_pretrained(tmp_path))
        (tmp_path / name).unlink()


def test_words_are_known_without_what_stands_around_them():
    texts = ['A "red" star,<image>isn\'t it? (no)', "A star!"]
    assert data.words_of(texts) == {"A", "red", "star", "isn't", "it", "(no)"}


# --- Layout and batches ---


def conversation():
    picture = Image.new("RGB", (64, 64))
    return [
        Segment(picture),
        Segment("What colour is the star?"),
        Segment("red", output=True),
        Segment("a circle"),
        Segment(picture, output=True),
    ]


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


def test_batches_read_images_from_their_paths(tokenizer, tmp_path):
    noisy(96, 64).save(tmp_path / "a.png")
    by_path, by_hand = (
        collate([layout([Segment(image)], tokenizer, CONFIG)], CONFIG, 64).images
        for image in (tmp_path / "a.png", noisy(96, 64))
    )
    assert torch.equal(by_path, by_hand)


# --- Pages of pictures ---


def test_a_story_becomes_one_row_with_its_texts_below(tmp_path):
    noisy(96, 64).save(tmp_path / "a.png")
    story = [Segment("It begins."), Segment(tmp_path / "a.png"), Segment("Then."),
             Segment(noisy(64, 64)), Segment("The end.")]  # fmt: skip
    cells = data.captioned(story)
    assert [text for _, text, _ in cells] == ["It begins.", "Then. The end."]
    page = data.sheet([cells, cells[:1]], (64, 64))
    assert page.width == 2 * 72 + 8 and page.height > 2 * 64
    pixels = np.asarray(page.convert("L"))
    below = pixels[74:90, 8:72]  # black on white
    assert below.min() < 60 and below.max() == 255
    assert data.captioned([Segment("only text")]) == []


def test_enlarging_multiplies_both_sides():
    assert data.enlarge(noisy(64, 32), 3).size == (192, 96)
