"""What a LoRA adapter is: per-module factors, module copies that ride along, and the config they came with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

LayerKind = Literal["linear", "conv2d", "embedding"]


@dataclass(frozen=True)
class LoraLayer:
    """One module's factors; ``delta = scaling * lora_b @ lora_a``.

    Args:
        lora_a: ``[rank, in_features]``; conv2d ``[rank, in_channels, kh, kw]``; embedding ``[rank, num_embeddings]``.
        lora_b: ``[out_features, rank]``; conv2d ``[out_channels, rank, 1, 1]``; embedding ``[embedding_dim, rank]``.
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA; the config's value, already resolved.
        kind: which of the three layouts above.
        lora_bias: ``[out_features]``, added as ``scaling * lora_bias`` (PEFT's ``lora_bias=True``), or None.
        magnitude: DoRA's magnitude vector, flattened to ``[out_features]`` (``[embedding_dim]`` for an embedding), or None.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    kind: LayerKind = "linear"
    lora_bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.lora_a.shape[0])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight that the delta belongs to, in ``[out, in]`` order."""
        if self.kind == "embedding":
            return (int(self.lora_a.shape[1]), int(self.lora_b.shape[0]))
        if self.kind == "conv2d":
            return (int(self.lora_b.shape[0]), *map(int, self.lora_a.shape[1:]))
        return (int(self.lora_b.shape[0]), int(self.lora_a.shape[1]))

    def tensors(self) -> Iterator[Tensor]:
        yield self.lora_a
        yield self.lora_b
        if self.lora_bias is not None:
            yield self.lora_bias
        if self.magnitude is not None:
            yield self.magnitude

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``scaling * lora_b @ lora_a`` in the weight's own shape (DoRA's magnitude not applied)."""
        a, b = self.lora_a.to(dtype), self.lora_b.to(dtype)
        flat = (b.flatten(1) @ a.flatten(1)).mul_(self.scaling)
        if self.kind == "embedding":
            return flat.t().contiguous()
        return flat.reshape(self.weight_shape)


@dataclass(frozen=True)
class LoraAdapter:
    """One fine-tune in low-rank form.

    Args:
        layers: module path (the model's own, no PEFT prefix) -> factors.
        modules_to_save: module path -> {parameter name inside it: tensor}; full replacements such as a head.
        base_biases: module path -> ``[out_features]``; absolute biases from PEFT's ``bias="all" | "lora_only"``.
        trainable_tokens: embedding path -> (token ids ``[n]``, rows ``[n, dim]``); the rows replace the base's.
        config: the PEFT config as read (unknown-to-us inert keys included), for writing it back.
        source: where it came from, for messages.
    """

    layers: Mapping[str, LoraLayer]
    modules_to_save: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    base_biases: Mapping[str, Tensor] = field(default_factory=dict)
    trainable_tokens: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "<memory>"

    @property
    def rank(self) -> int:
        """Largest rank of any layer (0 if there is none)."""
        return max((layer.rank for layer in self.layers.values()), default=0)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor the adapter holds."""
        for layer in self.layers.values():
            yield from layer.tensors()
        for saved in self.modules_to_save.values():
            yield from saved.values()
        yield from self.base_biases.values()
        for _, rows in self.trainable_tokens.values():
            yield rows

    def num_parameters(self) -> int:
        """Number of scalars in all tensors."""
        return sum(t.numel() for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LoraAdapter:
        """A copy with every tensor moved; ``self`` is unchanged."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype)

        return replace(
            self,
            layers={
                path: replace(
                    layer,
                    lora_a=move(layer.lora_a),
                    lora_b=move(layer.lora_b),
                    lora_bias=None if layer.lora_bias is None else move(layer.lora_bias),
                    magnitude=None if layer.magnitude is None else move(layer.magnitude),
                )
                for path, layer in self.layers.items()
            },
            modules_to_save={p: {n: move(t) for n, t in saved.items()} for p, saved in self.modules_to_save.items()},
            base_biases={p: move(t) for p, t in self.base_biases.items()},
            trainable_tokens={p: (ids, move(rows)) for p, (ids, rows) in self.trainable_tokens.items()},
        )
