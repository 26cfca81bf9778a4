"""Find siblings that receive the same input, lay their weights into one storage, and take them out again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_fuse.nn.packed import Pack, PackedLinear
from lora_fuse.nn.targets import is_expert, is_hooked

Packs = list[tuple[Pack, tuple[nn.Linear, ...]]]

# What models call the projections of one input, in the order in which they call them. A wrong guess costs time in the
# first two forwards, no more: see Pack.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, Phi, OPT, GPT-J, BART, CLIP, Whisper
    ("query", "key", "value"),  # BERT, RoBERTa, MiniLM, ViT
    ("q", "k", "v"),  # T5, MPNet
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("linear_q", "linear_k", "linear_v"),
    ("to_q", "to_k", "to_v"),  # diffusers
    ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)


def find_siblings(model: nn.Module, apart: Iterable[str]) -> list[dict[str, nn.Linear]]:
    """Groups of two layers or more that may share a product: path -> module, in order.

    Args:
        apart: paths of modules that need a product of their own, with all that is inside them.
    """
    apart = tuple(apart)
    modules = dict(model.named_modules())
    used = Counter(_storage(t) for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values()))
    groups = []
    for path, parent in modules.items():
        for names in _SIBLINGS:
            group: dict[str, nn.Linear] = {}
            for name in names:
                home, child = f"{path}.{name}" if path else name, parent._modules.get(name)
                free = not any(home == a or home.startswith(f"{a}.") or a == "" for a in apart)
                if free and modules.get(home) is child and _can_share(child, home, used):
                    group[home] = child  # type: ignore[assignment]
            if len(group) > 1 and _agree([*group.values()]):
                groups.append(group)
    return groups


def _storage(t: Tensor | None) -> int:
    try:
        return 0 if t is None else t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # no such thing: sparse, a subclass of its own kind
        return 0


def _can_share(module: nn.Module | None, path: str, used: Mapping[int, int]) -> bool:
    """Whether a layer is a plain Linear with parameters of its own, which nothing computes or looks at."""
    if type(module) is not nn.Linear or is_hooked(module) or is_expert(path):
        return False
    if module._forward_pre_hooks or module._forward_hooks or module._buffers:
        return False
    return module._parameters.keys() == {"weight", "bias"} and all(
        p is None or (_is_plain(p) and used.get(_storage(p), 1) == 1) for p in module._parameters.values()
    )


def _is_plain(p: nn.Parameter) -> bool:
    return (
        type(p) is nn.Parameter
        and type(p.data) is Tensor
        and p.dtype.is_floating_point
        and not p.is_meta
        and not p.is_inference()
        and p.numel() > 0
        and p.is_contiguous()
        and not p.is_shared()
    )


def _agree(layers: Sequence[nn.Linear]) -> bool:
    first = layers[0].weight
    kinds = {(p.dtype, p.device) for layer in layers for p in layer.parameters(recurse=False)}
    return len(kinds) == 1 and all(layer.weight.shape[1] == first.shape[1] for layer in layers)


@torch.no_grad()
def pack(groups: Iterable[Mapping[str, nn.Linear]]) -> Packs:
    """Lay each group's parameters behind one another; on failure all are as they were."""
    packs: Packs = []
    try:
        for group in groups:
            made = Pack((*group,), tuple(layer.weight.shape[0] for layer in group.values()))
            _bind(made, [*group.values()])
            packs.append((made, (*group.values(),)))
    except BaseException:
        unpack(packs)
        raise
    return packs


def _bind(pack: Pack, layers: Sequence[nn.Linear]) -> None:
    weight = torch.cat([layer.weight.data for layer in layers])
    biases: list[Tensor | None] = [layer._parameters["bias"] for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        sizes = zip(biases, pack.sizes, strict=True)
        bias = torch.cat([weight.new_zeros(size) if b is None else b.data for b, size in sizes])
    for i, layer in enumerate(layers):
        rows = slice(sum(pack.sizes[:i]), sum(pack.sizes[: i + 1]))
        layer.weight.data = weight[rows]
        if bias is not None and layer.bias is not None:
            layer.bias.data = bias[rows]
    pack.bind(weight, bias)


@torch.no_grad()
def unpack(packs: Packs) -> None:
    """Give every parameter a storage of its own again, with the values that it has."""
    for pack, layers in packs:
        pack.dissolve()
        for layer in layers:
            for p in layer._parameters.values():
                if p is not None and _storage_bytes(p) > p.numel() * p.element_size():
                    p.data = p.data.clone()


def _storage_bytes(p: Tensor) -> int:
    return p.untyped_storage().nbytes() if _storage(p) else 0


def repack(packs: Packs) -> None:
    """Bind what was moved, cast, copied or unpickled; what no longer fits together is dissolved."""
    with torch.inference_mode(False), torch.no_grad():
        for pack, layers in packs:
            if not pack.live or pack.weight is not None:
                continue
            parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
            whole = all(issubclass(type(layer), PackedLinear) and "weight" in layer._parameters for layer in layers)
            if whole and all(_is_plain(p) for p in parameters) and _agree(layers):
                _bind(pack, layers)
            else:
                pack.dissolve()
