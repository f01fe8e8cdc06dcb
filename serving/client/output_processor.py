"""The tokens of a request as updates with text, made outside the event loop's thread."""

from collections.abc import Sequence

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.token_output import TokenOutput
from dispec.engine.text.text_stream import TextStream
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.client.request_stream import ChoiceUpdate


class OutputProcessor:
    """Detokenizes the choices of one request and ends them at stop strings. It belongs to the reading thread.

    is_continued: another engine continues where this one ends for length.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        prompt_token_ids: Sequence[int] = (),
        is_continued: bool = False,
    ) -> None:
        self._params = params
        self._is_continued = is_continued
        self._texts = [TextStream(tokenizer, params, prompt_token_ids) for _ in range(params.n)]
        self._has_ended = [False] * params.n

    def process(self, token: TokenOutput) -> ChoiceUpdate | None:
        """Return the update of a token; None for one that the engine generated after the end of its choice."""
        index = token.index
        if self._has_ended[index]:
            return None
        stream, reason = self._texts[index], token.finish_reason
        if reason == "length" and self._is_continued:
            reason = None
        text = stream.add(token.token_id, ends=reason == "stop")
        if reason is not None:
            text += stream.finish()
        stop_reason: str | int | None = stream.stop_reason
        if stop_reason is not None:
            reason = "stop"
        elif reason == "stop" and token.token_id in self._params.stop_token_ids:
            stop_reason = token.token_id
        self._has_ended[index] = reason is not None
        return ChoiceUpdate(
            index,
            text,
            [token.token_id],
            [token.logprobs] if token.logprobs is not None else None,
            reason,
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
