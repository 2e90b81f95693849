"""Laws of the look inside: its numbers are those of the model, of every family, and the page holds all of them."""

import base64
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import refused, said
from PIL import Image
from stage_runs import make_run

from gptjax.config import DataConfig, ModelConfig, TokenizerConfig, TrainConfig, VisionConfig
from gptjax.config.section import InputError, leaves
from gptjax.data.images import Picture, image_patches, patches_of
from gptjax.generation.image_places import image_places
from gptjax.model.decoder import init_params, make_decoder
from gptjax.model.vision import Images
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.load import load_model
from gptjax.runs.run import Run
from gptjax.serve.inspection import (
    LENS,
    inspect,
    inspection_json,
    inspection_page,
    inspection_prompt,
    inspection_table,
    longest,
)
from gptjax.tokenizer import BytesTokenizer

pytestmark = pytest.mark.usefixtures("compile_cache")
MODELS = {
    "gpt2": {"positions": "learned", "norm": "layernorm", "activation": "gelu", "biases": True},
    "grouped": {
        "queries_per_kv": 2,
        "qk_norm": True,
        "window": 3,
        "global_every": 2,
        "attention_softcap": 5.0,
        "logit_softcap": 9.0,
    },
    "parallel": {"parallel": True, "tied": False, "embedding": "scaled"},
}
TEXT = "To be, or"


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory, compile_cache):
    folder = tmp_path_factory.mktemp("inspect") / request.param
    shape = ModelConfig(num_layers=2, width=16, num_heads=4, dtype="float32", **MODELS[request.param])
    tokenizer = TokenizerConfig(kind="bytes", vocab_size=258)
    config = TrainConfig(run_dir=str(folder), model=shape, tokenizer=tokenizer, data=DataConfig(length=32))
    run = Run.open(folder, config)
    BytesTokenizer().save(run.tokenizer)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint)
    params = jax.tree.map(lambda x: 5 * x, jax.jit(init_params(make_decoder(config)))(jax.random.key(0)))
    checkpoints.save(0, {"params": params}, {"rows": 0}, dict(leaves(config)))
    checkpoints.wait()
    run.close()
    return load_model(folder, None)


def test_loss_rank_and_next_tokens_are_those_of_the_decoder(model, highest_precision):
    found = inspect(model, TEXT)
    ids_BL = jnp.array([found.ids])
    place_BL = jnp.arange(len(found.ids))[None]
    with jax.set_mesh(model.mesh):
        x_BLD, _ = model.decoder.apply({"params": model.params}, ids_BL, place_BL, jnp.ones_like(ids_BL))
        logits_BLV = model.decoder.apply({"params": model.params}, x_BLD, method="logits")
    log_p_LV = np.asarray(jax.nn.log_softmax(logits_BLV))[0, :, :258]
    own_L = log_p_LV[np.arange(len(found.ids) - 1), found.ids[1:]]
    assert found.loss[0] is None and found.rank[0] is None
    np.testing.assert_allclose(found.loss[1:], -own_L, atol=2e-5)
    assert found.rank[1:] == [(log_p > own).sum() for log_p, own in zip(log_p_LV, own_L)]
    np.testing.assert_allclose(found.next_log_p, -np.sort(-log_p_LV, axis=-1)[:, :50], atol=2e-5)
    last = [[found.next_ids[i][k] for k in range(LENS)] for i in range(len(found.ids))]
    assert [[i for i, _ in row] for row in found.lens[-1]] == last, (
        "the lens behind the last layer is the model's guess"
    )
    assert len(found.lens) == len(found.rms) == 3 and "".join(found.tokens) == TEXT


def test_attention_is_shares_of_places_that_a_head_may_see(model):
    weights = inspect(model, TEXT).weights
    assert weights.shape == (2, 4, 10, 10)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    seen = np.tril(np.ones((10, 10), bool))
    assert not weights[:, :, ~seen].any() and np.ptp(weights[0, :, -1]) > 0.01
    if model.config.model.window:
        assert not weights[0, :, np.tril(seen, -3)].any(), "the first layer sees three places"
        assert weights[1, :, 9, 0].all()


def test_a_page_holds_every_number_and_loads_nothing(model):
    found = inspect(model, TEXT + " </script>é")
    html = inspection_page(found)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])
    assert data["loss"] == found.loss and data["ids"] == found.ids and data["model"]["layers"] == 2
    triangle = np.frombuffer(base64.b64decode(data["weights"]), np.uint8).reshape(2, 4, -1)
    np.testing.assert_allclose(triangle / 255, found.weights[:, :, *np.tril_indices(len(found.ids))], atol=0.5 / 255)
    assert json.loads(json.dumps(inspection_json(found)))["rms"] == found.rms
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|fetch\(", html)
    lines = inspection_table(found)
    assert len(lines) == len(found.ids) + 2 and lines[-1].startswith("next: ")


def test_texts_that_no_page_holds_are_refused(model):
    with pytest.raises(InputError, match="the text is empty; wanted 1 to 32"):
        inspect(model, "")
    with pytest.raises(InputError, match="the text has 33 tokens; wanted 1 to 32, which the page can show of 2 layers"):
        inspect(model, "x" * 32)
    most = longest(ModelConfig(num_layers=30, num_heads=9, width=576), 8192)
    assert most * (most + 1) / 2 * 270 <= 3_000_000 < (most + 1) * (most + 2) / 2 * 270


def test_the_verb_writes_a_table_the_page_and_the_numbers(model, tmp_path, capsys):
    run, out = model.run.folder, tmp_path / "page.html"
    printed = said(capsys, "inspect", run, TEXT, "--out", out, "--json", tmp_path / "numbers.json")
    assert printed.splitlines() == inspection_table(inspect(model, TEXT)) and out.read_text() == inspection_page(
        inspect(model, TEXT)
    )
    assert json.loads((tmp_path / "numbers.json").read_text())["tokens"] == ["", *TEXT]
    assert "TEXT is missing" in refused(capsys, "inspect", run)
    assert "wanted 1 to 32" in refused(capsys, "inspect", run, "x" * 40, "--out", out)
    assert "is a folder" in refused(capsys, "inspect", run, TEXT, "--out", tmp_path)


VISION = VisionConfig(patch=4, side=16, merge=2, layers=1, width=8, num_heads=2, begin=(65,), end=(66, 67))


def picture(colour: str) -> bytes:
    """A WebP of two colours."""
    image, written = Image.new("RGB", (30, 20), colour), io.BytesIO()
    image.paste("white", (0, 0, 9, 9))
    image.save(written, "WEBP", lossless=True)
    return written.getvalue()


@pytest.fixture(scope="module")
def seeing(tmp_path_factory, compile_cache):
    """A model that reads images, of which each is four tokens, in a template."""
    shape = ModelConfig(num_layers=1, width=16, num_heads=2, dtype="float32", init_std=0.3, vision=VISION)
    return load_model(make_run(tmp_path_factory.mktemp("seeing") / "run", model=shape, template="llama2"), None)


def test_images_are_shown_as_the_decoder_has_them(seeing, highest_precision):
    pictures = [Picture.of(picture(colour), colour) for colour in ("red", "blue")]
    prompt = inspection_prompt(seeing, "Which?", pictures, chat=False)
    found = inspect(seeing, prompt)
    image = [65, *[-1] * 4, 66, 67, 65, *[-2] * 4, 66, 67]
    assert found.ids == [256, *image, *b"Which?"] and found.tokens[2:6] == ["image 1"] * 4
    assert [i["start"] for i in found.images] == [2, 9] and found.images[0]["side"] == 2
    for shown, kept in zip(found.images, pictures):
        drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown["picture"].partition(",")[2]))))
        np.testing.assert_array_equal(patches_of(drawn, VISION), image_patches(kept.content, "", VISION))
    L = len(found.ids)
    offset_L, last_L = image_places(prompt.ids, VISION)
    index_L = np.where(offset_L < 0, -1, offset_L + 4 * (np.arange(L) >= 9))
    patches_BIPY = np.stack([image_patches(p.content, "", VISION) for p in pictures])[None]
    ids_BL = jnp.maximum(jnp.array([found.ids]), 0)
    place_BL = jnp.arange(L)[None]
    images = Images(jnp.array(patches_BIPY), jnp.array([index_L]), jnp.array([last_L]))
    with jax.set_mesh(seeing.mesh):
        given = (ids_BL, place_BL, jnp.ones_like(ids_BL))
        x_BLD, _ = seeing.decoder.apply({"params": seeing.params}, *given, images=images)
        logits_BLV = seeing.decoder.apply({"params": seeing.params}, x_BLD, method="logits")
    log_p_LV = np.asarray(jax.nn.log_softmax(logits_BLV))[0, :, :258]
    own = [None, *(-log_p_LV[i, n] if n >= 0 else None for i, n in enumerate(found.ids[1:]))]
    assert [x is None for x in found.loss] == [x is None for x in own] == [x is None for x in found.rank]
    np.testing.assert_allclose([x for x in found.loss if x], [x for x in own if x], atol=2e-5)
    np.testing.assert_allclose(found.next_log_p, -np.sort(-log_p_LV, axis=-1)[:, :50], atol=2e-5)
    seen_LL = np.arange(L) <= last_L[:, None]
    assert (found.weights[:, :, seen_LL] > 0).all() and not found.weights[:, :, ~seen_LL].any()
    assert found.last == last_L.tolist() and seen_LL[2, 5] and not seen_LL[2, 6], "an image sees itself whole"
    packed = np.frombuffer(base64.b64decode(inspection_json(found)["weights"]), np.uint8).reshape(1, 2, -1)
    np.testing.assert_allclose(packed / 255, found.weights[:, :, seen_LL], atol=0.5 / 255)
    lines = inspection_table(found)
    assert lines[3] == "<image 1: 4 tokens>" and len(lines) == L - 2 * 3 + 2
    assert set(found.neighbours) == {i for i in found.ids if i >= 0}


def test_the_verb_takes_images_and_says_what_it_can_not_read(seeing, tmp_path, capsys):
    (tmp_path / "red.webp").write_bytes(picture("red"))
    run, image = seeing.run.folder, ["--image", tmp_path / "red.webp"]
    out = ["--out", "", "--json", tmp_path / "n.json"]
    said(capsys, "inspect", run, "Which?", *image, "--chat", *out)
    text = "".join(json.loads((tmp_path / "n.json").read_text())["tokens"])
    assert text == "[INST] A" + "image 1" * 4 + "BCWhich? [/INST]"
    (tmp_path / "no.png").write_text("no")
    assert "no.png: " in refused(capsys, "inspect", run, "x", "--image", tmp_path / "no.png", *out)
    assert "can't be read" in refused(capsys, "inspect", run, "x", "--image", tmp_path / "none.png", *out)
    assert "4 of them an image's" in refused(capsys, "inspect", run, "x" * 99, *image, *out)
