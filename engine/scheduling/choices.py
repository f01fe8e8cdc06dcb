"""The sequences of a request."""

import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Series
from dataclasses import replace

from dispec.engine.request_checks import check_params
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.logits_processors import LogitsProcessors
from dispec.engine.scheduling.sequence import Sequence
from dispec.engine.structured_output.grammar_state import GrammarState


def make_choices(
    prompt: Series[int],
    params: SamplingParams,
    start_grammar: Callable[[], GrammarState] | None,
    *,
    ids: Iterator[int],
    request_id: str | None,
    eos_token_ids: tuple[int, ...],
    vocab_size: int,
    max_model_len: int,
    priority: int,
    cache_salt: str | None,
    slack: float,
) -> tuple[Sequence, ...]:
    """Return the `params.n` sequences of a request, in the order of their indices.

    start_grammar: makes the grammar state of one sequence. ids: of the sequences; the first one names a request without
    an id. Raises InvalidField for parameters that do not fit the vocabulary, or `max_tokens` that does not fit the
    grammar.
    """
    # A grammar ends the output with an end token where it can.
    ignores_eos = params.ignore_eos and start_grammar is None
    stop_token_ids = frozenset((*params.stop_token_ids, *(() if ignores_eos else eos_token_ids)))
    check_params(params, stop_token_ids, vocab_size)
    seed = int.from_bytes(os.urandom(8), signed=True) if params.seed is None else params.seed
    arrival_time = time.perf_counter()
    choices = []
    for index in range(params.n):
        sequence_id = next(ids)
        request_id = request_id or f"request-{sequence_id}"
        own_params = replace(params, prompt_logprobs=None) if index else params
        grammar = None if start_grammar is None else start_grammar()
        processors = LogitsProcessors(own_params, prompt, vocab_size, stop_token_ids, grammar)
        choices.append(
            Sequence(
                id=sequence_id,
                token_ids=list(prompt),
                params=own_params,
                seed=(seed + index + 2**63) % 2**64 - 2**63,
                stop_token_ids=stop_token_ids,
                max_len=min(max_model_len, len(prompt) + params.token_limit),
                arrival_time=arrival_time,
                request_id=request_id,
                index=index,
                priority=priority,
                cache_salt=cache_salt,
                slack=slack,
                logits_processors=processors if processors.has_penalties or processors.has_mask else None,
            )
        )
    for choice in choices:
        choice.choices = tuple(choices)
    return tuple(choices)
