"""Model configs against what transformers makes of the same files."""

import json

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dispec.layers.config import (
    ModelConfig,
    RopeScaling,
    UnsupportedModelError,
    config_from_hugging_face,
    config_warnings,
)
from dispec.layers.rope import rope_frequencies
from tests.checkpoints import FAMILIES, tiny_config

pytestmark = pytest.mark.smoke

LLAMA_OLD = {  # as transformers 4 wrote them: rope_theta and rope_scaling beside the sizes
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def written(config, architecture: str) -> dict:
    """The contents of config.json as transformers writes them next to a model."""
    return json.loads(config.to_json_string()) | {"architectures": [architecture]}


def architecture(family: str) -> str:
    return f"{family.capitalize()}ForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_and_flags_agree_with_transformers(family, tmp_path):
    config = tiny_config(family)
    (tmp_path / "config.json").write_text(json.dumps(written(config, architecture(family))))
    theirs = AutoConfig.from_pretrained(tmp_path)
    ours = config_from_hugging_face(json.loads((tmp_path / "config.json").read_text()))
    assert ours.architecture == architecture(family)
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.intermediate_size,
    )
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads, ours.head_dim) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert (ours.qkv_bias, ours.output_bias, ours.qk_norm) == (family == "qwen2", False, family == "qwen3")
    assert ours.attention_scale == pytest.approx(theirs.head_dim**-0.5)
    assert hash(ours) == hash(config_from_hugging_face(written(config, architecture(family))))


def test_llama3_scaling():
    ours = config_from_hugging_face(written(tiny_config("llama"), "LlamaForCausalLM"))
    assert ours.rope_scaling == RopeScaling(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
    )


def test_both_layouts_of_rope_settings_mean_the_same():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 1024
    old = LLAMA_OLD | {"rope_scaling": scaling}
    new = {key: value for key, value in LLAMA_OLD.items() if key != "rope_theta"}
    new |= {"rope_parameters": scaling | {"rope_theta": 500000.0}}
    assert config_from_hugging_face(old) == config_from_hugging_face(new)
    assert config_from_hugging_face(old).rope_theta == 500000.0
    older_still = LLAMA_OLD | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    assert config_from_hugging_face(older_still).rope_scaling == RopeScaling("linear", factor=2.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"factor": 4.0, "original_max_position_embeddings": 1024},
        {"factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.7},
        {"factor": 40.0, "original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 0.8},
        {"factor": 1.0, "original_max_position_embeddings": 4096},
    ],
)
def test_yarn_temperature_agrees_with_transformers(settings):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0} | settings
    theirs = tiny_config("qwen3", rope_parameters=dict(rope), max_position_embeddings=4096)
    _, temperature = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    ours = config_from_hugging_face(written(theirs, "Qwen3ForCausalLM")).rope_scaling
    assert ours is not None
    assert ours.attention_factor == pytest.approx(temperature)
    assert ours.factor == settings["factor"]


THETA = {"rope_theta": 1e6, "rope_type": "default"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def their_config(raw: dict, directory) -> PreTrainedConfig:
    (directory / "config.json").write_text(json.dumps(raw))
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "places",
    [
        {"rope_parameters": THETA, "rope_scaling": YARN},  # a model card's advice in a file of transformers 5
        {"rope_parameters": THETA, "rope_scaling": YARN | {"rope_theta": 5e5}},
        {"rope_parameters": THETA, "rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": {"type": "linear", "factor": 3.0}},
        {"rope_parameters": YARN | THETA | {"rope_type": "yarn"}, "rope_scaling": None},
        {"rope_parameters": YARN | THETA | {"rope_type": "yarn"}, "rope_scaling": {}},
        {"rope_parameters": THETA, "rope_theta": 5e5},
        {"rope_parameters": None, "rope_scaling": YARN, "rope_theta": 5e5},
        {"rope_scaling": YARN, "original_max_position_embeddings": 512},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2048}, "original_max_position_embeddings": 512},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_scaling": YARN | {"type": "linear"}},
        {"rope_scaling": YARN | {"beta_slow": 0.001}},  # stretched past the last dimension
    ],
)
def test_rotary_settings_in_two_places_turn_as_fast_as_with_transformers(family, places, tmp_path):
    sizes = {key: value for key, value in LLAMA_OLD.items() if key != "rope_theta"}
    sizes |= {"head_dim": 32, "num_key_value_heads": 2}
    raw = sizes | {"architectures": [architecture(family)], "model_type": family} | places
    theirs = their_config(raw, tmp_path)
    kind = theirs.rope_parameters["rope_type"]
    ours = config_from_hugging_face(raw)
    if kind == "default":
        assert ours.rope_scaling is None
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        return
    frequencies, temperature = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    assert torch.allclose(rope_frequencies(ours), frequencies, rtol=1e-6)
    assert ours.rope_scaling.attention_factor == pytest.approx(temperature)


def test_a_base_that_is_lost_is_told():
    raw = LLAMA_OLD | {"rope_parameters": THETA, "rope_scaling": YARN}
    (warning,) = config_warnings(raw)
    assert "rope_theta of 1000000.0" in warning
    assert "500000.0 now" in warning
    assert not list(config_warnings(raw | {"rope_theta": 1e6}))
    assert not list(config_warnings(raw | {"rope_scaling": YARN | {"rope_theta": 1e6}}))
    assert not list(config_warnings(LLAMA_OLD | {"rope_scaling": YARN}))


def test_yarn_stretches_the_context():
    """To the original length times the factor, as vLLM has it, also where the file still names the original one."""
    assert config_from_hugging_face(LLAMA_OLD | {"rope_scaling": YARN | {"factor": 16.0}}).max_position_embeddings == (
        16 * 1024
    )
    assert config_from_hugging_face(LLAMA_OLD | {"rope_scaling": YARN}).max_position_embeddings == 4096
    linear = {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    assert config_from_hugging_face(LLAMA_OLD | linear).max_position_embeddings == 4096


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [{}, {"num_key_value_heads": None}, {"hidden_size": 128, "num_attention_heads": 64}])
def test_what_a_file_leaves_out_is_what_transformers_takes(family, change, tmp_path):
    raw = {"architectures": [architecture(family)], "model_type": family} | change
    ours, theirs = config_from_hugging_face(raw), their_config(raw, tmp_path)
    assert (ours.vocab_size, ours.hidden_size, ours.intermediate_size) == (
        theirs.vocab_size,
        theirs.hidden_size,
        theirs.intermediate_size,
    )
    assert (ours.num_layers, ours.num_heads, ours.num_kv_heads) == (
        theirs.num_hidden_layers,
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.rms_norm_eps == theirs.rms_norm_eps
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.output_bias == getattr(theirs, "attention_bias", False)


def test_defaults_of_old_files():
    config = config_from_hugging_face(LLAMA_OLD)
    assert config.num_kv_heads == 4  # no grouping before num_key_value_heads existed
    assert config.head_dim == 16
    assert config.rope_scaling is None
    assert config_from_hugging_face({**LLAMA_OLD, "head_dim": None}).head_dim == 16
    assert config_from_hugging_face({**LLAMA_OLD, "attention_bias": True}).output_bias


def test_qwen2_ignores_the_window_it_does_not_use():
    raw = written(tiny_config("qwen2", sliding_window=32, use_sliding_window=False), "Qwen2ForCausalLM")
    assert config_from_hugging_face(raw).qkv_bias


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"full_attention": THETA}}, "full_attention"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_what_we_cannot_run_is_refused_by_name(change, named):
    with pytest.raises(UnsupportedModelError, match=named):
        config_from_hugging_face(LLAMA_OLD | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"num_hidden_layers": 0}, "num_layers"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_field(change, named):
    with pytest.raises(ValueError, match=named):
        config_from_hugging_face(LLAMA_OLD | change)


def test_configs_are_compared_by_value():
    one, other = config_from_hugging_face(LLAMA_OLD), config_from_hugging_face(LLAMA_OLD)
    assert one == other
    assert {one: "graph"}[other] == "graph"
    assert isinstance(one, ModelConfig)
    assert one != config_from_hugging_face(LLAMA_OLD | {"rope_theta": 1.0})
