"""Laws of fine-tuning with images: from random weights, beside weights that read none, and exact resume."""

import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import refused
from PIL import Image
from stage_runs import assert_same, lines, make_run, on_all_devices, stopped

from gptjax.cli import main
from gptjax.config import MeshConfig, SftConfig
from gptjax.data.chats import ChatData
from gptjax.evals.loss import make_eval_step
from gptjax.parallel.sharding import to_global
from gptjax.runs.load import load_model
from gptjax.runs.run import load_config

pytestmark = pytest.mark.usefixtures("compile_cache")
COLOURS = {"red": (255, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 255), "black": (0, 0, 0)}
ALIKE = """--tokenizer.template llama2 --data.length 128 --data.batch-size 8 --sinks --model.dtype float32
--optim.learning-rate 3e-3 --optim.warmup-steps 0 --data.validation-fraction 0.2 --no-sample""".split()
SCRATCH = """--init scratch --tokenizer.kind bytes --tokenizer.vocab-size 258 --model.num-layers 1 --model.width 32
--model.num-heads 2 --model.positions rope --model.dropout 0""".split()
VISION = "--model.vision.patch 8 --model.vision.side 16 --model.vision.begin 1 --model.vision.end 2".split()
ENCODER = "--model.vision.layers 1 --model.vision.width 16 --model.vision.num-heads 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compile_cache) -> Path:
    """Pictures whose halves have colours, and a file of questions about them, in it a text alone."""
    return write(tmp_path_factory.mktemp("pictures"), 24)


def write(folder: Path, count: int) -> Path:
    folder.mkdir(exist_ok=True)
    rng, records = random.Random(0), []
    for n in range(count):
        left, right = (rng.choice(list(COLOURS)) for _ in range(2))
        picture = Image.new("RGB", (16, 16), COLOURS[left])
        picture.paste(COLOURS[right], (8, 0, 16, 16))
        picture.putpixel((n % 16, n // 16), (n, n, n))
        picture.save(folder / f"{n}.png")
        records += [{"image": f"{n}.png", "question": q, "answer": a} for q, a in (("left?", left), ("right?", right))]
    records.append({"prompt": "hello", "completion": "you"})
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def sft(folder: Path, run: Path, *more: object, steps: int = 6) -> Path:
    words = ["sft", "chat", "--data.source", folder, "--run-dir", run, *ALIKE, "--steps", steps]
    every = ["--checkpoint.every", steps // 2, "--evaluate.every", steps // 2]
    assert main(on_all_devices([*words, *every, *more])) == 0
    return run


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    return sft(folder, folder.parent / "trained", *SCRATCH, *VISION)


def test_a_run_with_images_goes_on_bit_for_bit_and_is_evaluated_as_it_was_trained(trained, folder, tmp_path, capsys):
    moved = stopped(trained, tmp_path / "moved", 3)
    assert main(["sft", str(moved)]) == 0
    assert_same(moved, trained)
    losses = [line["eval_loss"] for line in lines(trained) if "eval_loss" in line]
    assert losses[1] < losses[0] < 6
    capsys.readouterr()
    assert main(["eval", str(trained)]) == 0
    assert f"eval_loss {losses[-1]:.6g}"[:16] in capsys.readouterr().out
    assert main(["data", "show", str(trained), "--step", "1"]) == 0
    assert "[INST] \x01<4 image tokens>\x02left? [/INST]" in capsys.readouterr().out
    picture = (folder / "3.png").read_bytes()
    try:
        (folder / "3.png").write_bytes((folder / "4.png").read_bytes())
        assert "is not what it was when this run was trained on it" in refused(capsys, "eval", trained)
        (folder / "3.png").write_bytes(picture[:70])
        words = ["sft", "chat", "--data.source", folder, "--run-dir", tmp_path / "x", *ALIKE, *SCRATCH, *VISION]
        assert main(on_all_devices(words)) == 2
        assert "records.jsonl:7: image 1 (3.png)" in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "x").exists()
    finally:
        (folder / "3.png").write_bytes(picture)


@pytest.mark.slow
def test_weights_that_read_no_images_get_an_encoder_of_their_own(folder, tmp_path, capsys):
    """As in LLaVA (Liu et al. 2023): what the weights were they are, and a run that has an encoder keeps it."""
    base = make_run(tmp_path / "base", length=128, template="llama2")
    run = sft(folder, tmp_path / "run", "--init", base, *VISION, *ENCODER, "--optim.learning-rate", 1e-30, steps=2)
    old, new = (load_model(x, MeshConfig()).params for x in (base, run))
    assert {"vision", "image_UD"} == new.keys() - old.keys()
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-20)
    kept = {n: x for n, x in new.items() if n in old}
    ids = lambda params: {**params, "embed_VD": params["embed_VD"][:258]}  # noqa: E731  the rest is padding
    jax.tree.map(same, ids(kept), ids(old))
    again = sft(folder, tmp_path / "again", "--init", run, "--optim.learning-rate", 1e-30, steps=2)
    jax.tree.map(same, ids(load_model(again, MeshConfig()).params), ids(new))
    assert load_config(again).model.vision == load_config(run).model.vision
    small = on_all_devices(["sft", "chat", "--data.source", folder, "--run-dir", tmp_path / "x", *ALIKE])
    said = refused(capsys, *small, "--init", run, "--model.vision.side", 32)
    assert "model.vision.side=32: wanted 16, as in init=" in said
    assert main([*small, "--init", str(base)]) == 2
    assert "holds an image, and model.vision.patch=0" in capsys.readouterr().err.splitlines()[-1]
    said = refused(capsys, *small, "--init", base, *VISION, "--lora.rank", 2)
    assert "reads no images yet, and a new encoder needs all of its weights; wanted --lora.rank 0" in said


def test_training_from_random_weights_is_asked_for_by_name(folder, tmp_path, capsys):
    small = on_all_devices(["chat", "--data.source", folder, "--run-dir", tmp_path / "x", *ALIKE])
    assert "add --init RUN (--init scratch: random weights)" in refused(capsys, "sft", *small)
    tokenizer = ["--tokenizer.kind", "bytes", "--tokenizer.vocab-size", 258]
    wrong = {
        ("sft", "--init", "scratch"): "tokenizer.path='': wanted a tokenizer that is made already with init=scratch",
        ("sft", "--init", "scratch", *tokenizer, "--lora.rank", 2): "lora.rank=2: wanted 0 with init=scratch",
        ("dpo", "--init", "scratch"): "init='scratch': wanted a run with gptjax dpo",
        ("dpo",): "add --init RUN",
    }
    for (verb, *words), said in wrong.items():
        assert said in refused(capsys, verb, *small, *words)


@pytest.mark.slow
def test_a_small_set_is_learned_and_what_the_images_show_is_answered(tmp_path):
    """The held-out pictures are others; each half has one of four colours, so text alone is right in a quarter."""
    folder = write(tmp_path / "pictures", 96)
    run = sft(folder, tmp_path / "run", *SCRATCH, *VISION, "--model.num-layers", 2, steps=300)
    last = lines(run)[-1]
    assert last["eval_answers_exact"] > 0.9
    config = load_config(run)
    assert isinstance(config, SftConfig)
    data, model = ChatData(config, run / "data", training=False), load_model(run, MeshConfig())
    held = next(data.held.batches(0))
    with jax.set_mesh(model.mesh):
        step = make_eval_step(model.decoder, model.mesh, model.params, held, answers=True)
        *_, answers, exact = step(model.params, to_global(held, model.mesh))
        assert exact > 0.8 * answers
        assert answers == np.count_nonzero(np.diff(np.pad(held["weights_BL"], ((0, 0), (1, 0)))) > 0)
        blank = {n: np.zeros_like(x) if n == "patches_BIPY" else x for n, x in held.items()}
        *_, seen = step(model.params, to_global(blank, model.mesh))
    assert seen < 0.6 * exact, "the answers come from the images"
