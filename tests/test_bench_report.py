"""The benchmarks' results: files, tables, plots; and the limits they are set against."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from dispec.bench import cli, limits
from dispec.bench.chart import bar_rows
from dispec.bench.geometries import model_config
from dispec.bench.latency import spread
from dispec.bench.machine import Machine, Rates
from dispec.bench.report import Report
from dispec.bench.workload import Workload, sizes
from dispec.engine.execution.kv_cache_memory import weight_bytes
from dispec.layers.config import ModelConfig
from dispec.layers.weights import dummy_weights

MACHINE = Machine("a test", 2, 2**30, None)
FIELDS = {"bench", "time", "commit", "machine", "versions", "settings", "case", "figures"}


def report(tmp_path: Path, **options) -> Report:
    settings = {"model": "m", "api_key": "secret", "path": tmp_path}
    return Report("throughput", settings, MACHINE, {"": "", "rate": ".1f", "ratio": ".2fx"}, **options)


def test_a_row_is_a_line_of_json_and_of_the_table(tmp_path, capsys) -> None:
    output = tmp_path / "results.jsonl"
    for number in range(2):  # a second run appends
        made = report(tmp_path, output=output)
        made.rates = {"bytes_per_second": 1e9}
        made.add({"row": number}, {"rate": 12.345}, ["a long name " * 20, 12.345, None])
        made.finish()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["case"] for record in records] == [{"row": 0}, {"row": 1}]
    for record in records:
        assert set(record) == FIELDS
        assert record["settings"] == {"model": "m", "path": str(tmp_path)}
        assert record["machine"]["bytes_per_second"] == 1e9
        assert {"python", "torch", "transformers"} <= set(record["versions"])
    table = capsys.readouterr().out.splitlines()
    assert table[-1] == "a long name " * 20 + "  12.3      -"  # not cut where there is no terminal


def test_infinite_figures_are_no_json(tmp_path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        report(tmp_path, output=tmp_path / "r.jsonl").add({}, {"rate": float("inf")}, ["", 1.0, 1.0])


@pytest.mark.parametrize("kind", ["lines", "bars"])
def test_a_plot_is_drawn(tmp_path, kind) -> None:
    pytest.importorskip("matplotlib")
    plot = tmp_path / "plot.png"
    made = report(tmp_path, plot=plot)
    for x in (1, 2):
        made.point("one", x if kind == "lines" else f"bar {x}", x * 2.0)
    made.finish("x", "y", kind)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_no_bar_hides_another() -> None:
    points = {"c=1": [("chat", 1.3), ("copying", 3.0)], "c=2": [("chat", 1.1)], "c=4": [("chat", 1.0), ("edit", 2.0)]}
    rows = bar_rows(points)
    assert list(rows) == ["chat", "copying", "edit"]
    assert list(rows["chat"]) == ["c=1", "c=2", "c=4"]
    places = sorted(place for bars in rows.values() for place in bars.values())
    assert len(places) == sum(map(len, points.values()))
    assert all(after - before >= 1.0 for before, after in itertools.pairwise(places))


def test_what_cannot_be_written_is_refused_before_anything_is_measured(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        report(tmp_path, output=tmp_path / "no" / "r.jsonl")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r'pip install "dispec\[bench\]"'):
        report(tmp_path, plot=tmp_path / "plot.png")


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_weights_are_those_of_the_tensors(tied) -> None:
    config = ModelConfig(
        architecture="Qwen2ForCausalLM",
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        qkv_bias=True,
        tie_embeddings=tied,
    )
    # Plain float32 matrices, where the head that is tied is the embedding itself; the rotation is no weight.
    weights = dummy_weights(config, torch.float32, torch.device("cpu"), 0)
    weights = weights._replace(rope_frequencies=weights.rope_frequencies[:0])
    assert 2 * limits.weight_bytes(config) == weight_bytes(weights)
    embedding = 0 if tied else weights.embedding.numel() * 4
    assert 2 * limits.weight_read_bytes(config) == weight_bytes(weights) - embedding


def test_limits_of_a_machine_that_only_reads_or_only_multiplies() -> None:
    config = model_config("qwen2.5-0.5b")
    read = limits.weight_read_bytes(config)
    reads = Rates(bytes_per_second=read, flop_per_second=1e30)
    assert limits.decode_step_seconds(reads, config, 1, 0) == pytest.approx(1)
    assert limits.seconds_at_best(reads, config, Workload(1, 1, 11)) == pytest.approx(10, rel=1e-2)
    multiplies = Rates(bytes_per_second=1e30, flop_per_second=read)  # a product for each of the weights' bytes
    assert limits.seconds_at_best(multiplies, config, Workload(4, 100, 11)) == pytest.approx(4 * (100 + 10))
    assert limits.seconds_at_best(multiplies, config, Workload(4, 100, 11), decode_only=True) == pytest.approx(44)


def test_prompts_share_what_they_should_and_repeat() -> None:
    workload = Workload(3, 20, 1, shared_tokens=12)
    prompts = workload.prompts(1000, seed=1)
    assert prompts == workload.prompts(1000, seed=1)
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1
    assert len({prompt[12] for prompt in prompts}) > 1
    assert prompts[0][:12] != workload.prompts(1000, seed=2)[0][:12]


@pytest.mark.parametrize("listed", ["", "1,,2", "0", "a", "-1"])
def test_lists_of_sizes_that_are_none(listed) -> None:
    with pytest.raises(ValueError, match="must be a comma-separated list"):
        sizes(listed)


def test_percentiles_of_few_values() -> None:
    assert spread([3.0]) == {"p50": 3.0, "p99": 3.0}
    assert spread([4.0, 1.0, 2.0]) == {"p50": 2.0, "p99": 4.0}


def test_every_benchmark_has_help_and_what_every_one_has(capsys) -> None:
    for name in cli.COMMANDS:
        assert not cli.main([name, "--help"])
        assert "--output" in capsys.readouterr().out, name
    cli.main([])
    listed = capsys.readouterr().out
    assert all(f"  {name} " in listed for name in cli.COMMANDS)
