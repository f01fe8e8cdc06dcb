"""Texts and conversations to token ids."""

from collections.abc import Mapping
from collections.abc import Sequence as Series
from typing import Any

from dispec.engine.api.arguments import IN_LLM, IN_PARAMS
from dispec.engine.api.prompts import PromptInput, TokenizedPrompt
from dispec.engine.text.special_token_marker import ChatText
from dispec.engine.text.tokenizer import Tokenizer
from dispec.engine.unknown_names import refuse_unknown

Messages = Series[Mapping[str, Any]]

# Variables that templates of other models declare.
_OF_TEMPLATES: tuple[str, ...] = ("enable_thinking", "thinking", "reasoning_effort", "documents")
_IN_TEMPLATES = {"chat_template_kwargs={{{!r}: …}}": _OF_TEMPLATES}
_TEMPLATE_ARGUMENTS = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "allow_special_tokens_in_content",
)


def template_arguments(template: Mapping[str, Any], **arguments: Any) -> dict[str, Any]:
    """Return the arguments of `PromptProcessor.chat`: variables of the template, and arguments that are not None."""
    return {**template, **{name: value for name, value in arguments.items() if value is not None}}


class PromptProcessor:
    """Makes the prompts of an engine. tokenizer: None for a model that was made from a `ModelConfig`."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError if there is none."""
        if self._tokenizer is None:
            raise ValueError("this model was made from a ModelConfig and has no tokenizer: pass token ids")
        return self._tokenizer

    def tokenize(self, prompt: PromptInput) -> TokenizedPrompt:
        """Return a prompt's token ids. Raises ValueError for a text without a tokenizer."""
        token_ids = prompt.token_ids
        if token_ids is None:
            token_ids = self.tokenizer.encode(prompt.text or "")
        return TokenizedPrompt(token_ids, prompt.text, prompt.cache_salt)

    def chat(
        self, messages: Messages, *, allow_special_tokens_in_content: bool = False, **template: Any
    ) -> TokenizedPrompt:
        """Return a conversation in the chat template, as `LLM.chat_prompt` says."""
        more = template.pop("chat_template_kwargs", None) or {}
        if not isinstance(more, Mapping):
            raise ValueError(f"chat_template_kwargs is {type(more).__name__}, must be a mapping of template variables")
        for name in more:
            if not isinstance(name, str) or name == "messages" or name in template:
                raise ValueError(f"chat_template_kwargs holds {name!r}, which is given already or is no variable")
        text = self.tokenizer.render_chat(messages, **template, **more)
        if allow_special_tokens_in_content:
            text = ChatText(text.plain, text.plain, None)
        return TokenizedPrompt(self.tokenizer.encode_chat(text), text.plain)

    def check_template_names(self, owner: str, given: Mapping[str, Any], own: tuple[str, ...]) -> None:
        """Raise ValueError for a name that is neither among `own` nor an argument or variable of the template."""
        known = (*own, *_TEMPLATE_ARGUMENTS, *sorted(self.tokenizer.template_variables))
        refuse_unknown(owner, given, known, IN_PARAMS | IN_LLM | _IN_TEMPLATES)
