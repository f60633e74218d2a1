"""torch.compile takes each model as one graph, and torch.export as one program."""

import pytest
import torch
from tiny import build, inputs, pad, tiny
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    CompileConfig,
    GenerationConfig,
)

HEADS = {
    "encoder": AutoModelForMaskedLM,
    "decoder": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
}
# Dynamo follows every line of ours; what a backend makes of the graph is the backend's matter, and slow
TRACED = {"backend": "eager", "fullgraph": True}


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test; and no reproducible-memory mode, which dynamo would have to guard."""
    torch._dynamo.reset()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def batch(shape: str) -> dict[str, torch.Tensor]:
    input_ids, mask = pad(inputs(), left=1, right=2)
    if shape == "encoder_decoder":
        return {"input_ids": input_ids, "attention_mask": mask, "decoder_input_ids": inputs(length=5, seed=1)}
    return {"input_ids": input_ids, "attention_mask": mask}


ENCODERS = {
    "rope_window": {"attention_patterns": ["full", "sliding_window:2"]},
    "learned_post": {
        "position_embedding_type": "learned",
        "norm_placement": "post",
        "norm_type": "layer_norm",
        "pooler": True,
    },
    "relative_bias": {"position_embedding_type": "relative_bias", "attention_patterns": ["sliding_window:3"]},
    "transformer_xl": {"position_embedding_type": "transformer_xl", "attention_patterns": ["sliding_window:3"]},
    "reformer": {
        "position_embedding_type": "axial",
        "attention_patterns": ["lsh:4,rounds=2,chunked=true,chunk=3", "chunked:3,before=1,cyclic=true"],
        "residual_streams": 2,
        "tie_word_embeddings": False,
    },
}


@pytest.mark.parametrize("form", ENCODERS)
@torch.no_grad()
def test_an_encoder_is_one_graph(form):
    model, given = build(tiny("encoder", **ENCODERS[form]), AutoModel), batch("encoder")
    found = torch.compile(model, **TRACED)(**given).last_hidden_state
    torch.testing.assert_close(found, model(**given).last_hidden_state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", HEADS)
def test_a_training_step_is_one_graph(shape):
    """The loss that builds no logits, too, with the same gradients."""
    model, given = build(tiny(shape), HEADS[shape]).train(), batch(shape)
    given["labels"] = given.get("decoder_input_ids", given["input_ids"])
    results = []
    for call in (model, torch.compile(model, **TRACED)):
        loss = call(**given).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def compiled_generation(model, given, **options) -> torch.Tensor:
    """Generation with a static cache whose decoding step must be one graph, on the CPU as well."""
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compile_config._compile_all_devices = True
    config = GenerationConfig(
        max_new_tokens=5, cache_implementation="static", compile_config=compile_config, do_sample=False, **options
    )
    return model.generate(**given, generation_config=config)


DECODERS = {
    "rope_window": {"attention_patterns": ["sliding_window:4", "full"], "num_key_value_heads": 1},
    "gpt_oss": {
        "attention_patterns": ["sliding_window:4", "full"],
        "attention_sinks": True,
        "num_experts": 4,
        "router_bias": True,
        "mlp_bias": True,
        "glu_limit": 0.5,
        "glu_offset": 1.0,
    },
    "learned": {"position_embedding_type": "learned"},
    "alibi": {"position_embedding_type": "alibi"},
    "transformer_xl": {
        "position_embedding_type": "transformer_xl",
        "attention_patterns": ["sliding_window:4", "full"],
    },
    "lsh": {"attention_patterns": ["lsh:4,rounds=2", "chunked:3,before=1"], "num_key_value_heads": 1},
}


@pytest.mark.parametrize("form", DECODERS)
def test_a_decoding_step_is_one_graph(form):
    model = build(tiny("decoder", **DECODERS[form], eos_token_id=None), AutoModelForCausalLM)
    input_ids, mask = pad(inputs(), left=2)
    given = {"input_ids": input_ids, "attention_mask": mask}
    expected = model.generate(**given, max_new_tokens=5, do_sample=False)
    torch._dynamo.utils.counters["stats"].clear()
    found = compiled_generation(model, given, pad_token_id=0)
    assert torch.equal(found, expected)
    # transformers' static window takes another branch once it is full, for native models too
    graphs = 1 + ("sliding_attention" in model.config.layer_types)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_an_encoder_decoder_decoding_step_is_one_graph():
    model = build(tiny("encoder_decoder", eos_token_id=None), AutoModelForSeq2SeqLM)
    input_ids, mask = pad(inputs(), left=1, right=1)
    given = {"input_ids": input_ids, "attention_mask": mask}
    expected = model.generate(**given, max_new_tokens=5, do_sample=False)
    found = compiled_generation(model, given, pad_token_id=0, decoder_start_token_id=1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", HEADS)
@torch.no_grad()
def test_a_model_exports_for_every_length(shape):
    model, given = build(tiny(shape), HEADS[shape]), batch(shape)
    if shape != "encoder":
        given["use_cache"] = False
    length = torch.export.Dim("length", min=2, max=20)
    dynamic = {name: {1: length} if name in ("input_ids", "attention_mask") else None for name in given}
    program = torch.export.export(model, (), given, dynamic_shapes=dynamic)
    for size in (given["input_ids"].shape[1], 6):
        shorter = {**given, **{name: given[name][:, :size] for name in ("input_ids", "attention_mask")}}
        found = program.module()(**shorter)
        torch.testing.assert_close(found["logits"], model(**shorter).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_default_backend_compiles_an_encoder():
    model, given = build(tiny("encoder", num_hidden_layers=1), AutoModel), batch("encoder")
    found = torch.compile(model, fullgraph=True)(**given).last_hidden_state
    torch.testing.assert_close(found, model(**given).last_hidden_state, rtol=1e-4, atol=1e-4)
