"""One module's tensors as a file has them, and the checks that make a ``LoraLayer`` of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_fuse.adapters._findings import Findings
from lora_fuse.adapters._finite import all_finite
from lora_fuse.adapters.lora import LayerKind, LoraLayer


@dataclass
class RawLayer:
    """One module's tensors before any check; ``keys`` has the key in the file of each, for messages."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def put(self, role: str, key: str, tensor: Tensor) -> None:
        if role in self.tensors:
            raise ValueError(f"{key}: means the same tensor as {self.keys[role]}")
        self.tensors[role], self.keys[role] = tensor, key

    def name(self, role: str) -> str:
        return f"{self.keys[role]} {tuple(self.tensors[role].shape)}"


def check_tensor(key: str, tensor: Any, findings: Findings, integer: bool = False) -> bool:
    """False (and a finding) if no adapter can hold this: without data, with NaN or inf in it, or not floating point.

    ``integer`` accepts other dtypes too, for the buffers of a copied module.
    """
    before = len(findings.fatal)
    if not isinstance(tensor, Tensor):
        findings.fatal.append(f"{key}: expected a tensor, got {type(tensor).__name__}")
    elif not (tensor.is_floating_point() or integer):
        findings.fatal.append(f"{key}: expected floating point, got {tensor.dtype}")
    elif tensor.device.type == "meta":
        findings.fatal.append(f"{key}: is on the meta device, it has no data")
    elif tensor.numel() == 0:
        findings.fatal.append(f"{key}: is empty, shape {tuple(tensor.shape)} (an unsharded export of a sharded model?)")
    elif tensor.is_floating_point() and not all_finite(tensor.detach()):
        kind = "NaN" if bool(tensor.detach().float().isnan().any()) else "inf"
        findings.fatal.append(f"{key}: contains {kind}")
    return len(findings.fatal) == before


def build_layer(path: str, raw: RawLayer, scaling: float, findings: Findings) -> LoraLayer | None:
    """Check one module's shapes against each other; None (and a finding) if they do not fit."""
    embedding = "embedding_a" in raw.tensors or "embedding_b" in raw.tensors
    role_a, role_b = ("embedding_a", "embedding_b") if embedding else ("lora_a", "lora_b")
    a, b = raw.tensors.get(role_a), raw.tensors.get(role_b)
    if a is None or b is None:
        lack = " and ".join(role for role, t in ((role_a, a), (role_b, b)) if t is None)
        findings.fatal.append(f"{path}: {lack} is missing, the file has only {', '.join(raw.keys.values())}")
        return None
    both = f"{raw.name(role_a)} and {raw.name(role_b)}"
    kind: LayerKind = "embedding" if embedding else "conv2d" if a.dim() == 4 else "linear"
    if a.dim() != b.dim() or a.dim() not in (2, 4) or (embedding and a.dim() != 2):
        what = {3: "Conv1d layers are not supported", 5: "Conv3d layers are not supported"}
        findings.fatal.append(
            f"{path}: {what.get(a.dim(), 'two factors of 2 or 4 dimensions are expected')}, got {both}"
        )
        return None
    if kind == "conv2d" and a.shape[0] != b.shape[1] and a.shape[0] % b.shape[1] == 0:
        groups = a.shape[0] // b.shape[1]
        findings.fatal.append(f"{path}: a convolution in {groups} groups is not supported, got {both}")
        return None
    if a.shape[0] != b.shape[1] or (kind == "conv2d" and b.shape[2:] != (1, 1)):
        findings.fatal.append(f"{path}: the factors do not share a rank, got {both}")
        return None
    out_features = b.shape[0]
    bias, magnitude = raw.tensors.get("lora_bias"), raw.tensors.get("magnitude")
    if bias is not None and tuple(bias.shape) != (out_features,):
        findings.fatal.append(f"{path}: expected a bias of shape ({out_features},), got {raw.name('lora_bias')}")
    if magnitude is not None:
        if magnitude.numel() != out_features:
            findings.fatal.append(f"{path}: expected {out_features} magnitudes, got {raw.name('magnitude')}")
        magnitude = magnitude.flatten()
    return LoraLayer(a, b, float(scaling), kind, bias, magnitude)
