"""The throughput benchmark times what is right and fails what is wrong; its GPU suite lowers for CUDA as it stands."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import contenders
import decode
import jax
import numpy as np
import pytest
import throughput
import throughput_report
import train_jax

from gptjax.config import TrainConfig
from gptjax.data.packing import example_batch
from gptjax.generation import engine
from gptjax.model.decoder import Decoder, init_params, unstacked
from gptjax.parallel.sharding import make_mesh
from gptjax.training.build import build_components
from gptjax.training.step import compile_step

ROOT = Path(__file__).parent.parent


TINY = contenders.Contest("tiny", "gpt2", "float32")
STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batches")
    for documents in ("crossing", "isolated"):
        contenders.write_batches(
            folder / f"{documents}.npz", contenders.batches(contenders.recipe(TINY), documents, STEPS)
        )
    return folder


def rows(folder: Path, config: TrainConfig, documents: str = "crossing", kind: str = "ours") -> list[dict[str, float]]:
    settings = contenders.flat(config) | {"compile_cache": False}
    setting = {"config": settings, "precision": "", "batches": str(folder / f"{documents}.npz")}
    return (train_jax.Plain if kind == "plain" else train_jax.Ours)(setting).run(STEPS)


@pytest.fixture(scope="module")
def right(folder):
    return {"crossing": rows(folder, contenders.reference(contenders.recipe(TINY)))}


def judged(found, right, dtype="float32"):
    return throughput_report.judge(TINY._replace(dtype=dtype), {"ours": {"rows": found}}, right)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.exhaustive)])
@pytest.mark.slow
def test_a_right_step_passes_in_both_types(folder, right, dtype):
    found = rows(folder, contenders.recipe(TINY._replace(dtype=dtype)))
    assert judged(found, right, dtype) == []


@pytest.mark.slow
def test_the_plain_baseline_does_the_same_work(folder, right):
    assert judged(rows(folder, contenders.recipe(TINY), kind="plain"), right) == []


@pytest.mark.parametrize(
    "fault",
    [
        "future_seen",
        pytest.param("dropped_layer", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("half_the_rows", "no_mlp_gradient")),
    ],
)
def test_a_fast_but_wrong_step_fails_even_by_the_looser_tolerance(folder, right, fault):
    found = rows(folder, contenders.recipe(TINY, 0, (f"loss=planted_faults:{fault}",)))
    assert judged(found, right, "bfloat16")


@pytest.mark.slow
def test_a_step_that_looks_across_documents_fails_where_they_are_isolated(folder, right):
    isolated = {"isolated": rows(folder, contenders.recipe(TINY), "isolated")}
    crossing = {"ours-isolated": {"rows": right["crossing"]}}
    assert throughput_report.judge(TINY, crossing, isolated)


def test_isolated_rows_hold_several_documents_and_crossing_ones_one():
    config = contenders.recipe(contenders.Contest("small", "gpt2", "float32"))
    crossing, isolated = (contenders.batches(config, documents, 1)[0] for documents in ("crossing", "isolated"))
    assert (crossing["inputs_BL"] == isolated["inputs_BL"]).all()
    assert crossing["segments_BL"].max() == 1 < isolated["segments_BL"].max()
    assert crossing["weights_BL"].all(), "the peers train on every place of a row"


@pytest.mark.slow
def test_the_report_says_what_was_measured_and_a_planted_fault_ends_it_with_code_1(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--shape", "tiny", "--family", "gpt2"]
    command += ["--dtype", "float32", "--competitors", "ours", "plain", "--jax-only", "--rounds", "1", "--steps", "1"]
    command += ["--set", "loss=planted_faults:dropped_layer", "--out", str(tmp_path)]
    # Compiling is most of its time, and how fast the steps are is not what is asked.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "tiny_gpt2_float32: ours: " in done.stderr, done.stderr
    (path,) = tmp_path.glob("*_throughput.json")
    report = json.loads(path.read_text())
    (contest,) = report["contests"]
    assert report["faults"] == contest["faults"] and {"date", "command", "commit", "versions"} <= set(report)
    assert contest["parameters"] > 1e5 and contest["ceiling"]["jax"]["median_gflops"] > 0
    ours, plain = contest["competitors"]["ours"], contest["competitors"]["plain"]
    assert plain["right"] and not ours["right"]
    assert ours["ratio"] == {"median": 1.0, "p5": 1.0, "p95": 1.0}
    for found in (ours, plain):
        assert found["tokens_per_second"]["p5"] <= found["tokens_per_second"]["median"]
        assert 0 < found["mfu"]["of_measured"]["6n"] < found["mfu"]["of_measured"]["palm"]
        assert found["resident_bytes"] > 1e8 and found["first_step_seconds"] > 0
    assert path.with_suffix(".png").exists() and "WRONG" in path.with_suffix(".md").read_text()


class StandIn:
    """A competitor that answers at once, and writes down what it is asked; the one named torch never does."""

    facts: dict = {}
    log: list[tuple[str, str]] = []

    def __init__(self, name: str):
        self.name = name
        self.log.append(("start", name))

    def ask(self, verb: str, *arguments):
        if self.name == "torch":
            raise throughput.Failed("torch gave no answer in 120 s")
        row = {"loss": 1.0, "grad_norm": 1.0}
        results = {"run": lambda n: [row] * n, "products": lambda shapes, *_: [1.0] * len(shapes)}
        memory = {"resident_bytes": 1, "device_bytes": 1}
        return {"seconds": 1.0, "result": results[verb](*arguments) if verb in results else memory}

    def close(self) -> None:
        self.log.append(("end", self.name))


def competed(monkeypatch, tmp_path, *flags: str):
    """The report of a contest of stand-ins, and their starts and ends in order, but for the references."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--out", str(tmp_path), "--shape", "tiny", *flags])
    args = throughput.arguments()
    args.deadline = 0.0
    monkeypatch.setattr(throughput, "start", lambda name, *_: StandIn(name))
    monkeypatch.setattr(StandIn, "log", [])
    report = throughput.compete(TINY._replace(dtype="bfloat16"), args, tmp_path)
    return report, [event for event in StandIn.log if event[1] != "reference"]


def test_on_a_gpu_each_competitor_ends_before_the_next_starts_and_one_that_hangs_costs_no_other(monkeypatch, tmp_path):
    report, log = competed(monkeypatch, tmp_path, "--suite", "h100")
    assert [name for what, name in log if what == "start"] == [
        "ours", "ours", "torch-compiled", "ours-isolated", "ours-isolated", "plain", "torch"
    ]  # fmt: skip
    assert log[::2] == [("start", name) for _, name in log[1::2]] and all(what == "end" for what, _ in log[1::2])
    assert report["faults"] == ["tiny_gpt2_bfloat16: torch gave no answer in 120 s"]
    rates = {name: len(c["seconds"]) for name, c in report["competitors"].items() if "failed" not in c}
    assert rates == {"ours": 5, "torch-compiled": 5, "ours-isolated": 5, "plain": 5}
    assert len(next(iter(report["ceiling"]["jax"]["gflops_by_shape"].values()))) == 3


def test_on_a_cpu_all_competitors_are_there_while_they_take_turns(monkeypatch, tmp_path):
    _, log = competed(monkeypatch, tmp_path)
    first_end = next(i for i, (what, name) in enumerate(log) if what == "end" and name != "torch")
    assert {name for _, name in log[:first_end]} == set(throughput.COMPETITORS)


def test_a_competitor_is_ended_at_the_deadline_and_none_starts_after_it(tmp_path, monkeypatch):
    asleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    began = time.monotonic()
    with pytest.raises(throughput.Failed, match="late gave no answer in 0 s: it wrote nothing"):
        throughput.Competitor("late", asleep, {}, tmp_path / "log", dict(os.environ), 60.0, began + 0.2)
    assert time.monotonic() - began < 10
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--out", str(tmp_path), "--suite", "h100"])
    args = throughput.arguments()
    assert args.minutes == 12 and args.one_by_one
    args.deadline = began
    with pytest.raises(throughput.Failed, match="ours was left out: the 12 minutes are over"):
        throughput.start("ours", TINY, args, tmp_path)
    ended = throughput.others(tmp_path, began)
    assert {name: found["code"] for name, found in ended.items()} == {"decode": None, "attention": None}


@pytest.mark.slow
@pytest.mark.parametrize("contest", contenders.SUITES["h100"], ids=lambda c: c.name)
def test_the_steps_of_the_gpu_suite_lower_for_cuda(contest):
    config = contenders.recipe(contest)
    parts = build_components(config)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = jax.eval_shape(parts.init, 0)
    batch = example_batch(config.data.batch_size, config.data.length)
    with jax.set_mesh(mesh):
        step = compile_step(parts.step, mesh, state, {}, batch)
        lowered = step.trace(state, {}, batch).lower(lowering_platforms=("cuda",))
    assert "dot_general" in lowered.as_text()


def test_decoding_of_the_gpu_suite_lowers_for_cuda(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cfg, vocab_size, context = decode.SHAPES["1b"]
    decoder = Decoder(dataclasses.replace(cfg, dtype="bfloat16"), vocab_size, context)
    shapes = jax.eval_shape(init_params(decoder), jax.random.key(0))
    weights = jax.eval_shape(functools.partial(unstacked, dtype="bfloat16"), shapes)
    prompt_BL, last_B = np.zeros((32, 128), np.int32), np.full(32, 191)
    prompts = (decoder, weights, prompt_BL, last_B, 192, False)
    state = engine.prefill.eval_shape(*prompts)
    rows = {"copy_B": np.zeros(32, np.int32), "last_B": last_B}
    rest = (rows, {}, np.uint32(0), decode.NEVER, np.zeros(32, bool), np.int32(64))
    lowered = [
        program.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
        for program, given in ((engine.prefill, prompts), (engine.decode, (decoder, weights, state, *rest)))
    ]
    assert all("dot_general" in text for text in lowered) and "stablehlo.while" in lowered[1]
