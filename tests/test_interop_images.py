"""Laws of models that read images, from elsewhere and back: logits, tensors and pixels are the original's."""

import dataclasses
import json
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_export import assert_same_weights, make_run
from test_families import save
from test_interop import FIXTURES
from test_model_options import random_params

from gptjax.api import export, load
from gptjax.cli import main
from gptjax.config import ModelConfig, VisionConfig
from gptjax.config.section import InputError
from gptjax.data.images import patches_of
from gptjax.interop.families import IMAGE_FAMILIES, family_of
from gptjax.interop.huggingface import import_huggingface
from gptjax.interop.image_processor import with_marks
from gptjax.model.cache import empty_cache
from gptjax.model.decoder import Decoder, extend, unstacked
from gptjax.model.vision import Images, image_tokens
from gptjax.tokenizer import BytesTokenizer

KINDS = ("smolvlm", "llava", "llava_clip")
IMAGE = 60  # the id that stands for a place of an image in the fixtures


def folder_of(kind: str) -> Path:
    return FIXTURES / f"tiny_random_{kind}"


def rows_of(vision: VisionConfig, ids_BL: np.ndarray, pixels_BIHWC, number: int = IMAGE) -> tuple[np.ndarray, Images]:
    """Rows in which every place with this id is the next token of the row's images, each of them causal."""
    here_BL = ids_BL == number
    index_BL = np.where(here_BL, here_BL.cumsum(1) - 1, -1)
    assert here_BL.sum(1).tolist() == [len(images) * vision.num_tokens for images in pixels_BIHWC]
    patches_BIPY = np.stack([[patches_of(image, vision) for image in images] for images in pixels_BIHWC])
    place_BL = np.broadcast_to(np.arange(ids_BL.shape[1]), ids_BL.shape)
    return np.where(here_BL, -1, ids_BL), Images(*map(jnp.asarray, (patches_BIPY, index_BL, place_BL)))


def logits(imported, ids_BL: np.ndarray, pixels_BIHWC, number: int) -> np.ndarray:
    """logits_BLV of rows with images."""
    cfg, vocab_size, context, params = imported
    decoder, (ids_BL, images) = Decoder(cfg, vocab_size, context), rows_of(cfg.vision, ids_BL, pixels_BIHWC, number)

    @jax.jit
    def forward(params, ids_BL, images):
        rows = ids_BL, images.last_BL, jnp.ones_like(ids_BL)
        x_BLD, _ = decoder.apply({"params": params}, *rows, images=images)
        return decoder.apply({"params": params}, x_BLD, method="logits")

    return np.asarray(forward(params, ids_BL, images))[..., :vocab_size]


def decoded(imported, ids_BL: np.ndarray, pixels_BIHWC, count: int) -> tuple[np.ndarray, list[list[int]]]:
    """logits_BLV of rows with images, and the `count` likeliest ids behind them, one after the other, by the cache."""
    cfg, vocab_size, context, params = imported
    decoder, (ids_BL, images) = Decoder(cfg, vocab_size, context), rows_of(cfg.vision, ids_BL, pixels_BIHWC)

    @jax.jit
    def step(params, ids_BL, position_BL, cache, images):
        tokens, params = images and image_tokens(cfg, params, images), unstacked(params, cfg.dtype)
        x_BLD, cache = extend(decoder, params, ids_BL, position_BL, cache, tokens)
        logits_BLV = (x_BLD @ params["head_DV"])[..., :vocab_size]
        return logits_BLV, logits_BLV[:, -1].at[:, IMAGE].set(-jnp.inf).argmax(-1)[:, None], cache

    cache, position_BL = empty_cache(cfg, len(ids_BL), context, cfg.dtype), images.last_BL
    logits_BLV, next_BL, cache = step(params, jnp.asarray(ids_BL), position_BL, cache, images)
    found = [np.asarray(next_BL)]
    for _ in range(count - 1):
        position_BL = position_BL[:, -1:] + 1
        _, next_BL, cache = step(params, next_BL, position_BL, cache, None)
        found.append(np.asarray(next_BL))
    return np.asarray(logits_BLV), np.concatenate(found, 1).tolist()


def variant(tmp_path: Path, kind: str, changes: dict[str, object]) -> Path:
    """A copy of a fixture with other settings: "text_config.x" is one of the text, "preprocessor.x" of the images."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    files = {name: json.loads((folder_of(kind) / f"{name}_config.json").read_text()) for name in ("preprocessor",)}
    files["config"] = json.loads((folder_of(kind) / "config.json").read_text())
    for name, value in changes.items():
        *inside, last = name.split(".")
        into = files["preprocessor"] if inside == ["preprocessor"] else files["config"]
        into = into[inside[0]] if inside and inside != ["preprocessor"] else into
        into[last] = value
    (folder / "config.json").write_text(json.dumps(files["config"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(files["preprocessor"]))
    save_file(load_file(folder_of(kind) / "model.safetensors"), folder / "model.safetensors")
    return folder


# What comes out


@pytest.mark.parametrize("kind", KINDS)
def test_two_images_in_a_text_have_the_logits_and_the_greedy_ids_of_transformers(kind, highest_precision):
    imported = cfg, *sizes, _ = import_huggingface(folder_of(kind))
    reference = np.load(folder_of(kind) / "reference.npz")
    pixels_BIHWC = reference["images"][reference["order"]]
    assert cfg.vision.num_tokens == {"smolvlm": 4}.get(kind, 16) and sizes == [320, 64] and cfg.vision.image_id == IMAGE
    got_BLV, ids = decoded(imported, reference["ids"], pixels_BIHWC, 8)
    difference = np.abs(got_BLV[..., :64] - reference["logits"]).max()
    print(f"{kind}: max abs difference {difference:.2e} of logits up to {np.abs(reference['logits']).max():.2f}")
    assert difference <= 1e-4
    assert np.abs(reference["logits"][0] - reference["logits"][1])[-4:].max() > 1  # and the images are seen
    assert ids == reference["greedy"].tolist()


def kept(kind: str) -> dict[str, np.ndarray]:
    """The tensors of a fixture that change a logit, under the names that an export gives them."""
    family = IMAGE_FAMILIES[kind.removesuffix("_clip"), "llama"]
    cfg = import_huggingface(folder_of(kind))[0]
    named = {family.name(name): x for name, x in load_file(folder_of(kind) / "model.safetensors").items()}
    return {name: x for name, x in named.items() if not family.is_idle(name, cfg)}


@pytest.mark.parametrize("kind", ["smolvlm", "llava_clip", pytest.param("llava", marks=pytest.mark.slow)])
def test_an_import_that_is_exported_has_its_tensors_and_pixels_and_is_imported_again(tmp_path, kind):
    for source, number in ((folder_of(kind), 1), (tmp_path / "out1", 2)):
        assert main(["import", str(source), str(tmp_path / f"run{number}")]) == 0
        assert main(["export", str(tmp_path / f"run{number}"), str(tmp_path / f"out{number}")]) == 0
    one, two = (load_file(tmp_path / f"out{n}" / "model.safetensors") for n in (1, 2))
    want = kept(kind)
    for name, x in want.items():
        np.testing.assert_array_equal(one[name], x, err_msg=name)
    more = sorted(one.keys() - want.keys())
    assert [name.rpartition("vision_model.")[2] for name in more] == (
        [] if kind == "smolvlm" else ["post_layernorm.bias", "post_layernorm.weight"]
    )
    assert one.keys() == two.keys() and all(one[name].tobytes() == two[name].tobytes() for name in one)
    first, *others = (load(tmp_path / f"run{n}").config.model for n in (1, 2))
    assert others == [first] and first == import_huggingface(folder_of(kind))[0]
    for name in ("config.json", "preprocessor_config.json"):
        assert (tmp_path / "out1" / name).read_text() == (tmp_path / "out2" / name).read_text()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_names_of_newer_and_older_files_are_read_alike(tmp_path, kind):
    newer = {r"^language_model\.model\.": "model.language_model.", r"^language_model\.lm_head": "lm_head",
             r"^(?=vision_tower|multi_modal_projector)": "model."}  # fmt: skip
    older = {r"^vision_tower\.": "vision_tower.vision_model."}
    want = import_huggingface(folder_of(kind))
    for names in (newer, older):
        folder = variant(tmp_path, kind, {})
        tensors = load_file(folder / "model.safetensors")
        for pattern, to in names.items():
            tensors = {re.sub(pattern, to, name): x for name, x in tensors.items()}
        save_file(tensors, folder / "model.safetensors")
        got = import_huggingface(folder)
        assert got[:3] == want[:3]
        jax.tree.map(np.testing.assert_array_equal, got[3], want[3])


def test_values_that_a_config_leaves_out_are_those_of_its_class(tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "model_type": "clip_vision_model", "image_size": 336,
              "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096, "rms_norm_eps": 1e-05}
    values = {"model_type": "llava", "image_token_index": 32000, "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="holds no model.safetensors"):  # all else of it is taken
        import_huggingface(folder)
    half = variant(
        tmp_path, "smolvlm", {"vision_config.image_size": 19, "preprocessor.max_image_size": {"longest_edge": 19}}
    )
    vision = import_huggingface(half)[0].vision
    assert (vision.side, vision.margin, vision.num_patches) == (16, 3, 16)
    # The pixels of the margin are never seen.
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (19, 19, 3), np.uint8)
    plain = dataclasses.replace(vision, margin=0)
    np.testing.assert_array_equal(patches_of(pixels_HWC, vision), patches_of(pixels_HWC[:16, :16], plain))


def test_an_image_that_is_cropped_is_its_middle():
    vision = VisionConfig(patch=4, side=8, fit="crop")
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (8, 14, 3), np.uint8)
    np.testing.assert_array_equal(patches_of(pixels_HWC, vision), patches_of(pixels_HWC[:, 3:11], vision))


# Models of our own

TEXT = ModelConfig(num_layers=2, width=32, num_heads=2, dtype="float32", positions="rope", norm="rmsnorm",
                   activation="swiglu", biases=False, init_std=0.3)  # fmt: skip
SEEING = VisionConfig(
    patch=4, side=16, merge=2, layers=2, width=24, num_heads=2, sees_all=False, begin=(7, 8), end=(9,)
)
OURS = {
    "idefics3": (TEXT, SEEING, "Idefics3ForConditionalGeneration"),
    "tied, normalised queries": (
        dataclasses.replace(TEXT, qk_norm=True, queries_per_kv=2), SEEING, "Idefics3ForConditionalGeneration",
    ),
    "llava": (
        dataclasses.replace(TEXT, tied=False, window=5),
        dataclasses.replace(SEEING, merge=1, projector="mlp", final_norm=False, fit="stretch"),
        "LlavaForConditionalGeneration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["llava", *(pytest.param(name, marks=pytest.mark.slow) for name in [*OURS][:2])])
def test_an_exported_model_has_the_logits_of_the_decoder(tmp_path, name, highest_precision):
    text, vision, architecture = OURS[name]
    cfg, vocab_size = dataclasses.replace(text, vision=vision), 50
    ours = cfg, vocab_size, 64, random_params(cfg, vocab_size, 64)
    family = family_of(*ours[:3])
    assert family.architecture == architecture
    theirs = import_huggingface(save(tmp_path / "out", ours, family))
    # An id more stands for images, whose row is zeros; all else comes back.
    assert theirs[1] == vocab_size + 1 and theirs[0].vision == dataclasses.replace(vision, image_id=vocab_size)
    assert not theirs[3]["embed_VD"][vocab_size:].any()
    rng = np.random.default_rng(0)
    ids_BL = rng.integers(0, 50, (2, 40))
    ids_BL[:, 3 : 3 + vision.num_tokens] = ids_BL[:, 24 : 24 + vision.num_tokens] = vocab_size
    pixels_BIHWC = rng.integers(0, 256, (2, 2, 16, 16, 3), np.uint8)
    want, got = (logits(model, ids_BL, pixels_BIHWC, vocab_size)[..., :vocab_size] for model in (ours, theirs))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_a_run_with_images_is_exported_with_a_token_for_them_that_is_never_drawn(tmp_path):
    flat = {f"model.vision.{f.name}": getattr(SEEING, f.name) for f in dataclasses.fields(SEEING)}
    settings = flat | {"tokenizer.kind": "bytes", "tokenizer.vocab_size": 258}
    run = make_run(tmp_path / "run", "quickstart", settings, tokenizer=BytesTokenizer())
    said = export(model := load(run.folder), tmp_path / "out")
    assert "its processor stretches, so fill images up to squares with white first; no processor of" in said
    assert "4 of <image>, between [7, 8] and [9]" in said
    tokenizer, generation = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("tokenizer.json", "generation_config.json")
    )
    assert {"id": 258, "content": "<image>"}.items() <= tokenizer["added_tokens"][-1].items()
    assert generation["suppress_tokens"] == [258]
    again = import_huggingface(tmp_path / "out")
    assert again[0].vision == dataclasses.replace(SEEING, image_id=258)
    assert_same_weights(again[3], model.params, 258)


def test_the_ids_around_an_image_are_those_that_idefics3_has():
    class Marked(BytesTokenizer):
        specials = {"<s>": 256, "<fake_token_around_image>": 261, "<global-img>": 262}

    cfg = dataclasses.replace(TEXT, vision=SEEING)
    vision = with_marks(cfg, Marked()).vision
    assert (vision.begin, vision.end) == ((261, 262), (261,))
    assert with_marks(cfg, BytesTokenizer()) == cfg and with_marks(TEXT, Marked()) == TEXT


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (0, {"sees_all": True}, "Idefics3ForConditionalGeneration without model.vision.sees_all=True; Llava"),
        (0, {"layers": 0}, "without model.vision.layers=0"),
        (0, {"projector": "mlp"}, "LlavaForConditionalGeneration without model.vision.merge=2 and .*final_norm=True"),
        (0, {"class_token": True}, "Idefics3ForConditionalGeneration without model.vision.class_token=True"),
        (0, {"side": 38, "patch": 2, "merge": 1}, "image_size=38 is not supported; wanted a number of patches"),
        (2, {"projector": "linear"}, "without model.vision.projector='linear'"),
    ],
)  # fmt: skip
def test_what_no_architecture_has_is_refused_by_name(kind, change, message):
    text, vision, _ = list(OURS.values())[kind]
    with pytest.raises(InputError, match=message):
        family_of(dataclasses.replace(text, vision=dataclasses.replace(vision, **change)), 50, 64)


def test_texts_that_can_not_stand_behind_images_are_refused_by_name():
    with pytest.raises(InputError, match="without model.norm='layernorm' and model.activation='gelu'"):
        family_of(dataclasses.replace(TEXT, vision=SEEING, activation="gelu", biases=True, norm="layernorm"), 50, 64)


# What is refused of others


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (0, {"model_type": "idefics2"}, "model_type='idefics2' .* or 'idefics3' or 'smolvlm' or 'llava'"),
        (0, {"text_config.model_type": "gemma2"}, "text_config.model_type='gemma2' .* 'llama' or 'mistral' or 'qwen3'"),
        (0, {"text_config": 3}, "text_config=3 is not supported; wanted an object"),
        (0, {"text_config.hidden_act": "gelu"}, "text_config.hidden_act='gelu'"),
        (0, {"vision_config.model_type": "dinov2"}, "vision_config.model_type='dinov2'"),
        (0, {"vision_config.hidden_act": "gelu"}, "vision_config.hidden_act='gelu' .* 'gelu_pytorch_tanh' or 'quick_g"),
        (0, {"vision_config.num_channels": 1}, "vision_config.num_channels=1"),
        (0, {"vision_config.image_size": [16, 32]}, r"vision_config.image_size=\[16, 32\]"),
        (0, {"vision_config.image_size": 76}, "vision_config.image_size=76 .* each its own position"),
        (0, {"vision_config.patch_size": 32}, "vision_config.image_size=16 .* each its own position"),
        (0, {"scale_factor": 3}, "model.vision.side=16: wanted a multiple of patch x merge = 12"),
        (0, {"vision_config.num_hidden_layers": 3}, "encoder.layers.2.self_attn.q_proj.weight is missing"),
        (0, {"vision_config.num_hidden_layers": 1}, "no place for tensor model.vision_model.encoder.layers.1"),
        (0, {"vision_config.num_attention_heads": 5}, "model.vision.width=16: wanted a multiple of num_heads=5"),
        (0, {"image_token_id": 320}, "image_token_id=320 .* an id below text_config.vocab_size=320"),
        (0, {"quantization_config": {"bits": 4}}, "quantization_config="),
        (0, {"gptjax_images": {"fit": "tile"}}, "gptjax_images.fit='tile'"),
        (0, {"gptjax_images": {"begin": ["a"]}}, r"gptjax_images.begin=\['a'\] .* a list of ids"),
        (0, {"preprocessor.max_image_size": {"longest_edge": 24}}, "max_image_size=24 .* image_size=16"),
        (0, {"preprocessor.do_normalize": False}, "preprocessor_config.json: do_normalize=False"),
        (0, {"preprocessor.rescale_factor": 1.0}, "rescale_factor=1.0 is not supported; wanted 1/255"),
        (0, {"preprocessor.image_mean": [0.5]}, r"image_mean=\[0.5\] .* three numbers"),
        (0, {"preprocessor.image_std": 0}, "model.vision.std=.*numbers above 0"),
        (0, {"preprocessor.image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type='LlavaNextImageP"),
        (1, {"vision_feature_select_strategy": "default"}, "vision_feature_select_strategy='default' .* 'full'"),
        (1, {"vision_feature_layer": -4}, "vision_feature_layer=-4 .* one layer of 2, from 1 or from -1 on"),
        (1, {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer=\[-1, -2\]"),
        (1, {"projector_hidden_act": "relu"}, "projector_hidden_act='relu'"),
        (1, {"multimodal_projector_bias": False}, "multimodal_projector_bias=False"),
        (1, {"vision_config.model_type": "pixtral"}, "model_type='pixtral' .* 'clip_vision_model' or 'siglip_vision_m"),
        (1, {"preprocessor.size": {"height": 16, "width": 24}}, "size={.* a height and a width of 16"),
        (2, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy='full' .* 'default'"),
        (2, {"vision_config.model_type": "siglip_vision_model"}, "vision_feature_select_strategy='default'"),
        (2, {"preprocessor.size": {"shortest_edge": 20}}, "size={'shortest_edge': 20} .* shortest_edge=16"),
        (2, {"preprocessor.do_pad": True}, "do_pad=True"),
    ],
)
def test_what_can_not_be_expressed_is_refused_by_name(tmp_path, kind, changes, message):
    with pytest.raises(InputError, match=message) as refused:
        import_huggingface(variant(tmp_path, KINDS[kind], changes))
    assert str(refused.value).startswith(str(tmp_path)) and "\n" not in str(refused.value)
