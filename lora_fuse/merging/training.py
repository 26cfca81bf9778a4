"""Running a caller's loss on a model that must be found again as it was: frozen, in one mode, with seeds of its own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def check_batches(argument: str, batches: Any, reread: bool = True) -> None:
    """Refuse what cannot be iterated, and with ``reread`` what can be only once.

    Raises:
        TypeError: not iterable.
        ValueError: an iterator, or a container of length 0.
    """
    if not isinstance(batches, Iterable):
        raise TypeError(f"{argument}: expected an iterable of batches, got {type(batches).__name__}")
    if reread and iter(batches) is batches:
        raise ValueError(
            f"{argument}: an iterator can be read once, and these batches are read again and again; pass a list or a "
            "DataLoader"
        )
    if isinstance(batches, Sized) and len(batches) == 0:
        raise ValueError(f"{argument}: expected at least one batch, got none")


def cycle(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """Batches for ``steps`` steps, from the start again whenever they end.

    Raises:
        ValueError: there are none, or an iterator ended too early.
    """
    once = iter(batches) is batches
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            done += 1
            yield batch
        if done == before:
            raise ValueError("batches: expected at least one batch, got none")
        if once and done < steps:
            raise ValueError(
                f"batches: an iterator that ended after {done} of {steps} steps and cannot be read again; pass a list "
                f"or a DataLoader, or steps={done}"
            )


def scalar_loss(loss: Any, when: str) -> Tensor:
    """What ``loss_fn`` returned, checked.

    Args:
        when: "at step 3", for messages.
    Raises:
        TypeError: no tensor.
        ValueError: not a scalar, or not finite.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected a scalar tensor, got {type(loss).__name__} {when}")
    if loss.dim() != 0:
        raise ValueError(f"loss_fn: expected a scalar, got a tensor of shape {tuple(loss.shape)} {when}")
    if loss.is_complex():
        raise ValueError(f"loss_fn: expected a real scalar, got {loss.dtype} {when}")
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(f"loss_fn: expected a finite loss, got {float(loss.detach())} {when}")
    return loss


def mean_loss(loss_fn: Any, model: nn.Module, batches: Iterable[Any], argument: str, when: str) -> float:
    """Mean of the loss over all batches, without gradients.

    Raises:
        TypeError, ValueError: as ``scalar_loss``; or there are no batches.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            total += float(scalar_loss(loss_fn(model, batch), when))
            count += 1
    if not count:
        raise ValueError(f"{argument}: expected at least one batch, got none")
    return total / count


def find_modules(model: nn.Module, paths: Sequence[str], adapted: Iterable[str]) -> dict[str, nn.Module]:
    """The modules to train along, by path.

    Args:
        adapted: paths of the modules that adapters change; none may lie in what is trained along.
    Raises:
        TypeError: not a sequence of strings.
        ValueError: no such module, one without floating-point parameters, one that adapters change, one inside another.
    """
    if isinstance(paths, str) or not isinstance(paths, Sequence) or not all(isinstance(p, str) for p in paths):
        raise TypeError(f"trainable: expected a sequence of module paths, got {paths!r}")
    modules = dict(model.named_modules())
    found: dict[str, nn.Module] = {}
    for path in paths:
        if path not in modules or path == "":
            near = ", ".join(difflib.get_close_matches(path, modules, n=3)) or ", ".join([p for p in modules if p][:3])
            raise ValueError(f"trainable: the model has no module {path!r}; nearest: {near}")
        module = modules[path]
        inside = next((p for p in adapted if p == path or p.startswith(f"{path}.")), None)
        if inside is not None:
            raise ValueError(f"trainable: {path!r} has an adapted module, {inside!r}, whose weight stays frozen")
        outer = next((p for p in paths if p != path and path.startswith(f"{p}.")), None)
        if outer is not None:
            raise ValueError(f"trainable: {path!r} is inside {outer!r}, which is trained too")
        parameters = list(module.parameters())
        if not parameters or not all(p.is_floating_point() for p in parameters):
            kinds = sorted({str(p.dtype) for p in parameters}) or "no parameters"
            raise ValueError(f"trainable: {path!r} has {kinds}, expected floating-point parameters")
        found[path] = module
    return found


@contextmanager
def private_copies(modules: Mapping[str, nn.Module]) -> Iterator[list[nn.Parameter]]:
    """Put trainable copies in place of the modules' parameters until exit; the parameters themselves are not touched.

    A parameter that is shared inside these modules stays shared; one shared with the rest of the model does not.
    """
    copies: dict[int, nn.Parameter] = {}
    with ExitStack() as undo:
        for owner in [m for module in modules.values() for m in module.modules()]:
            for name, p in [*owner._parameters.items()]:
                if p is None or any(p is c for c in copies.values()):
                    continue
                if id(p) not in copies:
                    copies[id(p)] = nn.Parameter(p.detach().clone())
                undo.callback(owner._parameters.__setitem__, name, p)
                owner._parameters[name] = copies[id(p)]
        yield list(copies.values())


@contextmanager
def as_found(model: nn.Module, train_mode: bool, seed: int) -> Iterator[None]:
    """Freeze a model's parameters and set its mode and the seeds; afterwards all of that is as it was.

    Restored are ``requires_grad`` of every parameter, ``training`` of every module, torch's random states and, in train
    mode, buffers (running statistics). No ``grad`` is touched.
    """
    modules = list(model.modules())
    trained, modes = [p for p in model.parameters() if p.requires_grad], [m.training for m in modules]
    buffers = [(b, b.detach().clone()) for b in model.buffers()] if train_mode else []
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices), torch.enable_grad():
        try:
            torch.manual_seed(seed)
            for p in trained:
                p.requires_grad_(False)
            model.train(train_mode)
            yield
        finally:
            for p in trained:
                p.requires_grad_(True)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
