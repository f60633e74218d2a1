"""The stack: positions once, masks once, the loop over the layers. An encoder and a decoder are each one stack."""

import difflib
from typing import Any, NamedTuple

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
from .positions import count_positions, key_positions, make_position_hooks, packed_documents

# What a forward names: a keyword close to one of these is a slip of the pen
ARGUMENTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values", "use_cache"}
    | {"labels", "shift_labels", "start_positions", "end_positions", "logits_to_keep", "skip_logits"}
    | {"encoder_outputs", "encoder_hidden_states", "encoder_attention_mask"}
    | {"decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds"}
    | {"global_attention_mask", "prefix_lengths", "pixel_values", "input_features"}
)
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
    _can_record_outputs: Any
    config: Any
    training: bool

    def __init__(self, config, encoder_size: int | None = None):
        # Read by the base class's __init__; only a stack that attends to another records cross-attention
        self._can_record_outputs = {
            "hidden_states": TransformerLayer,
            "attentions": OutputRecorder(Attention, index=1, layer_name="self_attn"),
        }
        if encoder_size is not None:
            self._can_record_outputs["cross_attentions"] = OutputRecorder(Attention, index=1, layer_name="cross_attn")
        super().__init__(config)  # type: ignore[call-arg]  # the PreTrainedModel that this is mixed into
        # No padding_idx: padding is masked and gets no gradient anyway, and where a decoder starts with the padding token
        # (T5) that row has to learn
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        hooks = make_position_hooks(config, self.is_causal)
        self.embeddings = TextEmbeddings(config, hooks.add)
        self.rotary_emb, self.position_bias = hooks.rotate, hooks.bias
        layers_a_group = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
        firsts = range(0, config.num_hidden_layers, layers_a_group)
        self.layers = nn.ModuleList([TransformerLayer(config, i, self.is_causal, encoder_size) for i in firsts])
        self.norm = make_norm(config) if config.final_norm else None
        self.layer_types = config.layer_types
        self.gradient_checkpointing = False

    def run(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: Any = None,
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
        check_inputs(input_ids, inputs_embeds, position_ids, self.config.embedding_size)
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, "input_ids")
        check_mask(attention_mask, inputs_embeds, past_key_values)
        cache = past_key_values.self_attention_cache if is_pair_cache(past_key_values) else past_key_values
        # A mask without padding says nothing; without it the fast kernels are open, and explicit positions can mark packing
        if is_plain_mask(attention_mask) and not is_traced() and bool(attention_mask.all()):
            attention_mask = None
        documents = None
        if position_ids is None:
            position_ids = self._count(inputs_embeds, attention_mask, cache)
        elif is_first_call(cache) and (attention_mask is None or is_plain_mask(attention_mask)):
            documents = packed_documents(position_ids, attention_mask)

        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        lowered = self._lower(hidden_states, attention_mask, position_ids, documents, cache)
        if encoder_hidden_states is not None:
            check_mask(encoder_attention_mask, encoder_hidden_states, name="encoder_attention_mask")
            encoder_attention_mask = create_bidirectional_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=encoder_attention_mask,
                encoder_hidden_states=encoder_hidden_states,
            )
        layers_a_group = len(self.layer_types) // len(self.layers)
        for layer_idx, layer_type in enumerate(self.layer_types):
            output = self.layers[layer_idx // layers_a_group](
                # By position what may carry a gradient: reentrant checkpointing backpropagates through keywords once a layer
                hidden_states,
                *lowered[layer_type],
                encoder_hidden_states,
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

    def _count(self, inputs_embeds, attention_mask, cache) -> torch.Tensor:
        """`(batch or 1, seq)`: the positions of this call's tokens, counted over the real tokens so far."""
        seen, length = seen_tokens(cache), inputs_embeds.shape[1]
        start = seen if isinstance(seen, int) else 0
        slots = torch.arange(start, start + length, device=inputs_embeds.device)
        if not isinstance(seen, int):
            slots = slots + seen
        if is_plain_mask(attention_mask):
            return count_positions(attention_mask.to(slots.device)).index_select(1, slots)
        return slots[None]

    def _lower(self, hidden_states, attention_mask, position_ids, documents, cache) -> dict[str, tuple]:
        """What the layers of each type are given: the mask as the backend takes it, the rotation, the score bias."""
        lowered = {}
        for layer_type in set(self.layer_types):
            mask = self._mask(layer_type, hidden_states, attention_mask, documents, cache)
            bias = self._bias(layer_type, hidden_states, attention_mask, position_ids, cache)
            if bias is not None and isinstance(mask, torch.Tensor):
                mask, bias = add_bias(mask, bias), None
            rotation = None
            if self.rotary_emb is not None:
                rotation = tuple(
                    part.unsqueeze(1) for part in self.rotary_emb[layer_type](hidden_states, position_ids)
                )
            lowered[layer_type] = (mask, rotation, bias)
        return lowered

    def _mask(self, layer_type, hidden_states, attention_mask, documents, cache) -> torch.Tensor | None:
        """What the layers of one type hide; None where nothing is hidden but, in a causal stack, the future."""
        if isinstance(attention_mask, dict):
            return attention_mask[layer_type]
        options: dict[str, Any] = {}
        if documents is not None:
            documents = documents.expand(hidden_states.shape[0], -1)

            def same_document(batch_idx, head_idx, q_idx, kv_idx):
                return documents[batch_idx, q_idx] == documents[batch_idx, kv_idx]

            options["and_mask_function"] = same_document
        if self.position_bias is not None and self.is_causal and hidden_states.shape[1] > 1:
            options["allow_is_causal_skip"] = False  # spelled out, so that the bias can be added to it once
        return MASKS[layer_type, self.is_causal](
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=cache,
            **options,
        )

    def _bias(self, layer_type, hidden_states, attention_mask, position_ids, cache) -> torch.Tensor | None:
        """The score bias `(batch or 1, heads, seq, keys)` of one layer type, for schemes that have one."""
        if self.position_bias is None:
            return None
        keys = position_ids
        if cache is not None:
            layer_idx = self.layer_types.index(layer_type)
            num_keys, offset = cache.get_mask_sizes(position_ids.shape[1], layer_idx)
            keys = key_positions(attention_mask, position_ids, seen_tokens(cache), num_keys, offset)
        return self.position_bias(position_ids, keys).to(hidden_states.dtype)

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


def is_pair_cache(past_key_values) -> bool:
    """Whether a cache holds an encoder-decoder's two kinds of keys: the decoder's own and the encoder's."""
    return isinstance(past_key_values, EncoderDecoderCache)


def seen_tokens(cache: Cache | None) -> int | torch.Tensor:
    """How many tokens a cache has seen; a static cache says so in a tensor once it holds any."""
    return 0 if cache is None else cache.get_seq_length()


def is_first_call(cache: Cache | None) -> bool:
    """Whether nothing came before this call's tokens."""
    seen = seen_tokens(cache)
    return isinstance(seen, int) and seen == 0


def add_bias(mask: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One additive mask from a mask, boolean (True is seen) or additive, and a score bias; made once for all layers.

    A query that sees no key has only -inf, for which every backend returns 0.
    """
    if mask.dtype == torch.bool:
        return bias.masked_fill(mask.logical_not(), float("-inf"))
    return (bias + mask).masked_fill(is_hiding(mask), float("-inf"))


def check_inputs(input_ids: Any, inputs_embeds: Any, position_ids: Any, embedding_size: int) -> None:
    """Refuses ids, embeddings and positions of a wrong shape; costs no kernel.

    Raises:
        ValueError: naming the argument, its shape and the one expected.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if inputs_embeds is None:
        name, inputs, expected, fits = "input_ids", input_ids, "(batch, sequence)", input_ids.ndim == 2
    else:
        name, inputs, expected = "inputs_embeds", inputs_embeds, f"(batch, sequence, {embedding_size})"
        fits = inputs.ndim == 3 and inputs.shape[2] == embedding_size
    if not fits:
        raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}; expected {expected}.")
    batch, length = inputs.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"`{name}` is empty: shape {tuple(inputs.shape)}; give at least one sequence of one token.")
    if position_ids is None or is_traced():
        return
    if tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, expected {(batch, length)}: one position a token."
        )


def check_mask(
    mask: Any, inputs: torch.Tensor, past_key_values: Cache | None = None, name: str = "attention_mask"
) -> None:
    """Refuses a 2-D mask that has not one entry for each cached and each given token; costs no kernel.

    Raises:
        ValueError: naming the mask, its shape and the one expected.
    """
    if not is_plain_mask(mask) or is_traced():
        return
    is_static = past_key_values is not None and past_key_values.is_compileable
    # A static cache's count stays on its device; its mask may be as long as the cache
    past_length = 0 if is_static else seen_tokens(past_key_values)
    batch, length = inputs.shape[:2]
    total = past_length + length
    fits = mask.shape[1] >= total if is_static else mask.shape[1] == total
    if mask.shape[0] != batch or not fits:
        raise ValueError(
            f"`{name}` has shape {tuple(mask.shape)}, expected {(batch, total)}: one entry for each of the {past_length} "
            f"cached and {length} given tokens of {batch} sequences."
        )


def refuse_near_misses(kwargs: dict) -> None:
    """Raises `TypeError` for a keyword that resembles an argument; other keywords go down to the attention function."""
    if is_torchdynamo_compiling() or kwargs.keys() <= PASSED_ON:
        return
    for key in kwargs.keys() - PASSED_ON:
        near = difflib.get_close_matches(key, ARGUMENTS, n=1, cutoff=0.8)
        if near and key not in ARGUMENTS:
            raise TypeError(f"forward() got an unexpected keyword `{key}`; did you mean `{near[0]}`?")
