"""Whatever happens to a checkpoint, it is restored bit for bit or not at all."""

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from corpora import run_python

from gptjax.config import CheckpointConfig, MeshConfig
from gptjax.config.section import InputError
from gptjax.parallel.sharding import make_mesh, shardings, to_global
from gptjax.runs import checkpoint, digest
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.digest import digests, named_leaves
from gptjax.runs.manifest import MANIFEST, write_manifest
from gptjax.storage import StorageError
from gptjax.storage.bucket import is_transient

CFG = CheckpointConfig(every=1, keep_newest=2)
DATA, CONFIG = {"row": 7, "seen": [1, 2]}, {"model.width": 16, "run_dir": "x", "sinks": ["tensorboard"], "lr": 6e-4}


def make_params(scale: float = 1.0) -> dict:
    """Every kind of leaf name that a decoder has, with awkward bits among them."""
    rng = np.random.default_rng(0)
    params = {
        "embed_VD": rng.normal(size=(64, 16)).astype(np.float32) * scale,
        "layers": {
            "q_NDHK": rng.normal(size=(2, 16, 4, 4)).astype(np.float32),
            "scale_ND": np.ones((2, 16), np.float32),
        },
    }
    params["embed_VD"][0, :4] = [np.nan, -0.0, np.inf, 1e-42]
    return params


def make_state(scale: float = 1.0) -> dict:
    params = make_params(scale)
    state = {"step": np.int32(5), "key": np.array([1, 2**32 - 1], np.uint32), "params": params}
    state |= {"opt_state": optax.adamw(1e-3).init(params), "half": jnp.arange(8, dtype=jnp.bfloat16)}
    return jax.tree.map(jnp.asarray, state)


def abstract(state, mesh=None):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    where = jax.tree.map(lambda x: one, state) if mesh is None else shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, x, y in zip(named_leaves(a), jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes(), name


def commit(checkpoints: Checkpoints, step: int, state=None, data: dict = DATA, config: dict = CONFIG) -> None:
    """Saves a step, of a small state unless one is given, and waits until it is committed."""
    checkpoints.save(step, {"w_D": jnp.zeros(4)} if state is None else state, data, config)
    checkpoints.wait()


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, the largest last."""
    return sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with the committed steps 10 and 20, to be copied by each test that damages it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, CFG)
    commit(checkpoints, 10, make_state(scale=1.0))
    commit(checkpoints, 20, make_state(scale=2.0), DATA | {"row": 8})
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "checkpoints"))


def test_what_is_restored_is_what_was_saved(folder):
    step, state, data, config = Checkpoints(folder, CFG).restore(abstract(make_state()))
    assert (step, data, config) == (20, DATA | {"row": 8}, CONFIG)
    assert_same_bits(state, make_state(scale=2.0))
    step, state, data, _ = Checkpoints(folder, CFG).restore(abstract(make_state()), step=10)
    assert (step, data) == (10, DATA)
    assert_same_bits(state, make_state(scale=1.0))
    params = {"params": abstract(make_state())["params"]}
    part = Checkpoints(folder, CFG, readonly=True).restore(params, partial=True)[1]
    assert_same_bits(part, {"params": make_state(scale=2.0)["params"]})


def test_a_donated_and_overwritten_state_is_saved_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", CFG)
    state = {"w_DF": jax.random.normal(jax.random.key(0), (512, 2048)), "step": jnp.int32(1)}
    before = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    checkpoints.save(1, state, {}, {})
    for _ in range(3):
        state = overwrite(state)
    checkpoints.wait()
    assert_same_bits(checkpoints.restore(abstract(state))[1], before)


@pytest.mark.parametrize(
    ("saved_on", "restored_on"),
    [({"fsdp": 8}, {"fsdp": 4, "tensor": 2}), ({"data": 8}, None), (None, {"fsdp": 2, "tensor": 2, "data": 2})],
)
def test_a_state_moves_between_meshes_bit_for_bit(tmp_path, saved_on, restored_on):
    a, b = (make_mesh(MeshConfig(**{"data": 1, **m})) if m else None for m in (saved_on, restored_on))
    state = {"params": make_params(), "step": np.int32(5)}
    state = to_global(state, a) if a else jax.tree.map(jnp.asarray, state)
    checkpoints = Checkpoints(tmp_path / "c", CFG)
    commit(checkpoints, 1, state)
    wanted = abstract(state, b)
    restored = checkpoints.restore(wanted)[1]
    assert_same_bits(restored, state)
    assert restored["params"]["embed_VD"].sharding == wanted["params"]["embed_VD"].sharding


def test_a_flipped_bit_in_any_file_is_found_named_and_fallen_back_from(folder, capsys):
    checkpoints = Checkpoints(folder, CFG, readonly=True)
    files = [p for p in files_of(checkpoints.path(20)) if p.stat().st_size]
    assert len(files) >= 10
    rng = np.random.default_rng(0)
    for file in files:
        good = file.read_bytes()
        for place in {0, len(good) - 1, *rng.integers(len(good), size=3).tolist()}:
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            file.write_bytes(bad)
            problems = checkpoints.verify(20)
            assert problems and file.name in " ".join(problems), (file, place)
        if file.name in (MANIFEST, "commit_success.txt") or file.stat().st_size > 10_000:
            assert checkpoints.restore(abstract(make_state()))[0] == 10
            assert file.name in capsys.readouterr().err
        file.write_bytes(good)
    assert checkpoints.verify(20) == []


def test_a_flipped_bit_that_the_manifest_agrees_with_is_found_by_the_leaf_digest(folder, capsys):
    """As if the bit had flipped in memory, before the files were hashed."""
    checkpoints = Checkpoints(folder, CFG, readonly=True)
    largest = files_of(checkpoints.path(20))[-1]
    good = largest.read_bytes()
    needle = make_state(scale=2.0)["params"]["embed_VD"][5].tobytes()
    start = good.index(np.asarray(needle).tobytes())
    for bit in (0, 31, 8 * 40 + 7):
        bad = bytearray(good)
        bad[start + bit // 8] ^= 1 << bit % 8
        largest.write_bytes(bad)
        (checkpoints.path(20) / MANIFEST).unlink()
        write_manifest(checkpoints.path(20), 20)
        assert checkpoints.verify(20) == []
        assert checkpoints.restore(abstract(make_state()))[0] == 10
        assert "params.embed_VD differs" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_cut_file_is_found_and_named(folder, keep):
    checkpoints = Checkpoints(folder, CFG)
    largest = files_of(checkpoints.path(20))[-1]
    size = largest.stat().st_size
    os.truncate(largest, int(size * keep) if keep == 0.5 else keep % size)
    assert checkpoints.restore(abstract(make_state()))[0] == 10
    assert largest.name in checkpoints.problems[0] and f"not {size}" in checkpoints.problems[0]


def test_missing_and_extra_files_are_named_and_an_unsealed_step_does_not_exist(folder):
    checkpoints = Checkpoints(folder, CFG)
    (checkpoints.path(20) / "commit_success.txt").unlink()
    (checkpoints.path(20) / "state" / "stranger").write_text("x")
    assert checkpoints.verify(20) == ["commit_success.txt is missing", "state/stranger should not be there"]
    (checkpoints.path(20) / MANIFEST).unlink()
    assert checkpoints.steps() == [10] and checkpoints.newest() == 10
    assert checkpoints.restore(abstract(make_state()))[0] == 10


def test_an_unsound_step_is_set_aside_so_that_it_never_counts_as_the_newest(folder):
    (folder / "00000020" / "commit_success.txt").unlink()
    Checkpoints(folder, CFG, readonly=True).restore(abstract(make_state()))
    assert Checkpoints(folder, CFG).steps() == [10, 20], "a reader changes nothing"
    checkpoints = Checkpoints(folder, CheckpointConfig(keep_newest=1))
    checkpoints.restore(abstract(make_state()))
    assert checkpoints.steps() == [10] and (folder / "00000020.unsound").is_dir()
    commit(checkpoints, 15)
    assert checkpoints.retain([]) == [10] and checkpoints.steps() == [15]
    commit(checkpoints, 20)
    assert checkpoints.verify(20) == []


@pytest.mark.parametrize("said", [[False], [True, False, False], [True, True, False]])  # to files, marks, arrays
def test_what_another_process_objects_to_is_not_restored_and_not_called_unsound_here(folder, monkeypatch, said, capsys):
    answers = iter([*said, True, True, True, *said])
    monkeypatch.setattr(checkpoint, "all_agree", lambda ok: ok and next(answers))
    checkpoints = Checkpoints(folder, CFG, readonly=True)
    assert checkpoints.restore(abstract(make_state()))[0] == 10
    assert checkpoints.problems == [] and capsys.readouterr().err == ""
    with pytest.raises(InputError, match="step 20: not sound for another process"):
        checkpoints.restore(abstract(make_state()), step=20)


def test_a_problem_is_told_by_the_process_that_has_it(folder, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "process_label", lambda: "process 1 of 2 on host")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(Checkpoints, "_load", lambda *args: (None, None, None, ["it can't be read"]))
    with pytest.raises(InputError, match="no sound checkpoint"):
        Checkpoints(folder, CFG, readonly=True).restore(abstract(make_state()), step=20)
    assert capsys.readouterr().err.startswith("warning: process 1 of 2 on host: checkpoint ")


def test_a_step_under_another_name_is_not_sound(folder):
    shutil.copytree(folder / "00000010", folder / "00000030")
    checkpoints = Checkpoints(folder, CFG)
    assert checkpoints.restore(abstract(make_state()))[0] == 20
    assert "another step" in checkpoints.problems[0]


def test_with_no_sound_step_the_error_says_what_is_wrong_with_each(folder):
    for step in ("00000010", "00000020"):
        (folder / step / "_CHECKPOINT_METADATA").unlink()
    with pytest.raises(InputError, match=r"step 20: _CHECKPOINT_METADATA is missing.*step 10: _CHECK") as e:
        Checkpoints(folder, CFG).restore(abstract(make_state()))
    assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="no checkpoint; it was not saved yet"):
        Checkpoints(folder / "nothing", CFG, readonly=True).restore(abstract(make_state()))
    with pytest.raises(InputError, match="no checkpoint of step 15; there are steps 10, 20"):
        Checkpoints(folder, CFG).restore(abstract(make_state()), step=15)


def test_a_position_in_the_data_that_is_damaged_is_named(folder):
    assert Checkpoints(folder, CFG).data_state(20)
    path = folder / "00000020" / "data" / "data.json"
    path.write_text("{")
    with pytest.raises(InputError, match=f"{path} can't be read .*; see gptjax checkpoint verify"):
        Checkpoints(folder, CFG).data_state(20)


def test_another_shape_type_or_structure_is_refused_by_name_and_not_fallen_back_from(folder):
    checkpoints, wanted = Checkpoints(folder, CFG), abstract(make_state())
    params, where = wanted["params"], wanted["params"]["embed_VD"].sharding
    bigger = jax.ShapeDtypeStruct((128, 16), jnp.float32, sharding=where)
    half = jax.ShapeDtypeStruct((64, 16), jnp.bfloat16, sharding=where)
    for asked, said in (
        (wanted | {"params": params | {"embed_VD": bigger}},
         r"params.embed_VD as float32\[64, 16\].*ask for float32\[128, 16\]"),
        (wanted | {"params": params | {"embed_VD": half}}, r"float32\[64, 16\].*bfloat16\[64, 16\]"),
        (wanted | {"params": params | {"head_DV": half}}, "has no params.head_DV"),
        ({"params": params}, "holds .*, which these settings do not ask for"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            checkpoints.restore(asked)
    assert checkpoints.problems == []


def test_retention_keeps_the_newest_the_multiples_and_the_best(template, tmp_path):
    def kept(best, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for step in (100, 200, 250, 300, 400, 500):
            shutil.copytree(template / "00000010", folder / f"{step:08d}")
        checkpoints = Checkpoints(folder, CheckpointConfig(**settings))
        before = set(checkpoints.steps())
        gone = checkpoints.retain(best)
        assert before - set(gone) == set(checkpoints.steps())
        assert {p.name for p in folder.iterdir()} == {f"{s:08d}" for s in checkpoints.steps()}
        return checkpoints.steps()

    assert kept([], keep_newest=1) == [500]
    assert kept([], keep_newest=2) == [400, 500]
    assert kept([100, 999], keep_newest=1) == [100, 500]
    assert kept([250], keep_newest=1, keep_every=200) == [200, 250, 400, 500]
    assert kept([], keep_newest=1, at=(100, 300, 350)) == [100, 300, 500]


def test_leftovers_of_a_kill_are_removed_and_committed_steps_are_not(folder):
    (folder / "00000030").mkdir()
    (folder / "00000030" / "half").write_text("x")
    (folder / "00000030.orbax-pending").touch()
    for name in ("00000040.orbax-checkpoint-tmp", ".trash-00000005-ab", "notes"):
        (folder / name / "d").mkdir(parents=True)
    (folder / "00000020.orbax-manifest").write_text("{")
    (folder / ".probe-12").write_text("")
    Checkpoints(folder, CFG, readonly=True)
    assert (folder / "00000030").exists(), "a reader must not clean: the run may be training"
    Checkpoints(folder, CFG)
    assert sorted(p.name for p in folder.iterdir()) == ["00000010", "00000020", "notes"]


def test_steps_that_lost_their_manifests_are_not_taken_for_leftovers_of_a_kill(folder):
    (folder / "00000020" / MANIFEST).unlink()
    with pytest.raises(InputError, match="00000020 without manifest.json, though no save was under way") as e:
        Checkpoints(folder, CFG)
    assert "\n" not in str(e.value) and (folder / "00000020" / "state").exists()
    assert Checkpoints(folder, CFG, readonly=True).steps() == [10]


def test_a_listing_that_fails_is_not_taken_for_a_folder_without_checkpoints(folder, monkeypatch):
    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    checkpoints = Checkpoints(folder, CFG)
    for name in ("listdir", "stat"):
        with monkeypatch.context() as patch:
            patch.setattr(f"gptjax.storage.disk.os.{name}", stale)
            with pytest.raises(StorageError, match="can't be read") as e:
                checkpoints.newest()
        assert is_transient(e.value) and "\n" not in str(e.value)
    assert checkpoints.newest() == 20
    assert Checkpoints(folder / "nothing", CFG, readonly=True).newest() is None


KILLED = """
import os, shutil, signal, sys, threading
import jax.numpy as jnp
from gptjax.runs import checkpoint, digest
from gptjax.runs import manifest
from gptjax.config import CheckpointConfig
c = checkpoint.Checkpoints(sys.argv[1], CheckpointConfig(keep_newest=1))
c.save(1, {"w_D": jnp.arange(4.0)}, {"row": 1}, {})
c.wait()
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "hashing":
    manifest.file_sha256 = die
elif sys.argv[2] == "manifest":
    replace = os.replace
    os.replace = lambda a, b: die() if os.path.basename(b) == "manifest.json" else replace(a, b)
elif sys.argv[2] == "delete":
    def rmtree(path, **_):
        os.remove(os.path.join(path, "commit_success.txt"))
        die()
    shutil.rmtree = rmtree
c.save(2, {"w_D": jnp.arange(4.0) + 1}, {"row": 2}, {})
if sys.argv[2] == "write":
    die()
c.wait()
c.retain([])
"""


@pytest.mark.parametrize(("moment", "newest"), [("write", 1), ("hashing", 1), ("manifest", 1), ("delete", 2)])
def test_a_kill_during_a_save_or_a_delete_leaves_the_last_committed_step(tmp_path, moment, newest):
    run_python(KILLED, tmp_path / "c", moment, codes=(-9,))
    checkpoints = Checkpoints(tmp_path / "c", CFG)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [f"{newest:08d}"]
    step, state, data, _ = checkpoints.restore(abstract({"w_D": jnp.zeros(4)}))
    assert (step, data["row"], float(state["w_D"][0])) == (newest, newest, newest - 1)


FULL = """
import resource, signal, sys
import jax.numpy as jnp
from gptjax.runs import checkpoint, digest
from gptjax.config import CheckpointConfig
c = checkpoint.Checkpoints(sys.argv[1], CheckpointConfig())
c.save(1, {"w_D": jnp.zeros(4)}, {}, {})
c.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    c.save(2, {"w_D": jnp.zeros(1_000_000)}, {}, {})
    c.save(3, {"w_D": jnp.zeros(4)}, {}, {})  # the next call raises it, once
except checkpoint.CheckpointError as e:
    print("ERROR", e)
c.check()
print(c.steps(), sorted(p.name for p in c.folder.iterdir()))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
c.save(3, {"w_D": jnp.zeros(4)}, {}, {})
c.wait()
print(c.steps())
"""


def test_a_full_disk_is_an_error_in_the_main_thread_and_costs_only_that_step(tmp_path):
    done = run_python(FULL, tmp_path / "c")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("ERROR checkpoint of step 2 could not be written")
    assert lines[0].endswith("; mend that, then run the same command again to go on")
    assert "Traceback" not in done.stderr, done.stderr
    assert lines[1:] == ["[1] ['00000001']", "[1, 3]"]


def test_hashing_happens_off_the_training_thread_and_check_does_not_wait(tmp_path, monkeypatch):
    begun, go, threads = threading.Event(), threading.Event(), set()
    write = checkpoint.write_manifest

    def slow(folder, step):
        threads.add(threading.current_thread())
        begun.set()
        assert go.wait(20)
        write(folder, step)

    monkeypatch.setattr(checkpoint, "write_manifest", slow)
    checkpoints = Checkpoints(tmp_path / "c", CFG)
    checkpoints.save(1, {"w_D": jnp.zeros(4)}, {}, {})
    assert begun.wait(20)
    checkpoints.check()
    assert checkpoints.steps() == [] and threading.main_thread() not in threads
    go.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]


def test_a_step_that_is_already_saved_is_left_alone(folder):
    checkpoints = Checkpoints(folder, CFG)
    before = json.loads((folder / "00000020" / MANIFEST).read_text())
    commit(checkpoints, 20)
    assert json.loads((folder / "00000020" / MANIFEST).read_text()) == before


def test_describe_counts_what_is_on_the_disk(folder):
    first, second = Checkpoints(folder, CFG).describe()
    files = [p for p in files_of(folder / "00000010") if p.name != MANIFEST]
    assert (first.step, second.step) == (10, 20)
    assert (first.files, first.bytes) == (len(files), sum(p.stat().st_size for p in files))


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_another_program_can_read_the_state(folder):
    from orbax.checkpoint import v1 as ocp

    loaded = ocp.load_checkpointables(str(folder / "00000010"), {"state": None})["state"]
    np.testing.assert_array_equal(loaded["params"]["layers"]["q_NDHK"], make_params()["layers"]["q_NDHK"])


# Digests.


def test_a_digest_depends_neither_on_the_mesh_nor_on_the_blocks_it_is_read_in(monkeypatch):
    meshes = [make_mesh(MeshConfig(**m)) for m in ({"fsdp": 8, "data": 1}, {"fsdp": 2, "tensor": 4, "data": 1})]
    plain = digests(make_params())
    assert all(digests(to_global(make_params(), mesh)) == plain for mesh in meshes)
    assert list(plain) == ["embed_VD", "layers.q_NDHK", "layers.scale_ND"]
    monkeypatch.setattr(digest, "LARGE", 1)
    trees = [make_params(), *(to_global(make_params(), mesh) for mesh in meshes)]
    assert all(digests(tree) == plain for tree in trees)
    with jax.enable_x64(True):  # whose elements are two numbers each
        x = np.random.default_rng(0).standard_normal((6, 5))
        in_blocks = digests({"x": jnp.asarray(x)})
        monkeypatch.setattr(digest, "LARGE", 2**40)
        assert digests({"x": jnp.asarray(x)}) == in_blocks


DTYPES = ["float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool", "int64", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_digest(dtype):
    with jax.enable_x64(dtype.endswith("64")):
        x = np.asarray(jnp.arange(6).reshape(2, 3).astype(dtype))
        before = digests({"x": jnp.asarray(x)})["x"]
        assert x.dtype == dtype
        for bit in range(0, x.nbytes * 8, 8 if dtype == "bool" else 1):
            raw = bytearray(x.tobytes())
            raw[bit // 8] ^= 1 << bit % 8
            y = np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)
            assert digests({"x": jnp.asarray(y)})["x"] != before, bit


def test_exchanged_elements_change_the_digest():
    x = np.ones((64, 64), np.float32)
    x[3, 5], x[3, 6], x[40, 5] = 2.0, -1.0, 4.0
    before = digests({"x": x})["x"]
    for a, b in [((3, 5), (3, 6)), ((3, 5), (40, 5)), ((3, 5), (3, 7)), ((3, 6), (35, 6)), ((0, 0), (40, 5))]:
        y = x.copy()
        y[a], y[b] = x[b], x[a]
        assert digests({"x": y})["x"] != before, (a, b)
    assert digests({"x": x.T.copy()})["x"] != before
