"""Embeddings with slots: ``y[token] = W[id] + sum of weight * scaling * B A[:, id]`` over the token's adapters."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lora_fuse.adapters.pool import EmbeddingPool
from lora_fuse.nn.linear import AdaptedModule, input_of, pair_slots, rebuildable
from lora_fuse.nn.traced import traced_routing


def _add_rows(layer: AdaptedModule, y: Tensor, ids: Tensor, scale: Tensor | float | None) -> Tensor:
    """Look A up per (token, adapter) pair, expand each by its B, and add onto the tokens' rows."""
    pool = cast(EmbeddingPool, layer.lora_pool)
    columns = pool.embedding_a
    weights: Tensor | None
    tiles: Tensor | None
    padded = True  # compiled code cannot tell
    if torch.compiler.is_compiling():
        rows, weights, segment_starts, _, _, tiles = traced_routing(layer.lora_serving, ids.unsqueeze(-1))
    else:
        routing = layer.lora_serving.routing(tuple(ids.shape), columns.device, layer.lora_path)
        if routing is None:
            return y
        rows, weights, segment_starts, tiles = routing.rows, routing.weights, routing.segment_starts, routing.tiles
        padded = routing.padded
    slots = pair_slots(segment_starts, rows)
    padding = slots >= pool.num_slots if padded else None
    if padded:
        slots = slots.clamp_max(pool.num_slots - 1)
    rank = torch.arange(pool.max_rank, device=rows.device)
    tokens = ids.reshape(-1).to(columns.device)[rows]
    # Columns beyond a slot's rank may hold an earlier tenant's numbers; the op reads only slot_rank of them.
    h = columns[tokens[:, None], slots[:, None] * pool.max_rank + rank]  # [pairs, max_rank]
    pair = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
    delta = torch.ops.lora_fuse.multi_lora(
        h, pool.pool_a, pool.pool_b, pool.slot_rank, pool.slot_scaling, pair, weights, segment_starts, None, None, tiles
    )
    if scale is not None:
        delta = delta * scale
    if padding is not None:
        delta = delta.masked_fill(padding[:, None], -0.0)  # y + -0.0 has the bits of y
    flat = y.reshape(-1, y.shape[-1])
    delta = delta.to(y.device, y.dtype)
    return flat.index_add(0, rows.to(y.device), delta).view(y.shape)


class MultiLoRAEmbedding(AdaptedModule, nn.Embedding):
    """An ``nn.Embedding`` whose tokens may each use adapters of their own. Made by ``lora_fuse.attach``."""

    lora_base = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        return _add_rows(self, nn.Embedding.forward(cast(nn.Embedding, self), input), input, None)


class WrappedEmbedding(AdaptedModule):
    """An embedding of another class, with ``embed_scale`` if it has one (the LoRA part is scaled too, as PEFT does)."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        base_forward = self.__dict__.get("lora_base_forward")
        ids = input_of(args, kwargs)
        y = super().forward(*args, **kwargs) if base_forward is None else base_forward(*args, **kwargs)
        return _add_rows(self, y, ids, getattr(self, "embed_scale", None))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuildable(type(self), super().__reduce_ex__(protocol))
