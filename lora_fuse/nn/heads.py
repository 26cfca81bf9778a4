"""Heads per row: every adapter's own copy of a module (PEFT's modules_to_save), run on the rows that selected it.

A batch that mixes heads of several widths returns the widest of those it selected; logits that a row's head does not
have are -inf. Rows without a copy of their own use the base model's module and keep its bits.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fuse.adapters._finite import all_finite
from lora_fuse.nn.linear import AdaptedModule, rebuildable, wrapped_class
from lora_fuse.nn.selection import Published, Snapshot
from lora_fuse.nn.serving import BY_HANDLE, Serving
from lora_fuse.nn.traced import run_as_plain_python, snapshot_of
from lora_fuse.ops._library import LIBRARY

if TYPE_CHECKING:
    from lora_fuse.nn.plan import Fitted, Plan

_BASE = -1


class HeadCopies(nn.Module):
    """Slot -> that adapter's copy of one module; copies follow ``.to()`` and ``train()`` but are no parameters."""

    def __init__(self, template: nn.Module) -> None:
        super().__init__()
        self.__dict__["template"] = template
        self._set({})

    copies: dict[int, nn.Module]
    template: nn.Module
    common_width: int | None  # of all copies, None if there is none, -1 if they differ
    site: int  # how compiled code names this object

    def _set(self, copies: dict[int, nn.Module]) -> None:
        widths = {width(module) for module in copies.values()}
        self.__dict__["common_width"] = -1 if len(widths) > 1 else next(iter(widths), None)
        self.__dict__["copies"] = copies
        if "site" not in self.__dict__:
            self.__dict__["site"] = next(_sites)
            _SITES[self.site] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({key: value for key, value in state.items() if key != "site"})
        self._set(self.copies)

    def put(self, slot: int, tensors: Mapping[str, Tensor] | None, module: nn.Module) -> None:
        """Build the copy of one slot, as ``module`` is now but with these tensors, or leave the slot without."""
        copies = {s: module for s, module in self.copies.items() if s != slot}
        if tensors is not None:
            copies[slot] = _with_tensors(self.template, tensors, module.state_dict()).train(self.training)
        self._set(copies)

    def keep(self, slots: Iterable[int]) -> None:
        """Forget the copies of all other slots."""
        self._set({s: self.copies[s] for s in set(slots) & set(self.copies)})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for module in (self.template, *self.copies.values()):
            module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        for module in self.copies.values():
            module.train(mode)
        return super().train(mode)

    def extra_repr(self) -> str:
        return f"slots={sorted(self.copies)}"


class MultiHead(AdaptedModule):
    """Mixed into a module's class: rows run through the copy of the adapter that they selected, if it brought one.

    Compiled code may contain heads that are plain Linears, in inference; other heads are refused there.
    """

    lora_prefix = "MultiHead"
    lora_heads: HeadCopies

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._traced(*args, **kwargs)
        serving, copies = self.lora_serving, self.lora_heads.copies

        def run(owner: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
            if owner != _BASE:
                return copies[owner].forward(*args, **kwargs)
            base_forward = self.__dict__.get("lora_base_forward")
            return (
                super(MultiHead, self).forward(*args, **kwargs)
                if base_forward is None
                else base_forward(*args, **kwargs)
            )

        ids = isinstance(self, nn.Embedding)
        row_wise = isinstance(self, (nn.Linear, nn.Embedding, nn.LayerNorm)) and len(args) == 1 and not kwargs
        if serving.task in copies:
            return run(serving.task, args, kwargs)
        snapshot, seq = serving.current()
        return HeadRun(self.lora_path, copies, run, row_wise, ids)(snapshot, seq, args, kwargs)

    def _traced(self, *args: Any, **kwargs: Any) -> Tensor:
        linear: Any = self
        if type(self).lora_base is not nn.Linear or len(args) != 1 or kwargs or "lora_base_forward" in self.__dict__:
            raise RuntimeError("heads per row other than a plain nn.Linear cannot be compiled")
        if torch.is_grad_enabled() and args[0].requires_grad:
            raise RuntimeError("heads per row cannot be compiled together with their backward")
        serving, site = self.lora_serving, self.lora_heads.site
        common = self.lora_heads.common_width
        size = linear.out_features if common in (None, linear.out_features) else -1
        return torch.ops.lora_fuse.run_heads(
            args[0].detach(), linear.weight.detach(), linear.bias, serving.token, serving.handle, site, size
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuildable(type(self), super().__reduce_ex__(protocol))

    def _slots_repr(self) -> str:
        return f"heads={len(self.lora_heads.copies)}"


@dataclass(frozen=True)
class HeadRun:
    """One call of a module with heads.

    Args:
        path: the module's, for messages.
        copies: slot -> module.
        run: ``run(owner, args, kwargs)`` runs the copy of a slot, or the base model's module for -1.
        row_wise: whether rows may be taken out of their sequence (Linear, Embedding, LayerNorm on one argument).
        ids: whether the input holds token ids, so that all of its dimensions are leading ones.
    """

    path: str
    copies: Mapping[int, nn.Module]
    run: Callable[[int, tuple[Any, ...], Mapping[str, Any]], Any]
    row_wise: bool
    ids: bool = False

    def __call__(self, snapshot: Snapshot, seq: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        owners = owners_of(snapshot, self.copies)
        used = sorted(set(owners))
        if len(used) <= 1:
            return self.run(used[0] if used else _BASE, args, kwargs)
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()), None)
        if x is None:
            raise TypeError(f"{self.path}: a head that differs per row needs a tensor argument")
        if snapshot.kind == "tokens" and x.shape[0] != len(owners):
            return self._flat(owners, used, x)
        axis, per_row = 0, owners
        if snapshot.kind != "tokens":
            axis, per_row = _rows(snapshot, owners, x.shape, seq, self.path)
        return self._mixed(per_row, used, axis, x.device, args, kwargs)

    def _flat(self, owners: list[int], used: list[int], x: Tensor) -> Tensor:
        """A slot per token, tokens in several dimensions: as one list of rows, and back."""
        lead = x.shape if self.ids else x.shape[:-1]
        if not self.row_wise or lead.numel() != len(owners):
            raise ValueError(
                f"{self.path}: the selection has a slot for each of {len(owners)} tokens, this input has shape "
                f"{list(x.shape)}; select per sample"
            )
        rows = x.reshape(len(owners), *x.shape[len(lead) :])
        return self._mixed(owners, used, 0, x.device, (rows,), {}).unflatten(0, lead)

    def _mixed(
        self,
        owners: list[int],
        used: list[int],
        axis: int,
        device: torch.device,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """Each owner's head on its rows; then all rows together, in their order and of one width."""
        size, parts, order = len(owners), [], []
        for owner in used:
            rows = [i for i, o in enumerate(owners) if o == owner]
            index = torch.tensor(rows, device=device)

            def pick(value: Any, index: Tensor = index) -> Any:
                if isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == size:
                    return value.index_select(axis, index.to(value.device))
                return value

            if owner == _BASE:  # on all rows: a product over fewer rows may round differently
                out = self.run(owner, args, kwargs)
                if isinstance(out, Tensor):
                    out = out.index_select(_out_axis(out, size, axis), index.to(out.device))
            else:
                out = self.run(owner, tuple(map(pick, args)), {k: pick(v) for k, v in kwargs.items()})
            if not isinstance(out, Tensor):
                raise TypeError(
                    f"{self.path}: its forward returned {type(out).__name__}; heads per row return a Tensor"
                )
            parts.append(out)
            order += rows
        widths = [part.shape[-1] for part in parts]
        widest = max(widths)
        if 1 in widths and widest > 1:
            raise ValueError(
                f"{self.path}: this batch mixes a head of width 1 (regression) with one of width {widest} "
                "(classification), which cannot share an output"
            )
        parts = [F.pad(p, (0, widest - p.shape[-1]), value=-torch.inf) if p.shape[-1] < widest else p for p in parts]
        out_axis = _out_axis(parts[0], owners.count(used[0]), axis)
        joined = torch.cat(parts, out_axis)
        return joined.index_select(out_axis, torch.tensor(order, device=joined.device).argsort())


_SITES: weakref.WeakValueDictionary[int, HeadCopies] = weakref.WeakValueDictionary()
_sites = itertools.count(1)
LIBRARY.define(
    "run_heads(Tensor x, Tensor weight, Tensor? bias, Tensor? token, int handle, int site, int width) -> Tensor"
)


def _run_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor | None, handle: int, site: int, width: int
) -> Tensor:
    """The heads of a Linear in compiled code; ``width`` is -1 where they differ, so that the graph cannot know it."""
    copies = _SITES[site].copies

    def run(owner: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return F.linear(args[0], weight, bias) if owner == _BASE else copies[owner].forward(*args)

    task = BY_HANDLE[handle].task
    if task in copies:
        return run(task, (x,), {})  # type: ignore[no-any-return]
    snapshot, seq = snapshot_of(token, handle)
    return HeadRun("a head", copies, run, True)(snapshot, seq, (x,), {})  # type: ignore[no-any-return]


run_as_plain_python(_run_heads)


def _fake_heads(
    x: Tensor, weight: Tensor, bias: Tensor | None, token: Tensor | None, handle: int, site: int, width: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], torch.library.get_ctx().new_dynamic_size() if width < 0 else width))


LIBRARY.impl("run_heads", _run_heads, "CompositeExplicitAutograd")
torch.library.register_fake("lora_fuse::run_heads", _fake_heads, lib=LIBRARY)


def owners_of(snapshot: Snapshot, copies: Mapping[int, nn.Module]) -> list[int]:
    """Per entry (or token), the slot whose copy it uses, or -1 for the base model's module."""
    if snapshot.tokens is not None:
        return [slot if slot in copies else _BASE for slot in snapshot.tokens.tolist()]
    owners = [next((slot for slot, _ in entry if slot in copies), _BASE) for entry in snapshot.entries]
    return [owners[k] for k in snapshot.which]


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


def new_sites(planned: Plan) -> dict[str, HeadCopies]:
    """Empty copies for the modules that get heads for the first time."""
    return {path: HeadCopies(template_of(module)) for path, (module, _) in planned.new_heads.items()}


def template_of(module: nn.Module) -> nn.Module:
    """The module's structure and buffers, with no parameter set."""
    template = copy.deepcopy(module, {id(t): None for t in module.parameters()})
    template.__dict__.pop("forward", None)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        template.__dict__[hooks].clear()  # they run once, on the module itself
    return template


def _with_tensors(template: nn.Module, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the template that holds these tensors, in the dtype and on the device of ``like``'s."""
    module = copy.deepcopy(template)
    for name, tensor in tensors.items():
        owner_path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(owner_path)
        new = torch.empty(tensor.shape, dtype=like[name].dtype, device=like[name].device).copy_(tensor.detach())
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(new, requires_grad=False)
        else:
            owner._buffers[leaf] = new
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
        if tensor.dtype.is_floating_point and not all_finite(tensor):
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
                f"adapters and widths: {widths}"
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
