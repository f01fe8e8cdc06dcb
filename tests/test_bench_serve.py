import asyncio
import json

import pytest
import typer
from typer.testing import CliRunner

from dispec.bench import cli, mixed_load, serve
from dispec.bench.openai_load import Answer, Client, Load, named_urls, run_load
from dispec.bench.serve import Objective, summarize
from tests.checkpoints import VOCAB_SIZE, save_tiny
from tests.running_server import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "llama")
    with serving(directory) as server:
        yield server


def put(url: str, load: Load, model: str = "") -> list[Answer]:
    async def run() -> list[Answer]:
        client = Client(url)
        try:
            return await run_load(client, load, model, seed=1)
        finally:
            client.close()

    return asyncio.run(run())


@pytest.mark.parametrize("fields", [{"rate": 200.0}, {"concurrency": 3}, {"concurrency": 2, "chat": True}])
def test_answers_are_timed_and_counted(server, fields) -> None:
    answers = put(server.url, Load(7, 12, 5, VOCAB_SIZE, **fields))
    assert [answer.error for answer in answers] == [None] * 7
    assert [answer.num_tokens for answer in answers] == [5] * 7
    for answer in answers:
        assert answer.arrival < answer.chunks[0] <= answer.chunks[-1] <= answer.finished


def test_no_more_than_the_concurrency_is_under_way(server) -> None:
    answers = put(server.url, Load(9, 4, 6, VOCAB_SIZE, concurrency=2))
    ends = sorted(answer.finished for answer in answers)
    starts = sorted(answer.arrival for answer in answers)
    assert all(start >= end for start, end in zip(starts[2:], ends, strict=False))


def test_errors_are_counted_and_not_fatal(server) -> None:
    refused = put(server.url, Load(3, 4, 4, VOCAB_SIZE, concurrency=3), model="another")
    assert all(answer.error is not None and answer.error.startswith("404 ") for answer in refused)
    unreachable = put("http://127.0.0.1:9", Load(2, 4, 4, VOCAB_SIZE, rate=100.0))
    summary = summarize(refused + unreachable, Objective())
    assert sum(summary["errors"].values()) == 5
    assert summary["errors"]["ConnectError"] == 2
    assert summary["output_tokens"] == summary["goodput_requests_per_second"] == 0
    assert summary["ttft"] is None


def answer_of(first: float, gap: float, num_tokens: int = 5) -> Answer:
    chunks = [10 + first + gap * index for index in range(num_tokens)]
    return Answer(arrival=10.0, chunks=chunks, finished=chunks[-1], num_tokens=num_tokens)


def test_what_a_summary_says() -> None:
    quick, slow_start, slow = answer_of(0.1, 0.1), answer_of(1.6, 0.1), answer_of(0.4, 0.4)
    summary = summarize([quick, slow_start, slow], Objective(ttft=0.5, tpot=0.2))
    assert summary["seconds"] == pytest.approx(2.0)
    assert summary["output_tokens_per_second"] == pytest.approx(7.5)
    assert summary["goodput_requests_per_second"] == pytest.approx(0.5)
    assert summary["met_objective"] == pytest.approx(1 / 3)
    assert summary["ttft"]["p50"] == pytest.approx(0.4)
    assert summary["itl"]["mean"] == pytest.approx(0.2)
    assert summary["e2e"]["p99"] == pytest.approx(2.0)


def run_command(main, arguments: str) -> str:
    app = typer.Typer()
    app.command()(main)
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code == 0, done.output
    return done.output


def test_servers_take_turns_on_the_same_prompts(server, tmp_path) -> None:
    results = tmp_path / "results.jsonl"
    arguments = f"--url one={server.url} --url other={server.url}/v1 --concurrency 1,2 --requests-per-client 3"
    arguments += f" --rounds 2 --prompt-tokens 8 --output-tokens 4 --vocab-size {VOCAB_SIZE} --output {results}"
    printed = run_command(serve.main, arguments)
    assert printed.count("one / other ") == 2
    records = [json.loads(line) for line in results.read_text().splitlines()]
    turns = [(record["case"]["concurrency"], record["case"]["server"], record["case"]["seed"]) for record in records]
    for size in (1, 2):
        assert [turn[1:] for turn in turns if turn[0] == size] == [("one", 0), ("other", 0), ("other", 1), ("one", 1)]
    for record in records:
        assert record["figures"]["requests"] == 3 * record["case"]["concurrency"]
        assert record["figures"]["errors"] == {}
        assert record["figures"]["ttft"]["p99"] > 0


def test_urls_have_names() -> None:
    assert named_urls(["http://a:1/v1"]) == {"server": "http://a:1"}
    assert named_urls(["x=http://a:1", "v-2=http://b:2/q?c=d"]) == {"x": "http://a:1", "v-2": "http://b:2/q?c=d"}
    with pytest.raises(ValueError, match="names 'server' twice"):
        named_urls(["http://a:1", "http://b:2"])


def test_streams_run_as_long_as_prompts_arrive(server, tmp_path) -> None:
    results = tmp_path / "results.jsonl"
    arguments = f"--url tiny={server.url} --num-streams 2 --output-tokens 60 --num-prompts 8 --prompt-tokens 40"
    printed = run_command(
        mixed_load.main, f"{arguments} --rate 20 --rounds 1 --vocab-size {VOCAB_SIZE} --output {results}"
    )
    assert "tiny" in printed
    (record,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert record["figures"]["errors"] == 0
    assert record["figures"]["tokens_per_second"] > 0
    assert record["figures"]["itl"]["p50"] <= record["figures"]["itl"]["p99"] <= record["figures"]["worst_gap"]


def test_only_gaps_while_prompts_are_computed_count() -> None:
    stream = Answer(arrival=0.0, chunks=[1.0, 2.0, 2.5, 4.0, 4.25, 9.0], finished=9.0, num_tokens=6)
    prompts = [Answer(at, [first], first, 4) for at, first in ((1.5, 3.0), (3.5, 4.5))]
    figures = mixed_load.Mixed([stream], prompts).summarize()
    assert figures["worst_gap"] == pytest.approx(1.5)
    assert figures["itl"]["p50"] == pytest.approx(0.5)  # of 0.25, 0.5 and 1.5
    assert figures["tokens_per_second"] == pytest.approx(4 / 3.0)
    assert figures["ttft"]["mean"] == pytest.approx(1.25)


@pytest.mark.slow
def test_the_command_appends_json_lines_and_compares_with_the_engine_alone(server, tmp_path) -> None:
    results = tmp_path / "results.jsonl"
    directory = tmp_path / "tiny"
    save_tiny(directory, "llama")
    arguments = f"--url {server.url} --concurrency 1,2 --num-requests 4 --prompt-tokens 8 --output-tokens 4 --rounds 2"
    arguments += f" --vocab-size {VOCAB_SIZE} --offline {directory} --enforce-eager --dtype float32 --output {results}"
    assert run_command(serve.main, arguments).count("served / offline ") == 2
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["case"]["concurrency"] for record in records] == [1, 1, 2, 2]
    for record in records:
        assert record["figures"]["output_tokens"] == 16
        assert record["figures"]["errors"] == {}
        assert record["figures"]["offline_tokens_per_second"] > 0
        assert "api_key" not in record["settings"]


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--rate 1 --concurrency 1",
        "--rate 1 --offline m",
        "--rate 1 --requests-per-client 2",
        "--rate 1 --url a --url b",
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments) -> None:
    assert cli.main(["serve", *arguments.split()]) == 2
