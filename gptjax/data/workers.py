"""Grain's worker processes, which tokenise the chunks of a stream; imported only where a stream has workers."""

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags

from gptjax.config.section import InputError
from gptjax.data.chunks import Cursor, StreamSpec, TokenChunk

# A worker sends its chunks in parts so small that those which wait for the trainer fit into a pipe, 64 KiB: it never
# stops amid writing one, so it can end, or be killed, at any moment without leaving half a message behind.
_PART_TOKENS = 5000
_AHEAD = 2  # parts that a worker makes before they are asked for


def chunks_from_workers(text: StreamSpec, place: Cursor, workers: int) -> Generator[TokenChunk, None, None]:
    """Yields the chunks of a text in order; the processes end when it is closed, or when this process dies.

    They are spawned, so a script of one's own needs the usual `if __name__ == "__main__":`. Raises InputError where
    one of them was killed.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain hands absl's flags to its workers, and ours is no absl program
    options = grain.multiprocessing.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=_AHEAD)
    parts = [iter(_Parts(text, place, i, workers).mp_prefetch(options, _start_worker)) for i in range(workers)]
    try:
        with ThreadPoolExecutor(workers) as pool:  # they start together
            first = list(pool.map(next, parts))
        every = [itertools.chain([part], others) for part, others in zip(first, parts)]
        while True:
            for one in every:
                yield _joined(one)
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        raise InputError(
            f"a process that tokenises {text.source!r} ended ({str(error).split('.')[0]}; out of memory?); run the "
            f"same command again to go on, with fewer --data.workers; a script needs if __name__ == '__main__'"
        ) from error
    finally:
        try:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda one: one.close(), parts))
        except RuntimeError:  # at the interpreter's end no thread starts any more
            for one in parts:
                one.close()


def _joined(parts: Iterator[dict]) -> TokenChunk:
    """The next chunk of a worker."""
    part = next(parts)
    place, corrupt = Cursor(*part["place"]), tuple(part["corrupt"])
    tokens, starts, size = [], [], 0
    while True:
        tokens.append(np.frombuffer(part["tokens"], np.int32))
        starts.append(np.frombuffer(part["starts"], np.uint16).astype(np.int64) + size)
        size += len(tokens[-1])
        if part["last"]:
            return TokenChunk(place, np.concatenate(tokens), np.concatenate(starts), corrupt)
        part = next(parts)


class _Parts(grain.IterDataset):
    """The chunks first, first + every, ... of a text from a place on, in parts."""

    def __init__(self, text: StreamSpec, place: Cursor, first: int, every: int):
        super().__init__()
        self._arguments = text, place, first, every

    def __iter__(self) -> grain.DatasetIterator:
        return _PartIterator(*self._arguments)


class _PartIterator(grain.DatasetIterator):
    """Parts as plain values: grain would put arrays into shared memory, which outlives a killed process."""

    def __init__(self, text: StreamSpec, place: Cursor, first: int, every: int):
        super().__init__()
        self._parts = (part for chunk in text.chunks(place, first, every) for part in _cut(chunk))
        self._made = 0

    def __next__(self) -> dict:
        self._made += 1
        return next(self._parts)

    def get_state(self) -> dict:
        return {"made": self._made}

    def set_state(self, state: dict) -> None:
        raise NotImplementedError("a stream is opened at the place where it goes on")


def _cut(chunk: TokenChunk) -> Iterator[dict]:
    stops = [*range(_PART_TOKENS, len(chunk.tokens), _PART_TOKENS), len(chunk.tokens)]
    for start, stop in zip([0, *stops], stops):
        low, high = np.searchsorted(chunk.starts, (start, stop))
        yield {
            "place": list(chunk.place),
            "tokens": chunk.tokens[start:stop].tobytes(),
            "starts": (chunk.starts[low:high] - start).astype(np.uint16).tobytes(),
            "corrupt": list(chunk.corrupt) if start == 0 else [],
            "last": stop == len(chunk.tokens),
        }


def _start_worker(index: int, count: int) -> None:
    """Ties a worker's life to its parent's and to nothing else: the trainer answers signals and closes its workers."""
    del index, count
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="end with the parent", daemon=True).start()
