"""Tokenizer, chat templates and incremental text against transformers' rendering and the whole decoded at once."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dispec.engine.errors import CheckpointError
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import CHATML, save_tiny, save_tokenizer, sentencepiece_tokenizer, tiny_tokenizer
from tests.vocabularies import with_byte_fallback, with_metaspace

# The shape of Qwen 2.5's template: a default system message, tools as JSON, tool calls and their results.
QWEN_TOOLS = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501 (as it is published)

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# What else templates of published models use: namespaces, macros, loop controls, dates, training marks, variables.
MODERN = """{%- set ns = namespace(count=0) -%}
{%- macro show(message) -%}
[{{ message.role | upper }}] {{ message.content }}{{ eos_token }}
{%- endmacro -%}
{% for message in messages -%}
    {%- if message.role == 'system' %}{{ message.content }}{% continue %}{% endif -%}
    {%- set ns.count = ns.count + 1 -%}
    {% if message.role == 'assistant' %}{% generation %}{{ show(message) }}{% endgeneration %}{% else %}
        {{- show(message) }}
    {% endif %}
{% endfor -%}
{{ ns.count }} {{ strftime_now('%Y') | length }} {{ enable_thinking is defined and enable_thinking }}
{{- documents is none }}{{ {'b': '<é>', 'a': [1, none, true]} | tojson(indent=2) }}"""

CONVERSATION = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "  Où est-ce, <b>now</b>? 😀 "},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "Sure?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city — now",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def tool_conversation(arguments) -> list[dict]:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"sky": "grey"}'},
    ]


def save_with_template(directory: Path, template, **config) -> Path:
    save_tokenizer(directory, chat_template=template, bos_token="<|endoftext|>", **config)
    return directory


def both(directory: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    return Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return Tokenizer.from_directory(directory)


def test_ids_and_text_agree_with_transformers(tmp_path):
    save_tokenizer(tmp_path)
    ours, theirs = both(tmp_path)
    for text in ["", "Hello, world", "König 😀 <|im_end|> after", "def f():\n\n    pass", "\u0000\ufffd\u200b"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids) == text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_token_id, ours.special_tokens["pad_token"]) == (None, "<|endoftext|>")
    assert (ours.bos_token_id, ours.eos_token_id) == (None, theirs.eos_token_id)


def test_added_special_tokens_and_settings_of_training(tmp_path):
    backend = tiny_tokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog")
    assert ids[0] == 0
    assert ids[1:] == tokenizer.encode("The quick brown fox jumps over the lazy dog", add_special_tokens=False)
    assert tokenizer.decode(ids) == "The quick brown fox jumps over the lazy dog"
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


def test_ids_past_the_vocabulary_are_nothing(tokenizer):
    assert tokenizer.decode([70, 100_000, 71]) == tokenizer.decode([70, 71])
    assert tokenizer.token_bytes(100_000) == b""


@pytest.mark.parametrize("template", [CHATML, QWEN_TOOLS, LLAMA_3, MODERN], ids=["chatml", "qwen", "llama3", "modern"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_prompts_agree_with_transformers(template, add_generation_prompt, tmp_path):
    ours, theirs = both(save_with_template(tmp_path, template))
    for conversation in (CONVERSATION, CONVERSATION[1:2]):
        for variables in ({}, {"enable_thinking": True}):
            expected = theirs.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **variables
            )
            assert ours.apply_chat_template(conversation, add_generation_prompt, **variables) == expected
    assert "Paris" in ours.apply_chat_template(CONVERSATION)


def test_tools_agree_with_transformers(tmp_path):
    ours, theirs = both(save_with_template(tmp_path, QWEN_TOOLS))
    messages = tool_conversation({"city": "Köln"})
    expected = theirs.apply_chat_template(messages, tools=TOOLS, tokenize=False, add_generation_prompt=True)
    assert '"description": "The weather in a city — now"' in expected
    assert ours.apply_chat_template(messages, tools=TOOLS) == expected
    # OpenAI's clients send the arguments as JSON text, which must not be quoted a second time.
    assert ours.apply_chat_template(tool_conversation('{"city": "Köln"}'), tools=TOOLS) == expected


@pytest.mark.parametrize("final", ["Well, it", "Well, it  "])
@pytest.mark.parametrize("template", [CHATML, LLAMA_3], ids=["keeps spaces", "trims"])
def test_continuing_the_last_message_agrees_with_transformers(template, final, tmp_path):
    ours, theirs = both(save_with_template(tmp_path, template))
    messages = [*CONVERSATION, {"role": "assistant", "content": final}]
    expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert ours.apply_chat_template(messages, False, continue_final_message=True) == expected
    assert expected.rstrip().endswith("Well, it")
    with pytest.raises(ValueError, match="exclude each other"):
        ours.apply_chat_template(messages, continue_final_message=True)


def test_places_of_the_template(tmp_path):
    shown = "{% for message in messages %}{{ message.content }}{% endfor %}"
    named = [{"name": "default", "template": f"plain {shown}"}, {"name": "tool_use", "template": f"with tools {shown}"}]
    ours, theirs = both(save_with_template(tmp_path, named))
    for tools in (None, TOOLS):
        expected = theirs.apply_chat_template(CONVERSATION, tools=tools, tokenize=False)
        assert ours.apply_chat_template(CONVERSATION, tools=tools) == expected
    (tmp_path / "chat_template.jinja").write_text(f"from the file {shown}")
    ours, theirs = both(tmp_path)
    assert ours.apply_chat_template(CONVERSATION) == theirs.apply_chat_template(CONVERSATION, tokenize=False)
    assert ours.apply_chat_template(CONVERSATION).startswith("from the file")


def test_old_forms_of_special_tokens(tmp_path):
    save_with_template(tmp_path, LLAMA_3, eos_token={"content": "<|im_start|>", "__type": "AddedToken"})
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|endoftext|>"}}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert [tokenizer.special_tokens[f"{role}_token"] for role in ("bos", "eos")] == ["<|endoftext|>", "<|im_start|>"]
    assert tokenizer.apply_chat_template(CONVERSATION).startswith("<|endoftext|><|start_header_id|>")


def test_text_parts_become_text(tokenizer):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "one\ntwo"}])
    assert tokenizer.apply_chat_template([{"role": "user", "content": parts}]) == whole


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        ("Hi", "messages: must be a list"),
        ([], "messages: must not be empty"),
        ([{"role": "user", "content": "Hi"}, "Hi"], r"messages\[1\]: must be an object"),
        ([{"content": "Hi"}], r"messages\[0\].role: is missing"),
        ([{"role": 3, "content": "Hi"}], r"messages\[0\].role: must be a string"),
        ([{"role": "user"}], r"messages\[0\].content: is missing"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: is missing"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content: must be a string"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], r"messages\[0\].content\[0\]: .*'image_url'"),
        ([{"role": "user", "content": "Hi", "tool_calls": 3}], r"messages\[0\].tool_calls: must be a list"),
        (tool_conversation("{city"), r"messages\[1\].tool_calls\[0\].function.arguments: is not JSON"),
        ([{"role": "assistant", "tool_calls": ["weather"]}], r"messages\[0\].tool_calls\[0\]: must be an object"),
        ([{"role": "assistant", "tool_calls": [{"id": {}}]}], r"messages\[0\].tool_calls\[0\].id: must be a string"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 3}}]}],
            r"messages\[0\].tool_calls\[0\].function.name: must be a string",
        ),
        ([{"role": "tool", "content": "x", "tool_call_id": []}], r"messages\[0\].tool_call_id: must be a string"),
        ([{"role": "user", "content": "Hi", "extra": object()}], r"messages\[0\].extra: object is not JSON"),
    ],
)
def test_bad_messages_are_refused_with_the_field(messages, told):
    from dispec.engine.text.chat_messages import plain_messages

    with pytest.raises(ValueError, match=told):
        plain_messages(messages)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content.nothing.at_all }}", "nothing"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{% for %}", "template is broken"),
    ],
)
def test_templates_that_fail(template, told, tmp_path):
    save_with_template(tmp_path, template)
    with pytest.raises(ValueError, match=told):
        Tokenizer.from_directory(tmp_path).apply_chat_template(CONVERSATION)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ tojson.__globals__['json'] }}",
        "{{ messages.append('x') }}",
        "{{ (messages[0].update({'role': 'system'})) }}",
        "{{ '%s'.__format__ }}{{ cycler.__init__.__globals__.os.popen('true') }}",
    ],
)
def test_templates_stay_in_the_sandbox(attack, tmp_path):
    save_with_template(tmp_path, attack)
    messages = [{"role": "user", "content": "Hi"}]
    try:
        text = Tokenizer.from_directory(tmp_path).apply_chat_template(messages)
    except ValueError:
        text = ""
    assert "<class" not in text
    assert "module" not in text
    assert "function" not in text
    assert messages == [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{}", "is not a tokenizer that we can read"),
        ("tokenizer.json", "", "is not a tokenizer that we can read"),
        ("tokenizer_config.json", "{", "cannot be read as JSON"),
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("special_tokens_map.json", "nothing", "cannot be read as JSON"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template is not a template"),
        ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "chat_template is not a template"),
    ],
)
def test_broken_files_are_named(name, contents, told, tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if contents is not None:
        (tmp_path / name).write_text(contents)
    with pytest.raises(CheckpointError, match=told) as caught:
        Tokenizer.from_directory(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_vocabulary_and_merges_are_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    save_tiny(tmp_path / "model", "qwen2")
    backend = tiny_tokenizer()
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": CHATML})
    )
    backend.model.save(str(tmp_path / "model"))  # vocab.json and merges.txt
    checkpoint = find_checkpoint(tmp_path / "model")
    assert checkpoint.directory.parent == tmp_path / "cache" / "tokenizers"
    tokenizer = Tokenizer.from_directory(checkpoint.directory)
    assert tokenizer.encode("The lazy dog is in Paris") == backend.encode("The lazy dog is in Paris").ids
    assert tokenizer.has_chat_template
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("converted again"))
    assert find_checkpoint(tmp_path / "model") == checkpoint
    (tmp_path / "model" / "vocab.json").write_text("{}")  # a changed source is another tokenizer
    monkeypatch.undo()
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "model" / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="could not be converted"):
        find_checkpoint(tmp_path / "model")


def test_neither_torch_nor_transformers_is_imported():
    check = (
        "import sys, dispec.engine.text.tokenizer, dispec.engine.text.detokenizer; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    )
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-c", check], cwd=root, check=True)


def test_token_bytes_within_a_text():
    tokenizer = with_byte_fallback()
    spelled = [tokenizer.token_bytes(token).decode(errors="replace") for token in (0x41, 0xE2, *range(256, 267))]
    assert spelled == ["A", "\ufffd", " ", " Hello", " wor", "ld", "é", "\ufffd", "!", "  ", "😀", "<s>", "</s>"]
    assert with_metaspace().token_bytes(1) == b" Hello"
    assert tokenizer.token_bytes(100_000) == b""


def test_bad_words_within_words_and_white_space():
    tokenizer = Tokenizer(sentencepiece_tokenizer())
    ids = tokenizer.vocabulary
    assert tokenizer.bad_word_token_ids(["\n"]) == ((ids["<0x0A>"],),)
    assert tokenizer.bad_word_token_ids(["the", " the"]) == ((ids["t"], ids["he"]), (ids["▁the"],))
    assert tokenizer.bad_word_token_ids(["  "]) == ((ids["▁▁"],),)
    assert tokenizer.bad_word_token_ids(["</s>"])[0] == (ids["</s>"],)
    tokenizer = Tokenizer(tiny_tokenizer())
    (newline,) = tokenizer.encode("\n")
    assert tokenizer.bad_word_token_ids(["\n"]) == ((newline,),)
    words = [tuple(tokenizer.encode(text)) for text in ("the dog", " the dog", "\tx", " \tx")]
    assert tokenizer.bad_word_token_ids(["the dog", "\tx"]) == tuple(words)
    assert min(map(len, words)) > 1


def test_tokens_of_the_byte_alphabet_are_single_bytes():
    tokenizer = Tokenizer(tiny_tokenizer())
    ids = [tokenizer.vocabulary[character] for character in pre_tokenizers.ByteLevel.alphabet()]
    assert sorted(map(tokenizer.token_bytes, ids)) == [bytes([byte]) for byte in range(256)]
