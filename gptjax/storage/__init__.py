"""What a run folder is: a folder of a file system, or a prefix in a bucket (gs://, s3://).

`resolve_path` makes a path of what the user wrote, `filesystem` gives what can be done there. Both have the same
methods: `Disk` works by rename, append and POSIX locks, `Bucket` by what object stores have instead.
"""

from gptjax.storage.bucket import Bucket, BucketError
from gptjax.storage.disk import MARK, PROBE, TRASH, Disk
from gptjax.storage.resolve import check_file, file_sha256, filesystem, resolve_path, write_file, write_json

__all__ = [
    "MARK", "PROBE", "TRASH", "Bucket", "BucketError", "Disk", "check_file", "file_sha256", "filesystem",
    "resolve_path", "write_file", "write_json",
]  # fmt: skip
