"""A prepared corpus: random access to the token stream of each split, with neither TensorFlow nor TFDS.

A split is one stream of tokens, each document [bos] + ids + [eos], stored as pages in ArrayRecord shards; a table of
document starts lies beside them.
"""

import functools
import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.section import InputError, one_line
from gptjax.data.manifest import MANIFEST_FILE, FileEntry, Manifest, SplitEntry, read_manifest
from gptjax.storage import file_sha256
from gptjax.tokenizer import Tokenizer, load_tokenizer

CACHE_BYTES = 64 << 20  # of decoded pages, for each split
MISSING_TOKEN = np.int32(-1)  # stands for each token of a page that can't be read
_OPEN_SHARDS = 64  # shards a split keeps open
_AGAIN = "delete the folder and prepare it again"


def is_corpus(path: str | Path) -> bool:
    """True for a folder that `prepare` finished."""
    return (Path(path) / MANIFEST_FILE).is_file()


def open_corpus(folder: str | Path) -> "Corpus":
    """Opens a prepared corpus; raises InputError where it is unfinished, or a file is missing or has another size."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    for entry in manifest.all_files:
        path = folder / entry.name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.size:
            got = "is missing" if size is None else f"has {size} bytes"
            raise InputError(f"{path} {got}; wanted {entry.size} bytes; {_AGAIN}")
    return Corpus(folder, manifest)


class Corpus:
    """The splits and the tokenizer of a prepared folder; made by `open_corpus`."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size
        self._splits = {name: CorpusSplit(folder, manifest, entry) for name, entry in manifest.splits.items()}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the corpus was made with."""
        tokenizer = load_tokenizer(self.folder)
        if tokenizer.sha256 != self.manifest.tokenizer_sha256:
            raise InputError(f"{self.folder}: the tokenizer is not the one that made this corpus; prepare it again")
        return tokenizer

    @functools.cached_property
    def sha256(self) -> str:
        """Identity of the data: equal for two corpora whose splits hold the same tokens."""
        total = hashlib.sha256(self.manifest.tokenizer_sha256.encode())
        for name, split in sorted(self.manifest.splits.items()):
            total.update(" ".join([name, *(f.sha256 for f in (*split.shards, split.starts))]).encode())
        return total.hexdigest()

    def split(self, name: str) -> "CorpusSplit":
        """The split called "train" or "validation"."""
        if name not in self._splits:
            raise InputError(f"{self.folder} has no split {name!r}; wanted one of {sorted(self._splits)}")
        return self._splits[name]

    def verify(self) -> None:
        """Reads every file and raises InputError naming the first whose SHA-256 is not the manifest's."""
        for entry in self.manifest.all_files:
            _check_sha256(self.folder, entry)


class DamagedPage(InputError):
    """A page of a shard can't be read; `where` names both."""

    def __init__(self, message: str, where: str):
        super().__init__(message)
        self.where = where


class CorpusSplit:
    """One split's token stream; reads are safe from several threads.

    With `skip_damaged` a page that can't be read is one of MISSING_TOKEN, and `damage` collects the errors, by page.
    """

    def __init__(self, folder: Path, manifest: Manifest, entry: SplitEntry):
        self.num_tokens = entry.tokens
        self.num_documents = entry.documents
        self.num_bytes = entry.bytes
        self._folder, self._manifest, self._entry = folder, manifest, entry
        self._first_page = np.cumsum([0, *(shard.pages for shard in entry.shards)])
        self._pages: OrderedDict[int, np.ndarray] = OrderedDict()
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self.skip_damaged = False
        self.damage: dict[int, DamagedPage] = {}
        self._max_pages = max(8, CACHE_BYTES // (manifest.page * np.dtype(manifest.dtype).itemsize))
        self._lock = threading.Lock()
        self._shard_locks = [threading.Lock() for _ in entry.shards]

    @property
    def starts(self) -> np.ndarray:
        """The first token of each document in the stream: int64[num_documents], rising, mapped from its file."""
        return self._starts

    @functools.cached_property
    def _starts(self) -> np.ndarray:
        # ArrayRecord finds damage in its records by itself; nothing else would find it here.
        _check_sha256(self._folder, self._entry.starts)
        return np.memmap(self._folder / self._entry.starts.name, dtype="<i8", mode="r").view(np.ndarray)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the stream as int32; raises DamagedPage, naming shard and page, or see the class."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        first, offset = divmod(start, self._manifest.page)
        pages = [self._page(index) for index in range(first, (stop - 1) // self._manifest.page + 1)]
        tokens = pages[0] if len(pages) == 1 else np.concatenate([np.zeros(0, np.int32), *pages])
        return tokens[offset : offset + stop - start].astype(np.int32)

    def damage_in(self, start: int, stop: int) -> list[DamagedPage]:
        """The errors of the pages that hold tokens [start, stop), of those that were damaged so far."""
        pages = range(start // self._manifest.page, (stop - 1) // self._manifest.page + 1)
        return [self.damage[page] for page in pages if page in self.damage]

    def _page(self, index: int) -> np.ndarray:
        """A page from the cache, or read and decoded."""
        with self._lock:
            if index in self._pages:
                self._pages.move_to_end(index)
                return self._pages[index]
        shard = int(np.searchsorted(self._first_page, index, side="right")) - 1
        try:
            if index in self.damage:
                raise self.damage[index]
            with self._shard_locks[shard]:  # threads read different shards at a time
                tokens = self._read_page(self._entry.shards[shard], shard, index)
        except DamagedPage as error:
            if not self.skip_damaged:
                raise
            self.damage[index] = error
            return np.full(self._manifest.page, MISSING_TOKEN)
        with self._lock:
            self._pages[index] = tokens
            if len(self._pages) > self._max_pages:
                self._pages.popitem(last=False)
        return tokens

    def _read_page(self, entry: FileEntry, shard: int, index: int) -> np.ndarray:
        path = self._folder / entry.name
        record = index - int(self._first_page[shard])
        where = f"{entry.name} page {record}"
        wanted = min(self._manifest.page, self.num_tokens - index * self._manifest.page)
        try:
            raw = self._reader(shard, path).read([record])[0]
            feature = example_type().FromString(raw).features.feature["tokens"]
            tokens = np.frombuffer(feature.bytes_list.value[0], np.dtype(self._manifest.dtype).newbyteorder("<"))
        except Exception as error:  # array_record and protobuf raise many kinds for damaged bytes
            reason = one_line(error, 120)
            raise DamagedPage(f"{path} is damaged at page {record} ({reason}); {_AGAIN}", where) from None
        if len(tokens) != wanted:
            raise DamagedPage(
                f"{path} is damaged: page {record} has {len(tokens)} tokens, wanted {wanted}; {_AGAIN}", where
            )
        if tokens.max() >= self._manifest.vocab_size:
            raise DamagedPage(
                f"{path}: token id {tokens.max()} on page {record} is outside the vocabulary; "
                f"wanted ids below {self._manifest.vocab_size}; {_AGAIN}",
                where,
            )
        return tokens

    def _reader(self, shard: int, path: Path) -> Any:
        from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

        with self._lock:
            if shard not in self._readers:
                options = "readahead_buffer_size:0,max_parallelism:0"  # both off is what random access wants
                self._readers[shard] = array_record_module.ArrayRecordReader(str(path), options)
                if len(self._readers) > _OPEN_SHARDS:
                    self._readers.popitem(last=False)  # closed when its last user lets go of it
            self._readers.move_to_end(shard)
            return self._readers[shard]


def _check_sha256(folder: Path, entry: FileEntry) -> None:
    if file_sha256(folder / entry.name) != entry.sha256:
        raise InputError(f"{folder / entry.name} is damaged: its sha256 changed; {_AGAIN}")


_EXAMPLE = """
name: "gptjax/example.proto" package: "gptjax" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Feature" field { name: "bytes_list" number: 1 type: TYPE_MESSAGE type_name: "BytesList" } }
message_type {
  name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: "FeatureEntry" }
  nested_type {
    name: "FeatureEntry"
    field { name: "key" number: 1 type: TYPE_STRING }
    field { name: "value" number: 2 type: TYPE_MESSAGE type_name: "Feature" }
    options { map_entry: true }
  }
}
message_type { name: "Example" field { name: "features" number: 1 type: TYPE_MESSAGE type_name: "Features" } }
"""


@functools.cache
def example_type() -> Any:
    """The part of the protobuf message tf.train.Example that a page uses, described here: TensorFlow is not needed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("gptjax.Example"))
