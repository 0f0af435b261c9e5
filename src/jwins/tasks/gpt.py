"""A small transformer that predicts the next character of a text.

The model is that of GPT-2 as nanoGPT writes it, without biases: A. Radford et al., "Language Models are
Unsupervised Multitask Learners", 2019. The text that comes with the package is eight plays of the First Folio
of 1623, see ``data/README.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from jwins.errors import ConfigError, DataError
from jwins.tasks.base import Batch, Dataset, Task
from jwins.tasks.plays import CLASSES, bundled_plays, codes, read_plays, speeches
from jwins.tasks.source import refuse_copies

_TEST_FRACTION = 0.1
"""The end of each owner's text."""
_INITIAL_SD = 0.02
_MAX_LOSS = 700.0
"""Above it the perplexity of a model that diverged is more than a float64 holds."""


class _Block(nn.Module):
    """Causal self-attention and a layer of four times the width, each on a normalized input and added to it."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.hidden_norm = nn.LayerNorm(width, bias=False)
        self.hidden = nn.Linear(width, 4 * width, bias=False)
        self.hidden_out = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.attention_dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self._heads, self._dropout = heads, dropout

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, width) activations to new ones of the same shape."""
        batch, length, width = x.shape
        split = self.attention(self.attention_norm(x)).view(batch, length, 3, self._heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        seen = self._attended(query, key, value)
        x = x + self.dropout(self.attention_out(seen.transpose(1, 2).reshape(batch, length, width)))
        out: Tensor = x + self.dropout(self.hidden_out(functional.gelu(self.hidden(self.hidden_norm(x)))))
        return out

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute causal attention without the fused kernel, for which torch.func has no rule."""
        length, size = query.shape[-2:]
        if not torch._C._functorch.is_batchedtensor(query):
            dropout = self._dropout if self.training else 0.0
            return functional.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        scores = (query @ key.transpose(-2, -1) / math.sqrt(size)).masked_fill(later, -math.inf)
        weights: Tensor = self.attention_dropout(scores.softmax(dim=-1))
        return weights @ value


class Transformer(nn.Module):
    """A decoder-only transformer; the matrix that reads characters also predicts them.

    Args:
        heads: attention heads in each block; they divide the width.
        width: width of each position's state.
        context: most characters at once.
    """

    def __init__(self, *, layers: int, heads: int, width: int, context: int, dropout: float) -> None:
        super().__init__()
        self.characters = nn.Embedding(CLASSES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # projections that are added 2 * layers times start smaller
                scale = math.sqrt(2 * layers) if name.endswith("_out.weight") else 1.0
                nn.init.normal_(parameter, std=_INITIAL_SD / scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (B, T) int64 characters to (B, T, classes) logits of the next character."""
        x = self.characters(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.characters.weight)


class Gpt(Task):
    """The next character of plays, or of any text, by a decoder-only transformer.

    The last 10 % of each owner's text are for testing. Samples are pieces of ``context`` characters; those for
    training overlap, those for testing do not. With the default sizes the model has 0.8 million parameters;
    with ``layers=6, heads=6, width=384, context=256`` it has 10.8 million.

    Args:
        data: a UTF-8 text, or a folder of ``*.txt``, each of which counts as a play. None for the eight plays
            that come with the package.
        layers: number of blocks.
        heads: attention heads in each block.
        width: width of the model, a multiple of ``heads``.
        context: characters that the model sees.
        dropout: fraction of activations set to 0 in training.
        owners: owners of the text for the partition ``by_key``: ``play``, or the speaking ``role``, whose
            speeches are its text. A role is a name as it is printed in one play.
        stride: characters from the start of one training sample to that of the next; None for a quarter of
            ``context``.

    Raises:
        ConfigError: a size out of range, or a width that the heads do not divide.
        DataError: no text, or too short a one.

    >>> sum(parameter.numel() for parameter in Gpt().model().parameters())
    808192
    """

    better: ClassVar[Mapping[str, Literal["higher", "lower"]]] = {
        "bits_per_character": "lower",
        "perplexity": "lower",
    }

    def __init__(
        self,
        *,
        data: Path | None = None,
        layers: int = 4,
        heads: int = 4,
        width: int = 128,
        context: int = 64,
        dropout: float = 0.0,
        owners: str = "play",
        stride: int | None = None,
    ) -> None:
        self.name = "gpt"
        sizes = {"layers": layers, "heads": heads, "width": width, "context": context}
        for key, value in (sizes | {"stride": 1 if stride is None else stride}).items():
            if value < 1:
                raise ConfigError(f"task.options.{key}", value, "expected at least 1")
        if width % heads:
            problem = f"expected a multiple of heads = {heads}, such as {heads * -(-width // heads)}"
            raise ConfigError("task.options.width", width, problem)
        if not 0.0 <= dropout < 1.0:
            raise ConfigError("task.options.dropout", dropout, "expected a fraction in [0, 1)")
        if owners not in ("play", "role"):
            raise ConfigError("task.options.owners", owners, "expected 'play' or 'role'")
        self._sizes, self._dropout = sizes, dropout
        texts = [codes(text) for text in _texts(self.name, data, owners)]
        cuts = [len(text) - round(_TEST_FRACTION * len(text)) for text in texts]
        step = max(1, context // 4) if stride is None else stride
        self.train = _pieces([t[:cut] for t, cut in zip(texts, cuts, strict=True)], context, step)
        self.test = _pieces([t[cut:] for t, cut in zip(texts, cuts, strict=True)], context, context)
        if not len(self.train) or not len(self.test):
            problem = f"no {owners} has enough text for pieces of {context} characters and a test"
            raise DataError(f"{self.name}: {problem}; use a longer text, or a smaller context")

    def model(self) -> nn.Module:
        """Make a transformer."""
        return Transformer(**self._sizes, dropout=self._dropout)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Convert (B, T) uint8 to int64."""
        return inputs.long()

    def loss(
        self, model: Callable[[Tensor], Tensor], batch: Batch, generator: torch.Generator | None
    ) -> Tensor:
        """Return the mean cross-entropy over all characters of a batch, in nats."""
        logits = model(self.prepare(batch.inputs))
        return functional.cross_entropy(logits.flatten(0, 1), batch.targets.long().flatten())

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the metrics of each piece, means over its characters.

        Args:
            outputs: (n, T, classes) logits.
            targets: (n, T) uint8.

        Returns:
            ``accuracy`` of the next character, ``loss`` in nats, and the loss in bits per character.
        """
        loss = functional.cross_entropy(outputs.transpose(1, 2), targets.long(), reduction="none").mean(dim=1)
        correct = (outputs.argmax(dim=-1) == targets).float().mean(dim=1)
        return {"accuracy": correct, "loss": loss, "bits_per_character": loss / math.log(2.0)}

    def transform(self, means: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add the perplexity per character: the exponential of the mean loss over the test set."""
        return {**means, "perplexity": means["loss"].clamp(max=_MAX_LOSS).exp()}


def _texts(task: str, data: Path | None, owners: str) -> Sequence[str]:
    if data is None:
        plays, names = bundled_plays(), ["the plays of the package"] * len(bundled_plays())
    else:
        paths = _files(task, data)
        plays, names = tuple(read_plays(task, paths)), [str(path) for path in paths]
    return plays if owners == "play" else speeches(task, plays, names)


def _files(task: str, data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    paths = [path for path in sorted(data.rglob("*.txt")) if not path.stem.lower().startswith("readme")]
    refuse_copies(task, paths)
    if not paths:
        raise DataError(f"{task}: {data} is neither a text nor a folder with *.txt; put a UTF-8 text there")
    return paths


def _pieces(texts: Sequence[npt.NDArray[np.uint8]], context: int, stride: int) -> Dataset:
    """Return the pieces of each text, in order, with the characters that follow; keys are numbers of texts."""
    pieces, keys = [np.empty((0, context + 1), dtype=np.uint8)], [np.empty(0, dtype=np.int64)]
    for number, text in enumerate(texts):
        if len(text) > context:
            pieces.append(np.lib.stride_tricks.sliding_window_view(text, context + 1)[::stride])
            keys.append(np.full(len(pieces[-1]), number))
    every = torch.from_numpy(np.concatenate(pieces))
    return Dataset(every[:, :-1].contiguous(), every[:, 1:].contiguous(), np.concatenate(keys))
