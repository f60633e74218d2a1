"""The stack: positions once, masks once, the loop over the layers. An encoder and a decoder are each one stack."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicSlidingWindowLayer
from transformers.utils.output_capturing import OutputRecorder

from .attention import Attention, GlobalRows, merge
from .embeddings import TextEmbeddings, look_up
from .inputs import check_inputs, check_mask, refuse_unknown, warn_beyond_training
from .layers import TransformerLayer
from .masks import (
    Scene,
    find_global_rows,
    is_first_call,
    is_pair_cache,
    is_plain_mask,
    is_traced,
    lay_out,
    lower_source,
    lower_to_mask,
    lower_to_plan,
    repeat_bias,
    seen_tokens,
    simplify,
)
from .moe import Router
from .norms import make_norm
from .pattern_base import Pattern, PrefixLm
from .positions import Distances, count_positions, key_positions, make_position_hooks, packed_documents


class Lowered(NamedTuple):
    """What the layers of one pattern are given, made once a forward."""

    attention_mask: Any  # as the backend takes it, or a plan of the block kernel
    rotation: tuple[torch.Tensor, torch.Tensor] | None  # cos and sin, of the queries or, with a memory, of the keys
    position_bias: torch.Tensor | None  # (batch or 1, heads, seq, keys); beside a plan, a table (heads, columns)
    global_rows: GlobalRows | None  # the queries that see all through projections of their own
    distances: Distances | None  # of which each layer makes a score bias for its own queries
    query_biases: torch.Tensor | None  # (2, heads, head_dim): the u and v that go with them


class StackOutput(NamedTuple):
    """What a stack computes; its public class wraps it in the output that Hugging Face has for it."""

    last_hidden_state: torch.Tensor  # (batch, seq, output_size)
    past_key_values: Cache | None
    router_losses: torch.Tensor | None  # (batch, 2): balance and z, the mean of the layers with experts; in training


class TransformerStack:
    """Embeddings, positions, N layers and a final norm: a mixin for a `PreTrainedModel`.

    Args:
        config: the stack's config.
        encoder_size: width of the encoder's states that the layers attend to; None for no cross-attention.
    """

    is_causal: bool
    _can_record_outputs: Any
    _keep_in_fp32_modules_strict: Any
    config: Any
    training: bool

    def __init__(self, config, encoder_size: int | None = None):
        # Read by the base class's __init__; only a stack that attends to another records cross-attention
        self._can_record_outputs = {
            "hidden_states": TransformerLayer,
            "attentions": OutputRecorder(Attention, index=1, layer_name="self_attn"),
            "router_logits": OutputRecorder(Router, index=0),
        }
        if encoder_size is not None:
            self._can_record_outputs["cross_attentions"] = OutputRecorder(Attention, index=1, layer_name="cross_attn")
        super().__init__(config)  # type: ignore[call-arg]  # the PreTrainedModel that this is mixed into
        # No padding_idx: padding is masked and gets no gradient anyway, and where a decoder starts with the padding token
        # (T5) that row has to learn
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        hooks = make_position_hooks(config, self.is_causal)
        self.embeddings = TextEmbeddings(config, hooks.add)
        self.rotary_emb, self.position_bias, self.relative_positions = hooks.rotate, hooks.bias, hooks.relate
        layers_a_group = config.num_hidden_layers // (config.num_hidden_groups or config.num_hidden_layers)
        firsts = range(0, config.num_hidden_layers, layers_a_group)
        self.layers = nn.ModuleList([TransformerLayer(config, i, self.is_causal, encoder_size) for i in firsts])
        self.norm = make_norm(config, config.output_size) if config.final_norm else None
        self.layer_types = config.layer_types
        # The distinct patterns, the first layer that has each, and which one each layer has
        of_layers = [config.pattern_of(layer_idx) for layer_idx in range(config.num_hidden_layers)]
        self.patterns = list(dict.fromkeys(of_layers))
        self.first_layers = [of_layers.index(pattern) for pattern in self.patterns]
        self.pattern_numbers = [self.patterns.index(pattern) for pattern in of_layers]
        self.sorts_texts = config.sorts_texts
        self.has_experts = any(map(config.is_sparse_layer, range(config.num_hidden_layers)))
        if self.has_experts and config.router_type == "sigmoid_bias":
            # Moved by steps that half precision would round away
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]
        # An encoder-decoder's caller knows the decoder's arguments by these names
        self.argument_prefix = "" if encoder_size is None else "decoder_"
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
        encoder_position_ids: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> StackOutput:
        """Runs the stack.

        Args:
            input_ids: `(batch, seq)`, or `inputs_embeds` `(batch, seq, embedding_size)` as the token table gives them.
            attention_mask: `(batch, past + seq)`, 1 for real tokens; or a mask as the backend takes it, or one a layer type.
            position_ids: `(batch or 1, seq)`. Default: counted from `attention_mask`, the first real token is 0. Where they
                restart inside a row, the row is a pack of documents that do not see each other.
            token_type_ids: `(batch, seq)`.
            past_key_values: keys and values of the tokens before or, with `memory_length`, each layer's last inputs; extended
                in place.
            encoder_hidden_states, encoder_attention_mask: `(batch, source, encoder_size)` and `(batch, source)`.
            encoder_position_ids: `(batch or 1, source)`. Where they restart inside a row, it holds several sources, each for
                the document of its number in `position_ids`. A source alone in its row is for all documents there.
            global_attention_mask: `(batch, seq)`, 1 for the tokens that see and are seen by all, for "local_global" layers.
            prefix_lengths: `(batch,)`, how many first tokens see each other both ways, for "prefix_lm" layers.

        Raises:
            ValueError: for ids, positions or masks that do not fit, naming them.
            TypeError: for a keyword that resembles an argument and is none.
        """
        side = self.argument_prefix
        refuse_unknown(kwargs, self)
        check_inputs(input_ids, inputs_embeds, position_ids, self.config.embedding_size, side)
        if inputs_embeds is None:
            inputs_embeds = look_up(self.embed_tokens, input_ids, f"{side}input_ids")
        check_mask(attention_mask, inputs_embeds, past_key_values, name=f"{side}attention_mask")
        self._check_marks(global_attention_mask, prefix_lengths, inputs_embeds, past_key_values)
        cache = past_key_values.self_attention_cache if is_pair_cache(past_key_values) else past_key_values
        if cache is not None and self.sorts_texts:
            raise ValueError(
                "`past_key_values` is given, but `attention_patterns` sort whole texts (`lsh` with `chunked=true`), of which a "
                "cache would hold a part: pass `use_cache=False`, or build the form with `chunked=false`."
            )
        if cache is not None and self.config.expert_capacity_in_eval:
            raise ValueError(
                "`past_key_values` is given, but with `expert_capacity_in_eval=True` an expert's room is counted over the "
                "whole text, which a cache does not hold: pass `use_cache=False`, or build the form without it."
            )
        if is_pair_cache(past_key_values) and any(past_key_values.cross_attention_cache.is_sliding):
            raise ValueError(
                "`past_key_values.cross_attention_cache` has layers that slide, which would forget the first tokens of the "
                "source: make it by `DynamicCache()`, without a config."
            )
        has_memory = self.config.memory_length > 0 and cache is not None
        if has_memory:
            check_memory(cache, self.config, len(inputs_embeds))
        # A mask without padding says nothing; without it the fast kernels are open, and explicit positions can mark packing
        if is_plain_mask(attention_mask) and not is_traced() and bool(attention_mask.all()):
            attention_mask = None
        documents = None
        if position_ids is None:
            position_ids = self._count(inputs_embeds, attention_mask, cache)
        elif is_first_call(cache) and (attention_mask is None or is_plain_mask(attention_mask)):
            documents = packed_documents(position_ids, attention_mask)
            documents = None if documents is None else documents.expand(len(inputs_embeds), -1)
        if documents is not None and self.config.routes_by_row:
            raise ValueError(
                "`position_ids` restart inside a row, a pack of documents, which would compete for experts: `router_type="
                "'expert_choice'` and expert capacities count over whole rows; give one document a row, or let tokens choose "
                "without capacity."
            )
        if documents is None:
            warn_beyond_training(self.config, cache, inputs_embeds.shape[1])

        hidden_states = self.embeddings(inputs_embeds, position_ids, token_type_ids)
        premade = None if is_plain_mask(attention_mask) else attention_mask
        plain_mask = attention_mask if premade is None else None
        texts = lay_out(
            hidden_states, plain_mask, documents, seen_tokens(cache), global_attention_mask, prefix_lengths
        )
        scene = Scene(self.config, hidden_states, plain_mask, position_ids, texts, cache)
        lowered = self._lower(scene, premade)
        if encoder_hidden_states is not None:
            check_mask(encoder_attention_mask, encoder_hidden_states, name="encoder_attention_mask")
            encoder_attention_mask = lower_source(
                scene, encoder_hidden_states, encoder_attention_mask, encoder_position_ids
            )
        is_real = None
        if self.has_experts and plain_mask is not None:
            is_real = plain_mask.to(hidden_states.device).bool().index_select(1, self._slots(inputs_embeds, cache))
        router_losses = []
        layers_a_group = self.config.num_hidden_layers // len(self.layers)
        # With a memory, a layer has no keys and values of its own to keep; checkpointing warns of a cache that it may not fill
        keeps_keys = not has_memory or is_pair_cache(past_key_values)
        if self.config.residual_streams == 2:
            hidden_states = torch.cat((hidden_states, hidden_states), dim=-1)
        for layer_idx, number in enumerate(self.pattern_numbers):
            # ... of the stream that attention reads
            memory = recall(cache, hidden_states[..., -self.config.hidden_size :], layer_idx) if has_memory else None
            output, losses = self.layers[layer_idx // layers_a_group](
                # By position what may carry a gradient: reentrant checkpointing backpropagates through keywords once a layer
                hidden_states,
                *lowered[number],
                encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                memory=memory,
                is_real=is_real,
                past_key_values=past_key_values if keeps_keys else None,
                position_ids=position_ids,
                layer_idx=layer_idx,
                **kwargs,
            )
            hidden_states = self._drop_layer(hidden_states, output)
            if losses is not None:
                router_losses.append(losses)
        if self.norm is not None:
            hidden_states = self.norm(hidden_states)
        mean_losses = torch.stack(router_losses).mean(0) if router_losses else None
        return StackOutput(hidden_states, past_key_values, mean_losses)

    def _check_marks(self, global_attention_mask, prefix_lengths, inputs_embeds, past_key_values) -> None:
        """Refuses marks that no layer reads, or of a wrong shape."""
        batch, length = inputs_embeds.shape[:2]
        names = {pattern.name for pattern in self.patterns}
        marks = {"global_attention_mask": global_attention_mask, "prefix_lengths": prefix_lengths}
        readers = {"global_attention_mask": "local_global", "prefix_lengths": "prefix_lm"}
        for name, value in marks.items():
            if value is not None and readers[name] not in names:
                raise ValueError(
                    f"`{name}` is given, but no layer has the pattern '{readers[name]}': leave it out, or name the pattern in "
                    "`attention_patterns`."
                )
        if is_traced() or not is_first_call(past_key_values):
            return
        shapes = {"global_attention_mask": (batch, length), "prefix_lengths": (batch,)}
        for name, value in marks.items():
            if value is not None and tuple(value.shape) != shapes[name]:
                raise ValueError(f"`{name}` has shape {tuple(value.shape)}, expected {shapes[name]}.")
        if prefix_lengths is not None and bool(((prefix_lengths < 0) | (prefix_lengths > length)).any()):
            raise ValueError(
                f"`prefix_lengths={prefix_lengths.tolist()}` must lie between 0 and the {length} tokens of the first call: a "
                "prefix that sees itself both ways cannot be given in pieces."
            )

    def new_cache(self) -> Cache:
        """An empty cache that fits the stack's patterns or, with `memory_length`, holds its memory."""
        return DynamicCache(config=self.config)

    def _count(self, inputs_embeds, attention_mask, cache) -> torch.Tensor:
        """`(batch or 1, seq)`: the positions of this call's tokens, counted over the real tokens so far."""
        slots = self._slots(inputs_embeds, cache)
        if is_plain_mask(attention_mask):
            return count_positions(attention_mask.to(slots.device)).index_select(1, slots)
        return slots[None]

    def _slots(self, inputs_embeds, cache) -> torch.Tensor:
        """`(seq,)`: where this call's tokens stand among all so far, padding included."""
        seen, length = seen_tokens(cache), inputs_embeds.shape[1]
        start = seen if isinstance(seen, int) else 0
        slots = torch.arange(start, start + length, device=inputs_embeds.device)
        return slots if isinstance(seen, int) else slots + seen

    def _lower(self, scene: Scene, premade: Any) -> list[Lowered]:
        """What the layers of each pattern are given; `premade` is a mask as the backend takes it, or one a layer type."""
        lowered = []
        for pattern, layer_idx in zip(self.patterns, self.first_layers):
            layer_type = self.layer_types[layer_idx]
            sees_ahead = premade is not None or isinstance(pattern, PrefixLm)
            if premade is not None:
                mask = premade[layer_type] if isinstance(premade, dict) else premade
                mask, bias = merge(mask, self._bias(scene, layer_idx))
            else:
                mask, bias = self._mask_and_bias(simplify(pattern, scene), scene, layer_idx)
            rotation = None
            if self.rotary_emb is not None:
                has_memory = self.config.memory_length > 0
                positions = self._key_positions(scene, layer_idx) if has_memory else scene.position_ids
                parts = self.rotary_emb[layer_type](scene.hidden_states, positions)
                rotation = tuple(part.unsqueeze(1) for part in parts)
            rows = find_global_rows(pattern, scene, self.position_bias)
            lowered.append(Lowered(mask, rotation, bias, rows, *self._distances(scene, layer_idx, sees_ahead)))
        return lowered

    def _mask_and_bias(self, pattern: Pattern, scene: Scene, layer_idx: int) -> tuple[Any, torch.Tensor | None]:
        """A plan and the table of its biases; or a mask that holds the bias, and None; or, where no mask can, both."""
        scheme: Any = self.position_bias
        plan = lower_to_plan(pattern, scene, None if scheme is None else scheme.column)
        if plan is not None:
            return plan, None if scheme is None else scheme.table(scene.hidden_states.shape[1])
        biases = [self._bias(scene, layer_idx), repeat_bias(pattern, scene, layer_idx)]
        given = [bias for bias in biases if bias is not None]
        bias = given[0] + sum(given[1:]) if given else None
        has_bias = bias is not None or self.relative_positions is not None
        return merge(lower_to_mask(pattern, scene, layer_idx, has_bias), bias)

    def _bias(self, scene: Scene, layer_idx: int) -> torch.Tensor | None:
        """The score bias `(batch or 1, heads, seq, keys)` of a layer, for schemes that have one."""
        if self.position_bias is None:
            return None
        keys = self._key_positions(scene, layer_idx)
        return self.position_bias(scene.position_ids, keys).to(scene.hidden_states.dtype)

    def _distances(
        self, scene: Scene, layer_idx: int, sees_ahead: bool
    ) -> tuple[Distances | None, torch.Tensor | None]:
        """The distances from queries to keys of a layer, and u and v, for the scheme that reads them; else None twice."""
        if self.relative_positions is None:
            return None, None
        keys = self._key_positions(scene, layer_idx)
        waves, index = self.relative_positions(scene.position_ids, keys, sees_ahead)
        return Distances(waves.to(scene.hidden_states.dtype), index), self.relative_positions.biases()

    def _key_positions(self, scene: Scene, layer_idx: int) -> torch.Tensor:
        """`(batch or 1, keys)`: the positions of what a layer attends to."""
        if scene.cache is None:
            return scene.position_ids
        _, _, num_keys, first_key = scene.sizes(layer_idx)
        queries = scene.position_ids
        keys = key_positions(scene.attention_mask, queries, seen_tokens(scene.cache), num_keys, first_key)
        if scene.cache.is_compileable:
            return keys
        # In a cache that grows, the last keys are the queries' own, whatever positions these were given
        batch = max(len(keys), len(queries))
        past = keys[:, : num_keys - queries.shape[1]]
        return torch.cat((past.expand(batch, -1), queries.expand(batch, -1)), dim=1)

    def _drop_layer(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """LayerDrop (arXiv:1909.11556): in training, passes the layer over with probability `layerdrop`.

        The layer is computed all the same and its result left out, so that each parameter gets a (zero) gradient in every
        step and the processes of a sharded run stay in step.
        """
        if not self.training or self.config.layerdrop == 0:
            return output
        keep = torch.rand((), device=output.device) >= self.config.layerdrop
        return torch.where(keep, output, inputs)


def check_memory(cache: Cache, config: Any, batch: int) -> None:
    """Refuses a cache that does not keep each layer's last inputs, or keeps those of other sequences; costs no kernel.

    Raises:
        ValueError: naming what the cache keeps and what is needed.
    """
    kinds = [(type(layer), getattr(layer, "sliding_window", None)) for layer in cache.layers]
    if kinds != [(DynamicSlidingWindowLayer, config.memory_length + 1)] * config.num_hidden_layers:
        raise ValueError(
            f"`past_key_values` does not keep the last {config.memory_length} inputs of each of {config.num_hidden_layers} "
            f"layers, as `memory_length={config.memory_length}` asks for: make it by `DynamicCache(config=model.config)`. "
            "Static, quantized and unbounded caches hold no memory."
        )
    kept = cache.layers[0].keys
    if kept is not None and (len(kept), kept.shape[-1]) != (batch, config.hidden_size):
        raise ValueError(
            f"`past_key_values` remembers {len(kept)} sequences, {kept.shape[-1]} wide; this call has {batch}, "
            f"{config.hidden_size} wide: begin other texts with a new cache."
        )


def recall(cache: Cache, hidden_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
    """`(batch, kept, hidden_size)`: a layer's inputs of earlier calls, without gradient; the cache takes in this call's
    (Transformer-XL, arXiv:1901.02860, sec. 3.2).

    In a layer of a stock cache that slides, the inputs stand as keys of one head, and values have no width. It keeps the last
    `memory_length` of them.
    """
    inputs = hidden_states.detach()[:, None]  # (batch, 1, seq, hidden_size)
    kept, _ = cache.update(inputs, inputs[..., :0], layer_idx)
    return kept[:, 0, : -hidden_states.shape[1]]
