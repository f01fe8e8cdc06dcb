"""Quantise one layer of a model after the other, each on what the quantised layers before it make of a text."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dispec import ops
from dispec.engine.compression.gptq import Hessian
from dispec.layers.config import ModelConfig
from dispec.layers.rope import rope_frequencies
from dispec.ops import QuantizedTensor
from dispec.ops.rotary import rope

# Quantises matrices that have the same inputs, by their names in the layer.
Quantizer = Callable[[dict[str, Tensor], Hessian], dict[str, QuantizedTensor]]


class CalibratedLayers:
    """The hidden states of a text, which are moved through a model layer by layer.

    Computed in float32, in batches of a few sequences. Two copies of the hidden states are held at most.
    """

    def __init__(
        self, config: ModelConfig, embedding: Tensor, tokens: Int[Tensor, "S L"], device: torch.device, batch: int = 8
    ) -> None:
        self._config, self._device = config, device
        self._states = [embedding[part].to(device).float() for part in tokens.split(batch)]
        positions = torch.arange(tokens.shape[1], device=device)
        frequencies = rope_frequencies(config).to(device)
        self._rotation = ops.rope_cos_sin(positions, frequencies, config.rope_attention_factor)

    def quantize_layer(self, given: dict[str, Tensor], quantize: Quantizer) -> Iterator[tuple[str, QuantizedTensor]]:
        """Yield a layer's quantised matrices by their names in it, and move the hidden states through them.

        given: the layer's tensors, as in "self_attn.q_proj.weight".
        """
        w = {name: tensor.to(self._device).float() for name, tensor in given.items()}
        norms = {name: ops.Norm(w[f"{name}.weight"], self._config.rms_norm_eps) for name in _norms(w)}

        def replace(names: tuple[str, ...], hessian: Hessian) -> Iterator[tuple[str, QuantizedTensor]]:
            for name, quantized in quantize({name: w[name] for name in names}, hessian).items():
                w[name] = quantized.dequantize()
                yield name, quantized

        def gated(x: Tensor) -> Tensor:
            x = ops.rms_norm(x, norms["post_attention_layernorm"])
            return torch.nn.functional.silu(x @ w["mlp.gate_proj.weight"].T) * (x @ w["mlp.up_proj.weight"].T)

        hessian = self._hessian(lambda x: ops.rms_norm(x, norms["input_layernorm"]))
        yield from replace(tuple(f"self_attn.{name}_proj.weight" for name in "qkv"), hessian)
        attended = [self._attention(ops.rms_norm(x, norms["input_layernorm"]), w, norms) for x in self._states]
        hessian = Hessian(attended[0].shape[-1], self._device)
        for x in attended:
            hessian.add(x)
        yield from replace(("self_attn.o_proj.weight",), hessian)
        for x in self._states:
            x += torch.nn.functional.linear(
                attended.pop(0), w["self_attn.o_proj.weight"], w.get("self_attn.o_proj.bias")
            )
        hessian = self._hessian(lambda x: ops.rms_norm(x, norms["post_attention_layernorm"]))
        yield from replace(("mlp.gate_proj.weight", "mlp.up_proj.weight"), hessian)
        hessian = self._hessian(gated)
        yield from replace(("mlp.down_proj.weight",), hessian)
        for x in self._states:
            x += gated(x) @ w["mlp.down_proj.weight"].T

    def _hessian(self, inputs: Callable[[Tensor], Tensor]) -> Hessian:
        hessian: Hessian | None = None
        for x in self._states:
            found = inputs(x)
            hessian = hessian or Hessian(found.shape[-1], self._device)
            hessian.add(found)
        assert hessian is not None
        return hessian

    def _attention(
        self, x: Float[Tensor, "S L E"], w: dict[str, Tensor], norms: dict[str, ops.Norm]
    ) -> Float[Tensor, "S L HD"]:
        heads = {}
        for name in "qkv":
            projected = torch.nn.functional.linear(
                x, w[f"self_attn.{name}_proj.weight"], w.get(f"self_attn.{name}_proj.bias")
            )
            heads[name] = projected.unflatten(-1, (-1, self._config.head_dim))
        for name in "qk":
            if (norm := norms.get(f"self_attn.{name}_norm")) is not None:
                heads[name] = ops.rms_norm(heads[name], norm)
            heads[name] = torch.stack([rope(sequence, *self._rotation) for sequence in heads[name]])
        query, key, value = (one.transpose(1, 2) for one in heads.values())
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self._config.attention_scale, enable_gqa=True
        )
        return attended.transpose(1, 2).flatten(2)


def _norms(w: dict[str, Tensor]) -> Iterator[str]:
    for name in w:
        if name.endswith("norm.weight"):
            yield name.removesuffix(".weight")
