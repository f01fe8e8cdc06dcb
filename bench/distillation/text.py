"""Text to train a draft on: what the target answers, to prompts that it is given and to prompts that it makes up.

What a draft will be asked to guess is its target's own text, so that and nothing else is what it learns from (sequence
distillation, arXiv:1606.07947; for drafts arXiv:2310.08461). Prompts of the target's own come from letting it write
what stands in its chat template's place for the user (Magpie, arXiv:2406.08464).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dispec.engine.api.llm import LLM
from dispec.engine.sampling_params import SamplingParams

SEED_PROMPTS = Path(__file__).with_name("data") / "seed_prompts.txt"

_MARK = "\u2403"  # stands where the user's words go, and is in no template
_HELD_OUT = 12  # one prompt in so many is never trained on
_TEMPERATURES = (0.0, 0.7, 1.0, 1.0)  # of the first, second, ... answer to a given prompt; no more are asked for
_OWN_TEMPERATURES = (0.0, 0.7, 0.0, 1.0)  # of answers to prompts of its own, in turns: most people ask for greedy ones


class Text(NamedTuple):
    """A prompt with its answer. The answer begins at `token_ids[start]`."""

    token_ids: list[int]
    start: int
    is_held_out: bool


def read_prompts(file: Path) -> list[str]:
    """A prompt from each line that is not empty. Raises ValueError if there are fewer than two."""
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(prompts) < 2:
        raise ValueError(f"{file} has {len(prompts)} prompts, must have at least 2: some are held out")
    return prompts


def read_text(file: Path) -> Iterator[Text]:
    """What `write_text` has written so far; a line that was cut short by the end of a process is left out."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield Text(*json.loads(line))


def write_text(llm: LLM, prompts: list[str], num_tokens: int, file: Path, max_tokens: int = 256) -> None:
    """Append answers to `file` until it holds `num_tokens` tokens of answers, going on where an earlier call ended."""
    _drop_unfinished_line(file)
    known = list(read_text(file))
    written = sum(len(text.token_ids) - text.start for text in known)
    with (
        file.open("a", encoding="utf-8") as out,
        tqdm(desc="writing text", unit="tok", unit_scale=True, initial=written, total=num_tokens, disable=None) as bar,
    ):
        number = len(known)
        while written < num_tokens:
            for text in _answers(llm, prompts, number, max_tokens):
                out.write(json.dumps(text) + "\n")
                written += len(text.token_ids) - text.start
                bar.update(len(text.token_ids) - text.start)
                number += 1
            out.flush()


class _Question(NamedTuple):
    """prompt: None if the target is to make one up."""

    prompt: str | None
    temperature: float
    is_held_out: bool


def _question(number: int, prompts: list[str]) -> _Question:
    """By turns one that is given and one that is not, as long as there are given ones."""
    num_given = len(_TEMPERATURES) * len(prompts)
    if number % 2 == 0 and number // 2 < num_given:
        round_, place = divmod(number // 2, len(prompts))
        return _Question(prompts[place], _TEMPERATURES[round_], place % _HELD_OUT == 0)
    index = number // 2 if number < 2 * num_given else number - num_given
    return _Question(None, _OWN_TEMPERATURES[index % len(_OWN_TEMPERATURES)], index % (4 * _HELD_OUT + 1) == 0)


def _answers(llm: LLM, prompts: list[str], number: int, max_tokens: int) -> list[Text]:
    """Answers `number` and those after it."""
    numbers = range(number, number + 4 * llm.engine.options.max_num_seqs)
    questions = [_question(each, prompts) for each in numbers]
    own = iter(
        _own_prompts(llm, [each for each, asked in zip(numbers, questions, strict=True) if asked.prompt is None])
    )
    words = [next(own) if asked.prompt is None else asked.prompt for asked in questions]
    encoded = [llm.chat_prompt([{"role": "user", "content": text}]) for text in words]
    params = [
        SamplingParams(temperature=asked.temperature, seed=each, max_tokens=max_tokens)
        for each, asked in zip(numbers, questions, strict=True)
    ]
    completions = llm.generate(encoded, params, use_tqdm=False)
    return [
        Text(prompt + completion.token_ids, len(prompt), asked.is_held_out)
        for prompt, completion, asked in zip(encoded, completions, questions, strict=True)
    ]


def _own_prompts(llm: LLM, seeds: list[int]) -> list[str]:
    """What the target writes in the user's place."""
    tokenizer = llm.tokenizer
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}])
    opening = tokenizer.encode(rendered[: rendered.index(_MARK)], add_special_tokens=False)
    params = [SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=64, stop=("\n\n",)) for seed in seeds]
    found = llm.generate([opening] * len(seeds), params, use_tqdm=False)
    return [completion.text.strip() or "Hello!" for completion in found]


def _drop_unfinished_line(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            file.write_bytes(whole)
