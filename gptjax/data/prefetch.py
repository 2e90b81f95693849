"""Read-ahead: threads call the next functions of a sequence while the last result is used."""

import collections
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_AHEAD = 2  # calls ahead of the one asked for, besides one for each further thread


def prefetch(calls: Iterator[Callable[[], T]], num_threads: int = 1) -> Generator[T, None, None]:
    """Yields the result of each call, in order, while threads (at least one) make the next ones.

    One thread also makes the calls in order. An exception is raised in its call's place; closing ends the threads.
    """
    num_threads = max(1, num_threads)
    results: collections.deque[Future[T]] = collections.deque()
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="batches")
    try:
        while True:
            while len(results) < num_threads + _AHEAD:
                results.append(pool.submit(next(calls)))
            yield results.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
