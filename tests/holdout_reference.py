"""Reference for the hold-out of a source, read plainly; `scan` and `prepare` are compared with it."""

from pathlib import Path

from gptjax.data.holdout import Holdout, HoldoutBuilder
from gptjax.data.sources import documents, open_source


def holdout(source: str | Path, fraction: float) -> Holdout:
    """The hold-out of a source; raises InputError where it can't be split in two."""
    found, tally = open_source(str(source)), HoldoutBuilder()
    for document in documents(found):
        tally.add(document, document.digest, fraction)
    return tally.holdout(found.name, fraction)


def splits(source: str | Path, fraction: float) -> dict[str, list[str]]:
    """The texts of each split, in the order of the source."""
    held = holdout(source, fraction)
    texts: dict[str, list[str]] = {"train": [], "validation": []}
    for document in documents(str(source)):
        for split, part in held.split(document):
            texts[split].append(part.text)
    return texts
