"""Quantized weights reach the experts, or it is said that they do not: `pip install -e '.[quantization]'`."""

import pytest
import torch
from tiny import build, inputs, tiny
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.utils import is_bitsandbytes_available, is_torchao_available

HEADS = {"encoder": AutoModelForMaskedLM, "decoder": AutoModelForCausalLM, "encoder_decoder": AutoModelForSeq2SeqLM}
needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="torchao is not installed")
needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")


def make(shape: str, layout: str):
    """Wide enough for the blocks of 64 weights that bitsandbytes scales together."""
    fields = {
        "hidden_size": 64,
        "head_dim": 16,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "initializer_range": 0.1,
    }
    fields |= {"num_experts": 4, "num_shared_experts": 1, "experts_layout": layout}
    if shape == "encoder_decoder":
        return build(tiny(shape, encoder=fields, decoder=fields), HEADS[shape])
    return build(tiny(shape, **fields), HEADS[shape])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    input_ids = inputs(batch=4)
    given = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=input_ids, **given).logits


def expert_weights(model) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if ".mlp.experts." in name}


def dequantized(quantized, original):
    """The original model with the weights that the quantized one stands for."""
    with torch.no_grad():
        values = {
            name: weight.dequantize() if type(weight).__name__ == "Int8Tensor" else weight
            for name, weight in quantized.state_dict().items()
        }
    original.load_state_dict(values)
    return original


@needs_torchao
@pytest.mark.parametrize("layout", ["fused", "modulelist"])
@pytest.mark.parametrize("shape", HEADS)
def test_int8_weights_reach_the_experts(shape, layout, tmp_path):
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    model = make(shape, layout)
    exact = logits(model)
    model.save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(FqnToConfig({r"re:.*_proj(\.weight)?": Int8WeightOnlyConfig(version=2)}))
    quantized = HEADS[shape].from_pretrained(tmp_path / "plain", quantization_config=config)
    weights = expert_weights(quantized)
    assert weights and {weight.qdata.dtype for weight in weights.values()} == {torch.int8}
    kinds = {name.split(".")[-2]: type(w).__name__ for name, w in quantized.named_parameters() if "_proj" in name}
    assert kinds["q_proj"] == "Int8Tensor"
    routers = [weight for name, weight in quantized.named_parameters() if name.endswith("mlp.gate.weight")]
    assert all(type(weight) is torch.nn.Parameter for weight in routers)
    found = logits(quantized)
    assert (found - exact).abs().mean() < 0.05 * exact.std()
    assert_close(found, logits(dequantized(quantized, model)), rtol=1e-3, atol=1e-4)
    quantized.save_pretrained(tmp_path / "int8")
    assert_close(logits(HEADS[shape].from_pretrained(tmp_path / "int8")), found)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_reaches_experts_that_are_linear(bits, tmp_path):
    from transformers import BitsAndBytesConfig

    model = make("decoder", "modulelist")
    exact = logits(model)
    model.save_pretrained(tmp_path)
    config = BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    options = {"device_map": "cpu", "dtype": torch.float32}
    quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, **options)
    assert {weight.dtype for weight in expert_weights(quantized).values()} == {
        torch.uint8 if bits == 4 else torch.int8
    }
    assert (logits(quantized) - exact).abs().mean() < (0.5 if bits == 4 else 0.1) * exact.std()


@needs_bitsandbytes
def test_bitsandbytes_is_refused_where_experts_are_one_tensor(tmp_path):
    from transformers import BitsAndBytesConfig

    make("decoder", "fused").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="change_experts_layout"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    kept = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["experts", "lm_head"])
    AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=kept, device_map="cpu")
