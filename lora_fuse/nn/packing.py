"""Find siblings that receive the same input, lay their weights into one storage, and take them out again.

A weight's adapters may move in behind it, see augmented.py; then layers without siblings are moved as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_fuse.adapters.pool import ROW_ALIGN_BYTES, AdapterPool
from lora_fuse.nn.augmented import has_room
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
    free = _free_layers(model, apart)
    groups = []
    for path, parent in model.named_modules():
        for names in _SIBLINGS:
            homes = [f"{path}.{name}" if path else name for name in names if name in parent._modules]
            group = {home: free[home] for home in homes if home in free}
            if len(group) > 1 and _agree([*group.values()]):
                groups.append(group)
    return groups


def find_others(
    model: nn.Module, apart: Iterable[str], groups: Iterable[Mapping[str, nn.Linear]]
) -> list[dict[str, nn.Linear]]:
    """Layers with memory of their own that are in no group, each in a group of its own."""
    grouped = {path for group in groups for path in group}
    return [{path: layer} for path, layer in _free_layers(model, apart).items() if path not in grouped]


def _free_layers(model: nn.Module, apart: Iterable[str]) -> dict[str, nn.Linear]:
    apart, modules = tuple(apart), dict(model.named_modules())
    used = Counter(_storage(t) for m in modules.values() for t in (*m._parameters.values(), *m._buffers.values()))
    return {
        path: module  # type: ignore[misc]
        for path, module in modules.items()
        if _can_share(module, path, used) and not any(path == a or path.startswith(f"{a}.") or a == "" for a in apart)
    }


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
def pack(groups: Iterable[Mapping[str, nn.Linear]], pools: Mapping[str, AdapterPool], augment: bool) -> Packs:
    """Lay each group's parameters behind one another; on failure all are as they were.

    Args:
        groups: a layer without siblings is left alone unless its A moves in.
        pools: by path, of the layers that have slots.
        augment: move A in behind the weights, where there is room.
    """
    packs: Packs = []
    try:
        for group in groups:
            layers = (*group.values(),)
            made = Pack((*group,), tuple(layer.weight.shape[0] for layer in layers), augment)
            for i, path in enumerate(group):
                made.set_pool(i, pools.get(path))
            if len(group) > 1 or any(_lodgers(made, layers)):
                packs.append((made, layers))
                _bind(made, layers)
    except BaseException:
        unpack(packs)
        raise
    return packs


def _lodgers(pack: Pack, layers: Sequence[nn.Linear]) -> list[AdapterPool | None]:
    """The pools whose A rows go behind the weights."""
    weight, none = layers[0].weight, [None] * len(layers)
    if not pack.augment:
        return [*none]
    pools = [
        pool if pool is not None and (pool.pool_a.dtype, pool.pool_a.device) == (weight.dtype, weight.device) else None
        for pool in pack.pools
    ]
    rows = sum(pool.pool_a.shape[0] for pool in pools if pool is not None)
    return pools if has_room(weight.shape[1], sum(pack.sizes), rows, weight.element_size()) else [*none]


def _bind(pack: Pack, layers: Sequence[nn.Linear]) -> None:
    lodgers, first = _lodgers(pack, layers), layers[0].weight
    pieces, behind, end = [layer.weight.data for layer in layers], [], sum(pack.sizes)
    for pool in lodgers:
        behind.append(None if pool is None else end)
        if pool is not None:
            pieces.append(pool.pool_a)
            end += pool.pool_a.shape[0]
    if end > sum(pack.sizes):  # rows of the product begin at multiples of 64 bytes as well
        pieces.append(first.new_zeros(-end % (ROW_ALIGN_BYTES // first.element_size()), first.shape[1]))
    weight = torch.cat(pieces)
    biases: list[Tensor | None] = [layer._parameters["bias"] for layer in layers]
    bias = None
    if any(b is not None for b in biases):
        bias = weight.new_zeros(weight.shape[0])
        for i, b in enumerate(biases):
            if b is not None:
                bias[sum(pack.sizes[:i]) : sum(pack.sizes[: i + 1])] = b.data
    pack.places = set()
    for i, layer in enumerate(layers):
        start = sum(pack.sizes[:i])
        layer.weight.data = _rows(weight, start, pack.sizes[i])
        if bias is not None and layer.bias is not None:
            layer.bias.data = _rows(bias, start, pack.sizes[i])
        pack.places |= {_storage(p) for p in layer.parameters(recurse=False)}
    for pool, at in zip(lodgers, behind, strict=True):
        if pool is not None and at is not None:
            pool.move_a(_rows(weight, at, pool.pool_a.shape[0]))
    pack.bind(weight, bias, tuple(behind))


def _rows(whole: Tensor, first: int, count: int) -> Tensor:
    """Rows of a dense tensor that has its storage to itself. They look like a tensor of their own: what saves, copies
    or compares storages finds these rows alone."""
    row = whole.stride(0) * whole.element_size()
    part = whole.untyped_storage()[first * row : (first + count) * row]
    return whole.new_empty(0).set_(part, 0, (count, *whole.shape[1:]), whole.stride())


@torch.no_grad()
def unpack(packs: Packs) -> None:
    """Give every parameter a storage of its own again, with the values that it has."""
    for pack, layers in packs:
        pack.dissolve()
        for layer in layers:
            for p in layer._parameters.values():
                if p is not None and _storage(p) in pack.places:
                    p.data = p.data.clone()


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
