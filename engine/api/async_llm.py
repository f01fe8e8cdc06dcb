"""The Python API for asyncio: `AsyncLLM.generate` and `.chat` as async generators."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from collections.abc import Sequence as Series
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from dispec.engine.api.arguments import IN_PARAMS, refusing_unknown_names, with_parameters_of
from dispec.engine.api.call import Call, PreparedRequest
from dispec.engine.api.engine_thread import EngineThread
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.api.prompt_processor import Messages, PromptProcessor, template_arguments
from dispec.engine.api.prompts import Prompt, as_prompts
from dispec.engine.api.shared_engine import SharedEngine, describe
from dispec.engine.options import EngineOptions
from dispec.engine.sampling_params import RequestOutputKind, SamplingParams
from dispec.engine.text.tokenizer import Tokenizer
from dispec.engine.unknown_names import field_names, refuse_unknown


@dataclass(eq=False)
class _AsyncCall(Call):
    """A call of a coroutine. changed: set in the coroutine's loop when there are new outputs or an error."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class AsyncLLM:
    """A loaded model for asyncio. Its engine runs in a thread of its own; requests of all tasks run in one batch.

        async with AsyncLLM("smollm2") as llm:
            async for output in llm.generate("Once upon a time", SamplingParams(max_tokens=64)):
                print(output.outputs[0].text)

    The arguments are those of `EngineOptions`. Several event loops, each in its thread, may use it. The constructor
    returns when the model is loaded.
    """

    @with_parameters_of(EngineOptions)
    def __init__(self, *model: Any, **given: Any) -> None:
        refuse_unknown("AsyncLLM", given, field_names(EngineOptions), IN_PARAMS)
        options = EngineOptions(*model, **given)
        self._thread = EngineThread(lambda: SharedEngine.load(options), _notify)
        self._prompts = PromptProcessor(self._thread.shared.tokenizer)

    @refusing_unknown_names
    def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput]:
        """Continue one prompt and yield outputs, the last of which is `finished`.

        prompt: as in `LLM.generate`. request_id: for `abort`; None makes one.
        Each output holds all text and tokens so far, unless `sampling_params.output_kind` is DELTA, which yields what
        is new, or FINAL_ONLY, which yields one output. A slow reader of the first skips outputs.
        The request starts when the generator is first read. Closing the generator, or cancelling the task that reads
        it, aborts the request. Raises ValueError if the prompt cannot be served or the request id is in use, and
        RuntimeError if the engine fails or is closed.
        """
        prompts = as_prompts(prompt)
        if len(prompts) > 1:
            raise ValueError(f"prompt holds {len(prompts)} prompts, generate of AsyncLLM takes one: use asyncio.gather")
        params = self._shared.params_of_each(sampling_params, 1)

        def prepare() -> list[PreparedRequest]:
            return self._shared.prepare([self._prompts.tokenize(prompts[0])], params)

        return self._run(prepare, request_id)

    def chat(
        self,
        messages: Messages,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        tools: Series[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        allow_special_tokens_in_content: bool = False,
        **template: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """Answer a conversation with the model's chat template; yields and raises as `generate`.

        The others: as in `LLM.chat_prompt`.
        """
        self._prompts.check_template_names("chat", template, ("messages", "sampling_params", "request_id"))
        given = template_arguments(
            template,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
            allow_special_tokens_in_content=allow_special_tokens_in_content,
        )
        params = self._shared.params_of_each(sampling_params, 1)

        def prepare() -> list[PreparedRequest]:
            return self._shared.prepare([self._prompts.chat(messages, **given)], params)

        return self._run(prepare, request_id)

    def __repr__(self) -> str:
        return describe("AsyncLLM", self._shared.engine)

    async def abort(self, request_id: str | Iterable[str]) -> None:
        """End requests after the step that runs. Their generators yield a last output of finish reason "abort"."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        self._thread.submit(lambda shared: [call for one in ids for call in shared.abort(one)])

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError for a model that was made from a `ModelConfig`."""
        return self._prompts.tokenizer

    async def get_tokenizer(self) -> Tokenizer:
        """Return `tokenizer`; a coroutine, as in vLLM."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of calls without `sampling_params`, as `LLM.get_default_sampling_params` does."""
        return self._shared.default_params

    def close(self) -> None:
        """End the engine and its thread, after the step that runs. What runs, and later calls, raise RuntimeError."""
        self._thread.close()

    def shutdown(self) -> None:
        """Close, under vLLM's name."""
        self.close()

    async def __aenter__(self) -> "AsyncLLM":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    @property
    def _shared(self) -> SharedEngine:
        return self._thread.shared

    async def _run(
        self, prepare: Callable[[], list[PreparedRequest]], request_id: str | None
    ) -> AsyncGenerator[RequestOutput]:
        requests = await asyncio.to_thread(prepare)  # a long text or a large grammar takes longer than a step
        call = _AsyncCall()

        def start(shared: SharedEngine) -> list[Call]:
            try:
                shared.start(call, requests, RequestOutputKind.CUMULATIVE, request_id)
            except Exception as error:
                call.error = error
                return [call]
            return []

        def abandon(shared: SharedEngine) -> list[Call]:
            shared.abandon(call)
            return []

        self._thread.submit(start)
        is_finished = False
        try:
            while not is_finished:
                call.changed.clear()
                if (found := call.take()) is not None:
                    is_finished = found[1].finished
                    yield found[1]
                elif call.error is not None:
                    raise call.error
                else:
                    await call.changed.wait()
        finally:
            if not is_finished:
                with suppress(RuntimeError):  # closed, which has ended the request
                    self._thread.submit(abandon)


def _notify(calls: list[Call]) -> None:
    """Wake the coroutines of calls, each loop once."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for call in calls:
        if isinstance(call, _AsyncCall):
            events.setdefault(call.loop, []).append(call.changed)
    for loop, changed in events.items():
        with suppress(RuntimeError):  # a loop that was closed has no coroutine that waits
            loop.call_soon_threadsafe(_set_all, changed)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
