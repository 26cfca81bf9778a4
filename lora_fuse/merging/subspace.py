"""Methods that merge singular vectors: TSV-M, Iso-C and Iso-CTS, on the small cores of ``merging.core``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fuse.adapters.lora import LoraLayer
from lora_fuse.merging.core import Core, core_of, orthogonalised, significant
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import LayerTerm
from lora_fuse.ops.factored import product_svd


def tsv(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """TSV-M: ``U_o diag(S) V_o^T`` of the adapters' own SVDs side by side, U_o and V_o their orthogonal polar factors.

    Of each adapter the leading ``min(in, out) // T`` directions enter (for LoRA that is all, mostly), without those
    that are zero: T is the number of adapters that have the layer. Weights scale S.

    Source: Gargiulo et al., Task Singular Vectors, arXiv:2412.00081.
    """
    core = core_of(parts, options)
    limit = max(1, core.min_dim // len(parts))
    us, ss, vs = [], [], []
    for left, right in zip(core.left, core.right, strict=True):
        u, s, v = product_svd(left, right)
        k = min(limit, significant(s))
        us.append(u[:, :k])
        ss.append(s[:k])
        vs.append(v[:, :k])
    return _whitened(core, torch.cat(us, 1), torch.cat(ss), torch.cat(vs, 1), options)


def iso_c(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """Iso-C: ``mean(S) U V^T`` with ``U S V^T`` the weighted sum of the deltas.

    The mean is over the sum's own directions, of which there are at most the sum of the ranks (``mean_over="rank"``),
    or over ``min(in, out)`` values, most of them zero (``"min_dim"``), as the paper has it for full weights. U and V
    never get directions that the sum does not have.

    Source: Marczak et al., No Task Left Behind, arXiv:2502.04959.
    """
    core = core_of(parts, options)
    u, s, v = core.sum_svd()
    k = significant(s)
    return core.layer(u[:, :k], _levelled(s[:k], core, options), v[:, :k], options)


def iso_cts(path: str, parts: Sequence[LayerTerm], options: Options) -> LoraLayer:
    """Iso-CTS: leading directions of the sum, and of each adapter what they miss; whitened, with one singular value.

    ``D = min(in, out, sum of ranks)`` directions in all: ``common_fraction`` of them (rounded so that the rest divides
    by T) are the sum's, the rest is shared evenly among the adapters' ``Delta_t - U_c U_c^T Delta_t``. The value is the
    mean of all their singular values, as ``mean_over`` says.

    The paper's D is ``min(in, out)``. For LoRA that exceeds the sum's rank, so that nothing but rounding errors would
    be left for the adapters.

    Source: as ``iso_c``.
    """
    core = core_of(parts, options)
    u, s, v = core.sum_svd()
    fraction = 0.8 if options.common_fraction is None else options.common_fraction
    dim, num = s.numel(), len(parts)
    each = round((dim - int(fraction * dim)) / num)
    k = min(max(0, dim - each * num), significant(s))
    us, ss, vs = [u[:, :k]], [s[:k]], [v[:, :k]]
    for left, right in zip(core.left, core.right, strict=True):
        u_t, s_t, v_t = product_svd(left - us[0] @ (us[0].mT @ left), right)
        k = min(each, significant(s_t, floor=torch.linalg.norm(left @ right.mT)))
        us.append(u_t[:, :k])
        ss.append(s_t[:k])
        vs.append(v_t[:, :k])
    return _whitened(core, torch.cat(us, 1), _levelled(torch.cat(ss), core, options), torch.cat(vs, 1), options)


def _whitened(core: Core, u: Tensor, s: Tensor, v: Tensor, options: Options) -> LoraLayer:
    u, u_full = orthogonalised(u)
    v, v_full = orthogonalised(v)
    if not (u_full and v_full):  # collinear directions became one, so that this is no SVD yet
        u, s, v = product_svd(u * s, v)
    return core.layer(u, s, v, options)


def _levelled(s: Tensor, core: Core, options: Options) -> Tensor:
    count = core.min_dim if options.mean_over == "min_dim" else s.numel()
    return (s.sum() / max(count, 1)).expand(s.numel())
