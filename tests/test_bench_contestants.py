"""Contestants: processes that are asked for rounds, and what other programs print."""

import itertools
import json
import stat
import sys
from pathlib import Path

import pytest
import torch

from dispec import ops
from dispec.bench import ablations, cli
from dispec.bench.contestants import ContestantFailed, LlamaCpp, Worker, dispec_engine, transformers
from dispec.bench.llama_cpp import BatchTiming, parse_batched_bench
from dispec.bench.peers import choose_peers, start_vllm
from dispec.bench.rounds import take_turns
from dispec.bench.workload import Workload
from dispec.engine.options import EngineOptions
from tests.checkpoints import VOCAB_SIZE, save_tiny

# Printed by llama-batched-bench b11434 for -npp 128 -ntg 16 -npl 4 -t 2 -c 1024, as a table and as JSON lines.
TABLE = """
llama_batched_bench: n_kv_max = 1024, n_batch = 2048, n_ubatch = 512, flash_attn = -1, is_pp_shared = 0, \
is_tg_separate = 0, n_gpu_layers = -1, n_threads = 2, n_threads_batch = 2

|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |     16 |    4 |    576 |    1.396 |   366.89 |    2.271 |    28.19 |    3.666 |   157.11 |

"""
LINE = (
    '{"n_kv_max": 1024, "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1, "is_pp_shared": 0, "n_gpu_layers": -1,'
    ' "n_threads": 2, "n_threads_batch": 2, "pp": 128, "tg": 16, "pl": 4, "n_kv": 576, "t_pp": 2.438302,'
    ' "speed_pp": 209.982193, "t_tg": 16.812103, "speed_tg": 3.806781, "t": 19.250404, "speed": 29.921450}'
)

# Speaks the protocol of bench/worker.py: says it took as many seconds as there are prompts, half for decoding alone.
PEER = """
import json, sys
print(json.dumps({"ready": {"peer": "1.0"}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if len(asked["prompts"]) > 3:
        sys.exit("too many for me")
    count = 1 if len(asked["prompts"]) == 3 else asked["output_tokens"]
    seconds = len(asked["prompts"]) / (2 if asked["decode_only"] else 1)
    cached = len(asked["prompts"][0]) if asked["decode_only"] and len(asked["prompts"][0]) < 500 else 0
    answer = {"seconds": seconds, "output_tokens": [count] * len(asked["prompts"]), "cached_tokens": cached}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def peer():
    worker = Worker("peer", [sys.executable, "-c", PEER])
    yield worker
    worker.close()


def test_the_table_and_the_lines_of_llama_batched_bench() -> None:
    assert parse_batched_bench(TABLE, 4) == BatchTiming(1.396, 2.271)
    assert parse_batched_bench(f"build: 1\n{LINE}\n\n", 4) == BatchTiming(2.438302, 16.812103)


@pytest.mark.parametrize("text", [TABLE, LINE, ""])
def test_a_batch_that_was_skipped_is_an_error(text) -> None:
    with pytest.raises(ValueError, match="no batch of 8"):
        parse_batched_bench(text, 8)


def test_rounds_alternate_and_the_first_does_not_count(peer) -> None:
    other = Worker("other", [sys.executable, "-c", PEER])
    try:
        asked: list[str] = []
        for worker in (peer, other):
            run = worker.run
            worker.run = lambda *given, run=run, name=worker.name: asked.append(name) or run(*given)
        taken = take_turns([peer, other], Workload(2, 4, 3), VOCAB_SIZE, rounds=3)
    finally:
        other.close()
    assert asked == ["peer", "other"] * 4
    assert taken.seconds == {"peer": [2.0] * 3, "other": [2.0] * 3}
    assert taken.median("peer") == 2.0
    assert peer.versions == {"peer": "1.0"}
    assert peer.peak_bytes > 2**20


def test_work_that_was_not_done_as_asked_is_an_error(peer) -> None:
    with pytest.raises(ContestantFailed, match="not 2 each"):
        peer.run(Workload(3, 4, 2), [[1] * 4] * 3, False)
    assert peer.run(Workload(1, 4, 2), [[1] * 4], True) == 0.5
    with pytest.raises(ContestantFailed, match="0 of 600 prompt tokens in its cache"):
        peer.run(Workload(1, 600, 2), [[1] * 600], True)
    with pytest.raises(ContestantFailed, match="too many for me"):
        peer.run(Workload(4, 4, 2), [[1] * 4] * 4, False)


def test_a_contestant_that_does_not_start_says_why() -> None:
    with pytest.raises(ContestantFailed, match="no room"):
        Worker("peer", [sys.executable, "-c", "raise SystemExit('no room')"])


def test_llama_cpp_is_asked_for_the_workload(tmp_path: Path) -> None:
    program = tmp_path / "llama-batched-bench"
    arguments = tmp_path / "arguments"
    program.write_text(f"#!/bin/sh\necho \"$@\" >> {arguments}\necho 'version: 7 (abc)'\necho '{LINE}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    contestant = LlamaCpp(program, Path("model.gguf"), threads=3)
    assert contestant.versions == {"llama.cpp": "7 (abc)"}
    assert contestant.run(Workload(4, 128, 16), [], False) == pytest.approx(19.250405)
    assert contestant.run(Workload(4, 128, 16), [], True) == pytest.approx(16.812103)
    assert contestant.run(Workload(4, 128, 1), [], False) == pytest.approx(2.438302)
    asked = arguments.read_text().splitlines()[1]
    assert asked == "-m model.gguf --output-format jsonl -npp 128 -ntg 16 -npl 4 -c 1024 -t 3"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["vllm"], "needs --peer-python or --vllm-path"),
        (["llama.cpp"], "needs --peer-bin"),
        (["other"], "must be one of"),
    ],
)
def test_peers_that_cannot_be_had(names, said) -> None:
    with pytest.raises(ValueError, match=said):
        choose_peers(names, None, None, None, None, None)


# A package that stands in for vLLM: it writes down how it was made, and generates as many tokens as it is asked for.
VLLM_STAND_IN = """
import json, os, types
__version__ = "0.0"
class SamplingParams(types.SimpleNamespace): pass
class LLM:
    def __init__(self, **options):
        with open(os.path.join(os.path.dirname(__file__), "made.json"), "w") as file:
            json.dump({"options": options, "environment": dict(os.environ)}, file)
    def generate(self, prompts, params, use_tqdm):
        one = types.SimpleNamespace(token_ids=[0] * params.max_tokens, text="")
        return [types.SimpleNamespace(outputs=[one], num_cached_tokens=0) for _ in prompts]
"""


@pytest.fixture
def vllm_site(tmp_path: Path) -> Path:
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(VLLM_STAND_IN)
    return tmp_path / "site"


@pytest.mark.parametrize("is_cuda", [True, False])
def test_vllm_of_a_directory_of_packages_runs_a_geometry(vllm_site: Path, tmp_path: Path, is_cuda: bool) -> None:
    peers = choose_peers(["vllm"], None, None, None, None, None, vllm_site)
    worker = start_vllm(peers, "qwen2.5-0.5b", "bfloat16", is_cuda, 4, 300, tmp_path)
    try:
        assert worker.versions == {"vllm": "0.0"}
        workload = Workload(4, 8, 5)
        assert worker.run(workload, workload.prompts(1000), False) > 0
    finally:
        worker.close()
    made = json.loads((vllm_site / "vllm" / "made.json").read_text())
    options, environment = made["options"], made["environment"]
    assert (options["max_num_seqs"], options["max_model_len"], options["load_format"]) == (4, 300, "dummy")
    assert json.loads((Path(options["model"]) / "config.json").read_text())["hidden_size"] == 896
    assert environment["PYTHONPATH"] == str(vllm_site)
    # Keys and values of a token in 24 layers of two heads of 64, at two bytes.
    assert ("kv_cache_memory_bytes" in options) == is_cuda
    assert options.get("kv_cache_memory_bytes", 2 * 4 * 300 * 12288) >= 2 * 4 * 300 * 12288
    assert (environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0") == is_cuda
    assert ("VLLM_CPU_KVCACHE_SPACE" in environment) != is_cuda


def test_a_directory_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no package vllm"):
        choose_peers(["vllm"], None, None, None, None, None, tmp_path)


def test_throughput_beside_vllm(vllm_site: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny", "llama")
    output = tmp_path / "results.jsonl"
    arguments = f"--model {tmp_path / 'tiny'} --device cpu --dtype float32 --enforce-eager --peer vllm --rounds 1"
    arguments += f" --vllm-path {vllm_site} --concurrency 2 --prompt-tokens 8 --output-tokens 4 --output {output}"
    assert not cli.main(["throughput", *arguments.split()])
    (record,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert set(record["figures"]["tokens_per_second"]) == {"dispec", "vllm"}
    assert record["versions"]["vllm"] == "0.0"


def test_peers_by_default_and_none() -> None:
    assert choose_peers(None, None, None, None, None, None).names == ("transformers",)
    assert choose_peers(["none"], None, None, None, None, None).names == ()


@pytest.mark.slow
def test_ours_and_transformers_answer_as_asked(tmp_path) -> None:
    save_tiny(tmp_path, "llama")
    settings = {"model": str(tmp_path), "is_geometry": False, "dtype": "float32", "device": "cpu"}
    options = {"dtype": "float32", "device": "cpu", "enforce_eager": True, "max_num_seqs": 2, "kv_cache_memory": "8MiB"}
    started = [dispec_engine(str(tmp_path), options), transformers("transformers", settings)]
    started.append(transformers("one", settings | {"one_at_a_time": True}))
    try:
        for decode_only in (False, True):
            taken = take_turns(started, Workload(2, 40, 4), VOCAB_SIZE, rounds=1, decode_only=decode_only)
            assert set(taken.seconds) == {"dispec", "transformers", "one"}
        assert all(worker.peak_bytes > 2**20 for worker in started)
        assert json.dumps(taken.seconds)
    finally:
        for worker in started:
            worker.close()


@pytest.mark.parametrize("is_cuda", [False, True])
def test_each_row_of_the_ablations_changes_one_thing_and_the_last_but_one_is_the_engine_as_it_is(
    is_cuda,
) -> None:
    ours = [row for row in ablations.rows(is_cuda, 16) if row.options is not None]
    settings = [{**row.options, **row.environment} for row in ours]
    for before, after in itertools.pairwise(settings):
        assert len(before.items() ^ after.items()) == 2
    as_it_is: dict[str, object] = {"max_num_seqs": 16, "async_scheduling": True}  # on CUDA, without being asked
    as_it_is |= dict.fromkeys(("DISPEC_PACKED_WEIGHTS", "DISPEC_CPU_KERNELS"), "on")
    assert settings[-1]["speculative_model"] == "ngram"
    for name, value in settings[-2].items():
        assert value == (as_it_is[name] if name in as_it_is else getattr(EngineOptions(model="m"), name))


def test_weights_can_be_left_unpacked(monkeypatch) -> None:
    weight = torch.zeros(64, 32, dtype=torch.bfloat16)
    monkeypatch.setenv("DISPEC_PACKED_WEIGHTS", "off")
    assert ops.pack(weight) is weight
