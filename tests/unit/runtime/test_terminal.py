from services.runtime.terminal import visible


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\x1b[2Jb\x07 ü\n\u202e\udcff") == "a\\x1b[2Jb\\x07 ü\n\\u202e\\udcff"


def test_what_only_looks_unusual_stays() -> None:
    for text in ("資料\u3000一.toml", "a\u00a0b", "\U0001f469\u200d\U0001f4bb"):
        assert visible(text) == text
