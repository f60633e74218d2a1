"""The stack: positions once, masks once, the loop over the layers. An encoder and a decoder are each one stack."""

import difflib
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, is_hiding
from .embeddings import TextEmbeddings, look_up
from .layers import TransformerLayer
from .norms import make_norm
from .positions import count_positions, make_position_hooks, packed_documents

# What a forward names: a keyword close to one of these is a slip of the pen
ARGUMENTS = ["input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values", "use_cache", "labels", "shift_labels", "logits_to_keep", "skip_logits", "start_positions", "end_positions", "encoder_outputs", "encoder_hidden_states", "encoder_attention_mask", "decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds", "global_attention_mask", "prefix_lengths", "pixel_values", "input_features"]
PASSED_ON = frozenset(TransformersKwargs.__annotations__) | {"return_dict", "cache_position", "debug_io"}

MASKS = {
    ("full_attention", True): create_causal_mask,
    ("full_attention", False): create_bidirectional_mask,
    ("sliding_attention", True): create_sliding_window_causal_mask,
    ("sliding_attention", False): create_bidirectional_sliding_window_mask,
}


class StackOutput(NamedTuple):
    """What a stack computes; its public class wraps it in the output that Hugging Face has for it."""

    last_hidden_state: torch.Tensor  # (batch, seq, hidden_size)
    past_key_values: Cache | None


class TransformerStack:
    """Embeddings, positions, N layers and a final norm: a mixin for a `PreTrainedModel`.

    Args:
        config: the stack's config.
        encoder_size: width of the encoder's states that the layers attend to; None for no cross-attention.
    """

    is_causal: bool

    def __init__(self, config, encoder_size: int | None = None):
        # Read by the base class's __init__; only a stack that attends to another records cross-attention
        self._can_record_outputs = {
            "hidden_states": TransformerLayer,
            "attentions": OutputRecorder(Attention, index=1, layer_name="self_attn"),
        }
        if encoder_size is not None:
            self._can_record_outputs["cross_attentions"] = OutputRecorder(Attention, index=1, layer_name="cross_attn")
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        hooks = make_position_hooks(config, self.is_causal)
        self.embeddings = TextEmbeddings(config, hooks.add)
        self.rotary_emb, self.position_bias = hooks.rotate, hooks.bias
        groups = config.num_hidden_groups or config.num_hidden_layers
        self.layers = nn.ModuleList(
            [TransformerLayer(config, group, self.is_causal, encoder_size) for group in range(groups)]
        )
        self.norm = make_norm(config) if config.final_norm else None
        self.gradient_checkpointing = False

    def run(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> StackOutput:
        """Runs the stack.

        Args:
            input_ids: `(batch, seq)`, or `inputs_embeds` `(batch, seq, embedding_size)` as the token table gives them.
            attention_mask: `(batch, past + seq)`, 1 for real tokens; or a mask as the backend takes it, or one a layer type.
            position_ids: `(batch or 1, seq)`. Default: counted from `attention_mask`, the first real token is 0. Where they
                restart inside a row, the row is a pack of documents that do not see each other.
            token_type_ids: `(batch, seq)`.
            past_key_values: keys and values of the tokens before; extended in place.
            encoder_hidden_states, encoder_attention_mask: `(batch, source, encoder_size)` and `(batch, source)`.

        Raises:
            ValueError: for ids, positions or masks that do not fit, naming them.
            TypeError: for a keyword that resembles an argument and is none.
        """
        refuse_near_misses(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
        check_shapes(input_ids if inputs_embeds is None else inputs_embeds, attention_mask, past_key_values)
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, "input_ids")

        cache = past_key_values
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        # A mask without padding says nothing; dropping it opens the fast kernels and lets explicit positions mark packing
        if is_plain_mask(attention_mask) and not is_traced() and bool(attention_mask.all()):
            attention_mask = None
        past_length = 0 if cache is None else cache.get_seq_length()
        documents = None
        if position_ids is None:
            position_ids = self._positions(attention_mask, past_length, inputs_embeds)
        elif cache is None or (isinstance(past_length, int) and past_length == 0):
            if attention_mask is None or is_plain_mask(attention_mask):
                documents = packed_documents(position_ids, attention_mask)

        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        masks = self._masks(inputs_embeds, attention_mask, documents, cache)
        biases = self._biases(attention_mask, position_ids, cache, past_length)
        masks, biases = merge(masks, biases)
        rotations = {}
        if self.rotary_emb is not None:
            rotations = {name: rotary(hidden_states, position_ids) for name, rotary in self.rotary_emb.items()}
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )

        layer_types = self.config.layer_types
        layers_a_group = self.config.num_hidden_layers // len(self.layers)
        for layer_idx, layer_type in enumerate(layer_types):
            layer = self.layers[layer_idx // layers_a_group]
            output = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                rotation=rotations.get(layer_type),
                position_bias=biases.get(layer_type),
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                layer_idx=layer_idx,
                **kwargs,
            )
            hidden_states = self._drop_layer(hidden_states, output)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        return StackOutput(hidden_states, past_key_values)

    def new_cache(self) -> Cache:
        """An empty cache that fits the stack's patterns."""
        return DynamicCache(config=self.config)

    def _positions(self, attention_mask, past_length, inputs_embeds) -> torch.Tensor:
        """`(batch or 1, seq)`: the positions of this call's tokens, counted over the real tokens so far."""
        length = inputs_embeds.shape[1]
        slots = torch.arange(length, device=inputs_embeds.device) + past_length
        if is_plain_mask(attention_mask):
            return count_positions(attention_mask.to(slots.device)).index_select(1, slots)
        return slots[None]

    def _masks(self, inputs_embeds, attention_mask, documents, cache) -> dict[str, torch.Tensor | None]:
        """What each layer type hides, in the form that the attention backend takes."""
        if isinstance(attention_mask, dict):
            return attention_mask
        same_document = None
        if documents is not None:

            def same_document(batch_idx, head_idx, q_idx, kv_idx):
                return documents[batch_idx, q_idx] == documents[batch_idx, kv_idx]

            documents = documents.expand(inputs_embeds.shape[0], -1)
        arguments = {"config": self.config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        arguments.update(past_key_values=cache, and_mask_function=same_document)
        if self.position_bias is not None and self.is_causal:
            # A bias needs the mask spelled out, to be merged with it
            arguments["allow_is_causal_skip"] = False
        return {
            layer_type: MASKS[layer_type, self.is_causal](**arguments) for layer_type in set(self.config.layer_types)
        }

    def _biases(self, attention_mask, position_ids, cache, past_length) -> dict[str, torch.Tensor]:
        """Each layer type's score bias `(batch or 1, heads, seq, keys)`, for schemes that have one."""
        if self.position_bias is None:
            return {}
        biases = {}
        for layer_type in set(self.config.layer_types):
            keys = position_ids
            if cache is not None:
                layer_idx = self.config.layer_types.index(layer_type)
                num_keys, offset = cache.get_mask_sizes(position_ids.shape[1], layer_idx)
                keys = key_positions(attention_mask, position_ids, past_length, num_keys, offset)
            biases[layer_type] = self.position_bias(position_ids, keys).to(self.dtype)
        return biases

    def _drop_layer(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """LayerDrop (arXiv:1909.11556): in training, passes the layer over with probability `layerdrop`.

        The layer is computed all the same and its result left out, so that each parameter gets a (zero) gradient in every
        step and the processes of a sharded run stay in step.
        """
        if not self.training or self.config.layerdrop == 0:
            return output
        keep = torch.rand((), device=output.device) >= self.config.layerdrop
        return torch.where(keep, output, inputs)


def is_plain_mask(attention_mask) -> bool:
    """Whether a mask is 2-D, one entry a token; others come as a backend takes them."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2


def is_traced() -> bool:
    """Whether shapes alone are known: under torch.compile, torch.export and torch.jit.trace."""
    return is_torchdynamo_compiling() or torch.jit.is_tracing()


def merge(masks: dict, biases: dict) -> tuple[dict, dict]:
    """Adds score biases to the masks that are tensors, once for all layers; other masks keep their bias beside them.

    A query that sees no key then has only -inf, for which every backend returns 0.
    """
    masks, biases = dict(masks), dict(biases)
    for layer_type, mask in masks.items():
        if layer_type not in biases or not isinstance(mask, torch.Tensor):
            continue
        bias = biases.pop(layer_type)
        if mask.dtype == torch.bool:
            hidden = mask.logical_not()
        else:
            hidden, bias = is_hiding(mask), bias + mask
        masks[layer_type] = bias.masked_fill(hidden, float("-inf"))
    return masks, biases


def key_positions(attention_mask, position_ids, past_length, num_keys: int, offset: int) -> torch.Tensor:
    """`(batch or 1, keys)`: positions of the keys in a cache, in line with the queries' `position_ids`.

    The first keys are the queries' own. Later, keys are counted over the real tokens, or over the slots where no mask tells
    them apart, and shifted so that the last query falls on its own key.
    """
    if isinstance(past_length, int) and past_length == 0:
        return nn.functional.pad(position_ids, (0, num_keys - position_ids.shape[1]))
    slots = torch.arange(num_keys, device=position_ids.device) + offset
    last = past_length + position_ids.shape[1] - 1
    if is_plain_mask(attention_mask):
        counted = count_positions(attention_mask.to(slots.device))
        missing = slots.clamp(max=counted.shape[1] - 1)
        counted_last = counted.index_select(1, torch.as_tensor(last, device=slots.device).view(1))
        counted = counted.index_select(1, missing)
    else:
        counted, counted_last = slots[None], last
    return counted + (position_ids[:, -1:] - counted_last)


def check_shapes(inputs: torch.Tensor, attention_mask, past_key_values: Cache | None) -> None:
    """Refuses inputs and a 2-D mask whose shapes do not fit together; costs no kernel.

    Raises:
        ValueError: naming the argument, its shape and the one expected.
    """
    name = "input_ids" if inputs.ndim < 3 else "inputs_embeds"
    if inputs.ndim not in (2, 3):
        raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}; expected (batch, sequence).")
    if inputs.shape[0] == 0 or inputs.shape[1] == 0:
        raise ValueError(f"`{name}` is empty: shape {tuple(inputs.shape)}; give at least one sequence of one token.")
    if not is_plain_mask(attention_mask) or is_traced():
        return
    past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
    length = inputs.shape[1] + int(past_length)
    is_static = past_key_values is not None and past_key_values.is_compileable
    fits = attention_mask.shape[1] >= length if is_static else attention_mask.shape[1] == length
    if attention_mask.shape[0] != inputs.shape[0] or not fits:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, expected {(inputs.shape[0], length)}: one entry for "
            f"each of the {int(past_length)} cached and {inputs.shape[1]} given tokens of {inputs.shape[0]} sequences."
        )


def refuse_near_misses(kwargs: dict) -> None:
    """Raises `TypeError` for a keyword that resembles an argument; other keywords go down to the attention function."""
    if is_torchdynamo_compiling():
        return
    for key in kwargs.keys() - PASSED_ON:
        near = difflib.get_close_matches(key, ARGUMENTS, n=1, cutoff=0.85)
        if near and key not in ARGUMENTS:
            raise TypeError(f"forward() got an unexpected keyword `{key}`; did you mean `{near[0]}`?")
