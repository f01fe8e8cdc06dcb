"""The commands of `dispec chat`, its settings and statistics, on a scripted model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dispec import SamplingParams
from dispec.engine.option_fields import option_fields
from dispec.layers.config import config_from_hugging_face
from dispec.serving.cli.chat.commands import COMMANDS, run_command
from dispec.serving.cli.chat.conversation import Turn
from dispec.serving.cli.chat.converse import banner, converse
from dispec.serving.cli.chat.session import ChatSession
from dispec.serving.cli.chat.settings import sampling_defaults, settable, setting_lines, with_setting
from tests.chat_models import ScriptedModel, chat_session
from tests.checkpoints import tiny_model

Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """What was said on standard error since the last call."""
    return lambda: capsys.readouterr().err


def prompts(session: ChatSession) -> list[str]:
    model: Any = session.llm
    return model.prompts


def talk(session: ChatSession, *lines: str) -> None:
    given = iter(lines)
    converse(session, lambda: next(given, None))


def test_commands_change_the_conversation(said: Said) -> None:
    session = chat_session("one", "two", "three", "four", shows_statistics=False)
    talk(session, "first?", "/system Be brief.", "second?", "/undo", "third?", "/clear", "fourth?")
    assert said().splitlines() == ["system message: Be brief.", "forgotten: second?", "forgotten"]
    assert [("Be brief." in prompt) for prompt in prompts(session)] == [False, True, True, True]
    assert "first?" in prompts(session)[2]
    assert "second?" not in prompts(session)[2]
    assert "third?" not in prompts(session)[3]
    assert session.turns == [Turn("fourth?", "four")]


def test_an_answer_is_tried_again(said: Said) -> None:
    session = chat_session("one", "two", "three", None, "four")
    talk(session, "first?", "second?", "/retry", "/retry")
    assert session.turns == [Turn("first?", "one"), Turn("second?", "three")]  # an answer without text changes nothing
    talk(session, "/retry")
    assert session.turns == [Turn("first?", "one"), Turn("second?", "four")]
    assert prompts(session)[2] == prompts(session)[1] == prompts(session)[4]
    assert "stopped" in said()
    talk(chat_session(), "/retry", "/undo")
    assert said().splitlines() == ["error: nothing was asked yet"] * 2


def test_the_system_message_is_shown_and_removed(said: Said) -> None:
    session = chat_session(system="Be brief.")
    talk(session, "/system", '/system ""', "/system", "/system Two\nlines")
    lines = ["system message: Be brief.", "no system message", "no system message", "system message: Two", "lines"]
    assert said().splitlines() == lines
    assert session.system == "Two\nlines"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("/hepl", "unknown command /hepl: did you mean /help?"),
        ("/zzzzzz now", "unknown command /zzzzzz: /help lists them, and a space before it makes it a question"),
        ("/clear all", "/clear takes no argument"),
        ("/save", "the name of a file is missing"),
        ("/load /no/such/file", "/no/such/file: No such file or directory"),
        ("/set temprature 1", "/set has no temprature: did you mean temperature?"),
        ("/set temperature 300", "temperature is 300.0, must be between 0 and 100"),
        ("/set temperature warm", "temperature is 'warm', must be a number"),
        ("/set top_k 1.5", "top_k is '1.5', must be an integer"),
        ("/set ignore_eos maybe", "ignore_eos is 'maybe', must be true or false"),
        ("/set min_tokens 101", "min_tokens is 101, must be at most max_tokens (100)"),
        ("/set stop_token_ids [1, -5]", "stop_token_ids holds -5, must be token ids between 0 and 2147483647"),
        ("/set logit_bias 3", "logit_bias is 3, must be a mapping of token ids to numbers"),
        ("/set n 2", "n cannot be set here: a chat shows one answer, without log-probabilities"),
    ],
)
def test_wrong_commands_are_one_sentence(line: str, sentence: str, said: Said) -> None:
    session = chat_session()
    talk(session, line)
    assert said() == f"error: {sentence}\n"
    assert session.params == SamplingParams(max_tokens=100)


@pytest.mark.parametrize("line", [" /help", "/etc/passwd holds what?", "/2 is a half?", "What does /help do?", "/Help"])
def test_a_line_that_is_no_command_is_a_question(line: str) -> None:
    session = chat_session("Hm.")
    talk(session, line)
    assert session.turns == [Turn(line.strip(), "Hm.")]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.5", 0.5),
        ("temperature", "1", 1.0),
        ("temperature", "= 0.3", 0.3),
        ("top_k", "40", 40),
        ("seed", "7", 7),
        ("seed", "none", None),
        ("ignore_eos", "true", True),
        ("stop", "###", ("###",)),
        ("stop", "42", ("42",)),
        ("stop", '["a", "b"]', ("a", "b")),
        ("stop_token_ids", "5", (5,)),
        ("allowed_token_ids", "[1, 2]", (1, 2)),
        ("bad_words_token_ids", "[[1, 2]]", ((1, 2),)),
        ("logit_bias", '{"5": -1.5}', {5: -1.5}),
        ("max_tokens", "default", 100),
    ],
)
def test_settings_reach_the_next_answer(name: str, text: str, value: object) -> None:
    session = chat_session("Hm.")
    talk(session, "/set max_tokens 50", f"/set {name} {text}", "What?")
    model: Any = session.llm
    assert getattr(model.params[0], name) == value
    assert model.params[0].max_tokens == (100 if name == "max_tokens" else 50)


def test_a_grammar_can_be_set() -> None:
    defaults = SamplingParams()
    params = with_setting(defaults, "structured_outputs", '{"choice": ["yes", "no"]}', defaults)
    assert params.structured_outputs is not None
    assert params.structured_outputs.choice == ("yes", "no")
    assert "  structured_outputs          choice" in list(setting_lines(params))
    assert with_setting(params, "structured_outputs", "none", defaults) == defaults


def test_the_list_of_settings_has_every_parameter(said: Said) -> None:
    assert set(settable()) == set(option_fields(SamplingParams)) - {"n", "logprobs", "prompt_logprobs"}
    talk(chat_session(), "/set")
    lines = said().splitlines()
    assert [line.split()[0] for line in lines] == list(settable())
    assert [line.split(maxsplit=2)[1:] for line in lines if "top_p" in line] == [["1.0", "above 0 and at most 1"]]
    assert ["100", "at", "least", "1"] in [line.split()[1:] for line in lines]
    assert ["random"] in [line.split()[1:] for line in lines]
    talk(chat_session(), "/set temperature")
    assert said().startswith("temperature is 1.0 (0 to 100): Divides the logits")


def test_help_lists_every_command(said: Said) -> None:
    talk(chat_session(), "/?")
    shown = said()
    for command in COMMANDS:
        assert f"  {', '.join((command.name, *command.aliases))} {command.argument}".rstrip() in shown
        assert command.help in shown


@pytest.mark.parametrize("line", ["/exit", "/bye", "/quit"])
def test_exit_leaves_the_rest_of_the_input(line: str) -> None:
    session = chat_session("one")
    talk(session, "first?", line, "second?")
    assert len(prompts(session)) == 1


def test_a_conversation_is_saved_and_loaded(tmp_path: Path, said: Said) -> None:
    path = tmp_path / "talk.json"
    session = chat_session("é\n", "two", system="Be brief.", shows_statistics=False)
    talk(session, "first?", f"/save {path}", "second?", f"/save {path}")
    assert said().splitlines() == [f"saved 1 question to {path}", f"saved 2 questions to {path}"]
    assert [(message["role"], message["content"]) for message in json.loads(path.read_text())] == [
        *(("system", "Be brief."), ("user", "first?"), ("assistant", "é\n"), ("user", "second?"), ("assistant", "two"))
    ]
    other = chat_session("three", shows_statistics=False)
    talk(other, f"/load {path}", "third?", f"/save {path}")
    assert said().splitlines() == [f"loaded 2 questions from {path}", f"saved 3 questions to {path}"]
    assert prompts(other)[0].startswith(prompts(session)[1].removesuffix("<|im_start|>assistant\n"))
    talk(chat_session(), f"/save {path}")
    assert said() == f"error: {path} exists already: give another name\n"


@pytest.mark.parametrize(
    ("contents", "problem"),
    [
        ("{", "is not a JSON list of messages with role and content: "),
        ('[{"role": "user"}]', "is not a JSON list of messages with role and content: "),
        ('[{"role": "tool", "content": "x"}]', "is not a JSON list of messages with role and content: "),
        (b"\xff", "is not a JSON list of messages with role and content: "),
        ('[{"role": "user", "content": "x"}]', "ends with a question, must end with an answer"),
        (
            '[{"role": "system", "content": "x"}, {"role": "assistant", "content": "x"}]',
            "message 2 is of assistant, not user",
        ),
    ],
)
def test_another_file_is_not_loaded(contents: str | bytes, problem: str, tmp_path: Path, said: Said) -> None:
    path = tmp_path / "other.json"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    session = chat_session("one", system="Be brief.", shows_statistics=False)
    talk(session, "first?", f"/load {path}")
    line = said()
    assert line.startswith(f"error: {path}")
    assert problem in line
    assert line.count("\n") == 1
    assert (session.turns, session.system) == ([Turn("first?", "one")], "Be brief.")


def test_statistics_follow_an_answer(said: Said) -> None:
    session = chat_session("It is Paris.", "Yes.")
    talk(session, "Where?")
    model: Any = session.llm
    prompt = len(model.tokenizer.encode(model.prompts[0], add_special_tokens=False))
    count = len(model.tokenizer.encode("It is Paris."))
    rate = f"{(count - 1) / 2:.1f} tokens/s"
    context = f"context {prompt + count} of 4096"
    assert said() == f"{count} tokens, {rate}, first token after 0.50 s, {context}\n"
    talk(session, "/stats")
    lines = [line.split(maxsplit=1) for line in said().splitlines()]
    assert dict(lines) == {
        "answers": "1",
        "tokens": f"{count}, {rate}",
        "first": "token   after 0.50 s on average",
        "prompts": f"{prompt} tokens, 4 of them from the KV cache",
        "context": f"{prompt + count} of 4096 tokens",
    }
    session.shows_statistics = False
    talk(session, "Really?")
    assert said() == ""
    assert session.statistics.num_answers == 2


def test_statistics_count_draft_tokens(said: Said) -> None:
    session = chat_session("It is Paris.", "Yes.")
    model: Any = session.llm
    model.drafts = (8, 5)
    talk(session, "Where?", "Really?", "/stats")
    lines = said().splitlines()
    assert lines[0].endswith(", 5 of 8 draft tokens accepted")
    assert "  draft tokens  16, 10 of them accepted" in lines


def test_statistics_before_the_first_answer(said: Said) -> None:
    talk(chat_session(), "/stats")
    assert [line.split()[1] for line in said().splitlines()] == ["0"] * 4


def test_the_banner_tells_model_and_settings() -> None:
    model = tiny_model("qwen3")
    session = chat_session(params=SamplingParams(temperature=0.3, top_k=20, seed=0))
    session.llm.engine = SimpleNamespace(  # type: ignore[assignment]
        config=config_from_hugging_face(model.config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}),
        options=SimpleNamespace(model="tiny"),
        device="cpu",
        weights_format="float32",
        max_model_len=512,
        phase_seconds={"load": 1.0, "warm-up": 0.5},
    )
    lines = list(banner(session))
    assert lines[0] == f"tiny on cpu: {model.num_parameters()} parameters in float32"
    assert lines[1] == "loaded in 1.5 s; context 512 tokens; temperature 0.3, top_k 20, seed 0"
    assert len(lines) == 3


def test_sampling_defaults_are_the_models_own(tmp_path: Path) -> None:
    checkpoint: Any = SimpleNamespace(directory=tmp_path)
    usual = sampling_defaults(checkpoint)
    assert usual["temperature"] == 0.7
    assert sampling_defaults(None) == usual
    stated = {"temperature": 0.6, "top_k": 20, "top_p": None, "do_sample": True, "eos_token_id": 2}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert dict(sampling_defaults(checkpoint)) == {"temperature": 0.6, "top_k": 20}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    assert sampling_defaults(checkpoint) == usual
    SamplingParams(**usual)


def test_a_chat_needs_a_chat_template() -> None:
    model: Any = ScriptedModel()
    model.tokenizer = SimpleNamespace(has_chat_template=False)
    with pytest.raises(ValueError, match="no chat template"):
        ChatSession(model, SamplingParams())


def test_run_command_tells_questions_apart() -> None:
    assert not run_command(chat_session(), "What?")
    assert run_command(chat_session(), "/clear")
