"""Laws of model.dtype=auto: decided by the device where a run begins, and kept from then on."""

import dataclasses

import jax
import pytest

from gptjax.config import CheckpointConfig, DataConfig, ModelConfig, TokenizerConfig, TrainConfig
from gptjax.config.command_line import load_recipe
from gptjax.config.sweep import SweepConfig
from gptjax.runs.run import Run
from gptjax.runtime import dtype
from gptjax.scaling.sweep import work
from gptjax.scaling.sweep.jobs import add_points, write_jobs
from gptjax.scaling.sweep.points import make_points, split_entries
from gptjax.stages import runner
from gptjax.training.build import build_components

AUTO = TrainConfig(model=ModelConfig(num_layers=1, width=16, num_heads=2, dtype="auto"), data=DataConfig(length=8),
                   tokenizer=TokenizerConfig(kind="bytes", vocab_size=258), checkpoint=CheckpointConfig())  # fmt: skip


@pytest.fixture(autouse=True)
def ask_again():
    dtype.preferred_dtype.cache_clear()
    yield
    dtype.preferred_dtype.cache_clear()


@pytest.mark.parametrize(("gain", "wanted"), [(0.9, "float32"), (1.29, "float32"), (1.31, "bfloat16"), (5, "bfloat16")])
def test_a_cpu_takes_bfloat16_where_its_products_gain_a_third(monkeypatch, gain, wanted):
    monkeypatch.setattr(dtype, "_measured_gain", lambda: gain)
    chosen, reason = dtype.preferred_dtype()
    assert chosen == wanted and f"{gain:.1f} times" in reason


def test_the_gain_of_this_cpu_is_measured():
    assert 0.05 < dtype._measured_gain() < 50


@dataclasses.dataclass
class Device:
    platform: str
    compute_capability: str = ""


@pytest.mark.parametrize(
    ("device", "wanted"),
    [
        (Device("tpu"), "bfloat16"),
        (Device("gpu", "7.5"), "float32"),
        (Device("gpu", "8.0"), "bfloat16"),
        (Device("gpu", "gfx942"), "bfloat16"),
    ],
)
def test_accelerators_are_known_by_their_kind(monkeypatch, device, wanted):
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert dtype.preferred_dtype()[0] == wanted


def test_a_run_keeps_the_dtype_that_it_began_with(tmp_path, monkeypatch):
    config = dataclasses.replace(AUTO, run_dir=str(tmp_path / "run"))
    answers = {"preferred": ("bfloat16", "fast")}
    monkeypatch.setattr(runner, "preferred_dtype", lambda: answers["preferred"])
    begun, reason = runner.resolve_dtype(config)
    assert (begun.model.dtype, reason) == ("bfloat16", "fast")

    run = Run.open(config.run_dir, begun)
    answers["preferred"] = ("float32", "slow")
    assert runner.resolve_dtype(config)[0].model.dtype == "float32", "nothing was trained yet"
    checkpoints = runner.Checkpoints(run.checkpoints, config.checkpoint)
    checkpoints.save(1, {"x": jax.numpy.zeros(1)}, {"step": 1}, {})
    checkpoints.wait()
    kept, reason = runner.resolve_dtype(config)
    assert kept == begun and "began" in reason
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
    assert runner.resolve_dtype(named) == (named, ""), "a dtype that is named is not replaced"


def test_a_sweep_decides_once_for_all_of_its_runs(tmp_path, monkeypatch):
    recipe, out = load_recipe("ladder"), tmp_path / "sweep"
    out.mkdir()
    cfg = SweepConfig(out=str(out), grid=("1e13:1,3",))
    answers = iter(["bfloat16"])
    monkeypatch.setattr(work, "_preferred_dtype", lambda: next(answers))
    for _ in range(2):  # the second reads the table
        decided = work._with_dtype(cfg, recipe, out)
        assert decided.set == ("model.dtype=bfloat16",)
        points = make_points(decided, recipe)
        assert {point.config.model.dtype for point in points} == {"bfloat16"}
        write_jobs(out, add_points([], points, split_entries(decided.set)))
    named = dataclasses.replace(cfg, set=("model.dtype=float32",))
    assert work._with_dtype(named, recipe, out) == named


def test_a_model_that_is_built_by_hand_takes_what_its_devices_prefer(monkeypatch):
    monkeypatch.setattr(dtype, "_measured_gain", lambda: 4.0)
    assert build_components(AUTO).decoder.cfg.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("width", "ratio", "wanted"),
    [(64, 8 / 3, 176), (192, 8 / 3, 512), (256, 8 / 3, 688), (4096, 8 / 3, 11_008), (5120, 8 / 3, 13_824),
     (8, 8 / 3, 24), (64, 171 / 64, 171), (896, 4864 / 896, 4864), (768, 4.0, 3072)],
)  # fmt: skip
def test_an_mlp_is_as_wide_as_asked_or_rounded_up_to_what_meshes_divide(width, ratio, wanted):
    assert ModelConfig(width=width, num_heads=1, mlp_ratio=ratio).mlp_width == wanted
