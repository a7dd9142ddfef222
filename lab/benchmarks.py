"""Public benchmarks: the figures that their own scorers give, or the folders that these read.

    python -m lab.benchmarks pope coco_pope_random.json --images val2014 --out DIR --checkpoint DIR
    python -m lab.benchmarks mme Your_Results/*.txt --images MME_Benchmark_release_version --out DIR
    python -m lab.benchmarks vqav2 QUESTIONS.json ANNOTATIONS.json --images val2014 --out DIR
    python -m lab.benchmarks gqa testdev_balanced_questions.json --images images --out DIR
    python -m lab.benchmarks mmmu */output.json --out DIR     (the responses are in these files)
    python -m lab.benchmarks geneval evaluation_metadata.jsonl --out DIR
    python -m lab.benchmarks hpsv2 anime.json concept-art.json paintings.json photo.json --out DIR

Figures have the units of the official scorers; a rule that looks odd is theirs. Reading order: a
reader and a scorer for each benchmark, the model, pictures, answers, command line.
"""

import argparse
import json
import os
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import checkpoint
from checkpoint import read_json, read_lines
from data import read_prompt
from sample import Answer, Request, generate, load

Figures = dict[str, dict[str, float]]  # rows of a table


@dataclass
class Question:
    group: str  # a row of the table
    image: str  # below --images
    text: str
    truth: object
    answer: str | None = None


def read_list(path: Path) -> list:
    content = checkpoint.parse_json(checkpoint.read_text(path), path)
    if not isinstance(content, list):
        raise ValueError(f"{path} holds {content!r:.40}; want a list; give the published file")
    return content


def take(item: object, where: str | Path, **kinds: type) -> list:
    """The named entries of an object, each of its type."""
    for name, kind in kinds.items():
        if not isinstance(item, dict) or not isinstance(item.get(name), kind):
            raise ValueError(
                f"{where} is {item!r:.80}; want an object whose {name!r} is a "
                f"{kind.__name__}; give the published file"
            )
    return [item[name] for name in kinds]


def mean(values: Iterable[float]) -> float:
    """0 for none: where nothing was said yes to, the precision of yes is 0."""
    values = list(values)
    return sum(values) / max(1, len(values))


def by_group(questions: list[Question], values: list) -> dict[str, list]:
    """What belongs to the questions of each group, in their order."""
    rows = {question.group: [] for question in questions}
    for question, value in zip(questions, values, strict=True):
        rows[question.group].append(value)
    return rows


def accuracies(questions: list[Question], scores: list[float]) -> Figures:
    """The mean over all questions and over each group of them."""
    rows = {"all": scores} | by_group(questions, scores)
    return {name: {"accuracy": mean(row), "questions": len(row)} for name, row in rows.items()}


# --- POPE (github.com/AoiDragon/POPE, evaluate.py) -----------------------------------------------


def read_pope(paths: list[Path]) -> list[Question]:
    rows = [(path.stem, *line) for path in paths for line in read_lines(path)]
    return [
        Question(group, *take(item, where, image=str, text=str, label=str))
        for group, where, item in rows
    ]


def says_yes(answer: str) -> bool:
    """Whatever holds no "No", "no" or "not" in its first sentence is a yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def score_pope(questions: list[Question]) -> Figures:
    figures = {}
    pairs = [(says_yes(q.answer), q.truth != "no") for q in questions]
    for name, row in by_group(questions, pairs).items():
        precision = mean(true for said, true in row if said)
        recall = mean(said for said, true in row if true)
        figures[name] = {
            "accuracy": mean(said == true for said, true in row),
            "precision": precision,
            "recall": recall,
            "F1": 2 * precision * recall / (precision + recall or 1),
            "yes ratio": mean(said for said, _ in row),
        }
    return figures


# --- MME (BradyFU/Awesome-Multimodal-Large-Language-Models, tools/eval_tool.zip, calculation.py) --

MME_SUMS = {
    "Perception": "existence count position color posters celebrity scene landmark artwork OCR",
    "Cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning",
}


def read_mme(paths: list[Path]) -> list[Question]:
    """The files of Your_Results, one a category: image, question, answer, perhaps a response."""
    questions = []
    for path in paths:
        lines = path.read_text("utf-8-sig", "replace").split("\n")
        rows = [line.split("\t") for line in lines if line.strip()]
        bad = [
            row
            for row in rows
            if len(row) not in (3, 4) or row[2].strip().lower() not in ("yes", "no")
        ]
        if bad or [row[0] for row in rows[::2]] != [row[0] for row in rows[1::2]]:
            raise ValueError(
                f"{path} holds {(bad or rows)[-1]!r:.80}; want image, question, Yes "
                "or No with tabs between, two rows an image; give MME's Your_Results"
            )
        for name, text, truth, *response in rows:
            name = f"{path.stem}/{name}"
            questions.append(Question(path.stem, name, text, truth.strip().lower(), *response))
    return questions


def mme_word(answer: str) -> str:
    """What the first four letters say."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score_mme(questions: list[Question]) -> Figures:
    figures, right = {}, [mme_word(q.answer) == q.truth for q in questions]
    for name, row in by_group(questions, right).items():
        both = [a and b for a, b in zip(row[::2], row[1::2], strict=True)]
        accuracy, plus = 100 * mean(row), 100 * mean(both)
        figures[name] = {"accuracy": accuracy, "accuracy+": plus, "score": accuracy + plus}
    for name, categories in MME_SUMS.items():
        if set(categories.split()) <= set(figures):  # a sum over fewer would not be MME's
            total = sum(figures[category]["score"] for category in categories.split())
            figures[name] = {"score": total}
    return figures


# --- VQAv2 (github.com/GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py) ---------

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0"} | {word: str(n) for n, word in enumerate(NUMBERS)}
WITH_APOSTROPHES = """ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't
she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't
what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
you'll you're you've""".split()
# each of them with one apostrophe missing, and a slip of the official table
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1 :]: word
    for word in WITH_APOSTROPHES
    for i in range(len(word))
    if word[i] == "'"
}


def vqa_normal(text: str) -> str:
    digits = re.search(r"\d,\d", text)
    out = text
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or digits else " ")
    out = re.sub(r"\.(?!\d)", "", out, count=32)  # theirs gives re.UNICODE, 32, as the count
    words = [NUMBERS.get(word, word) for word in out.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def read_vqav2(paths: list[Path]) -> list[Question]:
    """The file of the questions and that of the annotations."""
    if len(paths) != 2:
        raise ValueError(f"vqav2 has {len(paths)} files; give two, questions and annotations")
    asked, subset = take(read_json(paths[0]), paths[0], questions=list, data_subtype=str)
    (annotations,) = take(read_json(paths[1]), paths[1], annotations=list)
    texts = dict(take(item, "a question", question_id=int, question=str) for item in asked)
    questions = []
    for item in annotations:
        number, image, kind, answers = take(
            item, "an annotation", question_id=int, image_id=int, answer_type=str, answers=list
        )
        if number not in texts:
            raise ValueError(f"question {number} is annotated, not asked; give files of one split")
        truth = [take(a, f"an answer to question {number}", answer=str)[0] for a in answers]
        image = f"COCO_{subset}_{image:012}.jpg"
        questions.append(Question(kind, image, texts[number], truth))
    return questions


def vqa_accuracy(answer: str, truth: list[str]) -> float:
    """The mean, over leaving each person out, of min(1, others who say so / 3). Where all people
    agree to the letter nothing is normalised (issue 14 there: such answers are often read off)."""
    answer, *truth = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *truth))
    if len(set(truth)) > 1:
        answer, *truth = map(vqa_normal, (answer, *truth))
    same = [other == answer for other in truth]
    return mean(min(1, (sum(same) - own) / 3) for own in same)


def score_vqav2(questions: list[Question]) -> Figures:
    return accuracies(questions, [100 * vqa_accuracy(q.answer, q.truth) for q in questions])


# --- GQA (gqadataset.org, eval.py) ---------------------------------------------------------------


def read_gqa(paths: list[Path]) -> list[Question]:
    """The balanced questions: theirs scores no others."""
    questions = []
    for number, item in (pair for path in paths for pair in read_json(path).items()):
        balanced, image, text, truth, types = take(
            item,
            f"question {number}",
            isBalanced=bool,
            imageId=str,
            question=str,
            answer=str,
            types=dict,
        )
        kind = "open" if types.get("structural") == "query" else "binary"
        questions += [Question(kind, f"{image}.jpg", text, truth)] * balanced
    return questions


def score_gqa(questions: list[Question]) -> Figures:
    """Equal to the letter, of answers made ready as LLaVA does (scripts/convert_gqa_for_eval.py):
    no full stop at the end, small letters."""
    right = [q.answer.rstrip(".").lower() == q.truth for q in questions]
    return accuracies(questions, [100 * r for r in right])


# --- MMMU (github.com/MMMU-Benchmark/MMMU, eval/eval_utils.py) -----------------------------------


def read_mmmu(paths: list[Path]) -> list[Question]:
    """Files output.json, responses and all: the data set itself is parquet, images included."""
    questions = []
    for path in paths:
        for item in read_list(path):
            name, kind, response = take(item, path, id=str, question_type=str, response=str)
            options = take(item, path, index2ans=dict)[0] if kind == "multiple-choice" else {}
            truth = item.get("answer")
            truth = truth if isinstance(truth, list) else [truth]
            is_text = all(isinstance(text, str) for text in [*truth, *options.values()])
            if not is_text or (kind == "multiple-choice" and not options):
                raise ValueError(
                    f"{path}: {name} has an answer or option that is no text, or no "
                    "option; give the published form of output.json"
                )
            subject = "_".join(name.split("_")[1:-1])  # of "validation_Art_Theory_3"
            questions.append(Question(subject, "", "", (truth, options), response))
    return questions


def choose(response: str, options: dict[str, str], rng: random.Random) -> str:
    """The letter that a response names last: in brackets, else as a word, else, in a response of
    more than five words, by its option's text; else any."""
    for mark in ",.!?;:'":
        response = response.strip(mark)
    response = f" {response} "
    ways = [{o: f"({o})" for o in options}, {o: f" {o} " for o in options}]
    if len(response.split()) > 5:
        ways.append({o: text.lower() for o, text in options.items()})
    for way, text in zip(ways, (response, response, response.lower()), strict=False):
        if any(said in text for said in way.values()):
            return max(way, key=lambda option: text.rfind(way[option]))
    return rng.choice(list(options))


def mmmu_normal(text: str) -> list[str | float]:
    """A number to two decimals, or small letters; a single one only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


MMMU_NUMBERS = (  # with commas, with an exponent, plain
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def open_answers(response: str) -> list[str | float]:
    """What may be the answer: of each line the shortest end behind a telling word, or all of the
    response; and the numbers in there."""
    words = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    response, keys = response.strip().strip(".").lower(), []
    lines = response.split("\n")
    for n, line in enumerate(lines, 1):
        ends, key = [*words, *["="] * (n == len(lines))], ""
        for end in (line.split(word)[-1].strip() for word in ends if word in line):
            key = end if not key or len(end) < len(key) else key
        keys += [key] * (key not in ("", *":,.!?;'"))
    keys = keys or [response]
    keys += [number for key in keys for form in MMMU_NUMBERS for number in re.findall(form, key)]
    return [normal for key in keys for normal in mmmu_normal(key)]


def mmmu_right(response: str, truth: list[str], options: dict, rng: random.Random) -> bool:
    if options:
        return choose(response, options, rng) in truth
    wanted = [normal for text in truth for normal in mmmu_normal(text)]
    texts = [normal for normal in wanted if isinstance(normal, str)]
    return any(
        said in wanted if isinstance(said, float) else any(text in said for text in texts)
        for said in open_answers(response)
    )


def score_mmmu(questions: list[Question]) -> Figures:
    rng = random.Random(42)  # one stream over all subjects, as theirs
    return accuracies(questions, [mmmu_right(q.answer, *q.truth, rng) for q in questions])


# --- The model -----------------------------------------------------------------------------------


def ask(prompts: list[tuple[str, list[Path], int]], args, **options) -> Iterator[Answer]:
    """Answers to texts with images and seeds, a batch at a time. Nothing asked: nothing loaded."""
    pipeline = load(args.checkpoint, checkpoint.pick_device(args.device)) if prompts else None
    with tqdm(total=len(prompts), unit="answer") as bar:
        for first in range(0, len(prompts), args.batch_size):
            part = prompts[first : first + args.batch_size]
            requests = [Request(read_prompt(text, images), seed) for text, images, seed in part]
            yield from generate(pipeline, requests, args.batch_size, progress=False, **options)
            bar.update(len(part))


# --- Pictures for GenEval and HPSv2 --------------------------------------------------------------

HPSV2_STYLES = ["anime.json", "concept-art.json", "paintings.json", "photo.json"]


def geneval_layout(paths: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """evaluation_metadata.jsonl -> the pictures' places and prompts, other files and their text
    (github.com/djghosh13/geneval, README)."""
    pictures, files = {}, {}
    for n, (where, item) in enumerate(line for path in paths for line in read_lines(path)):
        (prompt,) = take(item, where, prompt=str)
        pictures |= {f"{n:05}/samples/{j:04}.png": prompt for j in range(4)}
        files[f"{n:05}/metadata.jsonl"] = json.dumps(item)
    return pictures, files


def hpsv2_layout(paths: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Lists of prompts, one file a style (github.com/tgxs002/HPSv2, README). Its scorer takes
    whatever else lies in the folder for a style: nothing else may be written there."""
    pictures = {}
    for path in paths:
        prompts = read_list(path)
        if path.name not in HPSV2_STYLES or not all(isinstance(p, str) for p in prompts):
            raise ValueError(f"{path} is not a style's list of prompts; give {HPSV2_STYLES}")
        pictures |= {f"{path.stem}/{n:05}.jpg": prompt for n, prompt in enumerate(prompts)}
    return pictures, {}


def draw(pictures: dict[str, str], files: dict[str, str], args) -> None:
    """Draw what is not there yet, each picture with a seed of its own. What is drawn is kept in a
    file beside the folder: a scorer may take all that is in it for pictures."""
    made = {"checkpoint": args.checkpoint, "seed": args.seed, "prompts": pictures}
    path = args.out.with_name(args.out.name + ".json")
    if path.exists() and read_json(path) != made:
        raise ValueError(
            f"{args.out} is of another checkpoint, seed or prompts, as {path} says; "
            "give another --out"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(path, made)
    for name in (*pictures, *files):
        (args.out / name).parent.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (args.out / name).write_text(text)
    todo = {
        name: (prompt, [], args.seed + n)
        for n, (name, prompt) in enumerate(pictures.items())
        if not (args.out / name).exists()
    }
    answers = ask(list(todo.values()), args, min_images=1, max_images=1)
    for name, answer in zip(todo, answers, strict=True):
        with checkpoint.whole_file(args.out / name) as file:
            answer.images[0].save(file, "JPEG" if name.endswith("jpg") else "PNG")


# --- Answers -------------------------------------------------------------------------------------


def find_image(folder: Path, name: str) -> Path:
    """Below the folder; where MME has it so, in "images" of its category."""
    path, image = folder / name, Path(name).name
    found = path if path.is_file() else path.parent / "images" / image
    if not found.is_file():
        raise ValueError(f"image {name} is not in {folder}; give --images with the right folder")
    return found


def answer(questions: list[Question], args) -> None:
    """Ask the model what out/answers.jsonl does not answer yet, and append it there."""
    images = [find_image(args.images, q.image) for q in questions]  # before anything slow
    lines = [
        {
            "image": q.image,
            "question": f"{q.text} {args.suffix}".strip(),
            "checkpoint": args.checkpoint,
        }
        for q in questions
    ]
    path = args.out / "answers.jsonl"
    text = checkpoint.read_text(path) if path.exists() else ""
    whole, cut = text[: text.rfind("\n") + 1], text[text.rfind("\n") + 1 :]
    done = [checkpoint.parse_json(line, path) for line in whole.splitlines() if line.strip()]
    for line, old in zip(lines, done, strict=False):
        (line["answer"],) = take(old, path, answer=str)
        if old != line:
            raise ValueError(
                f"{path} answers {old!r:.200}, not {line['question']!r} for "
                f"{args.checkpoint}; give another --out"
            )
    todo = lines[len(done) :]
    if cut:  # a line of ours that an interruption cut short goes
        own = json.dumps(todo[0])[:-1] if todo else ""
        if not (own and (own.startswith(cut) or cut.startswith(own))):
            raise ValueError(f"{path} ends in {cut!r:.200}; give another --out")
        os.truncate(path, len(whole.encode(errors="surrogateescape")))
    asked = [(line["question"], [image], 0) for line, image in zip(lines, images, strict=True)]
    text_alone = {"cfg_scale": 1, "cfg_image": 1, "max_images": 0}
    with open(path, "a") as file:
        answers = ask(asked[len(done) :], args, **text_alone)
        for line, said in zip(todo, answers, strict=True):
            line["answer"] = said.text.strip()
            file.write(json.dumps(line) + "\n")
            file.flush()
    for question, line in zip(questions, lines, strict=True):
        question.answer = line["answer"]


def take_answers(questions: list[Question], path: Path) -> None:
    """A jsonl file of objects with "answer", one for each question, in order."""
    lines = read_lines(path)
    if len(lines) != len(questions):
        raise ValueError(
            f"{path} has {len(lines)} answers to {len(questions)} questions; give one line for each"
        )
    for question, (where, item) in zip(questions, lines, strict=True):
        (question.answer,) = take(item, where, answer=str)


# --- Command line --------------------------------------------------------------------------------

SCORED = {
    "pope": (read_pope, score_pope),
    "mme": (read_mme, score_mme),
    "vqav2": (read_vqav2, score_vqav2),
    "gqa": (read_gqa, score_gqa),
    "mmmu": (read_mmmu, score_mmmu),
}
DRAWN = {"geneval": geneval_layout, "hpsv2": hpsv2_layout}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    raw, tiny = argparse.RawDescriptionHelpFormatter, "checkpoints/tiny"
    parser = checkpoint.Parser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("name", choices=[*SCORED, *DRAWN])
    add("files", nargs="+", type=Path, metavar="FILE", help="the benchmark's own files")
    add("--images", type=Path, default=Path(), metavar="DIR", help="where its images are")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="answers and figures, or pictures, "
        "go here; what is there already is kept, so that an interrupted run goes on",
    )
    add(
        "--answers",
        type=Path,
        metavar="FILE",
        help="score these, without a model: a jsonl file "
        'of {"answer": ...} in the order of the questions',
    )
    add(
        "--suffix",
        default="",
        metavar="TEXT",
        help='goes behind every question, as "Answer the question using a single word or phrase."',
    )
    add(
        "--seed",
        type=checkpoint.number(int, 0, 2**31),
        default=0,
        metavar="N",
        help="of the first picture, the others follow (default: 0)",
    )
    add(
        "--batch-size",
        type=checkpoint.number(int, 1, 4096),
        default=16,
        metavar="N",
        help="answered or drawn at a time (default: 16)",
    )
    add("--checkpoint", default=tiny, metavar="DIR", help="the model (default: tiny)")
    add("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    args.checkpoint = str(checkpoint.open_checkpoint(args.checkpoint))  # of a run its newest save
    if args.name in DRAWN:
        if args.answers or args.suffix:
            raise ValueError(f"--answers and --suffix are of questions; {args.name} has none")
        draw(*DRAWN[args.name](args.files), args)
        return print(f"{args.out}: ready for {args.name}'s own scorer")
    read, score = SCORED[args.name]
    if not (questions := read(args.files)):
        raise ValueError(f"{args.files[0]} holds no question; give the published file")
    if args.answers:
        take_answers(questions, args.answers)
    elif any(q.answer is None for q in questions):
        args.out.mkdir(parents=True, exist_ok=True)
        with checkpoint.lock(args.out):
            answer(questions, args)
    figures = score(questions)
    for name, row in figures.items():
        print(f"{name:24}" + "".join(f"  {measure} {value:.6g}" for measure, value in row.items()))
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(args.out / "figures.json", figures)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    checkpoint.command_line(lambda: run(args), f"interrupted; {args.out} keeps what is there")


if __name__ == "__main__":
    main()
