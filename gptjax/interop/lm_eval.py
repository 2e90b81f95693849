"""A run as a model of lm-eval (EleutherAI's evaluation harness), in this process, so that its tasks evaluate it.

    python -m gptjax.interop.lm_eval run --model gptjax --model_args run=RUN --tasks arc_easy,lambada_openai

takes lm-eval's own command line, which has no list of models that other packages could enter. From Python, or with
tasks of one's own, `lm_eval.simple_evaluate(model=GptjaxLM("RUN"), tasks=[...])`.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import jax

from gptjax.config import GenerateConfig
from gptjax.config.section import InputError
from gptjax.evals.score import Scorer
from gptjax.generation.chat import continue_ids
from gptjax.runs.load import LoadedModel, load_model
from gptjax.tokenizer.known_templates import template_of


def refuse(reason: str) -> NoReturn:
    """Ends the process with a line on the screen, as the command line does."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
except ImportError:
    missing = "evaluating with lm-eval needs a package more: pip install 'gptjax[eval]'"
    if __name__ == "__main__":
        refuse(missing)
    raise InputError(missing) from None

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
"""Settings of generation that lm-eval's tasks and ours call alike."""


@register_model("gptjax")
class GptjaxLM(TemplateLM):
    """The model of a run, or one that is loaded already; `step` picks a checkpoint of a run (0: the newest).

    Likelihoods are scored in batches of the scorer's own size, on all devices; `batch_size` is the prompts that are
    continued together. Raises InputError for requests that the model can't take.
    """

    def __init__(
        self, run: str | LoadedModel, step: int = 0, batch_size: int | str = 1, max_batch_size: int | None = None,
        device: str | None = None,
    ):  # fmt: skip
        super().__init__()
        if device is not None:
            raise InputError(f"device={device!r}: wanted none; the environment's JAX_PLATFORMS picks the devices")
        self.model = load_model(run, None, int(step)) if isinstance(run, str) else run
        self._tokens = self.model.tokenizer
        self._scorer = Scorer(self.model.decoder, self.model.params, self.model.mesh)
        self._chats: dict[str, list[int]] = {}  # the ids of the texts that the chat template has made
        self._chat_sizes: set[int] = set()  # and the lengths of these texts
        self.batch_size = int(batch_size) if str(batch_size).isdecimal() else max_batch_size or 16

    @property
    def max_length(self) -> int:
        """Tokens that the model can read at once."""
        return self.model.decoder.context

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self._tokens.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The id that stands before a text without a context."""
        return self._tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        """A name by which lm-eval keeps encoded requests apart."""
        return f"gptjax-{self._tokens.sha256}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, with the beginning that the model's prompts have, or without."""
        for size in sorted(self._chat_sizes, reverse=True):
            if (ids := self._chats.get(string[:size])) is not None:
                return ids + self._tokens.encode_batch([string[size:]], [False])[0]
        if add_special_tokens is False or not self._tokens.begins:
            return self._tokens.encode(string)
        return [self._tokens.bos_id, *self._tokens.encode(string)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name of the tokenizer's template, by which lm-eval keeps results apart."""
        return self._tokens.template if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat up to where an answer begins; without a generation prompt its last message begins it.

        lm-eval hands texts on, so this one is remembered with its ids: words of a message become no special token.
        """
        template = template_of(self._tokens)
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        text = "".join(piece.text for piece in template.pieces(messages, add_generation_prompt=True)) + begun
        ids = template.render(self._tokens, messages, add_generation_prompt=True)[0]
        ids = ids + self._tokens.encode_batch([begun], [False])[0]
        bare = len(ids)  # lm-eval moves white space from the end of a context to what continues it
        while self._tokens.decode(ids[bare - 1 : bare]).isspace():
            bare -= 1
        self._chats |= {text.rstrip(): ids[:bare], text: ids}
        self._chat_sizes |= {len(text.rstrip()), len(text)}
        return text

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs: Any):
        answers = [(x.total, x.greedy) for x in self._scorer.loglikelihoods([(a, b) for _, a, b in requests])]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats, read window by window."""
        texts = [request.args[0] for request in requests]
        scored = self._scorer.rolling([self.tok_encode(text) for text in texts], self.prefix_token_id)
        for text, likelihood in zip(texts, scored, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), likelihood.total)
        return [likelihood.total for likelihood in scored]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each prompt up to its stop texts; a prompt that is too long loses its beginning."""
        ids = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        settings = [_settings(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        # Rows of one call share their settings, and are padded to the longest.
        order = sorted(range(len(requests)), key=lambda i: (repr(settings[i]), -len(ids[i])))
        while order:
            most = settings[order[0]]["max_new_tokens"]
            rows = [i for i in order[: self.batch_size] if settings[i] == settings[order[0]]]
            order = order[len(rows) :]
            if most >= self.max_length:
                raise InputError(f"max_gen_toks={most}: wanted fewer than the model's {self.max_length} positions")
            cfg = GenerateConfig(**settings[rows[0]])
            some, model = [ids[i] for i in rows], self.model
            with jax.set_mesh(model.mesh):
                found = continue_ids(model.decoder, model.params, self._tokens, some, cfg, chat=bool(self._chats))
            for i, text in zip(rows, found, strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The fields of GenerateConfig of a request of lm-eval; raises InputError for settings that ours does not have."""
    kwargs = dict(normalize_gen_kwargs(kwargs))
    settings = {"stop": tuple(s for s in kwargs.pop("until") if s), "max_new_tokens": kwargs.pop("max_gen_toks")}
    samples = kwargs.pop("do_sample")
    settings |= {name: kwargs.pop(name) for name in SAMPLING if name in kwargs}
    if kwargs:
        raise InputError(
            f"generation_kwargs {sorted(kwargs)}: wanted only {', '.join(SAMPLING)}, until and max_gen_toks"
        )
    return settings | {"temperature": settings.get("temperature", 1.0) if samples else 0.0}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except InputError as error:
        refuse(str(error))
