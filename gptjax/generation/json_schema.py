"""JSON schemas as grammars: every text that a grammar has is JSON that fits its schema.

Numbers have at most so many digits that every reader of JSON takes them, and space between values is bounded; a string
ends where its schema or a budget ends it.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from gptjax.config.section import InputError
from gptjax.generation.grammar import Grammar, Node

DIGITS = 15
INDENT = 16  # spaces of a line at the most
ANNOTATIONS = frozenset(
    "title description default examples deprecated readOnly writeOnly $schema $id $comment $defs definitions".split()
)
_OF_KIND = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "minItems", "maxItems"),
    "string": ("minLength", "maxLength"),
    "number": (), "integer": (), "boolean": (), "null": (),
}  # fmt: skip


class _Json(NamedTuple):
    """The parts of all JSON texts, and the schema as a whole, into which references go."""

    grammar: Grammar
    space: Node
    character: Node
    integer: Node
    number: Node
    root: Any


def json_grammar(schema: Any) -> tuple[Grammar, Node]:
    """JSON that fits a schema: any object for {"type": "json_object"}.

    Known are type (also several), properties, required, additionalProperties (beside properties there are none unless
    it is given), items, minItems, maxItems, minLength, maxLength, enum, const, anyOf, and $ref into the schema itself;
    properties stand in the order of the schema. Raises InputError, which names it, for any other keyword that is no
    annotation, and for a schema that nothing fits.
    """
    if isinstance(schema, dict) and schema.get("type") == "json_object":
        schema = {"type": "object", "additionalProperties": True}
    parts = _json(Grammar(), schema)
    try:
        return parts.grammar, _value(parts, schema, "schema")
    except RecursionError:
        raise InputError("schema: it is nested too deep; wanted less, or $ref") from None


def _json(g: Grammar, root: Any) -> _Json:
    line = g.sequence(g.text("\n"), g.repeated(g.text(" "), 0, INDENT))
    space = g.any_of(g.empty, g.text(" "), line)
    digit, hexadecimal = g.one_of("0123456789"), g.one_of("0123456789abcdefABCDEF")
    more = [g.one_of(range(0x80, 0xC0))] * 3
    character = g.any_of(
        g.one_of(bytes(b for b in range(0x20, 0x80) if b not in b'"\\')),
        g.sequence(g.one_of(range(0xC2, 0xE0)), *more[:1]),
        g.sequence(g.text(b"\xe0"), g.one_of(range(0xA0, 0xC0)), *more[:1]),
        g.sequence(g.one_of(bytes([*range(0xE1, 0xED), 0xEE, 0xEF])), *more[:2]),
        g.sequence(g.text(b"\xed"), g.one_of(range(0x80, 0xA0)), *more[:1]),
        g.sequence(g.text(b"\xf0"), g.one_of(range(0x90, 0xC0)), *more[:2]),
        g.sequence(g.one_of(range(0xF1, 0xF4)), *more),
        g.sequence(g.text(b"\xf4"), g.one_of(range(0x80, 0x90)), *more[:2]),
        g.sequence(g.text("\\"), g.one_of('"\\/bfnrt')),
        # Half a surrogate pair, \ud800 to \udfff, is no character.
        g.sequence(g.text("\\u"), g.one_of("0123456789abcefABCEF"), *[hexadecimal] * 3),
        g.sequence(g.text("\\u"), g.one_of("dD"), g.one_of("01234567"), *[hexadecimal] * 2),
    )
    whole = g.any_of(g.text("0"), g.sequence(g.one_of("123456789"), g.repeated(digit, 0, DIGITS - 1)))
    integer = g.sequence(g.optional(g.text("-")), whole)
    fraction = g.optional(g.sequence(g.text("."), g.repeated(digit, 1, DIGITS)))
    exponent = g.sequence(g.one_of("eE"), g.optional(g.one_of("+-")), g.repeated(digit, 1, 2))
    return _Json(g, space, character, integer, g.sequence(integer, fraction, g.optional(exponent)), root)


def _value(j: _Json, schema: Any, where: str, heads: frozenset[str] = frozenset()) -> Node:
    """The grammar of a schema; `heads` are the references that it stands at the very beginning of."""
    g = j.grammar
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InputError(f"{where} is {schema!r:.60}; wanted a JSON schema, which is an object")
    used = [name for name in schema if name not in ANNOTATIONS]
    alone = next((name for name in ("$ref", "anyOf", "const", "enum") if name in schema), "")
    beside = [name for name in used if name != alone and not (alone in ("const", "enum") and name == "type")]
    known = {"type", "$ref", "anyOf", "const", "enum", *(name for names in _OF_KIND.values() for name in names)}
    if unknown := [name for name in used if name not in known]:
        raise InputError(
            f"{where}: the keyword {unknown[0]!r} is not supported; wanted one of {', '.join(sorted(known))}"
        )
    if alone and beside:
        raise InputError(f"{where}: {beside[0]!r} beside {alone!r} is not supported; wanted one of them")
    if alone == "$ref":
        return _reference(j, schema["$ref"], where, heads)
    if alone == "anyOf":
        parts = schema["anyOf"]
        if not isinstance(parts, list) or not parts:
            raise InputError(f"{where}: anyOf is {parts!r:.60}; wanted a list of schemas")
        return g.any_of(*(_value(j, part, f"{where}.anyOf[{i}]", heads) for i, part in enumerate(parts)))
    kinds = schema.get("type", list(_OF_KIND) if not used else None)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if alone:
        values = [schema["const"]] if alone == "const" else schema["enum"]
        fit = [v for v in values if kinds is None or _kinds(v) & {*kinds}] if isinstance(values, list) else []
        if not fit:
            raise InputError(f"{where}: no value fits {alone} {values!r:.60}; wanted at least one")
        return g.any_of(*(g.text(_literal(value, where)) for value in fit))
    if not isinstance(kinds, list) or not kinds or any(kind not in _OF_KIND for kind in kinds):
        got = f"type is {kinds!r:.40}" if "type" in schema else "type is missing"
        raise InputError(f"{where}: {got}; wanted one of {', '.join(_OF_KIND)}, or enum, const, anyOf or $ref")
    allowed = {"type", *(name for kind in kinds for name in _OF_KIND[kind])}
    if wrong := [name for name in used if name not in allowed]:
        raise InputError(f"{where}: {wrong[0]!r} says nothing of type {', '.join(kinds)}; leave it out")
    makers: dict[str, Callable[[], Node]] = {
        "object": lambda: _object(j, schema, where),
        "array": lambda: _array(j, schema, where),
        "string": lambda: g.sequence(g.text('"'), _characters(j, schema, where), g.text('"')),
        "number": lambda: j.number,
        "integer": lambda: j.integer,
        "boolean": lambda: g.any_of(g.text("true"), g.text("false")),
        "null": lambda: g.text("null"),
    }
    if not used and kinds == list(_OF_KIND):  # anything: it holds itself
        if not g.defines("anything"):
            g.reference("anything")
            g.define("anything", g.any_of(*(maker() for maker in makers.values())))
        return g.reference("anything")
    return g.any_of(*(makers[kind]() for kind in kinds))


def _kinds(value: Any) -> set[str]:
    """The types of JSON schema that a value has."""
    if value is None or isinstance(value, bool):
        return {"null" if value is None else "boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    return {{str: "string", list: "array", dict: "object"}[type(value)]}


def _reference(j: _Json, name: Any, where: str, heads: frozenset[str]) -> Node:
    if not isinstance(name, str) or not name.startswith("#"):
        raise InputError(f"{where}: $ref is {name!r:.60}; wanted one into the schema itself, #/$defs/NAME")
    if name in heads:
        raise InputError(f"{where}: $ref {name!r:.60} refers to itself; wanted an object or an array in between")
    if not j.grammar.defines(name):
        target = j.root
        for part in filter(None, name[1:].split("/")):
            part = part.replace("~1", "/").replace("~0", "~")
            target = target.get(part) if isinstance(target, dict) else None
        if target is None:
            raise InputError(f"{where}: $ref {name!r:.60} names nothing in the schema")
        j.grammar.reference(name)
        j.grammar.define(name, _value(j, target, name, heads | {name}))
    return j.grammar.reference(name)


def _literal(value: Any, where: str) -> str:
    """A value as JSON; half a surrogate pair, which UTF-8 can't write, by its escape."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode().decode()
    except UnicodeEncodeError:
        return json.dumps(value)
    except ValueError:
        raise InputError(f"{where}: {value!r:.40} is no JSON") from None


def _count(schema: dict[str, Any], name: str, default: int | None, where: str) -> int | None:
    value = schema.get(name, default)
    if value is not None and (type(value) is not int or value < 0):
        raise InputError(f"{where}: {name} is {value!r:.40}; wanted a whole number, at least 0")
    return value


def _characters(j: _Json, schema: dict[str, Any], where: str) -> Node:
    least, most = _count(schema, "minLength", 0, where) or 0, _count(schema, "maxLength", None, where)
    return j.grammar.repeated(j.character, least, most)


def _array(j: _Json, schema: dict[str, Any], where: str) -> Node:
    g, least, most = j.grammar, _count(schema, "minItems", 0, where) or 0, _count(schema, "maxItems", None, where)
    if most is not None and most < least:
        raise InputError(f"{where}: minItems is {least}, maxItems {most}; nothing fits")
    none = g.sequence(g.text("["), j.space, g.text("]"))
    if most == 0:
        return none
    item = _value(j, schema.get("items", True), f"{where}.items")
    more = g.repeated(g.sequence(g.text(","), j.space, item), max(least - 1, 0), None if most is None else most - 1)
    some = g.sequence(g.text("["), j.space, item, more, j.space, g.text("]"))
    return some if least else g.any_of(none, some)


def _object(j: _Json, schema: dict[str, Any], where: str) -> Node:
    g, properties, required = j.grammar, schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise InputError(f"{where}: wanted properties as an object of schemas, and required as a list of names")
    if missing := [name for name in required if name not in properties]:
        raise InputError(f"{where}: required names {missing[0]!r:.40}, which properties lack; add it there")
    others = schema.get("additionalProperties", "properties" not in schema)
    close, comma = g.sequence(j.space, g.text("}")), g.text(",")
    begun = first = close
    if others is not False:
        name = _other_name(j, [_literal(name, where)[1:-1] for name in properties])
        value = _value(j, others, f"{where}.additionalProperties")
        pair = g.sequence(j.space, g.text('"'), name, g.text('":'), j.space, value)
        more = g.repeated(g.sequence(comma, pair))
        begun, first = g.sequence(more, close), g.any_of(close, g.sequence(pair, more, close))
    for name, inner in reversed(properties.items()):
        key = g.text(_literal(name, where) + ":")
        pair = g.sequence(j.space, key, j.space, _value(j, inner, f"{where}.{name}"), begun)
        begun, first = (
            (g.sequence(comma, pair), pair)
            if name in required
            else (g.any_of(begun, g.sequence(comma, pair)), g.any_of(first, pair))
        )
    return g.sequence(g.text("{"), first)


def _other_name(j: _Json, names: list[str]) -> Node:
    """The characters of a property's name that is none of these; escapes, by which one could be spelt, are not used."""
    g = j.grammar
    plain = g.any_of(*(part for part in j.character.parts if not _escapes(part)))
    if not names:
        return g.repeated(plain)
    return _unlike(j, plain, frozenset(names))


def _escapes(part: Node) -> bool:
    return part.kind == "pair" and part.parts[0].kind == "text" and part.parts[0].parts[0].startswith(b"\\")


def _unlike(j: _Json, plain: Node, names: frozenset[str]) -> Node:
    """Names that begin with no byte of these, or go on unlike them from there: all texts but these."""
    g, ascii_names = j.grammar, [name.encode() for name in names]
    firsts = {name[0] for name in ascii_names if name}
    ends = [] if b"" in ascii_names else [g.empty]
    inside = [b for b in range(0x20, 0x80) if b not in b'"\\' and b not in firsts]
    parts = [g.sequence(g.one_of(bytes(inside)), g.repeated(plain))] if inside else []
    for byte in sorted(firsts):
        if byte < 0x80 and byte not in b'"\\':
            rest = frozenset(name[1:].decode() for name in ascii_names if name[:1] == bytes([byte]))
            parts.append(g.sequence(g.one_of(bytes([byte])), _unlike(j, plain, rest)))
    if max(firsts, default=0) < 0x80:  # else a character that is no ASCII may begin a name: none is used there
        wide = [p for p in plain.parts if not (p.kind == "byte" and max(p.parts[0]) < 0x80)]
        parts.append(g.sequence(g.any_of(*wide), g.repeated(plain)))
    return g.any_of(*ends, *parts)
