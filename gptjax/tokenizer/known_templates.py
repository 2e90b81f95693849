"""The chat templates that are known: by name, and by the sha256 of the Jinja texts that render as they do."""

import dataclasses
import hashlib

from gptjax.config.section import InputError
from gptjax.tokenizer.interface import Tokenizer
from gptjax.tokenizer.templates import ROLES, Template
from gptjax.tokenizer.tool_calls import LLAMA


def _chatml(name: str, default_system: str | None = None) -> Template:
    return Template(
        name=name,
        tokens=("<|im_start|>", "<|im_end|>"),
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        default_system=default_system,
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        header="<|im_start|>assistant\n",
        end="<|im_end|>\n",
    )


_LLAMA3 = Template(
    name="llama3",
    tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    begin="{bos}",
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    trim=ROLES,
)
# Its Jinja writes the day of its release, and 3.2's the day it is run on: here it is one day.
_LLAMA31_DAYS = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_MISTRAL = Template(
    name="mistral-v1",
    begin="{bos}",
    system=("", "\n\n"),
    system_in_user=True,
    user=(" [INST] ", " [/INST]"),
    lead=" ",
    end="{eos}",
    alternate=True,
)
_PHI3 = Template(
    name="phi3",
    tokens=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    system=("<|system|>\n", "<|end|>\n"),
    user=("<|user|>\n", "<|end|>\n"),
    header="<|assistant|>\n",
    end="<|end|>\n",
)
_INST = ("[INST]", "[/INST]")

TEMPLATES = {
    template.name: template
    for template in (
        _chatml("chatml"),
        _chatml("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        _chatml("qwen2", "You are a helpful assistant."),
        _chatml("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        # An answer without thinking stands behind an empty thought, in every turn: what comes later changes none.
        dataclasses.replace(
            _chatml("qwen3"),
            tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
            header="<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
        Template(
            name="llama2",
            system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
            system_in_user=True,
            user=("{bos}[INST] ", " [/INST]"),
            lead=" ",
            end=" {eos}",
            trim=("user", "assistant"),
            trims_joined=True,
            alternate=True,
        ),
        _LLAMA3,
        dataclasses.replace(
            _LLAMA3,
            name="llama3.1",
            system=(_LLAMA3.system[0] + _LLAMA31_DAYS, "<|eot_id|>"),
            default_system="",
            tool_form=dataclasses.replace(LLAMA, system=f"{_LLAMA3.system[0]}Environment: ipython\n{_LLAMA31_DAYS}"),
        ),
        dataclasses.replace(_MISTRAL, name="mistral-v0", user=("[INST] ", " [/INST]"), lead=""),
        _MISTRAL,
        dataclasses.replace(
            _MISTRAL, name="mistral-v3", tokens=_INST, user=("[INST] ", "[/INST]"), trim=("assistant",)
        ),
        dataclasses.replace(_MISTRAL, name="mistral-v3-tekken", tokens=_INST, user=_INST, lead=""),
        dataclasses.replace(
            _MISTRAL,
            name="mistral-v7",
            tokens=(*_INST, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
            system=("[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]"),
            system_in_user=False,
            user=("[INST] ", "[/INST]"),
            alternate=False,
        ),
        Template(
            name="gemma",
            tokens=("<start_of_turn>", "<end_of_turn>"),
            begin="{bos}",
            system=("", "\n\n"),
            system_in_user=True,
            user=("<start_of_turn>user\n", "<end_of_turn>\n"),
            header="<start_of_turn>model\n",
            end="<end_of_turn>\n",
            trim=("user", "assistant"),
            alternate=True,
        ),
        _PHI3,
        dataclasses.replace(_PHI3, name="phi3-bos", begin="{bos}"),
        Template(
            name="phi4",
            tokens=("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
            system=("<|im_start|>system<|im_sep|>", "<|im_end|>"),
            user=("<|im_start|>user<|im_sep|>", "<|im_end|>"),
            header="<|im_start|>assistant<|im_sep|>",
            end="<|im_end|>",
        ),
        Template(
            name="deepseek-v2",
            begin="{bos}",
            system=("", "\n\n"),
            user=("User: ", "\n\n"),
            header="Assistant:",
            lead=" ",
            end="{eos}",
        ),
        Template(
            name="deepseek-v3",
            tokens=("<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"),
            begin="{bos}",
            user=("<\uff5cUser\uff5c>", ""),
            header="<\uff5cAssistant\uff5c>",
            end="{eos}",
        ),
    )
}

# The sha256 of Jinja texts without white space around them, by the template that renders as they do, but for this:
# tools are left out. An end that a text writes behind an answer, or a prompt for one, where none was asked for (Phi-3,
# Llama 3) is not written. A system message stands in the first turn, not in the last (Mistral v3); it is written
# where a text drops or refuses it (Phi-3, Gemma, Mistral v0).
_HASHES = {
    "chatml": (
        "fcf7a096fe99a48fd9ad2b250bf9237e96e8f48bffec1c7ea4d3f225176cd40e",
        "153280e3ff55d19da1398bdb3914ee2a51b80429bfaedde11d7d216c39db80f3",
        "64f85b198065d0fba2a81f37e10ed68161ce2c19a754c7100e67e0ca2ee9c326",
    ),
    "smollm2": (
        "872be49dbb638044ad01b60388f48d469ff2980e5f0dccdc22ec907db54d0788",
        "de9cde7d1b0ca0cc87459a6673e0d12fb89c070bdb24e4a30b6e4d187b226221",
    ),
    "qwen2": (
        "793202280c0910ab26bc6eb57c8212c2417324c6d8c4efd0d10d59092ab3e3eb",
        "f0206845c9ebc3abb4735d44f286eb81ce99238ad2accc710c6fc60e6cb8ccc8",
    ),
    "qwen2.5": (
        "55b2f4a26ac9ee719330a61a0c39d9e538b0e9322212f048326318cff4f8674a",
        "b1d2bb00d59cae00a80c2b526765a9cc502bc5a138a4a84b6cdea71b3e631df1",
    ),
    "qwen3": (
        "a55ee1b1660128b7098723e0abcd92caa0788061051c62d51cbe87d9cf1974d8",
        "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",
    ),
    "llama2": (
        "ea2472f29dbd93c3eb696795f6403228fcc4b775518869c771f83fbae5c11dbf",
        "7fc58500f0542d84d80c72f9271864203b43152380ca989bf6671d750a1ce813",
    ),
    "llama3": (
        "ba03a121d097859c7b5b9cd03af99aafe95275210d2876f642ad9929a150f122",
        "4f46ecd43418f216df8c26936c60e5d04bcc81db47db5d86fbe889f64212dd4c",
        "b48c47f6443892716176eb200bf4ef108f64e06ca26ed0fa8ebc0a4b3992fcb2",
        "b75e17085cfc511ead6d4fab84b86ab3c168ec7a332568a91d0889cdcba94394",
    ),
    "llama3.1": (
        "93c0e9aa3629bbd77e68dbc0f5621f6e6b23aa8d74b932595cdb8d64684526d7",
        "d82792f95932f1c9cef5c4bd992f171225e3bf8c7b609b4557c9e1ec96be819f",
    ),
    "mistral-v0": ("26a59556925c987317ce5291811ba3b7f32ec4c647c400c6cc7e3a9993007ba7",),
    "mistral-v1": ("bbc58aad99454df60138be9530c9601a0adfe3d8932cda975e1f10b2410ddc51",),
    "mistral-v3": ("cafb64e0e9e5fd2503054b3479593fae39cbdfd52338ce8af9bb4664a8eb05bd",),
    "mistral-v3-tekken": ("e7deee034838db2bfc7487788a3013d8a307ab69f72f3c54a85f06fd76007d4e",),
    "mistral-v7": ("3c4ad5fa60dd8c7ccdf82fa4225864c903e107728fcaf859fa6052cb80c92ee9",),
    "gemma": (
        "ecd6ae513fe103f0eb62e8ab5bfa8d0fe45c1074fa398b089c93a7e70c15cfd6",
        "1e51d5c0fec2f83da1953fb850b7b532b7da02d0dc35f9201e671e0b9a35a123",
        "8d9e3a3c114fb2053ec500184677af4f7e5f8ec2582443cd535834e68b3ade29",
    ),
    "phi3": (
        "dcaee66df77bfbb789ec541fe713218da30225a526f1db97138fc39ee6dc56aa",
        "5601fd7b9dac735cd1a9d029f73cbcf63a48f84b640df193dadc6ac6af980391",
        "78d976a442bcde2f0be15aafbb8e3050e1104f86732266f68403251b89982a90",
        "107f446a0c69ad81516797efae2998f51b1c8e3ea6e74253dcaff6629306bfc7",
        "605841622bcb6572225608f09ec2afcdfb9fb50844ef52715a12689f7b9278b1",
        "6b2fedcaff5489ce48d01fbbd17c7a46d4bf78001a5d05ec91d6067bf102e56f",
        "79e4ca4b7d902dc73772bbde0c62459f93871f4c17827e8e41ad3fa663e0da04",
        "672800bb30b3e512310f97ba0c81750fac4628f1a1f2e92138c92f7311abbd7c",
    ),
    "phi3-bos": (
        "b0e53f5e7bae6fdb93013abeceef343e8841cce87def2601e7269a53439b5740",
        "195d1a2b7e806f9b2f6455ddaf57c19806f89648526bdfe22d070df00ad855fb",
        "268b6082ceb7176dc6ed80557a2f7837f9f0339592fbee677d405a553af15f88",
        "4552eefd92474b5259a00e369ebb5989535118101ca9ddeff68c11e879bbb9dd",
    ),
    "phi4": ("a41fb8727c4f1e722e53cb1ea935038a1177b8bdf09387f3b048f9da5255ef3e",),
    "deepseek-v2": (
        "8aeba567270fa9a8d5372caf4b04affea947c4421d96adc01e3ff94021b0ae8e",
        "5b0c475e85b3954175a606f8e7540ec0c6a16edb516e2b8cd0c000dff7b1ad65",
    ),
    "deepseek-v3": (
        "54d400beedcd17f464e10063e0577f6f798fa896266a912d8a366f8a2fcc0bca",
        "3a3036eeb96ca0e48565fc1f19b4d7d3fa17ada32bb1b3d5ed539ae74cf22923",
        "b6835114b7303ddd78919a82e4d9f7d8c26ed0d7dfc36beeb12d524f6144eab1",
    ),
}
KNOWN = {sha256: name for name, hashes in _HASHES.items() for sha256 in hashes}


def jinja_sha256(text: str) -> str:
    """The hash by which KNOWN names templates."""
    return hashlib.sha256(text.strip().encode()).hexdigest()


def template_of(tokenizer: Tokenizer) -> Template:
    """The tokenizer's template; raises InputError where it has none, or lacks a token of it."""
    if not tokenizer.template:
        raise InputError(
            "this tokenizer has no chat template, or one that is not known; name one with --template, one of "
            f"{', '.join(TEMPLATES)}"
        )
    template = named_template(tokenizer.template)
    template.check(tokenizer)
    return template


def named_template(name: str) -> Template:
    """The template of that name; raises InputError where there is none."""
    if name not in TEMPLATES:
        raise InputError(f"there is no chat template {name!r}; wanted one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
