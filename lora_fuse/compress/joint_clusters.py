"""Which adapters share bases: clusters by what the bases of each would lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_fuse.compress.joint_als import JointFit, Products, errors_under
from lora_fuse.merging.progress import track

_ROUNDS = 10
_SWEEPS = 15  # of a fit between two assignments


def assign(
    count: int,
    layers: Sequence[tuple[Products, Tensor]],
    num_clusters: int,
    rank: int,
    fit: Callable[..., JointFit],
    seed: int,
    progress: bool = False,
) -> Tensor:
    """``[count]`` int64, a cluster per adapter: each where its squared errors, summed over the layers, are least.

    k-means with bases in the place of means: fit every cluster, move every adapter to the cluster that loses least of
    it, until nothing moves. The start is k-means++ on how the adapters use bases that all share. No cluster is empty.

    Args:
        layers: products of norm 1, and which adapters they are of.
        fit: ``fit_full`` or ``fit_diagonal``.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = _start(_features(count, layers, rank, fit, seed), num_clusters, generator)
    for _ in track(range(_ROUNDS), "clusters", progress):
        lost = torch.zeros(count, num_clusters, dtype=torch.float64)
        for products, members in layers:
            inner = min(rank, products.b.shape[1], products.a.shape[2])
            for cluster in range(num_clusters):
                chosen = (labels[members] == cluster).nonzero().flatten()
                if len(chosen):
                    fitted = fit(products.chosen(chosen), inner, seed, sweeps=_SWEEPS)
                    lost[members, cluster] += errors_under(products, fitted)
                else:  # no member has this layer: as if nothing of it were kept
                    lost[members, cluster] += 1.0
        moved = _fill(lost.argmin(1), lost, num_clusters)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _fill(labels: Tensor, lost: Tensor, num_clusters: int) -> Tensor:
    """An empty cluster takes the adapter that its own bases serve worst, from a cluster that can spare it."""
    labels = labels.clone()
    for cluster in range(num_clusters):
        counts = torch.bincount(labels, minlength=num_clusters)
        if counts[cluster]:
            continue
        own = lost.gather(1, labels[:, None]).squeeze(1)
        labels[int(torch.where(counts[labels] > 1, own, -1.0).argmax())] = cluster
    return labels


def _features(
    count: int, layers: Sequence[tuple[Products, Tensor]], rank: int, fit: Callable[..., JointFit], seed: int
) -> Tensor:
    """``[count, features]``: which directions of shared bases each adapter uses, whatever its sign."""
    blocks = []
    for products, members in layers:
        inner = min(rank, products.b.shape[1], products.a.shape[2])
        cores = fit(products, inner, seed, sweeps=_SWEEPS).cores
        used = cores.square() if cores.dim() == 2 else torch.cat([cores @ cores.mT, cores.mT @ cores], 1)
        block = torch.zeros(count, used[0].numel())
        block[members] = torch.nn.functional.normalize(used.flatten(1), dim=1)
        blocks.append(block)
    return torch.cat(blocks, 1)


def _start(features: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centre drawn by its squared distance from those there are."""
    centres = [int(torch.randint(len(features), (1,), generator=generator))]
    while len(centres) < num_clusters:
        distance = torch.cdist(features, features[centres]).amin(1).square().double()
        distance[centres] = 0
        if float(distance.sum()) <= 0:  # all alike: any will do
            distance = torch.ones_like(distance)
            distance[centres] = 0
        centres.append(int(torch.multinomial(distance, 1, generator=generator)))
    labels = torch.cdist(features, features[centres]).argmin(1)
    labels[centres] = torch.arange(num_clusters)
    return labels
