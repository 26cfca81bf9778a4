"""What a user would otherwise run for the LoRA part of a mixed batch, each as its users run it.

Every rival adds ``scaling * B (A x)`` into ``out`` for rows that each name one adapter. Like our routing, what depends
only on the rows' adapters is prepared once (``Plan``) and not timed: a model shares it between its layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


class Plan:
    """A batch's adapters in every form that a rival may want. ``slots``: a slot per row."""

    def __init__(self, slots: Sequence[int]) -> None:
        self.index = torch.tensor(slots)
        self.names = [str(s) for s in slots]
        self.by_slot = [(s, (self.index == s).nonzero().flatten()) for s in sorted(set(slots))]


Rival = Callable[[Tensor, Tensor, Plan], Tensor]


def mm_loop(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Rival:
    """Per adapter: index its rows, two matmuls, scatter-add. ``lora_a [n, r, in]``, ``lora_b [n, out, r]``."""

    def run(out: Tensor, x: Tensor, plan: Plan) -> Tensor:
        if len(plan.by_slot) == 1:
            slot = plan.by_slot[0][0]
            return out.add_((x @ lora_a[slot].t()) @ lora_b[slot].t(), alpha=scaling)
        for slot, rows in plan.by_slot:
            out.index_add_(0, rows, (x[rows] @ lora_a[slot].t()) @ lora_b[slot].t(), alpha=scaling)
        return out

    return run


def gathered_bmm(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Rival:
    """Gather every row's factors, two batched matmuls."""

    def run(out: Tensor, x: Tensor, plan: Plan) -> Tensor:
        h = torch.bmm(lora_a[plan.index], x.unsqueeze(2))  # [rows, r, 1]
        return out.add_(torch.bmm(lora_b[plan.index], h).squeeze(2), alpha=scaling)

    return run


def vllm_cpu(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Rival:
    """The formula of vLLM's CPU path: gathered factors, cast to the intermediate's dtype, einsum, fp32 between."""

    def run(out: Tensor, x: Tensor, plan: Plan) -> Tensor:
        h = torch.einsum("bi,boi->bo", x.float(), lora_a[plan.index].float()) * scaling
        return out.add_(torch.einsum("bi,boi->bo", h, lora_b[plan.index].float()).to(out.dtype))

    return run


def peft_layer(lora_a: Tensor, lora_b: Tensor, scaling: float) -> tuple[nn.Module, nn.Module]:
    """A PEFT LoRA layer whose adapters share the given factors, and the stand-in for its base layer.

    The stand-in returns its ``out`` attribute, so that a call costs PEFT's mixed batch and nothing else.
    """
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    num, rank, in_features = lora_a.shape
    out_features = lora_b.shape[1]

    class Given(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1, bias=False)
            self.in_features, self.out_features, self.out = in_features, out_features, torch.empty(0)
            one = torch.zeros(1, 1, dtype=lora_a.dtype)  # never read: forward hands out what it was given
            self.weight = nn.Parameter(one.expand(out_features, in_features), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.out

    given = Given()
    config = LoraConfig(r=rank, lora_alpha=scaling * rank)
    layer = Linear(given, "0", config=config, r=rank, lora_alpha=scaling * rank)
    for slot in range(num):
        if slot:
            layer.update_layer(str(slot), rank, lora_alpha=scaling * rank, config=config)
        layer.lora_A[str(slot)].weight = nn.Parameter(lora_a[slot], requires_grad=False)
        layer.lora_B[str(slot)].weight = nn.Parameter(lora_b[slot], requires_grad=False)
    return layer.eval(), given


def peft_mixed_batch(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Rival:
    """PEFT's ``adapter_names=[...]`` forward, its base layer free of charge."""
    layer, given = peft_layer(lora_a, lora_b, scaling)

    def run(out: Tensor, x: Tensor, plan: Plan) -> Tensor:
        given.out = out
        return layer(x, adapter_names=plan.names)

    return run


RIVALS: dict[str, Callable[[Tensor, Tensor, float], Rival]] = {
    "peft": peft_mixed_batch,
    "mm loop": mm_loop,
    "bmm": gathered_bmm,
    "vllm cpu": vllm_cpu,
}
