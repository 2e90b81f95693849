"""Chat templates as the Jinja texts that transformers and llama.cpp render."""

import dataclasses
import re

from gptjax.tokenizer.interface import Tokenizer
from gptjax.tokenizer.templates import Template


def jinja_for(tokenizer: Tokenizer, template: Template) -> str:
    """The Jinja text by which an export of the tokenizer says the template."""
    spaced = tokenizer.adds_space and not tokenizer.adds_space_once
    return jinja_of(_spaceless(template) if spaced else template)


def _spaceless(template: Template) -> Template:
    """The template for a tokenizer that puts a space in front of every text: without its own behind special tokens."""
    tokens = "|".join(map(re.escape, (*template.tokens, "{bos}", "{eos}")))

    def without(part: str, before: str = "") -> str:
        return re.sub(f"({tokens}) ", r"\1", before + part)[len(before) :]

    return dataclasses.replace(
        template,
        system=(without(template.system[0], template.begin), template.system[1]),
        user=(without(template.user[0], template.begin or "{eos}"), without(template.user[1])),
        lead=without(template.lead, template.header or template.user[1]),
    )


def jinja_of(template: Template) -> str:
    """A Jinja text that renders what the template's parts say, for messages that they allow."""
    first = "messages[0]['role'] == 'system'"
    system = f"messages[0]['content']{'|trim' if 'system' in template.trim else ''}"
    default = "none" if template.default_system is None else _quoted(template.default_system)
    content = {role: f"message['content']{'|trim' if role in template.trim else ''}" for role in ("user", "assistant")}
    opening = f"{_quoted(template.system[0])} + system + {_quoted(template.system[1])}"
    opened = f"({opening} if loop.first and system is not none else '') + "
    if not template.system_in_user:
        user = content["user"]
    elif template.trims_joined:
        user = f"({opened}message['content']){'|trim' if 'user' in template.trim else ''}"
    else:
        user = f"({opened}{content['user']})"
    parts = [
        f"{{%- if {first} %}}{{%- set system = {system} %}}{{%- set turns = messages[1:] %}}"
        f"{{%- else %}}{{%- set system = {default} %}}{{%- set turns = messages %}}{{%- endif %}}",
        f"{{{{- {_quoted(template.begin)} }}}}",
        "" if template.system_in_user else f"{{%- if system is not none %}}{{{{- {opening} }}}}{{%- endif %}}",
        "{%- for message in turns %}",
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Roles must alternate: user, assistant, user, ...') }}{%- endif %}"
        if template.alternate
        else "",
        f"{{%- if message['role'] == 'user' %}}"
        f"{{{{- {_quoted(template.user[0])} + {user} + {_quoted(template.user[1])} }}}}",
        f"{{%- elif message['role'] == 'assistant' %}}"
        f"{{{{- {_quoted(template.header + template.lead)} + {content['assistant']} + {_quoted(template.end)} }}}}",
        "{%- else %}{{- raise_exception('Wanted a system message at the beginning alone, then user and assistant') }}"
        "{%- endif %}{%- endfor %}",
        f"{{%- if add_generation_prompt %}}{{{{- {_quoted(template.header)} }}}}{{%- endif %}}",
    ]
    return "".join(parts)


def _quoted(part: str) -> str:
    """A part as an expression of Jinja."""
    for old, new in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n")):
        part = part.replace(old, new)
    for end in ("bos", "eos"):
        part = part.replace(f"{{{end}}}", f"' + {end}_token + '")
    return f"'{part}'"
