"""Laws of files made to do harm, or damaged on the way: exit code 2, one line, little memory, and no run is left."""

import errno
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from corpora import run_python
from safetensors.numpy import save_file
from test_interop import FIXTURES, variant

from gptjax.cli import main
from gptjax.interop.gguf_file import MOST_HEADER
from gptjax.runs.checkpoint import CheckpointError, Checkpoints
from gptjax.runs.run import Run

pytest.importorskip("gguf", reason="GGUF files: pip install 'gptjax[gguf]'")

HUGE = 2**60
U8, U32, F32, STRING, ARRAY, U64 = 0, 4, 6, 8, 9, 10  # types of values
PLAIN, Q8_0, I32 = 0, 8, 26  # types of tensors


def text(x: str | bytes) -> bytes:
    x = x.encode() if isinstance(x, str) else x
    return struct.pack("<Q", len(x)) + x


KEYS = {
    "general.architecture": (STRING, text("llama")),
    "llama.block_count": (U32, struct.pack("<I", 1)),
    "llama.embedding_length": (U32, struct.pack("<I", 8)),
    "llama.feed_forward_length": (U32, struct.pack("<I", 16)),
    "llama.attention.head_count": (U32, struct.pack("<I", 2)),
    "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 1e-5)),
    "llama.context_length": (U32, struct.pack("<I", 16)),
}
SHAPES = {
    "token_embd.weight": (320, 8), "output_norm.weight": (8,), "blk.0.attn_norm.weight": (8,),
    "blk.0.attn_q.weight": (8, 8), "blk.0.attn_k.weight": (8, 8), "blk.0.attn_v.weight": (8, 8),
    "blk.0.attn_output.weight": (8, 8), "blk.0.ffn_norm.weight": (8,), "blk.0.ffn_gate.weight": (16, 8),
    "blk.0.ffn_up.weight": (16, 8), "blk.0.ffn_down.weight": (8, 16),
}  # fmt: skip
Q, AT_Q = "blk.0.attn_q.weight", 10304  # and its place
END = AT_Q + 4 * 256 + 32 + 3 * 512


def gguf(
    keys=None,
    tensors=None,
    *,
    more: bytes = b"",
    numbers: dict | None = None,
    counts=(None, None),
    magic: bytes = b"GGUF" + struct.pack("<I", 3),
) -> bytes:
    """A small Llama as a GGUF file; `keys` and `tensors` replace entries, or remove those that are None.

    A tensor is (dimensions as they are stored, type, offset). `more` follows the keys, and counts as one.
    """
    known = {name: key for name, key in (KEYS | (keys or {})).items() if key is not None}
    infos, offset, content = {}, 0, b""
    for name, shape in SHAPES.items():
        data = np.full(shape, 0.5, np.float32) if name not in (numbers or {}) else numbers[name]
        infos[name] = (shape[::-1], PLAIN, offset)
        content += data.tobytes() + bytes(-data.nbytes % 32)
        offset = len(content)
    infos = {name: info for name, info in (infos | (tensors or {})).items() if info is not None}
    header = b"".join(text(name) + struct.pack("<I", kind) + value for name, (kind, value) in known.items()) + more
    for name, (dims, kind, place) in infos.items():
        header += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, place)
    num_tensors, num_keys = (given if given is not None else own for given, own in
                             zip(counts, (len(infos), len(known) + bool(more))))  # fmt: skip
    header = magic + struct.pack("<QQ", num_tensors, num_keys) + header
    return header + bytes(-len(header) % 32) + content


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def number(x: int) -> tuple[int, bytes]:
    return U32, struct.pack("<I", x)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


GGUFS = {
    "of another version": gguf(magic=b"GGUF" + struct.pack("<I", 1)),
    "big-endian": gguf(magic=b"GGUF" + struct.pack(">I", 3)),
    "nothing but its name": b"GGUF",
    "2^60 tensors": gguf(counts=(HUGE, None)),
    "2^60 keys": gguf(counts=(None, HUGE)),
    "a tensor more than there are": gguf(counts=(len(SHAPES) + 1, None)),
    "a key as long as 2^60": gguf(more=struct.pack("<Q", HUGE)),
    "a text beyond its end": gguf(more=key("a", STRING, struct.pack("<Q", 10**6))),
    "an array of 2^60 numbers": gguf(more=key("a", ARRAY, array(U32, HUGE))),
    "an array of 2^60 texts": gguf(more=key("a", ARRAY, array(STRING, HUGE))),
    "an array of 2^63 bytes": gguf(more=key("a", ARRAY, array(U8, 2**63))),
    "arrays in arrays": gguf(more=key("a", ARRAY, array(ARRAY, 1) * 5000)),
    "a value of no type": gguf(more=key("a", 77, b"")),
    "an array of no type": gguf(more=key("a", ARRAY, array(77, 1, b"1234"))),
    "a name that is no text": gguf(more=key(b"\xff\xfe", U32, b"1234")),
    "a key twice": gguf(more=key("llama.block_count", *number(1))),
    "a tensor without dimensions": gguf(tensors={Q: ((), PLAIN, 0)}),
    "a tensor of 9 dimensions": gguf(tensors={Q: ((1,) * 9, PLAIN, 0)}),
    "an empty tensor": gguf(tensors={Q: ((8, 0), PLAIN, 0)}),
    "a tensor of 2^120 numbers": gguf(tensors={Q: ((HUGE, HUGE), PLAIN, 0)}),
    "a tensor beyond its end": gguf(tensors={Q: ((8, 8), PLAIN, 2**20)}),
    "a tensor at 2^60": gguf(tensors={Q: ((8, 8), PLAIN, HUGE)}),
    "a tensor between places": gguf(tensors={Q: ((8, 8), PLAIN, 17)}),
    "tensors on each other": gguf(tensors={Q: ((8, 8), PLAIN, 0)}),
    "a tensor of no type": gguf(tensors={Q: ((8, 8), 999, AT_Q)}),
    "rows that are no blocks": gguf(tensors={Q: ((8, 8), Q8_0, AT_Q)}),
    "weights that are whole numbers": gguf(tensors={Q: ((8, 8), I32, AT_Q)}),
    "alignment of 0": gguf(keys={"general.alignment": number(0)}),
    "alignment of 24": gguf(keys={"general.alignment": number(24)}),
    "alignment as a text": gguf(keys={"general.alignment": (STRING, text("32"))}),
    "no architecture": gguf(keys={"general.architecture": None}),
    "an unknown architecture": gguf(keys={"general.architecture": (STRING, text("mamba\n" * 999))}),
    "an architecture that is a number": gguf(keys={"general.architecture": number(7)}),
    "no heads": gguf(keys={"llama.attention.head_count": None}),
    "0 heads": gguf(keys={"llama.attention.head_count": number(0)}),
    "heads as a text": gguf(keys={"llama.attention.head_count": (STRING, text("2"))}),
    "3 heads": gguf(keys={"llama.attention.head_count": number(3)}),
    "heads of another width": gguf(keys={"llama.attention.head_count_kv": number(5)}),
    "2^32 - 1 layers": gguf(keys={"llama.block_count": number(2**32 - 1)}),
    "2^63 layers": gguf(keys={"llama.block_count": (U64, struct.pack("<Q", 2**63))}),
    "width as a text": gguf(keys={"llama.embedding_length": (STRING, text("8"))}),
    "a width of 2^32 - 1": gguf(keys={"llama.embedding_length": number(2**32 - 1)}),
    "a norm of nan": gguf(keys={"llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", float("nan")))}),
    "no vocabulary": gguf(tensors={"token_embd.weight": None}),
    "a tensor too few": gguf(tensors={"blk.0.ffn_down.weight": None}),
    "a tensor too many": gguf(tensors={"blk.1.ffn_down.weight": ((8, 8), PLAIN, END)}) + bytes(256),
    "a weight that is nan": gguf(numbers={Q: np.full((8, 8), np.nan, np.float32)}),
    "a weight that is infinite": gguf(numbers={Q: np.full((8, 8), np.inf, np.float32)}),
    "its end missing": gguf()[:-1],
    "its second half missing": gguf()[: len(gguf()) // 2],
}


def test_the_files_that_these_are_made_from_are_imported(tmp_path):
    (tmp_path / "model.gguf").write_bytes(gguf())
    assert main(["import", str(tmp_path / "model.gguf"), str(tmp_path / "run")]) == 0
    assert main(["import", str(variant(tmp_path, "tiny_random_llama")), str(tmp_path / "other")]) == 0


@pytest.mark.parametrize("kind", GGUFS)
def test_a_gguf_file_with(tmp_path, capsys, kind):
    (tmp_path / "model.gguf").write_bytes(GGUFS[kind])
    refused(tmp_path / "model.gguf", tmp_path / "run", capsys)


def refused(source: Path, run: Path, capsys) -> str:
    """The one line with which importing ends."""
    assert main(["import", str(source), str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("gptjax: ") and "\n" not in error and str(source) in error, error
    assert not run.exists()
    return error


def header(tensors: object, numbers: int = 0) -> bytes:
    content = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(content)) + content + bytes(numbers)


def entry(shape: object = (2, 2), begin: int = 0, end: int = 16, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


WEIGHTS = {
    "nothing in it": b"",
    "a header of 100 GB": struct.pack("<Q", 10**11) + b"{}",
    "a header of 2^63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header beyond its end": struct.pack("<Q", 1000) + b"{}",
    "a header that is no JSON": header(b"{'a': 1}"),
    "a header of nested lists": header(b"[" * 100_000),
    "a header that is a list": header([entry()], 16),
    "no tensor": header({}),
    "tensors on each other": header({"a": entry(), "b": entry((2, 2), 8, 24)}, 24),
    "a hole between tensors": header({"a": entry(), "b": entry((2, 2), 20, 36)}, 36),
    "a tensor beyond its end": header({"a": entry()}, 8),
    "numbers left over": header({"a": entry()}, 32),
    "another size than its shape": header({"a": entry((3, 3))}, 16),
    "a size of 2^60": header({"a": entry((HUGE, HUGE))}, 16),
    "a negative size": header({"a": entry((-2, -2))}, 16),
    "an end before the beginning": header({"a": entry((2, 2), 16, 0)}, 16),
    "a tensor of no type": header({"a": entry(dtype="F99")}, 16),
    "names of no model": header({"a": entry()}, 16),
    "a zipped pickle": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04\x95" + bytes(100),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_safetensors_file_with(tmp_path, capsys, kind):
    source = variant(tmp_path, "tiny_random_llama")
    (source / "model.safetensors").write_bytes(WEIGHTS[kind])
    error = refused(source, tmp_path / "run", capsys)
    assert "pickle" not in kind or "is a pickle, which is never read; save the model as safetensors" in error


CONFIGS = {
    "nested lists": "[" * 100_000,
    "a number of 10,000 digits": '{"model_type": ' + "9" * 10_000 + "}",
    "no text": b"\xff\xfe\x00",
    "10^9 layers": {"num_hidden_layers": 10**9},
    "a vocabulary of 2^60": {"vocab_size": HUGE},
    "a width of 2^60": {"hidden_size": HUGE},
    "2^60 heads": {"num_attention_heads": HUGE},
    "an MLP of 2^60": {"intermediate_size": HUGE},
    "a context of nan": {"max_position_embeddings": float("nan")},
    "an infinite norm": {"rms_norm_eps": float("inf")},
}


@pytest.mark.parametrize("family", ["tiny_random_llama", "tiny_random_qwen3"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_with(tmp_path, capsys, kind, family):
    content = CONFIGS[kind]
    source = variant(tmp_path, family, content if isinstance(content, dict) else None)
    if not isinstance(content, dict):
        content = content.encode() if isinstance(content, str) else content
        (source / "config.json").write_bytes(content)
    refused(source, tmp_path / "run", capsys)


NAMES = ["../other.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "absent.safetensors", "a\0b", "folder",
         "loop", "pipe"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_an_index_that_names(tmp_path, capsys, name):
    source = variant(tmp_path, "tiny_random_llama")
    (source / "model.safetensors").rename(source.parent / "other.safetensors")
    (source / "folder").mkdir()
    (source / "loop").symlink_to(source / "loop")
    os.mkfifo(source / "pipe")  # whose reader would wait for ever
    index = {"weight_map": {"model.norm.weight": name}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "run", capsys)


def test_what_is_no_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", tmp_path / "run", capsys)
    (tmp_path / "pickle.pt").write_bytes(b"PK\x03\x04")
    refused(tmp_path / "pickle.pt", tmp_path / "run", capsys)


def test_weights_that_are_not_finite(tmp_path, capsys):
    def spoil(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
        return tensors

    error = refused(variant(tmp_path, "tiny_random_llama", change=spoil), tmp_path / "run", capsys)
    assert "tensor model.layers.1.mlp.up_proj.weight holds weights that are not finite" in error


def test_of_a_file_that_is_damaged_or_a_disk_that_is_full_nothing_is_left(tmp_path, capsys, monkeypatch):
    source, run = FIXTURES / "tiny_random_llama", tmp_path / "run"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gptjax.runs.run.write_json", full)
        assert main(["import", str(source), str(run)]) == 2
    assert "No space left on device" in capsys.readouterr().err and not run.exists()
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", lambda self: (_ for _ in ()).throw(CheckpointError("no space")))
        assert main(["import", str(source), str(run)]) == 2
    error = capsys.readouterr().err.strip()
    assert "no space" in error and "\n" not in error and [p.name for p in run.iterdir()] == ["notes.txt"]
    assert main(["import", str(source), str(run)]) == 0 and Run.existing(run)


MEMORY = """
import re, sys
from gptjax.cli import main
import gptjax.api, gptjax.interop.importing, gguf, huggingface_hub, safetensors, jax
from orbax.checkpoint import v1
jax.devices()
def peak(): return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
before = peak()
for source in sys.argv[2:]:
    code = main(["import", source, sys.argv[1]])
    print(code, int(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux counts it")
def test_the_most_that_a_file_can_claim_takes_little_memory(tmp_path):
    """The largest headers that are read at all, and claims that no file could hold."""
    most, no_model = MOST_HEADER - 2000, {"general.architecture": None}
    files = {
        "texts": gguf(no_model, more=key("a", ARRAY, array(STRING, most // 10, text("ab") * (most // 10)))),
        "bytes": gguf(no_model, more=key("a", ARRAY, array(U8, most, bytes(most)))),
        "claims": GGUFS["2^60 tensors"],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    sources = [tmp_path / f"{name}.gguf" for name in files]
    sources.append(variant(tmp_path, "tiny_random_llama"))
    save_file({f"{i:030}": np.zeros(1, np.float32) for i in range(70_000)}, sources[-1] / "model.safetensors")
    lines = run_python(MEMORY, tmp_path / "run", *sources).stdout.splitlines()
    for line, source in zip(lines, sources, strict=True):
        code, used = map(int, line.split())
        print(f"{source.name}: exit code {code}, {used} MB")
        assert code == 2 and used <= 300
    assert not (tmp_path / "run").exists()
