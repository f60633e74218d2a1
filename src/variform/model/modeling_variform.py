"""The public classes: one stack each, or two, under a task's head."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_variform import VariformDecoderConfig, VariformEncoderConfig, VariformEncoderDecoderConfig
from .generation import VariformGenerationMixin
from .heads import (
    LanguageModelHead,
    MultipleChoiceHead,
    Pooler,
    QuestionAnsweringHead,
    SequenceClassificationHead,
    TokenClassificationHead,
    pool,
    recorded,
    refuse_packs,
    with_router_losses,
)
from .losses import check_labels, shift_labels
from .outputs import (
    CACHE,
    DecoderOutput,
    EncoderDecoderOutput,
    EncoderOutput,
    RoutedCausalLMOutput,
    RoutedMaskedLMOutput,
    RoutedSeq2SeqLMOutput,
    mean_losses,
)
from .pretrained import (
    VariformDecoderPreTrainedModel,
    VariformEncoderDecoderPreTrainedModel,
    VariformEncoderPreTrainedModel,
)
from .stacks import TransformerStack


class VariformEncoderModel(TransformerStack, VariformEncoderPreTrainedModel):
    """A stack that sees both ways (BERT, ModernBERT, T5's encoder).

    Args:
        config: the form.
        add_pooling_layer: with the pooler, if the form has one.
    """

    is_causal = False

    def __init__(self, config: VariformEncoderConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.pooler = Pooler(config) if config.pooler and add_pooling_layer else None
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        global_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> EncoderOutput:
        """Arguments as in `TransformerStack.run`; an encoder keeps no cache but reads a prefix (PEFT's prefix tuning)."""
        output = self.run(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            past_key_values,
            inputs_embeds,
            global_attention_mask=global_attention_mask,
            **kwargs,
        )
        pooled = None
        if self.pooler is not None:
            pooled = self.pooler(pool(output.last_hidden_state, attention_mask, self.config.classifier_pooling))
        return EncoderOutput(
            last_hidden_state=output.last_hidden_state, pooler_output=pooled, router_losses=output.router_losses
        )


class VariformDecoderModel(TransformerStack, VariformDecoderPreTrainedModel):
    """A stack that sees the past (GPT-2, Llama); with `encoder_size`, one that also attends to an encoder's states.

    Args:
        config: the form.
        encoder_size: width of the encoder's states; None for a decoder on its own.
    """

    is_causal = True

    def __init__(self, config: VariformDecoderConfig, encoder_size: int | None = None):
        super().__init__(config, encoder_size)
        self.attends_to_encoder = encoder_size is not None
        self.post_init()
        if self.attends_to_encoder:
            # The config does not know of cross-attention, which is sharded as self-attention is
            own = {name: style for name, style in self._tp_plan.items() if ".self_attn." in name}
            self._tp_plan.update({name.replace("self_attn", "cross_attn"): style for name, style in own.items()})

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        encoder_position_ids: torch.LongTensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> DecoderOutput:
        """Arguments as in `TransformerStack.run`. `use_cache` makes a cache where none is given: in a training step only for
        the memory of a form that has one, and not with gradient checkpointing (give `past_key_values=model.new_cache()`)."""
        if self.attends_to_encoder and encoder_hidden_states is None:
            raise ValueError("This decoder attends to an encoder: give `encoder_hidden_states`.")
        # A model left in training mode may generate all the same; without gradients it is no step
        is_step = self.training and torch.is_grad_enabled()
        if use_cache and past_key_values is None and (self.config.memory_length > 0 or not is_step):
            past_key_values = self.new_cache()
            if self.attends_to_encoder:
                past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        output = self.run(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            past_key_values,
            inputs_embeds,
            encoder_hidden_states,
            encoder_attention_mask,
            encoder_position_ids,
            global_attention_mask,
            prefix_lengths,
            **kwargs,
        )
        cache: dict[str, Any] = {CACHE: output.past_key_values}
        return DecoderOutput(last_hidden_state=output.last_hidden_state, router_losses=output.router_losses, **cache)


class VariformEncoderDecoderModel(VariformEncoderDecoderPreTrainedModel):
    """An encoder and a decoder that attends to it (T5, BART). The stacks may differ in every field."""

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: VariformEncoderDecoderConfig):
        super().__init__(config)
        self.encoder = VariformEncoderModel(config.encoder, add_pooling_layer=False)
        self.decoder = VariformDecoderModel(config.decoder, encoder_size=config.encoder.output_size)
        if not config.tie_encoder_decoder_embeddings:
            self._tied_weights_keys = {}
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        # transformers asks `tie_word_embeddings` about every tie; the one between the stacks has a field of its own
        if all_submodels:
            return super().get_expanded_tied_weights_keys(all_submodels)
        return dict(self._tied_weights_keys) if self.config.tie_encoder_decoder_embeddings else {}

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value
        if self.config.tie_encoder_decoder_embeddings:
            self.decoder.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> EncoderDecoderOutput:
        """Arguments as in `TransformerStack.run`, for the encoder by their names and for the decoder after `decoder_`;
        `global_attention_mask` is the encoder's, `prefix_lengths` the decoder's. Where `position_ids` and
        `decoder_position_ids` restart inside a row, it is a pack of pairs: the decoder's document j sees the encoder's alone.

        Raises:
            ValueError: if neither `decoder_input_ids` nor `decoder_inputs_embeds` is given.
        """
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "Give `decoder_input_ids` or `decoder_inputs_embeds`; with a language-model head, `labels` are enough."
            )
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                position_ids,
                token_type_ids,
                inputs_embeds=inputs_embeds,
                global_attention_mask=global_attention_mask,
                **kwargs,
            )
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs[:3])
        decoder_outputs = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            encoder_hidden_states=encoder_outputs.last_hidden_state,
            encoder_attention_mask=attention_mask,
            encoder_position_ids=position_ids,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        of_stacks = [getattr(outputs, "router_losses", None) for outputs in (encoder_outputs, decoder_outputs)]
        router_losses = [losses for losses in of_stacks if losses is not None]  # added, as in Switch Transformers
        return EncoderDecoderOutput(
            last_hidden_state=decoder_outputs.last_hidden_state,
            **{CACHE: getattr(decoder_outputs, CACHE)},
            decoder_hidden_states=decoder_outputs.hidden_states,
            decoder_attentions=decoder_outputs.attentions,
            cross_attentions=decoder_outputs.cross_attentions,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
            encoder_attentions=encoder_outputs.attentions,
            router_losses=torch.stack(router_losses).sum(0) if router_losses else None,
            encoder_router_logits=getattr(encoder_outputs, "router_logits", None),
            decoder_router_logits=decoder_outputs.router_logits,
        )


class VariformEncoderForMaskedLM(LanguageModelHead, VariformEncoderPreTrainedModel):
    """An encoder that fills in masked tokens."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VariformEncoderConfig):
        super().__init__(config)
        self.model = VariformEncoderModel(config, add_pooling_layer=False)
        self.add_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        skip_logits: bool | None = None,
        global_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedMaskedLMOutput:
        """Args: labels: `(batch, seq)`, the tokens behind the masks; -100 elsewhere."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            inputs_embeds=inputs_embeds,
            global_attention_mask=global_attention_mask,
            **kwargs,
        )
        loss, logits = self.score(
            outputs.last_hidden_state, labels, skip_logits=skip_logits, num_items_in_batch=num_items
        )
        loss = with_router_losses(loss, outputs, labels, self.config, num_items)
        return RoutedMaskedLMOutput(loss=loss, logits=logits, **recorded(outputs))


class VariformDecoderForCausalLM(LanguageModelHead, VariformDecoderPreTrainedModel, VariformGenerationMixin):
    """A decoder that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VariformDecoderConfig):
        super().__init__(config)
        self.model = VariformDecoderModel(config)
        self.add_head(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedCausalLMOutput:
        """Args: labels: `(batch, seq)`, as `input_ids`; the shift to the next token is made here. Where a trainer has
        shifted them before it split the sequence, it passes `shift_labels` instead."""
        num_items = kwargs.pop("num_items_in_batch", None)
        targets = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            past_key_values,
            inputs_embeds,
            use_cache=use_cache,
            global_attention_mask=global_attention_mask,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        if targets is None and labels is not None:
            check_labels(labels, outputs.last_hidden_state.shape[:-1], self.config.vocab_size)
            targets = shift_labels(labels)
        loss, logits = self.score(
            outputs.last_hidden_state,
            targets,
            logits_to_keep=logits_to_keep,
            skip_logits=skip_logits,
            num_items_in_batch=num_items,
        )
        loss = with_router_losses(loss, outputs, targets, self.config, num_items)
        cache: dict[str, Any] = {CACHE: getattr(outputs, CACHE)}
        return RoutedCausalLMOutput(loss=loss, logits=logits, **cache, **recorded(outputs))


class VariformEncoderDecoderForConditionalGeneration(
    LanguageModelHead, VariformEncoderDecoderPreTrainedModel, VariformGenerationMixin
):
    """An encoder-decoder that writes a text for a text."""

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: VariformEncoderDecoderConfig):
        super().__init__(config)
        self.model = VariformEncoderDecoderModel(config)
        self.add_head(config.decoder)
        if config.tie_encoder_decoder_embeddings:
            # Named by its source: a tie to the decoder's table would be one link of a chain
            self._tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}
        self.post_init()

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """`(batch, seq)` labels -> the decoder's inputs: the start token, then the labels but the last; -100 becomes padding.

        Raises:
            ValueError: if the config has no `decoder_start_token_id` or no `pad_token_id`.
        """
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(self.config, name) is None:
                raise ValueError(f"`{name}` is unset: set it in the config, or give `decoder_input_ids`.")
        inputs = labels.new_full(labels.shape, self.config.decoder_start_token_id)
        inputs[:, 1:] = labels[:, :-1]
        return inputs.masked_fill(inputs == -100, self.config.pad_token_id)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_position_ids: torch.LongTensor | None = None,
        encoder_outputs: BaseModelOutput | tuple | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedSeq2SeqLMOutput:
        """Args: labels: `(batch, target)`, the text to write; -100 carries no weight. Without decoder inputs, they are the
        labels shifted right behind `decoder_start_token_id`."""
        num_items = kwargs.pop("num_items_in_batch", None)
        if labels is not None:
            check_labels(labels, labels.shape[:2], self.config.vocab_size)
            if decoder_input_ids is None and decoder_inputs_embeds is None:
                refuse_packs(decoder_position_ids, decoder_attention_mask, "`labels` without `decoder_input_ids` are")
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
            if decoder_attention_mask is None and self.training and self.config.decoder.num_experts:
                # What comes after the last label is seen by none that has one, but would count in the losses of routers
                decoder_attention_mask = (labels != -100).flip(1).cummax(1).values.flip(1).long()
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            decoder_input_ids,
            decoder_attention_mask,
            decoder_position_ids,
            encoder_outputs,
            past_key_values,
            inputs_embeds,
            decoder_inputs_embeds,
            use_cache=use_cache,
            global_attention_mask=global_attention_mask,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        loss, logits = self.score(
            outputs.last_hidden_state,
            labels,
            logits_to_keep=logits_to_keep,
            skip_logits=skip_logits,
            num_items_in_batch=num_items,
        )
        loss = with_router_losses(loss, outputs, labels, self.config, num_items)
        return RoutedSeq2SeqLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            decoder_hidden_states=outputs.decoder_hidden_states,
            decoder_attentions=outputs.decoder_attentions,
            cross_attentions=outputs.cross_attentions,
            encoder_last_hidden_state=outputs.encoder_last_hidden_state,
            encoder_hidden_states=outputs.encoder_hidden_states,
            encoder_attentions=outputs.encoder_attentions,
            encoder_router_logits=outputs.encoder_router_logits,
            decoder_router_logits=outputs.decoder_router_logits,
            **mean_losses(outputs.router_losses),
        )


class EncoderClassifier(VariformEncoderPreTrainedModel):
    """An encoder under one of the heads that label; heads of whole sequences read its pooler."""

    reads_pooler = False

    def __init__(self, config: VariformEncoderConfig):
        super().__init__(config)
        self.model = VariformEncoderModel(config, add_pooling_layer=self.reads_pooler)
        self.add_head(config)
        self.post_init()


class DecoderClassifier(VariformDecoderPreTrainedModel):
    """A decoder under one of the heads that label."""

    def __init__(self, config: VariformDecoderConfig):
        super().__init__(config)
        self.model = VariformDecoderModel(config)
        self.add_head(config)
        self.post_init()


class VariformEncoderForSequenceClassification(SequenceClassificationHead, EncoderClassifier):
    """An encoder that labels sequences."""


class VariformEncoderForTokenClassification(TokenClassificationHead, EncoderClassifier):
    """An encoder that labels tokens."""


class VariformEncoderForQuestionAnswering(QuestionAnsweringHead, EncoderClassifier):
    """An encoder that marks the answer in a text."""


class VariformEncoderForMultipleChoice(MultipleChoiceHead, EncoderClassifier):
    """An encoder that picks one of several sequences."""


class VariformDecoderForSequenceClassification(SequenceClassificationHead, DecoderClassifier):
    """A decoder that labels sequences."""


class VariformDecoderForTokenClassification(TokenClassificationHead, DecoderClassifier):
    """A decoder that labels tokens."""


class VariformDecoderForQuestionAnswering(QuestionAnsweringHead, DecoderClassifier):
    """A decoder that marks the answer in a text."""
