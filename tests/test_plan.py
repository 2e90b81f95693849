"""The plan: topologies by name, memory that is counted, the fastest settings that fit, and what is said of them."""

import dataclasses
import json
import math
import re

import jax
import pytest
from commands import refused
from shipped import recipe

from gptjax.cli import main
from gptjax.config import MeshConfig
from gptjax.config.command_line import load_recipe
from gptjax.config.section import InputError
from gptjax.diagnostics.plan import report, search
from gptjax.diagnostics.plan.compiled import Compiled, Target, UnknownTopology, compile_for, has_libtpu, memory_of
from gptjax.diagnostics.plan.search import SAFE, Planner
from gptjax.ops.device import Device
from gptjax.ops.linear import count_chunks
from gptjax.parallel.sharding import AXES
from gptjax.runtime.hardware import CHIPS, NODES, SLICES, chip_of, topology
from gptjax.training.build import build_components
from gptjax.training.memory import padded, state_bytes, step_memory

TPU = Device("tpu", memory=CHIPS["tpu v5 lite"].memory)
needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu compiles for TPUs: pip install 'gptjax[tpu-plan]'")


def test_a_topology_is_a_kind_and_a_size():
    slices = topology("v5p:2x2x4")
    assert (slices.devices, slices.hosts, slices.libtpu, slices.chip) == (16, 4, "v5p:2x2x4", CHIPS["tpu v5"])
    assert (topology("h100:8").devices, topology("h100:8").libtpu, topology("H100:16").hosts) == (8, "", 2)
    assert topology("cpu:8").chip is None
    for kind in (*SLICES, *NODES[:-1]):
        three = kind in ("v4", "v5p", "tpu7x")
        assert topology(f"{kind}:2x2x2" if three else f"{kind}:2x2").chips == (8 if three else 4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5x:4x4", "did you mean v5"),
        ("v5e", "no size"),
        ("v5e:4x4x4", "2 dimensions"),
        ("v5e:3x5", "no slice of v5e has that shape; wanted 1x1, 2x2, 2x4, 4x4, "),
        ("v6e:16x32", "8x16, 16x16"),
        ("v5p:2x2x8", "wanted 2x2x1, 2x2x2, 2x2x4, 2x4x4 or sides that are multiples of 4"),
        ("v4:4x4x6", "multiples of 4"),
        ("h100:0", "no size"),
        ("", "kind"),
    ],
)
def test_an_unknown_topology_is_refused_with_the_known_ones(name, message):
    with pytest.raises(InputError) as caught:
        topology(name)
    text = str(caught.value)
    assert "\n" not in text and "4x4" in text and (message in text or name == "")


def test_every_slice_that_google_lists_is_a_topology():
    for name in "v5e:1x1 v6e:2x4 v5e:8x16 v4:2x2x1 v5p:2x4x4 v5p:4x4x12 v4:12x16x16 v5p:16x16x24".split():
        assert topology(name).devices == math.prod(topology(name).shape) and topology(name).libtpu == name
    assert all(topology(name).devices for name in report.OFFERS)


def test_a_group_within_a_host_is_faster_than_one_across():
    gpus, cube = topology("h100:64"), topology("v5p:4x4x4")
    assert gpus.bandwidth(8) > 5 * gpus.bandwidth(16) and gpus.bandwidth(8, 2) == gpus.bandwidth(64)
    assert cube.bandwidth(4) < cube.bandwidth(16) < cube.bandwidth(64) == cube.bandwidth(64, 1)
    assert chip_of("TPU v5 lite") is CHIPS["tpu v5 lite"] and chip_of("TPU v5") is CHIPS["tpu v5"]


def test_the_state_is_counted_to_the_byte():
    config = recipe("llama_8b")
    shapes = jax.eval_shape(build_components(config).init, 0)
    counted = state_bytes(config, shapes, {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}, tiles=False)
    assert counted.parameters + counted.optimizer == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    shared = state_bytes(config, shapes, {"data": 2, "fsdp": 8, "tensor": 4, "context": 1}, tiles=False)
    assert counted.parameters / 32 <= shared.parameters < 1.01 * counted.parameters / 32
    assert counted.layer * 32 == counted.layers and shared.layer * 4 < 1.01 * counted.layer


def test_a_tpu_fills_arrays_up_to_tiles_in_the_way_that_wastes_least():
    assert padded((8, 128), 4, True) == 8 * 128 * 4 and padded((50304, 96), 4, True) == 50304 * 96 * 4
    assert padded((12, 96, 12, 64), 4, True) == 12 * 12 * 64 * 128 * 4  # 96 to 128, not 64 to 128 and 12 to 16
    assert padded((3, 5), 4, False) == 60


def test_memory_falls_with_remat_micro_batches_and_devices():
    config = recipe("llama_8b", "--mesh.data", "1")
    shapes = jax.eval_shape(build_components(config).init, 0)
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": 32}

    def total(remat="none", accumulate=4, **mesh) -> int:
        new = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat),
                                  optim=dataclasses.replace(config.optim, accumulate=accumulate))  # fmt: skip
        where = sizes | mesh
        return step_memory(new, state_bytes(new, shapes, where, tiles=True), where, device=TPU).total

    by_remat = [total(remat) for remat in ("none", "dots", "names", "full")]
    assert by_remat == sorted(by_remat, reverse=True) and len(set(by_remat)) == 4
    assert total(accumulate=16) < total()
    assert max(total("full", fsdp=64), total("full", tensor=4)) < total("full")


def test_the_logits_of_a_chunk_are_those_that_the_platform_cuts():
    config = recipe("gpt2 --size 124m", "--model.num-layers", "1", "--data.batch-size", "1", "--optim.accumulate", "1")
    sizes = dict.fromkeys(AXES, 1)
    state = state_bytes(config, jax.eval_shape(build_components(config).init, 0), sizes, tiles=False)
    cpu, gpu = (step_memory(config, state, sizes, device=Device(platform)).logits for platform in ("cpu", "gpu"))
    whole = 4 * 50304 * 1024
    chunk = whole // count_chunks(Device("cpu"), 1024, whole / 1024, 4 * 50304 * 768)
    assert (cpu, gpu) == (chunk * 3 // 2, whole * 3 // 2)  # with a gradient of its own, since padding is masked
    assert chunk < whole / 2


ASSIGNMENT = """BufferAssignment:
allocation 0: size 1024, page 0, thread-local:
allocation 1: size 4096, page 0, parameter 0, shape |f32[8,128]| at ShapeIndex {}, maybe-live-out:
allocation 2: size 512, page 0, parameter 1, shape |s32[4]| at ShapeIndex {}:
allocation 3: size 64, page 0, maybe-live-out:
allocation 4: size 9000, page 0, preallocated-temp:
allocation 5: size 700, color 1, page 0, preallocated-temp:
"""


def test_a_buffer_assignment_is_read_as_arguments_results_and_temporaries():
    """What lies in the chip's own fast memory (color 1) is none of the main memory."""
    read = memory_of(ASSIGNMENT)
    assert read == {"arguments": 4608, "outputs": 4160, "aliases": 4096, "temporaries": 9000}
    assert Compiled(fits=True, seconds=0, **read).total == 4608 + 64 + 9000


@pytest.fixture(scope="module")
def planner():
    return Planner(recipe("llama_8b"), topology("v5e:4x8"))


def test_the_search_names_the_fastest_that_fits(planner):
    found, limit = planner.search(None), topology("v5e:4x8").chip.memory
    fitting = [c for c in planner.candidates() if c.memory.total <= SAFE * limit]
    assert 0 < len(fitting) < found.counted
    fastest = max(c.speed.tokens_per_second for c in fitting)
    assert found.best.speed.tokens_per_second == pytest.approx(fastest, rel=1e-3)
    assert found.best.config.data == planner.config.data  # what is learned stays
    assert math.prod(found.best.sizes.values()) == 32


def test_the_search_compiles_six_times_at_most_and_believes_the_compiler(planner):
    asked = []

    def compiler(truth):
        def compile_it(config, seconds):
            asked.append(planner.candidate(config).memory.total)
            total = int(truth * asked[-1])
            fits = total <= limit
            return Compiled(fits=fits, seconds=1, temporaries=total if fits else 0, error="" if fits else "too much")

        return compile_it

    limit = topology("v5e:4x8").chip.memory
    best = planner.search(compiler(1.05)).best
    assert best is not None and best.compiled.total <= limit and len(asked) <= 6
    assert asked == sorted(asked, reverse=True)  # nothing that needs more than what did not fit
    asked.clear()
    assert planner.search(compiler(99)).best is None and 1 < len(asked) <= 6 and asked[-1] <= SAFE * limit
    asked.clear()
    assert planner.search(compiler(1.0), seconds=0).best is None and not asked


def test_the_search_keeps_a_torus_whole_and_other_meshes_are_counted(planner):
    meshes = {tuple(c.sizes.values()) for c in planner.candidates()}
    assert (1, 32, 1, 1) in meshes and (4, 8, 1, 1) in meshes and (2, 16, 1, 1) not in meshes
    cut = Planner(recipe("llama_8b", "--mesh.data", "2", "--mesh.fsdp", "16"), topology("v5e:4x8")).as_written()
    assert cut.memory.total > planner.as_written().memory.total > 0


def test_a_plan_that_can_not_be_written_is_refused_before_the_search(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "file").write_text("")
    for flag, path in (("--json", tmp_path), ("--json", tmp_path / "file" / "p.json"), ("--out", tmp_path)):
        words = ["plan", "gpt2", "--topology", "v5e:2x2", "--compiles", "0", flag, path]
        assert str(path) in refused(capsys, *words)
    earlier = tmp_path / "earlier.json"
    earlier.write_text("{}")
    assert main(["plan", "gpt2", "--topology", "v5e:3x3", "--json", str(earlier)]) == 2
    assert earlier.read_text() == "{}" and len(list(tmp_path.iterdir())) == 2, "neither lost nor left behind"


def test_the_plan_is_one_screen_a_json_file_and_a_recipe_that_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    out, data = tmp_path / "planned.py", tmp_path / "plan.json"
    words = "plan gpt3 --size 1.3b --topology h100:8 --compiles 0 --data.batch-size 64".split()
    assert main([*words, "--json", str(data), "--out", str(out)]) == 0
    screen, errors = capsys.readouterr()
    assert len(screen.splitlines()) <= 24 and "fits" in screen and "List prices" in screen and "not measured" in screen
    assert "ran on" not in screen and f"next: gptjax pretrain {out}" in errors
    found = json.loads(data.read_text())
    assert found["found"]["counted"]["total"] <= SAFE * found["memory_a_device"]
    assert {"parameters", "optimizer", "gradients", "activations", "logits", "batch"} <= set(found["found"]["counted"])
    config = load_recipe(str(out)).config("pretrain")
    assert config.data.batch_size == 64 and vars(config.mesh) == found["found"]["mesh"] | {"slices": 1}
    assert config.optim.accumulate == found["found"]["accumulate"]


def test_a_plan_counts_where_libtpu_is_older_than_the_chip(tmp_path, capsys, monkeypatch):
    def compile_it(config, target, seconds, images):
        raise UnknownTopology(f"libtpu knows no topology {target.tpu}: INVALID_ARGUMENT")

    monkeypatch.setattr(report, "has_libtpu", lambda: True)
    monkeypatch.setattr(report, "compile_for", compile_it)
    (tmp_path / "prices.csv").write_text("tpu7x,12\n")
    words = "plan gpt2 --size 124m --topology tpu7x:2x2x1 --compiles 6".split()
    assert main([*words, "--json", str(tmp_path / "p.json"), "--prices", str(tmp_path / "prices.csv")]) == 0
    out, found = capsys.readouterr().out, json.loads((tmp_path / "p.json").read_text())
    assert "libtpu knows no topology tpu7x:2x2x1" in out and "counted and not compiled" in out and "(counted)" in out
    assert found["devices"] == 8 and found["found"] and found["compiles"] == []
    estimate = found["estimate"]
    assert estimate["dollars"] == pytest.approx(estimate["days"] * 24 * 4 * 12)  # a chip, of 2 devices, has the price
    assert str(tmp_path / "prices.csv") in estimate["price_sources"]


def test_what_can_not_fit_is_said_with_what_is_missing_and_the_next_command_compares_topologies(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "has_libtpu", lambda: False)
    words = "plan gpt3 --size 175b --topology v5e:4x4 --compiles 6 --json".split()
    assert main([*words, str(tmp_path / "plan.json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads((tmp_path / "plan.json").read_text())["found"] is None
    assert "libtpu is not installed" in out and "pip install" in out
    assert re.search("^nothing fits: .* GiB a chip are missing", out, re.MULTILINE)
    assert err.endswith("next: gptjax plan gpt3 --size 175b\n")


SEEING = """
from gptjax.config import DataConfig, ModelConfig, SftConfig, TokenizerConfig, VisionConfig


def sft() -> SftConfig:
    vision = VisionConfig(patch=8, side=64, merge=2, layers=2, width=64, num_heads=2, end=(5,))
    return SftConfig(init="scratch", steps=9, model=ModelConfig(num_layers=2, width=64, num_heads=2, vision=vision),
                     tokenizer=TokenizerConfig(kind="bytes", vocab_size=258), data=DataConfig(source="x", length=256))
"""


def test_a_recipe_of_fine_tuning_from_scratch_is_planned_with_its_images(tmp_path, capsys):
    path = tmp_path / "seeing.py"
    path.write_text(SEEING)

    def planned(*more: str) -> tuple[int, str, str]:
        code = main(["plan", str(path), "--topology", "h100:2", "--compiles", "0", *more])
        return code, *capsys.readouterr()

    code, most, after = planned("--json", str(tmp_path / "most.json"), "--out", str(tmp_path / "planned.py"))
    assert code == 0 and "tokens with 15 images each a step" in most and f"next: gptjax sft {tmp_path}" in after
    assert type(load_recipe(str(tmp_path / "planned.py")).config("sft")).__name__ == "SftConfig"
    assert "with 2 images each" in planned("--images", "2", "--json", str(tmp_path / "two.json"))[1]
    most, two = (json.loads((tmp_path / f"{name}.json").read_text())["as_written"] for name in ("most", "two"))
    assert two["counted"]["total"] < most["counted"]["total"] and two["speed"]["compute"] < most["speed"]["compute"]
    code, _, line = planned("--images", "16")
    assert code == 2 and "--images 16: wanted 0 to 15" in line and line.count("\n") == 1
    code, _, line = planned("--init", "runs/x")
    assert code == 2 and "init='runs/x': wanted scratch" in line and line.count("\n") == 1


def test_a_step_is_compiled_for_fake_devices_in_a_process_of_its_own():
    small = ["--model.num-layers", "2", "--model.width", "64", "--model.num-heads", "2", "--data.length", "64"]
    config = recipe("gpt2 --size 124m", *small, "--data.batch-size", "16", "--optim.accumulate", "1")
    config = dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=4))
    found = compile_for(config, Target(devices=4))
    counted = Planner(config, topology("cpu:4")).candidate(search.with_devices(config, topology("cpu:4"))).memory
    assert found.fits and found.findings == ()
    assert found.arguments == pytest.approx(counted.parameters + counted.optimizer + counted.batch, rel=1e-3)


@needs_libtpu
def test_what_does_not_fit_a_slice_is_told_by_the_compiler():
    config = dataclasses.replace(recipe("llama_8b"), mesh=MeshConfig(data=1, fsdp=16))
    found = compile_for(config, Target(devices=16, tpu="v5e:4x4"))
    assert not found.fits and "GiB" in found.error
