"""What a LoRA adapter is: per-module factors, module copies that ride along, and the config they came with."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

LayerKind = Literal["linear", "conv2d", "embedding"]


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """One module's factors; ``delta = scaling * lora_b @ lora_a``.

    Args:
        lora_a: ``[rank, in_features]``; conv2d ``[rank, in_channels, kh, kw]``; embedding ``[rank, num_embeddings]``.
        lora_b: ``[out_features, rank]``; conv2d ``[out_channels, rank, 1, 1]``; embedding ``[embedding_dim, rank]``.
        scaling: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA; the config's value, already resolved.
        kind: which of the three layouts above.
        lora_bias: ``[out_features]``, added as ``scaling * lora_bias`` (PEFT's ``lora_bias=True``), or None.
        magnitude: DoRA's magnitudes, flattened to ``[out_features]`` (``[embedding_dim]`` for an embedding), or None.
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

    def delta(self, base_weight: Tensor | None = None) -> Tensor:
        """What the layer adds to the base weight ``W``, in fp32.

        ``product()``; with DoRA ``m / ||W + product|| * (W + product) - W``, the norm taken per output feature.

        Args:
            base_weight: ``W``, of shape ``weight_shape``; needed with DoRA, not read otherwise.
        Returns:
            fp32, ``weight_shape``.
        Raises:
            ValueError: DoRA without ``base_weight``, or one of another shape.
        Source: DoRA, arXiv:2402.09353, equation 5.
        """
        product = self.product()
        if self.magnitude is None:
            return product
        if base_weight is None:
            raise ValueError("base_weight: a DoRA layer's delta depends on the base weight, pass base_weight=")
        if tuple(base_weight.shape) != self.weight_shape:
            raise ValueError(
                f"base_weight: expected shape {self.weight_shape}, in [out, in] order (transpose a Conv1D weight), "
                f"got {tuple(base_weight.shape)}"
            )
        weight = base_weight.detach().to(product.device, torch.float32)
        directed = product.add_(weight)
        out_dim = 1 if self.kind == "embedding" else 0
        norm = torch.linalg.vector_norm(directed, dim=[d for d in range(directed.dim()) if d != out_dim], keepdim=True)
        magnitude = self.magnitude.to(torch.float32).reshape(norm.shape)
        # a row of zeros has no direction, and stays zero whatever its magnitude
        return directed.mul_(torch.where(norm > 0, magnitude / norm, 0.0)).sub_(weight)

    def __repr__(self) -> str:
        extras = "".join(
            f", {name}" for name, t in (("lora_bias", self.lora_bias), ("DoRA", self.magnitude)) if t is not None
        )
        shape = " x ".join(map(str, self.weight_shape))
        dtype = str(self.lora_a.dtype).removeprefix("torch.")
        return f"LoraLayer({self.kind} {shape}, rank {self.rank}, scaling {self.scaling:g}{extras}, {dtype})"


@dataclass(frozen=True, eq=False)
class LoraAdapter:
    """One fine-tune in low-rank form.

    Args:
        layers: module path (the model's own, no PEFT prefix) -> factors.
        modules_to_save: module path -> {parameter name inside it: tensor}; full replacements such as a head.
        base_biases: module path -> ``[out_features]``; absolute biases from PEFT's ``bias="all" | "lora_only"``.
        trainable_tokens: embedding path -> (token ids ``[n]``, rows ``[n, dim]``); the rows replace the base's.
        config: the PEFT config as read (unknown-to-us inert keys included), for writing it back.
        source: where it came from, for messages.
        base_weights: module path of an adapted embedding or head -> the base weight that PEFT saved along with it
            (``save_embedding_layers``); it replaces the base's, which matters when the vocabulary was resized.
    """

    layers: Mapping[str, LoraLayer]
    modules_to_save: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    base_biases: Mapping[str, Tensor] = field(default_factory=dict)
    trainable_tokens: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    source: str = "<memory>"
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)

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
        yield from self.base_weights.values()

    def num_parameters(self) -> int:
        """Number of scalars in all tensors."""
        return sum(t.numel() for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LoraAdapter:
        """A copy with every tensor moved, and the floating-point ones cast; ``self`` is unchanged."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

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
            trainable_tokens={p: (ids.to(device), move(rows)) for p, (ids, rows) in self.trainable_tokens.items()},
            base_weights={p: move(t) for p, t in self.base_weights.items()},
        )

    def delta(self, path: str, base_weight: Tensor | None = None) -> Tensor:
        """What the adapter adds to one module's weight; see ``LoraLayer.delta``.

        Args:
            path: module path, the model's own.
            base_weight: needed with DoRA; in ``[out, in]`` order, so a Conv1D weight goes in transposed.
        Returns:
            fp32, the weight's own shape in ``[out, in]`` order (Conv1D too; a convolution's kernel shape;
            ``[num_embeddings, embedding_dim]`` for an embedding).
        Raises:
            ValueError: no such layer in the adapter (close matches are named), or ``base_weight`` is missing or does
                not fit.
        """
        layer = self.layers.get(path)
        if layer is None:
            known = [*self.layers]
            close = difflib.get_close_matches(path, known, n=3) or [p for p in known if p.endswith(path)][:3]
            advice = f"did you mean {', '.join(map(repr, close))}?" if close else f"it has {known[:3]}" + "..."
            raise ValueError(f"path: {self.source} adapts {len(known)} modules, but not {path!r}; {advice}")
        try:
            return layer.delta(base_weight)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save_pretrained(self, directory: str | os.PathLike[str], *, component: str | None = None) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does; see ``adapters.save``.

        Args:
            directory: created if need be. An adapter already in it is replaced; other files stay.
            component: for a diffusers pipeline, the adapted model's name in it, such as "transformer" or "unet"; the
                directory then gets ``pytorch_lora_weights.safetensors``, for ``pipe.load_lora_weights``.
        Raises:
            ValueError: ``directory`` is a file, or PEFT's format cannot express the adapter.
        """
        from lora_fuse.adapters.save import save_adapter  # the writer imports this module

        save_adapter(self, directory, component)

    def __repr__(self) -> str:
        ranks = sorted({layer.rank for layer in self.layers.values()})
        dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in self.tensors())
        flags = {
            "DoRA": any(layer.magnitude is not None for layer in self.layers.values()),
            "lora_bias": any(layer.lora_bias is not None for layer in self.layers.values()),
            f"modules_to_save {', '.join(self.modules_to_save)}": bool(self.modules_to_save),
            f"{len(self.base_biases)} biases": bool(self.base_biases),
            f"{sum(len(ids) for ids, _ in self.trainable_tokens.values())} token rows": bool(self.trainable_tokens),
            f"base weights of {', '.join(self.base_weights)}": bool(self.base_weights),
        }
        parts = [
            f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no layers",
            f"{len(self.layers)} layer{'' if len(self.layers) == 1 else 's'}",
            f"{self.num_parameters():,} parameters",
            f"{_size(self.nbytes)} {'/'.join(dtypes)}".rstrip(),
            *(name for name, present in flags.items() if present),
            f"from {self.source!r}",
        ]
        return f"LoraAdapter({', '.join(parts)})"


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for bigger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, bigger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
