"""Unit words: which suffixes of a number are units, and which spellings mean the same unit."""

import re

PERCENT = "%"
SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_SPELLINGS: dict[str, str] = {
    PERCENT: r"% \% percent percents percentage pct",
    "degree": r"° \circ ^\circ ^{\circ} degree degrees deg",
    "dollar": r"$ \$ dollar dollars usd bucks",
    "cent": "cent cents ¢",
    "euro": "euro euros eur €",
    "pound": "pound pounds lb lbs £",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres",
    "inch": "inch inches in",
    "foot": "foot feet ft",
    "yard": "yard yards yd",
    "mile": "mile miles mi",
    "mg": "mg milligram milligrams",
    "g": "g gram grams",
    "kg": "kg kilogram kilograms kilo kilos",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "l": "l L liter liters litre litres",
    "s": "s sec secs second seconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "square": "square sq",
    "cubic": "cubic cu",
}
_CANONICAL = {spelling: unit for unit, line in _SPELLINGS.items() for spelling in line.split()}
# Words that make another value, an expression, a list or an approximation out of "number word": never units.
_NOT_UNITS_LINE = """pi e i or and mod modulo to sqrt sin cos tan log ln exp inf infinity factorial choose plus minus
    times over by divided squared cubed is not than less more about approximately x y z n k
    hundred hundreds thousand thousands million millions billion billions trillion trillions bn mil
    half halves third thirds tenth tenths hundredth hundredths thousandth thousandths millionth millionths
    doubled tripled halved wrong incorrect false"""
_NOT_UNITS = frozenset(_NOT_UNITS_LINE.split())
_TEMPERATURE = re.compile(r"(?:\^\{?\\circ\}?|°)\s*([CF])(?![A-Za-z])")
_SPEED = re.compile(r"\b([mk])(?:ph|mh)\b", re.IGNORECASE)
_INVERSE = "inverse"
_POWERS = {"-": _INVERSE, "2": "square", "3": "cubic"}
_SCALE_OF = {"C": "celsius", "F": "fahrenheit"}
_TEXT = re.compile(r"\\(?:text|textbf|textrm|textit|mathrm|mbox|mathit|operatorname)\s*\{([^{}]*)\}")
_WORD = re.compile(r"\^\{?\\circ\}?|\\[%$]|[%°$¢€£]|[A-Za-z]+|[²³]|\^\{?-?[123]\}?")
# 5^2 is a power, 5 cm^2 an area.
_EXPONENT = re.compile(r"[\s()./-]*(?:\^(?!\{?\\circ)|[²³])")
_SUFFIX = re.compile(r"(?:\s|\\ |~|/|\.|-|\(|\)|\^\{?\\circ\}?|\\[%$]|[%°$¢€£²³]|[A-Za-z']|\^\{?-?[123]\}?)*")


def _plain(suffix: str) -> str:
    plain = _TEXT.sub(r" \1 ", suffix).replace("\\,", " ").replace("\\;", " ").replace("\\ ", " ")
    plain = _SPEED.sub(lambda match: f"{'mile' if match[1] in 'mM' else 'km'}/h", plain)
    return _TEMPERATURE.sub(lambda match: f" degree {_SCALE_OF[match[1]]}", plain)


def is_unit(suffix: str, *, glued: bool) -> bool:
    """Whether what follows a number is a unit and not a factor: "18 cm", "18cm", "18\\text{ apples}", but not "18x".

    `glued` means that nothing separates it from the number; then a bare word must be a known unit.
    """
    plain = _plain(suffix)
    if _SUFFIX.fullmatch(plain) is None:
        return False
    if _EXPONENT.match(plain):
        return False
    words: list[str] = re.findall(r"[A-Za-z]+", plain.replace("\\circ", ""))
    if not words and "'" in plain:
        return False
    bare = plain == suffix
    # In \text these are newton and kelvin; glued to the number K is a thousand.
    symbols = () if bare else ("N", "K") if not glued or " K" in suffix else ("N",)
    if any(word.lower() in _NOT_UNITS and word not in symbols for word in words):
        return False
    if bare and glued and words and words[0] not in _CANONICAL:
        return False
    # A lone letter that is no known unit is a variable, even after a space.
    return not (bare and any(len(word) == 1 and word not in _CANONICAL for word in words))


def unit_words(suffix: str) -> frozenset[str]:
    """The canonical unit words of a suffix; unknown words lose a plural s."""
    plain = _plain(suffix).replace("²", "^2").replace("³", "^3")
    words: set[str] = set()
    powers: set[str] = set()
    for word in _WORD.findall(plain):
        if word.startswith("^") and "circ" not in word:
            powers.update(name for digit, name in _POWERS.items() if digit in word)
        elif word.lower() not in ("per", "a", "an", "the", "of"):
            words.add(_CANONICAL.get(word) or _CANONICAL.get(word.lower()) or word.lower().removesuffix("s"))
    # "m s^{-1}" is "m/s", but "s^{-1}" is not "s".
    return frozenset(words | (powers if len(words) == 1 else powers - {_INVERSE}))


def agree(units: frozenset[str], others: frozenset[str]) -> bool:
    """Whether the units of two quantities do not contradict each other; one side may leave out units, or all."""
    if not units or not others:
        return True
    return (units <= others or others <= units) and (_INVERSE in units) == (_INVERSE in others)
