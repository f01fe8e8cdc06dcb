"""What /tokenizer_info answers, from which evaluation harnesses make a tokenizer that asks this server."""

from typing import Any

from dispec.engine.process.messages import EngineInfo
from dispec.engine.text.tokenizer import Tokenizer

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_PLACES = ("vocab_file", "merges_file", "tokenizer_file", "name_or_path")  # of files on this machine


def tokenizer_configuration(tokenizer: Tokenizer, info: EngineInfo) -> dict[str, Any]:
    """Return the checkpoint's tokenizer_config.json as vLLM does: tokens as texts, the template wherever it was found.

    The sizes and ids that follow are the engine's own.
    """
    config = {name: _plain(value) for name, value in tokenizer.config.items() if name not in _PLACES}
    added = tokenizer.backend.get_added_tokens_decoder()
    config["added_tokens_decoder"] = {str(token_id): token.content for token_id, token in sorted(added.items())}
    config["tokenizer_class"] = config.get("tokenizer_class") or "PreTrainedTokenizerFast"
    config["chat_template"] = tokenizer.chat_template
    tokens = dict.fromkeys(_ROLES) | tokenizer.special_tokens
    eos_token_id = tokenizer.eos_token_id
    if eos_token_id is None and info.eos_token_ids:  # named by config.json alone
        eos_token_id = info.eos_token_ids[0]
        tokens["eos_token"] = tokenizer.token_string(eos_token_id)
    return {
        **config,
        **tokens,
        "vocab_size": tokenizer.vocab_size,
        "model_vocab_size": info.vocab_size,
        "model_max_length": info.max_model_len,
        "has_chat_template": tokenizer.has_chat_template,
        "is_byte_level": tokenizer.is_byte_level,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos_token_id,
        "eos_token_ids": info.eos_token_ids,
    }


def _plain(value: Any) -> Any:
    """Return the same with each token as its text, where a file has an object with its `content`."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
