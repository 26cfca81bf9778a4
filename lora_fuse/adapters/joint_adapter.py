"""What a joint adapter is: a small core per layer between bases that a whole bank of adapters shares."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LoraLayer, _size
from lora_fuse.adapters.sparse_adapter import fingerprint


@dataclass(frozen=True, eq=False)
class JointBasis:
    """The bases of one layer, one pair per cluster of adapters.

    Args:
        u: ``[num_clusters, out_features, rank]``.
        v: ``[num_clusters, in_features, rank]``.
    """

    u: Tensor
    v: Tensor

    @property
    def rank(self) -> int:
        return int(self.u.shape[2])

    @property
    def nbytes(self) -> int:
        return self.u.nbytes + self.v.nbytes

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal bases: tells the banks apart."""
        return f"{fingerprint(self.u)}-{fingerprint(self.v)}"


@dataclass(frozen=True, eq=False)
class JointAdapter:
    """One adapter of a joint bank: ``delta = U_c core V_c^T`` in every layer, c the adapter's cluster.

    Args:
        bases: module path -> bases; one object for all adapters of a bank.
        cluster: which of the bases are this adapter's.
        cores: module path -> ``[rank, rank]``, or the diagonal ``[rank]``; scalings are in them.
        lora_bias: module path -> ``[out_features]``, added as it is.
        modules_to_save: as ``LoraAdapter`` has them: heads and other replaced modules, never compressed.
        source: where it came from, for messages.
        config: the PEFT config of the adapter that it was made from.
    """

    bases: Mapping[str, JointBasis]
    cluster: int
    cores: Mapping[str, Tensor]
    lora_bias: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    source: str = "<memory>"
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of its layers; 0 without layers."""
        return max((self.bases[path].rank for path in self.cores), default=0)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor that is this adapter's own; the bases are the bank's."""
        yield from self.cores.values()
        yield from self.lora_bias.values()
        for module in self.modules_to_save.values():
            yield from module.values()

    def num_parameters(self) -> int:
        """Scalars of its own; the shared bases are not counted."""
        return sum(t.numel() for t in self.tensors())

    @property
    def nbytes(self) -> int:
        """Bytes of its own tensors."""
        return sum(t.nbytes for t in self.tensors())

    def delta(self, path: str) -> Tensor:
        """What the layer adds to the base weight, ``[out_features, in_features]`` fp32.

        Raises:
            ValueError: no such layer (close matches are named).
        """
        return self.layer(path).product()

    def layer(self, path: str) -> LoraLayer:
        """One layer with factors of its own, ``B = U core`` and ``A = V^T``.

        Raises:
            ValueError: no such layer (close matches are named).
        """
        core = self.cores.get(path)
        if core is None:
            close = difflib.get_close_matches(path, self.cores, n=3)
            advice = f"; did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"path: {self.source} has {len(self.cores)} layers, but not {path!r}{advice}")
        basis = self.bases[path]
        u, v = basis.u[self.cluster], basis.v[self.cluster]
        wide = torch.promote_types(core.dtype, torch.float32)
        b = u.to(wide) * core.to(wide) if core.dim() == 1 else u.to(wide) @ core.to(wide)
        return LoraLayer(v.t().contiguous(), b.to(core.dtype), 1.0, lora_bias=self.lora_bias.get(path))

    def check(self) -> None:
        """Check everything that readers and kernels rely on; for adapters that come from files.

        Raises:
            ValueError: naming the source, the layer and what is wrong with it.
        """
        for path, core in self.cores.items():
            basis = self.bases.get(path)
            if basis is None:
                raise ValueError(f"{self.source}: layer {path!r} has a core, but the bank has no bases for it")
            rank = basis.rank
            if not 0 <= self.cluster < basis.u.shape[0]:
                raise ValueError(f"{self.source}: cluster {self.cluster}, the bank has {basis.u.shape[0]}")
            if tuple(core.shape) not in ((rank, rank), (rank,)):
                raise ValueError(
                    f"{self.source}: layer {path!r} has a core {list(core.shape)} for bases of rank {rank}"
                )
            for t in (core, basis.u, basis.v):
                if not t.is_floating_point() or not all_finite(t):
                    raise ValueError(f"{self.source}: layer {path!r} has a tensor that is not finite")
        for path, bias in self.lora_bias.items():
            if path not in self.cores or tuple(bias.shape) != (self.bases[path].u.shape[1],) or not all_finite(bias):
                raise ValueError(f"{self.source}: layer {path!r} has a lora_bias {list(bias.shape)} that does not fit")

    def __repr__(self) -> str:
        heads = f", heads {', '.join(self.modules_to_save)}" if self.modules_to_save else ""
        form = "diagonal" if any(core.dim() == 1 for core in self.cores.values()) else "full"
        return (
            f"JointAdapter({len(self.cores)} layers, {form} cores of rank {self.rank}, cluster {self.cluster}, "
            f"{_size(self.nbytes)} of its own{heads}, from {self.source!r})"
        )
