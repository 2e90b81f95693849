"""Laws of tasks with pictures: numbers are those of the full pass, pictures are read once, bad items are named."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_image_prompts import CONTEXT, VISION, full_pass, opened

from gptjax.config.section import InputError
from gptjax.data import picture_sets
from gptjax.data.image_rows import place_id
from gptjax.evals.measure import measure
from gptjax.evals.score import Scorer
from gptjax.evals.tasks import load_task
from gptjax.generation import image_prompts
from gptjax.generation.image_places import device_ids, image_places
from gptjax.model.vision import Images
from gptjax.tokenizer import BytesTokenizer, set_template

Image = pytest.importorskip("PIL.Image")

T = VISION.num_tokens
CHOICES = [
    {"image": "a.png", "query": "Two?", "choices": ["one", "two"], "gold": 1},
    {"image": "b.png", "query": "Two?", "choices": ["one", "two"], "gold": 1},
    {"query": "Sky?", "choices": ["blue", "red"], "gold": 0},
    {"image": "a.png", "query": "Sea?", "choices": ["b", "r"], "gold": 0},
]
ASKED = [
    {"image": "a.png", "question": "Two?", "answer": "x", "kind": "count"},
    {"image": "b.png", "question": "Two?", "answer": "y", "kind": "count"},
    {"image": "a.png", "question": "Sky?", "answer": "z", "kind": "color"},
]


@pytest.fixture(scope="module")
def model():
    made = opened()
    tokenizer = BytesTokenizer()
    set_template(tokenizer, "mistral-v0")
    made.tokenizer = tokenizer
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    for seed, name in enumerate("ab"):
        pixels = np.random.default_rng(seed).integers(0, 256, (VISION.side, VISION.side, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def write(path: Path, items: list[dict], **head) -> str:
    lines = [{"task": head}, *items] if head else items
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def scorer(model, share: bool = True) -> Scorer:
    return Scorer(model.decoder, model.params, model.mesh, share=share)


def full(model, ids: list[int], patches: dict[int, np.ndarray]) -> np.ndarray:
    """log p of every id behind each of these, from one pass over all of them in a row of their own."""
    offset_L, last_L = image_places(ids, VISION)
    used = list(patches)
    slot_L = np.array([used.index(i) * T if i < 0 else 0 for i in ids])
    row = [device_ids(ids), np.where(offset_L < 0, -1, slot_L + offset_L), last_L]
    ids_BL, index_BL, last_BL = (jnp.asarray(np.pad(x, (0, CONTEXT - len(ids)))[None], jnp.int32) for x in row)
    images = Images(jnp.asarray(np.stack([patches[i] for i in used]))[None], index_BL, last_BL)
    logits_LV = np.asarray(full_pass(model.decoder, model.params, ids_BL, images), np.float64)[0]
    return logits_LV - np.logaddexp.reduce(logits_LV, axis=-1, keepdims=True)


def prompt_ids(model, task, item, chat: bool) -> list[int]:
    """The ids of an item's prompt, spelt out: a beginning, its picture's places, and the bytes of its text."""
    place = [place_id(p.key) for p in item.pictures for _ in range(T)]
    words = model.tokenizer.encode
    if chat:
        return [model.tokenizer.bos_id, *words("[INST] "), *place, *words(f"{item.prompt} [/INST]")]
    return [model.tokenizer.bos_id, *place, *words(item.prompt)]


@pytest.mark.parametrize("chat", [False, True])
def test_likelihoods_behind_pictures_are_those_of_the_full_pass(model, folder, chat, monkeypatch):
    decoded = []
    read = image_prompts.read_patches
    monkeypatch.setattr(image_prompts, "read_patches", lambda p, v: decoded.append(p.key) or read(p, v))
    task = load_task(write(folder / "quiz.jsonl", CHOICES))
    found = measure(task, scorer(model), model.tokenizer, chat=chat).records
    assert len(decoded) == 2, "each picture is read once"
    apart = measure(task, scorer(model, share=False), model.tokenizer, chat=chat).records
    patches = {place_id(p.key): read(p, VISION) for item in task.items for p in item.pictures}
    for item, one, other in zip(task.items, found, apart, strict=True):
        front, wanted = prompt_ids(model, task, item, chat), []
        for answer in item.answers:
            ids = [*front, *model.tokenizer.encode(answer if chat else " " + answer)]
            log_p_LV = full(model, ids, patches)
            wanted.append(sum(log_p_LV[i - 1, ids[i]] for i in range(len(front), len(ids))))
        np.testing.assert_allclose(one["scores"], wanted, rtol=2e-5)
        np.testing.assert_allclose(other["scores"], wanted, rtol=2e-5)
        assert one.get("images", []) == [p.key for p in item.pictures]
    assert abs(found[0]["scores"][0] - found[1]["scores"][0]) > 1e-2, "another picture, another likelihood"


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_generated_follows_the_picture_and_is_counted_by_kind(model, folder, chat):
    head = {"kind": "generation", "prompt": "{question}", "answers": "answer", "by": "kind", "max_new_tokens": 3}
    task = load_task(write(folder / "ask.jsonl", ASKED, **head))
    result = measure(task, scorer(model), model.tokenizer, chat=chat)
    patches = {place_id(p.key): image_prompts.read_patches(p, VISION) for item in task.items for p in item.pictures}
    for item, record in zip(task.items, result.records):
        ids = prompt_ids(model, task, item, chat)
        begun = len(ids)
        for _ in range(3):
            ids.append(int(full(model, ids, patches)[len(ids) - 1, : model.decoder.vocab_size].argmax()))
        said = model.tokenizer.decode(ids[begun:]).split("\n")[0]
        assert record["text"].strip() == said.strip()
    right = dataclasses.replace(task, items=tuple(
        dataclasses.replace(item, answers=(record["text"] if item.group == "count" else "no such text",))
        for item, record in zip(task.items, result.records)
    ))  # fmt: skip
    metrics = measure(right, scorer(model), model.tokenizer, chat=chat).metrics
    assert {n: m.value for n, m in metrics.items()} == {
        "exact_match": pytest.approx(2 / 3), "exact_match color": 0, "exact_match count": 1,
    }  # fmt: skip
    assert result.records[0]["group"] == "count"


def test_a_task_with_pictures_that_is_no_good_is_refused_in_a_line(model, folder):
    for name, items, head, said in [
        ("gone", [{"image": "c.png", "prompt": "x", "answers": "y"}], {}, "gone.jsonl line 1.*c.png.*can't be read"),
        ("url", [{"image": "https://x.org/a.png", "prompt": "x", "answers": "y"}], {}, "line 1.*nothing is fetched"),
        ("shots", [{"image": "a.png", "prompt": "x", "answers": "y"}], {"shots": 1, "kind": "generation"}, "no shots"),
        ("text", [{"image": "a.png", "text": "x"}], {}, "line 1 has a picture, its image; wanted no kind=text"),
        ("by", [{"query": "x", "choices": ["a", "b"], "gold": 0}], {"by": "z", "kind": "multiple_choice"}, "by='z'"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=said) as caught:
            load_task(write(folder / f"{name}.jsonl", items, **head))
        assert "\n" not in str(caught.value)
    other = {"image": "no picture", "prompt": "x", "answers": ["y"]}
    assert load_task(write(folder / "other.jsonl", [other], kind="generation", image="")).items[0].pictures == ()
    blind = opened(patch=0)
    task = load_task(write(folder / "quiz.jsonl", CHOICES))
    with pytest.raises(InputError, match="quiz.jsonl: this model reads no images"):
        measure(task, scorer(blind), model.tokenizer)
    long = [{"image": "a.png", "query": "x" * CONTEXT, "choices": ["a", "b"], "gold": 0}]
    with pytest.raises(InputError, match="what holds images is not cut"):
        measure(load_task(write(folder / "long.jsonl", long)), scorer(model), model.tokenizer)


def test_the_tasks_of_the_picture_sets_have_their_test_parts(folder, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(picture_sets, "CHARTS", {"train": (2, 1), "test": (3, 2)})
    task = load_task("charts")
    assert 21 <= len(task.items) <= 24 and {len(item.pictures) for item in task.items} == {1}
    assert {item.group for item in task.items} == {"count", "tallest", "shortest", "value", "comparison"}
    assert len({item.pictures[0].key for item in task.items}) == 3
