"""The LoRA kernels of vLLM and SGLang, unchanged, from their unpacked wheels, with torch and Triton alone.

Single files of both packages are imported without the servers around them: stand-ins take the place of their loggers,
flags and op registries while they load. ``LORA_FUSE_RIVALS`` names the folder that holds ``vllm/`` and ``sglang/``;
where it is not set, installed packages are used. Known to work: vllm 0.33.0, sglang 0.5.23.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import sys
import types
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HOW = {
    "vllm": "pip download --no-deps vllm==0.33.0 && unzip -q vllm-*.whl 'vllm/lora/*' -d FOLDER (336 MB, 0.6 MB kept)",
    "sglang": "pip download --no-deps sglang==0.5.23 && unzip -q sglang-*.whl 'sglang/kernels/ops/lora/*' "
    "'sglang/srt/lora/*' -d FOLDER (39 MB, 2.5 MB kept)",
}


def where(package: str) -> Path | None:
    """The folder that holds ``package``, or None."""
    if given := os.environ.get("LORA_FUSE_RIVALS"):
        return Path(given) if (Path(given) / package / "lora").is_dir() or (Path(given) / package).is_dir() else None
    found = importlib.util.find_spec(package)
    return Path(found.origin).parent.parent if found is not None and found.origin else None


def missing() -> list[str]:
    """A line for each rival that is not at hand: how to get it."""
    return [f"{name} is not at hand: {how}; LORA_FUSE_RIVALS=FOLDER" for name, how in HOW.items() if not where(name)]


@contextlib.contextmanager
def _planted(*tops: str) -> Iterator[Any]:
    """A function that plants modules; everything under ``tops`` is forgotten again afterwards.

    Whoever asks later whether these packages are installed gets the truth; what was loaded keeps what it imported.
    """
    before = {name: m for name, m in sys.modules.items() if name.partition(".")[0] in tops}
    for name in before:
        del sys.modules[name]

    def plant(name: str, path: Path | None = None, **attributes: Any) -> None:
        module = types.ModuleType(name)
        if path is not None:
            module.__path__ = [os.fspath(path)]  # a package whose own __init__ never runs
        module.__dict__.update(attributes)
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)

    try:
        yield plant
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]
        sys.modules.update(before)


class _Silent:
    """A logger."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _Anything:
    """A class that is named in annotations only."""


def _refuse(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("a part of a server that is not loaded")


@cache
def vllm() -> SimpleNamespace | None:
    """``lora_shrink``, ``lora_expand``, ``LoRAKernelMeta`` and ``configure(shrink, expand)``; None if not at hand."""
    root = where("vllm")
    if root is None:
        return None
    import triton
    import triton.language as tl

    capability = (-1, 0) if not torch.cuda.is_available() else torch.cuda.get_device_capability()

    class Platform:
        def is_cuda(self) -> bool:
            return torch.cuda.is_available()

        def has_device_capability(self, at_least: int) -> bool:
            return capability[0] * 10 + capability[1] >= at_least

        def is_device_capability(self, exactly: int) -> bool:
            return capability[0] * 10 + capability[1] == exactly

    def no_registry(**kwargs: Any) -> None:  # their files then fall back to the plain launchers
        raise AttributeError

    def to_device(data: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype, device=device)

    at, flags = root / "vllm", {"VLLM_BATCH_INVARIANT": False, "VLLM_TUNED_CONFIG_FOLDER": None}
    flags |= {"VLLM_LORA_DISABLE_PDL": False, "VLLM_LORA_ENABLE_DUAL_STREAM": False}
    with _planted("vllm") as plant:
        plant("vllm", at)
        plant("vllm.envs", **flags)
        plant("vllm.logger", init_logger=lambda name: _Silent())
        plant("vllm.platforms", current_platform=Platform())
        plant("vllm.utils", at / "utils")
        plant("vllm.utils.math_utils", next_power_of_2=triton.next_power_of_2)
        plant("vllm.utils.torch_utils", async_tensor_h2d=to_device, direct_register_custom_op=no_registry)
        plant("vllm.triton_utils", tl=tl, triton=triton)
        for name in ("lora", "lora.ops", "lora.ops.triton_ops"):
            plant(f"vllm.{name}", at.joinpath(*name.split(".")))
        ops = "vllm.lora.ops.triton_ops."
        shrink = importlib.import_module(ops + "lora_shrink_op")
        expand = importlib.import_module(ops + "lora_expand_op")
        meta = importlib.import_module(ops + "lora_kernel_metadata")
        utils = importlib.import_module(ops + "utils")

    def configure(shrink_config: dict[str, int] | None, expand_config: dict[str, int] | None) -> None:
        """As a file of tuned configurations would; None: the default."""
        for module, given in ((shrink, shrink_config), (expand, expand_config)):
            module.get_lora_op_configs = utils.get_lora_op_configs if given is None else lambda *a, g=given, **k: g

    def forget() -> None:
        """Its tables of pointers, which would hold on to weights and mistake new ones for them."""
        utils._LORA_A_PTR_DICT.clear(), utils._LORA_B_PTR_DICT.clear()

    return SimpleNamespace(
        lora_shrink=shrink.lora_shrink,
        lora_expand=expand.lora_expand,
        LoRAKernelMeta=meta.LoRAKernelMeta,
        configure=configure,
        forget=forget,
    )


class _Struct:
    """msgspec's, as far as route views need it."""

    def __init_subclass__(cls, **options: Any) -> None:
        pass

    def __init__(self, **given: Any) -> None:
        defaults = {n: v for n, v in vars(type(self)).items() if not n.startswith("__") and v is None}
        self.__dict__.update({**defaults, **given})


class _Flag:
    def get(self) -> Any:
        return None

    def is_set(self) -> bool:
        return False


class _Flags:
    """SGLang's environment: nothing is set."""

    def __getattr__(self, name: str) -> _Flag:
        return _Flag()


class _Refusing(types.ModuleType):
    """A module of which any name may be imported and none called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _refuse


@cache
def sglang() -> SimpleNamespace | None:
    """Kernels of the backends triton, csgmv and triton_v2, and the latter's runner; None if not at hand."""
    root = where("sglang")
    if root is None:
        return None
    at = root / "sglang"
    packages = ("kernels", "kernels.ops", "kernels.ops.lora", "kernels.ops.lora.dense", "kernels.ops.lora.common")
    packages += ("kernels.ops.lora.moe", "kernels.ops.moe", "srt", "srt.lora", "srt.lora.dense", "srt.model_executor")
    with _planted("sglang", "msgspec", "pydantic") as plant:
        plant("sglang", at)
        for name in packages:
            plant(f"sglang.{name}", at.joinpath(*name.split(".")))
        plant("msgspec", Struct=_Struct)
        plain = {"Field": lambda **k: None, "ConfigDict": dict, "model_validator": lambda **k: lambda f: f}
        plant("pydantic", BaseModel=_Anything, **plain)  # plans are read by ``plan_table``
        plant("sglang.srt.environ", envs=_Flags())
        name_of = torch.cuda.get_device_name if torch.cuda.is_available() else lambda: "cpu"
        uncached = {"cached_triton_kernel": lambda key=None: lambda kernel: kernel}  # a cache of the host's work
        plant("sglang.srt.utils", at / "srt" / "utils", get_device_name=name_of, **uncached)
        plant("sglang.srt.utils.common", direct_register_custom_op=lambda *args, **kwargs: None)
        plant("sglang.srt.utils.hf_transformers_utils", AutoConfig=_Anything)
        plant("sglang.srt.model_executor.forward_batch_info", ForwardBatch=_Anything)
        sys.modules["sglang.kernels.ops.moe.moe_align"] = _Refusing("sglang.kernels.ops.moe.moe_align")
        dense, load = "sglang.kernels.ops.lora.dense.", importlib.import_module
        runner, plans = load("sglang.srt.lora.dense.runner"), load("sglang.srt.lora.dense.plan")
        utils, views = load("sglang.srt.lora.utils"), load("sglang.kernels.ops.lora.common.route_view")
        made = SimpleNamespace(
            LoRABatchInfo=utils.LoRABatchInfo,
            Phase=utils.Phase,
            RouteView=views.RouteView,
            RouteViewKind=views.RouteViewKind,
            LoraWorkspace=load("sglang.srt.lora.workspace").LoraWorkspace,
            DenseLoraRunner=runner.DenseLoraRunner,
            plans=plans,
            sgemm_lora_a_fwd=load(dense + "sgemm_lora_a").sgemm_lora_a_fwd,
            sgemm_lora_b_fwd=load(dense + "sgemm_lora_b").sgemm_lora_b_fwd,
            qkv_lora_b_fwd=load(dense + "qkv_lora_b").qkv_lora_b_fwd,
            gate_up_lora_b_fwd=load(dense + "gate_up_lora_b").gate_up_lora_b_fwd,
            csgmv_shrink=load(dense + "chunked_sgmv_shrink").chunked_sgmv_lora_shrink_forward,
            csgmv_expand=load(dense + "chunked_sgmv_expand").chunked_sgmv_lora_expand_forward,
        )
        geometry = load("sglang.kernels.ops.lora.common.lora_b").SliceGeometry
    runner.load_plans = lambda architecture: None
    if not torch.cuda.is_available():
        runner.slice_geometry = partial(_geometry_in_interpreter, geometry)
    major = torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 9
    table = at / "srt/lora/dense/configs" / f"{utils.architecture_for_capability(major)}.plans.json"
    made.plan_rows = json.loads(table.read_text())["rows"] if table.exists() else []
    return made


def _geometry_in_interpreter(made: Any, offsets: tuple[int, ...], block: int, device: torch.device) -> Any:
    """Where each slice's columns lie; triton_v2's own function takes CUDA devices only."""
    widths = [end - start for start, end in itertools.pairwise(offsets)]
    uniform = widths[0] if len(set(widths)) == 1 else 0
    return made(
        slice_offsets=torch.tensor(offsets, dtype=torch.int32, device=device),
        out_offsets=torch.tensor(offsets[:-1], dtype=torch.int32, device=device),
        num_slices=len(widths),
        num_column_tiles=sum(-(-width // block) for width in widths),
        uniform_width=uniform,
        out_stride=uniform,
        full_tiles=all(width % block == 0 for width in widths),
        block_size_n=block,
    )


def v2_plan(sglang: SimpleNamespace, phase: Any, tokens: int, rank: int, in_features: int, out_features: int) -> Any:
    """The first row of triton_v2's table that fits an adapted linear layer, else its defaults."""
    plans, sizes = (
        sglang.plans,
        {"tokens": tokens, "rank": rank, "in_features": in_features, "out_features": out_features},
    )

    def fits(row: dict[str, Any]) -> bool:
        if row.get("phase", phase.value) != phase.value or "linear" not in (row.get("kinds") or ["linear"]):
            return False
        low = all(row.get(f"min_{n}") is None or size >= row[f"min_{n}"] for n, size in sizes.items())
        return low and all(row.get(f"max_{n}") is None or size <= row[f"max_{n}"] for n, size in sizes.items())

    for row in sglang.plan_rows:
        if fits(row):
            enums = {"a_family": plans.AFamily, "b_family": plans.BFamily, "overlap": plans.Overlap}
            return plans.DensePlan(**{n: enums[n](v) if n in enums else v for n, v in row.get("spec", {}).items()})
    return plans._decode_default() if phase is sglang.Phase.DECODE else plans._prefill_default()
