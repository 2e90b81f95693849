"""A calculator for models: an expression is parsed and computed exactly, within limits; nothing is ever evaluated."""

import decimal
import math
import re
from fractions import Fraction

from gptjax.config.section import InputError

MOST_CHARACTERS = 1_000
MOST_DIGITS = 100  # of a number that is written, and of the numerator and the denominator of every result
MOST_DEPTH = 32  # of parentheses and powers inside each other
_SHOWN = 30  # digits of a result that is written exactly behind its point
_ROUNDED = decimal.Context(prec=15)
_ROOTS = decimal.Context(prec=15, Emax=MOST_DIGITS, Emin=-MOST_DIGITS)
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|(\*\*|//|[-+*/%()]))")


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and parentheses, as Python has them, but exact.

    A value whose digits end is written with all of them, up to 30 behind the point, others with 15 digits. Raises
    InputError, in one line, for anything else, and for what is longer, deeper or larger than the limits above.
    """
    if len(expression) > MOST_CHARACTERS:
        raise InputError(f"the expression has {len(expression):,} characters; wanted at most {MOST_CHARACTERS:,}")
    parser = _Parser(_tokens(expression))
    value = parser.sum()
    if parser.next:
        raise InputError(f"unexpected {parser.next!r}; wanted an operator or the end")
    return _written(value)


def _tokens(expression: str) -> list[str]:
    tokens, at, end = [], 0, len(expression.rstrip())
    while at < end:
        match = _TOKEN.match(expression, at)
        if not match:
            wrong = re.search(r"[A-Za-z_]\w*|\S", expression[at:])
            raise InputError(f"unexpected {wrong[0][:20] if wrong else ''!r}; wanted numbers, + - * / // % ** and ( )")
        if match[1] and len(match[1]) > MOST_DIGITS:
            raise InputError(f"a number has {len(match[1])} digits; wanted at most {MOST_DIGITS}")
        tokens.append(match[1] or match[2])
        at = match.end()
    return tokens


class _Parser:
    """Recursive descent over tokens: a sum of products of signed powers."""

    def __init__(self, tokens: list[str]):
        self._tokens, self._at, self._depth = tokens, 0, 0

    @property
    def next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        found = self.next
        if found not in wanted:
            return ""
        self._at += 1
        return found

    def sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = _bounded(value + other if sign == "+" else value - other)
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while operator := self._take("*", "/", "//", "%"):
            other = self._signed()
            if operator != "*" and not other:
                raise InputError("division by zero")
            if operator == "*":
                value = value * other
            else:
                value = {"/": Fraction.__truediv__, "//": Fraction.__floordiv__, "%": Fraction.__mod__}[operator](
                    value, other
                )
            value = _bounded(Fraction(value))
        return value

    def _signed(self) -> Fraction:
        negative = False
        while sign := self._take("+", "-"):
            negative ^= sign == "-"
        value = self._power()
        return -value if negative else value

    def _power(self) -> Fraction:
        base = self._atom()
        if not self._take("**"):
            return base
        self._descend()
        exponent = self._signed()
        self._depth -= 1
        return _power(base, exponent)

    def _atom(self) -> Fraction:
        if self._take("("):
            self._descend()
            value = self.sum()
            self._depth -= 1
            if not self._take(")"):
                raise InputError(f"got {self.next or 'the end'!r}; wanted )")
            return value
        if not self.next[:1].isdigit() and not self.next.startswith("."):
            raise InputError(f"got {self.next or 'the end'!r}; wanted a number or (")
        self._at += 1
        return Fraction(self._tokens[self._at - 1])

    def _descend(self) -> None:
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise InputError(f"parentheses and powers stand more than {MOST_DEPTH} deep; wanted at most so many")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if not base and exponent < 0:
        raise InputError("division by zero")
    if exponent.denominator == 1:
        # Estimated before anything is computed: 9**9**9 has 369,693,100 digits.
        digits = max(math.log10(abs(base.numerator) or 1), math.log10(base.denominator)) * abs(exponent)
        if digits > MOST_DIGITS:
            raise _too_large()
        return _bounded(Fraction(base**exponent.numerator))
    if base < 0:
        raise InputError("a root of a negative number; wanted one of a positive number")
    try:
        return Fraction(_ROOTS.power(_decimal(base, _ROOTS), _decimal(exponent, _ROOTS)))
    except decimal.DecimalException:
        raise _too_large() from None


def _decimal(value: Fraction, context: decimal.Context) -> decimal.Decimal:
    return context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator) >= 10**MOST_DIGITS:
        raise _too_large()
    return value


def _too_large() -> InputError:
    return InputError(f"a result has more than {MOST_DIGITS} digits; wanted smaller numbers")


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**_SHOWN
    if scaled.denominator == 1:
        sign, digits = "-" * (value < 0), str(abs(scaled.numerator)).rjust(_SHOWN + 1, "0")
        return f"{sign}{digits[:-_SHOWN]}.{digits[-_SHOWN:]}".rstrip("0")
    rounded = _decimal(value, _ROUNDED)
    return f"{rounded:f}" if -6 <= rounded.adjusted() < 15 else str(rounded)
