"""What a run folder is: a folder of a file system, or a prefix in a bucket (gs://, s3://).

`place` makes a path of what the user wrote, `store` gives what can be done there. Both stores have the same methods:
`Disk` works by rename, append and POSIX locks, `Bucket` by what object stores have instead.
"""

from gptjax.storage.bucket import Bucket, BucketError
from gptjax.storage.disk import MARK, PROBE, TRASH, Disk
from gptjax.storage.resolve import check_file, place, store, write_file, write_json

__all__ = [
    "MARK", "PROBE", "TRASH", "Bucket", "BucketError", "Disk", "check_file", "place", "store", "write_file",
    "write_json",
]  # fmt: skip
