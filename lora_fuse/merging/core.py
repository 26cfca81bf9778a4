"""The space that the adapters of one layer share: small cores in place of deltas of the weight's shape.

With ``[B_1 | ... | B_T] = Qb Rb`` and ``[A_1^T | ... | A_T^T] = Qa Ra``, every adapter's part is exactly
``coef_t B_t A_t = Qb M_t Qa^T``, ``M_t = coef_t Rb_t Ra_t^T`` of at most ``R x R``, R the sum of the ranks. Whatever
does not depend on the coordinates of in- and output (singular values, projections, orthogonal factors) is the same for
the cores as for the deltas. Where ``R >= out`` or ``R >= in`` that side's Q is the identity.

Source: Core Space Merging, arXiv:2509.17786.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging.linear import layer_from
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import LayerTerm
from lora_fuse.ops.factored import ThinQR, product_svd, thin_qr
from lora_fuse.ops.svd import directions_for, peak_signs, robust_svd

# A direction whose singular value is below this share of the largest is no direction of the adapters': fp32 rounding
# of the factors makes such ones, and methods that whiten or level the spectrum would blow them up.
NOISE = 1e-6


@dataclass(frozen=True)
class Core:
    """``coef_t * lora_b_t @ lora_a_t = Qb left[t] right[t]^T Qa^T``, all fp64.

    Attributes:
        left: ``[min(out, R), r_t]`` for each part, coefficient included.
        right: ``[min(in, R), r_t]``.
        left_qr, right_qr: what Qb and Qa are applied with.
        like: a layer of the same kind and shape.
    """

    left: Sequence[Tensor]
    right: Sequence[Tensor]
    left_qr: ThinQR
    right_qr: ThinQR
    like: LoraLayer

    @property
    def min_dim(self) -> int:
        """The smaller side of the weight, as a matrix."""
        return min(self.like.lora_b.shape[0], self.like.lora_a[0].numel())

    def sum_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(U, S, V)`` of the sum of the cores."""
        return product_svd(torch.cat([*self.left], 1), torch.cat([*self.right], 1))

    def summed(self, options: Options) -> LoraLayer:
        """The layer of the sum of the cores."""
        return self.layer(*self.sum_svd(), options)

    def layer(self, u: Tensor, s: Tensor, v: Tensor, options: Options) -> LoraLayer:
        """The layer whose core is ``u diag(s) v^T``, cut optimally to ``rank`` or ``energy``, times ``scaling``.

        Args:
            u, v: ``[., k]``, orthonormal columns.
            s: ``[k]``, of any order; of equal ones the first go first.
        """
        if not s.numel():  # nothing in it
            u, s, v = u.new_zeros(u.shape[0], 1), u.new_zeros(1), v.new_zeros(v.shape[0], 1)
        s, order = s.sort(descending=True, stable=True)
        k = kept(s, options)
        factor = 1.0 if options.scaling is None else options.scaling
        root = (s[:k] * abs(factor)).sqrt()
        b = self.left_qr.apply(u[:, order[:k]] * root)  # [out, k]
        a = self.right_qr.apply(v[:, order[:k]] * root)  # [in, k]
        sign = peak_signs(b)
        return layer_from(b, a.mT, self.like, options.dtype, sign, math.copysign(1.0, factor) * sign.mT)


def kept(s: Tensor, options: Options) -> int:
    """How many of the descending singular values ``s`` the options keep."""
    if options.energy is not None:
        return directions_for(s.square(), options.energy)
    return s.numel() if options.rank is None else min(options.rank, s.numel())


def core_of(parts: Sequence[LayerTerm], options: Options) -> Core:
    """The parts of one layer, weights and scalings included, in their common space."""
    ranks = [p.layer.rank for p in parts]
    exact = options.dtype == torch.float64
    left = thin_qr([p.layer.lora_b.flatten(1) for p in parts], exact)
    right = thin_qr([p.layer.lora_a.flatten(1).mT for p in parts], exact)
    scaled = [p.coef * block for p, block in zip(parts, left.core.split(ranks, 1), strict=True)]
    return Core(scaled, right.core.split(ranks, 1), left, right, parts[0].layer)


def significant(s: Tensor, floor: Tensor | None = None) -> int:
    """How many of the descending ``s`` are more than noise beside ``floor`` (default: the largest)."""
    if not s.numel():
        return 0
    return int((s > NOISE * (s[0] if floor is None else floor)).sum())


def orthogonalised(x: Tensor) -> tuple[Tensor, bool]:
    """The partial isometry nearest to ``x [m, k]`` (its polar factor), and whether its columns are orthonormal.

    With ``x = P D Q^T`` that is ``P Q^T``, without the directions whose singular value is noise: there P is arbitrary,
    and would be something else in every library.
    """
    p, d, qh = robust_svd(x, "singular vectors side by side")
    k = significant(d)
    return p[:, :k] @ qh[:k], k == x.shape[1]
