from services.runtime.terminal import visible


def test_control_characters_are_shown_and_not_obeyed():
    assert visible("a\x1b[2Jb\x07 ü\n\u202e\udcff") == "a\\x1b[2Jb\\x07 ü\n\\u202e\\udcff"
