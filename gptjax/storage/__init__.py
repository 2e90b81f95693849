"""Run folders: a folder of a file system, or a prefix in a bucket (gs://, s3://).

`resolve_path` makes a path of a text, `filesystem` returns the operations on it. Both kinds have the same methods:
`Disk` uses renames, appends and POSIX locks, `Bucket` whole objects and a lease.
"""

from gptjax.storage.bucket import Bucket
from gptjax.storage.disk import PROBE, TRASH, Disk, StorageError, probe_in, sync
from gptjax.storage.resolve import check_file, file_sha256, filesystem, resolve_path, write_file, write_json

__all__ = [
    "PROBE", "TRASH", "Bucket", "Disk", "StorageError", "check_file", "file_sha256", "filesystem", "probe_in",
    "resolve_path", "sync", "write_file", "write_json",
]  # fmt: skip
