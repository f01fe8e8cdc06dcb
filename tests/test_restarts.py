"""When a dead engine is started again: with processes and time that the test makes up, and once for real."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from dispec.engine.process.messages import EngineInfo, Start
from dispec.serving.client import engine_supervisor
from dispec.serving.client.engine_supervisor import EngineSupervisor, RestartPolicy, State
from dispec.serving.client.errors import EngineDied
from tests.checkpoints import save_tiny
from tests.servers import PATIENCE, Server, server, wait_for

INFO = EngineInfo("m", "a", None, "d", "d", "cpu", 1, [], 1, 1, 1, 1, 1, 1, 1, False, {"load": 7.0}, 1)


class FakeProcess:
    """An engine process that does what the test says."""

    def __init__(self, start: Start, on_message: Callable, on_exit: Callable[[EngineDied], None]) -> None:
        self._on_message, self._on_exit = on_message, on_exit

    def serve(self) -> None:
        self._on_message(INFO)

    def die(self, why: str = "it was killed") -> None:
        self._on_exit(EngineDied(why))

    def send(self, message: object) -> None:
        self.die("it was told to leave")

    kill = die

    def close(self) -> None:
        pass


class World:
    """A supervisor, the processes it has started, the seconds it has slept, and a clock that only sleeping moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: RestartPolicy) -> None:
        self.processes: list[FakeProcess] = []
        self.slept: list[float] = []
        self.states: list[State] = []
        self.now = 0.0
        self.num_refused = 0  # processes that the system will not start
        monkeypatch.setattr(engine_supervisor, "EngineProcess", self._process)
        self.supervisor = EngineSupervisor(
            Start({}),
            receive=lambda message: None,
            on_state=self.states.append,
            on_death=lambda ending: None,
            restarts=policy,
            clock=lambda: self.now,
            sleep=self._sleep,
        )

    def _process(self, *arguments) -> FakeProcess:
        if self.num_refused:
            self.num_refused -= 1
            raise EngineDied("no engine process can be started (Too many open files)")
        self.processes.append(FakeProcess(*arguments))
        return self.processes[-1]

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds

    async def start(self) -> None:
        starting = asyncio.create_task(self.supervisor.start())
        await self.until_launched(1)
        self.processes[0].serve()
        await starting

    async def until_launched(self, count: int) -> None:
        await self.until(lambda: len(self.processes) == count)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):  # turns of the event loop
            if condition():
                return
            await asyncio.sleep(0)
        raise AssertionError("it never came")


def run(monkeypatch: pytest.MonkeyPatch, policy: RestartPolicy, play: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(monkeypatch, policy)
        await world.start()
        await play(world)
        await world.supervisor.stop()

    asyncio.run(main())


def test_restarts_wait_longer_each_time_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def die_again_and_again(world: World) -> None:
        for count in range(1, 8):
            world.processes[-1].die()
            await world.until_launched(count + 1)
            if count % 2:  # it may die before it serves, or after
                world.processes[-1].serve()
                await world.until(lambda: world.supervisor.state == "ready")
        assert world.slept == [0, 1, 2, 4, 8, 10, 10]
        world.processes[-1].die("the last one")
        await world.until(lambda: world.supervisor.state == "dead")
        assert len(world.processes) == 8
        assert world.states[-1] == "dead"

    run(monkeypatch, RestartPolicy(max_restarts=7, max_delay=10), die_again_and_again)


def test_an_engine_that_served_for_long_is_started_again_as_if_for_the_first_time(monkeypatch) -> None:
    async def die_rarely(world: World) -> None:
        for count in range(1, 6):
            world.now += 60
            world.processes[-1].die()
            await world.until_launched(count + 1)
            world.processes[-1].serve()
            await world.until(lambda: world.supervisor.state == "ready")
        assert world.slept == [0] * 5
        world.now += 59
        world.processes[-1].die()
        await world.until(lambda: world.supervisor.state == "dead")

    run(monkeypatch, RestartPolicy(max_restarts=1), die_rarely)


def test_a_process_that_the_system_does_not_start_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(world: World) -> None:
        world.num_refused = 2
        world.processes[0].die()
        await world.until_launched(2)
        assert world.slept == [0, 1, 2]
        assert world.supervisor.not_ready().retry_after == 7  # what the start takes
        world.processes[1].serve()
        await world.until(lambda: world.supervisor.state == "ready")

    run(monkeypatch, RestartPolicy(), refuse)


def test_clients_are_told_how_long_it_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask_while_it_waits(world: World) -> None:
        found: list[int] = []

        async def sleep(seconds: float) -> None:
            found.append(world.supervisor.not_ready().retry_after)

        world.supervisor._sleep = sleep
        for count in range(3):
            world.processes[-1].die()
            await world.until_launched(count + 2)
        assert found == [7, 8, 9]

    run(monkeypatch, RestartPolicy(), ask_while_it_waits)


def test_no_engine_is_started_again_by_a_server_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave(world: World) -> None:
        world.processes[0].die()
        await world.until(lambda: world.supervisor.state == "restarting")
        world.supervisor.drain()
        await world.until(lambda: world.supervisor.state == "dead")
        assert len(world.processes) == 1

    run(monkeypatch, RestartPolicy(), leave)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(directory, "qwen3")
    return directory


def kill_all_and_wait(running_server: Server) -> None:
    for process in running_server.engine_processes():
        process.kill()
    assert running_server.process.wait(PATIENCE) == 1
    assert "no engine is left: the server ends" in [line["message"] for line in running_server.log_lines()]


def test_a_server_whose_restarts_are_used_up_exits(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, model, max_engine_restarts=1) as running_server:
        first = running_server.engine_process()
        first.kill()
        wait_for(lambda: running_server.get("/health").status_code == 503)
        assert running_server.get("/live").status_code == 200
        wait_for(lambda: running_server.get("/health").status_code == 200)
        assert running_server.engine_process().pid != first.pid
        assert running_server.post("/v1/completions", {"prompt": "x", "max_tokens": 1}).status_code == 200
        kill_all_and_wait(running_server)


def test_a_disaggregated_server_exits_when_all_its_engines_are_dead(model: Path, tmp_path: Path) -> None:
    with server(tmp_path, model, disaggregate=True, max_engine_restarts=0) as running_server:
        assert len(running_server.engine_processes()) == 2
        kill_all_and_wait(running_server)
