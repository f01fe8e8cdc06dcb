"""The server's application on an engine that generates given texts, for exact tests of what becomes of them."""

import asyncio
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import httpx
from litestar import Litestar
from litestar.testing import TestClient
from tokenizers import AddedToken

from dispec.engine.process.messages import EngineInfo, Inspection
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.token_output import TokenLogprobs, TokenOutput
from dispec.engine.text.tokenizer import Tokenizer
from dispec.serving.api.app import create_app
from dispec.serving.client.engine_client import EngineClient, State
from dispec.serving.client.output_processor import OutputProcessor
from dispec.serving.client.request_stream import GenerationRequest, RequestStream
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.checkpoints import tiny_tokenizer

MAX_MODEL_LEN = 8192

# As Qwen 3's: reasoning is left out of earlier turns, and an empty one turns it off.
THINKING_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}\
{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}\
{% if opens_thinking is defined %}{{ '<think>\n' }}{% endif %}{% endif %}"""


def thinking_tokenizer(are_special: bool = False, template: str = THINKING_TEMPLATE) -> Tokenizer:
    """A small tokenizer with the markers of reasoning as tokens."""
    backend = tiny_tokenizer()
    backend.add_tokens([AddedToken(text, special=are_special) for text in ("<think>", "</think>")])
    return Tokenizer(backend, {"eos_token": "<|im_end|>"}, {"default": template})


class ScriptedEngine(EngineClient):
    """Answers each request with the next of `outputs`, for each choice a text, token by token, and then the EOS token.

    An output longer than `max_tokens` ends there. requests: those submitted so far.
    """

    def __init__(self, tokenizer: Tokenizer, outputs: list[str] | None = None) -> None:
        super().__init__()
        self.requests: list[GenerationRequest] = []
        self.outputs = list(outputs or ())
        self._tokenizer = tokenizer
        self._streams: dict[str, RequestStream] = {}
        self._keys = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> State:
        return "ready"

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    @property
    def info(self) -> EngineInfo:
        return self._info

    async def start(self) -> EngineInfo:
        return self._info

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()

    def is_ready(self) -> tuple[bool, str]:
        return True, ""

    async def inspect(self, *, verify: bool = True) -> Inspection:
        raise NotImplementedError

    def _stop_accepting(self) -> None:
        raise NotImplementedError

    @property
    def prompt(self) -> str:
        """The last request's prompt."""
        return self._tokenizer.decode(self.requests[-1].prompt_token_ids, skip_special_tokens=False)

    @property
    def params(self) -> SamplingParams:
        """The last request's parameters."""
        return self.requests[-1].params

    def submit(self, request: GenerationRequest) -> RequestStream:
        self.requests.append(request)
        key = str(next(self._keys))
        stream = self._streams[key] = RequestStream(key, request, self._abort)
        texts = [self.outputs.pop(0) for _ in range(request.params.n)]
        task = asyncio.get_running_loop().create_task(self._run(stream, texts))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    async def _run(self, stream: RequestStream, texts: list[str]) -> None:
        request = stream.request
        processor = OutputProcessor(
            self._tokenizer, request.params, request.prompt_token_ids, kept_token_ids=request.kept_token_ids
        )
        stream.accept()
        await asyncio.sleep(0)
        outputs = [self._outputs(index, text, request.params) for index, text in enumerate(texts)]
        for output in itertools.chain.from_iterable(itertools.zip_longest(*outputs)):
            if output is None or stream.has_ended or (update := processor.process(output)) is None:
                continue
            stream.take(update, 0.0)
            await asyncio.sleep(0)  # the reader gets each token alone
        del self._streams[stream.key]

    def _outputs(self, index: int, text: str, params: SamplingParams) -> list[TokenOutput]:
        eos = self._tokenizer.eos_token_id
        assert eos is not None
        token_ids = [*self._tokenizer.encode(text, add_special_tokens=False), eos][: params.max_tokens]
        outputs = []
        for number, token_id in enumerate(token_ids, 1):
            finish_reason = "stop" if token_id == eos else "length" if number == len(token_ids) else None
            logprobs = TokenLogprobs(token_id, -0.5, 1, ((token_id, -0.5),)) if params.logprobs is not None else None
            outputs.append(TokenOutput("", index, token_id, finish_reason, logprobs))
        return outputs

    def _abort(self, stream: RequestStream) -> None:
        stream.end("abort")

    @cached_property
    def _info(self) -> EngineInfo:
        eos = self._tokenizer.eos_token_id
        return EngineInfo(
            model="tiny",
            architecture="Qwen3ForCausalLM",
            directory=None,
            dtype="float32",
            weights_format="float32",
            device="cpu",
            vocab_size=self._tokenizer.vocab_size,
            eos_token_ids=[] if eos is None else [eos],
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=8,
            max_num_batched_tokens=512,
            num_blocks=100,
            block_size=16,
            weight_bytes=0,
            kv_cache_bytes=0,
            is_compiled=False,
            phase_seconds={},
            pid=0,
        )


def scripted_app(engine: ScriptedEngine, **settings: Any) -> Litestar:
    return create_app(engine, ServerSettings(**settings), Metrics("tiny"))


@contextmanager
def scripted_server(engine: ScriptedEngine, **settings: Any) -> Iterator[httpx.Client]:
    """Yield an HTTP client of the application, for the `http_client` of clients too."""
    with TestClient(scripted_app(engine, **settings)) as http:
        yield http


def async_client(engine: ScriptedEngine, **settings: Any) -> httpx.AsyncClient:
    """Return the same for one event loop: the caller's."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(scripted_app(engine, **settings)))
