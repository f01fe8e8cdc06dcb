"""What `LLM` returns and shows: kinds of outputs, reprs, progress bars; and names that callers bring from vLLM."""

import asyncio
import inspect
import io
import json
import shutil
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import pytest

import dispec
from dispec import LLM, AsyncLLM, EngineOptions, RequestOutputKind, SamplingParams, generate
from dispec.engine.names_of_vllm import ADVICE
from dispec.engine.unknown_names import field_names
from tests.small_engine import OPTIONS, greedy, make, random_prompts, sampled_logprobs, tokens_of
from tests.tiny_llm import directory as directory
from tests.tiny_llm import llm as llm

PATIENCE = 120


def test_prompts_are_told_as_they_were_given(llm: LLM) -> None:
    ids = llm.encode("the quick")
    both = {"prompt": "the quick", "prompt_token_ids": ids}
    found = llm.generate(["the quick", ids, both], greedy(2))
    assert [one.prompt for one in found] == ["the quick", None, "the quick"]
    assert [one.prompt_token_ids for one in found] == [ids] * 3
    assert len({one.request_id for one in found}) == 3
    (answer,) = llm.chat([{"role": "user", "content": "hi"}], greedy(2))
    assert answer.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_encode_and_decode(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    assert llm.encode("the quick") == tokenizer.encode("the quick")
    assert llm.decode(llm.encode("the quick")) == "the quick"


def test_the_kinds_of_a_streams_outputs(llm: LLM) -> None:
    whole = llm.generate("the quick", greedy(9))[0].outputs[0]
    cumulative = list(llm.stream("the quick", greedy(9, output_kind=RequestOutputKind.CUMULATIVE)))
    assert [one.outputs[0].token_ids for one in cumulative] == [whole.token_ids[:count] for count in range(1, 10)]
    assert cumulative[-1].outputs[0].text == whole.text
    (only,) = llm.stream("the quick", greedy(9, output_kind=RequestOutputKind.FINAL_ONLY))
    assert (only.finished, only.outputs[0].token_ids) == (True, whole.token_ids)
    (again,) = llm.generate("the quick", greedy(9, output_kind=RequestOutputKind.CUMULATIVE))
    assert again.outputs[0].token_ids == whole.token_ids
    with pytest.raises(ValueError, match=r"^sampling_params: output_kind is DELTA, must be CUMULATIVE or FINAL_ONLY"):
        llm.generate("the quick", greedy(9, output_kind=RequestOutputKind.DELTA))


def test_the_pieces_of_logprobs_are_the_whole(llm: LLM) -> None:
    params = greedy(6, logprobs=2)
    whole = llm.generate("the quick", params)[0].outputs[0]
    pieces = [one.outputs[0] for one in llm.stream("the quick", params)]
    assert [entry for piece in pieces for entry in piece.logprobs or []] == whole.logprobs
    for found in (whole, pieces[-1]):
        assert found.cumulative_logprob == pytest.approx(sum(one.logprob for one in sampled_logprobs(whole)))


def test_the_pieces_of_several_outputs_are_the_whole(llm: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=1, n=3, max_tokens=9, ignore_eos=True)
    (whole,) = llm.generate("the quick", params)
    assert len({tuple(output.token_ids) for output in whole.outputs}) == 3
    assert whole.metrics.num_generation_tokens == 27
    pieces = [piece for one in llm.stream("the quick", params) for piece in one.outputs]
    for output in whole.outputs:
        own = [piece for piece in pieces if piece.index == output.index]
        assert [token for piece in own for token in piece.token_ids] == output.token_ids
        assert "".join(piece.text for piece in own) == output.text
        assert [piece.finish_reason for piece in own][-2:] == [None, "length"]


def test_reprs_are_short(llm: LLM) -> None:
    (output,) = llm.generate("the quick " * 50, greedy(100))
    shown = repr(output)
    assert len(shown) < 400
    for part in (repr(output.request_id), "the quick the quick", "(100)", "finish_reason='length'", "finished=True"):
        assert part in shown
    assert "prompt_token_ids=[1, 2, 3] (3)" in repr(llm.generate([1, 2, 3], greedy(1))[0])
    assert repr(llm) == f"LLM({str(llm.engine.options.model)!r}, dtype=float32, device=cpu, max_model_len=512)"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stderr", "use_tqdm", "is_shown"),
    [(Terminal, None, True), (Terminal, False, False), (io.StringIO, None, False), (io.StringIO, True, True)],
)
def test_progress(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, stderr: type[io.StringIO], use_tqdm: bool | None, is_shown: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stderr())
    llm.generate("the quick", greedy(4), use_tqdm=use_tqdm)
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert bool(written) == is_shown
    if is_shown:
        assert "1/1" in written
        assert "input " in written
        assert "tokens/s" in written


def test_a_notebook_shows_progress(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    llm.chat([{"role": "user", "content": "hi"}], greedy(2))
    assert "1/1" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_signatures_name_every_argument() -> None:
    for cls in (LLM, AsyncLLM):
        signature = inspect.signature(cls)
        assert tuple(signature.parameters) == field_names(EngineOptions)
        assert signature.parameters["max_num_seqs"].annotation is int
    assert [*inspect.signature(LLM.generate).parameters] == ["self", "prompts", "sampling_params", "use_tqdm"]
    assert [*inspect.signature(LLM.stream).parameters] == ["self", "prompt", "sampling_params"]
    assert [*inspect.signature(AsyncLLM.generate).parameters] == ["self", "prompt", "sampling_params", "request_id"]


def test_names_of_vllm_that_are_others_here_are_answered(llm: LLM) -> None:
    for name in ADVICE["LLM"]:
        assert name not in field_names(EngineOptions)
        for make_it in (LLM, AsyncLLM, EngineOptions):
            with pytest.raises(ValueError, match=rf"^{make_it.__name__} has no {name}: {ADVICE['LLM'][name][:20]}"):
                make_it(**{name: None})  # type: ignore[arg-type]
    for name in ADVICE["SamplingParams"]:
        assert name not in field_names(SamplingParams)
        with pytest.raises(ValueError, match=f"^SamplingParams has no {name}: "):
            SamplingParams(**{name: None})  # type: ignore[arg-type]
    for name in ADVICE["generate"]:
        for call in (llm.generate, llm.stream, llm.chat):
            with pytest.raises(ValueError, match=f"^{call.__name__} has no {name}: "):
                call([{"role": "user", "content": "x"}], **{name: None})  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"^LLM has no trust_remote_code: code of a checkpoint is never run"):
        generate("x", "y", trust_remote_code=True)
    for name in ADVICE["dispec"]:
        assert name not in dispec.__all__
        with pytest.raises(ImportError, match=f"^dispec has no {name}: "):
            exec(f"from dispec import {name}")
    with pytest.raises(ImportError, match="cannot import name 'Nothing' from 'dispec'"):
        exec("from dispec import Nothing")
    assert not hasattr(dispec, "Nothing")


def test_the_seed_of_an_llm_is_that_of_its_requests(directory: Path) -> None:
    def sample(seed: int | None) -> list[list[int]]:
        params = SamplingParams(temperature=2.0, max_tokens=12, ignore_eos=True)
        with make(directory, seed=seed) as llm:
            found = [*llm.generate(["the quick"] * 2, params), *llm.generate("the quick", replace(params, seed=1))]
            return [one.outputs[0].token_ids for one in found]

    first, again, other, free = sample(3), sample(3), sample(4), sample(None)
    assert first == again
    assert first[0] != first[1]
    assert first[:2] != other[:2]
    assert free[:2] not in (first[:2], other[:2])
    assert first[2] == other[2] == free[2]  # a request's own seed is not changed


@pytest.fixture(scope="module")
def advised(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that recommends greedy sampling with a repetition penalty, and a value that is none."""
    path = tmp_path_factory.mktemp("advised")
    shutil.copytree(directory, path, dirs_exist_ok=True)
    stated = {"temperature": 0.0, "repetition_penalty": 1.3, "top_p": 7}
    (path / "generation_config.json").write_text(json.dumps(stated))
    return path


def test_calls_without_parameters_take_those_of_the_model(advised: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages = [{"role": "user", "content": "hi"}]
    default = SamplingParams(temperature=0.0, repetition_penalty=1.3)
    with make(advised, max_model_len=64) as llm:
        assert llm.get_default_sampling_params() == default
        assert "top_p is 7, must be above 0 and at most 1: requests are sampled with the usual default" in caplog.text
        expected = llm.generate("the quick", default)[0].outputs[0].token_ids
        assert llm.generate(["the quick"] * 2)[1].outputs[0].token_ids == expected
        assert tokens_of(llm.stream("the quick")) == expected
        assert llm.chat(messages)[0].outputs[0].token_ids == llm.chat(messages, default)[0].outputs[0].token_ids
        plain = {tuple(llm.generate("the quick", SamplingParams())[0].outputs[0].token_ids) for _ in range(3)}
        assert len(plain) == 3

        answer = llm.chat(messages)[0].outputs[0].token_ids

    async def main() -> list[list[int]]:
        async with AsyncLLM(advised, **OPTIONS, max_model_len=64) as llm:
            assert llm.get_default_sampling_params() == default
            found = [[one async for one in outputs] for outputs in (llm.generate("the quick"), llm.chat(messages))]
            return [outputs[-1].outputs[0].token_ids for outputs in found]

    assert asyncio.run(main()) == [expected, answer]


def test_a_model_without_recommendations_has_the_usual_parameters(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()


def test_options_by_their_names_in_vllm(directory: Path) -> None:
    options = {
        "dtype": "float32",
        "max_model_len": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "gpu_memory_utilization": 0.5,
        "tensor_parallel_size": 1,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "quantization": None,
        "seed": 3,
    }
    with LLM(str(directory), **options) as llm:  # type: ignore[arg-type]
        params = SamplingParams(temperature=0.8, top_p=0.95, top_k=-1, stop="\n", max_tokens=4, n=2, seed=1)
        assert len(llm.generate("the quick", params)[0].outputs) == 2
        assert params.stop == ("\n",)


def test_close_while_another_thread_generates(directory: Path) -> None:
    llm = make(directory)
    begun, errors = threading.Event(), []

    def read() -> None:
        try:
            for _ in llm.stream("the quick", greedy(400)):
                begun.set()
        except RuntimeError as error:
            errors.append(str(error))

    readers = [threading.Thread(target=read, daemon=True) for _ in range(2)]
    for reader in readers:
        reader.start()
    assert begun.wait(PATIENCE)
    closer = threading.Thread(target=llm.close, daemon=True)  # which did not make it
    for thread in (closer, *readers):
        if thread is closer:
            thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert errors == ["this LLM is closed"] * 2
    llm.close()
    for call in (
        lambda: llm.generate("a"),
        lambda: next(llm.stream("a")),
        lambda: llm.chat([{"role": "user", "content": "a"}]),
    ):
        with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
            call()
    assert llm.decode(llm.encode("the quick")) == "the quick"


def test_an_error_within_the_block_closes_it(directory: Path) -> None:
    with pytest.raises(KeyError), make(directory) as llm:
        raise KeyError
    with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
        llm.generate(random_prompts(1), greedy(1))
