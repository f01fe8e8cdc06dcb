"""How GGUF vocabularies of kind `gpt2` split a text into words before merging, by llama.cpp's name for the rule."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With %s how many digits stand together.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp takes every letter but a to z for upper case, and every one but A to Z for lower case. With %s what may
# follow a word, and how many digits stand together.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])*(?:(?=\p{L})[^A-Z])+%s"
    r"|[^\r\n\p{L}\p{N}]?(?:(?=\p{L})[^a-z])+(?:(?=\p{L})[^A-Z])*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"

_LLAMA_3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")
_PATTERNS: dict[tuple[str, ...], list[str]] = {
    ("default",): [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
    (*_LLAMA_3, "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): [_WORDS % "{1,3}"],
    ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"): [_WORDS % ""],
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): [r"\p{N}", _GPT2],
    ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4"): [_GPT2],
    ("falcon",): [r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"],
    ("tekken",): [_CASED % ("", "", "")],
    ("gpt-4o", "llama4", "kanana2"): [_CASED % (_CONTRACTIONS, _CONTRACTIONS, "{1,3}")],
    ("deepseek-coder",): [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u0800-\u9fa5\uac00-\ud7ff]+", r"\p{N}"],
    ("deepseek-v3", "hunyuan-dense", "joyai-llm"): [
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u30ff]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ],
}
_BY_NAME = {name: patterns for names, patterns in _PATTERNS.items() for name in names}

IGNORES_MERGES = frozenset((*_LLAMA_3, "tekken"))  # a word that is a token needs no merges to reach it
BEGINS_WITH_BOS = frozenset((*_LLAMA_3, "tekken"))  # where the file does not say


def word_patterns(name: str) -> list[str]:
    """Regular expressions to split by, each within the pieces of the one before. Raises ValueError for other names."""
    if name not in _BY_NAME:
        raise ValueError(f"it splits words as {name!r}, must be one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
