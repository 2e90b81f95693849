"""Counts agree with published models and with their own formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import ModelConfig, VisionConfig
from gptjax.model.counts import flops_per_token, image_flops, padded_vocab, parameters
from gptjax.model.decoder import Decoder, init_params
from gptjax.model.vision import encode_images

GPT2 = ModelConfig(num_layers=12, width=768, num_heads=12)
LLAMA = ModelConfig(queries_per_kv=4, positions="rope", norm="rmsnorm", activation="swiglu", biases=False)


@pytest.mark.parametrize("cfg", [GPT2, LLAMA, ModelConfig(tied=False, biases=True, activation="swiglu")])
def test_the_parts_add_up(cfg):
    count = parameters(cfg, 1000, 128)
    parts = ("embed", "positions", "attention", "mlp", "norms", "head", "vision", "image_projector")
    assert sum(count[p] for p in parts) == count["total"] == count["embedding"] + count["non_embedding"]


def test_an_untied_head_costs_one_vocabulary_of_rows():
    tied, untied = ModelConfig(tied=True), ModelConfig(tied=False)
    a, b = parameters(tied, 1000, 128), parameters(untied, 1000, 128)
    assert b["total"] - a["total"] == 1000 * 768
    assert a["matrices"] == b["matrices"]
    assert (padded_vocab(1000), padded_vocab(1024), padded_vocab(1025)) == (1024, 1024, 1088)


def test_mfu_of_a_known_run_comes_out_as_published():
    """llm.c on one H100: 468k tokens/s of GPT-2 124M at length 1024; 35.3 % by 6N, 38.0 % causal, 40.7 % PaLM."""
    flops = flops_per_token(GPT2, 50_304, 1024)
    mfu = {name: 100 * value * 468e3 / 989e12 for name, value in flops.items()}
    # They count the position table as a matrix; we do not.
    assert mfu["6n"] == pytest.approx(35.3, abs=0.3)
    assert mfu["causal"] == pytest.approx(38.0, abs=0.3)
    assert mfu["palm"] == pytest.approx(40.7, abs=0.3)


VISION = VisionConfig(patch=8, side=64, merge=2, layers=3, width=96, num_heads=4, mlp_ratio=3.0)
PLAIN = {"biases": False, "positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "tied": False}
SEEING = [
    VISION,
    dataclasses.replace(VISION, projector="mlp"),
    dataclasses.replace(VISION, class_token=True, final_norm=False, activation="quick_gelu"),
    dataclasses.replace(VISION, layers=0),
    dataclasses.replace(VISION, layers=0, projector="mlp", merge=1),
    VisionConfig(),
]


def shapes_of(cfg: ModelConfig) -> dict:
    return jax.eval_shape(init_params(Decoder(cfg, vocab_size=64, context=24)), jax.random.key(0))


@pytest.mark.parametrize("vision", SEEING)
@pytest.mark.parametrize("options", [{}, PLAIN, {"norm_weights": "none", "activation": "relu2"}])
def test_what_is_counted_of_images_are_the_parameters_of_the_model(vision, options):
    cfg = ModelConfig(num_layers=2, width=32, num_heads=2, vision=vision, **options)
    shapes, count = shapes_of(cfg), parameters(cfg, 64, 24)

    def size(tree) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))

    assert size(shapes) == count["total"]
    assert size(shapes.get("vision", {})) == count["vision"]
    assert size({n: x for n, x in shapes.items() if n.startswith("image_")}) == count["image_projector"]
    assert (count["image_projector"] > 0) == (vision.patch > 0)


@pytest.mark.parametrize("vision", SEEING[:5])
def test_flops_of_an_image_are_those_of_the_compiled_encoder(vision):
    """Which also has its norms, softmaxes and sums; its layers are unrolled, for of a loop XLA counts one turn."""
    cfg = ModelConfig(num_layers=1, width=128, num_heads=2, dtype="float32", unroll=0, vision=vision)
    patches_IPY = jax.ShapeDtypeStruct((2, vision.num_patches, vision.patch_size), jnp.uint8)
    encode = jax.jit(lambda params, patches_IPY: encode_images(cfg, params, patches_IPY))
    costs = encode.lower(shapes_of(cfg), patches_IPY).compile().cost_analysis()
    assert 0 < 2 * image_flops(cfg) < costs["flops"] < 1.13 * 2 * image_flops(cfg)


def test_the_tokens_of_a_row_share_the_flops_of_its_images():
    """By hand: 64 patches of 192 numbers, an encoder of width 96, 16 tokens of 384 numbers to width 128."""
    cfg = ModelConfig(num_layers=1, width=128, num_heads=2, vision=VISION)
    matrices = 64 * (192 * 96 + 3 * (4 * 96 * 96 + 2 * 96 * 288)) + 16 * 384 * 128
    attention = 3 * 2 * 64 * 64 * 96
    text, seeing = flops_per_token(cfg, 64, 256), flops_per_token(cfg, 64, 256, images=2.5)
    more = {name: (seeing[name] - text[name]) * 256 / 2.5 for name in text}
    assert more["6n"] == pytest.approx(6 * matrices) and more["forward"] == pytest.approx(2 * (matrices + attention))
    assert more["causal"] == pytest.approx(more["palm"]) == pytest.approx(3 * more["forward"])
    blind = dataclasses.replace(cfg, vision=VisionConfig())
    assert flops_per_token(blind, 64, 256, images=2) == flops_per_token(blind, 64, 256) == text
