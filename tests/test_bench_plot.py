"""The picture of `bench compare`'s and `bench throughput`'s results."""

import json
import re
from pathlib import Path

import pytest

from dispec.bench import cli
from dispec.bench.plot import read_rows


def record(concurrency: int, rates: dict[str, float | None], **fields: object) -> str:
    case = {"model": "qwen2.5-7b", "concurrency": concurrency, "prompt_tokens": 128, "output_tokens": 128}
    case |= {"shared_tokens": 0, "decode_only": False} | fields
    about = {"bench": "compare", "machine": {"device": "NVIDIA H100", "cores": 26}}
    return json.dumps(about | {"case": case, "figures": {"tokens_per_second": rates}})


BOTH = {"dispec": 1500.0, "vllm": 1000.0}


def test_whole_requests_come_first_and_the_last_line_of_a_case_counts() -> None:
    lines = [
        record(1, BOTH, decode_only=True, prompt_tokens=8192),
        record(1, BOTH, output_tokens=1, prompt_tokens=2048),
        record(32, {"dispec": 1.0, "vllm": 1.0}),
        record(32, BOTH),
        record(64, {"dispec": 1.0, "vllm": None}),
        json.dumps({"bench": "compare-starts"}),
    ]
    rows, machine = read_rows(lines)
    assert machine == "NVIDIA H100"
    assert [(row.heading, row.label) for row in rows] == [
        ("Qwen2.5-7B, 128 tokens in, 128 out", "32 requests"),
        ("Qwen2.5-7B, prefill", "2,048 tokens"),
        ("Qwen2.5-7B, decoding at a context", "1 x 8,192 tokens"),
    ]
    assert rows[0].tokens_per_second == BOTH
    with pytest.raises(ValueError, match="no line holds"):
        read_rows(lines[4:])


def test_rows_of_throughput_take_the_model_from_the_settings_and_name_the_cores() -> None:
    about = {"bench": "throughput", "machine": {"device": "AMD EPYC", "cores": 2}}
    about["settings"] = {"model": "smollm2", "concurrency": "1,8", "output_tokens": 32, "decode_only": True}
    case = {"concurrency": 8, "prompt_tokens": 4096, "output_tokens": 32}
    line = json.dumps(about | {"case": case, "figures": {"tokens_per_second": BOTH}})
    (row,), machine = read_rows([line])
    assert machine == "AMD EPYC, 2 cores"
    assert (row.heading, row.label) == ("SmolLM2-135M, decoding at a context", "8 x 4,096 tokens")
    assert row.tokens_per_second == BOTH


def test_the_picture_holds_each_rate_and_is_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results, picture = tmp_path / "results.jsonl", tmp_path / "picture.svg"
    lines = [record(1, {"new": 3.0, "old": 2.0}), record(1, {"new": 54321.0, "old": 98765.0}, output_tokens=1)]
    results.write_text("\n".join(lines) + "\n")
    drawn = []
    for _ in range(2):
        assert not cli.main(["plot", str(results), "--output", str(picture)])
        drawn.append(picture.read_bytes())
    assert drawn[0] == drawn[1]
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", drawn[0].decode())
    assert {"3", "2", "54,321", "98,765", "new", "old", "1 request", "128 tokens"} <= set(texts)
    assert cli.main(["plot", str(results), "--output", str(tmp_path / "picture.txt")]) == 2
