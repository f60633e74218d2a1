"""What a model does with one text: where its heads read, and which experts its tokens take."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..model.moe import MixtureOfExperts
from ..model.stacks import TransformerStack

# Beyond this, a picture has no room for its tokens
LONGEST_TEXT = 256
# What a pair writes where no target is given
MOST_NEW_TOKENS = 24
# Marks of a space at the beginning of a token: of byte-level BPE, of SentencePiece
SPACES = {"Ġ": "·", "▁": "·", "Ċ": "↵"}


class Attended(NamedTuple):
    """The attention weights of one kind: of an encoder, of a decoder, or from the one to the other."""

    kind: str  # "encoder", "decoder" or "cross-attention"
    queries: list[str]  # the tokens that read
    keys: list[str]  # the tokens that are read
    weights: torch.Tensor  # (layers, heads, queries, keys); 0 for what is hidden
    notes: tuple[str, ...] = ()


class Taken(NamedTuple):
    """The experts that the tokens of one layer took."""

    layer: str  # "decoder layer 3"
    tokens: list[str]
    weights: torch.Tensor  # (experts, tokens): of the results in the sum; 0 where the expert was not taken
    taken: torch.Tensor  # (experts, tokens) boolean


class Input(NamedTuple):
    """A text as a model takes it, with the tokens in words."""

    inputs: dict[str, torch.Tensor]  # one row each
    tokens: dict[str, list[str]]  # of the "encoder" and the "decoder"


def tokenize(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Input:
    """A text, or the source and the target of a pair, as input.

    Args:
        texts: one; for a pair the target may follow. Default: what the model writes or, without a head, the source.

    Raises:
        ValueError: for more texts than the shape takes, a text without tokens, or one that is too long for a picture.
    """
    is_pair = model.config.is_encoder_decoder
    if len(texts) > 1 + is_pair:
        takes = "a source and a target are shown" if is_pair else "one is shown"
        raise ValueError(f"{len(texts)} texts were given: {takes}; put each in quotes.")
    ids = [tokenizer(text, return_tensors="pt")["input_ids"].to(model.device) for text in texts]
    for text, row in zip(texts, ids):
        if not 1 <= row.shape[1] <= LONGEST_TEXT:
            raise ValueError(f"{text[:40]!r} has {row.shape[1]} tokens: a picture takes 1 to {LONGEST_TEXT}.")
    if not is_pair:
        side = model.config.model_type.removeprefix("variform_")
        return Input({"input_ids": ids[0]}, {side: words_of(tokenizer, ids[0])})
    inputs = {"input_ids": ids[0]}
    if len(ids) > 1:
        start = model.config.decoder_start_token_id
        first = ids[1][:, :0] if start is None else torch.full_like(ids[1][:, :1], start)
        inputs["decoder_input_ids"] = torch.cat((first, ids[1]), dim=1)
    elif model.can_generate() and model.config.decoder_start_token_id is not None:
        inputs["decoder_input_ids"] = model.generate(ids[0], max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
    else:
        inputs["decoder_input_ids"] = ids[0]
    sides = {"encoder": ids[0], "decoder": inputs["decoder_input_ids"]}
    return Input(inputs, {side: words_of(tokenizer, row) for side, row in sides.items()})


def words_of(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """The tokens of a row as one reads them; spaces are dots."""
    words = [str(word) for word in tokenizer.convert_ids_to_tokens(ids[0].tolist())]
    if "ByteLevel" in str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "")):
        # Each byte of such a token is a letter of its own; a part of a letter stays as it is
        texts = [str(tokenizer.decode([number])).replace(" ", "·") for number in ids[0].tolist()]
        words = [word if "\ufffd" in text else text for word, text in zip(words, texts)]
    for mark, shown in SPACES.items():
        words = [word.replace(mark, shown) for word in words]
    return [word if word.strip() else repr(word)[1:-1] for word in words]


@torch.no_grad()
def read_attention(model: PreTrainedModel, text: Input) -> list[Attended]:
    """The attention weights of a text, by the definition that every kernel equals (`eager`).

    Args:
        model: any model of the family; left as it was. text: as `tokenize` gives it.
    """
    implementations = [(part, part.config._attn_implementation) for part in model.modules() if hasattr(part, "config")]
    was_training = model.training
    try:
        model.set_attn_implementation("eager")
        output = model.eval()(**text.inputs, output_attentions=True, use_cache=False, return_dict=True)
    finally:
        model.train(was_training)
        for part, name in implementations:
            part.config._attn_implementation = name
    found = []
    stacks = {side_of(stack): stack for stack in model.modules() if isinstance(stack, TransformerStack)}
    for side, words in text.tokens.items():
        weights = output[f"{side}_attentions" if model.config.is_encoder_decoder else "attentions"]
        found.append(Attended(side, words, words, stack_up(weights), notes_on(stacks[side].config)))
    if model.config.is_encoder_decoder:
        read, written = text.tokens["encoder"], text.tokens["decoder"]
        found.append(Attended("cross-attention", written, read, stack_up(output["cross_attentions"])))
    return found


def side_of(stack: Any) -> str:
    return stack.config.model_type.removeprefix("variform_")


def stack_up(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """One row's weights of each layer -> `(layers, heads, queries, keys)` in float32 on the CPU."""
    return torch.stack([layer[0].float().cpu() for layer in weights])


def notes_on(config: Any) -> tuple[str, ...]:
    """What the weights of a stack do not show."""
    patterns = map(config.pattern_of, range(config.num_hidden_layers))
    notes = []
    if config.attention_sinks:
        notes.append("What is missing of a row goes to the head's sink.")
    if any(getattr(pattern, "global_projections", False) for pattern in patterns):
        notes.append("The rows of global tokens are those of the plain projections, which they do not use.")
    return tuple(notes)


@torch.no_grad()
def read_experts(model: PreTrainedModel, text: Input) -> list[Taken]:
    """The experts that the tokens of a text take, layer by layer.

    Raises:
        ValueError: for a model without experts.
    """
    seen: list[tuple[str, str, Any]] = []
    handles = []
    for stack in model.modules():
        if not isinstance(stack, TransformerStack):
            continue
        for number, layer in enumerate(stack.layers):
            if isinstance(layer.mlp, MixtureOfExperts):
                side = side_of(stack)

                def note(module, arguments, routing, side=side, number=number):
                    seen.append((side, f"{side} layer {number}", routing))

                handles.append(layer.mlp.gate.register_forward_hook(note))
    if not handles:
        raise ValueError("The model has no experts: `num_experts=0`.")
    was_training = model.training
    try:
        model.eval()(**text.inputs, use_cache=False)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [Taken(name, text.tokens[side], *by_expert(routing)) for side, name, routing in seen]


def by_expert(routing: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`(experts, tokens)` weights of the first sequence, and which were taken."""
    num_tokens, num_experts = routing.logits.shape[1:]
    experts = routing.experts[0]  # (rows, k)
    rows = torch.arange(len(experts), device=experts.device) if routing.tokens is None else routing.tokens[0]
    places = (experts, rows[:, None].expand_as(experts))
    counts = torch.ones_like(experts, dtype=torch.bool) if routing.counts is None else routing.counts[0]
    weights = torch.zeros(num_experts, num_tokens, device=experts.device)
    weights.index_put_(places, routing.weights[0].float(), accumulate=True)
    taken = torch.zeros(num_experts, num_tokens, device=experts.device)
    taken.index_put_(places, counts.float(), accumulate=True)
    return weights.cpu(), taken.cpu() > 0
