"""The text the demo learns: the language reference that every CPython carries along.

Nothing has to be downloaded, and the characters are the same on each machine with the same Python.
"""

from __future__ import annotations

import torch
from torch import Tensor


def load_text() -> str:
    """Join the help topics of the running Python, sorted by key; about half a million characters.

    The text differs a little from one Python release to the next.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


class CharText:
    """A text as integers, split in two, from which random batches are drawn.

    Args:
        text: what to learn; None for :func:`load_text`.
        block_size: characters in one sample.
        batch_size: samples in one batch.
        seed: seed of the batches. Each split has a generator of its own, so that looking at the
            validation loss does not change the training batches that follow.
        train_fraction: share of the text, from its beginning, that is trained on.

    Attributes:
        vocabulary: the distinct characters, sorted; a character's position is its integer.
    """

    def __init__(
        self,
        text: str | None = None,
        *,
        block_size: int = 64,
        batch_size: int = 16,
        seed: int = 0,
        train_fraction: float = 0.9,
    ) -> None:
        text = load_text() if text is None else text
        self.block_size = block_size
        self.batch_size = batch_size
        self.vocabulary = "".join(sorted(set(text)))
        self._index = {character: i for i, character in enumerate(self.vocabulary)}
        encoded = self.encode(text)
        boundary = int(train_fraction * len(encoded))
        self._splits = {"train": encoded[:boundary], "val": encoded[boundary:]}
        for split, characters in self._splits.items():
            if len(characters) <= block_size:
                raise ValueError(
                    f"the {split} split has {len(characters)} characters;"
                    f" one sample takes {block_size + 1}"
                )
        self._generators = {
            split: torch.Generator().manual_seed(seed + i) for i, split in enumerate(self._splits)
        }

    @property
    def vocab_size(self) -> int:
        """Number of distinct characters."""
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """Turn characters into integers, int64 ``(len(text),)``.

        Raises:
            KeyError: a character is not in the vocabulary.
        """
        return torch.tensor([self._index[character] for character in text], dtype=torch.int64)

    def decode(self, idx: Tensor) -> str:
        """Turn integers ``(n,)`` back into characters."""
        return "".join(self.vocabulary[i] for i in idx.tolist())

    def get_batch(self, split: str) -> tuple[Tensor, Tensor]:
        """Draw random samples and, shifted by one, the characters to predict.

        Args:
            split: ``"train"`` or ``"val"``.

        Returns:
            Inputs and targets, both int64 ``(batch_size, block_size)``.

        Raises:
            KeyError: there is no such split.
        """
        characters = self._splits[split]
        starts = torch.randint(
            len(characters) - self.block_size,
            (self.batch_size, 1),
            generator=self._generators[split],
        )
        samples = characters[starts + torch.arange(self.block_size + 1)]
        return samples[:, :-1], samples[:, 1:]
