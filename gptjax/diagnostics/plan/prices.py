"""Prices of `gptjax plan --prices`: dollars an hour for a chip, by the kinds of topologies, from JSON or CSV."""

import csv
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gptjax.config.section import InputError
from gptjax.runtime.hardware import NODES, PRICE_DATE, PRICE_SOURCES, SLICES

KINDS = (*SLICES, *NODES[:-1])  # cpu has no price
WANTED = 'wanted JSON as {"b200": 5.5, "v5e": 0.9}, or CSV lines as b200,5.5, in dollars an hour for a chip'


@dataclass(frozen=True)
class Prices:
    """Dollars an hour of chips by kind, which go before those of the table, and where they are from."""

    by_kind: Mapping[str, float] = field(default_factory=dict)
    source: str = PRICE_SOURCES
    date: str = PRICE_DATE

    @property
    def sentence(self) -> str:
        known = f"list prices on demand of {PRICE_DATE}; check yours"
        return f"Prices of {self.source}, else {known}" if self.by_kind else known.capitalize()


def read_prices(path: str) -> Prices:
    """The prices of a file, or the table's for ""; raises InputError, one line, for what is not a table of them."""
    if not path:
        return Prices()
    try:
        text = Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeError) as e:
        raise InputError(f"--prices {path}: can't be read ({e}); {WANTED}") from e
    try:
        rows = json.loads(text) if text.lstrip()[:1] == "{" else dict(filter(any, csv.reader(text.splitlines())))
    except ValueError as e:
        raise InputError(f"--prices {path}: {e}; {WANTED}") from e
    prices: dict[str, float] = {}
    for name, value in rows.items():
        kind = str(name).strip().lower()
        if kind not in KINDS:
            close = difflib.get_close_matches(kind, KINDS, n=1)
            meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(KINDS)}"
            raise InputError(f"--prices {path}: {name!r} is no kind of chip; {meant} {WANTED}")
        try:
            prices[kind] = float(value)
        except (TypeError, ValueError):
            prices[kind] = math.nan
        if not 0 <= prices[kind] < math.inf:
            raise InputError(f"--prices {path}: {name} costs {value!r}, which is no price; {WANTED}")
    if not prices:
        raise InputError(f"--prices {path}: no prices in it; {WANTED}")
    return Prices(prices, path, "")
