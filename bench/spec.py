"""The speed-up of speculative decoding, beside the acceptance and the costs that explain it.

    dispec bench spec --draft smollm2-draft

First each workload with and without speculation; the two take turns of a few tokens on one engine, and their answers
are compared token by token. A difference is an error on a CPU and in float32; in 16 bits on CUDA, where steps of other
sizes round differently, answers that differ are counted. Then the costs: seconds of a step that decodes, of one that
verifies, of the draft tokens. Last, with `--acceptance`, draft tokens that are accepted with a given probability: the
draft model runs for what it costs, and its tokens are replaced by the known answer's or by wrong ones. Measured
speed-ups stand beside those that follow from costs and acceptance (arXiv:2211.17192, theorem 3.8). Of shapes with
random weights, such as qwen2.5-7b with a draft of qwen2.5-0.5b, costs and simulated acceptance alone are measured.
"""

import statistics
from typing import Annotated, NamedTuple

import typer
from tqdm import tqdm

from dispec.bench.geometries import NAMES, model_config
from dispec.bench.loading import Device, Dtype, EnforceEager, Model, config_of, load, useful_kv_memory
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.spec_prompts import CHAT, COPYING, PASSAGES
from dispec.bench.speculative_run import (
    Costs,
    Run,
    SimulatedProposer,
    first_differences,
    measure_costs,
    predicted_speedup,
    separate_logits,
    take_turns,
)
from dispec.bench.weight_formats import format_options
from dispec.bench.workload import Workload, sizes
from dispec.engine.api.llm import LLM
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.speculation.ngram import NgramProposer
from dispec.engine.speculation.proposer import Proposer
from dispec.engine.speculation.speculator import Speculator

_MAX_MODEL_LEN = 1024


class Work(NamedTuple):
    """Requests of one kind. temperature 0 is greedy."""

    name: str
    prompts: list[str]
    temperature: float
    concurrency: int


class Rounds(NamedTuple):
    """The runs of each round without and with speculation.

    differences: the place of the first token that differs, of each answer with speculation that is another one.
    """

    plain: list[list[Run]]
    speculative: list[list[Run]]
    differences: list[int]

    def compare_answers(self, llm: LLM, name: str, answers: list[list[int]], others: list[list[int]]) -> None:
        """Add what differs. Raises RuntimeError if anything does where steps of all sizes round alike."""
        differences = first_differences(answers, others)
        if differences and (llm.engine.device.type == "cpu" or llm.engine.options.dtype == "float32"):
            raise RuntimeError(f"{name}: answers with speculation differ from those without")
        self.differences.extend(differences)

    def describe_differences(self) -> str:
        """Return how many answers differ, and the mean place of their first differing token."""
        if not self.differences:
            return ""
        total = sum(len(run.tokens) for runs in self.speculative for run in runs)
        return f"{len(self.differences)} of {total} from token {statistics.fmean(self.differences):.0f}"

    def speedups(self, field: str) -> list[float]:
        """Return, of each round, the seconds without speculation over those with it. field: of `Run`, in seconds."""
        return [
            sum(getattr(run, field) for run in plain) / sum(getattr(run, field) for run in speculative)
            for plain, speculative in zip(self.plain, self.speculative, strict=True)
        ]


def compare(llm: LLM, speculator: Speculator, work: Work, output_tokens: int, rounds: int) -> Rounds:
    """Run a workload without and with the speculator. Raises RuntimeError as `Rounds.compare_answers` does."""
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in work.prompts]
    found = Rounds([], [], [])
    for round_ in range(rounds + 1):
        plain_runs, speculative_runs = [], []
        for first in range(0, len(prompts), work.concurrency):
            batch = prompts[first : first + work.concurrency]
            params = [
                SamplingParams(temperature=work.temperature, max_tokens=output_tokens, seed=100 * round_ + number)
                for number in range(len(batch))
            ]
            # The order alternates: the place of a group changes its seconds by a percent.
            both = take_turns(llm, batch, params, [None, speculator] if round_ % 2 else [speculator, None])
            plain, speculative = both if round_ % 2 else reversed(both)
            found.compare_answers(llm, work.name, plain.tokens, speculative.tokens)
            plain_runs.append(plain)
            speculative_runs.append(speculative)
        if round_ > 0:  # the first round warms up, and teaches the controller the costs
            found.plain.append(plain_runs)
            found.speculative.append(speculative_runs)
    return found


def simulate(
    llm: LLM,
    proposer: Proposer | None,
    prompts: list[list[int]],
    concurrency: int,
    count: int,
    acceptance: float,
    output_tokens: int,
    rounds: int,
) -> tuple[Rounds, float]:
    """Run with `count` draft tokens that are accepted with a probability. Return the runs and the predicted speed-up.

    The prediction uses steps of the same minutes: a shared machine's speed drifts.
    """
    params = [SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)] * concurrency
    found, accepted_runs = Rounds([], [], []), []
    for round_ in range(rounds):
        plain_runs, runs = [], []
        for first in range(0, len(prompts), concurrency):
            batch = prompts[first : first + concurrency]
            answers = take_turns(llm, batch, params, [None])[0].tokens
            speculators = [
                Speculator(
                    count,
                    SimulatedProposer(proposer, probability, llm.engine.config.vocab_size, seed),
                    is_adaptive=False,
                )
                for probability, seed in ((1.0, 0), (acceptance, round_ * len(prompts) + first))
            ]
            plain, accepted, run = take_turns(llm, batch, params, [None, *speculators], answers)
            found.compare_answers(llm, f"simulated, {acceptance:g}", answers, run.tokens)
            plain_runs.append(plain)
            accepted_runs.append(accepted)
            runs.append(run)
        found.plain.append(plain_runs)
        found.speculative.append(runs)
    decode = statistics.median(run.step_seconds for runs in found.plain for run in runs)
    step = statistics.median(run.step_seconds for run in accepted_runs)
    draft = statistics.median(run.draft_seconds for run in accepted_runs)
    return found, predicted_speedup(acceptance, count, decode, step - draft, draft)


def main(
    model: Model = "smollm2",
    draft: Annotated[str | None, typer.Option(help="Draft model.", show_default="n-grams alone")] = None,
    target_format: Annotated[
        str, typer.Option(help="Of the target's weights, as in bench/weight_formats.py.", show_default="--dtype")
    ] = "",
    num_speculative_tokens: Annotated[int, typer.Option(min=1, max=15)] = 5,
    concurrency: Annotated[str, typer.Option(help="Numbers of chats at once, for the draft model.")] = "1,16",
    acceptance: Annotated[str, typer.Option(help="Simulated acceptance rates.")] = "0.5,0.7,0.9",
    output_tokens: Annotated[int, typer.Option(min=8)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure the speed-up of speculative decoding, and the acceptance and the costs behind it."""
    settings = dict(locals())
    widths = sizes(concurrency)
    columns = {
        "work": "",
        "c": "d",
        "speed-up": ".2fx",
        "of rounds": "",
        "to the end": ".2fx",
        "predicted": "",
        "draft tokens": ".2f",
        "accepted": ".0%",
        "differ": "",
    }
    report = Report("spec", settings, describe_machine(choose_device(device)), columns, output, plot)
    memory = {}
    if choose_device(device).type == "cuda":  # otherwise it takes all free memory
        # Up to three groups of sequences run in turns. A draft model's part is smaller than the target's.
        memory["kv_cache_memory"] = 2 * useful_kv_memory(config_of(model), 3 * max(widths), _MAX_MODEL_LEN, 4)
    llm = load(
        model,
        **({"dtype": dtype} | (format_options(target_format) if target_format else {})),
        device=device,
        max_num_seqs=max(widths),
        max_model_len=_MAX_MODEL_LEN,
        enforce_eager=enforce_eager,
        speculative_model=model_config(draft) if draft in NAMES else draft or "ngram",
        enable_prefix_caching=False,  # in bf16, keys of an earlier run are not those that this one would compute
        num_speculative_tokens=num_speculative_tokens,
        **memory,
    )
    assert llm.engine.speculator is not None
    draft_model = llm.engine.speculator.proposer if draft is not None else None
    chats = [CHAT[index % len(CHAT)] for index in range(max(len(CHAT), *widths))]
    copies = [form.format(passage) for form, passage in zip(COPYING, PASSAGES, strict=True)]
    works: list[tuple[Work, Proposer]] = [
        (Work("copying, n-gram", copies, 0.0, 1), NgramProposer()),
        (Work("chat, n-gram", list(CHAT), 0.0, 1), NgramProposer()),
    ]
    has_text = model not in NAMES
    if not has_text:
        works = []
        separate_logits(llm)
    elif draft_model is not None:
        for width in widths:
            several = list(CHAT) if width == 1 else chats[:width]
            works.append((Work("chat, draft", several, 0.0, width), draft_model))
            works.append((Work("chat, draft, temperature 1", several, 1.0, width), draft_model))
    for work, proposer in tqdm(works, desc="workloads", leave=False, disable=None):
        found = compare(llm, Speculator(num_speculative_tokens, proposer), work, output_tokens, rounds)
        shares = _add_row(report, work.name, work.concurrency, found)
        text = ", ".join(f"{share:.0%}" for share in shares)
        print(f"{work.name}, c={work.concurrency}: share of drafts accepted up to each position: {text}", flush=True)
    for width in widths:
        size = max(1, (len(CHAT) if has_text else 2) // width) * width
        if has_text:
            prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in chats[:size]]
        else:
            prompts = Workload(size).prompts(llm.engine.config.vocab_size)
        costs = measure_costs(llm, draft_model, prompts[:width], num_speculative_tokens)
        print(f"c={width}: a step takes {1e3 * costs.decode:.2f} ms; by draft tokens per sequence, verification takes")
        print(f"  {_milliseconds(costs.verify)} ms, the draft\n  {_milliseconds(costs.draft)} ms", flush=True)
        for rate in map(float, acceptance.split(",")):
            count = _best_count(costs, rate)
            arguments = (prompts, width, count, rate, output_tokens, rounds)
            found, predicted = simulate(llm, draft_model, *arguments)
            _add_row(report, f"simulated, {rate:g}", width, found, acceptance=rate, predicted=predicted)
    report.finish(y="speed-up", kind="bars")


def _best_count(costs: Costs, acceptance: float) -> int:
    """Return the number of draft tokens with the highest predicted speed-up."""
    return max(
        costs.verify,
        key=lambda n: predicted_speedup(acceptance, n, costs.decode, costs.verify[n], costs.draft[n]),
    )


def _add_row(
    report: Report,
    name: str,
    concurrency: int,
    found: Rounds,
    acceptance: float | None = None,
    predicted: float | None = None,
) -> list[float]:
    """Report the runs, and return the share of drafts whose first, second, … draft token was accepted."""
    runs = [run for round_ in found.speculative for run in round_]
    num_drafts = sum(run.num_drafts for run in runs)
    num_draft_tokens = sum(run.num_draft_tokens for run in runs)
    num_accepted = [sum(counts) for counts in zip(*(run.num_accepted_per_position for run in runs), strict=True)]
    shares = [count / max(1, num_drafts) for count in num_accepted]
    ratios = found.speedups("full_batch_seconds")
    speedup, to_the_end = statistics.median(ratios), statistics.median(found.speedups("seconds"))
    figures = {
        "speed_up": speedup,
        "ratios": ratios,
        "to_the_end": to_the_end,
        "accepted_per_position": shares,
        "drafts": num_drafts,
        "predicted": predicted,
        "differences": found.differences,
    }
    of_rounds = f"{min(ratios):.2f}-{max(ratios):.2f}"
    prediction = "" if predicted is None else f"{predicted:.2f}x"
    per_draft, accepted = num_draft_tokens / max(1, num_drafts), sum(num_accepted) / max(1, num_draft_tokens)
    cells = [name, concurrency, speedup, of_rounds, to_the_end, prediction, per_draft, accepted]
    cells.append(found.describe_differences())
    keys = {"work": name, "concurrency": concurrency}
    report.add(keys if acceptance is None else keys | {"acceptance": acceptance}, figures, cells)
    report.point(f"c={concurrency}", name, speedup)
    return shares


def _milliseconds(costs: dict[int, float]) -> str:
    return ", ".join(f"{count}: {1e3 * seconds:.2f}" for count, seconds in costs.items())


if __name__ == "__main__":
    typer.run(main)
