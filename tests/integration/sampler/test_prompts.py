"""Text to tokens and back, with tokenizers as people have them."""

import json
from pathlib import Path

from services.lab.tiny_policy import byte_level_tokenizer
from services.sampler.prompts import PromptCodec


def test_completions_are_read_exactly_as_they_were_written(tmp_path: Path) -> None:
    """A tokenizer may say that blanks before marks are to go: they would be gone from code."""
    byte_level_tokenizer(["a b"], 259).save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    wanted = {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    settings.write_text(json.dumps(json.loads(settings.read_text()) | wanted))
    codec = PromptCodec(tmp_path, "")
    text = "print(' . ', a != b)  # do n't , I 'm"
    assert text in codec.decode(codec.render(text))


def test_a_beginning_of_sequence_is_not_doubled(tmp_path: Path) -> None:
    """Gemma's tokenizer adds one, and so does its template."""
    tokenizer = byte_level_tokenizer(["a b"], 259)
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    assert PromptCodec(tmp_path, "").render("ab").count(2) == 1
