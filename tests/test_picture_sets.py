"""Questions about pictures: charts show what their answers say, and easy-VQA's wheel becomes records."""

import hashlib
import io
import json
import random
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from gptjax.config.section import InputError
from gptjax.data import picture_sets
from gptjax.data.picture_sets import (
    COLORS,
    EASY_VQA_WHEEL,
    GROUND,
    SIDE,
    chart_image,
    chart_questions,
    draw_bars,
    kind_of_question,
    picture_set,
)
from gptjax.data.sources import source_paths

pytest.importorskip("PIL.Image")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(picture_sets, "CHARTS", {"train": (8, 1), "test": (4, 2)})
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "gptjax" / "data"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dark(pixels, x: int, y: int) -> bool:
    return 0 <= x < SIDE and pixels[x, y] == (0, 0, 0)


def seen_in(tall: dict[str, int], bars: dict[str, int], asked: dict) -> str:
    """The answer to a question by the heights of the bars as they were drawn, and the values that stand above them."""
    words = asked["question"].rstrip("?").split()
    if asked["kind"] == "count":
        return str(len(tall))
    if asked["kind"] == "value":
        return str(bars[words[6]])
    if asked["kind"] == "comparison":
        return "yes" if (tall[words[2]] > tall[words[7]]) == (words[4] == "taller") else "no"
    return {"tallest": max, "shortest": min}[asked["kind"]](tall, key=tall.__getitem__)


def test_a_chart_shows_its_bars_and_their_answers():
    rng, seen, digits = random.Random(5), Counter(), defaultdict(set)
    for _ in range(40):
        bars = draw_bars(rng)
        image = chart_image(bars, rng)
        assert image.size == (SIDE, SIDE) and image.mode == "RGB"
        pixels = image.load()
        tall, place = {}, {}
        for color, value in bars.items():
            columns = [x for x in range(SIDE) if pixels[x, GROUND - 1] == COLORS[color]]
            place[color] = min(columns)
            tall[color] = sum(pixels[columns[0], y] == COLORS[color] for y in range(GROUND))
            middle = (columns[0] + columns[-1]) // 2
            ink = [(x, y) for x in range(middle - 6, middle + 7) for y in range(GROUND + 1, SIDE) if dark(pixels, x, y)]
            assert ink, "a digit stands below its bar"
            left, top = min(x for x, _ in ink), min(y for _, y in ink)
            digits[value].add(frozenset((x - left, y - top) for x, y in ink))
        assert sorted(place, key=place.__getitem__) == list(bars)
        assert sorted(tall, key=tall.__getitem__) == sorted(bars, key=bars.__getitem__)
        for one in chart_questions(bars, rng):
            seen[one["kind"]] += 1
            assert one["answer"] == seen_in(tall, bars, one), (bars, one)
    values = seen.pop("value")
    assert seen == {"count": 40, "tallest": 40, "shortest": 40, "comparison": 80} and 80 <= values <= 120
    shapes = [shape for of_digit in digits.values() for shape in of_digit]
    assert len(digits) == 9 == len(set(shapes)) == len(shapes), "a value always looks the same, and like no other"


def test_charts_are_drawn_once_and_no_test_chart_is_trained_on(cache):
    train, test = picture_set("charts"), picture_set("charts_test")
    assert source_paths("builtin:charts") == ([train], ()) and source_paths("builtin:charts_test") == ([test], ())
    written = train.stat().st_mtime_ns
    assert picture_set("charts") == train and train.stat().st_mtime_ns == written
    for path, count in ((train, 8), (test, 4)):
        found = [one for one in records(path) if not one["image"].startswith("empty/")]
        again = records(path)[len(found) :]
        assert len(again) == (len(found) // 20 if path == train else 0)
        assert all({**one, "image": ""} in [{**other, "image": ""} for other in found] for one in again)
        assert 7 * count <= len(found) <= 8 * count and len({one["image"] for one in found}) == count
        said = Counter(one["answer"] for one in found if one["kind"] == "comparison")
        assert said["yes"] == said["no"] == count
    pictures = [{(path.parent / r["image"]).read_bytes() for r in records(path)} for path in (train, test)]
    assert len(pictures[0]) >= 9 and len(pictures[1]) == 4 and pictures[0].isdisjoint(pictures[1])
    assert [p.name for p in cache.iterdir()] == [train.parent.name], "nothing half made is left"


def test_a_question_of_easy_vqa_has_a_kind():
    assert kind_of_question("what color is the circle?") == "color"
    assert kind_of_question("what is the blue shape?") == "shape"
    assert kind_of_question("is there a red shape in the image?") == "color, yes or no"
    assert kind_of_question("does the image not contain a circle?") == "no shape, yes or no"
    assert kind_of_question("is no teal shape present?") == "no color, yes or no"


def wheel_of(questions: dict[str, list]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as wheel:
        for part, asked in questions.items():
            wheel.writestr(f"easy_vqa/data/{part}/questions.json", json.dumps(asked))
            for number in {number for _, _, number in asked}:
                wheel.writestr(f"easy_vqa/data/{part}/images/{number}.png", f"{part} {number}".encode())
    return made.getvalue()


def test_a_wheel_in_the_working_folder_becomes_records_if_its_digest_is_the_published_one(cache, monkeypatch):
    asked = [["what shape is in the image?", "circle", 1], ["is there a red shape?", "no", 1]]
    wheel = wheel_of({"train": asked, "test": [["what color is the shape?", "teal", 0]]})
    Path(EASY_VQA_WHEEL).write_bytes(wheel)
    with pytest.raises(InputError, match=r"^easy_vqa-1.0-py3-none-any.whl has the sha256 \w{16}...; wanted fcb51b30"):
        picture_set("easy_vqa")
    assert not list(cache.iterdir()), "nothing half made is left"
    monkeypatch.setattr(picture_sets, "EASY_VQA_SHA256", hashlib.sha256(wheel).hexdigest())
    train = picture_set("easy_vqa")
    assert records(train) == [
        {"image": "train/1.png", "question": asked[0][0], "answer": "circle", "kind": "shape"},
        {"image": "train/1.png", "question": asked[1][0], "answer": "no", "kind": "color, yes or no"},
    ]
    assert [one["answer"] for one in records(picture_set("easy_vqa_test"))] == ["teal"]
    assert (train.parent / "train" / "1.png").read_bytes() == b"train 1"


def test_without_an_index_easy_vqa_is_one_clear_line(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        InputError, match="^builtin:easy_vqa can't be fetched .*; put easy_vqa-1.0-py3-none-any.whl into "
    ) as e:
        picture_set("easy_vqa")
    assert "\n" not in str(e.value) and not list(cache.iterdir())


def test_an_unknown_builtin_names_those_that_are_there():
    with pytest.raises(
        InputError, match="wanted one of builtin:shakespeare, .*builtin:easy_vqa, .*builtin:charts_test"
    ):
        source_paths("builtin:charts_2")
