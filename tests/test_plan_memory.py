"""The memory that is counted before any compile: what of a layer, of the head and of the weights is there at once."""

import dataclasses
import functools
import json
import shlex
from pathlib import Path

import jax
import pytest
from shipped import recipe

from gptjax.config import DataConfig, MeshConfig, ModelConfig, TokenizerConfig, TrainConfig, VisionConfig
from gptjax.data.packing import example_batch
from gptjax.diagnostics.plan.search import Planner
from gptjax.ops.device import Device
from gptjax.parallel.sharding import AXES, abstract, make_mesh
from gptjax.runtime.hardware import topology
from gptjax.training.build import build_components
from gptjax.training.memory import BY_CHIP, Memory, Temporaries, state_bytes, step_memory
from gptjax.training.step import compile_step

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
TPU = Device("tpu")
SAME = "--model.remat full --model.attention splash --optim.accumulate 1 --data.length 2048".split()


@functools.cache
def shapes(words: str):
    return jax.eval_shape(build_components(recipe(words)).init, 0)


def counted(words: str, flags: str, chip: str = "", **mesh: int) -> tuple[Memory, TrainConfig]:
    """The memory on a TPU; the state is that of the recipe's parameters, whatever the flags, which win over SAME."""
    config = recipe(words, *SAME, *shlex.split(flags))
    sizes = dict.fromkeys(AXES, 1) | mesh
    state = state_bytes(config, shapes(words), sizes, tiles=True)
    return step_memory(config, state, sizes, device=TPU, kept=BY_CHIP.get(chip, Temporaries())), config


def test_a_product_in_pieces_fuses_with_nothing_and_so_keeps_more_of_the_mlp():
    """Eight rows a device; where the data axis cuts the batch too, whole weights are gathered and multiplied."""
    pieces, config = counted("gpt3 --size 760m", "--data.batch-size 128", fsdp=16)
    whole, _ = counted("gpt3 --size 760m", "--data.batch-size 256", data=2, fsdp=16)
    hidden = 2 * 8 * 2048 * config.model.mlp_width
    assert pieces.activations - whole.activations >= hidden


def test_what_attention_reads_is_there_during_the_gradient_of_the_mlp():
    few, config = counted("llama_1b", "--data.batch-size 64 --model.queries-per-kv 4", data=8)
    many, _ = counted("llama_1b", "--data.batch-size 64 --model.queries-per-kv 2", data=8)
    # Keys and values, each filled up to rows of 128.
    assert many.activations - few.activations == 2 * 2 * 8 * 2048 * config.model.num_kv_heads * 128


def test_blockwise_attention_holds_a_block_of_scores_for_each_row_and_head():
    def activations(attention: str, rows: int) -> int:
        flags = f"--model.attention {attention} --data.batch-size {8 * rows} --data.length {8192 // rows}"
        return counted("gpt3 --size 760m", flags, data=8)[0].activations

    assert activations("blockwise", 8) > activations("blockwise", 1)
    assert activations("splash", 8) == activations("splash", 1)


def test_plain_attention_of_one_row_makes_no_float32_scores():
    one, config = counted("gpt3 --size 760m", "--model.attention plain --data.batch-size 8", data=8)
    two, _ = counted("gpt3 --size 760m", "--model.attention plain --data.batch-size 16", data=8)
    scores = config.model.num_heads * 2048 * 2048
    assert two.activations - 2 * one.activations > 4 * scores


@pytest.mark.parametrize(("dtype", "copies"), [("bfloat16", 2), ("float32", 1)])
def test_micro_batches_share_copies_of_the_head_and_of_the_table(dtype, copies):
    """In float32 the table is looked up as it is."""
    typed = f"--model.dtype {dtype}"
    one, config = counted("gpt3 --size 760m", f"--data.batch-size 64 {typed}", data=4, fsdp=2)
    two, _ = counted("gpt3 --size 760m", f"--data.batch-size 128 --optim.accumulate 2 {typed}", data=4, fsdp=2)
    assert two.weights - one.weights == copies * 2 * 50304 * config.model.width // 2


def test_a_scan_without_remat_keeps_the_weight_copies_twice():
    def weights(remat: str) -> int:
        flags = f"--data.batch-size 128 --optim.accumulate 2 --model.remat {remat}"
        return counted("gpt3 --size 760m", flags, data=4, fsdp=2)[0].weights

    layers = sum(x.size for x in jax.tree.leaves(shapes("gpt3 --size 760m").params["layers"]))
    assert weights("none") - weights("full") == pytest.approx(2 * layers / 2, rel=0.01)


def test_a_head_that_is_multiplied_in_pieces_is_never_whole_and_one_of_float32_is_never_in_pieces():
    def weights(dtype: str = "bfloat16", rows: int = 32, **mesh: int) -> int:
        flags = f"--data.length 1024 --data.batch-size {rows} --model.dtype {dtype}"
        return counted("llama_1b", flags, **mesh)[0].weights

    whole = 2 * 128256 * 2048  # of bfloat16
    never = weights("float32", fsdp=32), weights(rows=512, fsdp=64), weights(data=2, fsdp=16)
    assert weights(fsdp=32) < whole < min(never)


def test_outputs_of_plain_attention_that_are_kept_are_bfloat16_also_in_float32():
    def activations(attention: str) -> int:
        flags = f"--data.length 256 --data.batch-size 8 --model.attention {attention}"
        return counted("gpt3 --size 760m", f"{flags} --model.remat names --model.dtype float32", data=8)[0].activations

    # One row of scores and a block of them weigh the same; what is kept of 24 layers does not.
    kept = 24 * 256 * recipe("gpt3 --size 760m").model.width
    assert 1.5 * kept < activations("blockwise") - activations("plain") < 2.5 * kept


def test_a_v4_holds_one_whole_head_where_others_have_the_next_on_its_way():
    """Where the loss has several chunks: one is no loop, in which the next could be on its way."""

    def weights(chip: str) -> int:
        return counted("llama_1b", "--data.length 1024 --data.batch-size 32", chip, data=2, fsdp=8)[0].weights

    assert weights("v5p") - weights("v4") == 2 * 128256 * 2048


def test_the_count_is_within_a_tenth_of_the_compiler_on_held_out_settings():
    """Those that benchmarks/plan.py compiled; every third."""
    report = json.loads(max(RESULTS.glob("*_plan.json")).read_text())
    rows = [r for r in report["held_out"] if "compiled" in r]
    assert len(rows) >= 10
    for row in rows[::3]:
        config = recipe(row["recipe"], *shlex.split(row["flags"]))
        total = Planner(config, topology(row["for"])).as_written().memory.total
        assert total == pytest.approx(row["compiled"], rel=0.1), row


VISION = VisionConfig(patch=8, side=64, layers=3, width=128, num_heads=4)


@functools.cache
def counted_and_compiled(images: int, remat: str, vision: VisionConfig) -> tuple[Memory, int, int]:
    """The count on a CPU, and the bytes of arguments and of all that the compiled step needs."""
    rows, length, sizes = 8, 256, dict.fromkeys(AXES, 1)
    cfg = ModelConfig(num_layers=3, width=128, num_heads=4, attention="plain", dtype="float32", remat=remat,
                      vision=vision)  # fmt: skip
    config = TrainConfig(model=cfg, tokenizer=TokenizerConfig(kind="bytes", vocab_size=258),
                         data=DataConfig(batch_size=rows, length=length))  # fmt: skip
    parts, mesh = build_components(config), make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        state = abstract(jax.eval_shape(parts.init, 0), mesh)
        batch = abstract(example_batch(rows, length, vision, images), mesh)
        stats = compile_step(parts.step, mesh, state, {}, batch).lower(state, {}, batch).compile().memory_analysis()
    held = state_bytes(config, state, sizes, tiles=False)
    counted = step_memory(config, held, sizes, device=Device("cpu"), images=images)
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return counted, stats.argument_size_in_bytes, stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "vision"),
    [
        ("full", VISION),
        ("full", dataclasses.replace(VISION, layers=0)),
        ("none", dataclasses.replace(VISION, projector="mlp", merge=2)),
    ],
)
def test_the_count_with_images_is_as_near_to_the_compiler_as_that_of_text(remat, vision):
    """On a CPU, whose compiler keeps more than the TPU's that is counted: so both are compared with it."""
    text, _, text_compiled = counted_and_compiled(0, remat, VisionConfig())
    seeing, arguments, compiled = counted_and_compiled(3, remat, vision)
    assert arguments == pytest.approx(seeing.parameters + seeing.optimizer + seeing.batch, rel=1e-3)
    assert seeing.total / compiled == pytest.approx(text.total / text_compiled, rel=0.1)
    assert seeing.total > text.total


def test_what_images_add_is_counted_for_a_tpu():
    """State of the encoder, patches as bytes, and what its layers save."""
    words = "--model.vision.patch 16 --model.vision.layers 4 --data.batch-size 8"
    config = recipe("gpt2 --size 124m", *SAME, *words.split(), "--model.attention", "plain")
    state = state_bytes(config, jax.eval_shape(build_components(config).init, 0), dict.fromkeys(AXES, 1), tiles=True)
    none, two, four = (
        step_memory(config, state, dict.fromkeys(AXES, 1), device=TPU, images=images) for images in (0, 2, 4)
    )
    assert four.batch - two.batch == two.batch - none.batch - 3 * 8 * 2048 * 4 == 8 * 2 * 196 * 768
    assert two.activations < four.activations and state.vision > 4 * 4 * 12 * 768 * 768
    assert two.parameters == none.parameters > state.vision
