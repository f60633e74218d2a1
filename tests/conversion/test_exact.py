"""Every family and head, over seeded random configs: Variform computes what transformers' own class computes.

All is float32 with weights drawn wide, and batches are padded; a difference is measured against the largest entry of what
it is compared with. A failure prints the native config and the form as YAML, with the seed. More seeds:
`VARIFORM_SEEDS=20 pytest tests/conversion/test_exact.py` takes 20 of each language model and 5 of each other class.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_models import COUNT_SLOTS, FIRST_REGULAR_ID, GROWING_ROPES, TAKE_MARKS, random_fields
from pairs import (
    CACHED,
    CASES,
    GRADIENT_TOLERANCE,
    LABELS,
    MAIN,
    QUESTIONS,
    SEQ2SEQ,
    TARGET_LENGTHS,
    Case,
    Pair,
    assert_same,
    config_values,
    gradients_by_our_names,
    make_batch,
    padding_mask,
    result_of,
    sides,
    yardstick,
)
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from variform.conversion import FAMILIES
from variform.conversion.check import check_conversion
from variform.conversion.convert import convert_folder, from_hf, to_hf
from variform.conversion.family import POOLED

pytestmark = pytest.mark.usefixtures("one_hash")

# Reformer's own cache loses keys, and `generate` leaves its mask out
GENERATING = [case for case in CACHED if case in MAIN and not case.is_reformer]


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


def objective(output: Any, case: Case, real: torch.Tensor) -> torch.Tensor:
    """What is differentiated: the loss, or a fixed combination of all that a base model gives out."""
    if case.auto_class != "AutoModel":
        return output.loss
    states = output.last_hidden_state if case.shape == SEQ2SEQ else output.last_hidden_state[real]
    total = states.sum(dim=-2).cos().sum()
    return total + output.pooler_output.sum() if "pooler_output" in output else total


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
