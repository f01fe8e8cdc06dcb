import asyncio
import gzip
import itertools
import json

import httpx
import pytest

from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.client.request_stream import RequestTiming
from dispec.serving.dashboard.dashboard_events import KVCacheInspector, dashboard_events
from dispec.serving.dashboard.dashboard_state import REQUESTS, SPAN, STEPS, DashboardState
from dispec.serving.http.web_assets import plotly_script
from tests.checkpoints import save_tiny
from tests.engine_clients import ask, ended_request, generate, one_thread_each, running_client, until  # noqa: F401
from tests.running_server import PATIENCE, serving


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def live(clock) -> DashboardState:
    return DashboardState(clock)


def step(live: DashboardState, clock: Clock, **fields) -> None:
    usual = dict.fromkeys(StepRecord._fields, 0) | {"kind": "mixed", "num_accepted_per_position": ()}
    live.on_step(StepRecord(**usual | fields), clock.now)


def finish(live: DashboardState, number: int = 0, **fields) -> None:
    usual = {
        "request_id": f"r{number}",
        "num_cached_tokens": 5,
        "num_output_tokens": 3,
        "finish_reasons": ("stop", "stop"),
        "timing": RequestTiming(990.0, 990.25, 990.75, 992.75),
        "gaps": [1.0, 1.0],
        "error": None,
    }
    ended = ended_request(**usual | fields)
    if ended.timing.first_token is not None:
        live.on_first_token(ended)
    live.on_request_finished(ended)


def test_a_view_holds_whole_seconds_and_the_next_what_is_new(live, clock) -> None:
    views = live.views()
    first = next(views)
    assert first["first"]
    assert first["seconds"] == []  # the current one is not over
    step(live, clock, num_tokens=40, num_prompt_tokens=30, num_cached_tokens=16, num_running=3, num_waiting=2)
    step(live, clock, num_tokens=3, num_running=3, num_waiting=1)
    clock.now += 1
    second = next(views)
    assert not second["first"]
    (point,) = second["seconds"]
    assert (point["output"], point["computed"], point["cached"]) == (13, 30, 16)
    assert (point["running"], point["waiting"]) == (3, 1)
    assert [(entry["prefill"], entry["decode"]) for entry in second["steps"]] == [(30, 10), (0, 3)]
    third = next(views)
    assert third["seconds"] == third["steps"] == third["requests"] == []
    # A page that opens later gets the whole window.
    late = next(live.views())
    assert late["seconds"] == [point]
    assert late["steps"] == second["steps"]


def test_seconds_without_events_keep_the_load(live, clock) -> None:
    step(live, clock, num_tokens=3, num_running=3, num_waiting=1)
    clock.now += 4
    points = next(live.views())["seconds"]
    assert [point["output"] for point in points] == [3, 0, 0, 0]
    assert [point["running"] for point in points] == [3, 3, 3, 3]
    assert [later["at"] - earlier["at"] for earlier, later in itertools.pairwise(points)] == [1, 1, 1]


def test_the_window_is_bounded(live, clock) -> None:
    for number in range(3 * SPAN):
        step(live, clock, num_tokens=1)
        finish(live, number)
        clock.now += 1
    view = next(live.views())
    assert len(view["seconds"]) == SPAN - 1
    assert len(view["steps"]) == STEPS
    assert [entry["id"] for entry in view["requests"]] == [f"r{3 * SPAN - REQUESTS + i}" for i in range(REQUESTS)]
    clock.now += 1e6
    view = next(live.views())
    assert len(view["seconds"]) == SPAN - 1
    assert not any(point["output"] for point in view["seconds"])


def test_percentiles_are_of_the_last_seconds(live, clock) -> None:
    for _ in range(21):
        step(live, clock, num_tokens=2)
        clock.now += 0.05
    finish(live)
    clock.now += 1
    view = next(live.views())
    assert view["gap"] == [pytest.approx(0.05, rel=0.06)] * 2
    assert view["ttft"] == [pytest.approx(0.75, rel=0.06)] * 2
    assert view["hit_rate"] == 0.5
    clock.now += 60
    view = next(live.views())
    assert view["seconds"][-1]["gap"] is None
    assert view["gap"] is view["ttft"] is None
    assert view["hit_rate"] == 0.5
    clock.now += SPAN
    assert next(live.views())["hit_rate"] is None


def test_a_requests_phases(live) -> None:
    finish(live)
    finish(live, timing=RequestTiming(990.0, finished=992.75), finish_reasons=("error",), error="it was too long")
    done, failed = next(live.views())["requests"]
    assert (done["queue"], done["prefill"], done["decode"]) == (0.25, 0.5, 2.0)
    assert (done["reason"], done["error"]) == ("stop", None)
    assert (failed["queue"], failed["prefill"], failed["decode"]) == (2.75, 0, 0)
    assert (failed["reason"], failed["error"]) == ("error", "it was too long")


def test_speculation_is_absent_until_there_is_some(live) -> None:
    assert next(live.views())["speculation"] is None
    live.on_drafts(num_drafts=4, num_draft_tokens=12, accepted_per_position=[3, 2, 1])
    assert next(live.views())["speculation"] == {"rate": 0.5, "accepted_per_draft": 1.5}


def test_events_of_a_real_engine(tmp_path, monkeypatch) -> None:
    save_tiny(tmp_path, "llama")
    monkeypatch.setattr("dispec.serving.dashboard.dashboard_events.INTERVAL", 0.01)

    async def run() -> None:
        async with running_client(tmp_path) as client:
            live = DashboardState()
            live.attach(client)
            events = dashboard_events(client, live, KVCacheInspector(client))
            while (event := await anext(events))["pool"] is None:
                pass
            pool = event["pool"]
            assert pool["free"] == pool["total"] == client.info.num_blocks
            assert pool["block_size"] == client.info.block_size
            assert event["info"]["max_model_len"] == client.info.max_model_len
            assert event["state"] == "ready"

            await generate(client, list(range(64)), SamplingParams(max_tokens=3))
            while (event := await anext(events))["pool"]["cached"] == 0:
                pass
            # The last of the prompt's four blocks is full as well.
            assert event["pool"] == pool | {"cached": 4, "free": pool["total"] - 4}

            stream = ask(client, list(range(64)), SamplingParams(max_tokens=400, ignore_eos=True))
            while (event := await anext(events))["pool"]["used"] == 0:
                pass
            assert event["running"] == 1
            assert sum(event["pool"][kind] for kind in ("used", "cached", "free")) == pool["total"]
            stream.abort()
            while (event := await anext(events))["pool"]["used"] > 0:
                pass
            # No step reports the end of the last request.
            assert event["running"] == event["waiting"] == 0
            while not any(point["running"] == 0 for point in event["seconds"]):
                event = await anext(events)

            # An open page does not keep a server from shutting down.
            await client.drain()
            assert [event["state"] async for event in events] == ["draining"]

    asyncio.run(run())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    save_tiny(directory, "llama")
    return directory


def test_the_files_of_the_page(checkpoint) -> None:
    with serving(checkpoint) as server, httpx.Client(base_url=server.url) as client:
        page = client.get("/dashboard")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert client.get("/dashboard/").text == page.text
        for name in ("dashboard.js", "charts.js", "chat.js", "stream.js", "dashboard.css", "chat.css"):
            assert client.get(f"/dashboard/{name}").status_code == 200
        for name in ("index.html", "nothing.js", "..%2Fmetrics.py", "%2e%2e/metrics.py"):
            assert client.get(f"/dashboard/{name}").status_code == 404
        script = plotly_script()
        assert script is not None
        with client.stream("GET", "/dashboard/plotly.js", headers={"Accept-Encoding": "gzip"}) as response:
            packed = b"".join(response.iter_raw())
        assert gzip.decompress(packed) == script.read_bytes()
        plain = client.get("/dashboard/plotly.js", headers={"Accept-Encoding": "identity"})
        assert plain.content == script.read_bytes()


def test_events_need_the_key_and_end_when_the_server_does(checkpoint) -> None:
    with serving(checkpoint, "--api-key", "secret") as server:
        assert httpx.get(f"{server.url}/dashboard/events").status_code == 401
        headers = {"Authorization": "Bearer secret"}
        with httpx.stream("GET", f"{server.url}/dashboard/events", headers=headers, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            event = json.loads(next(lines).removeprefix("data: "))
            assert event["first"]
            assert event["state"] == "ready"
            server.process.terminate()
            states = [json.loads(line.removeprefix("data: "))["state"] for line in lines if line]
            assert set(states) <= {"draining"}
        assert server.process.wait(PATIENCE) == 0
