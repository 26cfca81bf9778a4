"""The places an adapter may come from, opened: tensors, config if there is one, header strings."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_fuse.adapters.files import (
    CONFIG_NAME,
    DIFFUSERS_NAME,
    PICKLE_SUFFIXES,
    WEIGHTS_NAME,
    read_json,
    read_safetensors,
    refuse_pickle,
)
from lora_fuse.adapters.peft import model_path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Opened:
    """An adapter's parts, unchecked.

    Args:
        tensors: key -> tensor.
        name: the source, for messages.
        config: the adapter config, or None if there is none.
        header: strings from a safetensors header.
        adapter_name: which adapter to take from keys that hold the names of several; None if that is settled.
        scalings: module path -> scaling in use, for a live model.
    """

    tensors: Mapping[str, Tensor]
    name: str
    config: Mapping[str, Any] | None = None
    header: Mapping[str, str] = field(default_factory=dict)
    adapter_name: str | None = None
    scalings: Mapping[str, float] = field(default_factory=dict)


def open_mapping(source: Mapping[str, Tensor], adapter_name: str | None) -> Opened:
    bad = next((key for key in source if not isinstance(key, str)), None)
    if bad is not None:
        raise TypeError(f"source: expected a state dict with string keys, got a key {bad!r}")
    return Opened(source, "<state dict>", adapter_name=adapter_name)


def open_model(model: nn.Module, adapter_name: str | None) -> Opened:
    """A model with PEFT adapters in it; PEFT has been imported already if there is one.

    Raises:
        ValueError: no adapters, no such adapter, or several active ones and no ``adapter_name``.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise ValueError(f"source: this {type(model).__name__} has no PEFT adapters (no peft_config)")
    if adapter_name is None:
        active = getattr(model, "active_adapters", None) or list(configs)
        names = list(active() if callable(active) else active) if len(configs) > 1 else list(configs)
        if len(names) != 1:
            raise ValueError(f"adapter_name: several adapters are active, choose one of {sorted(configs)}")
        adapter_name = names[0]
    if adapter_name not in configs:
        raise ValueError(f"adapter_name: the model has no adapter {adapter_name!r}, it has {sorted(configs)}")
    from peft import get_peft_model_state_dict

    # given a state dict, PEFT leaves out its own checks, which take lora_bias for a broken factor
    state = get_peft_model_state_dict(
        model, state_dict=model.state_dict(), adapter_name=adapter_name, save_embedding_layers=False
    )
    scalings = {
        model_path(path): float(module.scaling[adapter_name])
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and adapter_name in getattr(module, "scaling", ())
    }
    return Opened(
        {key: tensor.detach().clone() for key, tensor in state.items()},
        f"<{type(model).__name__}>:{adapter_name}",
        plain_config(configs[adapter_name].to_dict()),
        scalings=scalings,
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON would give it back: enums by value, sets as sorted lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, (set, frozenset)):
            return sorted(value)
        return value

    return {key: plain(value) for key, value in config.items()}


def open_path(
    source: str | os.PathLike[str], adapter_name: str | None, revision: str | None, device: torch.device | str
) -> Opened:
    """A directory, a safetensors file, or an id on the hub.

    Raises:
        ValueError: nothing there, or no adapter in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if any((path / name).is_file() for name in ("peru.json", "sparse_adapter.json")):
            raise ValueError(
                f"source: {path} holds sparse full fine-tunes, not a LoRA; use lora_fuse.load_peru, or "
                "give the folder of one task to lora_fuse.attach"
            )
        return _open_directory(path, adapter_name, device)
    if path.exists():
        tensors, header = read_safetensors(path, device)
        beside = path.with_name(CONFIG_NAME)
        config = read_json(beside) if path.name == WEIGHTS_NAME and beside.is_file() else None
        return Opened(tensors, str(path), config, header, adapter_name)
    refuse_pickle(path)
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".safetensors":
        home = _download(source, adapter_name, revision)
        opened = _open_directory(home, None, device)
        return Opened(opened.tensors, source, opened.config, opened.header)
    raise ValueError(f"source: {os.fspath(source)!r} is neither a file or directory nor a hub id such as 'owner/name'")


def _open_directory(path: Path, adapter_name: str | None, device: torch.device | str) -> Opened:
    home = _home(path, adapter_name)
    if home != path:
        adapter_name = None  # the directory is the choice
    config = read_json(home / CONFIG_NAME) if (home / CONFIG_NAME).is_file() else None
    tensors, header = read_safetensors(_weights(home), device)
    return Opened(tensors, str(home), config, header, adapter_name)


def _home(path: Path, adapter_name: str | None) -> Path:
    """PEFT saves an adapter that is not called "default" one level down."""
    if adapter_name is not None and (path / adapter_name / CONFIG_NAME).is_file():
        return path / adapter_name
    nested = sorted(p.parent for p in path.glob(f"*/{CONFIG_NAME}"))
    if (path / CONFIG_NAME).is_file() or not nested:
        return path
    if adapter_name is None and len(nested) == 1:
        return nested[0]
    asked = "holds several adapters" if adapter_name is None else f"holds no adapter {adapter_name!r}"
    raise ValueError(f"adapter_name: {path} {asked}, choose one of {[p.name for p in nested]}")


def _weights(home: Path) -> Path:
    for name in (WEIGHTS_NAME, DIFFUSERS_NAME):
        if (home / name).is_file():
            return home / name
    here = sorted(p for p in home.iterdir() if p.is_file())
    others = [p for p in here if p.suffix == ".safetensors"]
    if len(others) == 1:
        return others[0]
    for path in here:
        if path.suffix in PICKLE_SUFFIXES and not others:
            refuse_pickle(path)
    found = f"it has {', '.join(p.name for p in here[:10])}" if here else "it is empty"
    raise ValueError(f"{home}: there is no {WEIGHTS_NAME}; {found}")


def _download(repo: str, adapter_name: str | None, revision: str | None) -> Path:
    """Fetch an adapter's two files into the hub's cache and return their directory.

    Raises:
        ValueError: huggingface_hub is not installed, or the hub (or its cache) does not have the files.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise ValueError(
            f"source: {repo!r} is no file or directory here; to read it from the Hugging Face hub, install the extra: "
            "pip install 'lora-fuse[hub]'"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetch(*names: str) -> Path | None:
        for name in names:
            try:
                return Path(hf_hub_download(repo, name, revision=revision))
            except LocalEntryNotFoundError:  # offline and not in the cache
                raise
            except EntryNotFoundError:
                continue
        return None

    homes = [f"{adapter_name}/", ""] if adapter_name else [""]
    try:
        config = fetch(*(home + CONFIG_NAME for home in homes))
        inside = [h for h in homes if config is None or config.as_posix().endswith(f"/{h}{CONFIG_NAME}")]
        weights = fetch(*(home + name for home in inside[:1] for name in (WEIGHTS_NAME, DIFFUSERS_NAME)))
    except Exception as error:  # the hub's errors have many classes, and say themselves what is wrong
        raise ValueError(f"source: {repo!r} could not be read from the Hugging Face hub: {error}") from error
    if weights is None:
        raise ValueError(
            f"source: {repo!r} on the Hugging Face hub has neither {WEIGHTS_NAME} nor {DIFFUSERS_NAME}; pickled "
            "weights are not read"
        )
    return weights.parent
