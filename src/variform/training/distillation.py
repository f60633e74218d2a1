"""A student learns from a teacher: its predictions, and which tokens its layers find alike."""

from typing import Any

import torch
from datasets import DatasetDict
from torch.nn import functional as F
from transformers import PreTrainedModel

from .models import labels_of
from .trainers import SafeTrainer

IGNORED = -100


def soft_loss(student: torch.Tensor, teacher: torch.Tensor, counts: torch.Tensor, temperature: float) -> torch.Tensor:
    """Divergence of the student's predictions from the teacher's, both softened (arXiv:1503.02531).

    Args:
        student, teacher: logits, `(..., classes)`.
        counts: `(...)`, which predictions count.
        temperature: divides the logits; the loss is multiplied by its square, so that gradients keep their size.

    Returns:
        The sum over what counts, in nats.
    """
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1),
        F.log_softmax(teacher.float() / temperature, dim=-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    return temperature**2 * (divergence * counts).sum()


def likeness_loss(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """How differently two layers see which tokens of a text are alike: cosines of all pairs of hidden states, compared.

    It needs no projection between widths that differ (similarity-preserving distillation, arXiv:1907.09682, within a text).

    Args:
        student, teacher: `(batch, seq, width)`, each of its own width.
        mask: `(batch, seq)`, 1 for real tokens.

    Returns:
        The mean over the texts of the mean squared difference over a text's pairs.
    """
    pairs = mask[:, :, None] * mask[:, None, :].to(student.dtype)
    ours, theirs = (F.normalize(states, dim=-1) for states in (student, teacher))
    difference = (ours @ ours.transpose(1, 2) - theirs @ theirs.transpose(1, 2)) ** 2
    return ((difference * pairs).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)).mean()


def paired_layers(student: int, teacher: int) -> list[tuple[int, int]]:
    """Each layer of the student with the teacher's at the same relative depth, from 1; the last ones are paired."""
    return [(layer, round(layer * teacher / student)) for layer in range(1, student + 1)]


def with_labels_of(config: Any, data: DatasetDict) -> tuple[DatasetDict, dict[str, Any]]:
    """The data with its classes in the order of the teacher's, and their names as fields of the student's config.

    Names are compared without case. A teacher whose classes have other names, such as `LABEL_0`, has them in the data's order.

    Args:
        config: of the teacher. data: with a column `label` of classes.

    Raises:
        ValueError: for another number of classes than the teacher's, or labels that are numbers.
    """
    names = getattr(data["train"].features["label"], "names", None)
    theirs = [str(config.id2label[number]) for number in range(config.num_labels)]
    if names is None or len(names) != len(theirs):
        what = "numbers" if names is None else f"{len(names)} classes ({', '.join(names)})"
        raise ValueError(f"`label` has {what}, `teacher` predicts {len(theirs)} classes ({', '.join(theirs)}).")
    numbers = {name.lower(): number for number, name in enumerate(theirs)}
    if set(numbers) == {name.lower() for name in names}:
        names = theirs
        data = DatasetDict({split: rows.align_labels_with_mapping(numbers, "label") for split, rows in data.items()})
    return data, labels_of(names)


class DistillationTrainer(SafeTrainer):
    """A Trainer whose student has a teacher, which is never changed and never saved.

        loss = (1 - soft) * (loss of the labels) + soft * soft_loss + hidden * likeness_loss

    Losses of predictions are means over the labels of the whole step, gradient accumulation included.

    Args:
        teacher: with the same vocabulary or classes, or, for `soft=0`, any that reads the same tokens.
        soft: from 0 (labels alone) to 1 (the teacher alone).
        temperature: of `soft_loss`.
        hidden: weight of `likeness_loss`, over the pairs of `paired_layers`.

    Raises:
        ValueError: for a part outside `[0, 1]`, a temperature that is not above 0, or other classes than the student's.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        soft: float = 0.5,
        temperature: float = 2.0,
        hidden: float = 0.0,
        **kwargs: Any,
    ):
        if not 0 <= soft <= 1:
            raise ValueError(f"`soft={soft}` must be from 0, labels alone, to 1, the teacher alone.")
        if not temperature > 0:
            raise ValueError(f"`temperature={temperature}` must be above 0.")
        if hidden < 0:
            raise ValueError(f"`hidden={hidden}` must be at least 0.")
        super().__init__(**kwargs)
        ours, theirs = (classes_of(model) for model in (self.model, teacher))
        if soft > 0 and ours != theirs:
            raise ValueError(
                f"`teacher` predicts {theirs} classes, the student {ours}: take the teacher's tokenizer and labels."
            )
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.soft, self.temperature, self.hidden = soft, temperature, hidden
        self.model_accepts_loss_kwargs = True  # the losses below heed `num_items_in_batch`

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        is_hidden_wanted = self.hidden > 0
        with torch.no_grad():
            questions = {name: value for name, value in inputs.items() if name != "labels"}
            taught = self.teacher(**questions, output_hidden_states=is_hidden_wanted)
        extra: dict[str, Any] = {"output_hidden_states": is_hidden_wanted, "num_items_in_batch": num_items_in_batch}
        if predicts_tokens(self.teacher):
            extra["skip_logits"] = False
        outputs = model(**inputs, **extra)
        loss = (1 - self.soft) * outputs.loss
        if self.soft:
            ours, theirs, labels = outputs.logits, taught.logits, inputs["labels"]
            if is_causal(self.teacher):
                ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
            counts = labels != IGNORED
            total = counts.sum() if num_items_in_batch is None else num_items_in_batch
            loss = loss + self.soft * soft_loss(ours, theirs, counts, self.temperature) / total
        parts = 1
        if num_items_in_batch is not None:  # these are sums over a part of the step, that is a mean
            loss = loss * self.args.world_size if self.args.average_tokens_across_devices else loss
            parts = self.current_gradient_accumulation_steps
        if is_hidden_wanted:
            loss = loss + self.hidden * self.likeness(outputs, taught, inputs) / parts
        return (loss, outputs) if return_outputs else loss

    def likeness(self, outputs: Any, taught: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The mean of `likeness_loss` over the pairs of layers."""
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(inputs["input_ids"]) if mask is None else mask
        ours, theirs = outputs.hidden_states, taught.hidden_states  # what went into the layers, and what came out last
        pairs = paired_layers(len(ours) - 1, len(theirs) - 1)
        losses = [likeness_loss(ours[layer], theirs[other], mask) for layer, other in pairs]
        return torch.stack(losses).mean()


def predicts_tokens(model: PreTrainedModel) -> bool:
    """Whether a model's classes are the vocabulary."""
    return model.get_output_embeddings() is not None


def is_causal(model: PreTrainedModel) -> bool:
    """Whether logits predict the token after the one whose label stands beside them."""
    return predicts_tokens(model) and type(model).__name__.endswith("ForCausalLM")


def classes_of(model: Any) -> int:
    """How many classes a model, or one under an adapter, tells apart."""
    config = model.config
    return config.get_text_config().vocab_size if model.get_output_embeddings() is not None else config.num_labels
