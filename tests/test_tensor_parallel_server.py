"""A server whose engine is several processes: it answers as one, says which of them died, and leaves none behind."""

import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest
from openai import OpenAI

from tests.checkpoints import save_tiny
from tests.servers import PATIENCE, Server, server, wait_for

PROMPT = "The quick brown fox"
REASON = "rank 1 ended with status -9"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "llama", max_position_embeddings=4096)
    return directory


@pytest.fixture
def together(model: Path, tmp_path: Path) -> Iterator[Server]:
    with server(tmp_path, model, tensor_parallel_size=2) as running_server:
        yield running_server


def client_of(server: Server) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)


def answer(server: Server) -> str:
    with client_of(server) as client:
        found = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=30, temperature=0, extra_body={"ignore_eos": True}
        )
    return found.choices[0].text


def follower_of(server: Server) -> psutil.Process:
    """The process of rank 1."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    (found,) = (one for one in family if "dispec.engine.distributed.rank_worker" in one.cmdline())
    return found


def said(server: Server, text: str) -> bool:
    return any(text in line["message"] for line in server.log_lines())


@pytest.mark.slow
def test_a_rank_that_is_killed_under_way_is_named_and_started_again(
    model: Path, together: Server, tmp_path: Path
) -> None:
    with server(tmp_path, model) as one_process:
        expected = answer(one_process)
    assert answer(together) == expected
    first = follower_of(together)
    with client_of(together) as client:
        stream = iter(
            client.completions.create(
                model="tiny", prompt=PROMPT, max_tokens=3000, stream=True, extra_body={"ignore_eos": True}
            )
        )
        next(stream)
        first.kill()
        with pytest.raises(openai.APIError, match=REASON):
            list(stream)
    wait_for(lambda: together.get("/health").status_code == 200)
    assert follower_of(together).pid != first.pid
    assert answer(together) == expected


@pytest.mark.slow
def test_a_rank_that_is_killed_while_there_is_nothing_to_do_costs_no_request(together: Server) -> None:
    expected = answer(together)
    follower_of(together).kill()
    wait_for(lambda: said(together, REASON), "the reason in the log")
    wait_for(lambda: together.get("/health").status_code == 200)
    assert answer(together) == expected


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_server(together: Server, number: signal.Signals) -> None:
    answer(together)
    family = psutil.Process(together.process.pid).children(recursive=True)
    assert len(family) == 2
    together.process.send_signal(number)
    assert together.process.wait(PATIENCE) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    if number == signal.SIGKILL:
        _, left = psutil.wait_procs(family, PATIENCE)
        assert not left
    # After an orderly end no process of the server is left.
    assert not any(one.is_running() for one in family)
