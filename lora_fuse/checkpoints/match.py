"""Which tensors of a checkpoint an adapter means: prefixes that drifted, weights stored [in, out], tied heads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_fuse.adapters.lora import LoraAdapter, LoraLayer
from lora_fuse.checkpoints.header import TensorInfo
from lora_fuse.checkpoints.read import Checkpoint

# transformers' models whose projections are Conv1D (weight stored [in, out]), and the names those projections have.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp_decoder")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "tokens_embed", "shared")
_HEAD = "lm_head"
# What the transformers classes end with that have an output layer over the vocabulary, which they may tie.
_VOCABULARY_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True)
class Renaming:
    """How an adapter's module paths become the checkpoint's: a leading ``strip`` gives way to ``add``."""

    strip: str = ""
    add: str = ""

    def __call__(self, path: str) -> str:
        return self.add + path[len(self.strip) :] if path.startswith(self.strip) else path

    def __str__(self) -> str:
        return f"{self.strip or '(nothing)'} -> {self.add or '(nothing)'}"


def match_paths(adapter: LoraAdapter, checkpoint: Checkpoint, label: str) -> Renaming:
    """Find how the adapter names the checkpoint's modules.

    The adapter's own paths where they fit; else the one replacement of a leading part (``model.``, ``bert.``,
    ``model.language_model.`` ...) with which every layer finds a weight of its shape.

    Args:
        adapter: every one of its layers has to be found.
        checkpoint: the model.
        label: the adapter's name for messages.
    Returns:
        The renaming, the identity in most cases.
    Raises:
        ValueError: layers without a weight (up to ten are listed), a weight of another shape, or several renamings fit.
    """
    # a tied head need not be stored, and a weight that the adapter brings along may have another shape
    certain = {
        p: v for p, v in adapter.layers.items() if p.rpartition(".")[2] != _HEAD and p not in adapter.base_weights
    }
    layers = certain or dict(adapter.layers)
    found = [path for path in layers if f"{path}.weight" in checkpoint.tensors]
    if len(found) == len(layers):
        for path, layer in layers.items():
            check_shape(layer, checkpoint.tensors[f"{path}.weight"], path, label)
        return Renaming()
    fits: dict[tuple[str, ...], Renaming] = {}  # renamings that come to the same are one
    for renaming in _renamings(list(layers), checkpoint):
        if _all_fit(layers, checkpoint, renaming):
            fits.setdefault(tuple(map(renaming, layers)), renaming)
    if len(fits) == 1:
        return next(iter(fits.values()))
    if fits:
        choices = "; ".join(map(str, fits.values()))
        raise ValueError(
            f"adapter {label}: its module paths fit the model in several ways ({choices}): rename them first"
        )
    missing = [path for path in layers if path not in found]
    listed = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
    have = ", ".join(checkpoint.module_paths()[:3])
    raise ValueError(
        f"adapter {label}: {len(missing)} of its {len(layers)} layers have no weight in {checkpoint.folder}: {listed}. "
        f"Is it an adapter for another model? This one has {have}, ..."
    )


def renamed(adapter: LoraAdapter, renaming: Renaming, checkpoint: Checkpoint) -> LoraAdapter:
    """The adapter under the checkpoint's module paths; a module outside the renamed part keeps its own."""
    modules = {path for name in checkpoint.tensors for path in _ancestors(name)}

    def place(path: str) -> str:
        new = renaming(path)
        return new if new in modules else path

    return replace(
        adapter,
        layers={place(path): layer for path, layer in adapter.layers.items()},
        modules_to_save={place(path): saved for path, saved in adapter.modules_to_save.items()},
        base_biases={place(path): bias for path, bias in adapter.base_biases.items()},
        trainable_tokens={place(path): rows for path, rows in adapter.trainable_tokens.items()},
        base_weights={place(path): weight for path, weight in adapter.base_weights.items()},
    )


def _ancestors(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _renamings(paths: list[str], checkpoint: Checkpoint) -> Iterator[Renaming]:
    """Replacements of up to two leading names by up to two of the checkpoint's leading names."""
    heads = dict.fromkeys(h for path in checkpoint.module_paths() for h in _leading(path))
    strips = dict.fromkeys(s for path in paths for s in _leading(path))
    common = [s for s in strips if all(p.startswith(s) or p.rpartition(".")[2] == _HEAD for p in paths)]
    for strip in ("", *common):
        for add in ("", *heads):
            if strip != add:
                yield Renaming(strip, add)


def _leading(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:n]) + "." for n in (1, 2) if n < len(parts)]


def _all_fit(layers: Mapping[str, LoraLayer], checkpoint: Checkpoint, renaming: Renaming) -> bool:
    for path, layer in layers.items():
        weight = checkpoint.tensors.get(f"{renaming(path)}.weight")
        if weight is None or not _shapes_agree(layer, weight.shape):
            return False
    return True


def _shapes_agree(layer: LoraLayer, shape: tuple[int, ...]) -> bool:
    return shape == layer.weight_shape or (layer.kind == "linear" and shape == layer.weight_shape[::-1])


def check_shape(layer: LoraLayer, weight: TensorInfo, path: str, label: str) -> None:
    """Refuse a layer whose delta has not the weight's shape (for a linear layer also in ``[in, out]`` order).

    Raises:
        ValueError: both shapes are named.
    """
    if not _shapes_agree(layer, weight.shape):
        raise ValueError(
            f"adapter {label}: {path}: its delta is {list(layer.weight_shape)}, but {weight.name} is "
            f"{list(weight.shape)}; is it an adapter for another model?"
        )


def stored_transposed(
    path: str, layer: LoraLayer, weight: TensorInfo, checkpoint: Checkpoint, adapter: LoraAdapter, label: str
) -> bool:
    """Whether the checkpoint stores this weight ``[in, out]`` (transformers' Conv1D) rather than ``[out, in]``.

    The shape decides; for a square weight the model's type and the projection's name; failing these the adapter's
    ``fan_in_fan_out``, unless its other layers contradict it.

    Raises:
        ValueError: a square weight about which the model and the adapter say different things.
    """
    if layer.kind != "linear":
        return False
    out_features, in_features = layer.weight_shape
    if out_features != in_features:
        return weight.shape != layer.weight_shape
    model_type = checkpoint.config.get("model_type")
    if model_type in _CONV1D_MODELS:
        return is_conv1d(checkpoint.config, path)
    if not adapter.config.get("fan_in_fan_out", False):
        return False
    seen = set(_orientations(adapter.layers, checkpoint))
    if len(seen) == 1:
        return seen.pop()
    raise ValueError(
        f"adapter {label}: {path}: {weight.name} is square ({list(weight.shape)}) and the adapter says fan_in_fan_out, "
        f"but model_type {model_type!r} is not known to store weights [in, out]; set fan_in_fan_out in "
        "adapter_config.json to what is true of this model"
    )


def is_conv1d(config: Mapping[str, Any], path: str) -> bool:
    """Whether transformers builds a Conv1D, with its weight ``[in, out]``, for this path of a model of this config."""
    return config.get("model_type") in _CONV1D_MODELS and path.rpartition(".")[2] in _CONV1D_NAMES


def _orientations(layers: Mapping[str, LoraLayer], checkpoint: Checkpoint) -> Iterator[bool]:
    """How the weights that are not square are stored, as far as the layers' own paths are found."""
    for path, layer in layers.items():
        weight = checkpoint.tensors.get(f"{path}.weight")
        if layer.kind == "linear" and weight is not None and layer.weight_shape[0] != layer.weight_shape[1]:
            yield weight.shape != layer.weight_shape


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model (multimodal models nest it)."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) else config


@dataclass(frozen=True)
class Tie:
    """An output head that shares the input embedding's parameter: tensor names in the checkpoint.

    ``head_stored`` tells whether the checkpoint holds a copy of it under the head's name.
    """

    embedding: str
    head: str
    head_stored: bool


def find_tie(checkpoint: Checkpoint, touched: Iterable[str]) -> Tie | None:
    """The tie that an edit of the modules ``touched`` (the checkpoint's paths) would break, or None.

    Raises:
        ValueError: such a tie is there and its two ends cannot be named with certainty.
    """
    config = checkpoint.config
    tied = config.get("tie_word_embeddings", text_config(config).get("tie_word_embeddings"))
    if tied is False:
        return None
    vocabulary = text_config(config).get("vocab_size")
    embeddings = [
        name
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(tuple(f"{e}.weight" for e in _EMBEDDINGS))
        and len(tensor.shape) == 2
        and vocabulary in (None, tensor.shape[0])
    ]
    paths = set(touched)
    heads = [path for path in paths if path.rpartition(".")[2] == _HEAD]
    changed = sorted({name.removesuffix(".weight") for name in embeddings} & paths | set(heads))
    stored = [name for name in checkpoint.tensors if name.endswith(f"{_HEAD}.weight")]
    architectures: Sequence[str] = config.get("architectures") or ()
    causal = bool(heads or stored) or any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in architectures)
    headless = not causal and bool(architectures) and not any(a.endswith(_VOCABULARY_HEADS) for a in architectures)
    if not changed or headless:
        return None
    if not causal or len(embeddings) != 1 or len(stored) > 1 or len(heads) > 1:
        raise ValueError(
            f"{checkpoint.folder}: the adapter changes {', '.join(changed)}, which the model may tie to another "
            "parameter, and to which one cannot be told from the checkpoint; load the model, untie it "
            "(tie_word_embeddings=False, a copy for the output head), save it, and fuse into that"
        )
    head = stored[0] if stored else f"{heads[0]}.weight" if heads else f"{_HEAD}.weight"
    return Tie(embeddings[0], head, bool(stored))
