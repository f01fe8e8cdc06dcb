"""Text to train a draft on: the target's answers to given prompts and to prompts that it generates.

A draft predicts its target's text, so it is trained on that text alone (sequence distillation, arXiv:1606.07947; for
drafts arXiv:2310.08461). The target generates prompts by continuing its chat template at the user's place (Magpie,
arXiv:2406.08464).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from dispec.engine.api.llm import LLM
from dispec.engine.sampling_params import SamplingParams

SEED_PROMPTS = Path(__file__).with_name("data") / "seed_prompts.txt"

_MARK = "\u2403"  # in the user's place; no template has it
_HELD_OUT = 12  # one prompt in 12 is never trained on
_TEMPERATURES = (0.0, 0.7, 1.0, 1.0)  # of the four answers to a given prompt
_OWN_TEMPERATURES = (0.0, 0.7, 0.0, 1.0)  # of answers to generated prompts, in turns: greedy ones are most common


class Text(NamedTuple):
    """A prompt with its answer, which begins at `token_ids[start]`."""

    token_ids: list[int]
    start: int
    is_held_out: bool


def read_prompts(file: Path) -> list[str]:
    """Return a prompt from each line that is not empty. Raises ValueError if there are fewer than two."""
    prompts = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(prompts) < 2:
        raise ValueError(f"{file} has {len(prompts)} prompts, must have at least 2: some are held out")
    return prompts


def read_text(file: Path) -> Iterator[Text]:
    """Yield the texts that `write_text` has written, without an unfinished last line."""
    if not file.exists():
        return
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield Text(*json.loads(line))


def write_text(llm: LLM, prompts: list[str], num_tokens: int, file: Path, max_tokens: int = 256) -> None:
    """Append answers to `file` until it holds `num_tokens` tokens of answers, those of earlier calls included."""
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
    """A prompt, or None to let the target generate one, with the settings of its answer."""

    prompt: str | None
    temperature: float
    is_held_out: bool


def _question(number: int, prompts: list[str]) -> _Question:
    """Return question `number`: given and generated prompts in turns, as long as there are given ones."""
    num_given = len(_TEMPERATURES) * len(prompts)
    if number % 2 == 0 and number // 2 < num_given:
        round_, place = divmod(number // 2, len(prompts))
        return _Question(prompts[place], _TEMPERATURES[round_], place % _HELD_OUT == 0)
    index = number // 2 if number < 2 * num_given else number - num_given
    return _Question(None, _OWN_TEMPERATURES[index % len(_OWN_TEMPERATURES)], index % (4 * _HELD_OUT + 1) == 0)


def _answers(llm: LLM, prompts: list[str], number: int, max_tokens: int) -> list[Text]:
    """Return the answers from `number` on, four batches of them."""
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
    outputs = llm.generate(encoded, params, use_tqdm=False)
    return [
        Text(prompt + output.outputs[0].token_ids, len(prompt), asked.is_held_out)
        for prompt, output, asked in zip(encoded, outputs, questions, strict=True)
    ]


def _own_prompts(llm: LLM, seeds: list[int]) -> list[str]:
    """Return a prompt that the target generates for each seed."""
    tokenizer = llm.tokenizer
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}])
    opening = tokenizer.encode(rendered[: rendered.index(_MARK)], add_special_tokens=False)
    params = [SamplingParams(temperature=1.0, top_p=0.95, seed=seed, max_tokens=64, stop=("\n\n",)) for seed in seeds]
    found = llm.generate([opening] * len(seeds), params, use_tqdm=False)
    return [output.outputs[0].text.strip() or "Hello!" for output in found]


def _drop_unfinished_line(file: Path) -> None:
    if file.exists():
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            file.write_bytes(whole)
