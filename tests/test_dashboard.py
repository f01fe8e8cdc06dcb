import asyncio
import gzip
import itertools
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
from litestar.testing import TestClient

from dispec.engine.process.messages import Inspection
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord
from dispec.serving.api.app import create_app
from dispec.serving.client.errors import Overloaded
from dispec.serving.client.request_stream import GenerationRequest, RequestStream, RequestTiming
from dispec.serving.client.slo import Slo
from dispec.serving.dashboard.dashboard_events import dashboard_events
from dispec.serving.dashboard.dashboard_state import STEPS, DashboardState
from dispec.serving.dashboard.engine_usage import EngineUsage, pool_of
from dispec.serving.dashboard.request_rows import MOST_ROWS
from dispec.serving.dashboard.time_buckets import RANGES
from dispec.serving.http.web_assets import plotly_script
from dispec.serving.observability.metrics import Metrics
from dispec.serving.settings import ServerSettings
from tests.checkpoints import save_tiny
from tests.engine_clients import ask, ended_request, generate, one_thread_each, running_client  # noqa: F401
from tests.running_server import PATIENCE, serving
from tests.scripted_engine import ScriptedEngine, thinking_tokenizer


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Client:
    """What the state reads of an engine client."""

    def __init__(self) -> None:
        self.observers: list[DashboardState] = []
        self.streams: list[RequestStream] = []
        self.kv_usage = 0.0

    @property
    def load(self) -> int:
        return len(self.streams)

    @property
    def num_running(self) -> int:
        return sum(stream.has_started for stream in self.streams)

    @property
    def num_waiting(self) -> int:
        return self.load - self.num_running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def live(client, clock, monkeypatch) -> DashboardState:
    monkeypatch.setattr("time.time", lambda: 1_700_000_000 + clock.now)  # whole seconds of both clocks coincide
    return DashboardState(client, clock)


def step(live: DashboardState, clock: Clock, **fields) -> None:
    usual = dict.fromkeys(StepRecord._fields, 0) | {"kind": "mixed", "num_accepted_per_position": ()}
    live.on_step(StepRecord(**usual | fields), clock.now)


def request(key: str = "0", **fields) -> RequestStream:
    usual = {
        "request_id": f"r{key}",
        "num_cached_tokens": 5,
        "num_output_tokens": 3,
        "finish_reasons": ["stop", "stop"],
        "timing": RequestTiming(990.0, 990.25, 990.75, 992.75),
        "gaps": [1.0, 1.0],
        "error": None,
    }
    return ended_request(**usual | fields, key=key)


def finish(live: DashboardState, key: str = "0", **fields) -> None:
    ended = request(key, **fields)
    if ended.timing.first_token is not None:
        live.on_first_token(ended)
    live.on_request_finished(ended)


@pytest.mark.smoke
def test_a_view_holds_whole_seconds_and_the_next_what_is_new(live, client, clock) -> None:
    views = live.views("1m")
    first = next(views)
    assert first["first"]
    assert first["points"] == []  # the current second is not over
    assert first["range"] == {"span": 60, "width": 1}
    client.streams = [request(key, timing=RequestTiming(999.0, 999.5), num_output_tokens=0, gaps=[]) for key in "01"]
    client.streams.append(request("2", timing=RequestTiming(999.0), num_output_tokens=0, gaps=[]))
    client.kv_usage = 0.25
    step(live, clock, num_tokens=40, num_prompt_tokens=30, num_cached_tokens=16, num_preempted=1, launch=0.25)
    client.streams[0].num_output_tokens = 7
    clock.now += 0.2
    step(live, clock, num_tokens=3)
    clock.now += 0.8
    second = next(views)
    assert not second["first"]
    (point,) = second["points"]
    assert point["at"] == 1_700_001_000
    assert (point["output"], point["computed"], point["cached"]) == (7, 30, 16)
    assert second["summary"]["preemptions"] == 1
    assert (second["summary"]["input"], second["summary"]["busy"]) == (46, 0.25)
    assert (point["running"], point["waiting"], point["kv_usage"]) == (2, 1, 0.25)
    assert [(entry["prefill"], entry["decode"]) for entry in second["steps"]] == [(30, 10), (0, 3)]
    third = next(views)
    assert third["points"] == third["steps"] == third["ended"] == []
    assert len(third["unfinished"]) == 3
    # A page that opens later gets the whole window.
    late = next(live.views("1m"))
    assert late["points"] == [point]
    assert late["steps"] == second["steps"]


@pytest.mark.smoke
def test_tokens_are_counted_once_while_a_request_runs_and_at_its_end(live, client, clock) -> None:
    stream = request(timing=RequestTiming(999.0, 999.5, 1000.0), num_output_tokens=4, gaps=[0.1] * 3)
    client.streams = [stream]
    for _ in range(3):
        step(live, clock)
        clock.now += 0.4
    stream.num_output_tokens, stream.gaps = 8, [0.1] * 3 + [0.2] * 3 + [0.4]
    client.streams = []
    live.on_request_finished(stream)
    assert not live._seen
    clock.now += 1
    view = next(live.views("1m"))
    assert sum(point["output"] for point in view["points"]) == 8
    assert view["summary"]["itl"] == [pytest.approx(0.2, rel=0.06), pytest.approx(0.4, rel=0.06)]


@pytest.mark.smoke
def test_the_output_rate_is_the_mean_of_ten_seconds(live, client, clock) -> None:
    for second in range(20):
        finish(live, str(second), num_output_tokens=100 if second < 10 else 30)
        clock.now += 1
    assert next(live.views("1m"))["summary"]["output"] == 30
    clock.now += 5
    assert next(live.views("1m"))["summary"]["output"] == 15


@pytest.mark.smoke
def test_seconds_without_events_keep_the_load(live, client, clock) -> None:
    client.streams = [request(timing=RequestTiming(999.0, 999.5), num_output_tokens=0, gaps=[])]
    step(live, clock, num_tokens=3)
    clock.now += 4
    points = next(live.views("1m"))["points"]
    assert [point["running"] for point in points] == [1, 1, 1, 1]
    assert [later["at"] - earlier["at"] for earlier, later in itertools.pairwise(points)] == [1, 1, 1]
    client.streams = []
    clock.now += 1
    live.on_request_finished(request())
    clock.now += 2
    assert [point["running"] for point in next(live.views("1m"))["points"]][-2:] == [1, 0]


@pytest.mark.smoke
def test_the_end_of_the_last_request_ends_the_load(live, client, clock) -> None:
    client.streams = [request(timing=RequestTiming(999.0, 999.5), num_output_tokens=0, gaps=[])]
    step(live, clock)
    client.streams = []
    live.on_request_finished(request())  # no step follows
    clock.now += 3
    step(live, clock)
    clock.now += 7
    view = next(live.views("1m"))
    assert [point["running"] for point in view["points"]][:3] == [1, 0, 0]
    assert view["summary"]["finished"] == 0.1  # of the ten seconds since the start


@pytest.mark.smoke
def test_wide_buckets_hold_peaks_and_summaries_the_current_second(live, client, clock) -> None:
    client.streams = [request(str(number), timing=RequestTiming(999.0), num_output_tokens=0) for number in range(3)]
    step(live, clock)
    client.streams = []
    clock.now += 1
    step(live, clock)
    clock.now += 30
    for name in ("10m", "1h"):
        assert next(live.views(name))["points"][0]["waiting"] == 3
    finish(live)
    for name in RANGES:
        assert next(live.views(name))["summary"]["ttft"] is not None


@pytest.mark.smoke
def test_ranges_hold_an_hour_in_bounded_memory(live, clock) -> None:
    """One token a second and one request every ten, for two hours, seen in buckets of 1, 5 and 30 seconds."""
    for second in range(7200):
        step(live, clock, num_tokens=1, num_prompt_tokens=second % 2)
        if second % 10 == 0:
            finish(live, str(second))
        clock.now += 1
    for name, (span, width) in RANGES.items():
        view = next(live.views(name))
        points = view["points"]
        assert len(points) == span // width
        assert {later["at"] - earlier["at"] for earlier, later in itertools.pairwise(points)} == {width}
        assert points[-1]["at"] + width <= view["now"] < points[-1]["at"] + 2 * width
        assert sum(point["output"] for point in points) * width == pytest.approx(3 * span / 10)
        assert sum(point["finished"] for point in points) * width == pytest.approx(span / 10)
        assert view["summary"]["finished"] == pytest.approx(0.1, rel=0.35 if name == "1m" else 0.04)
        assert len(view["steps"]) == STEPS
        assert [entry["id"] for entry in view["ended"]][-1] == "r7190"
        assert len(view["ended"]) == MOST_ROWS
        assert view["num_ended"] == 720
    clock.now += 1e6
    for name, (span, width) in RANGES.items():
        view = next(live.views(name))
        assert len(view["points"]) == span // width
        assert not any(point["output"] for point in view["points"])


@pytest.mark.smoke
def test_percentiles_are_of_the_range_and_of_the_last_seconds_in_a_point(live, clock) -> None:
    finish(live, gaps=[0.05, 0.05])
    clock.now += 1
    view = next(live.views("1m"))
    for latencies in (view["summary"], view["points"][-1]):
        assert latencies["itl"] == [pytest.approx(0.05, rel=0.06)] * 2
        assert latencies["ttft"] == [pytest.approx(0.75, rel=0.06)] * 2
        assert latencies["queue"] == [pytest.approx(0.25, rel=0.06)] * 2
        assert latencies["e2e"] == [pytest.approx(2.75, rel=0.06)] * 2
    assert view["summary"]["hit_rate"] == 0.5
    clock.now += 8
    assert next(live.views("1m"))["points"][-1]["itl"] is not None  # of the last ten seconds
    clock.now += 22
    view = next(live.views("1m"))
    assert view["points"][-1]["itl"] is None
    assert view["summary"]["ttft"] is not None
    clock.now += 60
    view = next(live.views("1m"))
    assert view["summary"]["itl"] is view["summary"]["ttft"] is view["summary"]["hit_rate"] is None
    for name in ("10m", "1h"):
        assert next(live.views(name))["summary"]["ttft"] == [pytest.approx(0.75, rel=0.06)] * 2


@pytest.mark.smoke
def test_a_requests_row(live) -> None:
    finish(live)
    finish(live, timing=RequestTiming(990.0, finished=991.0), finish_reasons=["error"], error="it was too long")
    view = next(live.views("1m"))
    done, failed = view["ended"]
    assert (done["queue"], done["prefill"], done["decode"]) == (0.25, 0.5, 2.0)
    assert (done["state"], done["reason"], done["error"], done["worker"]) == ("finished", "stop", None, None)
    assert (done["prompt"], done["cached"], done["output"]) == (10, 5, 3)
    assert view["now"] - done["arrival"] == pytest.approx(10.0)
    assert (failed["queue"], failed["prefill"], failed["decode"]) == (1.0, 0, 0)
    assert (failed["state"], failed["reason"], failed["error"]) == ("error", "error", "it was too long")
    assert (view["num_ended"], view["num_errors"]) == (2, 1)
    assert view["summary"]["errors"] == 1
    assert view["summary"]["e2e"] == [pytest.approx(2.75, rel=0.06)] * 2  # the other one never started
    finish(live, finish_reasons=["stop", "error"])  # of two choices
    assert next(live.views("1m"))["ended"][-1]["state"] == "error"


@pytest.mark.smoke
def test_a_request_that_is_shed_in_the_queue_counts_once(live) -> None:
    live.on_shed(Slo("chat", ttft=1.0))
    finish(live, timing=RequestTiming(990.0, finished=991.0), finish_reasons=["error"], error=Overloaded("it waited"))
    summary = next(live.views("1m"))["summary"]
    assert (summary["errors"], summary["refused"]) == (1, 0)


class FullEngine(ScriptedEngine):
    """Refuses requests, as if its queue were full or its model not loaded."""

    state = "ready"

    def submit(self, request: GenerationRequest) -> RequestStream:
        raise Overloaded("1 requests are waiting, which is the most")


def test_refused_requests_are_counted_and_invalid_ones_are_not() -> None:
    engine = FullEngine(thinking_tokenizer())
    live, metrics = DashboardState(engine), Metrics("tiny")
    metrics.attach(engine)
    message = {"messages": [{"role": "user", "content": "Hello"}]}
    routes = {"/v1/chat/completions": message, "/v1/completions": {"prompt": "a"}, "/v1/responses": {"input": "a"}}
    with TestClient(create_app(engine, ServerSettings(), metrics, names=["tiny"])) as http:

        def refused(status: int, **fields: Any) -> int:
            answers = [http.post(path, json=body | fields).status_code for path, body in routes.items()]
            assert answers == [status] * len(routes)
            return next(live.views("1m"))["summary"]["refused"]

        assert refused(503) == 3
        engine.state = "loading"
        assert refused(503) == 6
        engine.state = "ready"
        assert refused(400, temperature=-1) == 6
        (counted,) = re.findall(r"^dispec_requests_refused_total\{.*\} (.+)$", http.get("/metrics").text, re.MULTILINE)
        assert float(counted) == 6


@pytest.mark.smoke
def test_unfinished_requests_come_by_state_and_are_bounded(live, client) -> None:
    waiting = [request(f"w{number}", timing=RequestTiming(990.0), finish_reasons=[None]) for number in range(200)]
    prefill = request("p", timing=RequestTiming(990.0, 991.0), finish_reasons=[None])
    decode = request("d", timing=RequestTiming(990.0, 991.0, 992.0), finish_reasons=[None])
    client.streams = [*waiting[:100], decode, *waiting[100:], prefill]
    view = next(live.views("1m"))
    rows = view["unfinished"]
    assert [row["state"] for row in rows] == ["decode", "prefill", *["waiting"] * (MOST_ROWS - 2)]
    assert [row["key"] for row in rows[:4]] == ["d", "p", "w0", "w1"]
    assert view["num_unfinished"] == 202


@pytest.mark.smoke
def test_speculation_is_absent_until_there_is_some(live) -> None:
    assert next(live.views("1m"))["summary"]["speculation"] is None
    live.on_drafts(num_drafts=4, num_draft_tokens=12, accepted_per_position=[3, 2, 1])
    assert next(live.views("1m"))["summary"]["speculation"] == {"rate": 0.5, "accepted_per_draft": 1.5}


def test_events_of_a_real_engine(tmp_path, monkeypatch) -> None:
    save_tiny(tmp_path, "llama")
    monkeypatch.setattr("dispec.serving.dashboard.dashboard_events.INTERVAL", 0.01)
    monkeypatch.setattr("dispec.serving.dashboard.engine_usage.MIN_SECONDS", 0.01)

    async def run() -> None:
        async with running_client(tmp_path) as client:
            events = dashboard_events(client, DashboardState(client), EngineUsage(client), "1m")
            while (event := await anext(events))["pool"] is None:
                pass
            pool = event["pool"]
            assert pool["free"] == pool["total"] == client.info.num_blocks == event["info"]["num_blocks"]
            assert event["info"]["block_size"] == client.info.block_size
            assert event["info"]["max_model_len"] == client.info.max_model_len
            assert (event["state"], event["reason"]) == ("ready", "")
            server, engine = event["engines"]
            assert (server["pid"], engine["pid"]) == (os.getpid(), client.info.pid)
            assert engine["memory"] == pytest.approx(psutil.Process(client.info.pid).memory_info().rss, rel=0.5)

            await generate(client, list(range(64)), SamplingParams(max_tokens=3))
            while (event := await anext(events))["pool"]["cached"] == 0:
                pass
            # The last of the prompt's four blocks is full as well.
            assert event["pool"] == pool | {"cached": 4, "free": pool["total"] - 4}

            stream = ask(client, list(range(64)), SamplingParams(max_tokens=400, ignore_eos=True))
            while (event := await anext(events))["pool"]["used"] == 0 or event["unfinished"][0]["state"] != "decode":
                pass
            assert event["running"] == 1
            assert event["kv_usage"] > 0
            assert sum(event["pool"][kind] for kind in ("used", "cached", "free")) == pool["total"]
            (row,) = event["unfinished"]
            assert (row["id"], row["prompt"], row["cached"]) == ("test", 64, 63)
            stream.abort()
            while (event := await anext(events))["pool"]["used"] > 0:
                pass
            # No step reports the end of the last request.
            assert event["running"] == event["waiting"] == event["kv_usage"] == 0
            assert event["unfinished"] == []
            while not any(point["running"] == 0 for point in event["points"]):
                event = await anext(events)

            # An open page does not keep a server from shutting down.
            await client.drain()
            assert [event["state"] async for event in events] == ["draining"]

    asyncio.run(run())


def test_an_idle_engine_is_not_woken(monkeypatch) -> None:
    """The engine is asked for its counts at first, after new steps, and until it has told that it is idle."""
    asked = []

    class Idle(Client):
        state, info = "ready", SimpleNamespace(pid=os.getpid())

        async def inspect(self, *, verify: bool) -> Inspection:
            asked.append(verify)
            return Inspection(0, 0, 0, 0, 3, 100_000, None)

    async def run() -> None:
        clock = Clock()
        usage = EngineUsage(Idle(), clock)

        async def read(num_steps: int) -> list:
            clock.now += 1
            usage.rows(num_steps)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            clock.now += 1
            return usage.rows(num_steps)

        _, engine = await read(0)
        assert engine["pool"] == {"used": 0, "cached": 3, "free": 99_997, "total": 100_000}
        assert asked == [False]  # without the check of 100,000 blocks
        await read(0)
        assert asked == [False]
        await read(1)
        assert asked == [False, False]

    asyncio.run(run())


@pytest.mark.smoke
def test_a_pool_of_100_000_blocks_is_three_numbers_in_an_event(live, client) -> None:
    rows = [{"pool": {"used": 40_000, "cached": 20_000, "free": 40_000, "total": 100_000}}] * 2
    assert pool_of(rows) == {"used": 80_000, "cached": 40_000, "free": 80_000, "total": 200_000}
    assert pool_of([*rows, {"pool": None}]) is pool_of([{"name": "server"}]) is None


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
        for name in ("dashboard.js", "charts.js", "chat.js", "tables.css"):
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
