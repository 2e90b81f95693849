"""Questions about pictures that are made when they are first read: easy-VQA, which is fetched, and drawn charts.

Both lie in the user's cache: pictures, and JSONL whose records are {"image", "question", "answer", "kind"}. Of what is
trained on, one question in 20 is asked again about an empty picture.
"""

import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from gptjax.config.section import InputError, one_line
from gptjax.runtime.versions import cache_folder

PICTURE_SETS = ("easy_vqa", "easy_vqa_test", "charts", "charts_test")

EASY_VQA = "easy-vqa==1.0"  # MIT; Zhou 2020
EASY_VQA_WHEEL = "easy_vqa-1.0-py3-none-any.whl"
EASY_VQA_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"

# Charts of each part, and the seed of its drawing.
CHARTS = {"train": (8000, 1), "test": (1500, 2)}
SIDE, GROUND = 96, 78  # pixels of a chart; the bars stand on the line at GROUND
COLORS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 200), "orange": (255, 140, 20),
    "purple": (140, 60, 190), "black": (20, 20, 20), "pink": (250, 150, 200), "brown": (130, 80, 40),
}  # fmt: skip

Question = dict[str, Any]


def picture_set(name: str) -> Path:
    """The JSONL file of a set of PICTURE_SETS, made unless it is in the cache; raises InputError where it can't be."""
    stem, test = name.removesuffix("_test"), name.endswith("_test")
    folder = cache_folder() / "data" / _versioned(stem)
    if not folder.exists():
        if importlib.util.find_spec("PIL") is None:
            raise InputError(f"builtin:{name} needs a package more: pip install 'gptjax[images]'")
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            (_make_easy_vqa if stem == "easy_vqa" else _make_charts)(made)
            try:
                made.rename(folder)
            except OSError:  # another process was first, and made the same
                if not folder.exists():
                    raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return folder / ("test.jsonl" if test else "train.jsonl")


def _versioned(stem: str) -> str:
    """The folder's name: another wheel, or another way to draw, has another one."""
    key = f"{EASY_VQA_SHA256} {CHARTS} {hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    return f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _again_without_pictures(folder: Path, records: list[Question], side: int) -> list[Question]:
    """One in 20 of the records, drawn by a seed, about pictures that show nothing, half of them about a white one.

    So an answer where nothing is seen is learned to be what the text alone says.
    """
    from PIL import Image

    rng, paths = random.Random(3), [f"empty/{n}.png" for n in range(16)]
    (folder / "empty").mkdir()
    for path in paths:
        light = (255, 255, 255) if path == paths[0] else tuple(rng.randint(224, 255) for _ in "rgb")
        Image.new("RGB", (side, side), light).save(folder / path)
    some = rng.sample(records, len(records) // 20)
    return [{**record, "image": paths[0] if n % 2 else rng.choice(paths[1:])} for n, record in enumerate(some)]


def _write(path: Path, records: list[Question]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


# -- easy-VQA.


def _make_easy_vqa(folder: Path) -> None:
    with zipfile.ZipFile(_wheel(folder)) as wheel:
        for part in ("train", "test"):
            inside = f"easy_vqa/data/{part}"
            questions = json.loads(wheel.read(f"{inside}/questions.json"))
            (folder / part).mkdir()
            for number in sorted({number for _, _, number in questions}):
                (folder / part / f"{number}.png").write_bytes(wheel.read(f"{inside}/images/{number}.png"))
            records = [
                {"image": f"{part}/{number}.png", "question": asked, "answer": answer, "kind": kind_of_question(asked)}
                for asked, answer, number in questions
            ]
            if part == "train":
                records += _again_without_pictures(folder, records, 64)
            _write(folder / f"{part}.jsonl", records)


def kind_of_question(asked: str) -> str:
    """The kind of a question of easy-VQA: color, shape, or of those for yes or no the thing that is asked for."""
    if asked.startswith("what"):
        return "color" if "color" in asked else "shape"
    words = asked.rstrip("?").split()
    thing = "color" if "shape" in words else "shape"
    return f"no {thing}, yes or no" if {"no", "not"} & set(words) else f"{thing}, yes or no"


def _wheel(folder: Path) -> Path:
    """easy-VQA's wheel: the one in the working folder, or else fetched into `folder`; raises InputError for another."""
    path = Path(EASY_VQA_WHEEL)
    if not path.exists():
        path = folder / "wheel" / EASY_VQA_WHEEL
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--retries", "0", "--timeout", "15", "--dest", str(path.parent), EASY_VQA]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not path.exists():
            said = done.stderr.strip().splitlines()
            raise InputError(
                f"builtin:easy_vqa can't be fetched ({one_line(said[-1] if said else 'no answer', 100)}); put "
                f"{EASY_VQA_WHEEL} into {os.getcwd()}, from: pip download --no-deps {EASY_VQA}"
            )
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != EASY_VQA_SHA256:
        raise InputError(f"{path} has the sha256 {found[:16]}...; wanted {EASY_VQA_SHA256[:16]}...; fetch it again")
    return path


# -- Charts.


def _make_charts(folder: Path) -> None:
    for part, (count, seed) in CHARTS.items():
        (folder / part).mkdir()
        rng, records = random.Random(seed), []
        for number in range(count):
            bars = draw_bars(rng)
            path = f"{part}/{number}.png"
            chart_image(bars, rng).save(folder / path, optimize=False)
            records += [{"image": path, **question} for question in chart_questions(bars, rng)]
        if part == "train":
            records += _again_without_pictures(folder, records, SIDE)
        _write(folder / f"{part}.jsonl", records)


def draw_bars(rng: random.Random) -> dict[str, int]:
    """The values of 2 to 6 bars by their colors, from left to right: 1 to 9, all different."""
    colors = rng.sample(list(COLORS), rng.randint(2, 6))
    return dict(zip(colors, rng.sample(range(1, 10), len(colors))))


def chart_image(bars: dict[str, int], rng: random.Random) -> Any:
    """The chart as a picture by Pillow: bars on a line, and below each its value, a digit.

    The scale differs from chart to chart, so that a height alone tells no value.
    """
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default_imagefont()
    step, scale = SIDE // len(bars), rng.uniform(0.5, 1.0) * (GROUND - 4) / max(bars.values())
    draw.line([(0, GROUND), (SIDE, GROUND)], fill="gray")
    for i, (color, value) in enumerate(bars.items()):
        width = rng.randint(8, min(20, step - 3))
        left = i * step + (step - width) // 2
        draw.rectangle([(left, GROUND - round(value * scale)), (left + width - 1, GROUND - 1)], fill=COLORS[color])
        draw.text((i * step + (step - 6) // 2, GROUND + 3), str(value), fill="black", font=font)
    return image


def chart_questions(bars: dict[str, int], rng: random.Random) -> list[Question]:
    """Questions about a chart: count, tallest, shortest, printed values of at most 3 bars, and two that compare.

    Of these the answer to one is yes and to the other no, so that both are right equally often.
    """
    tallest, shortest = (of(bars, key=bars.__getitem__) for of in (max, min))
    asked = [
        ("count", "how many bars are there?", str(len(bars))),
        ("tallest", "what is the color of the tallest bar?", tallest),
        ("shortest", "what is the color of the shortest bar?", shortest),
    ]
    for color in rng.sample(list(bars), min(3, len(bars))):
        asked.append(("value", f"what is the value of the {color} bar?", str(bars[color])))
    low, high = sorted(rng.sample(list(bars), 2), key=bars.__getitem__)
    word = rng.choice(("taller", "shorter"))
    first, second = (high, low) if word == "taller" else (low, high)
    asked.append(("comparison", f"is the {first} bar {word} than the {second} bar?", "yes"))
    asked.append(("comparison", f"is the {second} bar {word} than the {first} bar?", "no"))
    return [{"question": question, "answer": answer, "kind": kind} for kind, question, answer in asked]
