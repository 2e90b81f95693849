"""Laws of placing: weights go from files onto any mesh in parts, and the host holds one tensor of them at a time."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from test_gguf import pieces, write
from test_interop import FIXTURES, assert_same

from gptjax.cli import main
from gptjax.config import DataConfig, EvaluateConfig, MeshConfig
from gptjax.interop.huggingface import import_huggingface
from gptjax.parallel.sharding import make_mesh, sharding_of
from gptjax.runs.load import load_model
from gptjax.runs.run import Provenance, load_config
from gptjax.stages.pretrain import pretrain

MESHES = [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "tensor": 4, "context": 2}]


def random_llama(
    folder: Path, *, shards: int = 4, vocab: int, width: int, layers: int, mlp: int, kv_heads: int
) -> Path:
    """A Llama of random bfloat16 weights, in shards of which one at a time is in memory."""
    heads = max(1, width // 64)
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": mlp, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "lm_head.weight": (vocab, width),
        "model.norm.weight": (width,),
    }
    kv = kv_heads * (width // heads)
    for n in range(layers):
        one = {"input_layernorm": (width,), "post_attention_layernorm": (width,), "mlp.gate_proj": (mlp, width),
               "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp), "self_attn.q_proj": (width, width),
               "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width),
               }  # fmt: skip
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in one.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    where = {name: f"model-{1 + i % shards:05}-of-{shards:05}.safetensors" for i, name in enumerate(shapes)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    rng = np.random.default_rng(0)
    for file in sorted(set(where.values())):
        parts = {name: np.empty(shape, ml_dtypes.bfloat16) for name, shape in shapes.items() if where[name] == file}
        for x in parts.values():
            for row in x.reshape(-1, x.shape[-1]):
                row[:] = rng.standard_normal(x.shape[-1], np.float32) * 0.02
        save_file(parts, folder / file)
    return folder


def assert_in_parts(params, mesh) -> None:
    """Every leaf as its name says, and of the matrices no device more than its part."""
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        assert x.sharding == sharding_of(path[-1].key, x.shape, mesh)
        if math.prod(x.shape) > 4096 and mesh.shape["fsdp"] == 8:
            assert all(8 * shard.data.nbytes == x.nbytes for shard in x.addressable_shards), path


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("family", ["tiny_random_gpt2", "tiny_random_llama"])
def test_on_any_mesh_a_model_lies_in_parts_and_is_the_same(family, sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    imported = import_huggingface(FIXTURES / family, mesh)
    assert_in_parts(imported[3], mesh)
    assert_same(imported, import_huggingface(FIXTURES / family))


def test_the_host_holds_less_than_the_two_largest_tensors(tmp_path):
    folder = random_llama(tmp_path / "model", vocab=4096, width=512, layers=4, mlp=1024, kv_heads=2)
    mesh, two_largest = make_mesh(MeshConfig(data=1, fsdp=8)), 2 * 4 * 4096 * 512
    import_huggingface(folder, mesh)  # what is compiled and imported on the way is there from now on
    tracemalloc.start()
    params = import_huggingface(folder, mesh)[3]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    print(f"peak of the host {peak / 1e6:.1f} MB, two largest tensors {two_largest / 1e6:.1f}, model {size / 1e6:.1f}")
    assert peak < two_largest < size / 2
    assert_in_parts(params, mesh)


@pytest.mark.slow
def test_training_begins_from_an_imported_model_in_parts(tmp_path, words):
    path = write(tmp_path / "model.gguf", "llama", tokenizer=pieces())
    assert main(["import", str(path), str(tmp_path / "run"), "--mesh.data", "2", "--mesh.fsdp", "4"]) == 0
    old = load_config(tmp_path / "run")
    config = dataclasses.replace(
        old, run_dir=str(tmp_path / "new"), init=str(tmp_path / "run"), steps=2, mesh=MeshConfig(data=1, fsdp=8),
        sinks=(), sample=False, evaluate=EvaluateConfig(every=2, max_rows=8),
        data=DataConfig(source=str(words), batch_size=8, length=old.data.length),
        tokenizer=dataclasses.replace(old.tokenizer, path=str(tmp_path / "run" / "tokenizer")),
    )  # fmt: skip
    pretrain(config, Provenance())
    model = load_model(tmp_path / "new", MeshConfig(data=1, fsdp=8))
    assert model.step == 2
    assert_in_parts(model.params, model.mesh)


MEASURED = """
import re, sys
from gptjax.cli import main
import gptjax.api, gptjax.interop.importing, gguf, huggingface_hub, safetensors, jax
from orbax.checkpoint import v1
jax.devices()
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before = peak()
assert main(["import", *sys.argv[1:]]) == 0
print(peak() - before)
"""


def peak_of_import(*words: object, devices: int = 1) -> int:
    """Bytes that a whole import with its save takes at most, above what its imports alone take."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "XLA_FLAGS": flags}
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
@pytest.mark.parametrize("source", ["random", "SmolLM2"])
def test_a_whole_import_takes_at_most_1_6_times_the_weights(tmp_path, source):
    path = Path(os.environ.get("GPTJAX_SMOLLM2", ""))
    if source == "random":
        path = random_llama(tmp_path / "model", vocab=32_000, width=1024, layers=6, mlp=2816, kv_heads=4)
    elif not path.is_file():
        pytest.skip("GPTJAX_SMOLLM2 (SmolLM2-135M-Instruct.Q4_1.gguf) names no file")
    peak = peak_of_import(path, tmp_path / "run")
    leaves = json.loads((tmp_path / "run" / "checkpoints" / "00000000" / "digests" / "data.json").read_text())
    weights = sum(4 * math.prod(shape) for _, _, shape in leaves.values())
    print(f"{peak / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights: {peak / weights:.2f} times")
    assert peak <= 1.6 * weights


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_a_model_of_1_1_billion_parameters_goes_onto_eight_devices_without_a_second_copy(tmp_path):
    """The shape of TinyLlama. It takes 5 GB of memory and 7 GB of disk."""
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    if free < 8 * 2**30:
        pytest.skip(f"{free / 2**30:.1f} GiB of memory are free; this takes 5")
    path = random_llama(tmp_path / "model", vocab=32_000, width=2048, layers=22, mlp=5632, kv_heads=4)
    peak = peak_of_import(path, tmp_path / "run", devices=8)
    leaves = json.loads((tmp_path / "run" / "checkpoints" / "00000000" / "digests" / "data.json").read_text())
    weights, two_largest = sum(4 * math.prod(shape) for _, _, shape in leaves.values()), 2 * 4 * 32_000 * 2048
    print(f"{peak / 2**20:.0f} MiB for {weights / 2**20:.0f} MiB of weights, {two_largest / 2**20:.0f} two largest")
    assert peak - weights < two_largest
