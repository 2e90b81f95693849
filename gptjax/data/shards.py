"""The files of a prepared split: pages of its token stream in ArrayRecord shards, and TFDS's description of them."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptjax.data.corpus import example_type
from gptjax.data.manifest import DATASET, SplitEntry, file_entry

PAGE = 4096  # tokens a record
SHARD_BYTES = 64 << 20


class SplitWriter:
    """Writes one split's stream of tokens as pages, under temporary names until the number of shards is known."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.folder, self.name, self.dtype = folder, name, dtype
        self.buffer = np.empty(PAGE, dtype)
        self.filled = self.tokens = self.documents = self.bytes = 0
        self.page_starts: list[int] = []
        self.starts_path = folder / f"{DATASET}-{name}.starts.int64"
        self.starts_file: BinaryIO = self.starts_path.open("wb")
        self.shard: Any = None
        self.shard_pages: list[int] = []

    def add(self, tokens: np.ndarray, starts: np.ndarray, num_bytes: int) -> None:
        """Appends tokens, of num_bytes of text; documents begin at the given offsets in them, in rising order."""
        self.starts_file.write((starts + self.tokens).astype("<i8").tobytes())
        self.documents += len(starts)
        self.bytes += num_bytes
        at = 0
        while at < len(tokens):
            part = tokens[at : at + PAGE - self.filled]
            low, high = np.searchsorted(starts, [at, at + len(part)])
            self.page_starts += (starts[low:high] - at + self.filled).tolist()
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            at += len(part)
            if self.filled == PAGE:
                self._flush()
        self.tokens += len(tokens)

    def finish(self) -> SplitEntry:
        """Gives every shard its final name."""
        if self.filled:
            self._flush()
        self._close_shard()
        self.starts_file.close()
        template = _template(self.folder, self.name)
        shards = []
        for i, pages in enumerate(self.shard_pages):
            path = Path(template.sharded_filepath(shard_index=i, num_shards=len(self.shard_pages)))
            os.replace(self._partial(i), path)
            shards.append(file_entry(path, pages))
        return SplitEntry(self.documents, self.tokens, self.bytes, tuple(shards), file_entry(self.starts_path))

    def _flush(self) -> None:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        if self.shard is None or self.shard_pages[-1] * PAGE * self.dtype.itemsize >= SHARD_BYTES:
            self._close_shard()
            path = self._partial(len(self.shard_pages))
            self.shard = array_record_module.ArrayRecordWriter(str(path), "group_size:1,uncompressed")
            self.shard_pages.append(0)
        page = example_type()()
        arrays = {"tokens": self.buffer[: self.filled], "starts": np.array(self.page_starts, np.int32)}
        for name, values in arrays.items():
            little = values.astype(values.dtype.newbyteorder("<"))
            page.features.feature[name].bytes_list.value.append(little.tobytes())
        with _system_errors(self._partial(len(self.shard_pages) - 1)):
            # TFDS's own serializer leaves the order of the features to a hash that differs from process to process.
            self.shard.write(page.SerializeToString(deterministic=True))
        self.shard_pages[-1] += 1
        self.filled, self.page_starts = 0, []

    def _close_shard(self) -> None:
        if self.shard is not None:
            with _system_errors(self._partial(len(self.shard_pages) - 1)):
                self.shard.close()

    def _partial(self, shard: int) -> Path:
        return self.folder / f"{DATASET}-{self.name}-{shard:05d}.partial"


@contextlib.contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Raises as OSError, as other files do, what array_record raises as RuntimeError: a full disk."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(errno.EIO, str(error).split(";")[0], str(path)) from error


def _template(folder: Path, split: str) -> Any:
    import tensorflow_datasets as tfds

    data_dir: Any = folder  # annotated as a path of etils, for which any will do
    return tfds.core.ShardedFileTemplate(
        data_dir=data_dir, dataset_name=DATASET, split=split, filetype_suffix="array_record"
    )


def write_tfds_metadata(folder: Path, splits: dict[str, SplitEntry], dtype: np.dtype) -> None:
    """Writes the files by which TFDS reads the folder."""
    import tensorflow_datasets as tfds

    types = {"tokens": dtype.type, "starts": np.int32}
    tensors = {name: tfds.features.Tensor(shape=(None,), dtype=t, encoding="bytes") for name, t in types.items()}
    infos = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard.pages for shard in split.shards],
            num_bytes=sum(shard.size for shard in split.shards),
            filename_template=_template(folder, name),
        )
        for name, split in splits.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder),
        features=tfds.features.FeaturesDict(tensors),
        split_infos=infos,
        filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        check_data=False,
    )
