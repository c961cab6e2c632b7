"""Text of others on a terminal."""


def visible(text: str) -> str:
    """`text` without control characters, which would move the cursor or colour the rest: a file's name, a peer's words.
    Line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
