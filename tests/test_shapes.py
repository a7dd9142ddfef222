"""lab/shapes.py: the Shapes world's own truth, its wording, and each field of its config."""

import hashlib
import json
import math
import pickle
import random
import re
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT, complaint

import data
from lab import shapes
from data import Segment
from orthus import OrthusConfig
from lab.shapes import Shapes, ShapesConfig, Thing, place, relation, render, with_article

WORLD = Shapes(0, ShapesConfig(digits=0.5))
CONFIG = OrthusConfig.preset("tiny")
EVERY_TEXT = [*data.texts_of(Shapes(0, allow_unseen=True)), *"0123456789", "Generate an image."]


def kinds(task):
    return list(ShapesConfig().kinds(task)) or [task]


def texts(segments):
    return [s.content for s in segments if not s.is_image]


def only(task, **fields):
    """A world of one task."""
    return Shapes(3, ShapesConfig(tasks={task: 1.0}, **fields))


@pytest.fixture(scope="module")
def tokenizer():
    texts, size = EVERY_TEXT, CONFIG.vocab_size - CONFIG.image_id
    return data.Tokenizer(data.train_tokenizer(texts, size), CONFIG)


# --- The dataset ---


def test_an_example_depends_on_seed_and_index_alone():
    a, b = Shapes(5), pickle.loads(pickle.dumps(Shapes(5)))
    later = [b.example(i) for i in (3, 17)][1]
    assert a.example(17) == later == a.scene(17).segments
    assert a.example(17) != a.example(18) and a.example(17) != Shapes(6).example(17)


def test_examples_of_a_seed_are_what_the_shipped_model_was_trained_and_judged_on():
    """Recorded texts and scenes: another stream of random numbers would change them all."""
    digest = hashlib.sha256()
    for i in range(60):
        example = Shapes(0).scene(i)
        where = [(t.name, round(t.x, 3), round(t.y, 3), t.rgb, t.digit) for t in example.things]
        digest.update(repr((texts(example.segments), where)).encode())
    assert digest.hexdigest()[:16] == "c35148dae0fe545c"


def test_unseen_combinations_never_occur_in_training_and_are_not_named():
    names = [f"{colour} {shape}" for colour, shape in shapes.UNSEEN]
    for i in range(2000):
        example = Shapes(1).scene(i)
        assert not example.unseen and not any(t.unseen for t in example.things + example.before)
        assert not any(name in text for name in names for text in texts(example.segments))
    asked = (Shapes(1, allow_unseen=True).scene(i) for i in range(300))
    assert sum(example.unseen for example in asked) > 10


# --- Wording, exactly ---

S, C = f"({'|'.join(shapes.SHAPES)})", f"({'|'.join(shapes.COLOURS)})"
A = f"(a (red|green|blue|yellow|purple)|an orange) {S}"
WHERE = "(left of|right of|above|below)"
CHANGE = {"recolour": f"Make the {S} {C}.", "remove": f"Remove the {S}.", "add": f"Add {A}."}
WORDING = {
    ("text_to_image", "one object"): f"a {S}",
    ("text_to_image", "two objects"): f"a {S} and a {S}",
    ("text_to_image", "counting"): f"(two|three|four) {C} {S}s",
    ("text_to_image", "colours"): A,
    ("text_to_image", "position"): f"{A} {WHERE} {A}",
    ("text_to_image", "binding"): f"{A} and {A}",
    ("understanding", "count"): f"How many {S}s are there? (zero|one|two|three|four)",
    ("understanding", "colour"): f"What colour is the {S}? {C}",
    ("understanding", "exists"): f"Is there {A}? (yes|no)",
    ("understanding", "relation"): f"What is {WHERE} the {C} {S}? {A}",
    ("understanding", "digit"): f"Which digit is on the {S}? [0-9]",
    ("understanding", "describe"): f"Describe the image. (({A}, ){{0,2}}{A} and )?{A}",
    **{("editing", kind): change for kind, change in CHANGE.items()},
    **{("difference", kind): f"What changed? {change}" for kind, change in CHANGE.items()},
    **{("in_context", kind): "" for kind in CHANGE},
    ("story", "story"): f"(A|An) {C} {S} meets {A}. Continue this story."
    + f" The {C} {S} moves (left|right|up|down)." * 3,
    ("image", "image"): "",
}


@pytest.mark.parametrize("task, kind", WORDING)
def test_wording(task, kind):
    assert {(t, k) for t in shapes.TASKS for k in kinds(t)} == set(WORDING)
    wanted = WORDING[task, kind].replace(".", r"\.").replace("?", r"\?")
    wanted = wanted.replace(r" and )\?", " and )?")
    for i in range(40):
        example = getattr(WORLD, task)(random.Random(f"wording {i}"), kind)
        assert (example.task, example.kind) == (task, kind)
        assert re.fullmatch(wanted, " ".join(texts(example.segments)))


def test_tokenizers_round_trip_the_world(tokenizer):
    shipped = data.Tokenizer.from_pretrained(ROOT / "checkpoints" / "tiny")
    for text in set(EVERY_TEXT):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text == shipped.decode(shipped.encode(text))
        assert min(ids) > CONFIG.image_id and max(ids) < CONFIG.vocab_size


def test_words_of_the_world():
    config = json.loads((ROOT / "checkpoints" / "tiny" / "config.json").read_text())
    texts = EVERY_TEXT
    words = {word.strip(".,?!") for text in texts for word in text.split()}
    assert words == set(config["generation"]["words"])


@pytest.mark.parametrize("task", shapes.TASKS)
def test_every_task_round_trips_text_and_images_through_its_layout(task, tokenizer):
    for i in range(20):
        example = only(task).scene(i)
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
        labelled = zip(sequence.tokens, sequence.labels, strict=True)
        written = [token for token, label in labelled if label != -100]
        images = sum(s.output and s.is_image for s in example.segments)
        assert written.count(CONFIG.boi_id) == images


# --- Scenes ---


def test_things_keep_their_distance_and_stay_inside():
    rng = random.Random(0)
    for _ in range(200):
        things = WORLD.random_scene(rng)
        for i, a in enumerate(things):
            assert 6 <= a.r <= 11 and abs(a.angle) <= 0.25
            assert a.reach <= min(a.x, a.y) and max(a.x, a.y) <= 64 - a.reach
            for b in things[:i]:
                assert math.hypot(a.x - b.x, a.y - b.y) >= a.reach + b.reach + 3


def test_a_single_thing_is_drawn_where_and_as_it_says():
    thing = Thing("circle", "red", 20.0, 40.0, 8.0, rgb=(220, 40, 40))
    pixels = np.asarray(render([thing])).astype(int)
    assert tuple(pixels[40, 20]) == (220, 40, 40) and tuple(pixels[5, 5]) == shapes.BACKGROUND
    covered = (250 - pixels[..., 0]) / (250 - 220)
    assert covered.sum() == pytest.approx(math.pi * 64, rel=0.03)
    rows, columns = np.nonzero(covered > 0.5)
    assert columns.mean() == pytest.approx(19.5, abs=0.3)
    assert rows.mean() == pytest.approx(39.5, abs=0.3)


def test_the_palette_is_the_one_that_models_were_trained_on():
    assert shapes.BACKGROUND == (250, 248, 242)
    assert shapes.COLOURS == {
        "red": (220, 40, 40),
        "green": (40, 160, 60),
        "blue": (45, 80, 220),
        "yellow": (240, 200, 30),
        "purple": (150, 60, 190),
        "orange": (245, 130, 30),
    }


@pytest.mark.parametrize(
    "shape, area", [("circle", math.pi), ("square", 2.645), ("triangle", 1.871), ("star", 1.911)]
)
def test_shapes_have_their_size_and_colours_their_shade(shape, area):
    """Areas at r = 1, worked out from the circumradii; a shade is at most 6 levels off."""
    rng = random.Random(shape)
    for colour, rgb in shapes.COLOURS.items():
        (thing,) = place([(colour, shape)], rng)
        assert max(abs(a - b) for a, b in zip(thing.rgb, rgb, strict=True)) <= 6
        pixels, ground = np.asarray(render([thing]), float), np.array(shapes.BACKGROUND, float)
        share = (pixels - ground) @ (thing.rgb - ground) / np.square(thing.rgb - ground).sum()
        assert share.sum() / thing.r**2 == pytest.approx(area, rel=0.05)


def test_the_mask_marks_digits_and_nothing_else():
    digit = Thing("circle", "red", 20.0, 40.0, 9.0, rgb=(220, 40, 40), digit=8)
    plain = replace(digit, digit=None)
    changed = np.asarray(render([digit])) != np.asarray(render([plain]))
    mask = np.asarray(shapes.digit_mask([digit])) > 0
    assert mask[changed.any(-1)].all() and mask.sum() < 100
    assert shapes.digit_mask([plain]) is None
    for i in range(20):
        example = only("image").scene(i)
        has_digit = any(t.digit is not None for t in example.things)
        assert (example.segments[0].detail is not None) == has_digit


# --- Captions and questions ---


@pytest.mark.parametrize("kind", shapes.CAPTIONS)
def test_captions_are_true_of_their_scenes(kind):
    rng = random.Random(kind)
    for _ in range(100):
        example = WORLD.text_to_image(rng, kind)
        caption, things = example.segments[0].content, example.things
        if kind == "counting":
            count, colour, plural = caption.split()
            assert len(things) == shapes.COUNTS.index(count)
            assert all(t.name + "s" == f"{colour} {plural}" for t in things)
        elif kind == "position":
            word = next(w for w in shapes.RELATIONS if f" {w} " in caption)
            first, second = caption.split(f" {word} ")
            by_name = {with_article(t.name): t for t in things}
            assert relation(by_name[first], by_name[second]) == word
            dx, dy = (getattr(by_name[first], v) - getattr(by_name[second], v) for v in "xy")
            signs = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}
            assert signs[word] > 0
        else:
            names = [with_article(t.name) for t in things]
            if kind in ("one object", "two objects"):
                names = [with_article(t.shape) for t in things]
            assert sorted(caption.split(" and ")) == sorted(names)
            assert kind != "binding" or things[0].colour != things[1].colour


def answer_by_looking(question: str, things: list[Thing]) -> str:
    """The answers once more, written another way than shapes.py does."""
    words = question.rstrip("?.").split()
    if words[0] == "How":
        return shapes.COUNTS[sum(t.shape + "s" == words[2] for t in things)]
    if words[:2] == ["What", "colour"]:
        return next(t.colour for t in things if t.shape == words[-1])
    if words[0] == "Is":
        return "yes" if any([t.colour, t.shape] == words[-2:] for t in things) else "no"
    if words[0] == "Which":
        return next(str(t.digit) for t in things if t.shape == words[-1])
    if words[0] == "Describe":
        names = [with_article(t.name) for t in sorted(things, key=lambda t: t.x)]
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
    return with_article(beside[0].name)


@pytest.mark.parametrize("kind", shapes.QUESTIONS)
def test_answers_are_true_of_their_scenes(kind):
    rng = random.Random(kind)
    for _ in range(100):
        example = WORLD.understanding(rng, kind, turns=2)
        said = texts(example.segments)
        assert len(set(said[::2])) == 2
        for question, answer in zip(said[::2], said[1::2], strict=True):
            assert answer == answer_by_looking(question, example.things)


def test_yes_and_no_are_balanced_and_half_of_the_noes_are_near():
    rng, said, near = random.Random(0), [], []
    for _ in range(1000):
        example = WORLD.understanding(rng, "exists")
        said.append(example.segments[2].content)
        words = texts(example.segments)[0].rstrip("?").split()[-2:]
        if said[-1] == "no":
            off = min((t.colour != words[0]) + (t.shape != words[1]) for t in example.things)
            near.append(off == 1)
    assert 0.45 < said.count("yes") / len(said) < 0.55 and set(said) == {"yes", "no"}
    far_but_near = 0.5 * 0.55  # a no drawn at large is often one attribute off as well
    assert 0.5 < np.mean(near) < 0.5 + far_but_near + 0.1


def test_absent_kinds_are_counted_too():
    rng = random.Random(0)
    answers = {WORLD.understanding(rng, "count").segments[2].content for _ in range(300)}
    assert answers == set(shapes.COUNTS)


# --- Edits and stories ---


def outside(things: list[Thing]) -> np.ndarray:
    """Pixels (64, 64) that none of these things touch."""
    rows, columns = np.indices((64, 64)) + 0.5
    distance = [np.hypot(columns - t.x, rows - t.y) - t.reach for t in things]
    return np.all([d > 1 for d in distance], axis=0)


@pytest.mark.parametrize("make", [WORLD.editing, WORLD.in_context])
@pytest.mark.parametrize("kind", shapes.EDITS)
def test_an_edit_changes_one_thing_and_no_pixel_elsewhere(make, kind):
    rng = random.Random(kind)
    for _ in range(50):
        example = make(rng, kind)
        assert 1 <= len(example.things) <= 4
        both = example.before + example.things
        changed = [t for t in both if not (t in example.before and t in example.things)]
        assert len({(t.x, t.y) for t in changed}) == 1
        source = [s.content for s in example.prompt if s.is_image][-1]
        a, b = np.asarray(source), np.asarray(example.segments[-1].content)
        same = outside(changed)
        assert np.array_equal(a[same], b[same]) and not np.array_equal(a, b)


def test_instructions_say_what_was_done():
    rng = random.Random(0)
    for kind in shapes.EDITS:
        for _ in range(50):
            example = WORLD.editing(rng, kind)
            words = example.segments[1].content.rstrip(".").split()
            old = [t for t in example.before if t not in example.things]
            new = [t for t in example.things if t not in example.before]
            if kind == "recolour":
                assert words == ["Make", "the", old[0].shape, new[0].colour]
                assert sum(t.shape == old[0].shape for t in example.before) == 1
                assert old[0].colour != new[0].colour
            elif kind == "remove":
                assert words == ["Remove", "the", old[0].shape] and not new
            else:
                assert " ".join(words) == f"Add {with_article(new[0].name)}" and not old


@pytest.mark.parametrize("kind", shapes.EDITS)
def test_a_difference_is_an_edit_told_backwards(kind):
    edit = WORLD.editing(random.Random(kind), kind)
    example = WORLD.difference(random.Random(kind), kind)
    before, after, question, answer = example.segments
    assert before == edit.segments[0] and not after.output
    assert after.content == edit.segments[2].content
    assert question == Segment("What changed?")
    assert answer == Segment(edit.segments[1].content, output=True)
    assert (example.task, example.kind, example.things) == ("difference", kind, edit.things)


def test_in_context_pairs_show_the_same_edit(monkeypatch):
    """What happened between the first two pictures is what happens to the third."""
    rng, shown, original = random.Random(1), [], shapes.Edit.apply

    def record(edit, things, *args):
        shown.append((edit, things, original(edit, things, *args)))
        return shown[-1][2]

    monkeypatch.setattr(shapes.Edit, "apply", record)
    for kind in shapes.EDITS:
        example = WORLD.in_context(rng, kind)
        (edit, a, after), (again, b, answer) = shown[-2:]
        assert edit == again and b == example.before and answer == example.things
        for segment, scene in zip(example.segments, (a, after, b, answer), strict=True):
            assert segment.content == render(scene)


@pytest.mark.parametrize("kind", ["recolour", "remove"])
def test_an_example_pair_never_fits_two_edits(kind):
    """What the edited thing's old colour is, no thing of another shape has in the other scene."""
    rng = random.Random(3)
    for _ in range(60):
        example = WORLD.in_context(rng, kind)
        (target,) = [t for t in example.before if t not in example.things]
        first, second = (np.asarray(s.content, int) for s in example.segments[:2])
        changed = first[np.abs(first - second).sum(-1) > 30]  # (pixels, 3) of the edited thing
        colour = np.median(changed, axis=0)
        nearest = min(shapes.COLOURS, key=lambda c: np.abs(colour - shapes.COLOURS[c]).sum())
        assert not any(t.colour == nearest and t.shape != target.shape for t in example.before)


def test_a_lone_thing_can_be_recoloured_and_not_removed():
    alone = [Thing("circle", "red", 20.0, 20.0)]
    (after,) = shapes.Edit("recolour", "circle", "blue").apply(alone, random.Random(0))
    assert after.colour == "blue"
    assert shapes.Edit("remove", "circle").apply(alone, random.Random(0)) is None


def test_a_move_goes_where_its_sentence_says():
    rng = random.Random(4)
    steps = {"left": (-12, 0), "right": (12, 0), "up": (0, -12), "down": (0, 12)}  # y points down
    ways = set()
    for _ in range(50):
        scene = place([("red", "circle"), ("blue", "star")], rng)
        for sentence, after in shapes.story_moves(scene):
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
        example = WORLD.story(rng)
        opening, *sentences = texts(example.segments)
        frames = [s.content for s in example.segments if s.is_image]
        assert len(frames) == 4 and len(sentences) == 3
        scene = example.before
        assert all(with_article(t.name) in opening.lower() for t in scene)
        for text, frame in zip(sentences, frames[1:], strict=True):
            (scene,) = [after for said, after in shapes.story_moves(scene) if said == text]
            assert render(scene) == frame
        assert scene == example.things


# --- The config ---


@pytest.mark.parametrize("task", ["text_to_image", "understanding", "editing"])
def test_weights_are_the_shares_of_kinds(task):
    field = {"text_to_image": "captions", "understanding": "questions"}.get(task, "edits")
    names = list(getattr(ShapesConfig(), field))
    world = only(task, **{field: {names[-1]: 3.0, names[0]: 1, names[1]: 0.0}})
    kinds = [world.scene(i).kind for i in range(200)]
    assert set(kinds) == {names[-1], names[0]} and 125 < kinds.count(names[-1]) < 175


def test_tasks_are_the_shares_of_tasks():
    world = Shapes(3, ShapesConfig(tasks={"image": 1.0, "story": 3.0, "editing": 0.0}))
    tasks = [world.scene(i).task for i in range(200)]
    assert set(tasks) == {"image", "story"} and 125 < tasks.count("story") < 175


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_digits_are_the_share_of_large_things_that_carry_one(share):
    world = only("image", digits=share)
    large = [t for i in range(300) for t in world.scene(i).things if t.r >= 8]
    assert np.mean([t.digit is not None for t in large]) == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("task", shapes.TASKS)
def test_a_smaller_world_shows_asks_and_names_nothing_else(task):
    few = dict(shapes=("star", "circle"), colours=("purple", "red"), max_objects=2)
    named, most = set(), 0
    for i in range(150):
        example = only(task, **few).scene(i)
        named |= {word for text in texts(example.segments) for word in re.findall(r"\w+", text)}
        for t in example.things + example.before:
            assert t.shape in few["shapes"] and t.colour in few["colours"] and not t.unseen
        most = max(most, len(example.things), len(example.before))
    assert most == 2
    assert not named & (set(shapes.SHAPES) - set(few["shapes"]))
    assert not named & (set(shapes.COLOURS) - set(few["colours"]))
    assert not named & {"three", "four"}


def test_a_question_that_is_the_only_one_is_asked_once():
    world = only("understanding", questions={"describe": 1.0})
    assert all(len(world.example(i)) == 3 for i in range(20))


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"tasks": {"paint": 1.0}}, "paint"),
        ({"tasks": {}}, "tasks"),
        ({"captions": {"colours": 0.0}}, "captions"),
        ({"questions": {"count": -1.0}}, "-1"),
        ({"edits": {"add": math.nan}}, "nan"),
        ({"edits": {"add": math.inf}}, "inf"),
        ({"tasks": ["story"]}, "tasks"),
        ({"digits": 1.5}, "1.5"),
        ({"digits": 0.0}, "digits"),  # yet questions ask for them
        ({"max_objects": 1}, "max_objects"),
        ({"max_objects": 5}, "max_objects"),
        ({"shapes": ("circle", "hexagon")}, "hexagon"),
        ({"shapes": ("circle",)}, "circle"),
        ({"colours": ("red", "red")}, "red"),
        ({"colours": ("red", "blue"), "shapes": ("circle", "star")}, "max_objects"),
        ({"tasks": {"paint": 1.0}, "colours": ("red",)}, "colours"),  # all at once
    ],
)
def test_a_world_that_cannot_be_is_refused(fields, named):
    assert named in complaint(lambda: shapes.world(0, fields))  # the door


def test_pictures_of_no_task_hold_as_many_things_as_asked():
    world = Shapes(0, ShapesConfig(tasks={"image": 1.0}, min_objects=3, max_objects=4))
    assert {len(world.scene(i).things) for i in range(40)} == {3, 4}


def test_named_worlds_are_what_the_presets_train_on():
    """Their fields may be changed, and tiny's tasks change over the examples of a training."""
    assert shapes.nano_pictures(3).config.max_objects == 3
    assert {len(shapes.nano_crowds(0).scene(i).things) for i in range(9)} <= {3, 4}
    assert shapes.nano_tasks(0, digits=0.5).config.digits == 0.5
    mixed, last = shapes.tiny_tasks(5, examples=1000), shapes.tiny_tasks(5)
    assert mixed.config.tasks != last.config.tasks == ShapesConfig().tasks
    early, late = ([mixed.example(i) for i in range(n, n + 150)] for n in (0, 850))
    asks = lambda some: sum(not segments[-1].is_image for segments in some)
    assert asks(early) > 1.5 * asks(late)
