"""Sparse families: texts of a batch cut as if alone, global tokens by rule, endless windows, and long texts in the kernels."""

import copy
import math

import pytest
import torch
from native_models import FIRST_REGULAR_ID, TAKE_MARKS, config_class, random_fields, random_model
from pairs import (
    CACHED,
    CHOICES,
    GRADIENT_TOLERANCE,
    LABELS,
    MAIN,
    QUESTIONS,
    SEQ2SEQ,
    assert_same,
    build,
    cases_of,
    config_values,
    gradients_by_our_names,
    make_batch,
    padding_mask,
    random_ids,
    result_of,
    yardstick,
)
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.longformer.modeling_longformer import _compute_global_attention_mask

from variform.conversion import FAMILIES
from variform.conversion.convert import from_hf, to_hf
from variform.model import attention
from variform.model.attention import attend_in_blocks as in_blocks
from variform.model.attention import attend_in_chunks as in_chunks

pytestmark = pytest.mark.usefixtures("one_hash")


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
