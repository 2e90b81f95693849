"""Models of the Hugging Face hub by name, fetched through huggingface_hub into its cache.

A name is ORG/NAME[@REVISION] for weights as safetensors, or ORG/NAME[@REVISION]/FILE.gguf; the revision is a branch, a
tag, a commit or refs/pr/N. The library's environment variables hold, such as HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN.
"""

import re
from pathlib import Path
from typing import NamedTuple

from gptjax.config.section import InputError, one_line
from gptjax.interop.folder import CONFIG, INDEX

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/pr/\d+|[^/\s]+))?(?:/(?P<file>[^\s*?\[]+\.gguf))?")
# No code, no pickle, and no weights a second time in another layout.
FILES = [CONFIG, "generation_config.json", "tokenizer*", "vocab.json", "merges.txt", "*.tiktoken", "chat_template*",
         "special_tokens_map.json", "added_tokens.json", "model*.safetensors", INDEX,
         "preprocessor_config.json", "processor_config.json"]  # fmt: skip


class Fetched(NamedTuple):
    """A model's folder or file on this machine, and the name of it that holds for good: with the commit."""

    path: Path
    name: str


def fetch(source: str) -> Fetched:
    """A source's folder or file: that of this name on this machine, where there is one, else the hub's.

    Raises InputError where there is neither, and where the hub does not give it: gated, no network, no such revision.
    """
    parts = NAME.fullmatch(source)
    if Path(source).exists():
        return Fetched(Path(source), source)
    if parts is None:
        named = "a name of the hub with its owner (ORG/NAME), such as openai-community/gpt2"
        raise InputError(f"{source} is not here; wanted a Hugging Face folder, a .gguf file, or {named}")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError:
        raise InputError(
            f"{source} is not here; to fetch it from the Hugging Face hub: pip install 'gptjax[hf]'"
        ) from None
    repo, revision, file = parts["repo"], parts["revision"], parts["file"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=[file] if file else FILES))
    except errors.GatedRepoError:
        advice = f"accept the terms on the page of {repo}, then: hf auth login"
        raise InputError(f"{source} is gated: {advice}") from None
    except errors.RepositoryNotFoundError:
        advice = "wanted a folder, a .gguf file, or the name of a model that you may read (hf auth login)"
        raise InputError(f"{source} is not here, and no model {repo} on the hub; {advice}") from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{source}: {repo} has no revision {revision}; wanted a branch, tag or commit of it") from None
    except Exception as error:  # of many kinds: no network, a full disk, a server's error
        reason = one_line(str(error.__cause__ or error), 200)
        raise InputError(
            f"{source} is not here, and could not be fetched from the hub: {reason}; check the network"
        ) from None
    name = f"{repo}@{folder.name}"
    if file is None:
        return Fetched(folder, name)
    if not (folder / file).is_file():
        raise InputError(f"{source}: {repo} has no file {file}; its files are listed on its page")
    return Fetched(folder / file, f"{name}/{file}")
