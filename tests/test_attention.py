"""Attention by name: what each way is given, what it refuses, and that all of them are the plain attention."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_gradients import assert_close, value_and_grads
from jax._src.cudnn import fused_attention_stablehlo as cudnn

import gptjax.ops.attention
from gptjax.config import DataConfig, GenerateConfig, MeshConfig, ModelConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.generation.engine import generate_ids
from gptjax.model.decoder import Decoder, init_params, make_decoder
from gptjax.ops.attention import attention, describe, select_kernel
from gptjax.ops.cpu_attention import attend_causal_chunked
from gptjax.ops.device import Device
from gptjax.ops.kernels import attend_cudnn, attend_splash
from gptjax.ops.reference import attend, causal
from gptjax.parallel.sharding import make_mesh, to_global

CPU, TPU, A100, H100 = Device("cpu"), Device("tpu"), Device("gpu", 8.0), Device("gpu", 9.0)
MODEL = ModelConfig(num_layers=2, num_heads=4, queries_per_kv=2, head_dim=8, width=32)
pytestmark = pytest.mark.usefixtures("highest_precision")


def arrays(length: int, dtype: Any = jnp.float32, rows: int = 2) -> dict[str, np.ndarray]:
    """q_BLHK, k_BLGK, v_BLGK, a gradient g_BLHK, and packed segments that end in padding."""
    rng = np.random.default_rng(0)
    shapes = {"q_BLHK": 4, "k_BLGK": 2, "v_BLGK": 2, "g_BLHK": 4}
    made = {name: rng.normal(size=(rows, length, heads, 8)).astype(dtype) for name, heads in shapes.items()}
    ends = np.sort(rng.integers(1, length, (rows, 3)), axis=1)[:, :, None] <= np.arange(length)
    segments_BL = np.where(ends[:, 2], 0, ends[:, :2].sum(axis=1) + 1)
    return made | {"segments_BL": segments_BL.astype(np.int32)}


def gradients(function, given: dict[str, Any], packed: bool = True, **options) -> list[np.ndarray]:
    """Output and gradients by q, k and v of rows whose documents are kept apart, or that hold one."""
    qkvg = [given[name] for name in ("q_BLHK", "k_BLGK", "v_BLGK", "g_BLHK")]
    return value_and_grads(function, qkvg, causal(given["segments_BL"], packed), **options)


TRIANGLE = {
    "packed": {},
    "one document": {"packed": False},
    "window": {"window": 70},
    "traced window": {"window": np.int32(70)},
    "soft-cap": {"softcap": 1.5},
    "all": {"softcap": 1.5, "window": 9, "length": 300},
    "shorter than a chunk": {"length": 5},
}


@pytest.mark.parametrize("name", TRIANGLE)
def test_plain_attention_without_the_future_is_plain_attention(name):
    options = dict(TRIANGLE[name])
    given = arrays(options.pop("length", 193))
    assert_close(gradients(attend_causal_chunked, given, **options), gradients(attend, given, **options))


def test_in_bfloat16_it_is_about_as_far_from_float32_as_the_reference():
    given = arrays(128, jnp.bfloat16)
    exact = gradients(attend, {n: x if n == "segments_BL" else x.astype(np.float32) for n, x in given.items()})
    chunked, plain = (gradients(f, given) for f in (attend_causal_chunked, attend))
    for wanted, a, b in zip(exact, chunked, plain, strict=True):
        assert np.linalg.norm(a - wanted) <= 1.1 * np.linalg.norm(b - wanted)


def test_the_future_is_not_touched():
    """A value that is no number and is multiplied leaves its mark: 0 times nan is nan."""
    given = arrays(256)
    given["v_BLGK"][:, 128:] = np.nan
    out_BLHK, dq_BLHK, *_ = gradients(attend_causal_chunked, given)
    assert np.isfinite(out_BLHK[:, :128]).all() and np.isnan(out_BLHK[:, 128:]).all()
    assert np.isfinite(dq_BLHK[:, :128]).all()


CASES = {
    "packed": {},
    "one document": {"packed": False},
    "one document and window": {"packed": False, "window": 5},
    "window": {"window": 5},
    "traced window": {"window": np.int32(5)},
    "traced window and one document": {"packed": False, "window": np.int32(5)},
}


@pytest.fixture
def by_definition(monkeypatch):
    """Answers the call for cuDNN by its own definition, so that mask, window and padding show; its query shapes."""
    call, shapes = jax.nn.dot_product_attention, []

    def answer(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        shapes.append(args[0].shape)
        return call(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return shapes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("length", [24, 37])
def test_what_cudnn_is_asked_for_is_plain_attention(name, length, by_definition):
    given = arrays(length)
    assert_close(gradients(attend_cudnn, given, **CASES[name]), gradients(attend, given, **CASES[name]))
    assert all(shape[1] % 2 == 0 for shape in by_definition)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 2.0}, pytest.param({"packed": False, "window": 50, "length": 140}, marks=pytest.mark.slow)],
    ids=["packed, soft-cap", "padded, window"],
)
def test_splash_is_plain_attention(options):
    """The kernel's definition, interpreted."""
    options = dict(options)
    given = arrays(options.pop("length", 128), rows=1)
    got = gradients(attend_splash, given, interpret=True, **options)
    assert_close(got, gradients(attend, given, **options))


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, tensor=4), MeshConfig(data=1, fsdp=8)], ids=["few heads", "rows"])
def test_a_mesh_does_not_change_what_the_kernels_compute(mesh, by_definition):
    given = arrays(16, rows=8)
    wanted = gradients(attend, given)
    with jax.set_mesh(make_mesh(mesh)):
        assert_close(gradients(attend_cudnn, to_global(given, make_mesh(mesh))), wanted)
    # Each device has its own part.
    assert by_definition[-1] == (8 // max(mesh.data, mesh.fsdp), 16, 4 // mesh.tensor, 8)


def lowered(cfg: ModelConfig, device: Device, platform: str, monkeypatch, packed: bool = True) -> str:
    """The text of attention and its gradients, lowered for a platform that need not be here."""
    monkeypatch.setattr(gptjax.ops.attention, "device", lambda: device)
    # What jax asks the device at hand, which is not the one that is lowered for.
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91800)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda least: device.capability >= float(least))
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda other: False)

    def loss(q_BLHK, k_BLGK, v_BLGK, segments_BL):
        mask = causal(segments_BL, packed)
        return attention(cfg, q_BLHK, k_BLGK, v_BLGK, mask, scale=0.4, window=cfg.window or None).sum()

    q_BLHK, k_BLGK = (jax.ShapeDtypeStruct((2, 128, heads, 64), jnp.bfloat16) for heads in (4, 2))
    segments_BL = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    traced = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(q_BLHK, k_BLGK, k_BLGK, segments_BL)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def masked(text: str) -> bool:
    """Segments reach the lowered program at all."""
    return re.search(r"stablehlo.compare\s+EQ", text) is not None


def test_cudnn_gets_a_mask_for_packed_documents_and_none_for_one(monkeypatch):
    cfg = dataclasses.replace(MODEL, head_dim=64, attention="cudnn", window=16)
    for packed, calls in (
        (True, ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]),
        (False, ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]),
    ):
        text = lowered(cfg, A100, "cuda", monkeypatch, packed)
        assert sorted(set(re.findall(r"__cudnn\$\w+", text))) == calls
        assert masked(text) == packed
        assert text.count(r"sliding_window_length\22: 16") == text.count(r"mask_type\22: \22CAUSAL") == 2


def test_splash_gets_segments_for_packed_documents_and_none_for_one(monkeypatch):
    cfg = dataclasses.replace(MODEL, head_dim=64, attention="auto", attention_softcap=5.0)
    for packed, segmented in ((True, "_segmented"), (False, "")):
        text = lowered(cfg, TPU, "tpu", monkeypatch, packed)
        kernels = {f"splash_mha_{phase}{segmented}" for phase in ("dkv", "dq", "fwd")}
        found = {re.sub("(_no)?_residuals", "", name) for name in re.findall(r"splash_mha_\w+residuals", text)}
        assert "tpu_custom_call" in text and found == kernels


CHOICES = [
    (H100, {}, 4096, "cudnn"),
    (A100, {}, 64, "cudnn"),
    (A100, {"head_dim": 256}, 64, "plain"),
    (H100, {"head_dim": 256}, 64, "cudnn"),
    (Device("gpu", 7.5), {}, 4096, "blockwise"),
    (Device("gpu", 0.0), {}, 64, "plain"),  # no NVIDIA device
    (H100, {"dtype": "float32"}, 4096, "blockwise"),
    (H100, {"attention_softcap": 5.0}, 64, "plain"),
    (H100, {"dropout": 0.1}, 4096, "plain"),
    (H100, {"head_dim": 12}, 64, "plain"),
    (H100._replace(shares_rows=True), {}, 4096, "blockwise"),
    (TPU, {"attention_softcap": 5.0, "dtype": "float32"}, 64, "splash"),
    (TPU, {"window": 8, "global_every": 2}, 64, "plain"),
    (CPU, {}, 1024, "plain"),
    (CPU, {}, 1025, "blockwise"),
    (CPU, {"dropout": 0.1}, 4096, "plain"),
]


@pytest.mark.parametrize(("device", "settings", "length", "wanted"), CHOICES)
def test_auto_takes_the_first_that_can_honour_the_case(device, settings, length, wanted):
    assert select_kernel(dataclasses.replace(MODEL, attention="auto", **settings), length, device) == wanted


@pytest.mark.parametrize(
    ("name", "device", "settings", "message"),
    [
        ("cudnn", CPU, {}, "model.attention='cudnn' can't be used: it runs on a gpu, and this is a cpu; set --model"),
        ("splash", H100, {}, "it runs on a tpu, and this is a gpu"),
        ("cudnn", Device("gpu", 7.5), {}, "it needs compute capability 8, and this device has 7.5"),
        ("cudnn", A100, {"head_dim": 256}, "it needs model.head_dim to be heads of a multiple of 8 and at most 128"),
        ("cudnn", H100._replace(shares_rows=True), {}, "whole rows: set --mesh.context 1"),
        ("splash", TPU._replace(shares_rows=True), {}, "whole rows: set --mesh.context 1"),
    ],
)
def test_a_named_attention_that_the_device_cannot_honour_is_refused(name, device, settings, message):
    with pytest.raises(InputError, match=message):
        select_kernel(dataclasses.replace(MODEL, attention=name, **settings), 64, device)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "cudnn", "dropout": 0.1}, "model.dropout=0.1: wanted 0 with model.attention=cudnn; set --model"),
        ({"attention": "splash", "dropout": 0.1}, "set --model.dropout 0 or --model.attention auto"),
        ({"attention": "cudnn", "attention_softcap": 5.0}, "model.attention_softcap=5.0: wanted 0"),
        ({"attention": "cudnn", "dtype": "float32"}, "model.dtype='float32': wanted bfloat16"),
        ({"attention": "cudnn", "head_dim": 12}, "model.head_dim=12: wanted heads of a multiple of 8 and at most 256"),
        ({"attention": "splash", "window": 8, "global_every": 2}, "model.global_every=2: wanted 0, one window for all"),
    ],
)
def test_a_named_attention_that_the_settings_rule_out_is_refused_before_anything_runs(settings, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(MODEL, **settings)


def test_a_cache_is_attended_whatever_the_rows_are_trained_with(monkeypatch):
    """One query, and a prompt behind others, by what runs everywhere."""
    from gptjax.ops.reference import cached

    monkeypatch.setattr(gptjax.ops.attention, "device", lambda: H100)
    given = arrays(16)
    for queries in (1, 4):
        qkv = given["q_BLHK"][:, :queries], given["k_BLGK"], given["v_BLGK"]
        mask = cached(jnp.array([[5], [9]]) + jnp.arange(queries))
        got = attention(dataclasses.replace(MODEL, attention="cudnn"), *qkv, mask, scale=0.4)
        np.testing.assert_allclose(got, attend(*qkv, mask, scale=0.4), atol=1e-6)


def test_only_rows_that_are_known_to_hold_one_document_go_without_segments():
    for settings, several in (
        ({}, True),
        ({"cross_documents": True}, False),
        ({"packing": "padded"}, False),
    ):
        config = TrainConfig(model=MODEL, data=DataConfig(**settings))
        assert make_decoder(config).packed is several


def test_a_run_reports_its_attention():
    line = "plain, the best for this device; documents in one row do not see each other"
    assert describe(MODEL, 64, True) == line
    plain = dataclasses.replace(MODEL, attention="plain")
    assert describe(plain, 64, False) == "plain"
    with jax.set_mesh(make_mesh(MeshConfig(context=4))):
        line = "plain; each row over 4 devices"
        assert describe(plain, 64, False) == line


def benchmark(monkeypatch, *flags: str) -> int:
    """The exit code of the benchmark at its smallest."""
    import attention as command  # benchmarks/attention.py

    small = ["--lengths", "32", "--tokens", "32", "--heads", "2", "--head-size", "8", "--rounds", "1", *flags]
    monkeypatch.setattr("sys.argv", ["attention.py", "--document", "8", *small])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return int(stopped.value.code or 0)


@pytest.mark.slow
def test_the_benchmark_measures_what_is_right(monkeypatch, tmp_path, capsys):
    assert benchmark(monkeypatch, "--out", str(tmp_path)) == 0
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".png"}
    assert "splash is left out: it runs on a tpu" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_fails_where_documents_cross(monkeypatch, capsys):
    import attention as command

    def crossing(cfg, q_BLHK, k_BLGK, v_BLGK, mask, *, scale):
        return attend(q_BLHK, k_BLGK, v_BLGK, causal(mask.query_BL, packed=False), scale=scale)

    monkeypatch.setattr(command, "attention", crossing)
    assert benchmark(monkeypatch) == 1
    out = capsys.readouterr().out
    assert "WRONG: blockwise at 32, packed" in out and "one document: " not in out


def test_a_model_bound_to_a_platform_is_read_and_continued_anywhere():
    bound = ModelConfig(num_layers=1, width=32, num_heads=4, dtype="bfloat16", attention="cudnn")
    assert bound.anywhere().attention == "auto"
    assert dataclasses.replace(bound, attention="blockwise").anywhere().attention == "blockwise"
    decoder = Decoder(bound, vocab_size=32, context=32)
    params = init_params(decoder.clone(cfg=bound.anywhere()))(jax.random.key(0))
    ids = generate_ids(decoder, params, [[1, 2, 3]], GenerateConfig(max_new_tokens=4))
    assert len(ids[0]) == 4
