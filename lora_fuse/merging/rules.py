"""Methods that merge entry by entry, as rules, and how a rule is applied to one tensor of several task vectors.

Low-rank deltas (``merging.sparsify``) and whole models (``merging.full``) both come here, with a function that yields
a block of rows of a task vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from torch import Tensor

from lora_fuse.functional import topk_mask
from lora_fuse.merging.elementwise import (
    Divisor,
    MajoritySign,
    PackedMask,
    Stream,
    breadcrumbs_mask,
    disjoint_mean,
    keep_probabilities,
    votes,
)
from lora_fuse.merging.options import Options
from lora_fuse.merging.terms import by_name
from lora_fuse.ops.topk_call import matrix_shape

# (which task vector, first row, row after the last) -> [rows, cols], fp32 or fp64, which may be overwritten
Blocks: TypeAlias = Callable[[int, int, int], Tensor]
Number = TypeVar("Number", int, float)
_BLOCK = 1 << 20  # entries of all task vectors' blocks together: they stay in a cache


@dataclass(frozen=True)
class Rule:
    """What becomes of the entries.

    Attributes:
        keeps: which entries of each task vector take part: all, the largest, those below the largest ("middle"), a
            random draw, or a draw in which larger ones have better chances ("ranked").
        elects: whether a sign is elected and the rest averaged, or all is summed up.
        density: share that stays where the caller does not say; None: the caller has to.
    """

    keeps: Literal["all", "largest", "middle", "random", "ranked"]
    elects: bool = False
    density: float | None = None

    @property
    def takes(self) -> frozenset[str]:
        """The options that it understands."""
        names = {"scaling"}
        if self.keeps != "all":
            names.add("density")
        if self.elects:
            names |= {"majority_sign", "divisor"}
        if self.keeps == "largest":
            names.add("scope")
        if self.keeps == "middle":
            names.add("gamma")
        if self.keeps in ("random", "ranked"):
            names.add("seed")
        if self.keeps == "ranked":
            names.add("epsilon")
        return frozenset(names)


RULES: dict[str, Rule] = {
    "linear": Rule("all"),
    "uniform": Rule("all"),
    "ties": Rule("largest", elects=True, density=0.2),
    "magnitude_prune": Rule("largest"),
    "dare_linear": Rule("random", density=0.5),
    "dare_ties": Rule("random", elects=True, density=0.5),
    "breadcrumbs": Rule("middle", density=0.9),
    "breadcrumbs_ties": Rule("middle", elects=True, density=0.9),
    "della_linear": Rule("ranked", density=0.7),
    "della": Rule("ranked", elects=True, density=0.7),
}
_GAMMA, _EPSILON = 0.01, 0.07


@dataclass(frozen=True)
class Settings:
    """A rule with all its numbers, for task vectors that have keys.

    Attributes:
        densities: by key.
    """

    rule: Rule
    densities: Mapping[str, float]
    gamma: float = 0.0
    epsilon: float = 0.0
    majority_sign: MajoritySign = "total"
    divisor: Divisor = "count"
    if_zero: float = 1.0
    scope: Literal["tensor", "row", "global"] = "tensor"
    seed: int = 0
    scaling: float = 1.0

    def prunes(self, key: str) -> bool:
        """Whether it leaves entries of that task vector out."""
        return self.rule.keeps != "all" and (self.densities[key] < 1.0 or self.gamma > 0)


def settle(method: str, options: Options, keys: Sequence[str]) -> Settings:
    """The method's rule with the caller's numbers, or its own where there are none.

    Args:
        keys: of all task vectors that were given.
    Raises:
        ValueError: the density is missing or not one per task vector, or does not go with gamma or epsilon.
    """
    rule = RULES[method]
    if rule.keeps == "all":
        return Settings(rule, dict.fromkeys(keys, 1.0), scaling=_or(options.scaling, 1.0))
    given = options.density if options.density is not None else rule.density
    if given is None:
        raise ValueError(f"density: method {method!r} has no default; give the share of entries to keep, such as 0.2")
    densities = _by_key(given, keys)
    gamma = _or(options.gamma, _GAMMA) if rule.keeps == "middle" else 0.0
    epsilon = _or(options.epsilon, _EPSILON) if rule.keeps == "ranked" else 0.0
    for density in densities.values():
        if density + gamma > 1.0:
            raise ValueError(
                f"density, gamma: {density} of the entries cannot stay when the largest {gamma} are left out; "
                f"choose density <= {1 - gamma:g}, or gamma=0"
            )
        if density - epsilon <= 0.0 or density + epsilon > 1.0:
            raise ValueError(
                f"density, epsilon: chances from {density - epsilon:g} to {density + epsilon:g}, expected from above "
                f"0 to 1; choose epsilon <= {min(1 - density, density):g}"
            )
    return Settings(
        rule,
        densities,
        gamma,
        epsilon,
        options.majority_sign or "total",
        options.divisor or "count",
        1.0,
        options.scope or "tensor",
        _or(options.seed, 0),
        _or(options.scaling, 1.0),
    )


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _by_key(density: float | Mapping[str, float] | Sequence[float], keys: Sequence[str]) -> dict[str, float]:
    if isinstance(density, Mapping):
        given = by_name("density", density)
        if set(given) != set(keys):
            raise ValueError(f"density: a dict needs the names {sorted(keys)}, got {sorted(given)}")
        return {key: float(given[key]) for key in keys}
    if isinstance(density, Sequence):
        if len(density) != len(keys):
            raise ValueError(f"density: expected a number or {len(keys)} of them, got {len(density)}")
        return dict(zip(keys, map(float, density), strict=True))
    return dict.fromkeys(keys, float(density))


def choose(settings: Settings, key: str, x: Tensor, minus: Tensor | None = None) -> PackedMask | None:
    """Which entries of ``x - minus`` stay, where that takes a look at all of them; None where it does not.

    Args:
        x, minus: of any shape, seen as ``[shape[0], rest]``; one-dimensional ones as one row.
    """
    density = settings.densities[key]
    if not settings.prunes(key) or settings.rule.keeps not in ("largest", "middle"):
        return None
    if settings.rule.keeps == "middle":
        mask = breadcrumbs_mask(x, density, settings.gamma, minus)
    else:
        mask = topk_mask(x, density, "row" if settings.scope == "row" else "tensor", minus=minus)
    return PackedMask(mask.reshape(matrix_shape(x)))


@dataclass(frozen=True)
class Parts:
    """One tensor of several task vectors.

    Args:
        name: the tensor's; random draws hang on it and on the keys.
        shape: ``(rows, cols)``.
        keys, weights: the task vectors'.
        blocks: reads them.
        masks: what ``choose`` says about each.
    """

    name: str
    shape: tuple[int, int]
    keys: Sequence[str]
    weights: Sequence[float]
    blocks: Blocks
    masks: Sequence[PackedMask | None]

    def pruned(self, settings: Settings) -> Iterator[tuple[int, Iterator[Tensor]]]:
        """Pairs of a first row and a block of rows of each task vector, pruned; read on before the next pair."""
        rows, cols = self.shape
        drawn = settings.rule.keeps in ("random", "ranked")
        streams = [
            Stream(settings.seed, self.name, key) if drawn and settings.prunes(key) else None for key in self.keys
        ]
        step = max(1, _BLOCK // max(1, cols * len(self.keys)))
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            yield (
                start,
                (
                    _pruned(self.blocks(i, start, stop), start, mask, stream, settings.densities[key], settings.epsilon)
                    for i, (key, mask, stream) in enumerate(zip(self.keys, self.masks, streams, strict=True))
                ),
            )

    def merged(self, settings: Settings) -> Iterator[tuple[int, Tensor]]:
        """Pairs of a first row and the merged ``[rows, cols]`` block, in order; the blocks are new tensors."""
        for start, vectors in self.pruned(settings):
            if settings.rule.elects:
                total = disjoint_mean(
                    list(vectors), self.weights, settings.majority_sign, settings.divisor, settings.if_zero
                )
            else:
                total = next(vectors).mul_(self.weights[0])
                for x, w in zip(vectors, self.weights[1:], strict=True):
                    total.add_(x, alpha=w)
            yield start, total if settings.scaling == 1.0 else total.mul_(settings.scaling)

    def balance(self, settings: Settings) -> int:
        """How many entries get a positive sign, less those that get a negative one."""
        return sum(
            int(votes(list(vectors), self.weights, settings.majority_sign).sign_().sum())
            for _, vectors in self.pruned(settings)
        )


def _pruned(
    x: Tensor, start: int, mask: PackedMask | None, stream: Stream | None, density: float, epsilon: float
) -> Tensor:
    """``x`` in place, zero where an entry does not stay, the others made larger to keep the expectation of a draw."""
    rows, cols = x.shape
    if mask is not None:
        return x.mul_(mask.rows(start, start + rows))
    if stream is None:
        return x
    if epsilon == 0.0:
        return x.mul_(stream.keep(rows, cols, density)).div_(density)
    chances = keep_probabilities(x, density, epsilon)
    return x.mul_(stream.keep(rows, cols, chances)).div_(chances)
