"""data.py: images, tokenizer, layout, batches, and the Shapes world's own truth."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Segment, Shapes, collate, layout, place, relation, render
from orthus import OrthusConfig

CONFIG = OrthusConfig.preset("tiny")


@pytest.fixture(scope="module")
def tokenizer():
    pieces = data.train_tokenizer(data.shapes_texts(), CONFIG.vocab_size - CONFIG.image_id)
    return data.Tokenizer(pieces, CONFIG.image_id + 1)


# --- Images ---


def test_image_survives_the_way_to_a_tensor_and_back():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    tensor = data.to_tensor(Image.fromarray(pixels), 64)
    assert tensor.shape == (3, 64, 64) and tensor.min() >= -1 and tensor.max() <= 1
    assert (np.asarray(data.to_image(tensor)) == pixels).all()


def test_transparency_is_blended_on_white():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert (data.to_tensor(clear, 64) == 1).all()


def test_sixteen_bit_greys_keep_their_brightness():
    grey = Image.fromarray(np.full((64, 64), 0x8080, dtype=np.uint16))
    assert data.to_tensor(grey, 64).mean() == pytest.approx(128 / 127.5 - 1, abs=0.01)


def test_short_side_is_resized_and_centre_cropped():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste("red", (100, 0, 200, 100))
    middle = data.to_tensor(wide, 64)
    assert middle.shape == (3, 64, 64)
    assert middle[1:, :, 3:-3].max() < -0.9  # the red square fills the crop


# --- Tokenizer ---


def test_tokenizer_round_trips_every_text_of_the_world(tokenizer):
    for text in set(data.shapes_texts()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert min(ids) > CONFIG.image_id and max(ids) < CONFIG.vocab_size


def test_text_never_becomes_special_tokens_or_image_codes(tokenizer):
    for text in ("<s> </s> <pad>", "<image>", "\u00e4\u4e2d", "</s>" * 3):
        assert all(i == CONFIG.unk_id or i > CONFIG.image_id for i in tokenizer.encode(text))


def test_decoding_skips_special_tokens(tokenizer):
    ids = [CONFIG.bos_id, CONFIG.boi_id, *tokenizer.encode("a star"), CONFIG.sep_id, 17]
    assert tokenizer.decode(ids) == "a star"


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


# --- The Shapes world ---


def test_same_seed_same_example_and_other_seed_another():
    a, b, c = Shapes(5).example(17), Shapes(5).example(17), Shapes(6).example(17)
    assert a.things == b.things and a.segments[0].content == b.segments[0].content
    assert a.things != c.things


def test_unseen_combinations_never_occur_in_training():
    for i in range(2000):
        example = Shapes(0).example(i)
        assert not any((t.colour, t.shape) in data.UNSEEN for t in example.things)
        assert not example.unseen


def test_questions_never_name_unseen_combinations():
    names = [f"{colour} {shape}" for colour, shape in data.UNSEEN]
    for i in range(3000):
        example = Shapes(1).example(i)
        texts = [s.content for s in example.segments if isinstance(s.content, str)]
        assert not any(name in text for name in names for text in texts)


def test_things_keep_their_distance_and_stay_inside():
    rng = random.Random(0)
    for _ in range(200):
        things = place([data.pick(rng, True) for _ in range(rng.randint(1, 4))], rng)
        for i, a in enumerate(things):
            assert 6 <= a.r <= 11 and abs(a.angle) <= 0.25
            assert a.reach <= min(a.x, a.y) and max(a.x, a.y) <= 64 - a.reach
            for b in things[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) >= a.reach + b.reach + 3


def test_a_single_thing_is_drawn_where_and_as_it_says():
    thing = data.Thing("circle", "red", 20.0, 40.0, 8.0, rgb=(220, 40, 40))
    pixels = np.asarray(render([thing])).astype(int)
    assert tuple(pixels[40, 20]) == (220, 40, 40) and tuple(pixels[5, 5]) == data.BACKGROUND
    covered = (250 - pixels[..., 0]) / (250 - 220)
    assert covered.sum() == pytest.approx(math.pi * 64, rel=0.03)
    rows, columns = np.nonzero(covered > 0.5)
    assert columns.mean() == pytest.approx(19.5, abs=0.3)
    assert rows.mean() == pytest.approx(39.5, abs=0.3)


@pytest.mark.parametrize("kind", data.GENEVAL)
def test_captions_are_true_of_their_scenes(kind):
    rng = random.Random(kind)
    for _ in range(100):
        example = data.text_to_image(rng, kind)
        caption, things = example.segments[0].content, example.things
        if kind == "counting":
            count, colour, shapes = caption.split()
            assert len(things) == data.COUNTS.index(count)
            assert all(t.name + "s" == f"{colour} {shapes}" for t in things)
        elif kind == "position":
            word = next(w for w in data.RELATIONS if f" {w} " in caption)
            first, second = caption.split(f" {word} ")
            by_name = {data.with_article(t.name): t for t in things}
            assert relation(by_name[first], by_name[second]) == word
        else:
            names = [data.with_article(t.name) for t in things]
            if kind in ("one object", "two objects"):
                names = [data.with_article(t.shape) for t in things]
            assert sorted(caption.split(" and ")) == sorted(names)


def answer_by_looking(question: str, things: list[data.Thing]) -> str:
    """The answers once more, written another way than data.py does."""
    words = question.rstrip("?.").split()
    if words[0] == "How":
        return data.COUNTS[sum(t.shape + "s" == words[2] for t in things)]
    if words[:2] == ["What", "colour"]:
        return next(t.colour for t in things if t.shape == words[-1])
    if words[0] == "Is":
        return "yes" if any([t.colour, t.shape] == words[-2:] for t in things) else "no"
    if words[0] == "Which":
        return next(str(t.digit) for t in things if t.shape == words[-1])
    if words[0] == "Describe":
        names = [data.with_article(t.name) for t in sorted(things, key=lambda t: t.x)]
        return ", ".join(names[:-1]) + (" and " if names[1:] else "") + names[-1]
    other = next(t for t in things if [t.colour, t.shape] == words[-2:])
    dx, dy = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[words[2]]
    beside = [
        t
        for t in things
        if t is not other
        and (t.x - other.x) * dx + (t.y - other.y) * dy
        > abs((t.x - other.x) * dy) + abs((t.y - other.y) * dx)
    ]
    assert len(beside) == 1
    return data.with_article(beside[0].name)


@pytest.mark.parametrize("kind", data.QUESTIONS)
def test_answers_are_true_of_their_scenes(kind):
    rng = random.Random(kind)
    for _ in range(100):
        example = data.understanding(rng, kind=kind, turns=2)
        assert example.kind == kind
        texts = [s.content for s in example.segments[1:]]
        assert len(set(texts[::2])) == 2
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            assert answer == answer_by_looking(question, example.things)


def test_yes_and_no_are_balanced():
    rng = random.Random(0)
    answers = [data.understanding(rng, kind="exists").segments[2].content for _ in range(600)]
    assert 0.42 < answers.count("yes") / 600 < 0.58
    assert set(answers) == {"yes", "no"}


def test_absent_kinds_are_counted_too():
    rng = random.Random(0)
    answers = {data.understanding(rng, kind="count").segments[2].content for _ in range(300)}
    assert answers == set(data.COUNTS)


def outside(things: list[data.Thing]) -> np.ndarray:
    """Pixels (64, 64) that none of these things touch."""
    rows, columns = np.indices((64, 64)) + 0.5
    distance = [np.hypot(columns - t.x, rows - t.y) - t.reach for t in things]
    return np.all([d > 1 for d in distance], axis=0)


def differences(before: list[data.Thing], after: list[data.Thing]) -> list[data.Thing]:
    return [t for t in before + after if not (t in before and t in after)]


@pytest.mark.parametrize("make", [data.editing, data.in_context])
@pytest.mark.parametrize("kind", data.EDITS)
def test_an_edit_changes_one_thing_and_no_pixel_elsewhere(make, kind):
    rng = random.Random(kind)
    for _ in range(50):
        example = make(rng, kind)
        assert example.kind == kind and 1 <= len(example.things) <= 4
        changed = differences(example.before, example.things)
        assert len({(t.x, t.y) for t in changed}) == 1
        given = [s.content for s in example.segments if not s.output]
        source = given[0] if make is data.editing else given[-1]
        a, b = np.asarray(source), np.asarray(example.segments[-1].content)
        same = outside(changed)
        assert np.array_equal(a[same], b[same]) and not np.array_equal(a, b)


def test_instructions_say_what_was_done():
    rng = random.Random(0)
    for kind in data.EDITS:
        for _ in range(50):
            example = data.editing(rng, kind)
            words = example.segments[1].content.rstrip(".").split()
            old, new = (
                [t for t in a if t not in b]
                for a, b in ((example.before, example.things), (example.things, example.before))
            )
            if kind == "recolour":
                assert words == ["Make", "the", old[0].shape, new[0].colour]
                assert sum(t.shape == old[0].shape for t in example.before) == 1
            elif kind == "remove":
                assert words == ["Remove", "the", old[0].shape] and not new
            else:
                assert " ".join(words) == f"Add {data.with_article(new[0].name)}" and not old


@pytest.mark.parametrize("kind", data.EDITS)
def test_a_difference_is_an_edit_told_backwards(kind):
    edit = data.editing(random.Random(kind), kind)
    example = data.difference(random.Random(kind), kind)
    before, after, question, answer = example.segments
    assert before == edit.segments[0] and not after.output
    assert np.array_equal(after.content, edit.segments[2].content)
    assert question == data.Segment("What changed?")
    assert answer == data.Segment(edit.segments[1].content, output=True)
    assert (example.task, example.kind, example.things) == ("difference", kind, edit.things)


def test_in_context_pairs_show_the_same_edit():
    """What happened between the first two pictures is what happens to the third."""
    rng = random.Random(1)
    shown = []
    original = data.Edit.apply

    def record(edit, things, rng):
        shown.append((edit, things, original(edit, things, rng)))
        return shown[-1][2]

    for kind in data.EDITS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data.Edit, "apply", record)
            example = data.in_context(rng, kind)
        (edit, a, after), (again, b, answer) = shown[-2:]
        assert edit == again and b == example.before and answer == example.things
        pictures = [data.render(scene) for scene in (a, after, b, answer)]
        for segment, expected in zip(example.segments, pictures, strict=True):
            assert np.array_equal(segment.content, expected)


@pytest.mark.parametrize("kind", ["recolour", "remove"])
def test_an_example_pair_never_fits_two_edits(kind):
    """What the edited thing's old colour is, no thing of another shape has in the other scene."""
    rng = random.Random(3)
    for _ in range(60):
        example = data.in_context(rng, kind)
        (target,) = [t for t in example.before if t not in example.things]
        first, second = (np.asarray(s.content, int) for s in example.segments[:2])
        changed = first[np.abs(first - second).sum(-1) > 30]  # (pixels, 3) of the edited thing
        colour = np.median(changed, axis=0)
        nearest = min(data.COLOURS, key=lambda c: np.abs(colour - data.COLOURS[c]).sum())
        assert not any(t.colour == nearest and t.shape != target.shape for t in example.before)


def test_a_lone_thing_can_be_recoloured_and_not_removed():
    alone = [data.Thing("circle", "red", 20.0, 20.0)]
    (after,) = data.Edit("recolour", "circle", "blue").apply(alone, random.Random(0))
    assert after.colour == "blue"
    assert data.Edit("remove", "circle").apply(alone, random.Random(0)) is None


def test_a_move_goes_where_its_sentence_says():
    rng = random.Random(4)
    steps = {"left": (-12, 0), "right": (12, 0), "up": (0, -12), "down": (0, 12)}  # y points down
    ways = set()
    for _ in range(50):
        scene = place([("red", "circle"), ("blue", "star")], rng)
        for sentence, after in data.story_moves(scene):
            ((old, new),) = [(a, b) for a, b in zip(scene, after, strict=True) if a != b]
            _, colour, shape, _, way = sentence.rstrip(".").split()
            assert (old.colour, old.shape) == (colour, shape)
            assert (new.x - old.x, new.y - old.y) == pytest.approx(steps[way])
            assert new.reach <= min(new.x, new.y) and max(new.x, new.y) <= 64 - new.reach
            ways.add(way)
    assert ways == set(steps)


def test_stories_move_one_actor_a_stride_as_they_say():
    rng = random.Random(2)
    for _ in range(50):
        example = data.story(rng)
        opening, *texts = [s.content for s in example.segments if isinstance(s.content, str)]
        frames = [s.content for s in example.segments if not isinstance(s.content, str)]
        assert len(frames) == data.FRAMES and len(texts) == data.FRAMES - 1
        scene = example.before
        assert opening.endswith(". Continue this story.")
        assert all(data.with_article(t.name) in opening.lower() for t in scene)
        for text, frame in zip(texts, frames[1:], strict=True):
            (scene,) = [after for said, after in data.story_moves(scene) if said == text]
            assert np.array_equal(data.render(scene), frame)
        assert scene == example.things


@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_round_trips_text_and_images_through_its_layout(task, tokenizer):
    for i in range(20):
        example = Shapes(3, {task: 1.0}).example(i)
        assert example.task == task
        sequence = data.layout(example.segments, tokenizer, CONFIG)
        pieces, ids, at = [], [], 0
        special = {CONFIG.bos_id, CONFIG.sep_id, CONFIG.boi_id, CONFIG.eoi_id, CONFIG.image_id}
        for token in [*sequence.tokens, CONFIG.sep_id]:
            if token in special and ids:
                pieces.append(tokenizer.decode(ids))
                ids = []
            if token == CONFIG.boi_id:
                pieces.append(sequence.images[at])
                at += 1
            elif token not in special:
                ids.append(token)
        assert pieces == [s.content for s in example.segments]
        written = [
            i for i, label in zip(sequence.tokens, sequence.labels, strict=True) if label != -100
        ]
        images = sum(s.output and not isinstance(s.content, str) for s in example.segments)
        assert written.count(CONFIG.boi_id) == images


def test_detail_marks_digits_and_nothing_else():
    digit = data.Thing("circle", "red", 20.0, 40.0, 9.0, rgb=(220, 40, 40), digit=8)
    plain = data.replace(digit, digit=None)
    changed = np.asarray(render([digit])) != np.asarray(render([plain]))
    mask = data.detail([digit])[0].numpy() > 0
    assert mask[changed.any(-1)].all() and mask.sum() < 100
    assert data.detail([plain]).sum() == 0


def test_autoencoder_batches_depend_on_seed_and_step():
    images = lambda seed, step: data.scene_images(seed, step, 3)[0]
    assert torch.equal(images(1, 2), images(1, 2))
    assert not torch.equal(images(1, 2), images(1, 3))
