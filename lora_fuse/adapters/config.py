"""PEFT's ``adapter_config.json``: which keys are understood, which are kept unread, which are refused by name."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lora_fuse.adapters._findings import Findings

# fmt: off
# Read by LoraSettings.
_UNDERSTOOD = frozenset(
    [
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias",
        "bias", "target_modules", "modules_to_save", "trainable_token_indices", "init_lora_weights",
    ]
)
# No effect on what a trained adapter computes, or (fan_in_fan_out) decided by the type of the module. Kept for saving.
_INERT = frozenset(
    [
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
        "lora_dropout", "fan_in_fan_out", "exclude_modules", "layers_to_transform", "layers_pattern",
        "ensure_weight_tying", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config",
    ]
)
# fmt: on
# These change what is computed, in ways a product of two factors does not express.
_REFUSED = {
    "layer_replication": "it repeats layers of the base model",
    "alora_invocation_tokens": "the adapter acts only after its invocation tokens (aLoRA)",
    "use_qalora": "QALoRA pools the input in front of lora_A",
    "use_bdlora": "BD-LoRA's factors are block diagonal",
    "arrow_config": "Arrow routes between adapters at run time",
    "monteclora_config": "MonteCLoRA samples its factors",
    "kasa_config": "KaSA puts a diagonal between the factors and truncates the base weight",
    "target_parameters": "it puts LoRA on bare parameters (fused MoE experts)",
}
# Initialisations that leave the base weight as it was; the other named ones change it.
_PLAIN_INITS = frozenset(["gaussian", "eva", "orthogonal", "mica", "default", "true", "false"])


def _is_empty(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (Mapping, list, tuple, str)) and len(value) == 0)


@dataclass(frozen=True)
class LoraSettings:
    """The part of a PEFT config that decides what the tensors mean, with PEFT's defaults filled in."""

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: Sequence[str] | str | None = None
    modules_to_save: Sequence[str] = ()
    trainable_token_indices: Mapping[str, Sequence[int]] | Sequence[int] | None = None

    @cached_property
    def _patterns(self) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
        return {
            name: [(key, re.compile(rf"(.*\.)?({key})$")) for key in getattr(self, name)]
            for name in ("rank_pattern", "alpha_pattern")
        }

    def _look_up(self, name: str, path: str) -> Any:
        """PEFT's rule: the first key, in the file's order, whose ``(.*\\.)?(key)$`` matches the path; else None."""
        table = getattr(self, name)
        key = next((key for key, pattern in self._patterns[name] if pattern.match(path)), path)
        return table.get(key)

    def rank(self, path: str) -> int:
        """The rank that the config gives the module at ``path``."""
        rank = self._look_up("rank_pattern", path)
        return self.r if rank is None else rank

    def scaling(self, path: str, rank: int) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA, with the module's own alpha and rank."""
        alpha = self._look_up("alpha_pattern", path)
        alpha = self.lora_alpha if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def targets(self, path: str) -> bool:
        """Whether ``target_modules`` names the module, as a list or a regex, PEFT's way; True where it is not set."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, str):
            try:
                return re.fullmatch(self.target_modules, path) is not None
            except re.error as error:
                raise ValueError(f"target_modules: {self.target_modules!r} is no regex ({error})") from None
        return any(path == target or path.endswith(f".{target}") for target in self.target_modules)


def parse_settings(
    config: Mapping[str, Any], source: str, *, strict: bool = True, base_is_residual: bool = False
) -> LoraSettings:
    """Check every key of a PEFT LoRA config.

    Args:
        config: the parsed ``adapter_config.json``.
        source: named in errors.
        strict: False warns about unknown keys instead of raising.
        base_is_residual: accept initialisations that changed the base weights (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
    Raises:
        ValueError: a key that would change the result and is not supported, an unknown key that is not null, false or
            empty, or a value of the wrong type; every offender is listed.
    """
    findings = Findings(f"{source}, adapter config", strict)
    peft_type = config.get("peft_type")
    if str(peft_type).rpartition(".")[2].upper() != "LORA":
        advice = "" if peft_type is None else "; PEFT's `save_as_lora` converts some of the others to LoRA"
        findings.fatal.append(f"peft_type: expected LORA, got {peft_type!r}{advice}")
        findings.settle()
    for key, why in _REFUSED.items():
        if not _is_empty(config.get(key)):
            findings.fatal.append(f"{key}: {config[key]!r} is not supported, because {why}")
    for key in sorted(set(config) - _UNDERSTOOD - _INERT - set(_REFUSED)):
        if not _is_empty(config[key]):
            findings.tolerable.append(f"{key}: unknown key with the value {config[key]!r}, which may change the result")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS and not base_is_residual:
        findings.fatal.append(
            f"init_lora_weights: {init!r} changes the base weights, so the adapter fits only the residual model; pass "
            "base_is_residual=True if that is the model it will be used with"
        )
    values = {key: config[key] for key in _CHECKS if config.get(key) is not None}
    for key, value in values.items():
        accepted, check = _CHECKS[key]
        if not check(value):
            findings.fatal.append(f"{key}: expected {accepted}, got {value!r}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in values.get(key, ()) if isinstance(values.get(key), Mapping) else ():
            try:
                re.compile(rf"(.*\.)?({pattern})$")
            except re.error as error:
                findings.fatal.append(f"{key}: {pattern!r} is not a regular expression: {error}")
    findings.settle()
    return LoraSettings(**values)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # an integer may be too large for a float


def _strings(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)


def _token_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(_integer(v) and v >= 0 for v in value)


def _mapping_of(check: Any) -> Any:
    return lambda value: (
        isinstance(value, Mapping) and all(isinstance(k, str) for k in value) and all(map(check, value.values()))
    )


def _rank(value: Any) -> bool:
    return _integer(value) and value > 0


_BOOL = ("true or false", lambda value: isinstance(value, bool))
_CHECKS: dict[str, tuple[str, Any]] = {
    "r": ("a positive integer", _rank),
    "lora_alpha": ("a finite number", _number),
    "use_rslora": _BOOL,
    "use_dora": _BOOL,
    "lora_bias": _BOOL,
    "rank_pattern": ("an object of positive integers", _mapping_of(_rank)),
    "alpha_pattern": ("an object of finite numbers", _mapping_of(_number)),
    "bias": ("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "target_modules": ("a list of strings or a string", lambda value: isinstance(value, str) or _strings(value)),
    "modules_to_save": ("a list of strings", _strings),
    "trainable_token_indices": (
        "a list of token ids, or an object of such lists",
        lambda value: _token_ids(value) or _mapping_of(_token_ids)(value),
    ),
}
