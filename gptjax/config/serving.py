"""Settings of the server."""

import math
from dataclasses import dataclass, field

from gptjax.config.section import InputError, Section
from gptjax.config.training import MeshConfig


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Section):
    """Serve a run through the API that OpenAI's clients speak."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine, which wants an API key."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    api_key: str = ""
    """Key that requests must bring (Authorization: Bearer KEY); better given as GPTJAX_API_KEY; empty: none."""
    name: str = ""
    """The model's name in the API; empty: that of the run's folder."""
    step: int = 0
    """Checkpoint to use; 0: the newest."""
    template: str = ""
    """Chat template to use instead of the run's."""
    system: str = ""
    """System message of conversations that bring none; empty: the template's own, where it has one."""
    slots: int = 16
    """Answers that are written at once."""
    context: int = 0
    """Tokens of a prompt and its answer at the most; 0: the model's context, or what half of the free memory holds."""
    prefill_chunk: int = 128
    """Tokens of a prompt that are read at once, at least all of an image where its tokens see each other; what was read
    of a conversation is used again in multiples of it."""
    batch_invariant: bool = False
    """An answer is the same to the bit, whoever else is served: one takes as many rows as all."""
    max_waiting: int = 64
    """Answers that wait for a slot at the most, and that a request may ask for; further requests get 429."""
    max_body: int = 4_194_304
    """Bytes of a request's body at the most."""
    max_images: int = 8
    """Images of a conversation at the most, of a model that reads images."""
    max_image_body: int = 20_971_520
    """Bytes of the body of a chat at the most, of a model that reads images."""
    timeout: float = 30.0
    """Seconds within which a client must send its headers, its body, and read what is sent to it."""
    drain: float = 60.0
    """Seconds that answers may still take when the server is ended (SIGTERM, Ctrl-C)."""
    connections: int = 512
    """Connections at once; further ones get 503."""
    hosts: tuple[str, ...] = ()
    """Host names beside localhost and addresses by which the server may be called; *: all."""
    origins: tuple[str, ...] = ()
    """Other origins whose pages may call the server (CORS), such as https://chat.example.org; *: all."""
    tools: str = ""
    """Tools that the chat page runs (calculator,search:FOLDER,module:function); the API only returns calls."""
    max_calls: int = 8
    """Calls of tools that an answer on the page may make."""
    label: str = ""
    """Folder for labels, with prompts.jsonl in it: adds the page on which people write and rank answers."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that the next start is faster."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, tensor=-1))

    def __post_init__(self):
        self.require(bool(self.host), "host", "an address such as 127.0.0.1")
        self.require_numbers(0, 65535, "port")
        self.require_numbers(0, math.inf, "step", "context", "drain")
        self.require_positive(
            "slots",
            "prefill_chunk",
            "max_calls",
            "max_waiting",
            "max_body",
            "max_images",
            "max_image_body",
            "timeout",
            "connections",
        )
        plain = self.api_key.isascii() and self.api_key == self.api_key.strip()
        if not plain:  # which shows no key
            raise InputError("api_key: wanted ASCII characters, without white space around them")
        self.require(all(self.hosts), "hosts", "names that are not empty")
        known = all(origin == "*" or "://" in origin for origin in self.origins)
        self.require(known, "origins", "origins with their scheme, such as https://chat.example.org")
