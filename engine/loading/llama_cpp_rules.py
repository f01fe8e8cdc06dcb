"""llama.cpp's rules for GGUF vocabularies: how words are split before merging, and tokens known by their text."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# %s: how many digits make one word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As in llama.cpp, upper case is every letter but a to z, and lower case every one but A to Z. %s: what may follow a
# word (twice), and how many digits make one word.
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

IGNORE_MERGES = frozenset((*_LLAMA_3, "tekken"))  # a word that is a token is not merged from its parts
ADD_BOS = IGNORE_MERGES  # where the file does not say


# Tokens that end a text, regardless of their type in the file.
END_TOKENS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<end_of_turn>"),
        *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>"),
        *("<end_of_utterance>", "<turn|>", "<|tool_response>", "<\uff5cend▁of▁sentence\uff5c>", "[e~["),
    )
)

# Fill-in-the-middle tokens by the metadata key that may name them instead; the vocabulary's first match counts.
FIM_TOKENS = {
    "fim_pre": (
        *("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<\uff5cfim▁begin\uff5c>", "<PRE>", "▁<PRE>"),
        *("<|code_prefix|>", "<|prefix|>"),
    ),
    "fim_suf": (
        *("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<\uff5cfim▁hole\uff5c>", "<SUF>", "▁<SUF>"),
        *("<|code_suffix|>", "<|suffix|>"),
    ),
    "fim_mid": (
        *("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<\uff5cfim▁end\uff5c>", "<MID>", "▁<MID>"),
        *("<|code_middle|>", "<|middle|>"),
    ),
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
FIM_END_KEYS = ("fim_pad", "fim_rep", "fim_sep")  # these end a text too

# Control tokens of GPT-OSS that are part of the visible text.
VISIBLE_TOKENS = frozenset(("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"))


def word_patterns(name: str) -> list[str]:
    """Return the regular expressions of a pre-tokenizer, by llama.cpp's name for it.

    Each one splits the pieces of the one before. Raises ValueError for an unknown name.
    """
    if name not in _BY_NAME:
        raise ValueError(f"its pre-tokenizer is {name!r}, must be one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name]
