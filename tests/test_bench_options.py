"""Options of benchmarks that cannot be honoured are refused by one sentence."""

import pytest
import torch

from dispec.bench import cli


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("disagg --device tpu", "devices are tpu and tpu, must both be one of cpu, cuda"),
        ("disagg --source-device cuda:1", "devices are cuda:1 and cpu, must both be one of cpu, cuda"),
        ("disagg --device cuda", "devices are cuda and cuda, but torch finds no CUDA device"),
        ("compare --tree now=. --suites long", "--suites has long, must be of 1.5b, 7b"),
        ("throughput --vllm-path /opt/vllm", "--vllm-path needs --peer vllm"),
    ],
)
def test_refused_options(
    arguments: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(arguments.split()) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
