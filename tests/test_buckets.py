"""Run folders in buckets: the same promises as on a disk, from stores that can neither append, rename nor lock."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import pytest
from commands import curve, finish, free_port, pretrain, start
from fsspec.implementations.memory import MemoryFileSystem

from gptjax.cli import main
from gptjax.config import CheckpointConfig, ModelConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.runs.checkpoint import Checkpoints
from gptjax.runs.run import Run, load_config
from gptjax.storage import StorageError, filesystem, lease, resolve_path
from gptjax.storage import bucket as bucket_module
from gptjax.storage.bucket import SCHEMES, Scheme
from gptjax.storage.lease import Lease
from gptjax.training.metrics_file import MetricsFile

CFG = CheckpointConfig(keep_newest=1)
RUN = "s3://bucket/run"


class Killed(BaseException):
    """kill -9, as far as a store can see it: nothing more comes."""


class Fake(MemoryFileSystem):
    """A store in memory that can be killed before its n-th write or delete, and can stop to answer."""

    protocol, cachable = "fake", False
    store: dict = {}
    pseudo_dirs = [""]
    left: float = float("inf")
    answers = True

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("s3://"))

    @classmethod
    def count(cls):
        if cls.left <= 0:
            raise Killed
        cls.left -= 1

    @classmethod
    def ask(cls):
        if not cls.answers:
            raise RuntimeError("the store\ndoes not answer")

    def info(self, path, **kwargs):
        self.ask()
        return super().info(path, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self.ask()
        return super().ls(path, detail, **kwargs)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self.count()
        return super().pipe_file(path, value, mode=mode, **kwargs)

    def put_file(self, lpath, rpath, **kwargs):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def rm_file(self, path):
        self.count()
        return super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        for key in self.find(path):  # an object store knows no order
            self.rm_file(key)

    def cp_file(self, path1, path2, **kwargs):
        self.pipe_file(path2, self.cat_file(path1))


@pytest.fixture
def fake(monkeypatch, tmp_path):
    fsspec.register_implementation("fake", Fake, clobber=True)
    monkeypatch.setitem(SCHEMES, "s3", Scheme("fake", "fsspec", "s3", direct=False))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, value in {"store": {}, "left": float("inf"), "answers": True}.items():
        monkeypatch.setattr(Fake, name, value)
    bucket_module.open_bucket.cache_clear()
    yield Fake
    bucket_module.open_bucket.cache_clear()


def reborn(fake) -> None:
    """Another process: it remembers nothing, and its writes arrive."""
    fake.left = float("inf")
    bucket_module.open_bucket.cache_clear()


def make_state(step: int) -> dict:
    return {"params": {"w_D": jnp.arange(8.0) + step}}


def commit(checkpoints: Checkpoints, step: int, **first) -> None:
    """Saves a step, and waits until it is committed."""
    checkpoints.save(step, make_state(step), {"row": step}, {}, **first)
    checkpoints.wait()


SHAPES = jax.eval_shape(make_state, 0)


# Names.


@pytest.mark.parametrize("text", ["ftp://bucket/run", "gs:///run", "gs://bucket", "gs://bucket/", "s3://b/../run"])
def test_what_is_no_place_for_a_run_is_refused_in_one_line(text):
    with pytest.raises(InputError, match="wanted a folder, or gs://BUCKET/FOLDER or s3://BUCKET/FOLDER") as e:
        resolve_path(text)
    assert str(e.value).startswith(text) and "\n" not in str(e.value)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(SCHEMES, "gs", Scheme("gcs", "no_such_package", "gcs", direct=True))
    bucket_module.open_bucket.cache_clear()
    with pytest.raises(InputError, match=r"needs the package no_such_package; .*pip install 'gptjax\[gcs\]'"):
        resolve_path("gs://bucket/run")


def test_a_place_in_a_bucket_is_kept_as_it_was_written_and_every_other_name_is_a_folder_of_the_file_system(fake):
    assert str(resolve_path(RUN + "/") / "x") == RUN + "/x" and str(resolve_path(resolve_path(RUN))) == RUN
    for text in ("runs/a", "/runs/a", "a:b", "C:/x", "s3/x"):
        assert resolve_path(text) == Path(text) and type(filesystem(resolve_path(text))).__name__ == "Disk"


# Kills.


def save(step: int, log: Path) -> None:
    """A step of a run: its line in the log, its checkpoint, and the delete of the one before."""
    checkpoints = Checkpoints(resolve_path(RUN) / "checkpoints", CFG)
    MetricsFile(log).write({"step": step, "loss": 0.5})
    commit(checkpoints, step, first=Run.at(RUN).push_logs)
    checkpoints.retain([])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(("step", "stride"), [(1, 5), (2, 1)])
def test_a_kill_at_any_operation_leaves_a_sound_step_and_the_log_up_to_it(fake, step, stride):
    log = Run.at(RUN).metrics_path
    log.parent.mkdir(parents=True)
    if step == 2:
        save(1, log)
    objects, files = dict(fake.store), [(p, p.read_bytes()) for p in log.parent.iterdir()]
    fake.left = 1000
    save(step, log)
    operations = int(1000 - fake.left)
    assert operations > 15
    seen = set()
    for n in range(operations, -1, -stride):
        fake.store.clear()
        fake.store.update(objects)
        filesystem(resolve_path(RUN)).clear(resolve_path(RUN))
        log.parent.mkdir()
        for path, data in files:
            path.write_bytes(data)
        fake.left = n
        with contextlib.suppress(Killed, FileNotFoundError):
            save(step, log)
        reborn(fake)
        sealed = [k for k in fake.store if k.endswith("manifest.json")]
        checkpoints = Checkpoints(resolve_path(RUN) / "checkpoints", CFG)
        newest = checkpoints.newest() or 0
        seen.add(newest)
        assert len(sealed) == len(checkpoints.steps())
        Run.at(RUN).pull(log)
        assert [line["step"] for line in MetricsFile(log).read()][:newest] == list(range(1, newest + 1))
        if not newest:
            assert not [k for k in fake.store if "checkpoints/" in k], "what was unfinished is gone"
        else:
            assert all(checkpoints.verify(s) == [] for s in checkpoints.steps()), n
            if n % 8 == 0:  # a restore takes long
                found, state, data, _ = checkpoints.restore(SHAPES)
                assert (found, data["row"]) == (newest, newest)
                assert state["params"]["w_D"].tolist() == make_state(newest)["params"]["w_D"].tolist()
    assert seen == {step - 1, step}


def test_a_store_that_does_not_answer_is_not_taken_for_an_empty_one(fake):
    checkpoints = Checkpoints(resolve_path(RUN), CFG)
    commit(checkpoints, 1)
    before = set(fake.store)
    fake.answers = False
    for ask in (checkpoints.steps, checkpoints.clean, lambda: load_config(RUN)):
        with pytest.raises(StorageError, match="the store does not answer") as e:
            ask()
        assert isinstance(e.value, InputError) and isinstance(e.value, OSError)
        assert str(e.value).startswith("s3://bucket/run") and "\n" not in str(e.value)
    assert set(fake.store) == before


@pytest.mark.parametrize(
    ("error", "code", "failed"),
    [(RuntimeError("no answer"), 75, 75), (PermissionError("no"), 2, 3), (OSError("Forbidden: b"), 2, 3)],
)
def test_an_outage_ends_a_verb_so_that_it_is_started_again_and_a_refusal_for_good(
    fake, monkeypatch, error, code, failed
):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(Fake, "info", fail)
    monkeypatch.setattr(Fake, "pipe_file", fail)
    assert main(["checkpoint", "list", RUN]) == code
    monkeypatch.setattr(
        "gptjax.stages.pretrain.pretrain",
        lambda *_: filesystem(resolve_path(RUN)).make_writable(resolve_path(RUN), "a run"),
    )
    assert main(["pretrain", "quickstart"]) == code  # also where the error was put into other words

    def save(*_) -> None:
        checkpoints = Checkpoints(resolve_path(RUN), CFG, readonly=True)
        checkpoints.readonly = False
        commit(checkpoints, 1)

    monkeypatch.setattr("gptjax.stages.pretrain.pretrain", save)
    assert main(["pretrain", "quickstart"]) == failed


def test_several_processes_are_refused_where_one_would_have_to_upload_all(fake, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="2 processes train this run, .*; wanted a gs:// or a shared --run-dir"):
        Run.open(RUN, TrainConfig())
    assert not fake.store, "it is told before anything is made"


# Runs.


def test_a_run_in_a_bucket_has_its_settings_and_starts_with_an_empty_mirror(fake):
    cfg = TrainConfig(steps=100, model=ModelConfig(num_layers=2, width=64, num_heads=4))
    stale = Run.at(RUN).local / "data" / "manifest.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run of this name")
    run = Run.open(RUN, cfg)
    assert load_config(RUN) == cfg and not stale.exists()
    run.data.mkdir()
    (run.data / "manifest.json").write_text("{}")
    (run.data / "a").write_bytes(b"12")
    run.push(run.data)
    run.close()
    filesystem(run.folder).clear(run.folder)
    again = Run.open(RUN, cfg)
    again.pull(again.data)
    assert sorted(p.name for p in again.data.iterdir()) == ["a", "manifest.json"]
    again.close()
    with pytest.raises(InputError, match="s3://bucket/other: no folder"):
        Run.existing("s3://bucket/other")


def test_only_what_changed_is_transferred_and_the_bucket_has_the_truth(fake):
    run = Run.at(RUN)
    run.data.mkdir(parents=True)
    for name in ("a", "b", "c", "manifest.json"):
        (run.data / name).write_text(name)
    run.push(run.data)
    fake.left = 0
    run.push(run.data)  # nothing to write
    fake.left = 1
    (run.data / "b").write_text("longer")
    run.push(run.data)
    fake.left = float("inf")
    objects = filesystem(run.folder)
    assert objects.read(run.folder / "data" / "b") == b"longer"
    (run.data / "c").write_text("torn")
    (run.data / "stranger").write_text("")
    run.pull(run.data)
    assert {p.name: p.read_text() for p in run.data.iterdir()} == {
        "a": "a", "b": "longer", "c": "c", "manifest.json": "manifest.json",
    }  # fmt: skip


def test_a_killed_upload_leaves_no_half_of_a_folder(fake):
    folders = {
        "data": ("manifest.json", "page", "tokenizer_meta.json"),
        "data/one": ("manifest.json", "page", "tokenizer_meta.json"),
        "data/shared-tokenizer": ("tokenizer.model", "tokenizer_meta.json", "vocab.json"),
        "tokenizer": ("tokenizer.model", "tokenizer_meta.json", "vocab.json"),
    }
    run = Run.at(RUN)

    def here() -> set[str]:
        return {p.relative_to(run.local).as_posix() for p in run.local.rglob("[!.]*") if p.is_file()}

    whole = {f"{folder}/{name}" for folder, names in folders.items() for name in names}
    for n in range(len(whole) + 1):
        fake.store.clear()
        filesystem(run.folder).clear(run.folder)
        for path in whole:
            (run.local / path).parent.mkdir(parents=True, exist_ok=True)
            (run.local / path).write_text(path)
        fake.left = n
        with contextlib.suppress(Killed):
            run.push(run.data, run.tokenizer)
        reborn(fake)
        run.pull(run.data, run.tokenizer)
        assert here() == whole, "the start after it needs what was made"
        filesystem(run.folder).clear(run.folder)  # as on another machine
        run.pull(run.data, run.tokenizer)
        got = here()
        for folder, names in folders.items():
            assert sum(f"{folder}/{name}" in got for name in names) in (0, len(names)), (n, folder)
        assert n < len(whole) or got == whole


# Leases.


@pytest.fixture
def hold(fake, monkeypatch):
    """Takes the lease of the run, in a hurry."""
    for name, value in {"BEAT": 0.05, "LEASE": 0.6, "POLL": 0.05}.items():
        monkeypatch.setattr(lease, name, value)
    objects = filesystem(resolve_path(RUN))
    return lambda: Lease(objects, resolve_path(RUN))


@pytest.fixture
def no_beat(monkeypatch):
    """Holders give no sign of life, as a process that was stopped."""
    monkeypatch.setattr(Lease, "_keep", lambda self: None)


def test_a_run_is_held_by_one_process_and_given_up_at_once(hold):
    first = hold()
    with pytest.raises(InputError, match=f"is being trained by process {os.getpid()} on .*--run-dir") as e:
        hold()
    assert "\n" not in str(e.value)
    first.release()
    start = time.monotonic()
    second = hold()
    assert time.monotonic() - start < 0.5 and second.term == 2
    names = filesystem(resolve_path(RUN)).names(resolve_path(RUN) / ".lease")
    assert names == ["00000002", "00000002.beat"], "what is over is removed"
    second.release()


def test_a_holder_without_a_sign_of_life_loses_the_run_and_is_told(hold, no_beat):
    first = hold()
    start = time.monotonic()
    second = hold()
    assert time.monotonic() - start >= 0.6
    with pytest.raises(InputError, match="was taken over by process"):
        first.check(now=True)
    with pytest.raises(InputError, match="was taken over"):
        first.check()
    second.check(now=True)
    second.release()


def test_a_dead_process_of_this_machine_holds_nothing(hold, no_beat, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    identity = {"boot": "b", "namespace": "n", "ticks": "1", "pid": gone.pid}
    monkeypatch.setattr(lease, "_identity", lambda: identity)
    hold()
    monkeypatch.setattr(lease, "LEASE", 60.0)
    assert hold().term == 2  # or this would take a minute


def test_of_many_that_want_a_run_at_once_one_gets_it(hold, monkeypatch):
    objects, held, refused = filesystem(resolve_path(RUN)), [], []
    create, together = objects.create, threading.Barrier(8)

    def create_together(*args):
        together.wait(20)  # each has seen that nobody holds the run
        create(*args)

    monkeypatch.setattr(objects, "create", create_together)

    def want():
        try:
            held.append(hold())
        except InputError as e:
            refused.append(e)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 7)
    held[0].release()


def test_one_that_was_slow_does_not_get_a_term_that_is_over(hold, monkeypatch):
    objects = filesystem(resolve_path(RUN))
    create = objects.create

    def create_late(*args):
        monkeypatch.setattr(objects, "create", create)
        hold().release()
        hold()  # which removes the first term
        create(*args)

    monkeypatch.setattr(objects, "create", create_late)
    with pytest.raises(InputError, match="taken over by process"):
        hold()


def test_a_lost_run_is_neither_committed_nor_deleted_from(hold, no_beat):
    checkpoints = Checkpoints(resolve_path(RUN) / "checkpoints", CFG)
    commit(checkpoints, 1)
    filesystem(resolve_path(RUN)).lock(resolve_path(RUN))
    commit(checkpoints, 2)
    hold()
    with pytest.raises(Exception, match="taken over"):
        commit(checkpoints, 3)
    with pytest.raises(InputError, match="taken over"):
        checkpoints.retain([])
    assert checkpoints.steps() == [1, 2]


def test_the_old_owner_leaves_a_step_of_the_new_one_untouched(hold, no_beat):
    objects = filesystem(resolve_path(RUN))
    checkpoints = Checkpoints(resolve_path(RUN) / "checkpoints", CheckpointConfig())
    objects.lock(resolve_path(RUN))
    theirs = Checkpoints(resolve_path(RUN) / "checkpoints", CheckpointConfig(), readonly=True).path(1)

    def taken_over() -> None:
        hold()
        objects.write(theirs / "manifest.json", b"of the new owner")
        objects.write(theirs / "page", b"of the new owner")

    with pytest.raises(InputError, match="taken over"):
        commit(checkpoints, 1, first=taken_over)
    assert objects.read(theirs / "manifest.json") == objects.read(theirs / "page") == b"of the new owner"


# Real protocols, on loopback.

PACKAGES = {"gs": ("gcsfs", "gcp_storage_emulator"), "s3": ("s3fs", "moto", "flask")}


@contextlib.contextmanager
def serve(kind: str, patch: pytest.MonkeyPatch):
    if missing := [p for p in PACKAGES[kind] if importlib.util.find_spec(p) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'gptjax[dev]'")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    settings = {
        "gs": {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "a",
               "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"},
        "s3": {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
               "AWS_DEFAULT_REGION": "us-east-1"},
    }[kind]  # fmt: skip
    for name, value in settings.items():
        patch.setenv(name, value)
    command = [sys.executable, str(Path(__file__).with_name("bucket_server.py")), kind, str(port)]
    process = start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None and "ready\n" in iter(process.stdout.readline, "")
        bucket_module.open_bucket.cache_clear()
        yield
    finally:
        process.kill()
        process.wait()
        bucket_module.open_bucket.cache_clear()


@pytest.fixture(scope="module")
def kind(request, words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(words.parent / "cache"))
        with serve(request.param, patch):
            yield request.param


@pytest.mark.parametrize("kind", ["gs", "s3"], indirect=True)
def test_a_store_has_what_the_promises_are_made_of(kind, tmp_path):
    folder = resolve_path(f"{kind}://bucket/store")
    objects = filesystem(folder)
    objects.make_writable(folder, "a run")
    objects.create(folder / "a", b"1")
    with pytest.raises(FileExistsError):
        objects.create(folder / "a", b"2")
    assert objects.read(folder / "a") == b"1"
    objects.write(folder / "d" / "b", b"x" * 100)
    assert objects.sizes(folder) == {"a": 1, "d/b": 100} and sorted(objects.names(folder)) == ["a", "d"]
    assert objects.is_file(folder / "a") and objects.is_folder(folder / "d") and not objects.is_file(folder / "d")
    assert abs(objects.seconds(folder / "a") - time.time()) < 60
    assert list(objects.infos(folder / "a")) == [""] and objects.infos(folder / "none") == {}
    objects.move(folder / "d", folder / "e", "b")
    assert objects.sizes(folder) == {"a": 1, "e/b": 100}
    objects.discard(folder / "e", "b")
    objects.remove(folder / "none")
    objects.remove(folder / "a")
    assert objects.names(folder) == [] and not objects.is_folder(folder)
    with pytest.raises(FileNotFoundError):
        objects.read(folder / "a")
    with pytest.raises(InputError, match=r"://nowhere/run: a run can't be written there"):
        objects.make_writable(resolve_path(f"{kind}://nowhere/run"), "a run")


SETTINGS = """
--steps 40 --model.num-layers 2 --model.width 32 --model.num-heads 2 --model.dtype float32 --model.dropout 0.1
--tokenizer.kind bytes --tokenizer.vocab-size 258 --data.length 32 --data.batch-size 8
--evaluate.every 20 --evaluate.max-rows 8 --checkpoint.every 10 --checkpoint.keep-best 1 --no-sample
"""


GS_AND_S3 = ["gs", pytest.param("s3", marks=pytest.mark.exhaustive)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, words) -> Path:
    """The run on this machine's disk."""
    run = tmp_path_factory.mktemp("disk") / "run"
    code, errors = finish(pretrain(run, words, SETTINGS, "--sinks"))
    assert code == 0, errors
    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", GS_AND_S3, indirect=True)
def test_a_killed_run_in_a_bucket_has_the_curve_of_one_on_a_disk(kind, uninterrupted, words):
    folder = resolve_path(f"{kind}://bucket/killed")
    objects, run = filesystem(folder), Run.at(folder)
    process = pretrain(str(folder), words, SETTINGS)
    while not objects.is_file(folder / "checkpoints" / "00000010" / "manifest.json") and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    code, errors = finish(process)
    assert code == -signal.SIGKILL, errors
    logged = [line["step"] for line in map(json.loads, objects.read(folder / "metrics.jsonl").splitlines())]
    assert logged[:10] == list(range(1, 11)), "every line up to the committed step is in the bucket"
    objects.clear(folder)  # as on another machine
    code, errors = finish(pretrain(str(folder), words, SETTINGS))
    assert code == 0 and "resumed" in errors, errors
    assert curve(objects.read(folder / "metrics.jsonl")) == curve((uninterrupted / "metrics.jsonl").read_bytes())
    objects.clear(folder)
    checkpoints = Checkpoints(run.checkpoints, CFG, readonly=True)
    same = Checkpoints(uninterrupted / "checkpoints", CFG, readonly=True)
    assert checkpoints.steps() == same.steps() and all(checkpoints.verify(s) == [] for s in checkpoints.steps())
    digests = [json.loads(c.store.read(c.path(40) / "digests" / "data.json")) for c in (checkpoints, same)]
    assert digests[0] == digests[1], "the same weights, bit for bit"
    assert [n for n in objects.names(folder / "tensorboard" / "train") if n.startswith("events")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", GS_AND_S3, indirect=True)
def test_the_verbs_read_a_run_in_a_bucket_as_one_on_a_disk(kind, uninterrupted, words, capsys):
    folder = f"{kind}://bucket/killed"
    if not filesystem(resolve_path(folder)).is_file(resolve_path(folder) / "config.json"):
        assert pretrain(folder, words, SETTINGS).wait(300) == 0
    jax.clear_caches()
    read = ("checkpoint verify {}", "eval {}", "data show {} --step 3", "generate {} --prompt ab --max-new-tokens 3")
    for command in read:
        shown = []
        for run in (folder, str(uninterrupted)):
            assert main(command.format(run).split()) == 0
            shown.append(capsys.readouterr().out.replace(run, "RUN"))
        assert shown[0] == shown[1] and shown[0]
