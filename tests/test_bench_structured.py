"""The benchmarks of structured output: what they count, and that their documents fit their schemas."""

import json

import jsonschema_rs
import pytest

from dispec.bench.grammar_documents import documents
from dispec.bench.structured import CASES, Engine, run_case, useful_tokens
from dispec.engine.structured_output.structured_outputs import StructuredOutputs
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import save_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory, chat_template="{{ messages[0].content }}")
    return Tokenizer.from_directory(directory)


class Half:
    """A worker that takes two seconds, makes a whole document of every other prompt, and remembers its requests."""

    def __init__(self) -> None:
        self.requests: list[tuple[list[list[int]], int, dict[str, object]]] = []

    def generate(self, prompts, output_tokens, decode_only=False, params=None):  # type: ignore[no-untyped-def]
        self.requests.append((prompts, output_tokens, params))
        texts = ['{"a":   1}' if index % 2 else '{"a": ' for index in range(len(prompts))]
        count = 10 if "structured_outputs" in params else output_tokens
        return {"seconds": 2.0, "output_tokens": [count] * len(prompts), "texts": texts}


def test_only_whole_documents_count_without_their_white_space(tokenizer: Tokenizer) -> None:
    compact = useful_tokens('{"a": 1}', tokenizer)
    assert compact == len(tokenizer.encode('{"a": 1}', add_special_tokens=False))
    assert useful_tokens('{\n  "a"  :   1\n}', tokenizer) == compact
    assert useful_tokens('{"a": 1', tokenizer) == 0


def test_free_text_has_as_many_tokens_as_documents_and_other_prompts(tokenizer: Tokenizer) -> None:
    worker = Half()
    rates = run_case([Engine("one", worker, {"logprobs": 0})], CASES["person"], 4, 64, 2, tokenizer)["one"]  # type: ignore[arg-type]
    assert rates.num_tokens == 10
    assert rates.structured == rates.free == [20.0, 20.0]
    assert rates.whole == [0.5, 0.5]
    assert rates.useful == [useful_tokens('{"a": 1}', tokenizer)] * 2
    assert [tokens for _, tokens, _ in worker.requests[1::2]] == [10] * 3
    prompts = [tuple(prompt) for given, _, _ in worker.requests for prompt in given]
    assert len(set(prompts)) == len(prompts) == 4 * 2 * 3
    assert all(params["logprobs"] == 0 for _, _, params in worker.requests)


def test_structures_and_documents_are_valid() -> None:
    for case in CASES.values():
        StructuredOutputs(**case.structure)
    for schema, document in documents().values():
        jsonschema_rs.validator_for(schema, validate_formats=True).validate(json.loads(json.dumps(document)))
