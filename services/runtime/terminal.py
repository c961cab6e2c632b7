"""Text of others on a terminal."""

import unicodedata

_HARMFUL = frozenset({"Cc", "Cs", "Zl", "Zp"})
_TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They turn the order of what follows."""


def visible(text: str) -> str:
    """`text` without control characters, which would move the cursor, colour or reorder the rest: a file's name, a
    peer's words. Line ends stay."""
    return "".join(c.encode("unicode_escape").decode() if _acts(c) else c for c in text)


def _acts(character: str) -> bool:
    return character in _TURNING or (character != "\n" and unicodedata.category(character) in _HARMFUL)
