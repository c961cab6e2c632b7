"""From a prompt to the text that a policy is asked: learner and samplers must write the same."""

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from services.runtime.errors import ConfigError


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: str, system_prompt: str) -> str:
    """The conversation up to where the assistant begins, special tokens written out. Raises ConfigError for a broken
    template, and for one that knows no system message where there is a `system_prompt`."""
    messages = [{"role": "user", "content": text}]
    if system_prompt:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:  # what a template computes
        raise ConfigError(f"the chat template fails on a prompt: {error}") from error
