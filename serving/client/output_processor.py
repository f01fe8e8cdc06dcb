"""The tokens of a request as updates with text, made outside the event loop's thread."""

from collections.abc import Sequence

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.text.text_stream import TextStream
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.request_stream import ChoiceUpdate


class OutputProcessor:
    """Detokenizes the choices of one request and ends them at stop strings. It belongs to the reading thread.

    is_continued: another engine continues where this one ends for length. kept_token_ids: as of `TextStream`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        is_continued: bool = False,
        kept_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._is_continued = is_continued
        self._texts = [TextStream(tokenizer, params, prompt_token_ids, kept_token_ids) for _ in range(params.n)]
        self._has_ended = [False] * params.n

    def process(self, token: TokenOutput) -> ChoiceUpdate | None:
        """Return the update of a token; None for one that the engine generated after the end of its choice."""
        index = token.index
        if self._has_ended[index]:
            return None
        is_continued = token.finish_reason == "length" and self._is_continued and not token.completes_grammar
        engine_reason = None if is_continued else token.finish_reason
        text, finish_reason, stop_reason = self._texts[index].process(
            token.token_id, engine_reason, completes_grammar=token.completes_grammar
        )
        self._has_ended[index] = finish_reason is not None
        return ChoiceUpdate(
            index,
            text,
            [token.token_id],
            [token.logprobs] if token.logprobs is not None else None,
            finish_reason,
            stop_reason,
            token.prompt_logprobs if index == 0 else None,
            token.num_cached_tokens if index == 0 else None,
            token.num_accepted,
            token.num_rejected,
        )

    def resume(self, outputs: list[list[int] | None]) -> None:
        """Continue after tokens that another engine generated; None is a choice that has ended."""
        for index, tokens in enumerate(outputs):
            self._has_ended[index] = tokens is None
            for token_id in tokens or ():
                self._texts[index].add(token_id, ends=False)
