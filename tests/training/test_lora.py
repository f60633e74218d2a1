"""LoRA for scripts: its configs, adapters loaded whole or refused, and merging with a check."""

import json
from dataclasses import replace

import pytest
import torch
from peft import LoraModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import VOCAB_SIZE, build, inputs, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
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
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import variform
from variform.training.lora import LoraArguments, load_adapter_strictly, lora_config, save_adapter
from variform.training.merging import merge_adapter

HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
LAYOUTS = ["fused", "modulelist"]
SHAPES_AND_LAYOUTS = [(shape, layout) for shape in HEADS for layout in [None, *LAYOUTS]]
OPTIONS = LoraArguments(use_peft=True, lora_r=2, lora_alpha=4)
EXPERTS = {"num_experts": 4, "mlp_layer_types": ["dense", "sparse"], "num_shared_experts": 1}


def make(shape: str, auto_class=None, layout: str | None = None, **fields):
    """A tiny model; with a layout, a mixture of experts in its second layer."""
    stack = {**EXPERTS, "experts_layout": layout} if layout else {}
    if shape == "encoder_decoder":
        return build(tiny(shape, encoder=stack, decoder=stack, **fields), HEADS[shape])
    return build(tiny(shape, **stack, **fields), auto_class or HEADS[shape])


def shake(model) -> None:
    """Gives every trainable weight a value, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def train_adapter(folder, shape="decoder", auto_class=None, layout=None, options=OPTIONS, **fields):
    """Saves a base in folder/base and an adapter of it in folder/adapter; returns the adapted model."""
    base = make(shape, auto_class, layout, **fields)
    base.save_pretrained(folder / "base")
    loaded = type(base).from_pretrained(folder / "base")
    model = get_peft_model(loaded, lora_config(loaded, options)).eval()
    shake(model)
    save_adapter(model, folder / "adapter")
    return model


def reload(folder, shape="decoder", auto_class=None):
    return (auto_class or HEADS[shape]).from_pretrained(folder / "base")


@torch.no_grad()
def outputs(model) -> torch.Tensor:
    given = {"input_ids": inputs(batch=3)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = inputs(batch=3, seed=1)
    return model.eval()(**given)[0]


def rewrite(folder, change) -> None:
    """Changes the tensors of the adapter in `folder`."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "shape, auto_class, task, whole",
    [
        ("decoder", AutoModelForCausalLM, "CAUSAL_LM", None),
        ("encoder_decoder", AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", None),
        ("encoder", AutoModelForMaskedLM, None, None),
        ("encoder", AutoModel, "FEATURE_EXTRACTION", None),
        ("encoder", AutoModelForSequenceClassification, "SEQ_CLS", {"classifier"}),
        ("decoder", AutoModelForTokenClassification, "TOKEN_CLS", {"classifier"}),
        ("decoder", AutoModelForQuestionAnswering, "QUESTION_ANS", {"qa_outputs"}),
        ("encoder", AutoModelForMultipleChoice, None, {"classifier"}),
    ],
)
def test_each_head_has_its_task_and_is_trained_whole_if_it_is_new(shape, auto_class, task, whole):
    model = make(shape, auto_class)
    config = lora_config(model, OPTIONS)
    assert (config.task_type, config.modules_to_save) == (task, list(whole) if whole else None)
    adapted = get_peft_model(model, config)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if "lora_" not in name}
    assert bool(heads) == bool(whole)
    assert all(any(head in name for head in whole) for name in heads)


def test_options_reach_the_config():
    options = replace(OPTIONS, lora_dropout=0.1, use_dora=True, use_rslora=True, lora_modules_to_save=["embed_tokens"])
    config = lora_config(make("decoder", tie_word_embeddings=False), options)
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora, config.use_rslora) == (
        2,
        4,
        0.1,
        True,
        True,
    )
    assert config.modules_to_save == ["embed_tokens"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_is_0_with_fused_experts_and_says_so(layout, caplog):
    model = make("decoder", layout=layout)
    config = lora_config(model, replace(OPTIONS, lora_dropout=0.1))
    assert config.lora_dropout == (0 if layout == "fused" else 0.1)
    get_peft_model(model, config)  # PEFT takes it


def test_targets_can_be_named():
    model = make("decoder", layout="fused")
    named = lora_config(model, replace(OPTIONS, lora_target_modules=["q_proj", "mlp.experts.down_proj"]))
    assert (named.target_modules, named.target_parameters) == ({"q_proj"}, ["mlp.experts.down_proj"])
    every = lora_config(model, replace(OPTIONS, lora_target_modules=["all-linear"]))
    assert every.target_modules == "all-linear"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_r": 0}, "`lora_r=0` is no rank"),
        ({"lora_dropout": 1.0}, "`lora_dropout=1.0` is no share"),
        ({"lora_target_modules": ["q_porj"]}, "Did you mean 'q_proj'"),
        ({"lora_modules_to_save": ["clasifier"]}, "`lora_modules_to_save='clasifier'` is not one of"),
        ({"lora_target_modules": ["lm_head"]}, "`lm_head` is adapted and shares its weight with"),
        ({"use_dora": True}, "`use_dora` does not work on experts"),
    ],
)
def test_options_that_cannot_work_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        lora_config(make("decoder", layout="fused", tie_word_embeddings=True), replace(OPTIONS, **changes))


@pytest.mark.parametrize("shape, layout", SHAPES_AND_LAYOUTS)
def test_an_adapter_comes_back_strictly(shape, layout, tmp_path):
    model = train_adapter(tmp_path, shape, layout=layout)
    loaded = load_adapter_strictly(reload(tmp_path, shape), tmp_path / "adapter")
    assert_close(outputs(loaded), outputs(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    again = load_adapter_strictly(reload(tmp_path, shape), tmp_path / "adapter", is_trainable=True)
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if p.requires_grad
    }


def test_a_new_head_comes_back_with_its_adapter(tmp_path):
    """The base's own head is random each time it is loaded; the adapter brings the trained one."""
    make("encoder").save_pretrained(tmp_path / "base")
    first, second = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3) for _ in range(2)
    )
    model = get_peft_model(first, lora_config(first, OPTIONS))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    assert_close(outputs(load_adapter_strictly(second, tmp_path / "adapter")), outputs(model))


def test_the_base_may_be_in_bfloat16(tmp_path):
    train_adapter(tmp_path)
    load_adapter_strictly(reload(tmp_path).to(torch.bfloat16), tmp_path / "adapter")


def test_dora_and_named_embeddings_come_back(tmp_path):
    options = replace(OPTIONS, use_dora=True, lora_target_modules=["embed_tokens", "q_proj"])
    model = train_adapter(tmp_path, options=options, tie_word_embeddings=False)
    loaded = load_adapter_strictly(reload(tmp_path), tmp_path / "adapter")
    assert_close(outputs(loaded), outputs(model))


def test_an_adapter_that_peft_saved_is_loaded(tmp_path):
    model = train_adapter(tmp_path)
    (tmp_path / "adapter" / "adapter_base.json").unlink()
    assert_close(outputs(load_adapter_strictly(reload(tmp_path), tmp_path / "adapter")), outputs(model))


def refused(model, folder, message, error=ValueError) -> None:
    """Loading raises, and leaves the model as it was."""
    names = set(model.state_dict())
    with pytest.raises(error, match=message):
        load_adapter_strictly(model, folder)
    assert set(model.state_dict()) == names


def test_a_missing_tensor_is_refused(tmp_path):
    train_adapter(tmp_path)
    rewrite(tmp_path / "adapter", lambda tensors: tensors.pop(next(iter(tensors))))
    refused(reload(tmp_path), tmp_path / "adapter", r"lacks `base_model\.model\..*`: the file is not whole")


def test_a_tensor_too_many_is_refused(tmp_path):
    train_adapter(tmp_path)
    name = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"
    rewrite(tmp_path / "adapter", lambda tensors: tensors.update({name: torch.ones(2, 12)}))
    refused(reload(tmp_path), tmp_path / "adapter", "holds `.*layers.7.*`, which have no place in `model`")


def test_a_damaged_file_is_refused(tmp_path):
    train_adapter(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    refused(reload(tmp_path), tmp_path / "adapter", "not a whole safetensors file")


def test_a_folder_without_adapter_is_refused(tmp_path):
    train_adapter(tmp_path)
    refused(reload(tmp_path), tmp_path / "base", "holds a whole model, merged perhaps", FileNotFoundError)
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    refused(reload(tmp_path), tmp_path / "adapter", "adapter_model.safetensors is missing", FileNotFoundError)


@pytest.mark.parametrize(
    "names", [{"target_modules": ["q_proj", "c_attn"]}, {"target_parameters": ["experts.c_attn"]}]
)
def test_a_wrong_target_is_refused(names, tmp_path):
    train_adapter(tmp_path)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **names}))
    refused(reload(tmp_path), tmp_path / "adapter", "adapts `.*c_attn` .*which `model` does not have")


def test_another_base_is_refused(tmp_path):
    """Of another class, of other sizes, and of the same form with other weights."""
    train_adapter(tmp_path)
    refused(
        make("encoder"), tmp_path / "adapter", "is an adapter for VariformDecoderForCausalLM, `model` is a VariformEnc"
    )
    refused(
        make("decoder", intermediate_size=10),
        tmp_path / "adapter",
        r"has another base: .*\(14, 2\) there and \(10, 2\)",
    )
    refused(make("decoder", num_hidden_layers=1), tmp_path / "adapter", "which have no place in `model`")
    other = reload(tmp_path)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    refused(other, tmp_path / "adapter", "was trained on other weights than those of `model`")


def test_a_resized_vocabulary_is_refused_and_mended(tmp_path):
    make("decoder").save_pretrained(tmp_path / "base")
    base = reload(tmp_path)
    base.resize_token_embeddings(23, mean_resizing=False)
    model = get_peft_model(base, lora_config(base, OPTIONS))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    refused(reload(tmp_path), tmp_path / "adapter", r"call `model.resize_token_embeddings\(23\)` first")
    mended = reload(tmp_path)
    mended.resize_token_embeddings(23, mean_resizing=False)
    assert_close(outputs(load_adapter_strictly(mended, tmp_path / "adapter")), outputs(model))


def test_an_adapter_over_tied_embeddings_is_refused(tmp_path):
    options = replace(OPTIONS, lora_target_modules=["embed_tokens"])
    train_adapter(tmp_path, options=options, tie_word_embeddings=False)
    (tmp_path / "adapter" / "adapter_base.json").unlink()
    tied = make("decoder", tie_word_embeddings=True)
    refused(tied, tmp_path / "adapter", "`model.embed_tokens` is adapted and shares its weight with `lm_head`")


def test_a_second_adapter_is_refused(tmp_path):
    model = train_adapter(tmp_path)
    refused(model, tmp_path / "adapter", "carries an adapter already")


def tokenizer() -> PreTrainedTokenizerFast:
    """Letters, as many as the tiny models have tokens."""
    words = ["<pad>", "<s>", "</s>", *"etaoinshrdlucmfw"][:VOCAB_SIZE]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="e"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=20)


@pytest.mark.parametrize("shape, layout", SHAPES_AND_LAYOUTS)
def test_a_merged_model_computes_the_same(shape, layout, tmp_path):
    model = train_adapter(tmp_path, shape, layout=layout)
    tokenizer().save_pretrained(tmp_path / "adapter")
    difference = merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert 0 <= difference < 1e-4
    merged = HEADS[shape].from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab() == tokenizer().get_vocab()


def test_a_merged_classifier_keeps_its_labels(tmp_path):
    make("encoder").save_pretrained(tmp_path / "base")
    labels = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", **labels)
    model = get_peft_model(base, lora_config(base, OPTIONS)).eval()
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    tokenizer().save_pretrained(tmp_path / "base")
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") < 1e-4
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert merged.config.id2label == labels["id2label"]
    assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


def test_a_converted_base_is_merged_into_a_form(tmp_path):
    """The adapter names a native checkpoint; merging converts it again."""
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, head_dim=4)).save_pretrained(tmp_path / "native")
    base = variform.from_hf(tmp_path / "native")
    model = get_peft_model(base, lora_config(base, OPTIONS)).eval()
    shake(model)
    save_adapter(model, tmp_path / "adapter", base_name=str(tmp_path / "native"))
    assert merge_adapter(tmp_path / "adapter", tmp_path / "merged") < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(outputs(merged), outputs(model), rtol=1e-4, atol=1e-4)


def test_merging_keeps_the_dtype_of_the_base(tmp_path):
    make("decoder").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    base = reload(tmp_path).float()
    model = get_peft_model(base, lora_config(base, OPTIONS))
    shake(model)
    save_adapter(model, tmp_path / "adapter")
    assert 0 < merge_adapter(tmp_path / "adapter", tmp_path / "merged") < 5e-2
    assert load_file(tmp_path / "merged" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16
    assert merge_adapter(tmp_path / "adapter", tmp_path / "exact", dtype=torch.float32) < 1e-4


def test_a_merge_that_changes_outputs_is_not_kept(tmp_path, monkeypatch):
    train_adapter(tmp_path)
    merge = LoraModel.merge_and_unload

    def merge_wrongly(self, **options):
        merged = merge(self, **options)
        merged.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_wrongly)
    with pytest.raises(ValueError, match="The merged model differs"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_twice_is_refused(tmp_path):
    """Into the same folder, of the folder that came out, and onto the model that came out."""
    train_adapter(tmp_path)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(FileExistsError, match="exists already"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="holds a whole model, merged perhaps"):
        merge_adapter(tmp_path / "merged", tmp_path / "again")
    with pytest.raises(ValueError, match="A model that the adapter is merged into already is not that base"):
        merge_adapter(tmp_path / "adapter", tmp_path / "again", base=tmp_path / "merged")
    assert not (tmp_path / "again").exists()


def test_an_adapter_of_no_known_base_needs_one(tmp_path):
    base = make("decoder")
    model = get_peft_model(base, lora_config(base, OPTIONS))
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="give `base`, the folder or repo of that model"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged")
