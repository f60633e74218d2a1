"""The texts of a batch and what their tokens see: patterns speak of the places of one text, masks of the slots of a batch.

Legend: B batch (1 where rows agree), S slots.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .pattern_base import Pairs, Pattern, Text


class Texts(NamedTuple):
    """Where the texts of a batch lie in its slots. A row is one text, or several where documents are packed."""

    starts: torch.Tensor  # (B, 1) or, packed, (B, S): the slot of the first token of each slot's text
    lengths: torch.Tensor  # the same shape: tokens of that text
    documents: torch.Tensor | None  # (B, S): the number of each slot's document, where several are packed
    marked: torch.Tensor | None  # (B, S): tokens that the caller's `global_attention_mask` makes global
    prefix: torch.Tensor | None  # (B,): tokens of a prefix language model's prefix

    def pairs(self, batch_idx: Any, q_idx: Any, kv_idx: Any, is_causal: bool) -> Pairs:
        """The pairs of places of pairs of slots; all indices broadcast against each other."""
        # Indices are tensors throughout: a compiled FlexAttention takes no numbers among them
        row = batch_idx if self.starts.shape[0] > 1 else batch_idx * 0
        slot = q_idx if self.starts.shape[1] > 1 else q_idx * 0
        start = self.starts[row, slot]
        return Pairs(
            q_idx - start,
            kv_idx - start,
            self.lengths[row, slot],
            is_causal,
            self._is_marked(batch_idx, q_idx),
            self._is_marked(batch_idx, kv_idx),
            0 if self.prefix is None else self.prefix[batch_idx],
        )

    def rows(
        self, batch: int, num_slots: int, is_causal: bool, attention_mask: torch.Tensor | None
    ) -> list[tuple[Text, int]] | None:
        """Each text with the number of its first row, where the slots of all batch rows lie end to end.

        None where a text has padding inside.
        """
        if attention_mask is not None:
            real = attention_mask.bool()
            inside = torch.arange(num_slots, device=real.device) - self.starts.expand(batch, -1)
            if not torch.equal((inside >= 0) & (inside < self.lengths.expand(batch, -1)), real):
                return None
        starts, lengths = (part.expand(batch, -1).tolist() for part in (self.starts, self.lengths))
        marked = [[]] * batch if self.marked is None else [row.nonzero().flatten().tolist() for row in self.marked]
        prefix = [0] * batch if self.prefix is None else self.prefix.expand(batch).tolist()
        found = []
        for number in range(batch):
            for start, length in dict.fromkeys(zip(starts[number], lengths[number])):
                own = tuple(slot - start for slot in marked[number] if start <= slot < start + length)
                if length > 0:
                    found.append((Text(length, is_causal, own, prefix[number]), number * num_slots + start))
        return found

    def _is_marked(self, batch_idx: Any, slot: Any) -> Any:
        if self.marked is None:
            return False
        last = self.marked.shape[1] - 1  # tokens that are generated later are not global
        return self.marked[batch_idx, slot.clamp(min=0, max=last)] & (slot <= last)


def mask_function(pattern: Pattern, texts: Texts, is_causal: bool, num_heads: int) -> Callable:
    """The truth about a batch, `(batch, head, query, key) -> bool`, in the signature that transformers' masks and
    FlexAttention share. Padding is hidden elsewhere; other documents are hidden here."""
    heads = pattern.by_head(num_heads)

    def is_seen(batch_idx, head_idx, q_idx, kv_idx):
        pairs = texts.pairs(batch_idx, q_idx, kv_idx, is_causal)
        if len(heads) == 1:
            seen = next(iter(heads)).visible(pairs)
        else:
            seen = torch.zeros_like(pairs.query == pairs.key)
            for own_pattern, own_heads in heads.items():
                is_own = torch.isin(head_idx, torch.tensor(own_heads, device=q_idx.device))
                seen = seen | (own_pattern.visible(pairs) & is_own)
        if texts.documents is not None:
            seen = seen & (texts.documents[batch_idx, q_idx] == texts.documents[batch_idx, kv_idx])
        return seen

    return is_seen
