"""`dispec quantize`: GPTQ against its definition, and checkpoints that transformers computes alike."""

import json
import os
import stat
from dataclasses import replace
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dispec.engine.compression.calibration import CalibratedLayers
from dispec.engine.compression.gptq import Hessian, gptq, output_error, round_to_nearest
from dispec.engine.compression.quantize_model import quantize_model
from dispec.engine.compression.recipe import Recipe
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.text.tokenizer import Tokenizer
from dispec.layers.config import config_from_hugging_face, hugging_face_config
from dispec.layers.weights import load_weights
from dispec.ops import QuantizedTensor
from tests.checkpoints import FAMILIES, save_tiny, save_tiny_gguf, tiny_model
from tests.commands import dispec
from tests.paged_model import PagedModel
from tests.quantized_checkpoints import save_quantized, transformers_logits

CPU = torch.device("cpu")
PROMPT = list(range(7, 47))
LLAMA = {"hidden_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
RECIPE = Recipe(num_samples=24, sample_length=32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "cache"))


def correlated_inputs(columns: int, seed: int) -> Tensor:
    """Inputs of a linear layer: correlated, of different sizes, and one that is always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.rand(columns, generator=generator) ** 3
    inputs = torch.randn(1500, columns, generator=generator) @ mixing
    inputs[:, 5] = 0
    return inputs


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "columns"), [(4, 32, 96), (4, 64, 320), (8, 128, 256)])
def test_outputs_are_closer_than_those_of_rounding_to_the_nearest(bits, group_size, columns, act_order):
    inputs = correlated_inputs(columns, seed=columns)
    weight = torch.randn(48, columns, generator=torch.Generator().manual_seed(1))
    hessian = Hessian(columns, CPU)
    for part in inputs.split(400):
        hessian.add(part)
    assert torch.allclose(hessian.mean(), inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-3)
    ours = gptq(weight, hessian.mean(), bits, group_size, act_order=act_order)
    nearest = round_to_nearest(weight, bits, group_size)
    assert -(2 ** (bits - 1)) <= int(ours.codes.min()) < int(ours.codes.max()) < 2 ** (bits - 1)
    assert torch.equal(ours.scales, ours.scales.half().float())

    def error(one: QuantizedTensor) -> float:
        difference = inputs.double() @ (one.dequantize() - weight).double().T
        return float(difference.square().sum() / (inputs.double() @ weight.double().T).square().sum())

    assert error(ours) < 0.7 * error(nearest)
    assert output_error(weight, ours.dequantize(), hessian.mean()) == pytest.approx(error(ours), rel=1e-2)


def test_columns_are_corrected_as_in_the_paper():
    """Against equations 2 and 3: without blocks, the inverse Hessian without its first row and column every time."""
    columns, size = 160, 32
    inputs = correlated_inputs(columns, seed=3)
    inputs[:, 5] = inputs[:, 6]
    weight = torch.randn(8, columns, generator=torch.Generator().manual_seed(2))
    hessian = (inputs.T @ inputs / len(inputs)).double()
    found = gptq(weight, hessian.float(), 4, size, act_order=False)
    remaining, rounded = weight.double().clone(), torch.empty(8, columns, dtype=torch.double)
    inverse = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns))
    for column in range(columns):
        scale = found.scales[:, column // size].double()
        rounded[:, column] = (remaining[:, column] / scale).round().clamp(-8, 7) * scale
        error = (remaining[:, column] - rounded[:, column]) / inverse[0, 0]
        remaining[:, column:] -= error[:, None] * inverse[0]
        inverse = inverse[1:, 1:] - torch.outer(inverse[1:, 0], inverse[0, 1:]) / inverse[0, 0]
    # In float32 a value between two codes may be rounded otherwise, after which its row differs.
    same_rows = (found.dequantize() - rounded).abs().amax(dim=1) < 1e-5
    assert same_rows.sum() >= 6


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_compute_what_transformers_does(family):
    """Without rounding: the inputs of all linear layers."""
    model = tiny_model(family)
    config = config_from_hugging_face(model.config.to_dict() | {"architectures": [type(model).__name__]})
    tokens = torch.randint(0, 512, (5, 24), generator=torch.Generator().manual_seed(0))
    expected: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.register_forward_hook(lambda _, inputs, __, name=name: expected.update({name: inputs[0]}))
    model(tokens)
    tensors = model.state_dict()
    layers = CalibratedLayers(config, tensors["model.embed_tokens.weight"], tokens, CPU, batch=2)
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."

        def keep(matrices, hessian, prefix=prefix):
            for name, matrix in matrices.items():
                rows = expected.pop(f"{prefix}{name.removesuffix('.weight')}").flatten(0, 1)
                assert torch.allclose(hessian.mean(), rows.T @ rows / len(rows), rtol=1e-3, atol=1e-4)
                yield name, Exact(matrix)

        given = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        list(layers.quantize_layer(given, lambda matrices, hessian: dict(keep(matrices, hessian))))
    assert not expected


class Exact:
    """Stands for a quantised matrix without errors."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix = matrix

    def dequantize(self) -> Tensor:
        return self._matrix


def logits_of(directory, prompt: list[int] = PROMPT) -> Tensor:
    found = find_checkpoint(directory)
    weights = load_weights(found.config, found.tensors(torch.float32), torch.float32, CPU)
    (logits,) = PagedModel(weights, found.config, [prompt]).compute({0: len(prompt)})
    return logits


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen2", RECIPE),
        ("qwen3", Recipe(bits=8, act_order=False, num_samples=24, sample_length=32)),
        ("llama", Recipe("rtn", group_size=32)),
    ],
)
def test_transformers_loads_what_is_written(family, recipe, tmp_path, caplog):
    pytest.importorskip("compressed_tensors")
    caplog.set_level("INFO", "dispec")
    model = save_tiny(tmp_path / "given", family, dtype=torch.bfloat16, **(LLAMA if family == "llama" else {}))
    quantize_model(str(tmp_path / "given"), recipe, None, tmp_path / "out", CPU, show_progress=False)
    read = dict(find_checkpoint(tmp_path / "out").tensors(torch.float32, "native"))
    kinds = {tensor.kind for tensor in read.values() if isinstance(tensor, QuantizedTensor)}
    assert kinds == {f"int{recipe.bits}"}
    assert sum(isinstance(tensor, QuantizedTensor) for tensor in read.values()) == 3 * 7
    ours = logits_of(tmp_path / "out")
    assert (ours - transformers_logits(tmp_path / "out", PROMPT)).abs().max() <= 1e-3
    for name, tensor in read.items():
        if isinstance(tensor, QuantizedTensor) and recipe.method == "rtn":
            given = model.state_dict()[name].float()
            step = given.unflatten(1, (-1, 32)).abs().amax(dim=-1, keepdim=True) / 8
            difference = (tensor.dequantize() - given).unflatten(1, (-1, 32)).abs()
            assert (difference <= 1.01 * step).all()  # a whole step at 8, which has no code, half of one elsewhere
            assert (difference <= 0.51 * step).float().mean() > 0.95
    if recipe.bits == 8:
        expected = transformers_logits(model.float(), PROMPT)
        assert (ours - expected).norm() <= 0.05 * expected.norm()
    if recipe.method == "gptq":
        (line,) = [line for line in caplog.messages if "mean squared error" in line]
        error, nearest = (float(word) for word in line.split() if word[0].isdigit())
        assert error < 0.8 * nearest


def test_gptq_is_closer_to_the_model_on_its_text(tmp_path):
    model = save_tiny(tmp_path / "given", "qwen2", num_hidden_layers=1)
    text = "\n".join(topics.values())
    prompt = Tokenizer.from_directory(tmp_path / "given").encode(text[:1000])
    errors = {}
    for method in ("rtn", "gptq"):
        out = tmp_path / method
        quantize_model(
            str(tmp_path / "given"), replace(RECIPE, method=method, num_samples=96), None, out, CPU, show_progress=False
        )
        expected = transformers_logits(model, prompt)
        errors[method] = float((logits_of(out, prompt) - expected).norm() / expected.norm())
    assert errors["gptq"] < 0.9 * errors["rtn"], errors


def test_a_gguf_model_gets_a_config_and_its_tokenizer(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 5e5}
    model = tiny_model("llama", **LLAMA, rope_parameters=rope)
    save_tiny_gguf(tmp_path / "tiny.gguf", model)
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    quantize_model(str(tmp_path / "tiny.gguf"), Recipe(bits=8, sample_length=16), text, out, CPU, show_progress=False)
    found, given = find_checkpoint(out), find_checkpoint(tmp_path / "tiny.gguf")
    assert found.config == given.config
    assert found.eos_token_ids == given.eos_token_ids
    assert (out / "tokenizer.json").read_text() == (given.directory / "tokenizer.json").read_text()
    expected = transformers_logits(model, PROMPT)
    assert (logits_of(out) - expected).norm() <= 0.1 * expected.norm()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 0.7},
        None,
    ],
)
def test_a_written_config_is_read_as_the_same_model(family, rope):
    model = tiny_model(family, **({"rope_parameters": rope | {"rope_theta": 5e5}} if rope else {}))
    config = config_from_hugging_face(model.config.to_dict() | {"architectures": [type(model).__name__]})
    written = json.loads(json.dumps(hugging_face_config(config)))
    assert config_from_hugging_face(written) == config


def test_files_are_one_for_each_layer(tmp_path):
    save_tiny(tmp_path / "given", "qwen2")
    quantize_model(str(tmp_path / "given"), Recipe("rtn"), None, tmp_path / "out", CPU, show_progress=False)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 4
    layers = [{name.split(".")[2] for name in load_file(file) if ".layers." in name} for file in files]
    assert layers == [{"0"}, {"1"}, {"2"}, set()]


def test_files_have_the_mode_of_the_umask(tmp_path):
    save_tiny(tmp_path / "given", "qwen2")
    for file in (tmp_path / "given").iterdir():
        file.chmod(0o400)
    previous = os.umask(0o027)
    try:
        quantize_model(str(tmp_path / "given"), Recipe("rtn"), None, tmp_path / "out", CPU, show_progress=False)
    finally:
        os.umask(previous)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "out").iterdir()} == {0o640}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--bits", "3"], "bits is 3, must be 4 or 8"),
        (["--method", "awq"], "method is 'awq', must be one of gptq, rtn"),
        (["--group-size", "100"], "group_size is 100, must be 32, 64 or 128"),
        (["--group-size", "128"], "group_size is 128, must divide intermediate_size (96): give 32"),
        (["--calibration", "no-such-file"], "calibration is no-such-file, which cannot be read"),
        (["--sample-length", "0"], "sample_length is 0, must be at least 1"),
        (["--out", "{model}"], "must be a new or an empty directory"),
        (["--out", "{model}/config.json/out"], "which cannot be written: Not a directory"),
        (["--calibration", "{short}"], "tokens, must have at least 512: give a longer text"),
    ],
)
def test_the_command_refuses(options, told, tmp_path):
    save_tiny(tmp_path / "given", "qwen2")
    (tmp_path / "short.txt").write_text("Short.")
    names = {"model": tmp_path / "given", "short": tmp_path / "short.txt"}
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    arguments = [option.format(**names) for option in options]
    done = dispec("quantize", str(tmp_path / "given"), *out, *arguments, "--device", "cpu")
    assert done.code == 2
    assert told in done.err
    assert "Traceback" not in done.err


def test_a_quantised_model_is_refused(tmp_path):
    save_quantized(tmp_path / "given", "awq")
    with pytest.raises(ValueError, match=r"is quantised already \(awq, 4 bits, groups of 32\)"):
        quantize_model(str(tmp_path / "given"), RECIPE, None, tmp_path / "out", CPU, show_progress=False)


def test_the_command_writes_a_model(tmp_path):
    save_tiny(tmp_path / "given", "qwen2")
    out = tmp_path / "out"
    done = dispec("quantize", str(tmp_path / "given"), "--out", str(out), "--num-samples", "4", "--device", "cpu")
    assert done.code == 0, done.err
    assert f"{out}: 4 bits by gptq" in done.err
    assert find_checkpoint(out).quantized_format == "compressed-tensors, 4 bits, groups of 32"
