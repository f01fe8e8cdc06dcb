"""Make a draft model: a few layers of the target, trained to predict what the target predicts on text of its own.

The loss is the cross entropy of the target's distribution, at every token of its answers. Measured on answers to
held-out prompts are the rate of equal likeliest tokens, and the probability mass that the two distributions share: a
bound of the acceptance rate of sampled draft tokens.
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
from jaxtyping import Bool, Float, Int
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
_LOGIT_ROWS = {"cpu": 2048, "cuda": 8192}  # positions whose logits are held at once
_MAX_SHARE_OF_MEMORY = 0.5  # of the device's free memory, for the target's predictions
_STEPS_PER_LOSS = 50  # reading the loss makes the host wait for the device
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Agreement(NamedTuple):
    """On held-out text: the rate of equal likeliest tokens, and the probability mass that both distributions share."""

    greedy: float
    shared: float


class _Predictions(NamedTuple):
    """The target's predictions at the positions of a text that are trained on, computed once for all epochs.

    states: last hidden states. log_sum: logsumexp of the logits, so that a probability needs one token's logit alone.
    """

    states: Float[Tensor, "R E"]
    log_sum: Float[Tensor, "R"]
    best: Int[Tensor, "R"]


class _Batch(NamedTuple):
    """Texts side by side, padded to the right. is_trained: positions whose next token belongs to an answer."""

    token_ids: Int[Tensor, "B S"]
    is_trained: Bool[Tensor, "B S"]


def distill(options: EngineOptions, recipe: Recipe, prompts: list[str], out: Path) -> Agreement:
    """Make a draft for the model of `options` in the directory `out`, and return the last measurement.

    Resumes what an earlier call began there. Raises ValueError before anything is written if the recipe or the model
    does not fit.
    """
    assert isinstance(options.model, str | Path)
    checkpoint = find_checkpoint(options.model)
    chosen_layers(checkpoint.config.num_layers, recipe.layers)
    out.mkdir(parents=True, exist_ok=True)
    _write_text(options, recipe, prompts, out / _TEXT)
    text = list(read_text(out / _TEXT))
    head_tokens = None
    if not recipe.own_embedding and 0 < recipe.head_tokens < checkpoint.config.vocab_size:
        head_tokens = frequent_tokens(text, recipe.head_tokens, checkpoint.eos_token_ids)
    training = Training(checkpoint, recipe, text, head_tokens, options.torch_device())
    agreement = training.run(out / _STATE)
    training.save(out, checkpoint)
    return agreement


def frequent_tokens(text: list[Text], count: int, always: tuple[int, ...]) -> list[int]:
    """Return the `count` most frequent tokens of the answers, those of `always` included, in ascending order."""
    counts = Counter(token for one in text if not one.is_held_out for token in one.token_ids[one.start :])
    counts.update(dict.fromkeys(always, 1 << 60))
    return sorted(token for token, _ in counts.most_common(count))


class Training:
    """Trains a draft on text. head_tokens: the tokens of its head; None is the whole vocabulary."""

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
        self._head = torch.tensor(head_tokens, device=device) if head_tokens is not None else None
        answered = [one for one in text if len(one.token_ids) > one.start]
        train = [index for index, one in enumerate(answered) if not one.is_held_out]
        held_out = [index for index, one in enumerate(answered) if one.is_held_out]
        if not train or not held_out:
            raise ValueError(f"num_tokens is {recipe.num_tokens}, too few for training and held-out text")
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
        self._logit_rows = _LOGIT_ROWS[device.type]
        self._predictions = self._predict(answered)

    def run(self, state_file: Path) -> Agreement:
        """Train from the state in `state_file`, if there is one, save it there, and return the last measurement."""
        done = self._load_state(state_file)
        every = max(1, len(self._batches) // 10)
        agreement = self.measure()
        with tqdm(self._batches[done:], desc="training", initial=done, total=len(self._batches), disable=None) as bar:
            self._report(bar, done, agreement)
            for members in bar:
                loss = self._step(members, done)
                done += 1
                if done % _STEPS_PER_LOSS == 0:
                    bar.set_postfix(loss=f"{float(loss):.3f}", refresh=False)
                if done % every == 0 or done == len(self._batches):
                    agreement = self.measure()
                    self._report(bar, done, agreement)
                    self._save_state(state_file, done)
        return agreement

    @torch.no_grad()
    def measure(self) -> Agreement:
        """Measure the draft on the held-out text."""
        same, mass, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        for members in self._held_out:
            predicted, states = self._predicted(members), self._states(self.draft, self._batch(members))
            for expected, logits, best in self._logits(predicted, states):
                likeliest = logits.argmax(-1)
                same += (likeliest if self._head is None else self._head[likeliest]).eq(best).sum()
                mass += torch.minimum(expected, logits.softmax(-1)).sum()
                count += len(expected)
        return Agreement(float(same) / count, float(mass) / count)

    def save(self, out: Path, checkpoint: Checkpoint) -> None:
        """Write the draft's checkpoint."""
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
        config["architectures"] = [type(self.draft).__name__]  # a model made from a config lacks it
        tokenizer = Tokenizer.from_directory(checkpoint.directory)
        save_shared_draft(out, config, tensors, self.head_tokens, tokenizer)

    @torch.no_grad()
    def _predict(self, text: list[Text]) -> list[_Predictions]:
        num_tokens = sum(len(one.token_ids) - one.start for one in text)
        size = num_tokens * self.target.config.hidden_size * torch.bfloat16.itemsize
        keeps_on = self.device
        if self.device.type == "cuda" and size > _MAX_SHARE_OF_MEMORY * torch.cuda.mem_get_info(self.device)[0]:
            keeps_on = torch.device("cpu")
        head = self.target.get_output_embeddings().weight
        found: dict[int, _Predictions] = {}
        batches = _packed(text, range(len(text)), self.recipe.batch_tokens, 0)
        for members in tqdm(batches, desc="predictions of the target", disable=None):
            batch = self._batch(members)
            states = self._states(self.target, batch).bfloat16()
            logits = [(some @ head.T).float() for some in states.split(self._logit_rows)]
            of_batch = (
                states.to(keeps_on),
                torch.cat([some.logsumexp(-1) for some in logits]).to(keeps_on),
                torch.cat([some.argmax(-1) for some in logits]).to(keeps_on),
            )
            counts = batch.is_trained.sum(1).tolist()
            for index, *own in zip(members, *(tensor.split(counts) for tensor in of_batch), strict=True):
                found[index] = _Predictions(*own)
        return [found[index] for index in range(len(text))]

    def _predicted(self, members: tuple[int, ...]) -> _Predictions:
        parts = zip(*(self._predictions[index] for index in members), strict=True)
        return _Predictions(*(torch.cat(part).to(self.device) for part in parts))

    def _batch(self, members: tuple[int, ...]) -> _Batch:
        tokens = [self._tokens[index] for index in members]
        ends = torch.tensor([len(own) for own in tokens])
        token_ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        positions = torch.arange(token_ids.shape[1])
        starts = self._starts[list(members)]
        return _Batch(token_ids, (positions >= starts[:, None] - 1) & (positions < ends[:, None] - 1))

    def _step(self, members: tuple[int, ...], number: int) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * _schedule(number / len(self._batches))
        predicted, states = self._predicted(members), self._states(self.draft, self._batch(members))
        # Logits and their gradients are computed for some positions at a time: all of them would fill the memory.
        leaf = states.detach().requires_grad_()
        total = torch.zeros((), device=self.device)
        for expected, logits, _ in self._logits(predicted, leaf):
            loss = -(expected * logits.log_softmax(-1)).sum() / len(states)
            loss.backward()
            total += loss.detach()
        states.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _states(self, model: Any, batch: _Batch) -> Float[Tensor, "R E"]:
        """Return the last hidden states of the trained positions."""
        with torch.autocast(self.device.type, torch.bfloat16):
            states = model.model(input_ids=batch.token_ids.to(self.device), use_cache=False).last_hidden_state
        # `nonzero` on the host, for on the device it makes the host wait.
        indices = batch.is_trained.flatten().nonzero().squeeze(1).to(self.device, non_blocking=True)
        return states.flatten(0, 1)[indices].float()

    def _logits(
        self, predicted: _Predictions, draft_states: Float[Tensor, "R E"]
    ) -> Iterator[tuple[Float[Tensor, "N V"], Float[Tensor, "N V"], Int[Tensor, "N"]]]:
        """Yield the target's probabilities of the head's tokens, the draft's logits, the target's likeliest tokens."""
        heads = [model.get_output_embeddings().weight for model in (self.target, self.draft)]
        if self._head is not None:
            heads = [head[self._head] for head in heads]
        target_head, draft_head = (head.bfloat16() for head in heads)
        parts = (tensor.split(self._logit_rows) for tensor in (*predicted, draft_states))
        for states, log_sum, best, own_states in zip(*parts, strict=True):
            with torch.no_grad():
                expected = ((states @ target_head.T).float() - log_sum[:, None]).exp()
            yield expected, (own_states.bfloat16() @ draft_head.T).float(), best

    def _report(self, bar: tqdm, done: int, agreement: Agreement) -> None:
        bar.write(
            f"{done:6d} of {len(self._batches)} steps: {agreement.greedy:.1%} equal likeliest tokens and"
            f" {agreement.shared:.1%} shared probability on held-out prompts"
        )

    def _save_state(self, file: Path, done: int) -> None:
        state = {"done": done, "draft": self.draft.state_dict(), "optimizer": self._optimizer.state_dict()}
        partial = file.with_suffix(".partial")
        torch.save(state | {"recipe": asdict(self.recipe)}, partial)
        partial.replace(file)

    def _load_state(self, file: Path) -> int:
        if not file.exists():
            return 0
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{file} has settings {state['recipe']}, not those given: remove it or give the same ones")
        self.draft.load_state_dict(state["draft"])
        self._optimizer.load_state_dict(state["optimizer"])
        return int(state["done"])


def _write_text(options: EngineOptions, recipe: Recipe, prompts: list[str], file: Path) -> None:
    """Let the target answer until there are `num_tokens` tokens, and free the engine."""
    written = sum(len(text.token_ids) - text.start for text in read_text(file))
    if written < recipe.num_tokens:
        llm = LLM(**{field.name: getattr(options, field.name) for field in fields(options)} | {"show_progress": True})
        write_text(llm, prompts, recipe.num_tokens, file, recipe.max_tokens)
        del llm
        gc.collect()
        if options.torch_device().type == "cuda":
            torch.cuda.empty_cache()


def _packed(text: list[Text], members: Iterable[int], batch_tokens: int, seed: int) -> list[tuple[int, ...]]:
    """Return shuffled batches of texts of similar length, with about `batch_tokens` tokens each. members: indices."""
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
    """Return the factor of the learning rate after a share of the training: 3 % linear warm-up, cosine decay to 2 %."""
    warm_up = 0.03
    if share < warm_up:
        return max(share, 1e-3) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))
