"""From token embeddings to the first hidden states."""

import torch
from torch import nn
from transformers.utils import is_torchdynamo_compiling

from .norms import make_dropout, make_norm


def look_up(table: nn.Embedding, ids: torch.Tensor, name: str) -> torch.Tensor:
    """`table(ids)`, with an error that names the ids that the table does not have.

    Raises:
        ValueError: if `ids` (called `name`) are not integers or lie outside the table.
    """
    if ids.is_floating_point():
        raise ValueError(
            f"`{name}` must hold integer ids, got dtype {ids.dtype}; use `.long()` or pass `inputs_embeds`."
        )
    if is_torchdynamo_compiling():
        return table(ids)
    try:
        return table(ids)
    except IndexError as error:
        row, column = ((ids < 0) | (ids >= table.num_embeddings)).nonzero()[0].tolist()
        raise ValueError(
            f"`{name}[{row}, {column}] = {int(ids[row, column])}` is outside the table of {table.num_embeddings} rows: use "
            "the tokenizer that the model was trained with, or call `model.resize_token_embeddings(len(tokenizer))`."
        ) from error


class TextEmbeddings(nn.Module):
    """Scales the token embeddings, adds token types and positions, normalises, and widens them to the model.

    Args:
        config: reads `embedding_size embedding_scale embedding_norm type_vocab_size hidden_dropout hidden_size`.
        positions: the module that turns position ids into vectors to add, or None.
    """

    def __init__(self, config, positions: nn.Module | None):
        super().__init__()
        size = config.embedding_size
        self.scale = size**0.5 if config.embedding_scale == "sqrt" else config.embedding_scale
        self.token_types = nn.Embedding(config.type_vocab_size, size) if config.type_vocab_size > 0 else None
        self.positions = positions
        self.norm = make_norm(config, size) if config.embedding_norm else None
        self.dropout = make_dropout(config.hidden_dropout)
        self.projection = nn.Linear(size, config.hidden_size) if size != config.hidden_size else None

    def forward(
        self, inputs_embeds: torch.Tensor, position_ids: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(batch, seq, embedding_size)` as the token table gives them -> `(batch, seq, hidden_size)`.

        Args:
            position_ids: `(batch or 1, seq)`. token_type_ids: `(batch, seq)`; None for all 0.

        Raises:
            ValueError: if `token_type_ids` other than 0 are given to a model without token types.
        """
        hidden_states = inputs_embeds * self.scale if self.scale != 1.0 else inputs_embeds
        if self.token_types is not None:
            if token_type_ids is None:
                hidden_states = hidden_states + self.token_types.weight[0]
            else:
                hidden_states = hidden_states + look_up(self.token_types, token_type_ids, "token_type_ids")
        elif token_type_ids is not None and not is_torchdynamo_compiling() and bool(token_type_ids.any()):
            # Zeros pass: many tokenizers send them with every text
            raise ValueError("`token_type_ids` are not all 0, but the form has `type_vocab_size=0`; leave them out.")
        if self.positions is not None:
            hidden_states = hidden_states + self.positions(position_ids).to(hidden_states.dtype)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        if self.dropout is not None:
            hidden_states = self.dropout(hidden_states)
        return hidden_states if self.projection is None else self.projection(hidden_states)
