"""Compiled code without its guards."""

import torch

from dispec.engine.execution.compiled_steps import compile_function, mark_dynamic, without_guards


def test_code_without_guards_computes_the_same_for_every_size() -> None:
    factor = 3.0

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * factor + x.shape[0]

    compiled = compile_function(scaled, replays=False)
    traced = torch.arange(6.0)
    mark_dynamic(traced, 0)
    compiled(traced)
    code = without_guards(compiled)
    assert code is not compiled
    del compiled  # the graph lives on
    for size in (2, 6, 17):
        assert torch.equal(code(torch.arange(float(size))), scaled(torch.arange(float(size))))


def test_a_function_with_several_graphs_keeps_its_guards() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = compile_function(doubled, replays=False)
    for dtype in (torch.float32, torch.float64):
        compiled(torch.ones(4, dtype=dtype))
    assert without_guards(compiled) is compiled


def test_a_function_that_is_not_compiled_stays_itself() -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        return x

    assert without_guards(plain) is plain
