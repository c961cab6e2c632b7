"""Between text and tokens: the run's tokenizer, chat template and system prompt."""

from collections.abc import Sequence
from pathlib import Path

from services.runtime.errors import ConfigError
from services.sampler.model_files import load_tokenizer
from services.wire.conversation import prompt_text


class PromptCodec:
    """Raises InputMissingError or ConfigError for a directory whose tokenizer or chat template cannot be used."""

    def __init__(self, model_dir: Path, system_prompt: str) -> None:
        self._tokenizer = load_tokenizer(model_dir)
        self._system_prompt = system_prompt
        if not self._tokenizer.chat_template:
            raise ConfigError(f"the tokenizer in {model_dir} has no chat template: add chat_template.jinja")

    def render(self, text: str) -> tuple[int, ...]:
        """Token ids of the conversation up to where the assistant begins. Raises ConfigError for a broken template."""
        rendered = prompt_text(self._tokenizer, text, self._system_prompt)
        # The template writes the special tokens itself: adding them again would double the first one.
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return tuple(int(token) for token in ids)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a completion, without special tokens; invalid bytes become U+FFFD.

        Exactly what was written: a tokenizer may say that blanks before full stops are to go.
        """
        decoded = self._tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)
