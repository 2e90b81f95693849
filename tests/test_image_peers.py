"""Laws of models that read images against transformers, which opens what is exported: logits, ids and pixels.

pip install torch transformers && pytest tests/test_image_peers.py -m peers
"""

import dataclasses
import json

import numpy as np
import pytest
from byte_pairs import END, TWO_FILES
from PIL import Image
from test_export import make_run
from test_families import save
from test_interop_images import KINDS, OURS, SEEING, TEXT, folder_of, logits
from test_model_options import random_params

import gptjax
from gptjax.api import export, load
from gptjax.cli import main
from gptjax.interop.families import family_of
from gptjax.interop.huggingface import import_huggingface
from gptjax.tokenizer.export import write_tokenizer
from gptjax.tokenizer.huggingface import HuggingFaceTokenizer

pytestmark = pytest.mark.peers
MARKS = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def their_logits(folder, ids_BL: np.ndarray, pixels_BIHWC: np.ndarray) -> np.ndarray:
    """logits_BLV of transformers for rows with images, which it is given as numbers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model, said = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), said
    vision = import_huggingface(folder)[0].vision
    values = (pixels_BIHWC.astype(np.float32) / 255 - np.float32(vision.mean)) / np.float32(vision.std)
    values = torch.tensor(values.astype(np.float32).transpose(0, 1, 4, 2, 3))
    values = values.flatten(0, 1) if model.config.model_type == "llava" else values
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids_BL), pixel_values=values).logits.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_that_is_exported_opens_in_transformers_with_the_logits_of_the_original(tmp_path, kind):
    assert main(["import", str(folder_of(kind)), str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    reference = np.load(folder_of(kind) / "reference.npz")
    got_BLV = their_logits(tmp_path / "out", reference["ids"], reference["images"][reference["order"]])
    np.testing.assert_allclose(got_BLV[..., :64], reference["logits"], atol=1e-5)


TEXTS = {
    "llama": {},
    "mistral": {"window": 5},
    "qwen2": {"qkv_biases": True},
    "qwen3": {"qk_norm": True, "head_dim": 8},
}
MODELS = {name: (dataclasses.replace(text, vision=vision)) for name, (text, vision, _) in OURS.items()} | {
    f"{name} in {kind}": dataclasses.replace(TEXT, vision=OURS[kind][1], **more)
    for name, more in TEXTS.items()
    for kind in ("idefics3", "llava")
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_ours_opens_in_transformers_with_its_logits(tmp_path, name, highest_precision):
    cfg, vocab_size = MODELS[name], 50
    ours = cfg, vocab_size, 64, random_params(cfg, vocab_size, 64)
    folder = save(tmp_path / "out", ours, family_of(*ours[:3]))
    rng = np.random.default_rng(0)
    ids_BL, tokens = rng.integers(0, 50, (2, 40)), cfg.vision.num_tokens
    ids_BL[:, 3 : 3 + tokens] = ids_BL[:, 24 : 24 + tokens] = vocab_size
    pixels_BIHWC = rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
    want_BLV = logits(ours, ids_BL, pixels_BIHWC, vocab_size)
    got_BLV = their_logits(folder, ids_BL, pixels_BIHWC)[..., :vocab_size]
    difference = np.abs(got_BLV - want_BLV).max() / np.abs(want_BLV).max()
    print(f"{name}: {difference:.1e} of the largest logit")
    assert difference <= 1e-5


CLIP = {"merge": 1, "projector": "mlp", "final_norm": False, "class_token": True, "activation": "quick_gelu"}
READERS = {
    "idefics3": SEEING,
    "llava": OURS["llava"][1],
    "llava with clip": dataclasses.replace(SEEING, fit="crop", **CLIP),
}


@pytest.mark.parametrize("name", READERS)
def test_the_processor_of_an_export_gives_the_ids_the_pixels_and_the_answers_of_the_run(tmp_path, name):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer = HuggingFaceTokenizer(TWO_FILES, END, END)
    size = tokenizer.vocab_size + len(MARKS)
    marks = dict(zip(MARKS, range(tokenizer.vocab_size, size)))
    vision = dataclasses.replace(READERS[name], begin=(), end=(), image_id=marks["<image>"])
    cfg = dataclasses.replace(TEXT, vision=vision)
    source = save(tmp_path / "source", (cfg, size, 64, random_params(cfg, size, 64)))
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "gptjax_images"}))
    write_tokenizer(tokenizer, source, marks if name == "idefics3" else {"<image>": marks["<image>"]})
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    run = load(tmp_path / "run")
    export(run, tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    pixels_HWC = np.pad(pixels_HWC, ((0, 0), (4, 4), (0, 0))) if vision.fit == "crop" else pixels_HWC
    Image.fromarray(pixels_HWC).save(tmp_path / "picture.png")
    inputs = processor(text="<image>hello world", images=[Image.fromarray(pixels_HWC)], return_tensors="pt")
    begin, end = ([marks[MARKS[1]], marks[MARKS[2]]], [marks[MARKS[1]]]) if name == "idefics3" else ([], [])
    image = [*begin, *[marks["<image>"]] * vision.num_tokens, *end]
    first = [tokenizer.bos_id] if tokenizer.begins else []
    assert inputs["input_ids"][0].tolist() == [*first, *image, *tokenizer.encode("hello world")]
    seen_HWC = pixels_HWC[:, 4:20] if vision.fit == "crop" else pixels_HWC
    read = run.config.model.vision
    want_HWC = (seen_HWC / 255 - np.array(read.mean)) / np.array(read.std)
    got_HWC = inputs["pixel_values"].numpy().reshape(3, 16, 16).transpose(1, 2, 0)
    np.testing.assert_allclose(got_HWC, want_HWC, atol=1e-5)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        found = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    ours = gptjax.generate(
        run, "hello world", images=[tmp_path / "picture.png"], temperature=0.0, max_new_tokens=8, top_k=0
    )
    assert ours == tokenizer.decode(found.tolist())


def test_a_run_of_ours_generates_in_transformers_without_a_token_of_images(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    flat = {f"model.vision.{f.name}": getattr(SEEING, f.name) for f in dataclasses.fields(SEEING)}
    run = make_run(tmp_path / "run", "quickstart", flat)
    export(load(run.folder), tmp_path / "out")
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[5, 7, 8, 400, 400, 400, 400, 9, 6]])
    values = torch.tensor(np.random.default_rng(0).normal(size=(1, 1, 3, 16, 16)).astype(np.float32))
    with torch.no_grad():
        found = model.generate(input_ids=ids, pixel_values=values, max_new_tokens=20, do_sample=True, temperature=9.0)
    assert 400 not in found[0, ids.shape[1] :].tolist()
