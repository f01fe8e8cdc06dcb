"""What speculation is worth, and why: who guesses, how often it stands, what it costs, what follows from that.

    dispec bench spec --draft smollm2-draft

First each kind of work with and without speculation, which take turns of a few tokens on the same engine; answers are
compared token by token. Then the costs: a step that decodes, one that verifies so many guesses of each sequence, one
guess of the draft. Last, with `--acceptance`, guesses that are right with a given probability, drawn at random,
whatever the draft would have said: it runs, for what it costs, but its guesses are replaced by the known answer's
tokens, or by wrong ones. Measured speed-ups stand beside those that follow from costs and acceptance
(arXiv:2211.17192, theorem 3.8).
"""

import statistics
from collections.abc import Callable
from typing import Annotated, NamedTuple

import typer
from tqdm import tqdm

from dispec.bench.loading import Device, Dtype, EnforceEager, Model, load
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.speculative_run import Costs, Run, SimulatedDrafts, fixed, measure_costs, take_turns
from dispec.bench.workload import sizes
from dispec.engine.api.llm import LLM
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.speculation.controller import predicted_speedup
from dispec.engine.speculation.draft_model import DraftModel
from dispec.engine.speculation.speculator import Speculator

_PASSAGES = (
    "The lighthouse at Carrow Point was built in 1868 after three ships were lost in a single winter. Its lamp "
    "burned whale oil, later kerosene, and since 1931 electricity. The keeper's cottage, a low stone house with "
    "two rooms, now holds a small museum. Visitors can climb the 142 steps to the gallery, from where the islands "
    "of the bay can be seen on clear days. The fog signal, a horn driven by compressed air, was silenced in 1987 "
    "and is sounded only once a year, on the first Sunday of June.",
    "The committee met on Tuesday, 4 March, in the town hall. Present were Mr. Abbott, Ms. Chen, Dr. Okafor and "
    "Mrs. Lindqvist. The minutes of the last meeting were approved. Ms. Chen reported that the repair of the "
    "northern bridge will cost 48,500 euros, of which the county pays half. Dr. Okafor asked for a second offer. "
    "It was decided to wait for it until the end of the month. Mrs. Lindqvist presented the programme of the "
    "summer festival, which begins on 12 July with a concert in the park.",
    "To change the filter, switch the machine off and unplug it. Open the lid on the left side and pull the grey "
    "handle towards you until it clicks. Lift the old filter out and let it drip over a bowl. Rinse the holder "
    "with cold water, never with soap. Insert the new filter with the arrow pointing up, push the handle back and "
    "close the lid. Plug the machine in, hold the green button for five seconds, and run two cups of water "
    "through it before you use it again.",
)
_COPYING = (
    "Repeat the following text word for word, without any changes:\n\n{}",
    "Copy this text exactly as it is:\n\n{}",
    "Quote the following text in full, and nothing else:\n\n{}",
)
_CHAT = (
    "Explain how rain forms.",
    "Write a short story about a dog who learns to swim.",
    "What should I consider when I buy a used car?",
    "Give me five ideas for a birthday party.",
    "Describe the difference between cats and dogs as pets.",
    "How do I prepare for a long hike?",
)


class Work(NamedTuple):
    """A kind of requests. temperature 0 is greedy."""

    name: str
    prompts: list[str]
    temperature: float
    concurrency: int


def compare(
    llm: LLM, speculator: Speculator, work: Work, output_tokens: int, rounds: int
) -> tuple[list[list[Run]], list[list[Run]]]:
    """The runs of each round without and with the speculator, which take turns."""
    prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in work.prompts]
    plain_rounds, spec_rounds = [], []
    for round_ in range(rounds + 1):
        plain_runs, spec_runs = [], []
        for first in range(0, len(prompts), work.concurrency):
            batch = prompts[first : first + work.concurrency]
            params = [
                SamplingParams(temperature=work.temperature, max_tokens=output_tokens, seed=100 * round_ + number)
                for number in range(len(batch))
            ]
            # Which of two groups comes first makes a percent of difference, whatever they do.
            both = take_turns(llm, batch, params, [None, speculator] if round_ % 2 else [speculator, None])
            plain, found = both if round_ % 2 else reversed(both)
            if plain.tokens != found.tokens:
                raise RuntimeError(f"{work.name}: answers with speculation differ from those without")
            plain_runs.append(plain)
            spec_runs.append(found)
        if round_ > 0:  # the first warms up, and teaches the controller the costs
            plain_rounds.append(plain_runs)
            spec_rounds.append(spec_runs)
    return plain_rounds, spec_rounds


def _ratios(
    plain_rounds: list[list[Run]], spec_rounds: list[list[Run]], seconds: Callable[[Run], float]
) -> list[float]:
    """Of each round, what it took without over what it took with."""
    return [
        sum(map(seconds, plain)) / sum(map(seconds, spec))
        for plain, spec in zip(plain_rounds, spec_rounds, strict=True)
    ]


def _spread(ratios: list[float]) -> str:
    return f"{min(ratios):.2f}-{max(ratios):.2f}"


def _by_place(runs: list[Run], most: int) -> list[float]:
    """Share of the drafts of which the first, second, ... guess stood."""
    drafts = sum(found.drafts for found in runs)
    return [sum(found.stood[place] for found in runs) / drafts if drafts else 0.0 for place in range(most)]


def main(
    model: Model = "smollm2",
    draft: Annotated[str | None, typer.Option(help="Model that guesses.", show_default="n-grams alone")] = None,
    num_speculative_tokens: Annotated[int, typer.Option(min=1, max=15)] = 5,
    concurrency: Annotated[str, typer.Option(help="Numbers of chats at once, for the draft.")] = "1,16",
    acceptance: Annotated[str, typer.Option(help="Simulated chances of a guess.")] = "0.5,0.7,0.9",
    output_tokens: Annotated[int, typer.Option(min=8)] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """What speculation is worth, and why."""
    settings = dict(locals())
    widths = sizes(concurrency)
    columns = {
        "work": "",
        "c": "d",
        "speed-up": ".2fx",
        "of rounds": "",
        "to the end": ".2fx",
        "predicted": "",
        "guesses a draft": ".2f",
        "stood": ".0%",
    }
    report = Report("spec", settings, describe_machine(choose_device(device)), columns, output, plot)
    llm = load(
        model,
        dtype=dtype,
        device=device,
        max_num_seqs=max(widths),
        max_model_len=1024,
        enforce_eager=enforce_eager,
        speculative_model=draft or "ngram",
        enable_prefix_caching=False,  # in bf16, keys of an earlier run are not those that this one would compute
        num_speculative_tokens=num_speculative_tokens,
    )
    assert llm.engine.speculator is not None
    draft_model, most = llm.engine.speculator.draft_model, num_speculative_tokens
    chats = [_CHAT[index % len(_CHAT)] for index in range(max(len(_CHAT), *widths))]
    copies = [form.format(passage) for form, passage in zip(_COPYING, _PASSAGES, strict=True)]
    works: list[tuple[Work, DraftModel | None]] = []
    works += [(Work("copying, n-gram", copies, 0.0, 1), None), (Work("chat, n-gram", list(_CHAT), 0.0, 1), None)]
    if draft_model is not None:
        for width in widths:
            several = list(_CHAT) if width == 1 else chats[:width]
            works.append((Work("chat, draft", several, 0.0, width), draft_model))
            works.append((Work("chat, draft, temperature 1", several, 1.0, width), draft_model))
    for work, drafts in tqdm(works, desc="kinds of work", leave=False, disable=None):
        plain_rounds, spec_rounds = compare(llm, Speculator(most, drafts), work, output_tokens, rounds)
        runs = [found for round_ in spec_rounds for found in round_]
        ratios, to_the_end = (
            _ratios(plain_rounds, spec_rounds, seconds)
            for seconds in (lambda found: found.together, lambda found: found.seconds)
        )
        drafted, guesses = sum(found.drafts for found in runs), sum(found.guesses for found in runs)
        stood = sum(sum(found.stood) for found in runs)
        ratio = statistics.median(ratios)
        end = statistics.median(to_the_end)
        figures = {
            "speed_up": ratio,
            "ratios": ratios,
            "to_the_end": end,
            "stood_by_place": _by_place(runs, most),
            "drafts": drafted,
        }
        depth = guesses / drafted if drafted else 0.0
        cells = [work.name, work.concurrency, ratio, _spread(ratios), end, "", depth, stood / max(1, guesses)]
        report.add({"work": work.name, "concurrency": work.concurrency}, figures, cells)
        report.point(f"c={work.concurrency}", work.name, ratio)
        places = ", ".join(f"{share:.0%}" for share in _by_place(runs, most))
        print(f"{work.name}, c={work.concurrency}: of all drafts, so many stood to each place: {places}", flush=True)
    for width in widths:
        size = max(1, len(_CHAT) // width) * width
        prompts = [llm.chat_prompt([{"role": "user", "content": text}]) for text in chats[:size]]
        costs = measure_costs(llm, draft_model, prompts[:width], most)
        print(f"c={width}: a step takes {1e3 * costs.decode:.2f} ms; with so many guesses of each sequence, verifying")
        print(f"  {_milliseconds(costs.verify)} ms, guessing")
        print(f"  {_milliseconds(costs.draft)} ms", flush=True)
        for chance in map(float, acceptance.split(",")):
            _simulate(report, llm, draft_model, prompts, width, costs, chance, output_tokens, rounds)
    report.finish(y="speed-up", kind="bars")


def _milliseconds(costs: dict[int, float]) -> str:
    return ", ".join(f"{count}: {1e3 * seconds:.2f}" for count, seconds in costs.items())


def _simulate(
    report: Report,
    llm: LLM,
    draft_model: DraftModel | None,
    prompts: list[list[int]],
    width: int,
    costs: Costs,
    chance: float,
    output_tokens: int,
    rounds: int,
) -> None:
    """A row for guesses that are right with that chance, as many of them as the costs say is best.

    What a speed-up is predicted from are steps of the same minutes: a shared machine's speed drifts.
    """
    count = max(costs.verify, key=lambda n: predicted_speedup(chance, n, costs.decode, costs.verify[n], costs.draft[n]))
    params = [SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)] * width
    plain_rounds, spec_rounds, right_runs = [], [], []
    for round_ in range(rounds):
        plain_runs, runs = [], []
        for first in range(0, len(prompts), width):
            batch = prompts[first : first + width]

            answers = take_turns(llm, batch, params, [None])[0].tokens
            speculators = [
                fixed(count, SimulatedDrafts(draft_model, probability, llm.engine.config.vocab_size, seed))
                for probability, seed in ((1.0, 0), (chance, round_ * len(prompts) + first))
            ]
            plain, right, found = take_turns(llm, batch, params, [None, *speculators], answers)
            if not plain.tokens == right.tokens == found.tokens == answers:
                raise RuntimeError("answers with speculation differ from those without")
            plain_runs.append(plain)
            right_runs.append(right)
            runs.append(found)
        plain_rounds.append(plain_runs)
        spec_rounds.append(runs)
    ratios = _ratios(plain_rounds, spec_rounds, lambda found: found.together)
    end = statistics.median(_ratios(plain_rounds, spec_rounds, lambda found: found.seconds))
    plain_runs, runs = ([found for round_ in rounds_ for found in round_] for rounds_ in (plain_rounds, spec_rounds))
    decode, verify_and_draft, draft = (
        statistics.median(values)
        for values in (
            [found.step_seconds for found in plain_runs],
            [found.step_seconds for found in right_runs],
            [found.draft_seconds for found in right_runs],
        )
    )
    predicted = predicted_speedup(chance, count, decode, verify_and_draft - draft, draft)
    guesses, stood = sum(found.guesses for found in runs), sum(sum(found.stood) for found in runs)
    name, ratio = f"simulated, {chance:g}", statistics.median(ratios)
    figures = {"speed_up": ratio, "predicted": predicted, "ratios": ratios, "guesses": count}
    cells = [name, width, ratio, _spread(ratios), end, f"{predicted:.2f}x", float(count), stood / max(1, guesses)]
    report.add({"work": name, "concurrency": width, "acceptance": chance}, figures, cells)
    report.point(f"c={width}", name, ratio)


if __name__ == "__main__":
    typer.run(main)
