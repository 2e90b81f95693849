"""Training data that was tokenised before: one corpus, or a mixture of several with one tokenizer."""

import contextlib
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np

from gptjax.config import PrepareConfig, TokenizerConfig, TrainConfig
from gptjax.config.section import InputError
from gptjax.data.batches import ALL_ROWS, DataState, RowSlice, batches, slice_rows
from gptjax.data.corpus import Corpus, DamagedPage, is_corpus, open_corpus
from gptjax.data.mixture import Mixture, parse_sources
from gptjax.data.packing import Batch
from gptjax.data.prepare import prepare, training_texts
from gptjax.data.scan import Filters, scan
from gptjax.data.sources import open_source
from gptjax.data.validation import ValidationSet, data_changed, extra_validation_sets
from gptjax.tokenizer import Tokenizer, make_tokenizer, open_tokenizer

SHARED_TOKENIZER = "shared-tokenizer"  # no name of a source: those have no dash

Say = Callable[[str], None]


class PreparedData:
    """The data of a run, from prepared corpora: which rows a step reads is a pure function of the step.

    The state after some batches is {"step", "corpus"}, where the corpus is a SHA-256, or one for each source of a
    mixture by name. A mixture's state has "tokens" too: the weighted targets trained on so far, by source. Where
    damaged pages were skipped, "corrupt" lists them.
    """

    def __init__(self, corpora: dict[str, Corpus], config: TrainConfig, say: Say | None = None):
        self._corpora, self._config, self._training = corpora, config, say is not None
        self._say = say or (lambda line: None)
        self._mixed = "" not in corpora
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
        if not self._mixed:
            return {"step": 0, "corpus": self._corpora[""].sha256}
        shas = {name: corpus.sha256 for name, corpus in self._corpora.items()}
        return {"step": 0, "corpus": shas, "tokens": dict.fromkeys(shas, 0)}

    def check(self, state: DataState) -> None:
        """Raises InputError where a checkpoint's state of the data is not one of this data."""
        was, now = state["corpus"], self.start["corpus"]
        for name, corpus in self._corpora.items():
            if (was.get(name) if self._mixed else was) != (now[name] if self._mixed else now):
                raise data_changed(f"{corpus.folder} is not the corpus that this run was trained on", self._training)

    def batches(self, state: DataState, rows: RowSlice = ALL_ROWS) -> Generator[tuple[Batch, DataState], None, None]:
        """Yields (some rows of a batch, state after it) from a state on, without end; closing it ends its threads.

        Only those rows are read. Where damaged pages are left out all are, since the state tells of each page.
        """
        data = self._config.data
        read = ALL_ROWS if data.max_corrupt else rows
        with contextlib.closing(batches(self._mixture, state["step"], read, data.workers)) as made:
            for batch, after in made:
                state = self._after(state, batch) | after
                yield (slice_rows(batch, rows) if data.max_corrupt else batch), state

    def batch(self, step: int, rows: RowSlice = ALL_ROWS) -> Batch:
        """The batch that is trained on after `step` steps, or some of its rows."""
        return self._mixture.batch(step, rows)

    def sources(self, step: int) -> list[str]:
        """The name of the source of each row of a batch; none where there is only one."""
        return [list(self._corpora)[i] for i in self._mixture.split(step)[0].tolist()] if self._mixed else []

    def passes(self, state: DataState) -> dict[str, float]:
        """How often each source has been passed, by name; "" is the name of a single corpus."""
        return self._mixture.passes(state["step"])

    def describe(self) -> str:
        """Says how much there is: a line, and one for each source of a mixture."""
        cfg, rows = self._config.data, self._mixture.schedule
        train = [corpus.split("train").num_tokens for corpus in self._corpora.values()]
        held = [corpus.split("validation").num_tokens for corpus in self._corpora.values()]
        lines = [
            f"{sum(train):,} tokens to train on, {sum(held):,} held out; {cfg.batch_size * cfg.length:,} tokens a step"
        ]
        for name, tokens, count, own in zip(self._corpora, train, rows.counts, self._mixture.rows):
            if self._mixed:
                share, passes = count / rows.total, self._config.steps * cfg.batch_size * count / rows.total
                lines.append(
                    f"  {name}: {tokens:,} tokens, {share:.1%} of the rows, "
                    f"{passes / own.rows_per_epoch:.2f} passes in {self._config.steps:,} steps"
                )
        return "\n".join(lines)

    def _after(self, state: DataState, batch: Batch) -> DataState:
        """The state, with what a batch adds to it besides the step."""
        source_B, index_B = self._mixture.split(state["step"])
        if self._mixed:
            if len(batch["weights_BL"]) == len(source_B):
                targets_B = np.count_nonzero(batch["weights_BL"], axis=1)
                counts = np.bincount(source_B, targets_B, minlength=len(self._corpora)).astype(int).tolist()
            else:  # the rows of other hosts count too
                counts = self._mixture.targets(state["step"])
            tokens = {name: state["tokens"][name] + new for name, new in zip(self._corpora, counts)}
            state = {**state, "tokens": tokens}
        for i, (name, corpus) in enumerate(self._corpora.items()):
            split = corpus.split("train")
            if split.damage and (source_B == i).any():
                spans = self._mixture.rows[i].spans(index_B[source_B == i])
                for start, count in zip(spans.start.tolist(), spans.count.tolist()):
                    for error in split.damage_in(start, start + count + 1):
                        state = self._skipped(state, f"{name} {error.where}".strip(), error)
        return state

    def _skipped(self, state: DataState, where: str, error: DamagedPage) -> DataState:
        """The state with one more damaged page; raises InputError where data.max_corrupt pages were skipped before."""
        skipped, most = state.get("corrupt", []), self._config.data.max_corrupt
        if where in skipped:
            return state
        if len(skipped) >= most:
            raise InputError(f"data.max_corrupt={most} damaged pages were skipped before, and now {error}")
        self._say(f"left out page {len(skipped) + 1} of at most data.max_corrupt={most}: {error}")
        return {**state, "corrupt": [*skipped, where]}


def open_corpora(config: TrainConfig, folder: Path, say: Say | None = None) -> dict[str, Corpus]:
    """The corpora of a run by name, "" for a single one: prepared folders, or text that is prepared into `folder`.

    The texts of a mixture are prepared into folder/NAME with the tokenizer at tokenizer.path, else that of the
    mixture's prepared folders, else one trained on all of them. Without `say` nothing is prepared, only opened. Raises
    InputError where the data is not there, is not of the run's settings, or tokenizers differ.
    """
    data, tokenizer_cfg = config.data, config.tokenizer
    mixed = data.source == "mixture"
    sources = parse_sources(data.mixture) if mixed else {"": data.source}
    corpora = {name: open_corpus(source) for name, source in sources.items() if is_corpus(source)}
    if corpora and say and tokenizer_cfg.path:
        _check_tokenizer(next(iter(corpora.values())), tokenizer_cfg)  # the others have the first one's: see below
    texts = {name: source for name, source in sources.items() if name not in corpora}
    trains = tokenizer_cfg.kind == "sentencepiece" and not tokenizer_cfg.path
    if mixed and texts and say and trains:
        tokenizer_cfg = _shared_tokenizer(config, folder, corpora, texts, say)
    for name, source in texts.items():
        out = folder / name
        if not say and not is_corpus(out):
            raise InputError(
                f"source {source!r} is no prepared folder here, nor was its text prepared into {out}; go to the folder "
                f"in which the run was trained, or restore one of them"
            )
        if say and not is_corpus(out):
            say(f"preparing {source} with a tokenizer of {tokenizer_cfg.vocab_size:,} ids into {out}")
        corpora[name] = _prepare(source, out, config, tokenizer_cfg) if say else open_corpus(out)
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


def _check_tokenizer(corpus: Corpus, cfg: TokenizerConfig) -> None:
    given, wanted = open_tokenizer(cfg.path, cfg.kind, cfg.pattern).sha256, corpus.manifest.tokenizer_sha256
    if given != wanted:
        raise InputError(
            f"tokenizer.path={cfg.path!r} holds the tokenizer {given[:12]}, but {corpus.folder} was prepared with "
            f"{wanted[:12]}; leave tokenizer.path out, or prepare the text again with it"
        )


def _prepare(source: str, out: Path, config: TrainConfig, tokenizer_cfg: TokenizerConfig) -> Corpus:
    data = config.data
    return prepare(
        PrepareConfig(
            source=source, out=str(out), validation_fraction=data.validation_fraction, text_field=data.text_field,
            max_corrupt=data.max_corrupt, tokenizer=tokenizer_cfg,
        )
    )  # fmt: skip


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
    filters = Filters(max_corrupt=data.max_corrupt)
    scans = []
    for name in sources:
        source = open_source(name, data.text_field)
        with tempfile.TemporaryDirectory(prefix="gptjax-") as folder:
            scans.append((source, scan(source, data.validation_fraction, filters, Path(folder), lambda *_: None)))
    total = sum(found.kept_bytes for _, found in scans)
    for source, found in scans:
        yield from training_texts(source, found, total)
