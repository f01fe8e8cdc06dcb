"""Make a draft model: a few layers of the target, trained to predict what the target predicts on text of its own.

The loss is the cross entropy of the target's distribution, at every token of its answers. What is asked of a draft is
that its guesses stand, so that is what is measured, on answers to prompts that it has not seen: how often its likeliest
token is the target's, and the mass that the two distributions share, which bounds how often drawn guesses can stand.
"""

import gc
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from dispec.bench.distillation.models import chosen_layers, draft_of, transformers_model
from dispec.bench.distillation.recipe import Recipe
from dispec.bench.distillation.text import Text, read_text, write_text
from dispec.engine.api.llm import LLM
from dispec.engine.loading.checkpoint import Checkpoint, find_checkpoint
from dispec.engine.loading.draft_checkpoint import save_shared_draft
from dispec.engine.options import EngineOptions
from dispec.engine.text.tokenizer import Tokenizer

_TEXT, _STATE = "distill-text.jsonl", "distill-state.pt"
_ROWS = {"cpu": 2048, "cuda": 8192}  # whose logits over the whole vocabulary are held at once
_SHARE_OF_FREE = 0.5  # of the device's memory, that the target's states may take
_SAYS_LOSS = 50  # steps from one look at the loss to the next: the device must be waited for
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Agreement(NamedTuple):
    """On held-out text: how often the likeliest tokens are the same, and the mass that both distributions share."""

    greedy: float
    shared: float


class _Target(NamedTuple):
    """What the target predicts at each place of a text that is learned from: every epoch needs the same.

    states: its last ones. normaliser: logarithm of the sum of its exponentiated logits, with which a probability needs
    no other token's logit. best: its likeliest tokens.
    """

    states: Float[Tensor, "R E"]
    normaliser: Float[Tensor, "R"]
    best: Int[Tensor, "R"]


class _Batch(NamedTuple):
    """Answers side by side, padded to the right. is_target: at which places the next token is the target's own."""

    token_ids: Int[Tensor, "B S"]
    is_target: Tensor


def distill(options: EngineOptions, recipe: Recipe, prompts: list[str], out: Path) -> Agreement:
    """Make a draft for the model of `options` in the directory `out`, going on with what an earlier call began there.

    Returns what was measured last. Raises ValueError, or what finding a model raises, before anything is written.
    """
    assert isinstance(options.model, str | Path)
    checkpoint = find_checkpoint(options.model)
    chosen_layers(checkpoint.config.num_layers, recipe.layers)
    out.mkdir(parents=True, exist_ok=True)
    _write_text(options, recipe, prompts, out / _TEXT)
    text = list(read_text(out / _TEXT))
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    head_tokens = None
    if not recipe.own_embedding and 0 < recipe.head_tokens < checkpoint.config.vocab_size:
        head_tokens = frequent_tokens(text, recipe.head_tokens, checkpoint.eos_token_ids)
    training = Training(checkpoint, recipe, text, head_tokens, options.torch_device())
    agreement = training.run(out / _STATE)
    training.save(out, checkpoint, tokenizer)
    return agreement


def frequent_tokens(text: list[Text], count: int, always: tuple[int, ...]) -> list[int]:
    """The `count` tokens that are the most frequent in the answers, `always` among them, by their ids."""
    seen = Counter(token for one in text if not one.is_held_out for token in one.token_ids[one.start :])
    for token in always:
        seen[token] = 1 << 60
    return sorted(token for token, _ in seen.most_common(count))


class Training:
    """A draft that is being trained."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        text: list[Text],
        head_tokens: list[int] | None,
        device: torch.device,
    ) -> None:
        self.recipe = recipe
        self.device = device
        self.head_tokens = head_tokens
        self._kept = torch.tensor(head_tokens, device=device) if head_tokens is not None else None
        answered = [one for one in text if len(one.token_ids) > one.start]
        train = [number for number, one in enumerate(answered) if not one.is_held_out]
        held_out = [number for number, one in enumerate(answered) if one.is_held_out]
        if not train or not held_out:
            raise ValueError(
                f"num_tokens is {recipe.num_tokens}: too few for text to train on and text to measure with"
            )
        self.target = transformers_model(checkpoint, torch.bfloat16, device)
        self.draft = draft_of(self.target, recipe.layers)
        if not recipe.own_embedding:
            for weight in (self.draft.get_input_embeddings().weight, self.draft.get_output_embeddings().weight):
                weight.requires_grad_(False)
        self._weights = [weight for weight in self.draft.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(self._weights, recipe.learning_rate, (0.9, 0.98), weight_decay=0.01)
        self._tokens = [torch.tensor(one.token_ids) for one in answered]
        self._starts = torch.tensor([one.start for one in answered])
        epochs = range(recipe.epochs)
        self._batches = [batch for epoch in epochs for batch in _packed(answered, train, recipe.batch_tokens, epoch)]
        self._held_out = _packed(answered, held_out, recipe.batch_tokens, 0)
        self._rows = _ROWS[device.type]
        self._of_text = self._predictions(answered)

    def run(self, state_file: Path) -> Agreement:
        """Train from where `state_file` says an earlier run was, keeping it up to date. What was measured last."""
        done = self._restore(state_file)
        every = max(1, len(self._batches) // 10)
        agreement = self.measure()
        with tqdm(self._batches[done:], desc="training", initial=done, total=len(self._batches), disable=None) as bar:
            self._say(bar, done, agreement)
            for members in bar:
                loss = self._step(members, done)
                done += 1
                if done % _SAYS_LOSS == 0:
                    bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
                if done % every == 0 or done == len(self._batches):
                    agreement = self.measure()
                    self._say(bar, done, agreement)
                    self._keep(state_file, done)
        return agreement

    @torch.no_grad()
    def measure(self) -> Agreement:
        """On the text that is held out."""
        same, mass, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        for members in self._held_out:
            theirs, ours = self._of_target(members), self._hidden(self.draft, self._batch(members))
            for expected, logits, best in self._logits(theirs, ours):
                guess = logits.argmax(-1)
                same += (guess if self._kept is None else self._kept[guess]).eq(best).sum()
                mass += torch.minimum(expected, logits.softmax(-1)).sum()
                count += len(expected)
        return Agreement(float(same) / count, float(mass) / count)

    def save(self, out: Path, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
        """Write the draft as DiSpec loads it."""
        self.draft.config.dtype = "bfloat16"
        if self.recipe.own_embedding:
            self.draft.to(torch.bfloat16).save_pretrained(out)
            for name in _TOKENIZER_FILES:
                if (checkpoint.directory / name).is_file():
                    shutil.copy(checkpoint.directory / name, out / name)
            return
        borrowed = ("model.embed_tokens.weight", "lm_head.weight")
        tensors = {
            name: value.cpu().bfloat16() for name, value in self.draft.state_dict().items() if name not in borrowed
        }
        config = json.loads(self.draft.config.to_json_string(use_diff=False))
        config["architectures"] = [type(self.draft).__name__]  # which a model made from a config does not say
        save_shared_draft(out, config, tensors, self.head_tokens, tokenizer)

    @torch.no_grad()
    def _predictions(self, text: list[Text]) -> list[_Target]:
        num_tokens = sum(len(one.token_ids) - one.start for one in text)
        size = num_tokens * self.target.config.hidden_size * torch.bfloat16.itemsize
        keeps_on = self.device
        if self.device.type == "cuda" and size > _SHARE_OF_FREE * torch.cuda.mem_get_info(self.device)[0]:
            keeps_on = torch.device("cpu")
        head = self.target.get_output_embeddings().weight
        found: list[_Target | None] = [None] * len(text)
        batches = _packed(text, range(len(text)), self.recipe.batch_tokens, 0)
        for members in tqdm(batches, desc="what the target predicts", disable=None):
            batch = self._batch(members)
            states = self._hidden(self.target, batch).bfloat16()
            logits = [(some @ head.T).float() for some in states.split(self._rows)]
            of_all = _Target(
                states.to(keeps_on),
                torch.cat([some.logsumexp(-1) for some in logits]).to(keeps_on),
                torch.cat([some.argmax(-1) for some in logits]).to(keeps_on),
            )
            counts = batch.is_target.sum(1).tolist()
            for number, *own in zip(members, *(tensor.split(counts) for tensor in of_all), strict=True):
                found[number] = _Target(*own)
        return [one for one in found if one is not None]

    def _of_target(self, members: tuple[int, ...]) -> _Target:
        parts = zip(*(self._of_text[number] for number in members), strict=True)
        return _Target(*(torch.cat(part).to(self.device) for part in parts))

    def _batch(self, members: tuple[int, ...]) -> _Batch:
        tokens = [self._tokens[number] for number in members]
        ends = torch.tensor([len(own) for own in tokens])
        token_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        places = torch.arange(token_ids.shape[1])
        starts = self._starts[list(members)]
        return _Batch(token_ids, (places >= starts[:, None] - 1) & (places < ends[:, None] - 1))

    def _step(self, members: tuple[int, ...], number: int) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * _schedule(number / len(self._batches))
        theirs, ours = self._of_target(members), self._hidden(self.draft, self._batch(members))
        # The logits of a few rows at a time, their gradient taken at once: all of them would fill the memory.
        leaf = ours.detach().requires_grad_()
        total = torch.zeros((), device=self.device)
        for expected, logits, _ in self._logits(theirs, leaf):
            loss = -(expected * logits.log_softmax(-1)).sum() / len(ours)
            loss.backward()
            total += loss.detach()
        ours.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _hidden(self, model: Any, batch: _Batch) -> Float[Tensor, "R E"]:
        """States of the places after which an answer goes on."""
        with torch.autocast(self.device.type, torch.bfloat16):
            # Padding is to the right, where causal attention does not see it.
            states = model.model(input_ids=batch.token_ids.to(self.device), use_cache=False).last_hidden_state
        # Places are counted on the host: to count them on the device, the host would have to wait for it.
        places = batch.is_target.flatten().nonzero().squeeze(1).to(self.device, non_blocking=True)
        return states.flatten(0, 1)[places].float()

    def _logits(self, theirs: _Target, ours: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """By rows: the target's probabilities of the tokens that the draft can guess, its logits, the target's best."""
        heads = [model.get_output_embeddings().weight for model in (self.target, self.draft)]
        if self._kept is not None:
            heads = [head[self._kept] for head in heads]
        target_head, draft_head = (head.bfloat16() for head in heads)
        rows = (tensor.split(self._rows) for tensor in (*theirs, ours))
        for states, normaliser, best, mine in zip(*rows, strict=True):
            with torch.no_grad():
                expected = ((states @ target_head.T).float() - normaliser[:, None]).exp()
            yield expected, (mine.bfloat16() @ draft_head.T).float(), best

    def _say(self, bar: tqdm, done: int, agreement: Agreement) -> None:
        bar.write(
            f"{done:6d} of {len(self._batches)} steps: on prompts not trained on, the draft's likeliest token is the"
            f" target's {agreement.greedy:.1%} of the time; they share {agreement.shared:.1%} of the probability"
        )

    def _keep(self, file: Path, done: int) -> None:
        state = {"done": done, "draft": self.draft.state_dict(), "optimizer": self._optimizer.state_dict()}
        partial = file.with_suffix(".partial")
        torch.save(state | {"recipe": asdict(self.recipe)}, partial)
        partial.replace(file)

    def _restore(self, file: Path) -> int:
        if not file.exists():
            return 0
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{file} is of a training with other settings: remove it, or give those")
        self.draft.load_state_dict(state["draft"])
        self._optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])


def _write_text(options: EngineOptions, recipe: Recipe, prompts: list[str], file: Path) -> None:
    """Have the target answer until there is enough, and let go of the engine."""
    written = sum(len(text.token_ids) - text.start for text in read_text(file))
    if written < recipe.num_tokens:
        llm = LLM(**{field.name: getattr(options, field.name) for field in fields(options)} | {"show_progress": True})
        write_text(llm, prompts, recipe.num_tokens, file, recipe.max_tokens)
        del llm
        gc.collect()
        if options.torch_device().type == "cuda":
            torch.cuda.empty_cache()


def _packed(text: list[Text], members: Iterable[int], batch_tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Each of those texts once, in batches of about as many tokens and of texts of about the same length, in random
    order."""
    rng = random.Random(seed)
    order = sorted(members, key=lambda number: (len(text[number].token_ids), rng.random()))
    batches: list[list[int]] = [[]]
    for number in order:
        if batches[-1] and (len(batches[-1]) + 1) * len(text[number].token_ids) > batch_tokens:
            batches.append([])
        batches[-1].append(number)
    rng.shuffle(batches)
    return [tuple(batch) for batch in batches if batch]


def _schedule(share: float) -> float:
    """Of the learning rate, after so much of the training: up in the first 3 %, down along a cosine to 2 %."""
    warm_up = 0.03
    if share < warm_up:
        return max(share, 1e-3) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))
