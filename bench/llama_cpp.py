"""The output of llama.cpp's `llama-batched-bench`."""

import json
from typing import NamedTuple


class BatchTiming(NamedTuple):
    """Seconds of a batch: its prompts, and all decode steps after them."""

    prompt_seconds: float
    decode_seconds: float


def parse_batched_bench(text: str, concurrency: int) -> BatchTiming:
    """Return the timing of the batch of `concurrency` sequences, from `--output-format jsonl` or from the table.

    Raises ValueError if it is missing: the program silently skips batches that do not fit its context.
    """
    for line in text.splitlines():
        if line.startswith("{"):
            row = json.loads(line)
            if row["pl"] == concurrency:
                return BatchTiming(row["t_pp"], row["t_tg"])
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) == 10 and cells[2] == str(concurrency):
                return BatchTiming(float(cells[4]), float(cells[6]))
    raise ValueError(f"llama-batched-bench printed no batch of {concurrency} sequences")
