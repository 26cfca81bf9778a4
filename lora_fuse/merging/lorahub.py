"""``lorahub``: a weight per adapter, found without gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lora_fuse.merging.progress import track
from lora_fuse.merging.stacked import make_stack
from lora_fuse.merging.terms import check_number
from lora_fuse.merging.training import as_found, check_batches
from lora_fuse.nn.attachment import unwrap

_START_WIDTH = 0.5  # of the first samples; a third of LoraHub's bound


class HubWeights(dict[str, float]):
    """Adapter name -> weight: an entry for ``use_adapters``, weights for ``merge``.

    Attributes:
        objective: the smallest seen, which these weights gave.
        history: ``(weights in the adapters' order, objective)`` of every evaluation, in order.
    """

    def __init__(self, names: Sequence[str], history: Sequence[tuple[tuple[float, ...], float]]) -> None:
        best, self.objective = min(history, key=lambda seen: seen[1])
        super().__init__(zip(names, best, strict=True))
        self.history = tuple(history)


def lorahub(
    model: nn.Module,
    adapters: Any,
    loss_fn: Callable[[Any, Any], Tensor | float],
    batches: Iterable[Any],
    budget: int = 40,
    seed: int = 42,
    *,
    method: Literal["linear", "factor_average"] = "linear",
    bound: float = 1.5,
    penalty: float = 0.05,
    progress: bool = False,
) -> HubWeights:
    """Search weights for a sum of adapters: ``W + sum_n w_n * scaling_n * B_n A_n``, ``w_n`` in ``[-bound, bound]``.

    Minimises ``mean loss over batches + penalty * mean(|w|)`` from ``w = 0`` by CMA-ES, ``budget`` evaluations in all;
    the loss may be anything, an error count too. The model is as it was afterwards; no other thread may run it
    meanwhile. Heads of the adapters take no part.

    Args:
        model, adapters: as ``learn_composition`` takes them.
        loss_fn: ``loss_fn(model, batch)`` -> a scalar tensor or a number; runs the model, without gradients.
        batches: all are read in every evaluation; no iterator.
        budget: evaluations, the first at ``w = 0``.
        seed: of the search, and of torch's random state in ``loss_fn``.
        method: "linear", the sum of the products, or "factor_average", which adds A's and B's up apart as LoraHub does,
            with cross terms, and needs adapters of one rank; ``merge`` has both.
        bound: largest magnitude of a weight.
        penalty: of the mean magnitude.
        progress: show a bar on stderr.
    Returns:
        The best weights seen, by name: ``lf.merge(adapters, weights, method=method)`` makes one adapter of them; for
        "linear" they are a selection too, ``lf.use_adapters(model, weights)``.
    Raises:
        ImportError: pycma is not installed.
        TypeError, ValueError: as ``learn_composition``; a loss that is not finite at ``w = 0`` (elsewhere it
            counts as the worst).
    Source: Huang et al., LoraHub, arXiv:2307.13269; its implementation searches with nevergrad.
    """
    cma = _import_cma()
    for name, value, least in (("budget", budget, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: expected an integer from {least}, got {value!r}")
    if method not in ("linear", "factor_average"):
        raise ValueError(f"method: expected one of linear, factor_average, got {method!r}")
    check_number("bound", bound, "a positive finite number", lambda x: x > 0)
    check_number("penalty", penalty, "a finite number from 0", lambda x: x >= 0)
    check_batches("batches", batches)
    module = unwrap(model)
    history: list[tuple[tuple[float, ...], float]] = []
    with ExitStack() as undo:
        undo.enter_context(torch.inference_mode(False))
        stack = make_stack(module, adapters, "lorahub", apart=method == "factor_average")
        undo.enter_context(as_found(module, False, seed))
        undo.enter_context(torch.no_grad())
        undo.enter_context(stack.on())
        candidates = _Search(cma, len(stack.names), bound, seed)
        for _ in track(range(budget), "lorahub", progress):
            weights = candidates.ask()
            row = torch.tensor(weights, dtype=stack.dtype, device=stack.device)
            stack.set_weights(row.expand(len(stack.layers), -1))
            loss = _mean(loss_fn, model, batches)
            if not history and not math.isfinite(loss):
                raise ValueError(f"loss_fn: expected a finite loss, got {loss} with all weights 0")
            objective = loss + penalty * float(np.abs(weights).mean())
            objective = objective if math.isfinite(objective) else math.inf
            history.append((tuple(weights.tolist()), objective))
            candidates.tell(objective)
    return HubWeights(stack.names, history)


class _Search:
    """CMA-ES one candidate at a time; the first is 0.

    It needs two dimensions, so one adapter gets a second that nobody reads.
    """

    def __init__(self, cma: Any, dimensions: int, bound: float, seed: int) -> None:
        self.dimensions = dimensions
        generator = np.random.default_rng(seed)
        options = {
            "bounds": [-bound, bound],
            "randn": lambda *shape: generator.standard_normal(shape),
            "seed": np.nan,  # leaves numpy's global state alone
            "verbose": -9,
        }
        sigma = min(_START_WIDTH, bound / 3)
        self.strategy = cma.CMAEvolutionStrategy(np.zeros(max(2, dimensions)), sigma, options)
        self.asked: list[np.ndarray] = []
        self.told: list[float] = []
        self.started = False

    def ask(self) -> np.ndarray:
        """``[dimensions]``."""
        if not self.started:
            return np.zeros(self.dimensions)
        if len(self.told) == len(self.asked):
            if self.told:
                self.strategy.tell(self.asked, self.told)
            self.asked, self.told = self.strategy.ask(), []
        return self.asked[len(self.told)][: self.dimensions]

    def tell(self, objective: float) -> None:
        if self.started:
            self.told.append(min(objective, 1e300))  # CMA-ES ranks, so how bad the worst are does not matter
        self.started = True


def _import_cma() -> Any:
    try:
        import cma
    except ImportError as error:
        raise ImportError("lorahub searches with pycma: pip install 'lora-fuse[lorahub]'") from error
    return cma


def _mean(loss_fn: Callable[[Any, Any], Tensor | float], model: nn.Module, batches: Iterable[Any]) -> float:
    losses = []
    for batch in batches:
        loss = loss_fn(model, batch)
        if isinstance(loss, Tensor):
            if loss.numel() != 1:
                raise ValueError(f"loss_fn: expected a scalar, got a tensor of shape {tuple(loss.shape)}")
        elif isinstance(loss, bool) or not isinstance(loss, (int, float, np.number)):
            raise TypeError(f"loss_fn: expected a scalar tensor or a number, got {type(loss).__name__}")
        losses.append(float(loss))
    if not losses:
        raise ValueError("batches: expected at least one batch, got none")
    return sum(losses) / len(losses)
