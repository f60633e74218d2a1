"""The plan of a training step says what the step takes when it is run: bytes to the last one, activations, FLOPs."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from strategies import forms, sample
from tiny import CONFIGS, inputs, tiny
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import Adafactor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

import variform
from variform.cli import main
from variform.report.dry_step import run_dry_step
from variform.report.plan import build, describe, plan
from variform.training.lora import lora_targets

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adafactor": lambda parameters: Adafactor(parameters, lr=0.1, relative_step=False, scale_parameter=False),
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
# Wide enough that what is kept is states and not what goes with any call
WIDE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 512,
}
KEPT = {
    "decoder": tiny("decoder", **WIDE),
    "layer norm, biases, dropout": tiny(
        "decoder",
        **WIDE,
        norm_type="layer_norm",
        attention_bias=True,
        mlp_bias=True,
        gated_mlp=False,
        hidden_dropout=0.1,
    ),
    "attention dropout": tiny("encoder", **WIDE, attention_dropout=0.1),
    "sandwich, shared keys": tiny("decoder", **WIDE, norm_placement="sandwich", qk_norm="head", num_key_value_heads=1),
    "learned bias": tiny("encoder", **WIDE, position_embedding_type="relative_bias"),
    "window in blocks": tiny("decoder", **WIDE, attention_patterns=["sliding_window:16", "full"]),
    "local and global": tiny(
        "encoder", **WIDE, attention_patterns=["local_global:16,tokens=2,global_projections=true"]
    ),
    "hashed in chunks": tiny("encoder", **WIDE, attention_patterns=["lsh:8,chunked=true,chunk=16"]),
    "spelled out": tiny("decoder", **WIDE, attn_logit_softcapping=20.0, attention_sinks=True),
    "transformer_xl": tiny("decoder", **WIDE, position_embedding_type="transformer_xl"),
    "two streams": tiny("decoder", **WIDE, residual_streams=2, tie_word_embeddings=False),
    "experts": tiny("decoder", **WIDE, **EXPERTS),
    "biased experts": tiny("decoder", **WIDE, **EXPERTS, mlp_bias=True, gated_mlp=False, router_type="sigmoid_bias"),
    "experts that choose": tiny("encoder", **WIDE, **EXPERTS, router_type="expert_choice"),
    "experts in a list": tiny("decoder", **WIDE, **EXPERTS, experts_layout="modulelist", num_shared_experts=1),
    "pair": tiny("encoder_decoder", encoder=WIDE, decoder={**WIDE, **EXPERTS}),
}


def addmm_in_place_flop(*args, **kwargs) -> int:
    return addmm_flop(*args, **kwargs)


addmm_in_place_flop._get_raw = True  # it is called with tensors, as torch's own is


def train(config, dtype=torch.float32, **options):
    """A model whose options do not stay in a config that other tests share."""
    return variform.from_config(copy.deepcopy(config), dtype=dtype, **options).train()


def batch_of(model, batch: int = 2, length: int = 20) -> dict[str, torch.Tensor]:
    ids = inputs(batch, length)
    return {"input_ids": ids, "labels": ids}


def forward(model, given):
    no_cache = {} if model.config.model_type == "variform_encoder" else {"use_cache": False}
    return model(**given, **no_cache).loss


def kept_bytes(model, given) -> int:
    """What a real forward keeps for the backward, parameters excluded."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward(model, given)
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_is_what_torch_allocates(optimizer, dtype):
    for shape, fields in sample(forms(), 4 if optimizer == "adamw" else 2):
        config = CONFIGS[shape](**fields)
        found = plan(config, optimizer=optimizer, dtype=dtype, length=4)
        model = train(config, dtype)
        parameters = list(model.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        engine = OPTIMIZERS[optimizer](parameters)
        engine.step()
        state = [
            value for values in engine.state.values() for value in values.values() if isinstance(value, torch.Tensor)
        ]
        assert found.parameters == model.num_parameters()
        assert found.parameter_bytes == sum(parameter.nbytes for parameter in parameters)
        assert found.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())
        assert found.gradient_bytes == sum(parameter.grad.nbytes for parameter in parameters)
        assert found.optimizer_bytes == sum(value.nbytes for value in state)


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        pytest.param(
            name, choice, marks=pytest.mark.slow if choice and name not in ("decoder", "experts", "pair") else ()
        )
        for name in KEPT
        for choice in (False, True)
    ],
)
def test_activations_are_those_that_a_forward_keeps(name, checkpointing):
    config, length = KEPT[name], 260  # from 256 tokens on, sparse attention runs in blocks
    found = run_dry_step(
        build(config, None, torch.float32), 2, length, device="cpu", gradient_checkpointing=checkpointing
    )
    model = train(config)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert found.kept_bytes == pytest.approx(kept_bytes(model, batch_of(model, 2, length)), rel=0.2)


@pytest.mark.parametrize("name", ["experts", "biased experts"])
def test_activations_of_experts_on_an_accelerator_are_those_of_its_kernel(name):
    """On a CPU another kernel stands in for it, unless it goes by another name."""
    ALL_EXPERTS_FUNCTIONS.register("grouped_mm_itself", lambda *call: grouped_mm_experts_forward(*call))
    found = run_dry_step(build(KEPT[name], None, torch.float32), 2, 64, device="cuda")
    model = train(KEPT[name], experts_implementation="grouped_mm_itself")
    assert found.kept_bytes == pytest.approx(kept_bytes(model, batch_of(model, 2, 64)), rel=0.2)


@pytest.mark.parametrize("number", range(8))
def test_activations_of_random_forms(number):
    shape, fields = sample(forms(), 8)[number]
    config = CONFIGS[shape](**fields)
    found = run_dry_step(build(config, None, torch.float32), 2, 20, device="cpu")
    model = train(config)
    assert found.kept_bytes == pytest.approx(kept_bytes(model, batch_of(model)), rel=0.2)


@pytest.mark.slow
def test_activations_of_many_random_forms():
    for shape, fields in sample(forms(), 150):
        config = CONFIGS[shape](**fields)
        found = run_dry_step(build(config, None, torch.float32), 2, 20, device="cpu")
        model = train(config)
        assert found.kept_bytes == pytest.approx(kept_bytes(model, batch_of(model)), rel=0.2), fields


@pytest.mark.parametrize(
    "name", ["decoder", "layer norm, biases, dropout", "experts", "experts in a list", "pair", "spelled out"]
)
def test_flops_are_those_of_torchs_counter(name):
    """With attention spelled out, which the counter sees on a CPU; of products in place it is told the formula."""
    found = run_dry_step(build(KEPT[name], None, torch.float32), 2, 64, device="cpu")
    model = train(KEPT[name], attn_implementation="eager")
    mapping = {torch.ops.aten.addmm_: addmm_in_place_flop}
    forward_counter, counter = (FlopCounterMode(display=False, custom_mapping=mapping) for _ in range(2))
    with counter:
        with forward_counter:
            loss = forward(model, batch_of(model, 2, 64))
        loss.backward()
    of_forward = forward_counter.get_total_flops()
    assert found.forward_flops == pytest.approx(of_forward, rel=0.02)
    assert found.backward_flops == pytest.approx(counter.get_total_flops() - of_forward, rel=0.02)


def test_blocks_cost_their_tiles():
    """Far from the window's 16 of 1024 keys, for the tiles are wider, and far from all."""
    dense, sparse = (
        plan(tiny("decoder", **{**WIDE, "max_position_embeddings": 1024}, attention_patterns=[pattern]), length=1024)
        for pattern in ("full", "sliding_window:16")
    )
    scores = 4 * 48 * 2 * 1024 * 1024  # two products, heads x head_dim, layers, pairs
    saved = dense.forward_flops - sparse.forward_flops
    assert 0.8 * scores < saved < (1 - 16 / 1024) * scores
    assert dense.backward_flops - sparse.backward_flops == 2 * saved


def test_checkpointing_computes_the_layers_twice():
    plain, anew = (plan(KEPT["decoder"], length=64, gradient_checkpointing=choice) for choice in (False, True))
    assert plain.forward_flops == anew.forward_flops
    # The loss makes its gradients in the forward; of a layer, nobody needs the last product again
    head, last = 3 * 2 * 63 * 48 * 19, 2 * 64 * 96 * 48
    assert anew.backward_flops - plain.backward_flops == plain.forward_flops - head - 2 * last
    assert anew.activation_bytes < plain.activation_bytes


@pytest.mark.parametrize(("parallel", "share"), [("zero2", 1), ("zero3", 4), ("fsdp2", 4)])
def test_layouts_share_out_what_they_say(parallel, share):
    config = tiny("decoder", **{**WIDE, "vocab_size": 64})
    alone, found = plan(config, length=8), plan(config, length=8, parallel=parallel, processes=4)
    assert found.parameter_bytes == pytest.approx(alone.parameter_bytes / share, rel=0.01)
    assert found.gradient_bytes == pytest.approx(alone.gradient_bytes / 4, rel=0.01)
    assert found.optimizer_bytes == pytest.approx(alone.optimizer_bytes / 4, rel=0.05)
    assert found.tokens_per_step == 4 * alone.tokens_per_step and found.step_flops == 4 * alone.step_flops


@pytest.mark.parametrize("name", ["decoder", "experts", "experts in a list", "pair", "encoder"])
@pytest.mark.parametrize("parallel", ["ddp", "zero3"])
def test_only_adapters_have_gradients_and_a_state(name, parallel):
    config = KEPT.get(name, tiny("encoder", **WIDE))
    model = train(config)
    targets = lora_targets(model)
    with_head = LoraConfig(
        r=4, modules_to_save=["classifier"], **targets
    )  # of a classifier, whose head this model has not
    found = plan(config, adapter=with_head, length=64, device="cpu", parallel=parallel)
    peft_model = get_peft_model(model, LoraConfig(r=4, **targets))
    given = batch_of(model, 1, 64)
    assert found.parameters == plan(config, length=64).parameters
    assert found.parameter_bytes == sum(parameter.nbytes for parameter in peft_model.parameters())
    assert found.trained_parameters == peft_model.get_nb_trainable_parameters()[0]
    assert found.gradient_bytes == 4 * found.trained_parameters
    assert found.optimizer_bytes == pytest.approx(8 * found.trained_parameters, rel=0.01)
    assert found.activation_bytes == pytest.approx(kept_bytes(peft_model, given), rel=0.2)
    assert found.backward_flops < plan(config, length=64, device="cpu").backward_flops


@pytest.mark.slow
def test_large_forms_need_no_memory():
    config = variform.VariformDecoderConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    found = plan(config, dtype="bf16", gradient_checkpointing=True, length=4096)
    assert found.parameters == 70_553_706_496  # as Llama 3 70B has
    assert found.parameter_bytes == 2 * found.parameters
    # Forward, forward anew and backward: 8 FLOPs a parameter and token, beside attention
    assert found.step_flops / found.tokens_per_step == pytest.approx(8 * found.parameters, rel=0.1)
    # 80 inputs of layers, and gradients of the head that the loss made
    inputs_of_layers, head = 80 * 4096 * 8192 * 2, 128256 * 8192 * 4 + 4096 * 8192 * 2
    assert found.activation_bytes > inputs_of_layers + head


def test_command_prints_what_fits_and_how_long_it_takes(capsys):
    assert main(["plan", "bert-base", "--length", "128", "--tokens", "1B", "--flops_per_second", "100T"]) == 0
    said = capsys.readouterr().out
    assert "109.5 M" in said and "80 GB" in said and "7,812,500" in said


def test_units_follow_the_size(capsys):
    """What fits in megabytes is not told in thousandths of a gigabyte."""
    form = {"model_type": "variform_decoder", "vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 1}
    Console(width=100).print(describe(plan({**form, "num_attention_heads": 4}, length=8)))
    said = capsys.readouterr().out
    assert " kB " in said and "│ 19,680 " in said and "945 k" in said and " 0.000 " not in said


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "`batch_size=0` must be at least 1."),
        ({"optimizer": "adam"}, "`optimizer='adam'` must be one of adamw, sgd, adafactor."),
        ({"parallel": "ep", "processes": 2}, "the form has none: set `num_experts`"),
        ({"parallel": "tp", "adapter": LoraConfig()}, "an `adapter` trains beside them; use 'fsdp2'"),
        ({"parallel": "tp", "processes": 3}, "must divide `num_attention_heads=4` of the decoder"),
        ({"length": 1025, "config": "gpt2"}, "`length=1025` exceeds the 1024 learned positions of the decoder"),
        ({"dtype": "int8"}, "`dtype=int8` must be one of float32"),
        ({"tokens": 0}, "`tokens=0` must be above 0."),
    ],
)
def test_bad_input_is_named(options, sentence):
    with pytest.raises(ValueError, match=None) as error:
        plan(**{"config": KEPT["decoder"], **options})
    assert sentence in str(error.value)


def test_amounts_are_read_with_their_unit(capsys):
    assert main(["plan", "bert-base", "--tokens", "many"]) == 2
    assert "`--tokens many` must be a number such as 300M, 10B or 1e10." in capsys.readouterr().err
