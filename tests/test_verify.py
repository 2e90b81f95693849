"""What `gptjax verify` tries and what it says; that its numbers hold on every mesh is in test_mesh.py."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config import MeshConfig
from gptjax.diagnostics.verify import checks, numbers
from gptjax.diagnostics.verify.settings import REMATS, Setting, meshes, settings
from gptjax.model import block
from gptjax.ops.reference import AttentionMask, attend

OPTIONS = {"attention": 2, "packing": 2, "unroll": 2, "accumulate": 2, "family": 2, "remat": len(REMATS)}


def test_every_two_values_of_two_options_meet_within_eight_settings():
    first = settings(meshes(1))[:8]
    for a, b in itertools.combinations(OPTIONS, 2):
        met = {(getattr(s, a), getattr(s, b)) for s in first}
        assert len(met) == OPTIONS[a] * OPTIONS[b], (a, b)


def test_few_devices_are_tried_in_every_shape_and_many_with_every_set_of_axes():
    def shapes(count):
        return [(m.data, m.fsdp, m.tensor, m.context) for m in meshes(count)]

    every = [s for s in itertools.product((1, 2, 4), repeat=4) if np.prod(s) == 4]
    assert sorted(shapes(4)) == sorted(every) and {s.mesh for s in settings(meshes(4))} == set(meshes(4))
    assert shapes(1) == [(1, 1, 1, 1)] and shapes(3) == [(3, 1, 1, 1)]
    # Of the sets of axes only that of all four needs 16 devices.
    for count, sets in ((8, 14), (64, 12)):
        found = shapes(count)
        assert all(np.prod(s) == count for s in found)
        assert len({tuple(n > 1 for n in s) for s in found}) == len(found) == sets


def look_ahead(cfg, q_BLHK, k_BMGK, v_BMGK, mask, *, scale, **more):
    """Attention whose mask is off by one."""
    ahead = AttentionMask(mask.query_BL + 1, mask.query_segments_BL, mask.key_segments_BM)
    return attend(q_BLHK, k_BMGK, v_BMGK, ahead, scale=scale)


def look_across(cfg, q_BLHK, k_BMGK, v_BMGK, mask, *, scale, **more):
    """Attention that forgot the segments."""
    forgot = dataclasses.replace(mask, query_segments_BL=None, key_segments_BM=None)
    return attend(q_BLHK, k_BMGK, v_BMGK, forgot, scale=scale)


@pytest.fixture
def zero_start(monkeypatch):
    """Weights that cost no compilation."""

    def start(family, mesh=None):
        one = jax.ShapeDtypeStruct((1, 1), np.int32)
        decoder = numbers.decoder_of(Setting(family=family))
        shapes = jax.eval_shape(decoder.init, jax.random.key(0), one, one, one)["params"]
        random = np.random.default_rng(0)
        params = jax.tree.map(lambda x: random.normal(0, 0.3, x.shape).astype(np.float32), shapes)
        return type("State", (), {"params": params})

    monkeypatch.setattr(numbers, "first_state", start)


@pytest.mark.parametrize("fault", [None, look_ahead, look_across])
def test_a_mask_that_is_broken_in_every_setting_alike_is_found(monkeypatch, zero_start, fault):
    mesh = MeshConfig(data=4, context=2)
    if fault is not None:
        monkeypatch.setattr(block, "attention", fault)
    result = checks.nothing_leaks(Setting(family="gpt2", mesh=mesh), "leaks")
    wanted = {None: "", look_ahead: "changes the past", look_across: "changes another document"}[fault]
    assert wanted in result.problem and bool(result.problem) == bool(fault)


def test_a_cache_that_forgets_is_found(monkeypatch, zero_start):
    assert not checks.cache_is_exact("llama", None, "cache").problem
    right = block.keys_and_values

    def forgets(cache, dtype):
        return tuple(x_BMGK.at[:, 0].set(0) for x_BMGK in right(cache, dtype))

    monkeypatch.setattr(block, "keys_and_values", forgets)
    assert "logits differ" in checks.cache_is_exact("llama", None, "cache").problem


def test_numbers_that_are_none_are_infinitely_far():
    one = numbers.Numbers([2.0] * 10, {"a_D": np.ones(3), "b_D": np.full(3, 2.0)})
    assert numbers.difference(one, one) == (0.0, 0.0, "a_D")
    lost = numbers.Numbers([2.0] * 9 + [float("nan")], {"a_D": np.ones(3), "b_D": np.array([2, np.nan, 2])})
    assert numbers.difference(lost, one) == (float("inf"), float("inf"), "b_D")


@pytest.mark.parametrize("fault", ["", "off by 1", "raises"])
def test_a_check_that_fails_or_raises_is_reported_and_ends_with_3(monkeypatch, tmp_path, capsys, fault):
    def second(name):
        if fault == "raises":
            raise RuntimeError("INTERNAL: no device\nand more")
        return checks.Result(name=name, problem=fault)

    def fine(name):
        return checks.Result(name=name, loss=1e-7)

    monkeypatch.setattr(checks, "checks", lambda pool: iter([("one", fine), ("two", second), ("three", fine)]))
    out = tmp_path / "found.json"
    assert main(["verify", "--json", str(out)]) == (3 if fault else 0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:-1]] == ["ok", "FAILED" if fault else "ok", "ok"]
    last = "verify: FAILED 1 of 3 checks on 8 cpu" if fault else "verify: the same numbers in all 3 checks on 8 cpu"
    assert lines[-1].startswith(last)
    found = json.loads(out.read_text())
    assert found["ok"] == (not fault) and [r["ok"] for r in found["results"]] == [True, not fault, True]
    if fault == "raises":
        assert found["results"][1]["problem"] == "RuntimeError: INTERNAL: no device and more"


def test_kernels_that_can_not_run_here_are_named(monkeypatch, capsys):
    monkeypatch.setattr(checks, "checks", lambda pool: iter(()))
    assert main(["verify"]) == 0
    assert "attention cudnn is not tried: it runs on a gpu" in capsys.readouterr().out
