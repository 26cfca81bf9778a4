"""``learn_composition``: a weight per frozen adapter and layer, trained by softmax on a loss of the caller's."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lora_fuse.merging.composition import Composition, History, Per
from lora_fuse.merging.progress import track
from lora_fuse.merging.stacked import Stack, make_stack
from lora_fuse.merging.terms import check_number
from lora_fuse.merging.training import (
    as_found,
    check_batches,
    cycle,
    find_modules,
    mean_loss,
    private_copies,
    scalar_loss,
)
from lora_fuse.nn.attachment import unwrap

LossFn = Callable[[Any, Any], Tensor]


def learn_composition(
    model: nn.Module,
    adapters: Any,
    loss_fn: LossFn,
    batches: Iterable[Any],
    per: Per = "layer",
    steps: int = 100,
    lr: float = 1e-2,
    seed: int = 0,
    *,
    trainable: Sequence[str] = (),
    trainable_lr: float | None = None,
    weight_decay: float = 0.0,
    validation: Iterable[Any] | None = None,
    evaluate_every: int = 10,
    patience: int | None = None,
    train_mode: bool = False,
    progress: bool = False,
) -> Composition:
    """Learn how to add frozen adapters up: ``W + sum_n softmax(v)_n * scaling_n * B_n A_n``, only ``v`` is trained.

    ``v`` starts at 0, the uniform composition. All adapters of a layer run as one stacked product, so a step costs
    about a forward and a backward to the model's inputs; no gradient of a weight matrix is formed, nor anything of its
    shape. The model is as it was afterwards, also after an exception: modules, parameters and their ``grad`` and
    ``requires_grad``, mode, hooks, random states. No other thread may run it meanwhile. Heads of the adapters
    (``modules_to_save``) take no part: the model uses its own.

    Which weights are shared is up to ``per``. A softmax runs over the adapters that have any of the modules sharing it,
    and an adapter adds nothing in a module that it lacks.

    Args:
        model: holds the base weights. Adapters attached to it take no part, unless ``loss_fn`` selects them.
        adapters: name -> ``LoraAdapter`` or where one lies; for Linear, Conv1D, Conv2d and Embedding, of any ranks and
            scalings, rsLoRA and ``lora_bias`` included.
        loss_fn: ``loss_fn(model, batch)`` -> scalar tensor; runs the model under autograd.
        batches: one per step, from the start again when they end. An iterator has to last for all steps.
        per: "layer" (a set of weights per module), "kind" (modules whose paths differ in numbers alone share one) or
            "global" (one set).
        steps: Adam steps.
        lr: of ``v``; a step moves each entry by at most about this.
        seed: of torch's random state in ``loss_fn`` and ``batches`` (shuffling, dropout).
        trainable: paths of modules to train along, such as a classifier; trained on copies and returned in
            ``trained``, the model keeps its own.
        trainable_lr: for those; default ``lr``.
        weight_decay: AdamW's, for all that is trained; on ``v`` it pulls towards uniform.
        validation: batches read every ``evaluate_every`` steps (in eval mode); the result is the best of what they saw,
            the start included.
        evaluate_every: steps.
        patience: stop after this many evaluations in a row without a new best; without ``validation``, an evaluation
            is the mean training loss since the last one.
        train_mode: train with the modules in train mode (dropout) instead of eval mode.
        progress: show a bar on stderr.
    Returns:
        A ``Composition``: ``weights``, ``to_adapter()``, ``attach()``, ``selection``, ``trained``, ``history``.
    Raises:
        TypeError, ValueError: an argument is out of range; an adapter does not fit the model, or is DoRA or replaces
            biases or token rows; ``batches`` ended too early; the loss is not a finite scalar or does not depend on the
            weights.
    Source: Asadi et al., arXiv:2402.15414, learned composition.
    """
    _check(per, steps, lr, seed, trainable_lr, weight_decay, evaluate_every, patience)
    check_batches("batches", batches, reread=False)
    if validation is not None:
        check_batches("validation", validation)
    module = unwrap(model)
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        stack = make_stack(module, adapters, "learn_composition")
        along = find_modules(module, trainable, stack.layers)
        weights = _SharedWeights(stack, per)
        undo.enter_context(as_found(module, train_mode, seed))
        extra = undo.enter_context(private_copies(along))
        undo.enter_context(stack.on())
        groups: list[dict[str, Any]] = [{"params": [weights.logits]}]
        if extra:
            groups.append({"params": extra, "lr": lr if trainable_lr is None else trainable_lr})
        optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        history = _train(
            model, weights, extra, optimizer, loss_fn, batches, steps, validation, evaluate_every, patience, progress
        )
        found = weights().detach().cpu()
        trained = {path: {k: t.detach().clone() for k, t in m.state_dict().items()} for path, m in along.items()}
        if not bool(torch.isfinite(found).all()):
            raise ValueError(f"lr: the weights are no longer finite after {history.step} steps; choose less than {lr}")
        by_path = {path: found[i].clone() for i, path in enumerate(stack.layers)}
    return Composition(by_path, stack.adapters, per, history, trained)


class _SharedWeights:
    """``v`` for every set of weights, and the way from there to every layer's."""

    def __init__(self, stack: Stack, per: Per) -> None:
        keys = [path if per == "layer" else _kind(path) if per == "kind" else "" for path in stack.layers]
        order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        self.stack = stack
        self.group = torch.tensor([order[key] for key in keys], device=stack.device)  # [num_layers]
        present = torch.zeros(len(order), len(stack.names), device=stack.device)
        self.absent = present.index_add_(0, self.group, stack.present.to(present)) == 0  # [num_groups, num_adapters]
        self.logits = nn.Parameter(torch.zeros(present.shape, dtype=stack.dtype, device=stack.device))

    def __call__(self) -> Tensor:
        """``[num_layers, num_adapters]``."""
        return torch.softmax(self.logits.masked_fill(self.absent, -math.inf), 1)[self.group]

    def use(self) -> None:
        self.stack.set_weights(self())


def _kind(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _train(
    model: nn.Module,
    weights: _SharedWeights,
    extra: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batches: Iterable[Any],
    steps: int,
    validation: Iterable[Any] | None,
    evaluate_every: int,
    patience: int | None,
    progress: bool,
) -> History:
    """Leaves the resulting values in ``weights.logits`` and ``extra``."""
    held = [weights.logits, *extra]
    losses: list[float] = []
    scores: dict[int, float] = {}
    best = (math.inf, 0, [p.detach().clone() for p in held])
    waited = 0

    def evaluate(done: int) -> None:
        nonlocal best, waited
        if validation is None:
            score = sum(losses[-evaluate_every:]) / evaluate_every
        else:
            score = scores[done] = _validate(model, weights, loss_fn, validation, done)
        if score < best[0]:
            best, waited = (score, done, [p.detach().clone() for p in held]), 0
        else:
            waited += 1

    if validation is not None:
        evaluate(0)
    stopped = False
    stream = cycle(batches, steps)
    for step in track(range(steps), "learn_composition", progress):
        batch = next(stream)
        weights.use()
        loss = scalar_loss(loss_fn(model, batch), f"at step {step}")
        optimizer.zero_grad(set_to_none=True)
        if loss.requires_grad:
            loss.backward()
        if weights.logits.grad is None:
            raise ValueError(
                "loss_fn: the loss does not depend on the weights: no adapted module ran under autograd (was it "
                "computed under no_grad, detached, or by another model than the one handed over?)"
            )
        optimizer.step()
        losses.append(float(loss.detach()))
        done = step + 1
        if done % evaluate_every == 0 or (done == steps and validation is not None):
            evaluate(done)
        if patience is not None and waited >= patience:
            stopped = True
            break
    done = len(losses)
    if validation is not None and best[1] != done:
        done = best[1]
        with torch.no_grad():
            for p, value in zip(held, best[2], strict=True):
                p.copy_(value)
    return History(tuple(losses), scores, done, stopped)


def _validate(
    model: nn.Module, weights: _SharedWeights, loss_fn: LossFn, validation: Iterable[Any], done: int
) -> float:
    training = model.training
    model.eval()
    with torch.no_grad():
        weights.use()
    score = mean_loss(loss_fn, model, validation, "validation", f"in the validation after {done} steps")
    if training:
        model.train()
    return score


def _check(
    per: str,
    steps: int,
    lr: float,
    seed: int,
    trainable_lr: float | None,
    weight_decay: float,
    evaluate_every: int,
    patience: int | None,
) -> None:
    if per not in get_args(Per):
        raise ValueError(f"per: expected one of {', '.join(get_args(Per))}, got {per!r}")
    for name, number, least in (
        ("steps", steps, 1),
        ("seed", seed, 0),
        ("evaluate_every", evaluate_every, 1),
        ("patience", 1 if patience is None else patience, 1),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < least:
            raise ValueError(f"{name}: expected an integer from {least}, got {number!r}")
    for name, value in (("lr", lr), ("trainable_lr", lr if trainable_lr is None else trainable_lr)):
        check_number(name, value, "a positive finite number", lambda x: x > 0)
    check_number("weight_decay", weight_decay, "a finite number from 0", lambda x: x >= 0)
