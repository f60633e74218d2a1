"""Bad inputs, in all three shapes: one sentence that names the argument, what was got and what to do; or a defined result."""

import inspect
import logging

import pytest
import torch
from tiny import CONFIGS, VOCAB_SIZE, build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from variform.model import modeling_variform
from variform.model.attention import eager_attention
from variform.model.inputs import ARGUMENTS

SHAPES = list(CONFIGS)
LM = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
# Every argument of ids and masks, each in a shape that has it, with what else its call needs
PLACES = [("encoder", ""), ("decoder", ""), ("encoder_decoder", ""), ("encoder_decoder", "decoder_")]
IDS_OF = [f"{shape}-{side}input_ids" for shape, side in PLACES]


def language_model(shape, **fields):
    return build(tiny(shape, **fields), LM[shape])


def call(shape, side, ids, mask=None):
    """What a forward is given where `ids` and `mask` stand at one side of a shape."""
    given = {f"{side}input_ids": ids, f"{side}attention_mask": mask}
    other = "" if side else "decoder_"
    return given if shape != "encoder_decoder" else {f"{other}input_ids": inputs(), **given}


@pytest.fixture
def warnings(caplog, monkeypatch):
    """The messages that are logged as warnings, those of transformers too."""
    from transformers.utils import logging as platform

    platform.warning_once.cache_clear()
    for name in ("transformers", "variform"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("shape", "side"), PLACES, ids=IDS_OF)
class TestIds:
    @pytest.mark.parametrize("wrong", [VOCAB_SIZE, VOCAB_SIZE + 1000, -1, -100])
    def test_an_id_outside_the_vocabulary_is_named_with_its_place(self, shape, side, wrong):
        ids = inputs()
        ids[1, 3] = wrong
        with pytest.raises(ValueError, match=rf"`{side}input_ids\[1, 3\] = {wrong}` .*19 rows.*resize_token_embedd"):
            language_model(shape)(**call(shape, side, ids))

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            (torch.zeros(2, 0).long(), r"is empty: shape \(2, 0\)"),
            (torch.zeros(0, 4).long(), r"is empty: shape \(0, 4\)"),
            (inputs()[0], r"has shape \(7,\); expected \(batch, sequence\)"),
            (inputs()[..., None], r"has shape \(2, 7, 1\); expected \(batch, sequence\)"),
            (inputs().float(), r"must hold integer ids, got dtype torch.float32; use `.long\(\)`"),
            (inputs().bool(), r"must hold integer ids, got dtype torch.bool"),
            (inputs().to(torch.int16), r"must hold integer ids, got dtype torch.int16"),
            (inputs().tolist(), r"must be a tensor, got list"),
        ],
        ids=["no token", "no row", "1-D", "3-D", "float", "bool", "int16", "list"],
    )
    def test_ids_of_a_wrong_kind_are_refused(self, shape, side, ids, message):
        with pytest.raises(ValueError, match=rf"`{side}input_ids` {message}"):
            language_model(shape)(**call(shape, side, ids))

    def test_both_of_ids_and_embeds_are_refused(self, shape, side):
        given = {f"{side}inputs_embeds": torch.zeros(2, 7, 12), **call(shape, side, inputs())}
        with pytest.raises(ValueError, match=f"exactly one of `{side}input_ids` and `{side}inputs_embeds`"):
            language_model(shape)(**given)

    def test_embeds_that_are_ids_are_refused(self, shape, side):
        given = {**call(shape, side, None), f"{side}inputs_embeds": torch.zeros(2, 7, 12).long()}
        with pytest.raises(ValueError, match=f"`{side}inputs_embeds` must hold vectors of floats.*`{side}input_ids`"):
            language_model(shape)(**given)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_both_integers_that_torch_looks_up_are_taken(self, shape, side, dtype):
        model = language_model(shape)
        found = model(**call(shape, side, inputs().to(dtype))).logits
        assert_close(found, model(**call(shape, side, inputs())).logits, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
def test_neither_of_ids_and_embeds_is_refused(shape):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        language_model(shape)()


def test_a_pair_without_a_source_or_a_target_says_what_it_needs():
    model = language_model("encoder_decoder")
    with pytest.raises(ValueError, match=r"`decoder_input_ids` or `decoder_inputs_embeds`; .* `labels` are enough"):
        model(inputs())
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(decoder_input_ids=inputs())


@pytest.mark.parametrize(("shape", "side"), PLACES, ids=IDS_OF)
class TestMask:
    @pytest.mark.parametrize("wrong", [(3, 7), (1, 7), (2, 5), (2, 12)])
    def test_another_batch_or_length_is_refused_with_both_shapes(self, shape, side, wrong):
        message = rf"`{side}attention_mask` has shape \({wrong[0]}, {wrong[1]}\), expected \(2, 7\)"
        with pytest.raises(ValueError, match=message):
            language_model(shape)(**call(shape, side, inputs(), torch.ones(wrong).long()))

    @pytest.mark.parametrize("wrong", [(7,), (2, 1, 7), (2, 1, 1, 1, 7)])
    def test_another_number_of_dimensions_is_refused(self, shape, side, wrong):
        with pytest.raises(
            ValueError, match=rf"`{side}attention_mask` has shape .*expected \(2, 7\), one entry a tok"
        ):
            language_model(shape)(**call(shape, side, inputs(), torch.ones(wrong).long()))

    @pytest.mark.parametrize("wrong", [(3, 1, 7, 7), (2, 1, 7, 5)])
    def test_a_mask_of_scores_of_another_size_is_refused(self, shape, side, wrong):
        with pytest.raises(ValueError, match=rf"`{side}attention_mask` has shape .*queries, 7 keys"):
            language_model(shape)(**call(shape, side, inputs(), torch.ones(wrong)))

    @pytest.mark.parametrize("value", [2, -1, 0.5, float("-inf"), float("nan")])
    def test_a_value_that_is_neither_0_nor_1_is_named_with_its_place(self, shape, side, value):
        mask = torch.ones(2, 7)
        mask[1, 4] = value
        with pytest.raises(ValueError, match=rf"`{side}attention_mask\[1, 4\] = {value:g}` is neither 1"):
            language_model(shape)(**call(shape, side, inputs(), mask))

    def test_a_list_is_refused(self, shape, side):
        with pytest.raises(ValueError, match=f"`{side}attention_mask` must be a tensor, got list"):
            language_model(shape)(**call(shape, side, inputs(), [[1] * 7] * 2))

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32, torch.float64])
    def test_any_dtype_of_zeros_and_ones_is_taken(self, shape, side, dtype):
        model, (ids, mask) = language_model(shape), pad(inputs(), 2)
        found = model(**call(shape, side, ids, mask.to(dtype))).logits
        assert_close(found, model(**call(shape, side, ids, mask)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
class TestKeywords:
    def given(self, shape):
        return {"decoder_input_ids": inputs()} if shape == "encoder_decoder" else {}

    @pytest.mark.parametrize(
        ("wrong", "right"),
        [("atention_mask", "attention_mask"), ("lables", "labels"), ("output_attention", "output_attentions")],
    )
    def test_a_misspelt_one_is_refused_with_the_nearest(self, shape, wrong, right):
        with pytest.raises(TypeError, match=f"unexpected keyword `{wrong}`; did you mean `{right}`?"):
            language_model(shape)(inputs(), **{wrong: None}, **self.given(shape))

    @pytest.mark.parametrize("wrong", ["pixel_values", "special_tokens_mask", "temperature"])
    def test_one_that_nothing_reads_is_refused(self, shape, wrong):
        with pytest.raises(TypeError, match=rf"unexpected keyword `{wrong}`; Variform\w+ does not read it"):
            language_model(shape)(inputs(), **{wrong: None}, **self.given(shape))

    def test_those_of_the_platform_pass(self, shape):
        options = {"output_attentions": True, "output_hidden_states": True, "return_dict": True, "use_cache": False}
        assert language_model(shape)(inputs(), **options, **self.given(shape)).logits.isfinite().all()

    def test_those_of_a_users_attention_function_pass(self, shape):
        seen = []

        def attend(*args, temperature, **kwargs):
            seen.append(temperature)
            return eager_attention(*args, **kwargs)

        ALL_ATTENTION_FUNCTIONS.register("of_a_test", attend)
        try:
            model = build(tiny(shape), LM[shape], attn_implementation="of_a_test")
            model(inputs(), temperature=0.5, **self.given(shape))
        finally:
            ALL_ATTENTION_FUNCTIONS._global_mapping.pop("of_a_test")
        assert set(seen) == {0.5}

    def test_a_misspelt_one_of_generation_is_refused(self, shape):
        if shape != "encoder":
            with pytest.raises(ValueError, match="max_new_token"):
                language_model(shape).generate(inputs(), max_new_token=3)


def test_every_argument_of_every_class_is_known():
    """So that a new one is suggested, and passes where a wrapper hands it to a class that does not read it."""
    named = set()
    for cls in vars(modeling_variform).values():
        if inspect.isclass(cls) and cls.__name__.startswith("Variform") and hasattr(cls, "forward"):
            named |= set(inspect.signature(cls.forward).parameters)
    assert named - {"self", "kwargs", "input"} <= ARGUMENTS


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
class TestLabels:
    @pytest.mark.parametrize("wrong", [VOCAB_SIZE, -1, -99])
    def test_one_outside_the_vocabulary_is_named_with_the_rule(self, shape, training, wrong):
        labels = inputs()
        labels[1, 4] = wrong
        with pytest.raises(ValueError, match=rf"`labels\[1, \d\] = {wrong}` is outside the 19 classes.*give -100"):
            language_model(shape).train(training)(inputs(), labels=labels)

    def test_a_batch_without_any_has_loss_0_and_gradients_of_0(self, shape, training):
        model = language_model(shape).train(training)
        loss = model(inputs(), labels=torch.full((2, 7), -100)).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(("shape", "side"), PLACES, ids=IDS_OF)
def test_a_text_longer_than_the_learned_table_is_refused_with_both_lengths(shape, side):
    table = {"position_embedding_type": "learned", "max_position_embeddings": 6}
    stack = "decoder" if side else "encoder"
    model = language_model(shape, **({stack: table} if shape == "encoder_decoder" else table))
    with pytest.raises(ValueError, match=r"`position_ids` reach 6 .*`max_position_embeddings=6`.*shorten"):
        model(**call(shape, side, inputs()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}, {"use_cache": False}], ids=str)
@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_generation_past_the_learned_table_returns_the_text_and_warns_once(shape, options, warnings):
    table = {"position_embedding_type": "learned", "max_position_embeddings": 10}
    model = language_model(shape, **(table if shape == "decoder" else {"decoder": table}))
    options = {"do_sample": False, "eos_token_id": None, **options}
    text = model.generate(inputs(), max_new_tokens=30, **options)
    model.generate(inputs(), max_new_tokens=30, **options)
    assert text.shape == (2, 10)
    if shape == "decoder":
        assert_close(text[:, :7], inputs(), rtol=0, atol=0)
    stops = [message for message in warnings() if "Generation stops at 10 tokens" in message]
    assert len(stops) == 1
    assert "`max_position_embeddings=10`" in stops[0]


class TestRotaryPositionsBeyondTraining:
    MESSAGE = "longer than the 6 tokens that the model is made for (`max_position_embeddings=6`)"

    def told(self, warnings):
        return [message for message in warnings() if "rotary positions are new to it" in message]

    @pytest.mark.parametrize("shape", SHAPES)
    def test_are_told_once(self, shape, warnings):
        sides = {side: {"max_position_embeddings": 6} for side in ("encoder", "decoder")}
        model = language_model(shape, **(sides if shape == "encoder_decoder" else sides["encoder"]))
        for _ in range(3):
            model(**call(shape, "", inputs()))
        assert len(self.told(warnings)) == 1
        assert self.MESSAGE in self.told(warnings)[0]
        assert "`rope_parameters=" in self.told(warnings)[0]

    def test_are_told_once_while_generating(self, warnings):
        model = language_model("decoder", max_position_embeddings=9)
        model.generate(inputs(), max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert len(self.told(warnings)) == 1

    @pytest.mark.parametrize(
        "fields",
        [
            {"attention_patterns": ["sliding_window:3"]},
            {"position_embedding_type": "alibi"},
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
            {"max_position_embeddings": 7},
        ],
        ids=["windows", "alibi", "dynamic", "long enough"],
    )
    def test_are_not_told_where_nothing_is_new(self, fields, warnings):
        language_model("decoder", **{"max_position_embeddings": 6, **fields})(inputs())
        assert not self.told(warnings)

    def test_are_not_told_of_packed_documents_that_are_short(self, warnings):
        model = language_model("decoder", max_position_embeddings=6)
        model(inputs(), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]))
        assert not self.told(warnings)
