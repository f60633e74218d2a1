"""One mixin a task: what is put on a stack, and its loss."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from .losses import add_router_losses, cross_entropy, is_traced, linear_cross_entropy, scale_logits
from .norms import make_norm
from .outputs import (
    RoutedMultipleChoiceOutput,
    RoutedQuestionAnsweringOutput,
    RoutedSequenceClassifierOutput,
    RoutedTokenClassifierOutput,
    mean_losses,
)
from .positions import packed_documents


def pool(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, how: str) -> torch.Tensor:
    """One vector a sequence: its "first" or "last" real token, or the "mean" of them, whichever side is padded.

    Args:
        hidden_states: `(batch, seq, hidden_size)`. attention_mask: `(batch, past + seq)`, 1 for real tokens, or None.

    Returns:
        `(batch, hidden_size)`; 0 for the mean of a row without real tokens.
    """
    if attention_mask is None or attention_mask.ndim != 2:
        return {"first": hidden_states[:, 0], "last": hidden_states[:, -1]}.get(how, hidden_states.mean(dim=1))
    real = attention_mask[:, -hidden_states.shape[1] :].to(hidden_states.device)
    if how == "mean":
        weights = real[..., None].to(hidden_states.dtype)
        return (hidden_states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
    slots = torch.arange(real.shape[1], device=real.device)
    score = real * (slots + 1) if how == "last" else real * (real.shape[1] - slots)
    return hidden_states[torch.arange(real.shape[0], device=real.device), score.argmax(dim=-1)]


def refuse_packs(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, what: str) -> None:
    """Refuses packed documents where a row must be one. Args: what: there is one of, and its verb."""
    if position_ids is None or is_traced() or (attention_mask is not None and attention_mask.ndim != 2):
        return
    if packed_documents(position_ids, attention_mask) is not None:
        raise ValueError(f"Positions restart inside a row, a pack of documents, but {what} for one: give one a row.")


class Pooler(nn.Module):
    """Dense and activation on the pooled token (BERT's is tanh, arXiv:1810.04805)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.output_size, config.hidden_size)
        self.act_fn = ACT2FN[config.pooler_act]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """`(batch, output_size)` -> `(batch, hidden_size)`."""
        return self.act_fn(self.dense(pooled))


class HeadTransform(nn.Module):
    """Dense, activation and norm before an output (BERT, ModernBERT).

    Args:
        config: the form.
        size: width of what comes out.
        is_linear: a change of width alone, without bias, activation and norm.
        input_size: width of what goes in; default: that of the last hidden states.
    """

    def __init__(self, config, size: int, is_linear: bool = False, input_size: int | None = None):
        super().__init__()
        has_bias = config.mlp_bias if config.head_bias is None else config.head_bias
        self.dense = nn.Linear(input_size or config.output_size, size, bias=has_bias and not is_linear)
        self.act_fn = nn.Identity() if is_linear else ACT2FN[config.head_act or config.hidden_act]
        self.norm = None if is_linear else make_norm(config, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> `(..., size)`."""
        hidden_states = self.act_fn(self.dense(hidden_states))
        return hidden_states if self.norm is None else self.norm(hidden_states)


class LanguageModelHead:
    """The head over the vocabulary and its loss: causal, masked and conditional models differ in the labels they hand in.

    In training with labels the logits are never built (`logits` is None in the output): the loss is taken chunk by chunk.
    Set `model.keep_training_logits = True`, or pass `skip_logits=False`, to have them.
    """

    config: Any
    training: bool
    keep_training_logits = False

    def add_head(self, config) -> None:
        """Adds the modules. Args: config: the config of the stack that the head reads."""
        self.head_transform: nn.Module = nn.Identity()
        size = config.lm_head_size
        if config.lm_head_transform or size != config.output_size:
            self.head_transform = HeadTransform(config, size, is_linear=not config.lm_head_transform)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=config.lm_head_bias)
        self.head_config = config

    def score(
        self,
        hidden_states: torch.Tensor,
        targets: torch.LongTensor | None,
        *,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Loss and logits `(batch, kept, vocab_size)`; either may be None.

        Args:
            hidden_states: `(batch, seq, output_size)`.
            targets: `(batch, seq)`, the token that each position should predict; -100 carries no weight.
            logits_to_keep: how many of the last positions to score, or their indices; 0 for all.
            skip_logits: leave the logits out. Default: in training with targets, unless `keep_training_logits`.
            num_items_in_batch: divides the summed loss; default: the number of targets.
        """
        config = self.head_config
        hidden_states = self.head_transform(hidden_states)
        if skip_logits is None:
            skip_logits = self.training and not self.keep_training_logits
        options: dict[str, Any] = {"num_items_in_batch": num_items_in_batch}
        if self.training:
            options.update(label_smoothing=self.config.label_smoothing, z_loss_coef=self.config.z_loss_coef)
        scaling = {"logit_scale": config.logit_scale, "logit_softcap": config.final_logit_softcapping}
        if config.logit_scale != 1.0 and not config.lm_head_bias:
            # The same, as T5 does it: a factor on the states needs no second copy of the logits
            hidden_states, scaling["logit_scale"] = hidden_states * config.logit_scale, 1.0
        if targets is not None and skip_logits:
            return linear_cross_entropy(hidden_states, self.lm_head, targets, **scaling, **options), None
        kept: Any = logits_to_keep
        if isinstance(logits_to_keep, int):
            kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        if targets is None:
            hidden_states = hidden_states[:, kept]
        logits = scale_logits(self.lm_head(hidden_states), **scaling)
        if targets is None:
            return None, logits
        loss = cross_entropy(logits, targets, **options)
        # All of them as they are: the loss stays a function of the logits that are returned
        return loss, logits if kept == slice(None) else logits[:, kept]


def with_router_losses(
    loss: torch.Tensor | None, outputs: Any, labels: Any, config, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor | None:
    """A head's loss and, in training, what the routers of the model below add to it; see `add_router_losses`."""
    coefficients = (config.router_aux_loss_coef, config.router_z_loss_coef)
    if loss is None or outputs.router_losses is None or not any(coefficients):
        return loss
    return add_router_losses(loss, outputs.router_losses, labels, coefficients, num_items_in_batch)


def recorded(outputs: Any) -> dict[str, Any]:
    """What the output of a head takes over from that of the stack below it."""
    return {
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
        "router_logits": outputs.router_logits,
        **mean_losses(outputs.router_losses),
    }


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, config, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross-entropy, squared error or binary cross-entropy, as `config.problem_type` says or labels and sizes imply.

    Args:
        logits: `(..., num_labels)`. labels: `(...)` class ids, or as many floats as logits; -100 carries no weight.
        num_items_in_batch: divides the summed loss, so that accumulated steps add up to one large batch.
    """
    labels = labels.to(logits.device)
    problem = config.problem_type
    if problem is None:
        if config.num_labels == 1:
            problem = "regression"
        else:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "single_label_classification":
        return cross_entropy(logits, labels, num_items_in_batch=num_items_in_batch)
    if logits.numel() != labels.numel():
        raise ValueError(
            f"`labels` has shape {tuple(labels.shape)}, expected that of the logits, {tuple(logits.shape)}."
        )
    loss_fn = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
    total = loss_fn(logits.float().flatten(), labels.float().flatten(), reduction="sum")
    return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)


class ClassificationHead(nn.Module):
    """Dropout and a linear map to the labels, after a transform where the form has one.

    Args:
        config: the form.
        input_size: width of what goes in.
    """

    def __init__(self, config, num_labels: int, input_size: int, has_bias: bool = True):
        super().__init__()
        self.transform: nn.Module = nn.Identity()
        if config.classifier_transform:
            self.transform = HeadTransform(config, config.hidden_size, input_size=input_size)
            input_size = config.hidden_size
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = nn.Linear(input_size, num_labels, bias=has_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> `(..., num_labels)`."""
        return self.out_proj(self.dropout(self.transform(hidden_states)))


def pooled_size(config) -> int:
    """Width of `pooled_output`."""
    return config.hidden_size if config.pooler else config.output_size


def pooled_output(outputs: Any, attention_mask: torch.Tensor | None, config) -> torch.Tensor:
    """`(batch, pooled_size)`: what the base model's pooler gives, or the pooled states of a form without one."""
    if config.pooler:
        return outputs.pooler_output
    return pool(outputs.last_hidden_state, attention_mask, config.classifier_pooling)


class SequenceClassificationHead:
    """One label a sequence, from its pooled vector."""

    config: Any
    model: nn.Module
    reads_pooler = True

    def add_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.classifier = ClassificationHead(
            config, config.num_labels, pooled_size(config), has_bias=config.classifier_bias
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedSequenceClassifierOutput:
        """Args: labels: `(batch,)` class ids; floats `(batch,)` for one label, `(batch, num_labels)` for several at once."""
        refuse_packs(position_ids, attention_mask, "a label is")
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            past_key_values,
            inputs_embeds,
            global_attention_mask=global_attention_mask,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        logits = self.classifier(pooled_output(outputs, attention_mask, self.config))
        loss = None if labels is None else classification_loss(logits, labels, self.config, num_items)
        loss = with_router_losses(loss, outputs, labels, self.config, num_items)
        return RoutedSequenceClassifierOutput(loss=loss, logits=logits, **recorded(outputs))


class TokenClassificationHead:
    """One label a token."""

    config: Any
    model: nn.Module

    def add_head(self, config) -> None:
        self.num_labels = config.num_labels
        self.classifier = ClassificationHead(config, config.num_labels, config.output_size)

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
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedTokenClassifierOutput:
        """Args: labels: `(batch, seq)` class ids; -100 carries no weight."""
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            past_key_values,
            inputs_embeds,
            global_attention_mask=global_attention_mask,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        logits = self.classifier(outputs.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch=num_items)
        loss = with_router_losses(loss, outputs, labels, self.config, num_items)
        return RoutedTokenClassifierOutput(loss=loss, logits=logits, **recorded(outputs))


class QuestionAnsweringHead:
    """Where in the text the answer starts and ends."""

    config: Any
    model: nn.Module

    def add_head(self, config) -> None:
        # BERT's has no dropout, ModernBERT's is that of its classifiers; one module, so that tools save all of it by its name
        size, has_transform = config.output_size, config.classifier_transform
        self.qa_outputs = ClassificationHead(config, 2, size) if has_transform else nn.Linear(size, 2)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedQuestionAnsweringOutput:
        """Args: start_positions, end_positions: `(batch,)` token indices; outside the text, they carry no weight."""
        refuse_packs(position_ids, attention_mask, "an answer is")
        num_items = kwargs.pop("num_items_in_batch", None)
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            token_type_ids,
            past_key_values,
            inputs_embeds,
            global_attention_mask=global_attention_mask,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)  # (batch, seq) each
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start_logits.shape[1]
            starts, ends = (
                positions.view(-1).masked_fill((positions.view(-1) < 0) | (positions.view(-1) >= length), -100)
                for positions in (start_positions, end_positions)
            )
            loss = 0.5 * (
                cross_entropy(start_logits, starts, num_items_in_batch=num_items)
                + cross_entropy(end_logits, ends, num_items_in_batch=num_items)
            )
            loss = with_router_losses(loss, outputs, starts, self.config, num_items)
        return RoutedQuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **recorded(outputs)
        )


class MultipleChoiceHead:
    """Which of several sequences is the right one: a score each, from its pooled vector."""

    config: Any
    model: nn.Module
    reads_pooler = True

    def add_head(self, config) -> None:
        self.classifier = ClassificationHead(config, 1, pooled_size(config), has_bias=config.classifier_bias)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> RoutedMultipleChoiceOutput:
        """Args: all inputs `(batch, choices, seq, ...)`. labels: `(batch,)`, the number of the right choice."""
        num_items = kwargs.pop("num_items_in_batch", None)
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or given.ndim < 3:
            raise ValueError("Give `input_ids` (batch, choices, seq) or `inputs_embeds` (batch, choices, seq, size).")
        num_choices = given.shape[1]
        flat = [
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (
                input_ids,
                attention_mask,
                position_ids,
                token_type_ids,
                inputs_embeds,
                global_attention_mask,
            )
        ]
        refuse_packs(flat[2], flat[1], "a score is")
        outputs = self.model(*flat[:4], inputs_embeds=flat[4], global_attention_mask=flat[5], **kwargs)
        logits = self.classifier(pooled_output(outputs, flat[1], self.config)).view(-1, num_choices)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch=num_items)
        if outputs.router_losses is not None:
            outputs.router_losses = outputs.router_losses.unflatten(0, (-1, num_choices)).mean(1)
        loss = with_router_losses(loss, outputs, labels, self.config, num_items)
        return RoutedMultipleChoiceOutput(loss=loss, logits=logits, **recorded(outputs))
