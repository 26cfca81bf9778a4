"""Merge recipes: the common part of mergekit's YAML, with mergekit's meaning and defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# mergekit's name -> ours
_METHODS = {"task_arithmetic": "linear"}
_NORMALIZED = ("linear", "ties", "della")  # by default
_RESCALED = ("dare_linear", "dare_ties", "della", "della_linear")
_GAMMA, _EPSILON = 0.01, 0.15  # mergekit's
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_OWN = ("rank", "energy", "seed")  # parameters that mergekit does not have
_REFUSED = {
    "slices": "layers cannot be picked; list whole models under 'models'",
    "modules": "list the models under 'models'",
    "tokenizer": "the base's tokenizer files are copied; edit them afterwards",
    "chat_template": "the base's is copied; edit it afterwards",
}


@dataclass
class Recipe:
    """A recipe in ``merge``'s words.

    Attributes:
        models: paths or hub ids, in their order.
        weights: one each.
        method: ours.
        options: keywords of ``merge``.
        base: the base model's path, or None.
        dtype: "fp32", "bf16" ..., or None.
        notes: what a user should know.
    """

    models: list[str]
    weights: list[float]
    method: str
    options: dict[str, Any]
    base: str | None
    dtype: str | None
    notes: list[str] = field(default_factory=list)


def read_recipe(path: Path) -> Recipe:
    """Read a YAML file.

    Raises:
        ValueError: PyYAML is missing, the file is damaged, or something in it that would change the result is not
            supported; it is named.
    """
    try:
        import yaml
    except ImportError:
        raise ValueError("recipes are YAML files, which need PyYAML: pip install 'lora-fuse[recipes]'") from None
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged YAML: {error}") from None
    try:
        return _recipe(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _recipe(config: Any) -> Recipe:
    config = _mapping(config, "the recipe")
    for key, advice in _REFUSED.items():
        if config.get(key) is not None:
            raise ValueError(f"{key}: is not supported: {advice}")
    if config.get("tokenizer_source") not in (None, "base"):
        raise ValueError(
            f"tokenizer_source: {config['tokenizer_source']!r} is not supported; the base's files are copied, which "
            "is tokenizer_source: base"
        )
    known = ("models", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")
    _refuse_unknown(config, (*known, *_REFUSED), "")
    name = config.get("merge_method")
    if not isinstance(name, str):
        raise ValueError(f"merge_method: expected the name of a method, got {name!r}")
    base = config.get("base_model")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"base_model: expected a path, got {base!r}")
    shared = _mapping(config.get("parameters") or {}, "parameters")
    entries = config.get("models")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"models: expected a list of models, got {entries!r}")
    models: list[str] = []
    own: list[Mapping[str, Any]] = []
    for i, item in enumerate(entries):
        entry = _mapping(item, f"models[{i}]")
        _refuse_unknown(entry, ("model", "parameters"), f"models[{i}].")
        model = entry.get("model")
        if not isinstance(model, str):
            raise ValueError(f"models[{i}].model: expected a path, got {model!r}")
        parameters = _mapping(entry.get("parameters") or {}, f"models[{i}].parameters")
        _refuse_unknown(parameters, ("weight", "density"), f"models[{i}].parameters.")
        if model == base and name != "linear":
            continue  # its task vector is zero
        models.append(model)
        own.append(parameters)
    if not models:
        raise ValueError("models: there is nothing beside the base model")
    dtype = config.get("out_dtype") or config.get("dtype")
    if dtype is not None and not (isinstance(dtype, str) and dtype in _DTYPES):
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype!r}")
    recipe = Recipe(models, [], _METHODS.get(name, name), {}, base, None if dtype is None else _DTYPES[dtype])
    _fill_in(recipe, name, shared, own)
    return recipe


def _fill_in(recipe: Recipe, name: str, shared: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> None:
    """Weights and options, as mergekit understands them."""
    from lora_fuse.merging.rules import RULES

    rules = {known: rule for known, rule in RULES.items() if known != "uniform"}
    if recipe.method not in rules:
        raise ValueError(f"merge_method: expected one of task_arithmetic, {', '.join(rules)}, got {name!r}")
    rule = rules[recipe.method]
    known = ["normalize", "weight", *_OWN]
    known += [] if name == "linear" else ["int8_mask", "rescale", "lambda", "density"]
    known += ["gamma"] if rule.keeps == "middle" else ["epsilon"] if rule.keeps == "ranked" else []
    _refuse_unknown(shared, known, "parameters.")
    for i, parameters in enumerate(own):
        weight = parameters.get("weight", shared.get("weight"))
        if weight is None:
            raise ValueError(f"models[{i}].parameters.weight: is missing; give each model one (or all the same one)")
        recipe.weights.append(_number(weight, f"models[{i}].parameters.weight"))
    densities = [
        _number(p.get("density", shared.get("density", 1.0)), f"models[{i}].parameters.density")
        for i, p in enumerate(own)
    ]
    normalize = _flag(shared, "normalize", name in _NORMALIZED)
    rescale = _flag(shared, "rescale", name in _RESCALED)
    _flag(shared, "int8_mask", False)  # the type of mergekit's masks, which changes no result
    factor = _number(shared.get("lambda", 1.0), "parameters.lambda")

    if rescale != (name in _RESCALED):
        raise ValueError(f"parameters.rescale: {rescale} is not supported with {name}; leave it out")
    if rule.keeps == "all" and any(density != 1.0 for density in densities):
        raise ValueError(f"density: {name} keeps every entry; leave it out, or choose another merge_method")
    if rule.keeps != "all":
        recipe.options["density"] = densities
    if rule.keeps == "middle":
        recipe.options["gamma"] = _number(shared.get("gamma", _GAMMA), "parameters.gamma")
    if rule.keeps == "ranked":
        recipe.options["epsilon"] = _number(shared.get("epsilon", _EPSILON), "parameters.epsilon")
    if rule.elects:
        recipe.options |= {"majority_sign": "weighted", "divisor": "weights" if normalize else "none"}
    elif normalize:
        total = math.fsum(recipe.weights)
        if abs(total) < 1e-8:
            raise ValueError(f"parameters.normalize: the weights add up to {total:g}; set it to false")
        recipe.weights = [weight / total for weight in recipe.weights]
    elif name == "linear" and abs(math.fsum(recipe.weights) - 1.0) > 1e-6:
        raise ValueError(
            "parameters.normalize: false with weights that do not add up to 1 scales the whole model in mergekit; "
            "leave it out, or use merge_method: task_arithmetic"
        )
    if rule.elects or rule.keeps != "all":
        recipe.options["scaling"] = factor
    else:
        recipe.weights = [factor * weight for weight in recipe.weights]
    if rule.keeps == "largest":
        recipe.options["scope"] = "tensor"
    recipe.options |= {key: shared[key] for key in _OWN if key in shared}
    if rescale:
        recipe.notes.append(
            f"{name}: entries that stay are divided by their chance to stay, as the paper does; mergekit rescales each "
            "tensor to its L1 norm"
        )


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what}: expected keys and values, got {value!r}")
    return value


def _refuse_unknown(given: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}{key}: is not supported; supported are {', '.join(known)}")


def _number(value: Any, what: str) -> float:
    if isinstance(value, (list, Mapping)):
        raise ValueError(f"{what}: gradients over layers and filters are not supported; give one number")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{what}: expected a number, got {value!r}")
    return float(value)


def _flag(given: Mapping[str, Any], name: str, default: bool) -> bool:
    value = given.get(name, default)
    if not isinstance(value, bool):
        raise ValueError(f"parameters.{name}: expected true or false, got {value!r}")
    return value
