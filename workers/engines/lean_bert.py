"""BERT's encoder as plain functions over the library's own parameters: the same sums with less around them.

Linear and LayerNorm see no padding, GELU and the residual sums are part of oneDNN's products, and rows of similar
lengths attend together, without a mask where they are equal. Nothing is copied: the weights stay the model's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import torch
from torch.nn.functional import embedding, layer_norm, scaled_dot_product_attention
from transformers import BertModel

from workers.engines.onednn import OneDnnLinear

__all__ = ["LeanBert", "alike"]

#: Pairs of padded tokens times hidden size that take as long as the calls of one more group.
_WASTE: Final = 4096 * 384


class LeanBert:
    """Hidden states of a ``BertModel`` on a CPU in float32. Several threads may use it at once."""

    #: Of the features; there may be more.
    reads: Final = frozenset({"input_ids", "token_type_ids", "attention_mask"})

    def __init__(self, model: Any) -> None:
        self._embeddings = model.embeddings
        self._layers = list(model.encoder.layer)
        self._heads: int = model.config.num_attention_heads
        #: Size of a token's state.
        self.hidden: int = model.config.hidden_size

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

    @property
    def pair_cost(self) -> float:
        """What attention between two tokens costs, as a part of what Linear costs for one: 2 h products of 12 h², and
        half as much again since its own are slower."""
        return 1 / (4 * self.hidden)

    def __call__(self, features: Mapping[str, Any]) -> torch.Tensor:
        """Float32, shape ``(rows, longest, hidden)``, zero at padding; ``features`` as ``Engine.encode`` takes them."""
        mask: torch.Tensor = features["attention_mask"]
        states = self._embed(features["input_ids"], features.get("token_type_ids")).flatten(0, 1)
        lengths = mask.sum(1).tolist()
        padded = min(lengths) < mask.shape[1]
        real = mask.flatten().nonzero().squeeze(1) if padded else None
        states = states if real is None else states[real]
        groups = [_Group.of(group) for group in alike(lengths, _WASTE // self.hidden)]
        for layer in self._layers:
            states = self._layer(layer, states, groups)
        states = states if real is None else _scattered(states, real, mask.numel())
        return states.view(*mask.shape, self.hidden)

    def _embed(self, ids: torch.Tensor, types: torch.Tensor | None) -> torch.Tensor:
        module = self._embeddings
        states = embedding(ids, module.word_embeddings.weight)
        type_weight = module.token_type_embeddings.weight
        states = states + (type_weight[0] if types is None else embedding(types, type_weight))
        return _normalised(states.add_(module.position_embeddings.weight[: ids.shape[1]]), module.LayerNorm)

    def _layer(self, layer: Any, states: torch.Tensor, groups: Sequence[_Group]) -> torch.Tensor:
        """``states``: a row a token, padding excluded."""
        own, after = layer.attention.self, layer.attention.output
        parts = [linear(states) for linear in (own.query, own.key, own.value)]
        sizes = [group.tokens for group in groups]
        by_group = zip(groups, *(part.split(sizes) for part in parts), strict=True)
        contexts = [self._attend(*group) for group in by_group]
        context = contexts[0] if len(contexts) == 1 else torch.cat(contexts)
        states = _normalised(_sum(after.dense, context, states), after.LayerNorm)
        return _normalised(_sum(layer.output.dense, _gelu(layer.intermediate.dense, states), states),
                           layer.output.LayerNorm)  # fmt: skip

    def _attend(self, group: _Group, *parts: torch.Tensor) -> torch.Tensor:
        """The context of a group's tokens by their queries, keys and values."""
        padded = parts if group.padding is None else [part[group.padding] for part in parts]
        shape = (group.rows, -1, self._heads, self.hidden // self._heads)
        query, key, value = (part.view(shape).transpose(1, 2) for part in padded)
        context = scaled_dot_product_attention(query, key, value, attn_mask=group.mask)
        context = context.transpose(1, 2).reshape(-1, self.hidden)
        return context if group.real is None else context[group.real]


def alike(lengths: Sequence[int], waste: float) -> list[Sequence[int]]:
    """Consecutive rows, by their lengths in tokens, in groups whose attention pads little.

    ``waste``: pairs of tokens that a group may compute in vain.
    """
    groups, first, longest, pairs = [], 0, 0, 0
    for at, length in enumerate(lengths):
        longest, pairs = max(longest, length), pairs + length * length
        if (at + 1 - first) * longest * longest - pairs > waste:
            groups.append(lengths[first:at])
            first, longest, pairs = at, length, length * length
    return [*groups, lengths[first:]]


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that attend as one padded batch."""

    rows: int
    tokens: int
    #: The token at each place of the padded rows, the row's last at padding; int64, shape ``(rows * longest,)``. None
    #: without padding, as the following.
    padding: torch.Tensor | None
    #: Where the tokens are among the padded ones; int64, shape ``(tokens,)``.
    real: torch.Tensor | None
    #: Bool, shape ``(rows, 1, 1, longest)``.
    mask: torch.Tensor | None

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Self:
        rows, longest, tokens = len(lengths), max(lengths), sum(lengths)
        if rows * longest == tokens:
            return cls(rows, tokens, None, None, None)
        sizes, places = torch.tensor(lengths)[:, None], torch.arange(longest)[None]
        padding = (sizes.cumsum(0) - sizes + places.minimum(sizes - 1)).flatten()
        mask = places < sizes
        return cls(rows, tokens, padding, mask.flatten().nonzero().squeeze(1), mask[:, None, None, :])


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
