"""What learning a composition gives: weights per module, as an adapter, a selection, or an entry of a serving model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from lora_fuse.adapters.lora import LoraAdapter
from lora_fuse.merging.combine import merge
from lora_fuse.nn.attach import add_adapter, attach, remove_adapter
from lora_fuse.nn.attachment import attachment_of, unwrap

Per: TypeAlias = Literal["layer", "kind", "global"]


@dataclass(frozen=True)
class History:
    """How the training went.

    Args:
        loss: of every step's batch, before that step.
        validation: steps done -> mean loss over the validation batches; 0 is the uniform composition.
        step: how many steps the resulting weights have seen; fewer than ran where validation was better before.
        stopped_early: whether ``patience`` ended it.
    """

    loss: tuple[float, ...]
    validation: Mapping[int, float] = field(default_factory=dict)
    step: int = 0
    stopped_early: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Composition:
    """Frozen adapters with a weight each: ``delta = sum_n weights[path][n] * scaling_n * B_n A_n`` in every module.

    Args:
        weights: module path -> ``[num_adapters]``, on the CPU, not negative, summing to 1. An adapter that lacks the
            module adds nothing there; its entry is 0 unless the weight is shared with modules that it has.
        adapters: by name, in the order of ``weights``; without heads, which stay with their tasks.
        per: what shares one set of weights.
        history: losses.
        trained: module path -> its state dict, of the modules that were trained along (``trainable=``).
    """

    weights: Mapping[str, Tensor]
    adapters: Mapping[str, LoraAdapter]
    per: Per
    history: History
    trained: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def selection(self) -> dict[str, float]:
        """Adapter name -> weight, of ``per="global"``: an entry for ``use_adapters`` where these adapters are attached
        under these names, and weights for ``merge``. It does not carry ``trained`` along.

        Raises:
            ValueError: the weights differ by module.
        """
        if self.per != "global":
            raise ValueError(
                f"selection: the weights were learned per {self.per}, and a selection has one weight per adapter; use "
                "attach() or to_adapter(), or learn with per='global'"
            )
        return dict(zip(self.adapters, next(iter(self.weights.values())).tolist(), strict=True))

    def parts(self) -> dict[str, LoraAdapter]:
        """Each adapter with its weights as scalings, by name: their sum is the composition. Factors are not copied."""
        parts = {}
        for i, (name, adapter) in enumerate(self.adapters.items()):
            layers = {
                path: replace(layer, scaling=layer.scaling * float(self.weights[path][i]))
                for path, layer in adapter.layers.items()
            }
            parts[name] = replace(adapter, layers=layers)
        return parts

    def to_adapter(
        self, *, rank: int | None = None, energy: float | None = None, dtype: torch.dtype = torch.float32
    ) -> LoraAdapter:
        """The composition as one adapter: exact, its factors are those of all adapters side by side.

        Args:
            rank, energy: truncate every layer, optimally, as ``merge`` does.
            dtype: of the factors; ``trained`` modules keep theirs.
        Returns:
            A new adapter; modules that were trained along are its ``modules_to_save``.
        """
        # With weights 1 each a single adapter comes back as it is, config included, so no other case is needed.
        merged = merge(self.parts(), method="linear", rank=rank, energy=energy, dtype=dtype)
        named = ", ".join(self.adapters)
        return self._with_trained(replace(merged, source=f"learn_composition({named}, per={self.per!r})"))

    def attach(self, model: nn.Module, name: str) -> str | dict[str, float]:
        """Make the composition one more choice for the rows of a model, exactly and without touching its weights.

        It takes one slot if the slots' ``max_rank`` has room for all ranks together, else one for each adapter, called
        ``name/adapter``. A model without adapters gets slots now.

        Args:
            model: the one it was learned on, or a copy.
            name: must be new.
        Returns:
            The entry to select: ``lf.use_adapters(model, entry)``, or a list of entries, one per sample.
        Raises:
            ValueError: as ``add_adapter``, or too few free slots; nothing is changed.
        """
        merged = self.to_adapter()
        if "lora_attachment" not in unwrap(model).__dict__:
            attach(model, {name: merged})
            return name
        serving = attachment_of(model).serving
        if merged.rank <= serving.max_rank:
            add_adapter(model, name, merged)
            return name
        free = serving.num_slots - len(serving.published.leases)
        if free < len(self.adapters):
            raise ValueError(
                f"model: its slots hold rank {serving.max_rank} and {free} are free; {name!r} needs one of rank "
                f"{merged.rank} or {len(self.adapters)} of rank {max(a.rank for a in self.adapters.values())}: remove "
                "adapters, or attach with a larger max_rank or num_slots"
            )
        parts = {f"{name}/{adapter}": part for adapter, part in self.parts().items()}
        first = next(iter(parts))
        parts[first] = self._with_trained(parts[first])  # one head for all of them
        added: list[str] = []
        try:
            for key, part in parts.items():
                add_adapter(model, key, part)
                added.append(key)
        except BaseException:
            for key in added:
                remove_adapter(model, key)
            raise
        return dict.fromkeys(parts, 1.0)

    def _with_trained(self, adapter: LoraAdapter) -> LoraAdapter:
        heads = {path: dict(state) for path, state in self.trained.items()}
        config = {**adapter.config, "modules_to_save": sorted(heads) or None}
        return replace(adapter, modules_to_save=heads, config=config)

    def __repr__(self) -> str:
        mean = torch.stack([w.double() for w in self.weights.values()]).mean(0).tolist()
        shares = ", ".join(f"{name} {w:.2f}" for name, w in zip(self.adapters, mean, strict=True))
        along = f", trained {', '.join(self.trained)}" if self.trained else ""
        return (
            f"Composition(per {self.per}, {len(self.weights)} modules, mean weights: {shares}; "
            f"{self.history.step} steps{along})"
        )
