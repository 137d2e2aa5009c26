"""BERT's encoder, pooling and normalising over packed rows (see ``packing``): every tensor's shape is the shape's own.

No branch looks at a tensor's values, so that a pass can be recorded and replayed. Runs on any device in any float type;
sums that decide the answer's last digits (LayerNorm, pooling, the norm) are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from torch.nn.functional import embedding, gelu, layer_norm, linear, normalize, scaled_dot_product_attention
from transformers import BertModel

from workers.engines.packing import Shape

__all__ = ["Attention", "PackedBert", "Pooling", "by_flash", "by_padding", "finished"]

Pooling = Literal["mean", "cls"]


class _Places(NamedTuple):
    """Where the tokens of a portion belong; int64 but for ``starts``, which attention kernels want in int32."""

    shape: Shape
    #: ``(tokens,)``: text x longest + position; items x longest for tokens of no text.
    places: torch.Tensor
    #: ``(items + 1,)``, int32.
    starts: torch.Tensor
    #: ``(items,)``: tokens of each text; 0 for texts that do not exist.
    lengths: torch.Tensor


#: Queries, keys and values, each ``(tokens, heads, size)`` -> the same shape; what stands at tokens of no text is
#: arbitrary.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, _Places], torch.Tensor]


def by_padding(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: _Places) -> torch.Tensor:
    """torch's own attention over texts that are padded for it alone: any device, any float type."""
    items, longest = where.shape.items, where.shape.longest
    by_head = [_by_head(part, where) for part in (query, key, value)]
    reach = torch.arange(longest, device=query.device) < where.lengths[:, None]
    # Texts that do not exist look at nothing, which makes no numbers, at places that nobody reads.
    context = scaled_dot_product_attention(by_head[0], by_head[1], by_head[2], attn_mask=reach[:, None, None, :])
    rows = context.transpose(1, 2).reshape(items * longest, *query.shape[1:])
    return rows[where.places.clamp(max=len(rows) - 1)]


def _by_head(part: torch.Tensor, where: _Places) -> torch.Tensor:
    """``(tokens, heads, size)`` -> ``(items, heads, longest, size)``."""
    padded = _spread(part.flatten(1), where).view(where.shape.items, where.shape.longest, *part.shape[1:])
    return padded.transpose(1, 2)


def by_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, where: _Places) -> torch.Tensor:
    """FlashAttention over the packed rows: CUDA (Ampere and later), fp16 and bf16."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = where.starts, where.shape.longest
    output = varlen_attn(query, key, value, starts, starts, longest, longest)
    assert isinstance(output, torch.Tensor), "it returns more only where more is asked for"
    return output


def _spread(rows: torch.Tensor, where: _Places) -> torch.Tensor:
    """``(tokens, width)`` -> ``(items x longest, width)``, zero where no token belongs."""
    count = where.shape.items * where.shape.longest
    spread = rows.new_zeros(count + 1, rows.shape[1])
    return spread.index_copy_(0, where.places, rows)[:count]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, in the type it computes in; ``qkv``: the three in one product."""

    qkv: tuple[torch.Tensor, torch.Tensor]
    attended: tuple[torch.Tensor, torch.Tensor]
    attended_norm: tuple[torch.Tensor, torch.Tensor]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    norm: tuple[torch.Tensor, torch.Tensor]


_PLAIN: Final = {"hidden_act": "gelu", "is_decoder": False, "output_hidden_states": False}


class PackedBert:
    """A copy of a ``BertModel``'s weights, and what to do with its hidden states."""

    def __init__(self, model: Any, dtype: torch.dtype, pooling: Pooling) -> None:
        """``model``: one that ``suits``."""
        own = model.embeddings
        self._words = _copy(own.word_embeddings.weight, dtype)
        self._positions = _copy(own.position_embeddings.weight, dtype)
        self._types = _copy(own.token_type_embeddings.weight, dtype)
        self._embedded_norm = _pair(own.LayerNorm, dtype)
        self._layers = [_layer(layer, dtype) for layer in model.encoder.layer]
        self._eps: float = model.config.layer_norm_eps
        self._heads: int = model.config.num_attention_heads
        self._pooling = pooling
        self.hidden: int = model.config.hidden_size
        #: Tokens of the longest text.
        self.window: int = len(self._positions)
        self.device: torch.device = self._words.device

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether a model computes the plain encoder and nothing else."""
        if type(model) is not BertModel or model.training or not len(model.encoder.layer):
            return False
        config = model.config
        plain = all(getattr(config, name) == value for name, value in _PLAIN.items())
        return plain and getattr(config, "position_embedding_type", None) in (None, "absolute")

    @property
    def size_bytes(self) -> int:
        tensors = [self._words, self._positions, self._types, *self._embedded_norm]
        for layer in self._layers:
            for pair in (layer.qkv, layer.attended, layer.attended_norm, layer.up, layer.down, layer.norm):
                tensors += pair
        return sum(tensor.nbytes for tensor in tensors)

    def __call__(self, numbers: torch.Tensor, shape: Shape, attention: Attention) -> torch.Tensor:
        """Pooled states: float32, shape ``(items, hidden)``; arbitrary for texts that do not exist.

        ``numbers``: int64, shape ``(shape.size,)``, as ``packing.fill`` writes them, on this copy's device.
        """
        tokens = shape.tokens
        ids, types, places, starts = torch.split(numbers, [tokens, tokens, tokens, shape.items + 1])
        where = _Places(shape, places, starts.int(), starts.diff())
        states = embedding(ids, self._words) + embedding(types, self._types)
        states = states + embedding(places % shape.longest, self._positions)
        states = self._normalised(states, self._embedded_norm)
        for layer in self._layers:
            states = self._layer(layer, states, where, attention)
        return self._pooled(states, where)

    def _layer(self, layer: _Layer, states: torch.Tensor, where: _Places, attention: Attention) -> torch.Tensor:
        packed = linear(states, *layer.qkv).view(len(states), 3, self._heads, -1)
        context = attention(packed[:, 0], packed[:, 1], packed[:, 2], where).reshape(len(states), self.hidden)
        states = self._normalised(linear(context, *layer.attended) + states, layer.attended_norm)
        inner = gelu(linear(states, *layer.up))
        return self._normalised(linear(inner, *layer.down) + states, layer.norm)

    def _normalised(self, states: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return layer_norm(states, (self.hidden,), *norm, self._eps)

    def _pooled(self, states: torch.Tensor, where: _Places) -> torch.Tensor:
        if self._pooling == "cls":
            return states[where.starts[:-1].long().clamp(max=len(states) - 1)].float()
        spread = _spread(states, where).view(where.shape.items, where.shape.longest, self.hidden)
        sums = spread.sum(dim=1, dtype=torch.float32)
        return sums / where.lengths.clamp(min=1)[:, None]


def finished(vectors: torch.Tensor, dimensions: int | None, normalized: bool) -> torch.Tensor:
    """The first ``dimensions`` of each vector (None: all), scaled to length 1 where that is asked for."""
    vectors = vectors[:, :dimensions]
    return normalize(vectors, dim=-1) if normalized else vectors


def _layer(layer: Any, dtype: torch.dtype) -> _Layer:
    own, after = layer.attention.self, layer.attention.output
    parts = [_pair(part, dtype) for part in (own.query, own.key, own.value)]
    return _Layer(
        qkv=(torch.cat([weight for weight, _ in parts]), torch.cat([bias for _, bias in parts])),
        attended=_pair(after.dense, dtype),
        attended_norm=_pair(after.LayerNorm, dtype),
        up=_pair(layer.intermediate.dense, dtype),
        down=_pair(layer.output.dense, dtype),
        norm=_pair(layer.output.LayerNorm, dtype),
    )


def _pair(module: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return _copy(module.weight, dtype), _copy(module.bias, dtype)


def _copy(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.detach().to(dtype, copy=True)
