"""Where a run's model comes from: a form, our checkpoints, foreign ones; whole or refused, under any head."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import variform
from variform.training.lora import LoraArguments
from variform.training.models import build_model, check_length, load_teacher, load_tokenizer, make_config
from variform.training.options import ModelArguments
from variform.training.tokenizer import train_tokenizer

STACK = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {"model_type": "variform_encoder", **STACK}
PAIR = {"model_type": "variform_encoder_decoder", "encoder": STACK, "decoder": STACK}
BERT = BertConfig(vocab_size=300, **STACK, max_position_embeddings=32)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([" ".join(f"word{number * number}" for number in range(200))], 300)


def options(**values) -> ModelArguments:
    if isinstance(values.get("form"), dict):
        values["form"] = json.dumps(values["form"])
    return ModelArguments(**values)


def test_a_new_model_has_the_vocabulary_and_ids_of_its_tokenizer(tokenizer):
    model = build_model(options(form=ENCODER), AutoModelForMaskedLM, tokenizer)
    assert (model.config.vocab_size, model.config.pad_token_id) == (300, tokenizer.pad_token_id)
    assert model.training and model.dtype == torch.float32


def test_a_form_can_be_named_and_changed(tokenizer):
    changed = options(form="bert-base", set=["hidden_size=16", "num_hidden_layers=1", "num_attention_heads=2"])
    config = make_config(changed, tokenizer, {"num_labels": 3})
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels, config.norm_placement) == (
        16,
        1,
        3,
        "post",
    )


def test_a_change_of_an_encoder_decoder_reaches_both_stacks_or_the_one_it_names(tokenizer):
    stacks = {"encoder": STACK, "decoder": STACK}
    form = {"model_type": "variform_encoder_decoder", **stacks}
    config = make_config(
        options(form=form, set=["norm_placement=post", "decoder.num_hidden_layers=1", "label_smoothing=0.1"]),
        tokenizer,
        {},
    )
    assert (config.encoder.norm_placement, config.decoder.norm_placement) == ("post", "post")
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (2, 1)
    assert config.label_smoothing == 0.1 and config.decoder_start_token_id == tokenizer.bos_token_id


@pytest.mark.parametrize("saved", [AutoModelForMaskedLM, AutoModelForSequenceClassification])
def test_our_checkpoint_goes_on_under_any_head(tokenizer, tmp_path, saved):
    first = build_model(options(form=ENCODER), saved, tokenizer)
    first.save_pretrained(tmp_path)
    second = build_model(
        options(model=str(tmp_path)), AutoModelForSequenceClassification, tokenizer, id2label={0: "x", 1: "y", 2: "z"}
    )
    assert second.config.num_labels == 3
    for name, weight in first.base_model.state_dict().items():
        if "pooler" not in name:
            torch.testing.assert_close(second.base_model.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("labels", [{}, {"id2label": {0: "x", 1: "y", 2: "z"}}])
def test_a_foreign_checkpoint_goes_on_under_its_head_or_a_new_one(tokenizer, tmp_path, labels):
    torch.manual_seed(0)
    native = BertForMaskedLM(BERT).eval()
    native.save_pretrained(tmp_path)
    auto_class = AutoModelForSequenceClassification if labels else AutoModelForMaskedLM
    model = build_model(options(model=str(tmp_path)), auto_class, tokenizer, **labels).eval()
    ids = torch.randint(5, 300, (2, 9))
    theirs = native.bert(ids).last_hidden_state
    torch.testing.assert_close(model.base_model(ids).last_hidden_state, theirs, rtol=0, atol=1e-5)
    if labels:
        assert model(ids).logits.shape == (2, 3)
    else:
        torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=0, atol=1e-5)


def write_gguf(path: Path) -> None:
    """A tiny Llama as llama.cpp stores one: the head is the embeddings."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install -r tests/weights.txt")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(300)
    shapes = {"token_embd": (300, 16), "output_norm": (16,), "blk.0.attn_norm": (16,), "blk.0.ffn_norm": (16,)}
    shapes |= {f"blk.0.attn_{part}": (16, 16) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (24, 16), "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_file_of_llama_cpp_goes_on_under_its_head_or_one_of_the_classes_given(tokenizer, tmp_path):
    """It had a head of two classes, whatever the data had."""
    torch.manual_seed(0)
    write_gguf(tmp_path / "tiny.gguf")
    labels = {"id2label": {0: "x", 1: "y", 2: "z"}, "label2id": {"x": 0, "y": 1, "z": 2}}
    start, ids = options(model=str(tmp_path / "tiny.gguf")), torch.randint(5, 300, (2, 9))
    writer = build_model(start, AutoModelForCausalLM, tokenizer).eval()
    model = build_model(start, AutoModelForSequenceClassification, tokenizer, **labels).eval()
    assert model.config.id2label == labels["id2label"]
    assert model(ids, attention_mask=torch.ones_like(ids)).logits.shape == (2, 3)
    states = [each.base_model(ids).last_hidden_state for each in (writer, model)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        writer(ids).logits, states[0] @ writer.get_input_embeddings().weight.T, rtol=0, atol=1e-5
    )


def test_classes_that_agree_in_number_keep_the_head_that_was_trained(tokenizer, tmp_path):
    native = BertForSequenceClassification(BERT).eval()
    native.save_pretrained(tmp_path)
    labels = {"id2label": {0: "dull", 1: "bright"}, "label2id": {"dull": 0, "bright": 1}}
    model = build_model(options(model=str(tmp_path)), AutoModelForSequenceClassification, tokenizer, **labels).eval()
    ids = torch.randint(5, 300, (2, 9))
    torch.testing.assert_close(model(ids).logits, native(ids).logits, rtol=0, atol=1e-5)
    assert model.config.id2label == labels["id2label"]


@pytest.mark.parametrize("is_native", [True, False])
def test_a_teacher_has_its_head_or_is_refused(tokenizer, tmp_path, is_native):
    native = BertForSequenceClassification(BERT).eval()
    model = native if is_native else variform.from_hf(native)
    model.save_pretrained(tmp_path / "taught")
    ids = torch.randint(5, 300, (2, 9))
    teacher = load_teacher(str(tmp_path / "taught"), AutoModelForSequenceClassification).eval()
    torch.testing.assert_close(teacher(ids).logits, native(ids).logits, rtol=0, atol=1e-5)
    body = BertForMaskedLM(BERT) if is_native else variform.from_hf(BertForMaskedLM(BERT))
    body.save_pretrained(tmp_path / "body")
    with pytest.raises(ValueError, match="classifier"):
        load_teacher(str(tmp_path / "body"), AutoModelForSequenceClassification)


@pytest.mark.parametrize("on_meta", [False, True])
def test_what_only_training_reads_of_a_trained_model_can_be_set(tokenizer, tmp_path, on_meta):
    BertForMaskedLM(BERT).save_pretrained(tmp_path / "theirs")
    build_model(options(form=PAIR), AutoModelForSeq2SeqLM, tokenizer).save_pretrained(tmp_path / "ours")
    changes = ["hidden_dropout=0.25", "label_smoothing=0.1"]
    for folder, auto_class in (("theirs", AutoModelForMaskedLM), ("ours", AutoModelForSeq2SeqLM)):
        given = {"model": str(tmp_path / folder)}
        plain = build_model(options(**given), auto_class, tokenizer)
        changed = build_model(options(**given, set=changes), auto_class, tokenizer, on_meta=on_meta)
        assert changed.config.label_smoothing == 0.1
        rates = {module.p for module in changed.modules() if isinstance(module, torch.nn.Dropout)}
        assert 0.25 in rates
        if not on_meta:
            torch.testing.assert_close(dict(changed.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
        if folder == "ours":
            assert [changed.config.encoder.hidden_dropout, changed.config.decoder.hidden_dropout] == [0.25, 0.25]
    with pytest.raises(ValueError, match=r"`hidden_dropout=2` is a probability"):
        build_model(options(**given, set=["hidden_dropout=2"]), auto_class, tokenizer, on_meta=on_meta)


def test_a_vocabulary_may_be_larger_than_the_tokenizers_where_it_is_asked_for(tokenizer):
    assert (
        make_config(options(form={**ENCODER, "vocab_size": 9}), tokenizer, {}).vocab_size == 300
    )  # of another tokenizer
    assert make_config(options(form=ENCODER, set=["vocab_size=512"]), tokenizer, {}).vocab_size == 512
    pair = make_config(options(form=PAIR, set=["decoder.vocab_size=512"]), tokenizer, {})
    assert (pair.encoder.vocab_size, pair.decoder.vocab_size) == (300, 512)
    with pytest.raises(ValueError, match="`tokenizer` has 300 tokens, the model's `vocab_size` is 20"):
        build_model(options(form=ENCODER, set=["vocab_size=20"]), AutoModelForMaskedLM, tokenizer)


def test_a_decoder_of_another_family_takes_adapters(tokenizer, tmp_path):
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **STACK)).save_pretrained(tmp_path)
    model = build_model(
        options(model=str(tmp_path)), AutoModelForCausalLM, tokenizer, lora=LoraArguments(use_peft=True, lora_r=2)
    )
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_a_body_that_lacks_weights_is_refused_unless_that_is_allowed(tokenizer, tmp_path):
    from safetensors.torch import load_file, save_file

    build_model(options(form=ENCODER), AutoModelForMaskedLM, tokenizer).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if "layers.1.mlp" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors lacks model\.layers\.1\.mlp"):
        build_model(options(model=str(tmp_path)), AutoModelForMaskedLM, tokenizer)
    build_model(options(model=str(tmp_path), allow_missing=True), AutoModelForMaskedLM, tokenizer)


@pytest.mark.parametrize(
    ("given", "auto_class", "sentence"),
    [
        ({}, AutoModelForMaskedLM, "Give `form`, .* or `model`"),
        ({"form": ENCODER, "model": "x"}, AutoModelForMaskedLM, "not both"),
        (
            {"form": ENCODER},
            AutoModelForCausalLM,
            "`form` is a variform_encoder; this script trains one of: variform_decoder",
        ),
        ({"form": ENCODER}, AutoModelForSeq2SeqLM, "trains one of: variform_encoder_decoder"),
        ({"form": {**ENCODER, "hiden_size": 9}}, AutoModelForMaskedLM, "hidden_size"),
        ({"form": ENCODER, "set": ["hidden_size"]}, AutoModelForMaskedLM, "`set` takes FIELD=VALUE"),
        (
            {"form": ENCODER, "set": ["encoder.hidden_size=8"]},
            AutoModelForMaskedLM,
            "has no stacks; write `hidden_size`",
        ),
        (
            {"model": "x", "set": ["hidden_size=8"]},
            AutoModelForMaskedLM,
            "`set` hidden_size=8: of a trained model it changes what only training reads .hidden_dropout, .* surgery",
        ),
    ],
)
def test_bad_starts_are_refused_in_one_sentence(tokenizer, given, auto_class, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        build_model(options(**given), auto_class, tokenizer)


def test_a_vocabulary_too_small_and_texts_too_long_are_refused(tokenizer, tmp_path):
    variform.from_config({**ENCODER, "vocab_size": 99}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`tokenizer` has 300 tokens, the model's `vocab_size` is 99"):
        build_model(options(model=str(tmp_path)), AutoModelForMaskedLM, tokenizer)
    learned = make_config(
        options(form={**ENCODER, "position_embedding_type": "learned", "max_position_embeddings": 32}), tokenizer, {}
    )
    check_length(learned, 32)
    with pytest.raises(ValueError, match="`max_length=33` exceeds the model's table of 32 learned positions"):
        check_length(learned, 33)
    check_length(make_config(options(form=ENCODER), tokenizer, {}), 10**6)


def test_a_dry_run_builds_no_weights(tokenizer, tmp_path):
    BertForMaskedLM(BERT).save_pretrained(tmp_path)
    for given in ({"form": ENCODER}, {"model": str(tmp_path)}):
        model = build_model(options(**given), AutoModelForMaskedLM, tokenizer, on_meta=True)
        assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_a_tokenizer_must_be_named_or_lie_beside_the_model(tmp_path):
    with pytest.raises(ValueError, match="A new model needs a `tokenizer`"):
        load_tokenizer(options(form=ENCODER))
    with pytest.raises(ValueError, match="has no tokenizer that loads"):
        load_tokenizer(options(model=str(tmp_path)))
    assert len(load_tokenizer(options(tokenizer="bytes"))) == 257
