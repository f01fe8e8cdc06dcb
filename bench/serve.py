"""Latencies, throughput and goodput of servers with OpenAI's completions API under load.

    dispec serve &
    dispec bench serve --concurrency 1,8,16 --offline smollm2
    dispec bench serve --rate 2,4 --slo-ttft 0.5 --slo-tpot 0.05 --url http://127.0.0.1:8080
    dispec bench serve --concurrency 1,16,64,128 --requests-per-client 4 --rounds 2 \\
        --url dispec=http://127.0.0.1:8000 --url vllm=http://127.0.0.1:8001

Several servers get the same prompts in turns. With `--rate`, requests arrive as a Poisson process, whether or not
earlier ones have been answered; with `--concurrency`, so many run at once. `--offline` runs the same prompts through
`LLM.generate` at the same concurrency, in turns with the server, which sleeps meanwhile. The load generator takes a
share of one core, which is in the results.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import httpx
import typer
import uvloop
from tqdm import tqdm

from dispec.bench.machine import describe_machine
from dispec.bench.openai_load import Answer, Client, Load, named_urls, run_load
from dispec.bench.report import Output, Plot, Report

PERCENTILES = (50, 90, 99)
KINDS = ("ttft", "itl", "e2e")


@dataclass(frozen=True)
class Objective:
    """Limits of an answer in seconds; None is no limit."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def met_by(self, answer: Answer) -> bool:
        return all(
            limit is None or getattr(answer, name) <= limit
            for name, limit in (("ttft", self.ttft), ("tpot", self.tpot), ("e2e", self.e2e))
        )


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Return the mean and some percentiles of seconds; None without values."""
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else values * 99
    return {"mean": statistics.fmean(values)} | {f"p{share}": cuts[share - 1] for share in PERCENTILES}


def summarize(answers: list[Answer], objective: Objective) -> dict[str, Any]:
    """Return the figures of a run."""
    good = [answer for answer in answers if answer.error is None]
    seconds = max((answer.finished for answer in answers), default=0) - min(answer.arrival for answer in answers)
    tokens = sum(answer.num_tokens for answer in good)
    met = sum(objective.met_by(answer) for answer in good)
    return {
        "requests": len(answers),
        "errors": dict(Counter(answer.error for answer in answers if answer.error is not None)),
        "seconds": seconds,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
        "requests_per_second": len(good) / seconds if seconds > 0 else 0.0,
        "goodput_requests_per_second": met / seconds if seconds > 0 else 0.0,
        "met_objective": met / len(answers),
        "ttft": percentiles([answer.ttft for answer in good]),
        "itl": percentiles([gap for answer in good for gap in answer.gaps]),
        "tpot": percentiles([answer.tpot for answer in good]),
        "e2e": percentiles([answer.e2e for answer in good]),
    }


def served_model(url: str, api_key: str | None) -> str:
    """Return the first model that the server lists."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    response = httpx.get(f"{url.rstrip('/')}/v1/models", headers=headers, timeout=60)
    name: str = response.raise_for_status().json()["data"][0]["id"]
    return name


async def serve_once(url: str, api_key: str | None, model: str, load: Load, seed: int) -> tuple[list[Answer], float]:
    """Run a load after one warm-up request; return the answers and the load generator's share of a core."""
    client = Client(url, api_key)
    warm = Load(1, load.prompt_tokens, load.output_tokens, load.vocab_size, concurrency=1, chat=load.chat)
    await run_load(client, warm, model, seed=-1 - seed)
    name = f"c={load.concurrency}" if load.concurrency else f"{load.rate:g}/s"
    with tqdm(total=load.num_requests, desc=name, unit="request", leave=False, mininterval=1.0, disable=None) as bar:
        began, cpu = time.perf_counter(), time.process_time()
        answers = await run_load(client, load, model, seed, bar.update)
        share = (time.process_time() - cpu) / (time.perf_counter() - began)
    client.close()
    return answers, share


def offline_rate(model: str, options: dict[str, Any], load: Load) -> Callable[[int], float]:
    """Return a function that runs a seed's prompts through `LLM.generate` and returns output tokens per second."""
    from dispec.engine.api.llm import LLM
    from dispec.engine.sampling_params import SamplingParams  # torch: only where it is asked for

    assert load.concurrency is not None
    context = load.prompt_tokens + load.output_tokens + 16
    llm = LLM(model, max_num_seqs=load.concurrency, max_model_len=context, show_progress=True, **options)
    params = SamplingParams(temperature=0, max_tokens=load.output_tokens, ignore_eos=load.ignore_eos)
    llm.generate(load.prompts(-1)[:1], params, use_tqdm=False)

    def run(seed: int) -> float:
        start = time.perf_counter()
        outputs = llm.generate(load.prompts(seed), params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - start)

    return run


def cells(server: str, name: str, summary: dict[str, Any]) -> list[Any]:
    """Return the figures as a row of the table."""

    def milliseconds(kind: str) -> str:
        values = summary[kind]
        return "/".join(f"{1000 * values[f'p{share}']:.3g}" for share in PERCENTILES) if values else "-"

    rates = [summary["output_tokens_per_second"], summary["goodput_requests_per_second"]]
    return [server, name, *rates, *map(milliseconds, KINDS), sum(summary["errors"].values())]


def measure(
    report: Report,
    servers: Mapping[str, tuple[str, str]],
    load: Load,
    rounds: int,
    objective: Objective,
    api_key: str | None,
    offline: Callable[[int], float] | None,
) -> None:
    """Put a load on each server in turns, and add a row for each round. servers: URL and model by name."""
    size = load.concurrency or load.rate
    assert size is not None
    label = f"c={size}" if load.concurrency else f"{size:g}/s"
    served: dict[str, list[float]] = {name: [] for name in servers}
    alone: list[float] = []
    for seed in range(rounds):
        if offline is not None:
            alone.append(offline(seed))
        order = list(servers)[seed % len(servers) :] + list(servers)[: seed % len(servers)]
        for name in order:
            url, model = servers[name]
            answers, client_share = uvloop.run(serve_once(url, api_key, model, load, seed))
            summary = summarize(answers, objective) | {"client_cores": client_share}
            served[name].append(summary["output_tokens_per_second"])
            if alone:
                summary["offline_tokens_per_second"] = alone[-1]
            report.add({"server": name, "seed": seed, **asdict(load)}, summary, cells(name, label, summary))
            for error, count in summary["errors"].items():
                print(f"{name}, {label}: {count} x {error}")
    medians = {name: statistics.median(rates) for name, rates in served.items()}
    for name, rate in medians.items():
        report.point(name, float(size), rate)
    first, *others = medians
    for name in others:
        if medians[name]:
            print(f"{label}: {first} / {name} {medians[first] / medians[name]:.2f}, of medians", flush=True)
    if alone:
        median = statistics.median(alone)
        report.point("offline", float(size), median)
        print(f"{label}: offline {median:.1f} tokens/s, served / offline {medians[first] / median:.2f}, of medians")


def main(
    url: Annotated[
        list[str] | None,
        typer.Option(help="Of a server, or NAME=URL; several take turns.", show_default="http://127.0.0.1:8000"),
    ] = None,
    rate: Annotated[str | None, typer.Option(help="Requests per second, Poisson; several with commas.")] = None,
    concurrency: Annotated[str | None, typer.Option(help="Requests under way at once; several with commas.")] = None,
    num_requests: Annotated[int, typer.Option(min=1, help="Of each run.")] = 64,
    requests_per_client: Annotated[
        int | None, typer.Option(min=1, help="With --concurrency, in place of --num-requests.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    output_tokens: Annotated[int, typer.Option(min=1)] = 128,
    chat: Annotated[bool, typer.Option(help="Chat completions of words, not completions of token ids.")] = False,
    vocab_size: Annotated[int, typer.Option(min=2, help="Prompts are of token ids below this.")] = 32000,
    model: Annotated[str | None, typer.Option(help="Its name; else the first that /v1/models lists.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", show_default=False)] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of exactly --output-tokens.")] = True,
    slo_ttft: Annotated[float | None, typer.Option(help="Goodput: seconds to the first token.")] = None,
    slo_tpot: Annotated[float | None, typer.Option(help="Goodput: seconds per token after that.")] = None,
    slo_e2e: Annotated[float | None, typer.Option(help="Goodput: seconds in all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each load, other prompts in each.")] = 1,
    offline: Annotated[str | None, typer.Option(help="Model to run through LLM.generate beside.")] = None,
    dtype: Annotated[str, typer.Option(help="Of --offline.")] = "bfloat16",
    enforce_eager: Annotated[bool, typer.Option(help="Of --offline.")] = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Latencies, throughput and goodput of servers under load."""
    settings = dict(locals())
    if (rate is None) == (concurrency is None):
        raise ValueError("give either --rate or --concurrency")
    for option, value in (("--offline", offline), ("--requests-per-client", requests_per_client)):
        if value is not None and concurrency is None:
            raise ValueError(f"{option} needs --concurrency")
    urls = named_urls(url or ["http://127.0.0.1:8000"])
    objective = Objective(slo_ttft, slo_tpot, slo_e2e)
    columns = {"server": "", "load": " ", "tok/s": ".1f", "good/s": ".2f"}
    columns |= {f"{kind} p50/90/99 ms": " " for kind in KINDS} | {"errors": "d"}
    report = Report("serve", settings, describe_machine(), columns, output, plot)
    servers = {name: (address, model or served_model(address, api_key)) for name, address in urls.items()}
    for size in (rate or concurrency or "").split(","):
        load = Load(
            num_requests if requests_per_client is None else requests_per_client * int(size),
            prompt_tokens,
            output_tokens,
            vocab_size,
            rate=float(size) if rate else None,
            concurrency=None if rate else int(size),
            chat=chat,
            ignore_eos=ignore_eos,
        )
        options = {"dtype": dtype, "compile": "off" if enforce_eager else "startup"}
        peer = None if offline is None else offline_rate(offline, options, load)
        measure(report, servers, load, rounds, objective, api_key, peer)
    report.finish("requests per second" if rate else "requests under way", "output tokens/s")


if __name__ == "__main__":
    typer.run(main)
