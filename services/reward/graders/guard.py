"""Refuses text whose value has no bound, before any algebra. The pool's kill is the guarantee; this saves it."""

import math
import re

ANSWER_CHARS_MAX = 1000
NESTING_MAX = 24
DIGITS_MAX = 400
EXPONENT_MAX = 9999
EXPONENTS_PRODUCT_MAX = 10**6
FACTORIAL_MAX = 999

_DIGIT_RUN = re.compile(rf"\d{{{DIGITS_MAX + 1}}}")
_POWER = re.compile(r"(?:\^|\*\*)\s*[{(\s]*[-+]?\s*(\d+)")
# 9^9^9, 9^{9^9}, 9**(9**9): a power of numbers inside an exponent; not e^{x^2}, and not 2^{10}+3^{10}.
_TOWER = re.compile(
    r"(?:\^|\*\*)\s*(?:-?[\d.]+\s*(?:\^|\*\*)|\{[^{}^*]{0,40}\d[\s)]*(?:\^|\*\*)|\([^()^*]{0,40}\d[\s}]*(?:\^|\*\*))"
)
_FACTORIAL = re.compile(r"(\d+)[\s)}]*!")
_CHAINED_FACTORIAL = re.compile(r"![\s)}]*!")
_EXPRESSION_FACTORIAL = re.compile(r"(?:\^|\*|\\times|\\cdot)[^!]{0,200}[)}]\s*!")
_BINOMIAL = re.compile(r"\\[dt]?binom[^=,;]{0,40}?(?:\d{5}|\^)")
ITERATED = re.compile(r"\\(?:sum|prod|int|iint|iiint|oint|lim)(?![A-Za-z])")


def too_big(text: str) -> str | None:
    """Why `text` is not evaluated, or None. Linear in the length of `text`."""
    if len(text) > ANSWER_CHARS_MAX:
        return f"longer than {ANSWER_CHARS_MAX} characters"
    if _nesting(text) > NESTING_MAX:
        return f"nested deeper than {NESTING_MAX} levels"
    if _DIGIT_RUN.search(text):
        return f"a number of more than {DIGITS_MAX} digits"
    exponents = [power[1] for power in _POWER.finditer(text)]
    if any(len(exponent) > 4 for exponent in exponents):
        return f"an exponent above {EXPONENT_MAX}"
    if math.prod(max(1, int(exponent)) for exponent in exponents) > EXPONENTS_PRODUCT_MAX:
        return "powers of powers"
    if _TOWER.search(text):
        return "a tower of powers"
    if any(len(one[1]) > 3 or int(one[1]) > FACTORIAL_MAX for one in _FACTORIAL.finditer(text)):
        return f"a factorial above {FACTORIAL_MAX}!"
    if _CHAINED_FACTORIAL.search(text) or _EXPRESSION_FACTORIAL.search(text) or _BINOMIAL.search(text):
        return "a factorial of an expression"
    if ITERATED.search(text):
        return "an unevaluated sum, product, integral or limit"
    return None


def unprintable(text: str) -> str | None:
    """Why `text` cannot be an answer at all: NUL and other control characters, or lone surrogates."""
    for character in text:
        if "\ud800" <= character <= "\udfff":
            return "a lone surrogate"
        if character < " " and character not in "\t\n\r":
            return "a control character"
    return None


def balanced(text: str) -> bool:
    """Whether curly brackets that are not escaped pair up."""
    depth = 0
    escaped = False
    for character in text:
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                return False
    return depth == 0


def _nesting(text: str) -> int:
    deepest = depth = 0
    for character in text:
        if character in "({[":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")}]":
            depth = max(0, depth - 1)
    return deepest
