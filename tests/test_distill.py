"""A draft made from a tiny target: it loads, changes no answer, and its training can be interrupted and resumed."""

import json
import shutil

import pytest
import torch

from dispec.bench.distillation.distill import distill, frequent_tokens
from dispec.bench.distillation.recipe import Recipe
from dispec.bench.distillation.text import Text, read_prompts, read_text
from dispec.engine.loading.draft_checkpoint import save_shared_draft
from dispec.engine.options import EngineOptions
from dispec.engine.text.tokenizer import Tokenizer
from tests.checkpoints import save_tiny
from tests.small_engine import greedy, make, random_prompts

PROMPTS = ["Hello", "Who are you?", "What is the capital of France?", "Explain rain.", "Tell me a story."]
RECIPE = Recipe(layers=2, num_tokens=3000, epochs=1, batch_tokens=512, head_tokens=64, max_tokens=16)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    found = tmp_path_factory.mktemp("target")
    save_tiny(found, "qwen3")
    return found


def options(target) -> EngineOptions:
    return EngineOptions(model=str(target), device="cpu", dtype="float32", enforce_eager=True, max_num_seqs=16)


@pytest.fixture(scope="module")
def draft(target, tmp_path_factory):
    out = tmp_path_factory.mktemp("draft")
    distill(options(target), RECIPE, PROMPTS, out)
    return out


def test_a_draft_with_a_borrowed_head_changes_no_token(target, draft) -> None:
    prompts, params = random_prompts(6), greedy(24)
    expected = [completion.outputs[0].token_ids for completion in make(target).generate(prompts, params)]
    llm = make(target, speculative_model=str(draft))
    llm.engine.speculator.is_adaptive = False
    assert [completion.outputs[0].token_ids for completion in llm.generate(prompts, params)] == expected
    known = set(json.loads((draft / "draft.json").read_text())["head_tokens"])
    assert len(known) == RECIPE.head_tokens
    assert sum(record.num_draft_tokens for record in llm.engine.records) > 0


def test_a_resumed_training_ends_like_an_uninterrupted_one(target, draft, tmp_path, monkeypatch) -> None:
    from dispec.bench.distillation.distill import Training

    step, count = Training._step, 0

    def until_cut(self, batch, number):
        nonlocal count
        count += 1
        if count == 9:
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(Training, "_step", until_cut)
    with pytest.raises(KeyboardInterrupt):
        distill(options(target), RECIPE, PROMPTS, tmp_path)
    text = (tmp_path / "distill-text.jsonl").read_text()
    assert (tmp_path / "distill-state.pt").exists()
    monkeypatch.setattr(Training, "_step", step)
    distill(options(target), RECIPE, PROMPTS, tmp_path)
    assert (tmp_path / "distill-text.jsonl").read_text() == text
    states = [torch.load(place / "distill-state.pt", weights_only=True)["draft"] for place in (tmp_path, draft)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], atol=1e-4, rtol=1e-3)


def test_a_draft_of_another_target_is_refused(draft, tmp_path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(ValueError, match="shares embedding and head with the model that it was made for"):
        make(tmp_path, speculative_model=str(draft))


def test_dummy_weights_need_configurations_alone(target, tmp_path) -> None:
    bare = shutil.copytree(target, tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((bare / "config.json").read_text()) | {"num_hidden_layers": 1, "layer_types": None}
    save_shared_draft(tmp_path / "draft", config, {}, [1, 2, 3], Tokenizer.from_directory(bare))
    (tmp_path / "draft/model.safetensors").unlink()
    llm = make(bare, load_format="dummy", speculative_model=str(tmp_path / "draft"))
    assert len(llm.generate([[1, 2, 3]], greedy(8))[0].outputs[0].token_ids) == 8


def test_invalid_settings_are_refused(target, tmp_path) -> None:
    with pytest.raises(ValueError, match="layers is 3, must be between 1 and 2"):
        distill(options(target), Recipe(layers=3), PROMPTS, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="learning_rate is 2"):
        Recipe(layers=1, learning_rate=2.0)
    (tmp_path / "one").write_text("only this\n\n")
    with pytest.raises(ValueError, match="has 1 prompts"):
        read_prompts(tmp_path / "one")


def test_an_unfinished_line_is_not_read(tmp_path) -> None:
    file = tmp_path / "text"
    file.write_text("[[1, 2, 3], 1, false]\n[[1, 2")
    assert list(read_text(file)) == [Text([1, 2, 3], 1, False)]


def test_frequent_tokens_include_those_that_are_always_kept() -> None:
    text = [Text([9, 9, 9, 5, 5, 4, 3], 3, False), Text([0, 7, 7, 7, 7], 1, True)]
    assert frequent_tokens(text, 3, (1,)) == [1, 4, 5]
