"""Families with experts: how transformers stores them, both layouts of ours, the losses of routers, and limits.

That outputs, gradients and caches are equal over random configs is in `test_exact.py`, as for every family.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from native_models import FIRST_REGULAR_ID, random_config, random_fields, random_model
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from variform.conversion import FAMILIES
from variform.conversion.check import check_conversion
from variform.conversion.convert import convert_folder, from_hf, to_hf
from variform.conversion.family import LANGUAGE_MODELS
from variform.model.moe import Router

# What stands before the number of an expert, and after it, in the checkpoints of a family
STORED = {
    "mixtral": ("block_sparse_moe.experts.", ".w2.weight"),
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "olmoe"), ("mlp.experts.", ".down_proj.weight")),
}
NUMBERED = list(STORED)
STORED["gpt_oss"] = ("mlp.experts.", "down_proj")  # one tensor of all experts, without a number
# Widths that the native classes' default way to compute experts needs; room for the 32 tokens that are compared
QWENS = {"hidden_size": 24, "moe_intermediate_size": 20, "shared_expert_intermediate_size": 40}
EVEN = {
    "mixtral": {"hidden_size": 24, "intermediate_size": 20},
    "olmoe": {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 24, "intermediate_size": 20},
    **dict.fromkeys(("qwen2_moe", "qwen3_moe"), QWENS | {"head_dim": 6}),
    "gpt_oss": {"hidden_size": 24, "intermediate_size": 20},
    "switch_transformers": {"expert_capacity": 32},
}
DECODERS = list(STORED)
STORED["switch_transformers"] = ("mlp.experts.expert_", ".wo.weight")
ALL = list(STORED)


def head_of(model_type: str) -> str:
    return next(name for name in FAMILIES[model_type].heads if name in LANGUAGE_MODELS)


def native_model(model_type: str, seed: int = 0, auto_class: str | None = None, **sizes: int) -> PreTrainedModel:
    model_class = FAMILIES[model_type].foreign_class(auto_class or head_of(model_type))
    config = random_config(model_type, seed)
    for name, size in sizes.items():
        setattr(config, name, size)
    return random_model(model_class, config, seed)


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two texts, the second padded on the right."""
    torch.manual_seed(7)
    ids = torch.randint(FIRST_REGULAR_ID, model.config.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest entry."""
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@torch.no_grad()
def assert_computes_same(ours: PreTrainedModel, native: PreTrainedModel) -> None:
    inputs = inputs_of(native)
    real = inputs["labels"] != -100
    assert_close(ours(**inputs).logits[real], native(**inputs).logits[real])


def assert_same(tensors: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    """The same tensors, bit by bit."""
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == others[name].dtype and torch.equal(tensor, others[name]), name


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def rewrite(folder: Path, change: Any) -> None:
    """Applies `change` to the tensors of the one file of a folder, in place."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# On disk


@pytest.mark.parametrize("shard", ["1GB", "3KB"])
@pytest.mark.parametrize("model_type", ALL)
def test_folders_hold_what_transformers_stores(model_type, shard, tmp_path):
    """One matrix an expert, where the class holds one tensor a projection; gpt-oss stores those as they are."""
    native = native_model(model_type, seed=1, **EVEN.get(model_type, {}))
    native.save_pretrained(tmp_path / "native", max_shard_size=shard)
    before, after = STORED[model_type]
    assert any(before in name and name.endswith(after) for name in read(tmp_path / "native"))
    assert_same(from_hf(tmp_path / "native").state_dict(), from_hf(native).state_dict())

    convert_folder(tmp_path / "native", tmp_path / "ours")
    assert check_conversion(tmp_path / "native", tmp_path / "ours").is_exact
    convert_folder(tmp_path / "ours", tmp_path / "back")
    assert check_conversion(tmp_path / "ours", tmp_path / "back").is_exact
    assert_same(read(tmp_path / "back"), read(tmp_path / "native"))
    assert_same(type(native).from_pretrained(tmp_path / "back").state_dict(), native.state_dict())


@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForCausalLM"])
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_base_model_and_a_head_share_their_folders(model_type, auto_class, tmp_path):
    """Under a prefix or without one."""
    native = native_model(model_type, auto_class=auto_class)
    native.save_pretrained(tmp_path / "native")
    base = from_hf(tmp_path / "native", auto_class="AutoModel")
    expected = from_hf(native).state_dict()
    found = base.state_dict()
    prefix = "" if auto_class == "AutoModel" else "model."
    assert_same(found, {name: expected[prefix + name] for name in found})


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_folder_with_experts_in_one_tensor_is_read(model_type, tmp_path):
    native = native_model(model_type)
    native.config.architectures = [type(native).__name__]
    native.config.save_pretrained(tmp_path)
    torch.save(native.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(from_hf(tmp_path).state_dict(), from_hf(native).state_dict())


@pytest.mark.parametrize("model_type", NUMBERED)
def test_a_folder_without_one_of_the_experts_is_refused_by_its_name(model_type, tmp_path):
    native_model(model_type).save_pretrained(tmp_path)
    before, after = STORED[model_type]
    lost = next(name for name in read(tmp_path) if f"{before}1" in name and name.endswith(after))
    rewrite(tmp_path, lambda state: state.pop(lost))
    with pytest.raises(ValueError, match=rf"^The checkpoint lacks '{lost}' of .*; nothing is filled in"):
        from_hf(tmp_path)


@pytest.mark.parametrize("model_type", NUMBERED)
def test_experts_of_different_widths_are_refused(model_type, tmp_path):
    native_model(model_type).save_pretrained(tmp_path)
    before, after = STORED[model_type]
    name = next(name for name in read(tmp_path) if f"{before}1" in name and name.endswith(after))
    rewrite(tmp_path, lambda state: state.update({name: state[name][:, 1:].contiguous()}))
    with pytest.raises(ValueError, match=rf"'{name}'.* do not go into one '.*mlp\.experts\.down_proj'"):
        from_hf(tmp_path)


# Both layouts


def as_list(model: PreTrainedModel) -> PreTrainedModel:
    """A model of ours, with one module an expert."""
    values = model.config.to_dict()
    for stack in [values[side] for side in ("encoder", "decoder") if side in values] or [values]:
        stack["experts_layout"] = "modulelist"
    result = type(model)(type(model.config)(**values)).eval()
    states = model.state_dict()
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if ".mlp.experts." not in name:
                parameter.copy_(states[name])
                continue
            block, _, rest = name.partition(".experts.")
            number, projection, kind = rest.split(".")
            end = "_bias" if kind == "bias" else ""
            fused = f"{block}.experts.gate_up_proj{end}"
            if projection != "down_proj" and fused in states:
                parameter.copy_(states[fused][int(number)].chunk(2)[projection == "up_proj"])
            else:
                parameter.copy_(states[f"{block}.experts.{projection}{end}"][int(number)])
    return result


@pytest.mark.parametrize("model_type", ALL)
def test_both_layouts_of_experts_leave_as_the_same(model_type, tmp_path):
    native = native_model(model_type, seed=1)
    ours = as_list(from_hf(native))
    assert any(".experts.1.down_proj.weight" in name for name in ours.state_dict())
    back = to_hf(ours)
    assert_same(back.state_dict(), native.state_dict())
    assert_computes_same(ours, native)
    assert "experts.1." not in "".join(from_hf(back).state_dict())

    native.save_pretrained(tmp_path / "native")
    ours.save_pretrained(tmp_path / "ours")
    convert_folder(tmp_path / "ours", tmp_path / "back")
    assert_same(read(tmp_path / "back"), read(tmp_path / "native"))


# In training


@pytest.mark.parametrize("model_type", DECODERS)
def test_the_balance_loss_has_the_scale_of_transformers(model_type):
    """Ours is per sequence and layer: of one text and one layer with experts it is the native one."""
    config = random_config(model_type, 1)
    config.num_hidden_layers, config.router_aux_loss_coef = 1, 0.3
    config.decoder_sparse_step, config.mlp_only_layers = 1, []
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    native = random_model(FAMILIES[model_type].foreign_class("AutoModelForCausalLM"), config, 0)
    ours = from_hf(native).train()
    assert ours.config.router_aux_loss_coef == 0.3
    ids = torch.randint(FIRST_REGULAR_ID, config.vocab_size, (1, 13))
    expected = native.train()(ids, labels=ids, output_router_logits=True)
    assert expected.aux_loss > 1  # the number of experts of a token, were the load even
    assert_close(ours(ids, labels=ids).loss, expected.loss)


@pytest.mark.parametrize("model_type", DECODERS)
def test_what_only_native_training_reads_goes_and_comes(model_type):
    values = random_config(model_type, 0).to_dict() | {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    if model_type == "mixtral":
        values["router_jitter_noise"] = 0.25
    native = FAMILIES[model_type].foreign_class("AutoModel")(hf.CONFIG_MAPPING[model_type](**values))
    ours = from_hf(native)
    assert ours.config.router_jitter_noise == values.get("router_jitter_noise", 0.0)
    back, expected = to_hf(ours).config.to_dict(), native.config.to_dict()
    assert {name for name in expected if back[name] != expected[name]} <= {"architectures", "dtype"}


# Switch's limit


def switch(**fields: Any) -> PreTrainedModel:
    """A native Switch with experts in both stacks."""
    sparse = {f"num_sparse_{side}_layers": 1 for side in ("encoder", "decoder")}
    fields = {**sparse, "num_experts": 3, "tie_word_embeddings": True, **fields}
    config = hf.SwitchTransformersConfig(**random_fields("switch_transformers", 2) | fields)
    return random_model(hf.SwitchTransformersForConditionalGeneration, config, 0)


@pytest.mark.parametrize("side", ["none", "right"])
@torch.no_grad()
def test_full_experts_of_an_encoder_pass_by_what_they_do_natively(side):
    native = switch(expert_capacity=2)
    inputs = inputs_of(native)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    mask = torch.ones_like(mask) if side == "none" else mask
    ours, real = from_hf(native), mask.bool()
    found = ours.get_encoder()(ids, attention_mask=mask).last_hidden_state
    expected = native.get_encoder()(ids, attention_mask=mask).last_hidden_state
    assert_close(found[real], expected[real])
    roomy = switch(expert_capacity=64).get_encoder()(ids, attention_mask=mask).last_hidden_state
    assert not torch.allclose(roomy[real], expected[real], atol=1e-3)


@torch.no_grad()
def test_padding_on_the_left_takes_up_no_room():
    """Each text of a batch is as it is natively alone."""
    native = switch(expert_capacity=2)
    inputs = inputs_of(native)
    ids, mask = inputs["input_ids"].flip(1), inputs["attention_mask"].flip(1)
    found = from_hf(native).get_encoder()(ids, attention_mask=mask).last_hidden_state
    for row, real in enumerate(mask.bool()):
        assert_close(found[row, real], native.get_encoder()(ids[row, real][None]).last_hidden_state[0])


@torch.no_grad()
def test_a_decoder_reads_as_it_writes():
    """Ours has no limit in evaluation; the native one has it when it reads, and not when it writes token by token."""
    native = switch(expert_capacity=1)
    ours, inputs = from_hf(native), inputs_of(native)
    source = inputs["input_ids"]
    states = native.get_encoder()(source)
    ids = source.flip(1)
    cache, written = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
    for token in ids.split(1, dim=1):
        written.append(native(decoder_input_ids=token, encoder_outputs=states, past_key_values=cache).logits)
    read = ours(source, decoder_input_ids=ids)
    assert_close(read.logits, torch.cat(written, dim=1))

    limited = native(source, decoder_input_ids=ids).logits
    assert not torch.allclose(read.logits, limited, atol=1e-3)
    for router in ours.get_decoder().modules():
        if isinstance(router, Router):
            router.has_capacity_in_eval = True
    assert_close(ours(source, decoder_input_ids=ids, use_cache=False).logits, limited)


def test_the_losses_of_switch_routers_have_the_scale_of_transformers():
    native = switch(
        num_sparse_encoder_layers=9,  # none
        router_aux_loss_coef=0.3,
        router_z_loss_coef=0.2,
        expert_capacity=64,
    ).train()
    ours, ids = from_hf(native).train(), inputs_of(native)["input_ids"][:1]
    expected = native(ids, labels=ids, output_router_logits=True)
    assert expected.decoder_aux_loss > 0.9 and expected.decoder_z_loss > 0
    assert_close(ours(ids, labels=ids).loss, expected.loss)


def test_a_stack_without_experts_comes_and_goes():
    native = switch(num_sparse_decoder_layers=9, router_jitter_noise=0.125)
    ours = from_hf(native)
    assert (ours.config.encoder.num_experts, ours.config.decoder.num_experts) == (3, 0)
    assert ours.config.encoder.router_jitter_noise == 0.125
    assert to_hf(ours).config.num_sparse_decoder_layers == 9
    ours.config.origin = None
    back = to_hf(ours, "switch_transformers")
    assert_same(back.state_dict(), native.state_dict())
    assert back.config.decoder_sparse_step == 0
