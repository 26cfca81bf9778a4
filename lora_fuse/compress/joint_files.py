"""A ``JointBank`` as two files: ``joint.safetensors`` and ``joint.json``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from lora_fuse.adapters._atomic import atomic_directory
from lora_fuse.adapters.files import read_safetensors, write_json, write_safetensors
from lora_fuse.adapters.joint_adapter import JointAdapter, JointBasis
from lora_fuse.adapters.sparse_adapter import fingerprint
from lora_fuse.adapters.sparse_files import check_tensors, read_fields
from lora_fuse.compress.joint import Form, JointBank, JointReport

JOINT_CONFIG, JOINT_WEIGHTS = "joint.json", "joint.safetensors"
_FORMAT, _VERSION = "lora_fuse.joint", 1
_FIELDS = {"form": str, "adapters": list, "nbytes_before": int, "checksums": dict}
_ADAPTER_FIELDS = {"name", "cluster", "source", "config", "errors"}


def save_joint(bank: JointBank, directory: str | os.PathLike[str]) -> None:
    """Write a bank; see ``JointBank.save_pretrained``."""
    tensors: dict[str, Tensor] = {}
    for path, basis in bank.bases.items():
        tensors[f"u/{path}"], tensors[f"v/{path}"] = basis.u, basis.v
    described = []
    for i, (name, adapter) in enumerate(bank.adapters.items()):  # names need not be fit for a file, so they are numbers
        adapter.check()
        if adapter.bases is not bank.bases:
            raise ValueError(f"adapters[{name!r}]: belongs to another bank")
        tensors.update({f"core/{i}/{path}": t for path, t in adapter.cores.items()})
        tensors.update({f"bias/{i}/{path}": t for path, t in adapter.lora_bias.items()})
        for path, module in adapter.modules_to_save.items():
            tensors.update({f"head/{i}/{path}/{leaf}": t for leaf, t in module.items()})
        info = {"name": name, "cluster": adapter.cluster, "source": adapter.source, "config": dict(adapter.config)}
        described.append({**info, "errors": dict(bank.report.errors.get(name, {}))})
    config = {
        "format": _FORMAT,
        "version": _VERSION,
        "form": bank.form,
        "adapters": described,
        "nbytes_before": bank.report.nbytes_before,
        "checksums": {key: fingerprint(t) for key, t in sorted(tensors.items())},
    }
    with atomic_directory(directory, last=JOINT_CONFIG) as stage:
        write_safetensors(stage / JOINT_WEIGHTS, tensors)
        write_json(stage / JOINT_CONFIG, config)


def load_joint(directory: str | os.PathLike[str], names: Iterable[str] | None = None) -> JointBank:
    """Read a bank, strictly.

    Args:
        directory: as ``JointBank.save_pretrained`` wrote it.
        names: which adapters to take; None: all.
    Returns:
        The same bank, bit for bit, with its report (of the adapters taken).
    Raises:
        ValueError: no such adapter (those there are get named); a file is missing, cut short, damaged or from a newer
            version; a tensor is missing, unknown or changed. The file and the offender are named.
    """
    folder = Path(directory).expanduser()
    path = folder / JOINT_CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: not a joint bank: there is no {JOINT_CONFIG} in it")
    config = read_fields(path, _FORMAT, _VERSION, _FIELDS)
    form: Form = config["form"]
    if form not in get_args(Form):
        raise ValueError(f"{path}: damaged: 'form' is {form!r}")
    for info in config["adapters"]:
        _check_info(path, info)
    known = [info["name"] for info in config["adapters"]]
    if len(set(known)) != len(known):
        raise ValueError(f"{path}: damaged: two adapters have one name")
    wanted = known if names is None else [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if lost := [name for name in wanted if name not in known]:
        raise ValueError(f"names: {folder} has no adapter {lost[0]!r}; it has {', '.join(map(repr, known))}")
    tensors, _ = read_safetensors(folder / JOINT_WEIGHTS)
    check_tensors(folder / JOINT_WEIGHTS, tensors, config["checksums"])
    bases = _bases(folder / JOINT_WEIGHTS, tensors)
    own: list[dict[str, dict[str, Tensor]]] = [{"core": {}, "bias": {}, "head": {}} for _ in known]
    for key, tensor in tensors.items():
        kind, number, rest = (*key.split("/", 2), "", "")[:3]
        if kind in ("u", "v"):
            continue
        if kind not in ("core", "bias", "head") or not number.isdecimal() or int(number) >= len(known) or not rest:
            raise ValueError(f"{folder / JOINT_WEIGHTS}: unknown tensor {key!r}")
        own[int(number)][kind][rest] = tensor
    adapters, errors = {}, {}
    for name in wanted:
        i = known.index(name)
        info, held = config["adapters"][i], own[i]
        heads: dict[str, dict[str, Tensor]] = {}
        for key, tensor in held["head"].items():
            module, _, leaf = key.rpartition("/")
            heads.setdefault(module, {})[leaf] = tensor
        source = f"{folder}[{name!r}]"
        adapter = JointAdapter(bases, info["cluster"], held["core"], held["bias"], heads, source, info["config"])
        adapter.check()
        adapters[name], errors[name] = adapter, {k: float(v) for k, v in info["errors"].items()}
    after = sum(b.nbytes for b in bases.values())
    after += sum(t.nbytes for a in adapters.values() for t in (*a.cores.values(), *a.lora_bias.values()))
    return JointBank(bases, adapters, form, JointReport(errors, config["nbytes_before"], after))


def _check_info(path: Path, info: Any) -> None:
    sound = (
        isinstance(info, dict)
        and info.keys() == _ADAPTER_FIELDS
        and all(isinstance(info[key], str) for key in ("name", "source"))
        and type(info["cluster"]) is int
        and all(isinstance(info[key], dict) for key in ("config", "errors"))
        and all(type(error) in (int, float) for error in info["errors"].values())
    )
    if not sound:
        raise ValueError(f"{path}: damaged: an adapter is described as {str(info)[:200]}")


def _bases(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, JointBasis]:
    bases = {}
    for key, u in tensors.items():
        if not key.startswith("u/"):
            continue
        v = tensors.get(f"v/{key[2:]}")
        if v is None or u.dim() != 3 or v.dim() != 3 or (u.shape[0], u.shape[2]) != (v.shape[0], v.shape[2]):
            raise ValueError(f"{path}: damaged: the bases of layer {key[2:]!r} do not fit each other")
        bases[key[2:]] = JointBasis(u, v)
    if lost := [key for key in tensors if key.startswith("v/") and key[2:] not in bases]:
        raise ValueError(f"{path}: damaged: {lost[0]!r} has no {'u' + lost[0][1:]!r}")
    return bases
