"""Laws of the sources that are no files: datasets by name and by folder, and the user's own functions."""

import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import BYTES, prepared, run_python, stored, take, texts_of
from resume_sources import write_tfds

from gptjax.config import DataConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.data.pipeline import open_pipeline
from gptjax.data.prepare import report
from gptjax.data.sources import source_sha256

TEXTS = ["first\nline", "\u4e2d\u6587", ""] + [f"text {i}" for i in range(300)]


def own_texts() -> Iterator[str]:
    yield from TEXTS


def own_records() -> list[dict]:
    return [{"body": text, "id": 1} for text in TEXTS]


def failing() -> Iterator[str]:
    yield "good"
    raise KeyError("lost")


def numbers() -> list:
    return ["good", 7]


NO_FUNCTION = 5


def write_hf(folder: Path, texts: list, field: str = "text", splits: bool = False) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_dict({field: texts, "id": list(range(len(texts)))})
    made = datasets.DatasetDict({"train": data, "test": data.select([0])}) if splits else data
    made.save_to_disk(str(folder), **({"num_shards": {"train": 3, "test": 1}} if splits else {"num_shards": 2}))
    return folder


def test_a_prepared_tfds_folder_gives_its_texts(tmp_path):
    folder = write_tfds(tmp_path / "own" / "1.0.0", TEXTS, "body")
    assert texts_of(f"tfds:{folder}", "body") == TEXTS
    assert texts_of(f"tfds:{folder}:train", "body") == TEXTS
    again = write_tfds(tmp_path / "copy", TEXTS, "body")
    assert source_sha256(f"tfds:{folder}", "body") == source_sha256(f"tfds:{again}", "body")
    other = write_tfds(tmp_path / "other", TEXTS[1:] + ["new"], "body")
    assert source_sha256(f"tfds:{folder}", "body") != source_sha256(f"tfds:{other}", "body")
    with pytest.raises(InputError, match=r'found no "text" among \[\'body\'\]'):
        texts_of(f"tfds:{folder}")
    with pytest.raises(InputError, match=r"has no split 'test'; wanted one of \['train'\]"):
        texts_of(f"tfds:{folder}:test", "body")


def test_reading_tfds_needs_no_tensorflow(tmp_path):
    folder = write_tfds(tmp_path / "own", TEXTS)
    program = f"""
import sys
from gptjax.data.sources import documents
assert len(list(documents("tfds:{folder}"))) == {len(TEXTS)}
assert "tensorflow" not in sys.modules
"""
    run_python(program)


@pytest.mark.parametrize("how", ["truncated", "zeros", "missing"])
def test_a_broken_array_record_is_named_and_can_be_left_out(tmp_path, how):
    folder = write_tfds(tmp_path / "own", TEXTS)
    shard = folder / "own-train.array_record-00001-of-00002"
    good = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    else:
        at = good.index(b"text 250")
        shard.write_bytes(good[:at] if how == "truncated" else good[:at] + bytes(8) + good[at + 8 :])
    with pytest.raises(InputError, match=rf"{shard.name}: record \d+ cannot be read") as error:
        texts_of(f"tfds:{folder}")
    assert "\n" not in str(error.value)
    read = texts_of(f"tfds:{folder}", max_corrupt=1)
    half = len(TEXTS) // 2
    assert read[:half] == TEXTS[:half] and read == TEXTS[: len(read)]


def test_a_tfds_name_is_prepared_from_mock_data(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=20):
        texts = texts_of("tfds:lm1b")
        assert len(texts) == 20 and texts == texts_of("tfds:lm1b:1.1.0:train")
        corpus = prepared("tfds:lm1b", tmp_path / "out")
        assert (
            prepared("tfds:lm1b", tmp_path / "out").sha256 == corpus.sha256
        )  # the same documents, so the folder is used again
        with pytest.raises(InputError, match="found no .text. among .*book_text"):
            texts_of("tfds:pg19")
    with tfds.testing.mock_data(num_examples=21):
        with pytest.raises(InputError, match="was prepared from 'tfds:lm1b', and the text of 'tfds:lm1b' is another"):
            prepared("tfds:lm1b", tmp_path / "out")
    kept = corpus.manifest.report
    assert kept.documents == 20 and kept.duplicates == 20 - len(set(texts))
    assert sum(split.bytes for split in corpus.manifest.splits.values()) == len("".join(set(texts)).encode())


def test_a_dataset_that_is_not_there_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    cases = {
        "tfds:lm1bb": "TFDS has no dataset 'lm1bb'; did you mean 'lm1b'",
        "tfds:lm1b/foo": "BuilderConfig foo not found",
        "tfds:lm1b:9.9.9": "cannot be loaded at version 9.9.9",
        f"tfds:{tmp_path}/empty": "cannot be opened: Could not read dataset info",
        f"hf:{tmp_path}/empty": "no folder that save_to_disk wrote; for a folder of text, JSONL or Parquet",
        f"hf:{tmp_path}/absent": "no folder that save_to_disk wrote",
        "tfds:": "'tfds:' names no dataset; wanted tfds:NAME or tfds:FOLDER",
        "tfds::train": "names no dataset",
        "hf:": "'hf:' names no dataset; wanted hf:NAME or hf:FOLDER",
        "hf:@small:test": "names no dataset",
    }
    for source, says in cases.items():
        with pytest.raises(InputError, match=says) as error:
            texts_of(source)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_folder_by_save_to_disk_gives_its_texts(tmp_path):
    plain = write_hf(tmp_path / "plain", TEXTS)
    assert texts_of(f"hf:{plain}") == TEXTS
    folder = write_hf(tmp_path / "dict", TEXTS, "body", splits=True)
    assert texts_of(f"hf:{folder}:train", "body") == TEXTS
    assert texts_of(f"hf:{folder}:test", "body") == texts_of(folder, "body") == TEXTS[:1]  # held out is its test split
    assert source_sha256(f"hf:{folder}", "body") != source_sha256(f"hf:{folder}:test", "body")
    with pytest.raises(InputError, match=r"has no split 'dev'; wanted one of \['test', 'train'\]"):
        texts_of(f"hf:{folder}:dev", "body")
    with pytest.raises(InputError, match="is one dataset without splits; leave out :test"):
        texts_of(f"hf:{plain}:test")
    with pytest.raises(InputError, match=r"found no \"text\" among \['body', 'id'\]"):
        texts_of(f"hf:{folder}")
    with pytest.raises(InputError, match='column "id" holds int64'):
        texts_of(f"hf:{plain}", "id")
    with pytest.raises(InputError, match='arrow:2: "text" is null'):
        texts_of(f"hf:{write_hf(tmp_path / 'null', ['a', 'b', 'c', None])}")


def write_splits(folder: Path, **splits: list[str]) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    tables = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    datasets.DatasetDict(tables).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_validation_split_is_what_is_held_out_and_other_splits_are_named(tmp_path, prefix):
    held, extra = ["held one", "held two"], ["extra"]
    folder = write_splits(tmp_path / "saved", extra=extra, train=[*TEXTS[3:], held[0]], test=["test"], validation=held)
    corpus = prepared(f"{prefix}{folder}", tmp_path / "out", validation_fraction=0.5)
    assert stored(corpus) == {"train": TEXTS[3:], "validation": held}  # which is in no training row
    told = report(corpus)
    assert "held out is the split validation" in told and "splits that are not read: extra, test" in told
    assert "HELD OUT" not in told and corpus.manifest.report.duplicates == 1
    assert prepared(folder, tmp_path / "out", validation_fraction=0.1).sha256 == corpus.sha256  # of no effect
    further = DataConfig(source=str(tmp_path / "out"), validation=(f"more={prefix}{folder}",), length=32)
    more = open_pipeline(TrainConfig(data=further, tokenizer=BYTES), Path("none"), training=True).validation[1]
    assert (more.split.num_documents, more.split.num_bytes) == (2, len("".join(held)))
    alone = prepared(f"{prefix}{folder}:extra", tmp_path / "alone")
    assert "splits that are not read: train, test, validation" in report(alone)
    stream = DataConfig(source=f"{prefix}{folder}", loading="stream", batch_size=4, length=32)
    said: list[str] = []
    pipeline = open_pipeline(TrainConfig(data=stream, tokenizer=BYTES), Path("none"), training=True, say=said.append)
    (own,) = pipeline.validation
    tokens = own.split.tokens(0, own.split.num_tokens)
    assert [pipeline.tokenizer.decode(row) for row in np.split(tokens, own.split.starts[1:])] == held
    batch = pipeline.batch(0)
    assert pipeline.tokenizer.decode(batch["inputs_BL"][0].tolist()).startswith("text 0text 1")
    assert len(said) == 2 and all(line.startswith(f"{prefix}{folder}: ") for line in said)


def test_without_a_validation_split_the_test_split_is_held_out(tmp_path):
    folder = write_splits(tmp_path / "saved", train=TEXTS, test=["held"])
    assert stored(prepared(folder, tmp_path / "out"))["validation"] == ["held"]
    with pytest.raises(InputError, match=r"has no split 'train'; wanted one of \['dev', 'test'\], as .*:SPLIT"):
        prepared(write_splits(tmp_path / "other", dev=["a"], test=["b"]), tmp_path / "out2")
    with pytest.raises(InputError, match="has no text to keep in its validation split"):
        prepared(write_splits(tmp_path / "empty", train=["a"], test=[""]), tmp_path / "out3")


def test_a_validation_split_of_tfds_is_held_out_too(tmp_path):
    folder = write_tfds(tmp_path / "own", TEXTS[3:], test=["test one", "test two"], validation=["held one", "held two"])
    corpus = prepared(f"tfds:{folder}", tmp_path / "out")
    assert stored(corpus) == {"train": TEXTS[3:], "validation": ["held one", "held two"]}
    assert "splits that are not read: test" in report(corpus)
    assert texts_of(f"tfds:{folder}:test") == ["test one", "test two"]


@pytest.mark.skipif(bool(urllib.request.getproxies()), reason="a proxy may know hosts that have no address here")
def test_a_hub_without_an_address_is_told_at_once(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    program = """
import sys
from gptjax.cli import main
sys.exit(main(["prepare", "--source", "hf:org/name", "--out", sys.argv[1]]))
"""
    monkeypatch.setenv("HF_ENDPOINT", "https://no-such-host.invalid")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    start = time.monotonic()
    done = run_python(program, tmp_path / "out", codes=(2,))
    assert "source 'hf:org/name' cannot be opened: " in done.stderr and done.stderr.count("\n") == 1
    assert "without a network only what was downloaded before is read" in done.stderr
    assert time.monotonic() - start < 20  # not the half minute of five tries


def test_a_broken_arrow_file_is_named_and_can_be_left_out(tmp_path):
    folder = write_hf(tmp_path / "dict", TEXTS, splits=True)
    whole = texts_of(f"hf:{folder}:train")
    bad = folder / "train" / "data-00001-of-00003.arrow"
    bad.write_bytes(bad.read_bytes()[:200])
    with pytest.raises(InputError, match=f"{bad.name}: row 1 cannot be read"):
        texts_of(f"hf:{folder}:train")
    read = texts_of(f"hf:{folder}:train", max_corrupt=1)
    assert read == whole[:101] + whole[202:]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hf:org/name@small:test", ("org/name", "small", "test")),
        ("hf:name", ("name", None, None)),
        ("hf:name/config:1.0.0:test", ("name/config:1.0.0", None, "test")),
        ("hf:name:1.0.0", ("name:1.0.0", None, None)),
    ],
)
def test_a_hugging_face_name_is_read_by_its_config_and_split(tmp_path, monkeypatch, source, asked):
    datasets = pytest.importorskip("datasets")
    folder = write_hf(tmp_path / "plain", TEXTS)
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        table = datasets.load_from_disk(str(folder))
        return table if split else datasets.DatasetDict({"train": table})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts_of(source) == TEXTS and set(calls) == {asked}
    assert source_sha256(source) == source_sha256(f"hf:{folder}")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: table if split else {"train": table})
    assert texts_of(source) == TEXTS


def test_a_function_is_a_source(tmp_path, monkeypatch):
    here = __name__
    assert texts_of(f"{here}:own_texts") == TEXTS == texts_of(f"{here}:own_records", "body")
    assert source_sha256(f"{here}:own_texts") == source_sha256(f"{here}:own_records", "body")
    cases = {
        f"{here}:failing": "raised KeyError after text 1: 'lost'",
        f"{here}:numbers": "numbers:2 is a int; wanted a str or",
        f"{here}:own_records": 'own_records:1: found no "text" among',
        f"{here}:absent": "wanted module:name of a function",
        f"{here}:NO_FUNCTION": "got a int",
        "no_such_module:texts": "No module named 'no_such_module'",
    }
    for source, says in cases.items():
        with pytest.raises(InputError, match=says):
            texts_of(source)
    (tmp_path / "beside.py").write_text("def texts():\n    return ['found']\n")
    monkeypatch.chdir(tmp_path)
    assert texts_of("beside:texts") == ["found"]
    assert str(tmp_path) not in sys.path


def test_a_function_of_the_users_script_is_prepared_by_several_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import sys
from gptjax.config import PrepareConfig, TokenizerConfig
from gptjax.data import encode
from gptjax.data.prepare import prepare

print("run")
encode.PART_BYTES = 20_000

def texts():
    for i in range(1000):
        yield f"text {{i}} " + "word " * (i % 50)

# No `if __name__ == "__main__"`: the workers must not run the script again.
tokenizer = TokenizerConfig(kind="bytes", vocab_size=258)
corpus = prepare(PrepareConfig(source="__main__:texts", out={str(tmp_path / "out")!r}, workers=2, tokenizer=tokenizer))
print(sum(split.documents for split in corpus.manifest.splits.values()))
"""
    )
    assert run_python(str(script)).stdout.split() == ["run", "1000"]


def test_a_function_that_gives_other_texts_each_time_is_refused(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    monkeypatch.setattr(sys.modules[__name__], "own_texts", lambda: [str(x) for x in rng.integers(0, 1 << 30, 50)])
    with pytest.raises(InputError, match="changed while it was being read"):
        prepared(f"{__name__}:own_texts", tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("library", "source", "extra"), [("datasets", "hf:name", r"\[hf\]"), ("tensorflow_datasets", "tfds:lm1b", "")]
)
def test_a_missing_library_is_one_line(monkeypatch, library, source, extra):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"is not installed; run: pip install '?gptjax{extra}"):
        texts_of(source)


def test_saved_metadata_that_is_damaged_is_named(tmp_path):
    folder = write_hf(tmp_path / "plain", TEXTS)
    (folder / "state.json").write_text(json.dumps(["no object"]))
    with pytest.raises(InputError, match="state.json is damaged"):
        texts_of(f"hf:{folder}")


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name"])
def test_a_data_folder_names_no_code_to_import(tmp_path, monkeypatch, key):
    folder = write_tfds(tmp_path / "own", TEXTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # as `python -m` and a notebook have the current folder
    (tmp_path / "payload.py").write_text("raise SystemExit('code from data')\n")
    path = folder / "features.json"
    assert texts_of(f"tfds:{folder}") == TEXTS
    good = path.read_text()
    for name in (
        "payload.Text",
        "tensorflow_datasets.core.featuresX.Text",
        "tensorflow_datasets.core.features.\u00a0x",
    ):
        path.write_text(good.replace("tensorflow_datasets.core.features.text_feature.Text", name))
        path.write_text(path.read_text().replace("pythonClassName", key))
        with pytest.raises(
            InputError, match="features.json names the class .*; wanted a feature of TFDS itself"
        ) as error:
            texts_of(f"tfds:{folder}")
        assert "\n" not in str(error.value) and "payload" not in sys.modules


def grain_texts():
    import grain

    return grain.MapDataset.source(TEXTS).map(lambda text: {"text": text, "id": 1})


def grain_iterator():
    import grain

    return grain.MapDataset.source(TEXTS).seed(3).shuffle().to_iter_dataset()


def endless_texts():
    return grain_texts().repeat()


def test_a_function_may_return_a_grain_dataset():
    pytest.importorskip("grain", reason="needs the extra gptjax[grain]")
    assert texts_of(f"{__name__}:grain_texts") == TEXTS
    shuffled = texts_of(f"{__name__}:grain_iterator")
    assert (
        shuffled != TEXTS and sorted(shuffled) == sorted(TEXTS) and shuffled == texts_of(f"{__name__}:grain_iterator")
    )
    with pytest.raises(InputError, match="endless_texts.* never ends; leave out .repeat"):
        texts_of(f"{__name__}:endless_texts")


def stream_of(source: str, workers: int):
    data = DataConfig(
        source=source, loading="stream", batch_size=4, length=32, validation_fraction=0.1, workers=workers
    )
    return open_pipeline(TrainConfig(data=data, tokenizer=BYTES), Path("none"), training=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_texts", "grain_iterator"])
def test_a_function_streams_and_resumes_with_any_number_of_workers(name):
    if name == "grain_iterator":
        pytest.importorskip("grain", reason="needs the extra gptjax[grain]")
    source = f"{__name__}:{name}"
    alone = stream_of(source, 0)
    straight = take(alone, alone.start, 80)  # more than a pass
    again = stream_of(source, 2)
    again.check(straight[29][1])
    assert take(again, straight[29][1], 50) == straight[30:]


def test_a_function_that_only_this_process_knows_is_no_source_of_workers(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "script_texts", own_texts, raising=False)
    pipeline = stream_of("__main__:script_texts", 1)
    with pytest.raises(InputError, match="__main__:script_texts' exists in this process alone.*--data.workers 0"):
        next(pipeline.batches(pipeline.start))
