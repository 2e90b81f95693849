"""Training data that was tokenised beforehand: prepared corpora with one tokenizer."""

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np

from gptjax.config import PrepareConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice, batches, slice_rows
from gptjax.data.corpus import Corpus, DamagedPage, is_corpus, open_corpus
from gptjax.data.mixture import Mixture
from gptjax.data.packing import Batch
from gptjax.data.prepare import notices, prepare, progress_bar, training_texts
from gptjax.data.scan import scan_for_training
from gptjax.data.sources import is_here, open_source
from gptjax.data.validation import (
    ValidationSet,
    another_run,
    another_source,
    check_names,
    data_changed,
    extra_validation_sets,
)
from gptjax.runtime.status import entry
from gptjax.tokenizer import Tokenizer, make_tokenizer, open_tokenizer

SHARED_TOKENIZER = "shared-tokenizer"  # no name of a source: those have no dash

Say = Callable[[str], None]


class PreparedData:
    """The data of a run, from prepared corpora: each row is a pure function of its number.

    The state after some batches is {"rows", "names", "corpus", "tokens"}: the rows read, and by source what it was
    called when the run began, the SHA-256 of its corpus and the weighted targets trained on so far; a single source has
    the name "". Where damaged pages were skipped, "corrupt" lists them.
    """

    def __init__(self, corpora: dict[str, Corpus], config: TrainConfig, training: bool, say: Say):
        self._corpora, self._config, self._training, self._say = corpora, config, training, say
        for corpus in corpora.values():
            corpus.split("train").skip_damaged = config.data.max_corrupt > 0
        self._mixture = Mixture({name: c.split("train") for name, c in corpora.items()}, config.data, config.seed)

    @property
    def tokenizer(self) -> Tokenizer:
        return next(iter(self._corpora.values())).tokenizer

    @functools.cached_property
    def validation(self) -> list[ValidationSet]:
        """The validation split of each corpus, and the sets of data.validation."""
        own = [ValidationSet(name, c.split("validation"), self._config) for name, c in self._corpora.items()]
        return own + extra_validation_sets(self._config, self.tokenizer, self._training)

    @property
    def start(self) -> DataState:
        """The state before the first batch."""
        hashes = {name: corpus.sha256 for name, corpus in self._corpora.items()}
        names = self._config.data.sources
        return {"rows": 0, "names": names, "corpus": hashes, "tokens": dict.fromkeys(hashes, 0)}

    def check(self, state: DataState) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of this data."""
        check_names(state["names"], self._config, self._training)
        for name, corpus in self._corpora.items():
            if state["corpus"][name] != corpus.sha256:
                message = another_source(self._config.data.sources[name], state["names"][name])
                raise data_changed(message, self._config, self._training)

    def batches(self, state: DataState, part: RowSlice = ALL_ROWS) -> Generator[tuple[Batch, DataState], None, None]:
        """Yields (some rows of a batch, state after it) from a state on, without end; closing it ends its threads.

        Only those rows are read. Where damaged pages are left out all are, since the state lists each page.
        """
        data = self._config.data
        read = ALL_ROWS if data.max_corrupt else part
        with contextlib.closing(batches(self._mixture, state["rows"], read, data.workers)) as steps:
            for batch, after in steps:
                state = self._advance(state, batch) | after
                yield (slice_rows(batch, part) if data.max_corrupt else batch), state

    def batch(self, first: int, part: RowSlice = ALL_ROWS) -> Batch:
        """The batch that begins with row `first`, or some of its rows."""
        return self._mixture.batch(first, part)

    def sources(self, first: int) -> list[str]:
        """The name of the source of each row of a batch."""
        return [list(self._corpora)[i] for i in self._mixture.assign(first)[0].tolist()]

    def describe(self) -> str:
        """The sizes of the splits in a line, and one for each source of a mixture."""
        cfg, schedule = self._config.data, self._mixture.schedule
        train = [corpus.split("train").num_tokens for corpus in self._corpora.values()]
        validation = [corpus.split("validation").num_tokens for corpus in self._corpora.values()]
        one = self._config.steps * cfg.batch_size / self._mixture.samplers[0].rows_per_epoch
        epochs = f"; {self._config.steps:,} steps are {one:.3g} epochs" if len(train) == 1 else ""
        share = sum(validation) / (sum(train) + sum(validation))
        lines = [f"{sum(train):,} tokens to train on, {sum(validation):,} held out ({share:.1%}){epochs}"]
        for name, tokens, count, sampler in zip(self._corpora, train, schedule.counts, self._mixture.samplers):
            share = count / schedule.total
            passes = self._config.steps * cfg.batch_size * share / sampler.rows_per_epoch
            if name:
                lines.append(
                    f"  {name}: {tokens:,} tokens, {share:.1%} of the rows, "
                    f"{passes:.2f} passes in {self._config.steps:,} steps"
                )
        return "\n".join(lines)

    def _advance(self, state: DataState, batch: Batch) -> DataState:
        """The state with the tokens of the batch after it, and with the damaged pages that it would have read."""
        source_B, index_B = self._mixture.assign(state["rows"])
        if len(batch["weights_BL"]) == len(source_B):
            targets_B = np.count_nonzero(batch["weights_BL"], axis=1)
            counts = np.bincount(source_B, targets_B, minlength=len(self._corpora)).astype(int).tolist()
        else:  # the rows of other hosts count too
            counts = self._mixture.num_targets(state["rows"])
        state = {**state, "tokens": {name: state["tokens"][name] + n for name, n in zip(self._corpora, counts)}}
        for i, (name, corpus) in enumerate(self._corpora.items()):
            split = corpus.split("train")
            if split.damage and (source_B == i).any():
                spans = self._mixture.samplers[i].spans(index_B[source_B == i])
                for start, count in zip(spans.start.tolist(), spans.count.tolist()):
                    for error in split.damage_in(start, start + count + 1):
                        state = self._skip(state, f"{name} {error.where}".strip(), error)
        return state

    def _skip(self, state: DataState, where: str, error: DamagedPage) -> DataState:
        """The state with one more damaged page; raises InputError where data.max_corrupt pages were skipped before."""
        skipped, most = state.get("corrupt", []), self._config.data.max_corrupt
        if where in skipped:
            return state
        if len(skipped) >= most:
            raise InputError(f"data.max_corrupt={most} damaged pages were skipped before, and now {error}")
        self._say(f"left out page {len(skipped) + 1} of at most data.max_corrupt={most}: {error}")
        return {**state, "corrupt": [*skipped, where]}


def open_corpora(config: TrainConfig, folder: Path, training: bool, resumes: bool, say: Say) -> dict[str, Corpus]:
    """The corpora of a run by name, "" for a single one: prepared folders, or text that is prepared into `folder`.

    The texts of a mixture are prepared into folder/NAME with the tokenizer at tokenizer.path, else that of the
    mixture's prepared folders, else one trained on all of them. Unless this is training nothing is prepared, only
    opened; a run that `resumes` needs no text that was prepared into its folder. Raises InputError where the data is
    not there, is not of the run's settings, or tokenizers differ.
    """
    sources = config.data.sources
    corpora = {name: open_corpus(source) for name, source in sources.items() if is_corpus(source)}
    texts = {name: source for name, source in sources.items() if name not in corpora}
    if training:
        if corpora and config.tokenizer.path:
            _check_tokenizer(next(iter(corpora.values())), config.tokenizer)  # the others have its own: see below
        if resumes:
            corpora |= kept_texts(folder, texts, say)
            texts = {name: source for name, source in texts.items() if name not in corpora}
        corpora |= _prepare_texts(config, folder, corpora, texts, say)
    else:
        corpora |= {name: _open_prepared(source, folder / name) for name, source in texts.items()}
    corpora = {name: corpora[name] for name in sources}
    first = next(iter(corpora.values()))
    for corpus in corpora.values():
        if corpus.vocab_size != config.tokenizer.vocab_size:
            raise InputError(
                f"{corpus.folder} was prepared with {corpus.vocab_size} token ids but tokenizer.vocab_size="
                f"{config.tokenizer.vocab_size}; set --tokenizer.vocab-size {corpus.vocab_size}, or prepare it again"
            )
        if corpus.manifest.tokenizer_sha256 != first.manifest.tokenizer_sha256:
            raise InputError(
                f"{first.folder} and {corpus.folder} were prepared with different tokenizers; the sources of a mixture "
                f"must share one: prepare one of them again with --tokenizer.path of the other"
            )
    return corpora


def _open_prepared(source: str, out: Path) -> Corpus:
    if not is_corpus(out):
        raise InputError(
            f"source {source!r} is no prepared folder here, nor was its text prepared into {out}; go to the folder "
            f"in which the run was trained, or restore one of them"
        )
    return open_corpus(out)


def kept_texts(folder: Path, sources: dict[str, str], say: Say = lambda line: None) -> dict[str, Corpus]:
    """The corpora that a run keeps in `folder` of its sources that are not here: it was moved or copied without them.

    Raises InputError where it keeps nothing of one.
    """
    kept = {}
    for name, source in sources.items():
        if is_here(source):
            continue
        if not is_corpus(folder / name):
            raise InputError(
                f"source {source!r} is not here, and this run keeps no tokens of it in {folder / name}; say where it "
                "is now: --data.source PATH (of a mixture: --data.mixture NAME=PATH ...)"
            )
        say(f"source {source} is not here; going on with the tokens of it in {folder / name}")
        kept[name] = open_corpus(folder / name)
    return kept


def _prepare_texts(
    config: TrainConfig, folder: Path, corpora: dict[str, Corpus], texts: dict[str, str], say: Say
) -> dict[str, Corpus]:
    """Prepares each text into folder/NAME, or uses what was prepared there before."""
    data, tokenizer = config.data, config.tokenizer
    if data.mixture and texts and not tokenizer.path and (corpora or tokenizer.kind == "sentencepiece"):
        tokenizer = _shared_tokenizer(config, folder, corpora, texts, say)
    prepared = {}
    for name, source in texts.items():
        out = folder / name
        if new := not is_corpus(out):
            place = os.path.relpath(out) if out.is_relative_to(Path.cwd()) else str(out)
            say(entry("preparing", f"{source} with a tokenizer of {tokenizer.vocab_size:,} ids, into {place}"))
        cfg = PrepareConfig(
            source=source, out=str(out), validation_fraction=data.validation_fraction, text_field=data.text_field,
            max_corrupt=data.max_corrupt, tokenizer=tokenizer,
        )  # fmt: skip
        with progress_bar() as progress:
            prepared[name] = prepare(cfg, progress, otherwise=another_run(config))
        for line in notices(prepared[name]) if new else ():
            say(f"{source}: {line}")
    return prepared


def _check_tokenizer(corpus: Corpus, cfg: TokenizerConfig) -> None:
    given, wanted = open_tokenizer(cfg.path, cfg.kind, cfg.pattern).sha256, corpus.manifest.tokenizer_sha256
    if given != wanted:
        raise InputError(
            f"tokenizer.path={cfg.path!r} holds the tokenizer {given[:12]}, but {corpus.folder} was prepared with "
            f"{wanted[:12]}; leave tokenizer.path out, or prepare the text again with it"
        )


def _shared_tokenizer(
    config: TrainConfig, folder: Path, corpora: dict[str, Corpus], texts: dict[str, str], say: Say
) -> TokenizerConfig:
    """The tokenizer that a mixture's texts are prepared with, where none was given.

    It is that of a prepared folder of the mixture, or one trained on the training splits of all the texts, each in
    proportion to its bytes.
    """
    for corpus in corpora.values():
        kind = corpus.manifest.tokenizer_kind
        path = "" if kind == "bytes" else str(corpus.folder)
        return TokenizerConfig(kind=kind, vocab_size=corpus.vocab_size, path=path)  # pyright: ignore[reportArgumentType]
    path = folder / SHARED_TOKENIZER
    if not path.exists():
        say(f"training one tokenizer of {config.tokenizer.vocab_size:,} ids for {', '.join(texts)} into {path}")
        tokenizer = make_tokenizer(config.tokenizer, _shared_texts(config, list(texts.values())))
        new = folder / f"{SHARED_TOKENIZER}.{os.getpid()}"
        tokenizer.save(new)
        try:
            os.replace(new, path)
        except OSError:  # another process was first; the same texts gave it the same tokenizer
            shutil.rmtree(new)
    return TokenizerConfig(kind="sentencepiece", vocab_size=config.tokenizer.vocab_size, path=str(path))


def _shared_texts(config: TrainConfig, sources: list[str]) -> Iterator[str]:
    """Yields training text of each source in proportion to its bytes, as much as a tokenizer is trained on."""
    data = config.data
    opened = [open_source(name, data.text_field) for name in sources]
    scans = [(source, scan_for_training(source, data.validation_fraction, data.max_corrupt)) for source in opened]
    total = sum(result.kept_bytes for _, result in scans)
    for source, result in scans:
        yield from training_texts(source, result, total)
