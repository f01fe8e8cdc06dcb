"""Draft models that share their target's embedding and head: only their layers are on disk.

Such a draft is a directory in Hugging Face layout without the weights of embedding and head, with a `draft.json`:

    vocabulary   hash of the target's tokens and their ids
    head_tokens  ids of the tokens that the draft can propose, in order; null for all
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dispec import ops
from dispec.engine.errors import CheckpointError
from dispec.engine.loading.checkpoint import read_safetensors
from dispec.engine.loading.default_model import DEFAULT_DRAFT, default_draft_directory
from dispec.engine.loading.model_source import DRAFT_FILE
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.config import ModelConfig, config_from_hugging_face
from dispec.layers.types import Weights
from dispec.layers.weight_stacks import Packing

_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class SharedDraft:
    """A draft's own part. Its weights are not read yet."""

    directory: Path
    config: ModelConfig
    head_tokens: tuple[int, ...] | None

    def tensors(
        self, dtype: torch.dtype = torch.float32, quantization: str | None = "off"
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the draft's weights, as `Checkpoint.tensors`."""
        return read_safetensors(self.directory / _WEIGHTS)

    def borrowed(self, target: Weights, packing: Packing) -> dict[str, ops.Matrix]:
        """Return embedding and head by their names in `Weights`. The rows of `head_tokens` are packed anew."""
        if self.head_tokens is None:
            return {"embedding": target.embedding, "lm_head": target.lm_head}
        rows = torch.tensor(self.head_tokens, device=target.rope_frequencies.device)
        readable = target.lm_head
        # A tied head without readable rows is a second copy of the embedding.
        if not isinstance(readable, Tensor) and not readable.has_readable_rows:
            readable = target.embedding
        head = ops.embedding(readable, rows, self.config.hidden_size)
        return {"embedding": target.embedding, "lm_head": packing.pack(head, is_head=True)}


def find_shared_draft(name: str | Path, tokenizer: Tokenizer | None, target: ModelConfig) -> SharedDraft | None:
    """Find the draft with a name or in a directory; None if it does not share its target's weights.

    tokenizer: of the target, if it has one. Raises CheckpointError for an incomplete draft or a failed download,
    ValueError for a draft of another target.
    """
    directory = default_draft_directory() if name == DEFAULT_DRAFT else Path(name).expanduser()
    if not (directory / DRAFT_FILE).is_file():
        return None
    try:
        about = json.loads((directory / DRAFT_FILE).read_text(encoding="utf-8"))
        config = config_from_hugging_face(json.loads((directory / "config.json").read_text(encoding="utf-8")))
        head_tokens = about["head_tokens"] and tuple(map(int, about["head_tokens"]))
        fits = tokenizer is None or about["vocabulary"] == vocabulary_hash(tokenizer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{directory} has an invalid {DRAFT_FILE} or config.json ({error}): make it again"
        ) from error
    if not fits or (config.hidden_size, config.vocab_size) != (target.hidden_size, target.vocab_size):
        raise ValueError(
            f"speculative_model {str(name)!r} shares embedding and head with the model that it was made for, which is"
            " another one than this"
        )
    if head_tokens is not None and not all(0 <= token < config.vocab_size for token in head_tokens):
        raise CheckpointError(f"{directory / DRAFT_FILE} names tokens that the model does not have: make it again")
    return SharedDraft(directory, config, head_tokens)


def save_shared_draft(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    head_tokens: list[int] | None,
    tokenizer: Tokenizer,
) -> None:
    """Write a draft. config: contents of `config.json`. tensors: its own weights, by their Hugging Face names."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / _WEIGHTS)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    about = {"vocabulary": vocabulary_hash(tokenizer), "head_tokens": head_tokens}
    (directory / DRAFT_FILE).write_text(json.dumps(about) + "\n", encoding="utf-8")


def vocabulary_hash(tokenizer: Tokenizer) -> str:
    """Return a hash of all tokens and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.vocabulary.items())).encode()).hexdigest()
