"""Invalid arguments of `LLM` are refused in one sentence, before anything runs; vLLM's forms of prompts work."""

import re

import jaxtyping
import pytest

from dispec import LLM, EngineOptions, SamplingParams, generate
from dispec.engine.engine import Engine
from dispec.engine.text.chat_template import ChatTemplate
from tests.checkpoints import CHATML, save_tiny, save_tokenizer
from tests.small_engine import OPTIONS, greedy, make, tokens_of

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>' }}{% endif %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    save_tiny(path, "llama")
    save_tokenizer(path, chat_template=THINKING)
    return path


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return make(directory)


@pytest.fixture
def unchecked():
    """Switch off the type checks of the tests, which refuse such arguments before our checks do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_mappings_as_vllm_takes_them(llm):
    text, params = "The sea is", greedy(6)
    ids = llm.tokenizer.encode(text)
    (expected,) = llm.generate(text, params)
    forms = [{"prompt": text}, {"prompt_token_ids": ids}, {"prompt_token_ids": tuple(ids), "prompt": text}]
    for form in forms:
        (alone,) = llm.generate(form, params)
        assert (alone.prompt_token_ids, alone.outputs[0].token_ids) == (ids, expected.outputs[0].token_ids)
        assert tokens_of(llm.stream(form, params)) == expected.outputs[0].token_ids
    together = llm.generate([*forms, text, ids], params)
    assert [one.outputs[0].token_ids for one in together] == [expected.outputs[0].token_ids] * 5
    assert [one.prompt_token_ids for one in together] == [ids] * 5


def test_the_salt_of_a_mapping_keeps_prefixes_apart(directory):
    llm = make(directory)
    ids = list(range(3, 67))

    def cached(**given) -> int:
        return llm.generate({"prompt_token_ids": ids, **given}, greedy(2))[0].num_cached_tokens

    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b"), cached(), cached()] == [
        0,
        63,
        0,
        0,
        63,
    ]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"text": "x"}, r"^prompt has no text: "),
        ({"promt": "x"}, r"^prompt has no promt: did you mean prompt\?$"),
        (
            [{"prompt": "x"}, {"prompt_tokens_ids": [1]}],
            r"^prompts\[1\] has no prompt_tokens_ids: did you mean prompt_",
        ),
        ({"prompt": "x", "multi_modal_data": {}}, "^prompt has no multi_modal_data"),
        ({}, "^prompt has neither prompt nor prompt_token_ids$"),
        ([[1], {"cache_salt": "x"}], r"^prompts\[1\] has neither"),
        ({"prompt": [1, 2]}, "^prompt: prompt is list, must be a text$"),
        ({"prompt_token_ids": "12"}, "^prompt: prompt_token_ids is str, must be a list of token ids$"),
        ({"prompt_token_ids": [1, "2"]}, "^prompt: prompt_token_ids is list, must be a list of token ids$"),
        ({"prompt": "x", "cache_salt": ""}, "^prompt: cache_salt is '', must be a text that is not empty$"),
        (b"text", "^prompts is bytes, must be one prompt or a list of them$"),
        ([b"text"], r"^prompts\[0\] is bytes, must be a text, a list of token ids or a mapping"),
        ({"a", "b"}, "^prompts is set, must be"),
        ([None], r"^prompts\[0\] is NoneType, must be"),
    ],
)
def test_prompts_of_other_forms_are_named(llm, unchecked, prompts, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, greedy(2))
    if not isinstance(prompts, list):
        with pytest.raises(ValueError, match=message):
            llm.stream(prompts, greedy(2))  # when it is called, and not when it is first read
    assert not llm.engine.has_work


def test_a_stream_takes_one_prompt(llm, unchecked):
    with pytest.raises(ValueError, match=r"^prompt holds 2 prompts, stream takes one$"):
        llm.stream(["a", "b"])
    with pytest.raises(ValueError, match=r"^prompts is empty"):
        llm.stream([])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 3}, r"^sampling_params is dict, must be SamplingParams: write SamplingParams\(max_tokens=3\)$"),
        ({"max_token": 3}, r"^SamplingParams has no max_token: did you mean max_tokens\?$"),
        ([{"max_tokens": 3}], r"^sampling_params\[0\] is dict, must be SamplingParams$"),
        (3, "^sampling_params is int, must be SamplingParams or a list of them$"),
        ("x", "^sampling_params is str, must be SamplingParams or a list of them$"),
    ],
)
def test_parameters_of_another_type_are_named(llm, unchecked, params, message):
    for call in (llm.generate, llm.stream):
        with pytest.raises(ValueError, match=message):
            call("a", params)
    with pytest.raises(ValueError, match=message):
        llm.chat(MESSAGES, params)
    with pytest.raises(ValueError, match=message):
        generate("no such model", "a", params)  # refused before a model is looked for
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_tokens", r"has no max_tokens: did you mean sampling_params=SamplingParams\(max_tokens=…\)\?$"),
        ("max_token", r"has no max_token: did you mean sampling_params=SamplingParams\(max_tokens=…\)\?$"),
        ("params", r"has no params: did you mean sampling_params\?$"),
        ("block_size", r"has no block_size: did you mean LLM\(block_size=…\)\?$"),
        ("qqq", "has no qqq: it has .*sampling_params"),
    ],
)
def test_names_that_a_call_does_not_have(llm, name, message):
    for call, owner in ((llm.generate, "generate"), (llm.stream, "stream")):
        with pytest.raises(ValueError, match=f"^{owner} {message}"):
            call("a", **{name: 3})
    with pytest.raises(ValueError, match=f"^chat {message}"):
        llm.chat(MESSAGES, **{name: 3})


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: LLM(max_model_length=12), r"^LLM has no max_model_length: did you mean max_model_len\?$"),
        (
            lambda: LLM("x", temperature=0),
            r"^LLM has no temperature: did you mean sampling_params=SamplingParams\(temperature=…",
        ),
        (
            lambda: generate("x", "a", max_tokens=3),
            r"^LLM has no max_tokens: did you mean sampling_params=SamplingParams\(",
        ),
        (lambda: EngineOptions(max_seqs=3), r"^EngineOptions has no max_seqs: did you mean max_num_seqs\?$"),
        (lambda: SamplingParams(max_token=3), r"^SamplingParams has no max_token: did you mean max_tokens\?$"),
        (lambda: SamplingParams(beam_width=3), r"^SamplingParams has no beam_width: it has n, temperature, "),
    ],
)
def test_names_that_a_class_does_not_have(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


@pytest.mark.parametrize(
    ("made", "field", "value"),
    [
        (SamplingParams, "max_tokens", "3"),
        (SamplingParams, "max_tokens", 3.5),
        (SamplingParams, "temperature", "0"),
        (SamplingParams, "temperature", None),
        (SamplingParams, "stop", 3),
        (SamplingParams, "stop_token_ids", 7),
        (SamplingParams, "stop_token_ids", ("7",)),
        (SamplingParams, "bad_words_token_ids", (7,)),
        (SamplingParams, "allowed_token_ids", (1.5,)),
        (SamplingParams, "logit_bias", [1]),
        (SamplingParams, "logit_bias", {"1": 2.0}),
        (SamplingParams, "logit_bias", {1: "2"}),
        (SamplingParams, "seed", "x"),
        (SamplingParams, "structured_outputs", "json"),
        (EngineOptions, "max_model_len", "12"),
        (EngineOptions, "max_num_seqs", None),
        (EngineOptions, "block_size", 32.0),
        (EngineOptions, "gpu_memory_utilization", "0.9"),
    ],
)
def test_values_of_another_type_are_named(unchecked, made, field, value):
    with pytest.raises(ValueError, match=rf"^{field} "):
        made(**{field: value})


def test_lists_that_are_none_are_empty(unchecked):
    """As vLLM's defaults are, which callers pass on."""
    none = dict.fromkeys(("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logit_bias"))
    assert SamplingParams(**none) == SamplingParams()


def test_max_tokens_of_none_generates_until_the_context_ends(directory):
    with make(directory, max_model_len=48) as llm:
        (output,) = llm.generate([5, 6, 7], greedy(None))
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (45, "length")
    with pytest.raises(ValueError, match=r"^min_tokens is 2147483648"):
        SamplingParams(max_tokens=None, min_tokens=2**31)


@pytest.mark.parametrize(
    ("value", "name"), [(SamplingParams(), "max_tokens"), (EngineOptions(), "max_num_seqs"), (SamplingParams(), "top")]
)
def test_an_assignment_tells_how_to_change_a_value(value, name):
    with pytest.raises(AttributeError, match=rf"^{type(value).__name__} cannot be changed: use .*replace\(…, {name}=…"):
        setattr(value, name, 3)


def test_the_dtype_auto():
    assert EngineOptions(dtype="auto") == EngineOptions(dtype="bfloat16") == EngineOptions()


def test_variables_of_the_template_reach_it(llm):
    plain = llm.chat_prompt(MESSAGES)
    closed = llm.chat_prompt(MESSAGES, enable_thinking=False)
    assert llm.tokenizer.decode(closed)[len(llm.tokenizer.decode(plain)) :] == "<think>\n\n</think>"
    assert llm.chat(MESSAGES, greedy(2), enable_thinking=False)[0].prompt_token_ids == closed
    assert llm.chat_prompt(MESSAGES, chat_template_kwargs={"enable_thinking": False}) == closed
    assert llm.chat_prompt(MESSAGES, chat_template_kwargs={"another_model_s": 1}) == plain
    bare = llm.chat_prompt(MESSAGES, add_generation_prompt=False)
    assert plain[: len(bare)] == bare
    assert len(plain) > len(bare)
    assert llm.chat_prompt(MESSAGES, chat_template_kwargs={"add_generation_prompt": False}) == bare


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"enable_thinkin": False}, r"has no enable_thinkin: did you mean enable_thinking\?$"),
        (
            {"reasoning_effort": "low"},  # another model's
            r"has no reasoning_effort: did you mean chat_template_kwargs=\{'reasoning_effort': …\}\?$",
        ),
        ({"chat_template": "x"}, r"has no chat_template: it is read from the checkpoint"),
        ({"chat_template_kwargs": ["x"]}, "^chat_template_kwargs is list, must be a mapping"),
        ({"chat_template_kwargs": {"messages": []}}, "^chat_template_kwargs holds 'messages'"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": True}},
            "holds 'enable_thinking', which",
        ),
    ],
)
def test_mistyped_variables_are_not_swallowed(llm, unchecked, given, message):
    for call in (llm.chat, llm.chat_prompt):
        with pytest.raises(ValueError, match=message):
            call(MESSAGES, **given)


def test_variables_that_a_template_sets_itself_where_they_are_missing():
    """As Llama 3.1's template does with its date; loop variables and what the renderer gives are none."""
    source = (
        "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}{{ date_string }}"
        "{% for message in messages %}{{ message.content }}{{ loop.index }}{% endfor %}{{ strftime_now('%d') }}"
        "{% if add_generation_prompt and tools %}{{ documents }}{% endif %}"
    )
    template = ChatTemplate({"default": source, "tool_use": "{{ custom_tools }}"}, {})
    assert template.variables == {"date_string", "documents", "custom_tools"}


def test_several_conversations(llm):
    others = [{"role": "system", "content": "Be brief."}, *MESSAGES]
    params = [greedy(3), greedy(5)]
    expected = [llm.chat(conversation, one)[0] for conversation, one in zip([MESSAGES, others], params, strict=True)]
    found = llm.chat([MESSAGES, others], params)
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in expected]
    assert [one.prompt_token_ids for one in found] == [one.prompt_token_ids for one in expected]
    assert [one.outputs[0].token_ids for one in llm.chat([MESSAGES], greedy(3))] == [expected[0].outputs[0].token_ids]
    with pytest.raises(ValueError, match=r"^conversation 1: messages\[0\].role"):
        llm.chat([MESSAGES, [{"content": "hi"}]], greedy(3))
    with pytest.raises(ValueError, match=r"^sampling_params holds 2 SamplingParams for 1 prompts"):
        llm.chat(MESSAGES, params)


def test_a_closed_llm_says_so(directory):
    with make(directory) as llm:
        half_read = llm.stream("one", greedy(8))
        next(half_read)
    with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
        llm.generate("two", greedy(2))
    with pytest.raises(RuntimeError, match=r"^this LLM is closed$"):
        list(half_read)
    llm.close()


def test_the_module_s_generate_closes_what_it_opened(directory, monkeypatch):
    closed = []
    close = Engine.close

    def note(engine: Engine) -> None:
        closed.append(engine)
        close(engine)

    monkeypatch.setattr(Engine, "close", note)
    (completion,) = generate(directory, {"prompt": "The sea"}, greedy(4), **OPTIONS)
    assert len(completion.outputs[0].token_ids) == 4
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model", None, "model is None, must be a name, a path or a ModelConfig"),
        ("speculative_model", 3, "speculative_model is 3, must be a name"),
        ("threads", True, "threads is True, must be an integer"),
        ("max_num_seqs", True, "max_num_seqs is True, must be an integer"),
        ("device", ["cpu"], "device is list, must be a text"),
        ("kv_transfer_secret", 5, "kv_transfer_secret is int, must be a text"),
    ],
)
def test_options_of_another_type_are_refused(name, value, message, unchecked):
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineOptions(**{name: value})


@pytest.mark.parametrize("prompts", [None, 5])
def test_prompts_that_are_no_series_are_refused(llm, prompts, unchecked):
    with pytest.raises(ValueError, match=f"prompts is {type(prompts).__name__}, must be one prompt or a list"):
        llm.generate(prompts)


def test_half_a_surrogate_pair_is_refused(llm):
    message = r"text holds '\\ud800' at position \d+, must be valid Unicode"
    with pytest.raises(ValueError, match=message):
        llm.generate("a\ud800")
    with pytest.raises(ValueError, match=message):
        llm.chat([{"role": "user", "content": "a\ud800"}])
    with pytest.raises(ValueError, match=message):
        llm.generate("a", SamplingParams(bad_words=["\ud800"]))


def test_compiling_in_the_background_is_for_a_server():
    with pytest.raises(ValueError, match="compile is 'background', which is for a server: an LLM is never idle"):
        LLM("smollm2", compile="background")
