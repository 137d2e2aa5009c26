"""BERT's encoder as plain functions over the library's own parameters: the same sums with less around them.

Linear and LayerNorm see no padding, GELU and the residual sums are part of oneDNN's products, and attention has a mask
only where a batch has padding. Nothing is copied: the weights stay the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch.nn.functional import embedding, layer_norm, scaled_dot_product_attention
from transformers import BertModel

from workers.engines.onednn import OneDnnLinear

__all__ = ["LeanBert"]


class LeanBert:
    """Hidden states of a ``BertModel`` on a CPU in float32."""

    def __init__(self, model: Any) -> None:
        self._embeddings = model.embeddings
        self._layers = list(model.encoder.layer)
        self._heads: int = model.config.num_attention_heads
        self._hidden: int = model.config.hidden_size

    @classmethod
    def of(cls, model: Any) -> Self | None:
        """None for a model that computes anything else than the plain encoder does, or elsewhere."""
        if type(model) is not BertModel or model.training:
            return None
        config, first = model.config, model.encoder.layer[0] if len(model.encoder.layer) else None
        plain = (
            config.hidden_act == "gelu"
            and not config.is_decoder
            and not config.output_hidden_states
            and getattr(config, "position_embedding_type", None) in (None, "absolute")
        )
        # use_onednn has looked at device, type and library.
        return cls(model) if plain and first is not None and type(first.output.dense) is OneDnnLinear else None

    def __call__(self, features: Mapping[str, Any]) -> torch.Tensor:
        """Float32, shape ``(rows, longest, hidden)``, zero at padding; ``features`` as ``Engine.encode`` takes them."""
        mask: torch.Tensor = features["attention_mask"]
        states = self._embed(features["input_ids"], features.get("token_type_ids")).flatten(0, 1)
        if bool(mask.all()):
            for layer in self._layers:
                states = self._layer(layer, states, mask.shape, None, None)
            return states.view(*mask.shape, self._hidden)
        real = mask.flatten().nonzero().squeeze(1)
        states = states[real]
        attended = mask.bool()[:, None, None, :]
        for layer in self._layers:
            states = self._layer(layer, states, mask.shape, real, attended)
        return _scattered(states, real, mask.numel()).view(*mask.shape, self._hidden)

    def _embed(self, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        module = self._embeddings
        states = embedding(ids, module.word_embeddings.weight)
        type_weight = module.token_type_embeddings.weight
        states = states + (type_weight[0] if types is None else embedding(types, type_weight))
        return _normalised(states.add_(module.position_embeddings.weight[: ids.shape[1]]), module.LayerNorm)

    def _layer(
        self,
        layer: Any,
        states: torch.Tensor,
        shape: torch.Size,
        real: torch.Tensor | None,
        attended: torch.Tensor | None,
    ) -> torch.Tensor:
        """``states``: a row a real token. ``real``: their places among all tokens; None without padding."""
        own, after = layer.attention.self, layer.attention.output
        query, key, value = (self._by_head(part(states), shape, real) for part in (own.query, own.key, own.value))
        context = scaled_dot_product_attention(query, key, value, attn_mask=attended)
        context = context.transpose(1, 2).reshape(-1, self._hidden)
        if real is not None:
            context = context[real]
        states = _normalised(_sum(after.dense, context, states), after.LayerNorm)
        return _normalised(_sum(layer.output.dense, _gelu(layer.intermediate.dense, states), states),
                           layer.output.LayerNorm)  # fmt: skip

    def _by_head(self, part: torch.Tensor, shape: torch.Size, real: torch.Tensor | None) -> torch.Tensor:
        padded = part if real is None else _scattered(part, real, shape.numel())
        return padded.view(*shape, self._heads, -1).transpose(1, 2)


def _scattered(rows: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, places, rows)


def _normalised(states: torch.Tensor, norm: Any) -> torch.Tensor:
    return layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _sum(dense: Any, inputs: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, dense.weight, dense.bias, "add")
    return output


def _gelu(dense: Any, inputs: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(inputs, dense.weight, dense.bias, "gelu", [], "none")
    return output
