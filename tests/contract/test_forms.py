"""Forms by name: each builds the published number of parameters, and the one of transformers' own class."""

import re
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import variform
from variform.forms import FORMS, list_forms

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same parser
    import tomli as tomllib

ROOT = Path(__file__).parents[2]

# Published figures, to the parameter as far as they exist: {form: {Auto class: parameters}}; a tied matrix counts once
PUBLISHED = {
    "albert-base": {hf.AutoModel: 11_683_584, hf.AutoModelForMaskedLM: 11_221_680},
    "bart-base": {hf.AutoModelForSeq2SeqLM: 139_420_416},
    "bert-base": {hf.AutoModel: 109_482_240, hf.AutoModelForMaskedLM: 109_514_298},
    "bigbird-base": {hf.AutoModel: 127_468_800, hf.AutoModelForMaskedLM: 127_520_694},
    "gpt-oss-20b": {hf.AutoModelForCausalLM: 20_914_757_184},
    "gpt2": {hf.AutoModelForCausalLM: 124_439_808},
    "led-base": {hf.AutoModelForSeq2SeqLM: 161_844_480},
    "llama-smollm2-135m": {hf.AutoModelForCausalLM: 134_515_008},
    "longformer-base": {hf.AutoModel: 148_659_456, hf.AutoModelForMaskedLM: 148_711_257},
    "mixtral-8x7b": {hf.AutoModelForCausalLM: 46_702_792_704},
    "modernbert-base": {hf.AutoModel: 149_014_272, hf.AutoModelForMaskedLM: 149_655_232},
    "olmoe-1b-7b": {hf.AutoModelForCausalLM: 6_919_161_856},
    "pegasus-large": {hf.AutoModelForSeq2SeqLM: 568_699_904},
    "qwen3-0.6b": {hf.AutoModelForCausalLM: 596_049_920},
    "qwen3-30b-a3b": {hf.AutoModelForCausalLM: 30_532_122_624},
    "roberta-base": {hf.AutoModel: 124_645_632, hf.AutoModelForMaskedLM: 124_697_433},
    "switch-base-8": {hf.AutoModelForSeq2SeqLM: 619_339_008},
    "t5-small": {hf.AutoModelForSeq2SeqLM: 60_506_624},
    "t5-v1.1-small": {hf.AutoModelForSeq2SeqLM: 76_961_152},
    "transformer-base": {hf.AutoModelForSeq2SeqLM: 65_144_832},
}

# Table 3 of arXiv:1706.03762, the rows that change a size: (layers, width, inner width, key width, millions published)
TABLE_3 = [
    (6, 512, 2048, 64, 65),
    (2, 512, 2048, 64, 36),
    (4, 512, 2048, 64, 50),
    (8, 512, 2048, 64, 80),
    (6, 256, 2048, 32, 28),
    (6, 1024, 2048, 128, 168),
    (6, 512, 1024, 64, 53),
    (6, 512, 4096, 64, 90),
]


def on_meta(build, *args, **kwargs):
    """Builds without memory: only shapes are made."""
    with torch.device("meta"):
        return build(*args, **kwargs)


def count(model: nn.Module, leaving_out: str = "^$") -> int:
    """Unique parameters, without those whose names match the pattern."""
    return sum(p.numel() for name, p in model.named_parameters() if not re.search(leaving_out, name))


def bart_like(config_class, layers, width, inner, heads, **kwargs):
    sides = {f"{side}_layers": layers for side in ("encoder", "decoder")}
    sides |= {f"{side}_ffn_dim": inner for side in ("encoder", "decoder")}
    sides |= {f"{side}_attention_heads": heads for side in ("encoder", "decoder")}
    return config_class(d_model=width, **sides, **kwargs)


def native_t5_v1_1() -> nn.Module:
    """transformers 5 ties T5's head whatever it is told, until a checkpoint brings another: give it its own here."""
    config = hf.T5Config(
        d_model=512, d_ff=1024, d_kv=64, num_layers=8, num_heads=6, feed_forward_proj="gated-gelu", vocab_size=32128
    )
    model = hf.T5ForConditionalGeneration(config)
    model.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
    return model


def native_roberta() -> nn.Module:
    config = hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return hf.RobertaForMaskedLM(config)


def native_longformer() -> nn.Module:
    return hf.LongformerForMaskedLM(
        hf.LongformerConfig(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1)
    )


def native_albert() -> nn.Module:
    return hf.AlbertForMaskedLM(hf.AlbertConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072))


def native_llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    return hf.LlamaForCausalLM(config)


def native_qwen3() -> nn.Module:
    config = hf.Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    return hf.Qwen3ForCausalLM(config)


def native_qwen3_moe() -> nn.Module:
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(num_hidden_layers=48, head_dim=128))


def native_gpt_oss() -> nn.Module:
    return hf.GptOssForCausalLM(hf.GptOssConfig(num_hidden_layers=24, num_local_experts=32))


def native_switch() -> nn.Module:
    config = hf.SwitchTransformersConfig(d_ff=3072, num_sparse_encoder_layers=6, num_sparse_decoder_layers=6)
    return hf.SwitchTransformersForConditionalGeneration(config)


def native_bart() -> nn.Module:
    return hf.BartForConditionalGeneration(bart_like(hf.BartConfig, 6, 768, 3072, 12, vocab_size=50265))


def native_led() -> nn.Module:
    return hf.LEDForConditionalGeneration(bart_like(hf.LEDConfig, 6, 768, 3072, 12))


def native_pegasus() -> nn.Module:
    return hf.PegasusForConditionalGeneration(bart_like(hf.PegasusConfig, 16, 1024, 4096, 16, vocab_size=96103))


def native_marian() -> nn.Module:
    return hf.MarianMTModel(bart_like(hf.MarianConfig, 6, 512, 2048, 8, vocab_size=41100, pad_token_id=0))


# {form: (transformers' class at the published sizes, its parameters that the form rightly lacks)}
NATIVE = {
    "albert-base": (native_albert, "^$"),
    "bart-base": (native_bart, "^$"),
    "bert-base": (lambda: hf.BertForMaskedLM(hf.BertConfig()), "^$"),
    # BigBird's masked language model keeps a pooler that it does not read
    "bigbird-base": (lambda: hf.BigBirdForMaskedLM(hf.BigBirdConfig()), r"\.pooler\."),
    "gpt-oss-20b": (native_gpt_oss, "^$"),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config()), "^$"),
    "led-base": (native_led, "^$"),
    "llama-smollm2-135m": (native_llama, "^$"),
    "longformer-base": (native_longformer, "^$"),
    "mixtral-8x7b": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig()), "^$"),
    "modernbert-base": (lambda: hf.ModernBertForMaskedLM(hf.ModernBertConfig()), "^$"),
    "olmoe-1b-7b": (lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(intermediate_size=1024)), "^$"),
    # Pegasus and Marian keep their sinusoids as frozen parameters; a sinusoid is computed, not learned
    "pegasus-large": (native_pegasus, r"embed_positions"),
    "qwen3-0.6b": (native_qwen3, "^$"),
    "qwen3-30b-a3b": (native_qwen3_moe, "^$"),
    "roberta-base": (native_roberta, "^$"),
    "switch-base-8": (native_switch, "^$"),
    "t5-small": (lambda: hf.T5ForConditionalGeneration(hf.T5Config()), "^$"),
    "t5-v1.1-small": (native_t5_v1_1, "^$"),
    # Marian adds biases to the attention projections, where the paper has none
    "transformer-base": (native_marian, r"embed_positions|(self|encoder)_attn\.\w+_proj\.bias"),
}


def test_every_form_has_a_published_count_and_a_native_class():
    assert list_forms() == sorted(PUBLISHED) == sorted(NATIVE)


@pytest.mark.parametrize(
    ("form", "auto_class"),
    [pytest.param(form, auto, id=f"{form}-{auto.__name__}") for form in PUBLISHED for auto in PUBLISHED[form]],
)
def test_parameters_are_the_published_ones(form, auto_class):
    model = on_meta(variform.from_config, form, auto_class=auto_class)
    assert count(model) == PUBLISHED[form][auto_class]


@pytest.mark.parametrize("form", sorted(NATIVE))
def test_parameters_are_those_of_the_native_class(form):
    native, leaving_out = NATIVE[form]
    assert count(on_meta(variform.from_config, form)) == count(on_meta(native), leaving_out)


@pytest.mark.parametrize(("layers", "width", "inner", "key_width", "millions"), TABLE_3)
def test_transformer_base_gives_the_sizes_of_the_papers_table(layers, width, inner, key_width, millions):
    config = variform.load_config("transformer-base")
    for stack in (config.encoder, config.decoder):
        stack.num_hidden_layers = stack.num_hidden_groups = layers
        stack.hidden_size = stack.embedding_size = width
        stack.intermediate_size = inner
        stack.head_dim = key_width
    assert round(count(on_meta(variform.from_config, config)) / 1e6) == millions


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("bert-base", "VariformEncoderForMaskedLM"),
        ("gpt2", "VariformDecoderForCausalLM"),
        ("t5-small", "VariformEncoderDecoderForConditionalGeneration"),
    ],
)
def test_a_form_builds_its_shapes_language_model(form, name):
    assert type(on_meta(variform.from_config, form)).__name__ == name


def test_a_path_reads_like_a_name():
    assert variform.load_config(FORMS / "gpt2.yaml").to_dict() == variform.load_config("gpt2").to_dict()


def test_a_saved_config_reads_like_the_form(tmp_path):
    config = variform.load_config("t5-small")
    config.save_pretrained(tmp_path)
    assert variform.load_config(tmp_path / "config.json").encoder.to_dict() == config.encoder.to_dict()


def test_an_exponent_without_a_point_is_a_number(tmp_path):
    path = tmp_path / "form.yaml"
    path.write_text("model_type: variform_encoder\nnorm_eps: 1e-12\n")
    assert variform.load_config(path).norm_eps == 1e-12


def test_a_dict_builds_as_its_yaml_would():
    model = on_meta(variform.from_config, {"model_type": "variform_decoder", "hidden_size": 64, "vocab_size": 11})
    assert (model.config.hidden_size, model.config.vocab_size) == (64, 11)


def test_an_unknown_form_names_the_nearest_and_all():
    with pytest.raises(FileNotFoundError, match=r"'brt-base' .* gpt2, .* did you mean 'bert-base'\?"):
        variform.load_config("brt-base")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold `field: value` lines, got NoneType"),
        ("- 1", "must hold `field: value` lines, got list"),
        ("a: [", "is not valid YAML: .* line 1"),
        ("hidden_size: 8", "`model_type=None` is not one of"),
        ("model_type: variform_encodr", "Did you mean 'variform_encoder'"),
        ("{model_type: variform_encoder, hiden_size: 8}", "did you mean `hidden_size`"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, text, message):
    path = tmp_path / "form.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        variform.load_config(path)


def test_a_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match="`model_type='bert'` is not one of"):
        variform.from_config(hf.BertConfig())


def test_the_package_carries_every_module_and_form():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT / "src") for path in (ROOT / "src" / "variform").rglob("*.py")}
    assert set(settings["packages"]) == {".".join(folder.parts) for folder in folders} | {"variform.forms_data"}
    assert settings["py-modules"] == [path.stem for path in (ROOT / "src").glob("*.py")]
    assert settings["package-dir"]["variform.forms_data"] == "configs/models"
    assert settings["package-data"]["variform.forms_data"] == ["*.yaml"]
