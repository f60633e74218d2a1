"""Every family and head, over seeded random configs: Variform computes what transformers' own class computes.

All is float32 with weights drawn wide, and batches are padded; a difference is measured against the largest entry of what
it is compared with. A failure prints the native config and the form as YAML, with the seed. More seeds:
`VARIFORM_SEEDS=20 pytest tests/conversion/test_exact.py` takes 20 of each language model and 5 of each other class.
"""

import copy
import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from native_models import (
    COUNT_SLOTS,
    FIRST_REGULAR_ID,
    GROWING_ROPES,
    OFFSET_BY_PADDING,
    OTHER_SHAPES,
    TAKE_MARKS,
    config_class,
    hash_as_ours,
    random_config,
    random_fields,
    random_model,
)
from transformers import CONFIG_MAPPING, DynamicCache, EncoderDecoderCache, PreTrainedConfig, PreTrainedModel
from transformers.models.longformer.modeling_longformer import _compute_global_attention_mask

from variform.conversion import FAMILIES
from variform.conversion.check import check_conversion
from variform.conversion.convert import convert_folder, from_hf, to_hf
from variform.conversion.engine import inwards
from variform.conversion.family import BOOKKEEPING, LANGUAGE_MODELS, POOLED
from variform.model import attention
from variform.model.attention import attend_in_blocks as in_blocks
from variform.model.attention import attend_in_chunks as in_chunks

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
SEEDS = int(os.environ.get("VARIFORM_SEEDS", "4"))
LENGTHS = torch.tensor([13, 8, 3, 5])  # real tokens of each row
TARGET_LENGTHS = torch.tensor([2, 9, 6, 4])
MARKED = torch.tensor([0.3, 0.0, 0.6, 0.2])  # which part of each row is marked as global
LABELS, QUESTIONS = "AutoModelForSequenceClassification", "AutoModelForQuestionAnswering"
CHOICES = "AutoModelForMultipleChoice"
SEQ2SEQ = "variform_encoder_decoder"


class Case(NamedTuple):
    """One native class with one random config."""

    model_type: str
    auto_class: str
    seed: int

    def __str__(self) -> str:
        return f"{FAMILIES[self.model_type].heads[self.auto_class].foreign}-{self.seed}"

    @property
    def shape(self) -> str:
        return FAMILIES[self.model_type].shape

    @property
    def config(self) -> PreTrainedConfig:
        config = random_config(self.model_type, self.seed)
        if self.auto_class == QUESTIONS:
            config.num_labels = 2  # a start and an end
        return config

    @property
    def lengths(self) -> torch.Tensor:
        """Real tokens of each row; BigBird cuts up longer texts than the others."""
        if self.is_reformer:
            return torch.full_like(LENGTHS, 24)
        return 3 * LENGTHS if self.model_type == "big_bird" else LENGTHS

    @property
    def is_reformer(self) -> bool:
        """Whether the native class differentiates in training alone, and gives the second of its streams as hidden states."""
        return OTHER_SHAPES.get(self.model_type, self.model_type) == "reformer"

    @property
    def counts_blocks(self) -> bool:
        """Whether the native class cuts the padded batch into blocks, where ours cuts each text."""
        return self.is_reformer or getattr(self.config, "attention_type", None) == "block_sparse"

    @property
    def sorts_texts(self) -> bool:
        """Whether no cache of ours serves it."""
        return self.is_reformer and "lsh" in self.config.attn_layers

    @property
    def dtype(self) -> torch.dtype:
        """In float32, Reformer's class merges the rounds of a token that sees only itself in steps of 2 ** -7."""
        is_coarse = self.sorts_texts and self.shape == "variform_decoder" and self.config.num_hashes > 1
        return torch.float64 if is_coarse else torch.float32


def all_cases() -> list[Case]:
    cases = []
    for name, family in FAMILIES.items():
        for number, auto_class in enumerate(family.heads):
            is_main = auto_class in LANGUAGE_MODELS
            first, count = (0, SEEDS) if is_main else (number, (SEEDS + 3) // 4)
            cases += [Case(name, auto_class, seed) for seed in range(first, first + count)]
    return cases


def sides(case: Case) -> list[str]:
    """Where the padding may stand: classifiers that natively read the first slot must find the first token there."""
    if case.counts_blocks:
        return ["none"]
    is_pooled = case.auto_class in POOLED and case.shape == "variform_encoder"
    return ["right"] if is_pooled and getattr(case.config, "classifier_pooling", "cls") == "cls" else ["right", "left"]


CASES = all_cases()
CACHED = [
    case
    for case in CASES
    if case.shape != "variform_encoder" and case.auto_class in ("AutoModel", *LANGUAGE_MODELS) and not case.sorts_texts
]
MAIN = [case for case in CASES if case.auto_class in LANGUAGE_MODELS]
# Reformer's own cache loses keys, and `generate` leaves its mask out
GENERATING = [case for case in CACHED if case in MAIN and not case.is_reformer]


class Pair(NamedTuple):
    """A native model, and ours with its weights."""

    native: PreTrainedModel
    ours: PreTrainedModel


@cache
def build(case: Case) -> Pair:
    family = FAMILIES[case.model_type]
    native = random_model(family.foreign_class(case.auto_class), case.config, case.seed).to(case.dtype)
    return Pair(native, from_hf(native))


def as_yaml(config: PreTrainedConfig) -> str:
    """What a config says beyond the defaults."""
    values = config.to_diff_dict()
    values |= {name: getattr(config, name).to_diff_dict() for name in ("encoder", "decoder") if name in values}
    return yaml.safe_dump(values)


@pytest.fixture(autouse=True)
def one_hash(monkeypatch):
    """Reformer's class draws the numbers that it hashes with."""
    hash_as_ours(monkeypatch)


@pytest.fixture
def pair(case: Case) -> Pair:
    """The models of a case, of the test's own: some change with the texts they have seen (dynamic rope)."""
    print(f"seed {case.seed}, native config:\n{as_yaml(case.config)}")
    models = copy.deepcopy(build(case))
    print(f"form:\n{as_yaml(models.ours.config)}")
    return models


def padding_mask(lengths: torch.Tensor, side: str) -> torch.Tensor:
    """`(batch, seq)`: 1 for the real tokens of `lengths`, with the padding on the given side; all 1 for "none"."""
    slots = torch.arange(int(lengths.max()))
    mask = (slots < lengths[:, None]).long()
    return {"right": mask, "left": mask.flip(1), "none": torch.ones_like(mask)}[side]


def random_ids(mask: torch.Tensor, vocab_size: int, padding: int) -> torch.Tensor:
    return torch.randint(FIRST_REGULAR_ID, vocab_size, mask.shape).where(mask.bool(), torch.tensor(padding))


class Batch(NamedTuple):
    """What the native model and ours are given, which differ in positions alone, and which tokens are real."""

    native: dict[str, torch.Tensor]
    ours: dict[str, torch.Tensor]
    real: torch.Tensor


def make_batch(case: Case, side: str) -> Batch:
    """A padded batch. Padded left, the native class is told positions counted over the real tokens; where it cannot be
    told, ours is told its slots."""
    config, mask = case.config, padding_mask(case.lengths, side)
    inputs = {"input_ids": random_ids(mask, config.vocab_size, config.pad_token_id), "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, mask.shape)
    if case.model_type in TAKE_MARKS:
        marks = torch.rand(mask.shape) < MARKED[:, None]
        if case.auto_class == LABELS:
            marks[:, 0] = True  # by rule, in ours
        inputs["global_attention_mask"] = marks.long()
    if case.auto_class == CHOICES:
        inputs = {name: tensor.view(2, 2, -1) for name, tensor in inputs.items()}
    if case.shape == SEQ2SEQ:
        targets = padding_mask(TARGET_LENGTHS, "right").bool()
        vocab_size = getattr(config, "decoder_vocab_size", config.vocab_size)
        if case.auto_class == "AutoModel":
            inputs["decoder_input_ids"] = random_ids(torch.ones_like(targets), vocab_size, 0)
        else:
            inputs["labels"] = random_ids(targets, vocab_size, -100)
    else:
        inputs |= make_labels(case, inputs["input_ids"], mask.bool())
    native, ours = dict(inputs), dict(inputs)
    if side == "left":
        counted = (mask.cumsum(-1) - 1).clamp(min=0)
        if case.model_type in COUNT_SLOTS:
            ours["position_ids"] = torch.arange(mask.shape[1])[None]
        elif case.shape != SEQ2SEQ:
            # RoBERTa's are the rows of its table
            first = config.pad_token_id + 1 if case.model_type in OFFSET_BY_PADDING else 0
            native["position_ids"] = (counted + first).view(inputs["input_ids"].shape)
    return Batch(native, ours, mask.bool())


def make_labels(case: Case, input_ids: torch.Tensor, real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Labels of an encoder's or a decoder's head; -100 for padding."""
    config, nothing, head = case.config, torch.tensor(-100), case.auto_class.removeprefix("AutoModel")
    if head == "ForMaskedLM":
        return {"labels": random_ids(real & (torch.rand(real.shape) < 0.5), config.vocab_size, -100)}
    if head == "ForCausalLM":
        # What stands before the first real token is padding, whose states are nobody's
        return {"labels": input_ids.where(real & (real.cumsum(-1) > 1), nothing)}
    if head == "ForTokenClassification":
        return {"labels": torch.randint(config.num_labels, real.shape).where(real, nothing)}
    if head == "ForMultipleChoice":
        return {"labels": torch.randint(2, (2,))}
    if head == "ForSequenceClassification":
        size = (len(real), config.num_labels)
        if config.problem_type == "regression":
            return {"labels": torch.randn(size)}
        if config.problem_type == "multi_label_classification":
            return {"labels": torch.randint(2, size).float()}
        return {"labels": torch.randint(config.num_labels, (len(real),))}
    if head == "ForQuestionAnswering" and real.all():
        # The native loss reads the logits of padding too, which are nobody's
        return {name: torch.randint(real.shape[1], (len(real),)) for name in ("start_positions", "end_positions")}
    return {}


def assert_same(
    ours: torch.Tensor,
    native: torch.Tensor,
    name: str,
    scale: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """Equal within `tolerance` of the largest entry of `scale`; default: of the native tensor."""
    assert ours.shape == native.shape, name
    size = (native if scale is None else scale).abs().max()
    assert size > 0, f"{name}: nothing to compare"
    error = ((ours - native).abs().max() / size).item()
    assert error <= tolerance, f"{name}: {error:.1e}"


def result_of(output: Any, auto_class: str) -> torch.Tensor:
    """What a class computes: logits, or the last hidden states of a base model."""
    if auto_class == QUESTIONS:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.last_hidden_state if auto_class == "AutoModel" else output.logits


@pytest.mark.parametrize("model_type", FAMILIES)
def test_four_seeds_reach_both_values_of_every_switch(model_type):
    drawn = [random_fields(model_type, seed) for seed in range(4)]
    switches = {name for fields in drawn for name, value in fields.items() if isinstance(value, bool)} - {"is_decoder"}
    for name in switches:
        assert len({fields.get(name) for fields in drawn}) == 2, name


@pytest.mark.parametrize(("case", "side"), [(case, side) for case in CASES for side in sides(case)], ids=str)
@torch.no_grad()
def test_outputs_and_loss(case, pair, side):
    batch = make_batch(case, side)
    expected = pair.native(**batch.native, output_hidden_states=True)
    output = pair.ours(**batch.ours, output_hidden_states=True)

    real = {"": batch.real}
    if case.shape == SEQ2SEQ:
        targets = padding_mask(TARGET_LENGTHS, "right" if "labels" in batch.ours else "none")
        real = {"encoder_": batch.real, "decoder_": targets.bool()}
    for stack, is_real in real.items():
        pairs = zip(output[f"{stack}hidden_states"], expected[f"{stack}hidden_states"], strict=True)
        for layer, (states, native_states) in enumerate(pairs):
            native_states = native_states[:, : states.shape[1]]  # BigBird's, filled up to whole blocks
            if case.is_reformer and layer == len(expected.hidden_states) - 1:
                continue  # before the last norm, and ours after it
            states = states[..., -native_states.shape[-1] :]
            assert_same(states[is_real], native_states[is_real], f"{stack}hidden_states[{layer}]")
    native_result, result = result_of(expected, case.auto_class), result_of(output, case.auto_class)
    if case.auto_class in POOLED:
        is_real = slice(None)
    assert_same(result[is_real], native_result[is_real], "result")
    if "pooler_output" in expected and side != "left":
        assert_same(output.pooler_output, expected.pooler_output, "pooler_output")
    assert ("loss" in expected) == ("loss" in output)
    if "loss" in expected:
        assert_same(output.loss, expected.loss, "loss", scale=native_result)


def trained_side(case: Case) -> str:
    """Where the padding stands: left wherever all that is differentiated has a native counterpart there."""
    if case.auto_class == QUESTIONS or case.counts_blocks:
        return "none"
    has_pooler = case.auto_class == "AutoModel" and case.shape == "variform_encoder"
    return "right" if has_pooler else sides(case)[-1]


def yardstick(name: str, case: Case) -> str:
    """Whose gradient to measure a gradient by: its own, but for a bias that shifts all alike that a softmax compares (keys,
    choices, positions of an answer), whose gradient is rounding."""
    if name.endswith(("k_proj.bias", "k_proj_global.bias")):
        return name.replace("k_proj", "q_proj")
    if case.auto_class in (QUESTIONS, CHOICES) and not name.startswith("model."):
        return name.replace("bias", "weight")
    if case.auto_class == QUESTIONS and name.endswith("norm.bias"):
        return name.replace("bias", "weight")  # the last norm's
    return name


def objective(output: Any, case: Case, real: torch.Tensor) -> torch.Tensor:
    """What is differentiated: the loss, or a fixed combination of all that a base model gives out."""
    if case.auto_class != "AutoModel":
        return output.loss
    states = output.last_hidden_state if case.shape == SEQ2SEQ else output.last_hidden_state[real]
    total = states.sum(dim=-2).cos().sum()
    return total + output.pooler_output.sum() if "pooler_output" in output else total


def gradients_by_our_names(case: Case, native: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients of a native model, gone the way of its weights."""
    tensors = native.state_dict(keep_vars=True)

    def gradient(name: str) -> torch.Tensor:
        grad = tensors[name].grad
        return torch.zeros_like(tensors[name]) if grad is None else grad

    weights = native.state_dict()
    conversion = inwards(FAMILIES[case.model_type], native.config, case.auto_class, weights, weights.__getitem__)
    return dict(conversion.run(gradient))


# In training, BigBird's class draws blocks of its own; Reformer's has gradients in training alone
TRAINED = [(case, case.is_reformer) for case in CASES]
TRAINED += [(case, True) for case in MAIN if not case.counts_blocks]


@pytest.mark.parametrize(("case", "training"), TRAINED, ids=str)
def test_gradients(case, pair, training):
    """In training a language model's loss is taken chunk by chunk, without logits; without dropout it is the same loss."""
    native, ours = pair.native.train(training), pair.ours.train(training)
    # Natively, the losses of routers are off until they are asked for: `test_experts.py` compares them
    ours.config.router_aux_loss_coef = ours.config.router_z_loss_coef = 0.0
    batch = make_batch(case, trained_side(case))
    expected, output = native(**batch.native), ours(**batch.ours)
    objective(expected, case, batch.real).backward()
    objective(output, case, batch.real).backward()

    if training and case in MAIN:
        assert output.logits is None
        assert_same(output.loss, expected.loss, "loss", scale=expected.logits)
    native_gradients = gradients_by_our_names(case, native)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert gradients.keys() == native_gradients.keys()
    for name, gradient in native_gradients.items():
        if case.auto_class == LABELS and case.model_type in TAKE_MARKS and not gradient.any():
            # A label reads one row of the last layer, which is global and made by other projections
            assert not gradients[name].any()
            continue
        scale = native_gradients[yardstick(name, case)]
        assert_same(gradients[name], gradient, name, scale, GRADIENT_TOLERANCE)


Step = Callable[..., Any]


def decode(step: Step, length: int, auto_class: str) -> torch.Tensor:
    """What a model computes through its cache: four tokens at once, then one by one."""
    outputs = [step(0, 4, use_cache=True)]
    for start in range(4, length):
        outputs.append(step(start, start + 1, past_key_values=outputs[-1].past_key_values, use_cache=True))
    return torch.cat([result_of(output, auto_class) for output in outputs], dim=1)


def decoder_steps(case: Case, pair: Pair) -> tuple[Step, Step, torch.Tensor]:
    """Functions that give a text's tokens from `start` to `stop` to the native model and to ours; which tokens are real."""
    batch = make_batch(case, "none" if case.is_reformer else "left")
    ids, mask = batch.native["input_ids"], batch.native["attention_mask"]
    positions = batch.native.get("position_ids", mask.cumsum(-1) - 1)

    def native_step(start, stop, **kwargs):
        return pair.native(
            ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop], **kwargs
        )

    def our_step(start, stop, **kwargs):
        return pair.ours(ids[:, start:stop], attention_mask=mask[:, :stop], **kwargs)

    return native_step, our_step, batch.real


def seq2seq_steps(case: Case, pair: Pair) -> tuple[Step, Step, torch.Tensor]:
    batch = make_batch(case, "left")
    mask = batch.native["attention_mask"]
    ids = torch.randint(FIRST_REGULAR_ID, pair.ours.config.decoder.vocab_size, mask.shape)

    def make_step(model, inputs):
        encoder_inputs = {
            name: tensor for name, tensor in inputs.items() if not name.startswith(("decoder", "labels"))
        }
        encoded = model.get_encoder()(**encoder_inputs)

        def step(start, stop, **kwargs):
            return model(decoder_input_ids=ids[:, start:stop], encoder_outputs=encoded, attention_mask=mask, **kwargs)

        return step

    return make_step(pair.native, batch.native), make_step(pair.ours, batch.ours), torch.ones_like(mask).bool()


@pytest.mark.parametrize("case", CACHED, ids=str)
@torch.no_grad()
def test_decoding_token_by_token(case, pair):
    """Ours through its cache, the native model in one pass over all."""
    native_step, our_step, real = (seq2seq_steps if case.shape == SEQ2SEQ else decoder_steps)(case, pair)
    length = real.shape[1]
    if any(name in str(getattr(case.config, "rope_parameters", "")) for name in GROWING_ROPES):
        # Keys in a cache keep the angle of their time: one pass is not the same, in the native model either
        expected = decode(native_step, length, case.auto_class)
    else:
        expected = result_of(native_step(0, length), case.auto_class)
    assert_same(decode(our_step, length, case.auto_class)[real], expected[real], "result")


@pytest.mark.parametrize("case", GENERATING, ids=str)
def test_greedy_generation(case, pair):
    # `generate` cannot be told an encoder's positions
    batch = make_batch(case, "right" if case.model_type in COUNT_SLOTS else "left")
    names = ("input_ids", "attention_mask", "global_attention_mask")
    inputs = {name: batch.ours[name] for name in names if name in batch.ours}
    options = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
    tokens = pair.ours.generate(**inputs, **options)
    assert tokens.shape[1] >= 9
    if case.shape == SEQ2SEQ:
        # Left to itself, the native class counts the encoder's layers for the decoder's cache
        options["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert tokens.tolist() == pair.native.generate(**inputs, **options).tolist()


def config_values(model: PreTrainedModel) -> dict[str, Any]:
    return {name: value for name, value in model.config.to_dict().items() if name not in BOOKKEEPING}


def is_kept_wide(native: PreTrainedModel, name: str) -> bool:
    """Whether transformers has this tensor in float32 when it loads it, whatever the dtype: some of float16, and tables that
    their class makes so."""
    if "position_embeddings.weights." in name:
        return True
    return native.dtype == torch.float16 and not {*name.split(".")}.isdisjoint(native._keep_in_fp32_modules or [])


def assert_bit_equal(case: Case, back: PreTrainedModel, native: PreTrainedModel) -> None:
    """All tensors are the same; one that the native class holds and never reads comes back as the one it may be tied to, or
    as zeros."""
    tensors, expected = back.state_dict(), native.state_dict()
    assert tensors.keys() == expected.keys()
    family = FAMILIES[case.model_type]
    idle = family.idle_tensors(case.auto_class, expected)
    for name in expected:
        tensor = expected[idle.get(name, name)]
        if name in family.heads[case.auto_class].unread:
            tensor = torch.zeros_like(tensor)
        assert tensors[name].dtype == tensor.dtype or is_kept_wide(native, name), name
        assert torch.equal(tensors[name].to(tensor.dtype), tensor), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_there_and_back(case, pair):
    back = to_hf(pair.ours)
    assert type(back) is type(pair.native)
    assert_bit_equal(case, back, pair.native)
    assert config_values(back) == config_values(pair.native)


ON_DISK = [
    case for case in CASES if case.model_type in (*TAKE_MARKS, "big_bird") and (case not in MAIN or case.seed == 0)
]
ON_DISK += [case for case in MAIN if case.model_type in ("bert", "roberta") and not case.config.tie_word_embeddings][
    :2
]
ON_DISK += [case for case in CASES if case.is_reformer and case.dtype == torch.float32 and case.seed < 2]


@pytest.mark.parametrize("case", ON_DISK, ids=str)
def test_there_and_back_on_disk(case, pair, tmp_path):
    """With the comparison that `convert --check` makes; of BERT and RoBERTa, models whose embeddings are not tied."""
    native, ours, back = tmp_path / "native", tmp_path / "ours", tmp_path / "back"
    pair.native.save_pretrained(native)
    convert_folder(native, ours)
    check = check_conversion(native, ours)
    assert check.is_exact, check
    convert_folder(ours, back)
    assert check_conversion(ours, back).is_exact
    assert_bit_equal(case, type(pair.native).from_pretrained(back), pair.native)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [case for case in MAIN if case.seed < 2], ids=str)
def test_half_precision_stays(case, pair, dtype):
    native = pair.native.to(dtype)
    ours = from_hf(native)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {dtype}
    assert ours.config.dtype == dtype
    assert_bit_equal(case, to_hf(ours), native)


def cases_of(model_type: str, auto_class: str) -> list[Case]:
    return [case for case in CASES if (case.model_type, case.auto_class) == (model_type, auto_class)]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    "case", [case for case in MAIN if case.model_type == "big_bird" and case.counts_blocks], ids=str
)
@torch.no_grad()
def test_bigbird_cuts_each_text_of_a_batch_as_if_alone(case, pair, side):
    config = case.config
    block, whole = config.block_size, (5 + 2 * config.num_random_blocks) * config.block_size
    lengths = torch.tensor([whole, whole + 1, whole + 2 * block, whole + 3 * block + 1, 2 * block + 1])
    mask = padding_mask(lengths, side)
    ids = random_ids(mask, config.vocab_size, config.pad_token_id)
    logits = pair.ours(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        # A short text makes the native class see all texts whole from then on
        native = copy.deepcopy(pair.native)
        assert_same(logits[row, real], native(ids[row, real][None]).logits[0], f"row {row}")


@pytest.mark.parametrize("case", cases_of("longformer", LABELS), ids=str)
@torch.no_grad()
def test_longformer_labels_by_a_first_token_that_is_global_by_rule(case, pair):
    batch = make_batch(case, "right")
    for inputs in (batch.native, batch.ours):
        del inputs["global_attention_mask"]
    assert_same(pair.ours(**batch.ours).logits, pair.native(**batch.native).logits, "logits")


@pytest.mark.parametrize("auto_class", [QUESTIONS, CHOICES])
@torch.no_grad()
def test_longformer_is_told_the_tokens_that_its_class_finds_by_separators(auto_class):
    (case,) = cases_of("longformer", auto_class)[:1]
    native, ours = copy.deepcopy(build(case))
    native.config.sep_token_id = separator = case.config.vocab_size - 1
    ids = torch.randint(FIRST_REGULAR_ID, separator, (4, 13))
    ids[:, [3, 4, 12]] = separator
    is_question = auto_class == QUESTIONS
    marks = _compute_global_attention_mask(ids, separator, before_sep_token=is_question).long()
    if not is_question:
        ids, marks = ids.view(2, 2, -1), marks.view(2, 2, -1)
    expected = result_of(native(ids), auto_class)
    assert_same(result_of(ours(ids, global_attention_mask=marks), auto_class), expected, "result")
    assert not torch.allclose(result_of(ours(ids), auto_class), expected)


# Of a window or a block that is longer than any text, ours keeps as much as a text can show
ENDLESS = {
    "longformer": {"attention_window": [512, 8], "num_hidden_layers": 2},
    "big_bird": {"block_size": 81, "attention_type": "block_sparse"},
    "led": {"attention_window": 512},
    "reformer": {"attn_layers": ["local", "lsh"], "local_attn_chunk_length": 64, "lsh_attn_chunk_length": 99},
}


@pytest.mark.parametrize("model_type", ENDLESS)
def test_windows_and_blocks_longer_than_any_text_come_back(model_type):
    config = config_class(model_type)(**random_fields(model_type, 2) | ENDLESS[model_type])
    native = FAMILIES[model_type].foreign_class("AutoModel")(config)
    assert config_values(to_hf(from_hf(native))) == config_values(native)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", [case for case in MAIN if case.is_reformer], ids=str)
@torch.no_grad()
def test_reformer_cuts_each_text_of_a_batch_as_if_alone(case, pair, side):
    """Of whole numbers of chunks: the native class fills others up, and counts what it filled in."""
    config = case.config
    chunks = {"local": config.local_attn_chunk_length, "lsh": config.lsh_attn_chunk_length}
    whole = math.lcm(*(chunks[kind] for kind in config.attn_layers))
    lengths = torch.tensor([24, whole, 24 - 24 // whole // 2 * whole, 1])
    mask = padding_mask(lengths, side)
    ids = random_ids(mask, config.vocab_size, config.pad_token_id)
    logits = pair.ours(ids, attention_mask=mask).logits
    for row, real in enumerate(mask.bool()):
        assert_same(logits[row, real], pair.native(ids[row, real][None]).logits[0], f"row {row}")


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModelForMaskedLM"])
def test_long_texts_are_sorted_into_chunks(auto_class, monkeypatch):
    """Of 512 tokens, with several hashes a token; the gradients too."""
    calls = []
    monkeypatch.setattr(
        attention, "attend_in_chunks", lambda *args, **kw: calls.append(args) or in_chunks(*args, **kw)
    )
    name = "reformer" if auto_class == "AutoModelForCausalLM" else "reformer_encoder"
    (case,) = cases_of(name, auto_class)[:1]
    fields = random_fields(name, 0) | {"attn_layers": ["lsh", "local"], "axial_pos_embds": False, "num_hashes": 2}
    fields |= {"max_position_embeddings": 512, "local_attn_chunk_length": 32, "local_num_chunks_before": 1}
    fields |= {"lsh_attn_chunk_length": 16, "num_buckets": [4, 8]}
    native_class = FAMILIES[name].foreign_class(auto_class)
    native = random_model(native_class, config_class(name)(**fields), 0).double()
    ours = from_hf(native).train()
    native.train()
    ids = torch.randint(FIRST_REGULAR_ID, fields["vocab_size"], (2, 512))
    expected, output = native(ids, labels=ids), ours(ids, labels=ids, skip_logits=False)
    assert len(calls) == 1
    assert_same(output.logits, expected.logits, "logits")
    output.loss.backward()
    expected.loss.backward()
    native_gradients = gradients_by_our_names(case, native)
    for name, parameter in ours.named_parameters():
        assert_same(parameter.grad, native_gradients[name], name, None, GRADIENT_TOLERANCE)


@pytest.mark.parametrize("case", [case for case in CACHED if case in MAIN and case.is_reformer], ids=str)
@torch.no_grad()
def test_local_reformers_write_what_their_class_does_without_a_cache(case, pair):
    ids = torch.randint(FIRST_REGULAR_ID, case.config.vocab_size, (2, 11))
    options = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
    assert pair.ours.generate(ids, **options).tolist() == greedy(pair.native, ids, 9).tolist()


def greedy(native: PreTrainedModel, ids: torch.Tensor, count: int) -> torch.Tensor:
    """The likeliest next tokens, of which none ends the text."""
    for _ in range(count):
        logits = native(ids, use_cache=False).logits[:, -1]
        logits[:, native.config.eos_token_id] = -torch.inf
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), dim=1)
    return ids


# Texts from which on a plan of the block kernel pays: 523 and 307 tokens, padded on the right
LONG_LENGTHS = torch.tensor([523, 307])
LONG = {
    "longformer": {"max_position_embeddings": 600, "attention_window": [32, 8], "num_hidden_layers": 2},
    "big_bird": {"max_position_embeddings": 600, "block_size": 16, "attention_type": "block_sparse"},
    "led": {"max_encoder_position_embeddings": 600, "attention_window": [32, 8], "encoder_layers": 2},
}


@pytest.mark.parametrize("model_type", LONG)
def test_long_texts_go_through_the_block_kernel(model_type, monkeypatch):
    plans = []
    monkeypatch.setattr(
        attention, "attend_in_blocks", lambda *args, **kw: plans.append(args) or in_blocks(*args, **kw)
    )
    case = next(case for case in MAIN if case.model_type == model_type)
    fields = random_fields(model_type, 0) | LONG[model_type]
    native_class = FAMILIES[model_type].foreign_class(case.auto_class)
    native = random_model(native_class, CONFIG_MAPPING[model_type](**fields), 0)
    ours = from_hf(native)
    mask = padding_mask(LONG_LENGTHS, "none" if case.counts_blocks else "right")
    ids = random_ids(mask, fields["vocab_size"], fields["pad_token_id"])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask.bool(), torch.tensor(-100))}
    if model_type in TAKE_MARKS:
        inputs["global_attention_mask"] = (torch.rand(mask.shape) < 0.01).long()
    if case.shape == SEQ2SEQ:
        inputs["labels"] = ids[:, :9].contiguous()
    expected, output = native(**inputs), ours(**inputs)
    assert len(plans) == ours.get_encoder().config.num_hidden_layers
    real = slice(None) if case.shape == SEQ2SEQ else mask.bool()
    assert_same(output.logits[real], expected.logits[real], "logits")
    output.loss.backward()
    expected.loss.backward()
    native_gradients = gradients_by_our_names(case, native)
    for name, parameter in ours.named_parameters():
        scale = native_gradients[yardstick(name, case)]
        assert_same(parameter.grad, native_gradients[name], name, scale, GRADIENT_TOLERANCE)
