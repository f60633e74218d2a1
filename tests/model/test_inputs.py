"""Wrong and odd inputs: each wrong one is refused in a sentence that names it, each odd one has a defined result."""

import logging

import pytest
import torch
from tiny import VOCAB_SIZE, build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from variform.model.attention import SPELLED_OUT

SHAPES = ["encoder", "decoder"]
LM = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}


@pytest.fixture(params=SHAPES)
def model(request):
    return build(tiny(request.param))


def test_an_id_beyond_the_vocabulary_is_named_with_its_place(model):
    ids = inputs()
    ids[1, 3] = VOCAB_SIZE
    with pytest.raises(ValueError, match=r"`input_ids\[1, 3\] = 19`.*19 rows.*resize_token_embeddings"):
        model(ids)


def test_a_negative_id_is_named_with_its_place(model):
    ids = inputs()
    ids[0, 2] = -100
    with pytest.raises(ValueError, match=r"`input_ids\[0, 2\] = -100`"):
        model(ids)


def test_a_type_id_beyond_the_table_is_named():
    model = build(tiny("encoder", type_vocab_size=2))
    types = torch.zeros(2, 7).long()
    types[1, 6] = 2
    with pytest.raises(ValueError, match=r"`token_type_ids\[1, 6\] = 2`.*2 rows"):
        model(inputs(), token_type_ids=types)


def test_types_for_a_form_without_types_are_refused(model):
    with pytest.raises(ValueError, match=r"`token_type_ids`.*`type_vocab_size=0`"):
        model(inputs(), token_type_ids=torch.ones(2, 7).long())


def test_types_that_are_all_zero_pass_without_a_table(model):
    """Tokenizers of BERT's kind send them with every text."""
    ids = inputs()
    assert_close(model(ids, token_type_ids=torch.zeros_like(ids))[0], model(ids)[0], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_an_empty_batch_or_sequence_is_refused(model, shape):
    with pytest.raises(ValueError, match=rf"`input_ids` is empty: shape \({shape[0]}, {shape[1]}\)"):
        model(torch.zeros(shape, dtype=torch.long))


def test_ids_without_a_batch_are_refused(model):
    with pytest.raises(ValueError, match=r"`input_ids` has shape \(7,\); expected \(batch, sequence\)"):
        model(inputs()[0])


def test_float_ids_are_refused(model):
    with pytest.raises(ValueError, match=r"`input_ids` must hold integer ids, got dtype torch.float32"):
        model(inputs().float())


def test_three_dimensional_ids_are_refused(model):
    with pytest.raises(ValueError, match=r"`input_ids` has shape \(2, 7, 1\)"):
        model(inputs()[..., None])


def test_embeds_of_another_width_are_refused(model):
    with pytest.raises(ValueError, match=r"`inputs_embeds` has shape \(2, 7, 5\).*12"):
        model(inputs_embeds=torch.zeros(2, 7, 5))


@pytest.mark.parametrize("given", [{}, {"input_ids": inputs(), "inputs_embeds": torch.zeros(2, 7, 12)}])
def test_both_or_neither_of_ids_and_embeds_are_refused(model, given):
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(**given)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_text_longer_than_the_learned_table_is_refused(shape):
    model = build(tiny(shape, position_embedding_type="learned", max_position_embeddings=6))
    with pytest.raises(ValueError, match=r"`position_ids` reach 6.*`max_position_embeddings=6`.*shorten"):
        model(inputs())


@pytest.mark.parametrize("scheme", [{}, {"position_embedding_type": "axial", "axial_shape": [2, 5]}])
@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_generation_stops_where_the_learned_table_ends(shape, scheme):
    """The text so far is returned, not lost to an error."""
    auto_class = AutoModelForCausalLM if shape == "decoder" else AutoModelForSeq2SeqLM
    table = {"position_embedding_type": "learned", "max_position_embeddings": 10, **scheme}
    model = build(tiny(shape, **(table if shape == "decoder" else {"decoder": table})), auto_class)
    text = model.generate(inputs(), max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert text.shape[1] == 10


def test_positions_of_a_wrong_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"`position_ids` has shape \(2, 5\), expected \(2, 7\)"):
        model(inputs(), position_ids=torch.arange(5).expand(2, -1))


@pytest.mark.parametrize("shape", [(3, 7), (2, 6), (2, 9), (1, 7)])
def test_a_mask_of_another_shape_is_refused(model, shape):
    message = rf"`attention_mask` has shape \({shape[0]}, {shape[1]}\), expected \(2, 7\)"
    with pytest.raises(ValueError, match=message):
        model(inputs(), torch.ones(shape).long())


def test_an_encoder_mask_of_another_length_is_refused():
    model = build(tiny("encoder_decoder"))
    encoded = model.encoder(inputs())
    with pytest.raises(ValueError, match=r"`(encoder_)?attention_mask` has shape \(2, 5\), expected \(2, 7\)"):
        model(encoder_outputs=encoded, attention_mask=torch.ones(2, 5).long(), decoder_input_ids=inputs())


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
def test_a_mask_may_have_any_dtype(model, dtype):
    ids, mask = pad(inputs(), 2)
    assert_close(model(ids, mask.to(dtype))[0], model(ids, mask)[0], rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["atention_mask", "attention_masks", "position_id", "token_types_ids", "label"])
def test_a_misspelt_keyword_is_refused(model, wrong):
    with pytest.raises(TypeError, match=f"`{wrong}`; did you mean `"):
        model(inputs(), **{wrong: None})


@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
def test_a_misspelt_keyword_of_a_head_is_refused(shape):
    model = build(tiny(shape), LM[shape])
    with pytest.raises(TypeError, match="`lables`; did you mean `labels`"):
        model(inputs(), lables=inputs(), **({"decoder_input_ids": inputs()} if shape == "encoder_decoder" else {}))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", ["encoder", "decoder", "encoder_decoder"])
class TestLabelsOfLanguageModels:
    def model(self, shape, training):
        return build(tiny(shape), LM[shape]).train(training)

    def test_floats_are_refused(self, shape, training):
        with pytest.raises(ValueError, match=r"`labels` must hold integer.*torch\.float32"):
            self.model(shape, training)(inputs(), labels=inputs().float())

    def test_another_shape_is_refused(self, shape, training):
        labels = inputs()[:, :5] if shape != "encoder_decoder" else inputs()[..., None]
        with pytest.raises(ValueError, match=r"`labels` has shape \(2, [57]"):
            self.model(shape, training)(inputs(), labels=labels)

    @pytest.mark.parametrize("label", [VOCAB_SIZE, -1])
    def test_a_label_outside_the_vocabulary_is_named(self, shape, training, label):
        labels = inputs()
        labels[1, 4] = label
        feed = {"decoder_input_ids": inputs()} if shape == "encoder_decoder" else {}
        with pytest.raises(ValueError, match=rf"`labels\[.*\] = {label}` is outside the 19 classes.*-100"):
            self.model(shape, training)(inputs(), labels=labels, **feed)

    def test_without_a_label_that_counts_the_loss_is_zero_with_zero_gradients(self, shape, training):
        model = self.model(shape, training)
        loss = model(inputs(), labels=torch.full((2, 7), -100)).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("auto_class", "labels", "message"),
    [
        (AutoModelForTokenClassification, torch.zeros(2, 6).long(), r"`labels` has shape \(2, 6\), expected \(2, 7\)"),
        (AutoModelForTokenClassification, torch.full((2, 7), 2), r"`labels\[0, 0\] = 2` is outside the 2 classes"),
        (AutoModelForTokenClassification, torch.zeros(2, 7), "`labels` must hold integer"),
        (AutoModelForSequenceClassification, torch.tensor([0, 2]), r"`labels\[1\] = 2` is outside the 2 classes"),
        (AutoModelForSequenceClassification, torch.zeros(3).long(), r"`labels` has shape \(3,\), expected \(2,\)"),
        (AutoModelForSequenceClassification, torch.zeros(2, 3), r"`labels` has shape \(2, 3\)"),
    ],
)
def test_wrong_labels_of_a_classifier_are_refused(shape, auto_class, labels, message):
    with pytest.raises(ValueError, match=message):
        build(tiny(shape), auto_class)(inputs(), labels=labels)


def test_labels_of_another_shape_for_a_choice_are_refused():
    ids = inputs()[:, None].expand(-1, 3, -1)
    with pytest.raises(ValueError, match=r"`labels\[1\] = 3` is outside the 3 classes"):
        build(tiny("encoder"), AutoModelForMultipleChoice)(ids, labels=torch.tensor([0, 3]))


def test_a_choice_without_choices_is_refused():
    with pytest.raises(ValueError, match=r"`input_ids` \(batch, choices, seq\)"):
        build(tiny("encoder"), AutoModelForMultipleChoice)(inputs())


def test_a_span_outside_the_text_carries_no_weight():
    model = build(tiny("encoder"), AutoModelForQuestionAnswering)
    inside = model(inputs(1), start_positions=torch.tensor([1]), end_positions=torch.tensor([3])).loss
    starts, ends = torch.tensor([1, 99]), torch.tensor([3, -1])
    assert_close(model(inputs(1).expand(2, -1), start_positions=starts, end_positions=ends).loss, inside)


@pytest.mark.parametrize("labels", [torch.full((2,), -100), torch.full((2, 7), -100)], ids=["sequence", "token"])
def test_a_classifier_without_labels_that_count_has_loss_zero(labels):
    auto_class = AutoModelForSequenceClassification if labels.ndim == 1 else AutoModelForTokenClassification
    model = build(tiny("encoder"), auto_class)
    loss = model(inputs(), labels=labels).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in model.parameters())


FORMS_OF_POSITIONS = ["none", "learned", "sinusoidal", "rope", "relative_bias", "alibi", "transformer_xl"]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("positions", FORMS_OF_POSITIONS)
@pytest.mark.parametrize("shape", SHAPES)
class TestRowOfPadding:
    def model(self, shape, positions, backend, auto_class=AutoModel):
        patterns = ["sliding_window:2", "full"]
        config = tiny(shape, position_embedding_type=positions, attention_patterns=patterns)
        return build(config, auto_class, attn_implementation=backend)

    def inputs(self):
        ids, mask = inputs(3), torch.ones(3, 7).long()
        ids[1], mask[1] = 0, 0
        return ids, mask

    def test_it_is_finite_in_forward_and_backward(self, shape, positions, backend):
        model = self.model(shape, positions, backend)
        output = model(*self.inputs()).last_hidden_state
        output.square().sum().backward()
        assert output.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_it_leaves_the_other_rows_alone(self, shape, positions, backend):
        model = self.model(shape, positions, backend)
        ids, mask = self.inputs()
        assert_close(model(ids, mask)[0][[0, 2]], model(ids[[0, 2]])[0], rtol=1e-4, atol=1e-5)

    def test_its_attention_gives_zero(self, shape, positions, backend):
        """Each token of the row then passes through the residual alone, whatever the other tokens are."""
        model = self.model(shape, positions, backend)
        seen = []
        for layer in model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(*self.inputs())
        assert len(seen) == 2
        assert not any(output[1].any() for output in seen)
        assert all(output[0].any() for output in seen)

    def test_it_carries_no_weight_in_the_loss(self, shape, positions, backend):
        model = self.model(shape, positions, backend, LM[shape])
        ids, mask = self.inputs()
        labels = ids.masked_fill(mask == 0, -100)
        assert_close(model(ids, mask, labels=labels).loss, model(ids[[0, 2]], labels=ids[[0, 2]]).loss)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_a_row_of_padding_is_classified_to_finite_numbers(pooling):
    model = build(tiny("encoder", classifier_pooling=pooling), AutoModelForSequenceClassification)
    mask = torch.ones(2, 7).long()
    mask[1] = 0
    assert model(inputs(), mask).logits.isfinite().all()


def test_a_source_of_padding_alone_gives_finite_text():
    model = build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM)
    mask = torch.ones(2, 7).long()
    mask[1] = 0
    output = model(inputs(), mask, decoder_input_ids=inputs()).logits
    assert output.isfinite().all()
    assert_close(output[:1], model(inputs()[:1], decoder_input_ids=inputs()[:1]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", FORMS_OF_POSITIONS)
def test_right_padded_generation_starts_after_the_real_tokens(positions):
    """The next token of a right-padded text is read at its last slot, which is padding: each text is as if the padding
    were not there for the tokens generated after it."""
    model = build(tiny("decoder", position_embedding_type=positions), AutoModelForCausalLM)
    ids, mask = pad(inputs(1), 0, 3)
    whole = torch.cat((ids, inputs(1, 2, seed=3)), dim=1)
    whole_mask = torch.nn.functional.pad(mask, (0, 2), value=1)
    padded = model(whole, whole_mask).logits[:, -2:]
    alone = model(whole[whole_mask.bool()][None]).logits[:, -2:]
    assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_right_padded_generation_gives_a_warning(caplog, monkeypatch):
    model = build(tiny("decoder"), AutoModelForCausalLM)
    ids, mask = pad(inputs(), 0, 2)
    logger = logging.getLogger("transformers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING, "transformers"):
        output = model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert output.shape == (2, 11)
    assert "right-padding was detected" in caplog.text


@pytest.mark.parametrize("positions", FORMS_OF_POSITIONS)
def test_left_padded_generation_is_as_unpadded(positions):
    model = build(tiny("decoder", position_embedding_type=positions), AutoModelForCausalLM)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    ids, mask = pad(inputs(), 3)
    padded = model.generate(ids, attention_mask=mask, **options)[:, 3:]
    assert_close(padded, model.generate(inputs(), **options), rtol=0, atol=0)


def test_an_encoder_decoder_without_decoder_inputs_is_refused():
    with pytest.raises(ValueError, match=r"`decoder_input_ids`.*`labels`"):
        build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM)(inputs())


@pytest.mark.parametrize("name", ["decoder_start_token_id", "pad_token_id"])
def test_labels_without_the_token_that_they_need_are_refused(name):
    model = build(tiny("encoder_decoder", **{name: None}), AutoModelForSeq2SeqLM)
    with pytest.raises(ValueError, match=f"`{name}` is unset: set it in the config"):
        model(inputs(), labels=inputs())


def test_a_decoder_that_attends_needs_states_to_attend_to():
    model = build(tiny("encoder_decoder"))
    with pytest.raises(ValueError, match="`encoder_hidden_states`"):
        model.decoder(inputs())


def test_a_cache_past_the_learned_table_is_refused():
    model = build(tiny("decoder", position_embedding_type="learned", max_position_embeddings=7))
    cache = model(inputs(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`max_position_embeddings=7`"):
        model(inputs(2, 1), past_key_values=cache)


@pytest.mark.parametrize(("field", "value"), [("attention_sinks", True), ("attn_logit_softcapping", 5.0)])
def test_a_backend_that_cannot_express_the_form_is_refused(field, value):
    with pytest.raises(
        ValueError, match=f"`attn_implementation='sdpa'` cannot express `{field}={value}`; use 'eager'"
    ):
        build(tiny("decoder", **{field: value}), attn_implementation="sdpa")


def test_a_backend_that_cannot_express_the_form_is_refused_at_loading(tmp_path):
    build(tiny("decoder", attention_sinks=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`attn_implementation='sdpa'` cannot express `attention_sinks=True`"):
        AutoModel.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_a_backend_left_to_choose_falls_to_one_that_can():
    assert build(tiny("decoder", attention_sinks=True)).config._attn_implementation == SPELLED_OUT
    assert build(tiny("decoder")).config._attn_implementation == "sdpa"


def test_an_unknown_backend_is_refused():
    with pytest.raises((ValueError, ImportError), match="sdpaa"):
        build(tiny("decoder"), attn_implementation="sdpaa")
