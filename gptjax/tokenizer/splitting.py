"""The patterns by which byte-level tokenizers split text into words, and cuts that change no word."""

import re

_GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_CL100K = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"""
    r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
)
_O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"""
    r"""\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)

# The published patterns of GPT-2, of GPT-4 (and of Llama 3) and of GPT-4o, by tokenizer.pattern.
PATTERNS = {"gpt2": _GPT2, "cl100k": _CL100K, "o200k": _O200K}

# Each of these, and Qwen's variant, splits any text into words with nothing left out.
COMPLETE = frozenset([*PATTERNS.values(), _CL100K.replace("{1,3}", "")])

# Between a letter or digit and one of these every pattern above ends a word, and none looks back beyond it. After a
# newline they do not: "a\n\nb" has the words "a", "\n", "\n", "b", but "a\n\n" alone has "a" and "\n\n".
WORD_ENDS = re.compile(r"(?<=[^\W_])(?=[ \n.,;:!?\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f])")
