"""Heads per row: every adapter's own copy of a module (PEFT's modules_to_save), run on the rows that selected it.

A batch that mixes heads of several widths returns the widest of those it selected; logits that a row's head does not
have are -inf. Rows without a copy of their own use the base model's module and keep its bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse.nn.linear import AdaptedModule, rebuildable, wrapped_class
from lora_fuse.nn.selection import Published, Snapshot
from lora_fuse.nn.serving import Serving

if TYPE_CHECKING:
    from lora_fuse.nn.plan import Fitted, Plan

_BASE = -1


class HeadCopies(nn.Module):
    """Slot -> that adapter's copy of one module; copies follow ``.to()`` and ``train()`` but are no parameters."""

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        self.__dict__["template"] = template  # its own parameters are the base module's: no memory
        self.__dict__["copies"] = {}

    copies: dict[int, nn.Module]
    template: nn.Module

    def put(self, slot: int, tensors: Mapping[str, Tensor] | None) -> None:
        """Build the copy of one slot, or leave the slot without."""
        copies = {s: module for s, module in self.copies.items() if s != slot}
        if tensors is not None:
            copies[slot] = _with_tensors(self.template, tensors).train(self.training)
        self.__dict__["copies"] = copies

    def keep(self, slots: Iterable[int]) -> None:
        """Forget the copies of all other slots."""
        self.__dict__["copies"] = {s: self.copies[s] for s in set(slots) & set(self.copies)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for module in self.copies.values():
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        for module in self.copies.values():
            module.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"slots={sorted(self.copies)}"


class MultiHead(AdaptedModule):
    """Mixed into a module's class: rows run through the copy of the adapter that they selected, if it brought one."""

    lora_prefix = "MultiHead"
    lora_heads: HeadCopies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self.lora_path}: heads that differ per row cannot be compiled into one graph; exclude this module "
                "with "
                "torch.compiler.disable, or compile the rest"
            )
        snapshot, seq = self.lora_serving.current()
        copies = self.lora_heads.copies
        owners = owners_of(snapshot, copies)
        used = sorted(set(owners))
        if len(used) <= 1:
            return self._run(used[0] if used else _BASE, copies, args, kwargs)
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)
        if x is None:
            raise TypeError(f"{self.lora_path}: a head that differs per row needs a tensor argument")
        return self._run_mixed(owners, used, copies, x, args, kwargs, snapshot, seq)

    def _run(self, owner: int, copies: Mapping[int, nn.Module], args: Any, kwargs: Any) -> Any:
        if owner != _BASE:
            return copies[owner].forward(*args, **kwargs)
        base_forward = self.__dict__.get("lora_base_forward")
        return super().forward(*args, **kwargs) if base_forward is None else base_forward(*args, **kwargs)

    def _run_mixed(
        self,
        owners: list[int],
        used: list[int],
        copies: Mapping[int, nn.Module],
        x: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        snapshot: Snapshot,
        seq: int | None,
    ) -> Tensor:
        shape = x.shape
        flat = snapshot.kind == "tokens" and shape[0] != len(owners)
        if flat:  # only a module that treats rows one by one can be fed tokens out of their sequence
            lead = shape if isinstance(self, nn.Embedding) else shape[:-1]
            row_wise = isinstance(self, (nn.Linear, nn.Embedding, nn.LayerNorm)) and len(args) == 1 and not kwargs
            if not row_wise or lead.numel() != len(owners):
                raise ValueError(
                    f"{self.lora_path}: the selection has a slot for each of {len(owners)} tokens, this input has "
                    "shape "
                    f"{list(shape)}; select per sample"
                )
            args = (x.reshape(len(owners), *shape[len(lead) :]),)
        axis, per_row = 0, owners
        if snapshot.kind != "tokens":
            axis, per_row = _rows(snapshot, owners, shape, seq, self.lora_path)
        size = len(per_row)
        parts, order = [], []
        for owner in used:
            rows = [i for i, o in enumerate(per_row) if o == owner]
            index = torch.tensor(rows, device=x.device)

            def pick(value: Any, index: Tensor = index) -> Any:
                if isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == size:
                    return value.index_select(axis, index.to(value.device))
                return value

            if owner == _BASE:  # on all rows: a product over fewer rows may round differently
                out = self._run(owner, copies, args, kwargs)
                if isinstance(out, Tensor):
                    out = out.index_select(_out_axis(out, size, axis), index.to(out.device))
            else:
                out = self._run(owner, copies, tuple(map(pick, args)), {k: pick(v) for k, v in kwargs.items()})
            if not isinstance(out, Tensor):
                raise TypeError(
                    f"{self.lora_path}: its forward returned {type(out).__name__}; heads per row return a Tensor"
                )
            parts.append(out)
            order += rows
        widths = [part.shape[-1] for part in parts]
        if 1 in widths and max(widths) > 1:
            raise ValueError(
                f"{self.lora_path}: this batch mixes a head of width 1 (regression) with one of width {max(widths)} "
                "(classification), which cannot share an output"
            )
        widest = max(widths)
        parts = [
            p if w == widest else F.pad(p, (0, widest - w), value=-torch.inf)
            for p, w in zip(parts, widths, strict=True)
        ]
        out_axis = _out_axis(parts[0], len([o for o in per_row if o == used[0]]), axis)
        joined = torch.cat(parts, out_axis)
        inverse = torch.tensor(order, device=joined.device).argsort()
        result = joined.index_select(out_axis, inverse)
        return result.view(*lead, result.shape[-1]) if flat else result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuildable(type(self), super().__reduce_ex__(protocol))

    def _slots_repr(self) -> str:
        return f"heads={len(self.lora_heads.copies)}"


def owners_of(snapshot: Snapshot, copies: Mapping[int, nn.Module]) -> list[int]:
    """Per entry (or token), the slot whose copy it uses, or -1 for the base model's module."""
    if snapshot.tokens is not None:
        return [slot if slot in copies else _BASE for slot in snapshot.tokens.tolist()]
    return [next((slot for slot in slots if slot in copies), _BASE) for slots in snapshot.entry_slots]


def _rows(
    snapshot: Snapshot, owners: list[int], shape: torch.Size, seq: int | None, path: str
) -> tuple[int, list[int]]:
    """The axis along which samples lie, and the owner of each index on it."""
    n, axis = snapshot.num_samples, snapshot.batch_dim
    if axis < len(shape) and shape[axis] == n:
        return axis, owners
    if seq is not None and shape[0] == n * seq:
        return 0, [owner for owner in owners for _ in range(seq)] if axis == 0 else owners * seq
    if len(shape) == 2 and shape[0] == n:
        return 0, owners
    raise ValueError(f"{path}: the selection has {n} samples, no axis of an input {list(shape)} tells them apart")


def _out_axis(out: Tensor, size: int, axis: int) -> int:
    """Where samples lie in a head's output: where they lay in its input, unless pooling removed the axes before."""
    return axis if out.dim() > axis + 1 and out.shape[axis] == size else 0


def head_class(module: nn.Module) -> type[nn.Module]:
    return wrapped_class(MultiHead, type(module))


def new_sites(planned: Plan, model: nn.Module) -> dict[str, HeadCopies]:
    """Empty copies for the modules that get heads for the first time."""
    return {path: HeadCopies(_template(module)) for path, (module, _) in planned.new_heads.items()}


def _template(module: nn.Module) -> nn.Module:
    """The module's structure on its own parameters (shared, not copied)."""
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    template = copy.deepcopy(module, memo)
    template.__dict__.pop("forward", None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        template.__dict__[hooks].clear()  # they run once, on the module itself
    return template


def _with_tensors(template: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    memo: dict[int, Any] = {id(t): t for t in (*template.parameters(), *template.buffers())}
    module = copy.deepcopy(template, memo)
    for name, tensor in tensors.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        old = owner._parameters.get(leaf)
        like = old if old is not None else cast(Tensor, owner._buffers[leaf])
        new = torch.empty(tensor.shape, dtype=like.dtype, device=like.device).copy_(tensor.detach())
        if old is None:
            owner._buffers[leaf] = new
        else:
            owner._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        if leaf == "weight" and isinstance(owner, nn.Linear):
            owner.out_features = int(tensor.shape[0])
    return module


def _final_linear(module: nn.Module) -> str | None:
    """Path, inside the module, of the Linear whose width the module's output has."""
    return next((path for path, child in reversed([*module.named_modules()]) if isinstance(child, nn.Linear)), None)


def width(module: nn.Module) -> int | None:
    """Width of a head's output, as its last Linear tells; None when it has no Linear."""
    path = _final_linear(module)
    return None if path is None else int(cast(nn.Linear, module.get_submodule(path)).out_features)


def misfit(module: nn.Module, tensors: Mapping[str, Tensor]) -> str | None:
    """Why a saved copy does not fit the module, or None."""
    own = module.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        return f"the saved copy lacks {missing}, and has {extra} which the module has not"
    final = _final_linear(module)
    free = set() if final is None else {f"{final}.weight".lstrip("."), f"{final}.bias".lstrip(".")}
    for name, tensor in tensors.items():
        shape, want = tuple(tensor.shape), tuple(own[name].shape)
        if shape != want and not (name in free and shape[1:] == want[1:] and shape[0] > 0):
            return f"the saved {name} has shape {list(shape)}, the module's {list(want)}"
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor).all()):
            return f"the saved {name} is not finite"
    if len({tensors[name].shape[0] for name in free & tensors.keys()}) > 1:
        return "the saved weight and bias have different widths"
    if any(t.device.type == "meta" for t in own.values()):
        return "a head whose weights are offloaded cannot be copied per adapter"
    return None


def _saved_width(module: nn.Module, tensors: Mapping[str, Tensor]) -> int | None:
    final = _final_linear(module)
    return None if final is None else int(tensors[f"{final}.weight".lstrip(".")].shape[0])


def refuse_mixed_kinds(
    adapters: Mapping[str, Fitted],
    modules: Mapping[str, nn.Module],
    present: Mapping[str, Mapping[str, int]],
) -> None:
    """Raise ``ValueError`` where a head of width 1 (regression) would share a module with a wider one."""
    seen: dict[str, dict[str, int]] = {path: dict(widths) for path, widths in present.items()}
    for name, fitted in adapters.items():
        for path, tensors in fitted.heads.items():
            size = _saved_width(modules[path], tensors)
            if size is not None:
                seen.setdefault(path, {})[name] = size
    for path, widths in seen.items():
        if 1 in widths.values() and max(widths.values()) > 1:
            raise ValueError(
                f"{path}: a head of width 1 (regression) cannot share a module with a wider one (classification); "
                "adapters "
                f"and widths: {widths}"
            )


def sizes(heads: Mapping[str, MultiHead], published: Published) -> dict[str, dict[str | None, int]]:
    """See ``lora_fuse.head_sizes``."""
    result: dict[str, dict[str | None, int]] = {}
    for path, module in heads.items():
        copies = module.lora_heads.copies
        found: dict[str | None, int | None] = {None: width(module)}
        for name, lease in published.leases.items():
            if path in published.heads.get(name, ()):
                found[name] = width(copies[lease.index])
        result[path] = {name: size for name, size in found.items() if size is not None}
    return result


def prune(heads: Iterable[MultiHead], serving: Serving) -> None:
    """Free the copies of slots that nothing holds any more."""
    live = set(serving.allocator.live.keys())
    for module in heads:
        module.lora_heads.keep(live)
