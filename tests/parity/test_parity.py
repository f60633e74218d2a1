"""Transformers' own classes with random weights, and the family with the same weights: the same numbers.

Weights are drawn ten times wider than models start with, so that no part is too small to be seen, and batches are
padded. All is float32; a difference is measured against the largest entry of what it is compared with.
"""

import pytest
import torch
import transformers as hf
from bridges import BRIDGES, convert
from torch import nn

import variform

TOLERANCE = 1e-5
WEIGHT_STD = 0.2
LENGTHS = torch.tensor([13, 8, 3])  # real tokens of each row
FIRST_REGULAR_ID = 3
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

SIZES = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 29,
}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GROUPED = SIZES | IDS | {"num_attention_heads": 6, "num_key_value_heads": 2}
GPT2 = IDS | {"vocab_size": 53, "n_embd": 20, "n_layer": 3, "n_head": 5, "n_inner": 37, "n_positions": 29}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T5 = {"vocab_size": 53, "d_model": 24, "d_kv": 6, "d_ff": 37, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 5}
T5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 7, "dropout_rate": 0.0}
T5 |= {"decoder_start_token_id": 0}
BART = {"vocab_size": 53, "d_model": 24, "max_position_embeddings": 29, "dropout": 0.0, "scale_embedding": True}
BART |= {"encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 37}
BART |= {"decoder_layers": 2, "decoder_attention_heads": 6, "decoder_ffn_dim": 31}
MARIAN = BART | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}

# {case: (family, native config)}
MASKED = {
    "bert": ("bert", hf.BertConfig(**BERT)),
    "roberta": ("roberta", hf.RobertaConfig(**BERT)),
    "albert": (
        "albert",
        hf.AlbertConfig(**BERT | {"num_hidden_layers": 4}, embedding_size=10, num_hidden_groups=2),
    ),
    "modernbert": (
        "modernbert",
        hf.ModernBertConfig(**SIZES | IDS | {"num_hidden_layers": 4}, local_attention=4, rope_parameters=TWO_ROPES),
    ),
}
CAUSAL = {
    "gpt2": ("gpt2", hf.GPT2Config(**GPT2)),
    "llama": ("llama", hf.LlamaConfig(**GROUPED)),
    "llama-biased-multi-query": (
        "llama",
        hf.LlamaConfig(
            **SIZES | IDS | {"num_key_value_heads": 1, "head_dim": 10},
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3": ("qwen3", hf.Qwen3Config(**GROUPED, head_dim=10)),
    "gemma2": (
        "gemma2",
        hf.Gemma2Config(
            **GROUPED,
            head_dim=10,
            query_pre_attn_scalar=7,
            sliding_window=4,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=30.0,
            attn_implementation="eager",  # sdpa leaves the soft-cap out
        ),
    ),
    "gemma3": (
        "gemma3",
        hf.Gemma3TextConfig(
            **GROUPED,
            head_dim=10,
            query_pre_attn_scalar=7,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=TWO_ROPES,
        ),
    ),
}
SEQ2SEQ = {
    "t5-v1.0": ("t5", hf.T5Config(**T5)),
    "t5-v1.1": ("t5", hf.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    "bart": ("bart", hf.BartConfig(**BART | {"scale_embedding": False})),
    "pegasus": ("pegasus", hf.PegasusConfig(**BART, activation_function="relu")),
    "marian": ("marian", hf.MarianConfig(**MARIAN, activation_function="swish")),
    "marian-two-vocabularies": (
        "marian",
        hf.MarianConfig(**MARIAN, decoder_vocab_size=41, share_encoder_decoder_embeddings=False),
    ),
}
CASES = MASKED | CAUSAL | SEQ2SEQ
GENERATING = CAUSAL | SEQ2SEQ
# Which native classes give a token its slot as position, without a way to say otherwise
COUNT_SLOTS = {"bart", "pegasus", "marian"}


@torch.no_grad()
def build(case: str) -> tuple[nn.Module, nn.Module]:
    """The native model with random weights, and ours with the same; both in evaluation mode."""
    family, config = CASES[case]
    bridge = BRIDGES[family]
    native = getattr(hf, bridge.native)(config).eval()
    if case == "t5-v1.1":
        # T5's config ties the head whatever it is told; only a checkpoint with a head of its own unties it
        native.lm_head.weight = nn.Parameter(torch.empty_like(native.lm_head.weight))
    for module in native.modules():
        if isinstance(module, nn.Embedding):
            # Some classes give the padding's row no gradient, even Pegasus and Marian, which start every text with
            # that token; T5 trains it, and so does the family
            module.padding_idx = None
    for name, parameter in native.named_parameters():
        if parameter.requires_grad:
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.normal_(mean=float(is_norm), std=WEIGHT_STD)
    if hasattr(native, "final_logits_bias"):
        # A constant that its class adds to the logits, where the family has a bias to train
        native.final_logits_bias.normal_().requires_grad_()
    ours = variform.from_config(bridge.config(config)).eval()
    ours.load_state_dict(convert(native.state_dict(), bridge.table))
    return native, ours


def padding_mask(side: str) -> torch.Tensor:
    """`(batch, seq)`: 1 for the real tokens of `LENGTHS`, with the padding on the given side."""
    slots = torch.arange(int(LENGTHS.max()))
    mask = (slots < LENGTHS[:, None]).long()
    return mask if side == "right" else mask.flip(1)


def random_ids(mask: torch.Tensor, vocab_size: int, padding: int) -> torch.Tensor:
    return torch.randint(FIRST_REGULAR_ID, vocab_size, mask.shape).where(mask.bool(), torch.tensor(padding))


def make_inputs(case: str, side: str) -> tuple[dict, dict]:
    """A padded batch for the native model and for ours, which differ in positions alone: where the native class does
    not count them over the real tokens, it is told to; where it cannot be told, ours is told its slots."""
    family, config = CASES[case]
    mask = padding_mask(side)
    inputs = {"input_ids": random_ids(mask, config.vocab_size, config.pad_token_id), "attention_mask": mask}
    slots, counted = torch.arange(mask.shape[1])[None], (mask.cumsum(-1) - 1).clamp(min=0)
    if case in SEQ2SEQ:
        return inputs, inputs | ({"position_ids": slots} if family in COUNT_SLOTS else {})
    if family in ("bert", "albert", "roberta"):
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, mask.shape)
    return inputs | ({} if family == "roberta" else {"position_ids": counted}), inputs


def make_labels(case: str, inputs: dict) -> torch.Tensor:
    """Labels for a batch: masked tokens, the tokens themselves, or a shorter text; -100 for padding."""
    _, config = CASES[case]
    real = inputs["attention_mask"].bool()
    if case in SEQ2SEQ:
        real = padding_mask("right")[:, :9].flip(0).bool()
        return random_ids(real, getattr(config, "decoder_vocab_size", config.vocab_size), -100)
    if case in MASKED:
        return random_ids(real & (torch.rand(real.shape) < 0.5), config.vocab_size, -100)
    # What stands before the first real token is padding, whose states are nobody's
    return inputs["input_ids"].where(real & (real.cumsum(-1) > 1), torch.tensor(-100))


def assert_same(ours: torch.Tensor, native: torch.Tensor, name: str, scale: torch.Tensor | None = None) -> None:
    assert ours.shape == native.shape, name
    scale = (native if scale is None else scale).abs().max()
    assert scale > 0, f"{name}: nothing to compare"
    error = ((ours - native).abs().max() / scale).item()
    assert error <= TOLERANCE, f"{name}: {error:.1e}"


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """By every name in the state dict, tied ones and buffers included."""
    tensors = model.state_dict(keep_vars=True).items()
    return {name: tensor.grad for name, tensor in tensors if tensor.requires_grad}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_states_logits_and_loss(case, side):
    native, ours = build(case)
    native_inputs, our_inputs = make_inputs(case, side)
    labels = make_labels(case, our_inputs)
    expected = native(**native_inputs, labels=labels, output_hidden_states=True)
    output = ours(**our_inputs, labels=labels, output_hidden_states=True)

    real = {"": our_inputs["attention_mask"].bool()}
    if case in SEQ2SEQ:
        real = {"encoder_": real[""], "decoder_": labels != -100}
    for stack, is_real in real.items():
        pairs = zip(output[f"{stack}hidden_states"], expected[f"{stack}hidden_states"], strict=True)
        for layer, (states, native_states) in enumerate(pairs):
            assert_same(states[is_real], native_states[is_real], f"{stack}hidden_states[{layer}]")
    logits = expected.logits[is_real]
    assert_same(output.logits[is_real], logits, "logits")
    assert_same(output.loss, expected.loss, "loss", scale=logits)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case, side, training):
    """In training the loss is taken chunk by chunk, without logits; where there is no dropout it is the same loss."""
    native, ours = build(case)
    native.train(training)
    ours.train(training)
    native_inputs, our_inputs = make_inputs(case, side)
    labels = make_labels(case, our_inputs)
    expected = native(**native_inputs, labels=labels)
    output = ours(**our_inputs, labels=labels)
    expected.loss.backward()
    output.loss.backward()

    assert (output.logits is None) == training
    assert_same(output.loss, expected.loss, "loss", scale=expected.logits)
    native_grads = convert(gradients(native), BRIDGES[CASES[case][0]].table)
    grads = gradients(ours)
    assert grads.keys() == native_grads.keys()
    for name, grad in native_grads.items():
        # A bias on all keys alike changes no softmax: its gradient is rounding, to be measured beside the queries'.
        scale = native_grads[name.replace("k_proj.bias", "q_proj.bias")]
        assert_same(grads[name], grad, name, scale)


def steps(case: str, native: nn.Module, ours: nn.Module):
    """The native logits of one pass over a text, which of its tokens are real, and a function that gives ours the
    tokens from `start` to `stop`."""
    native_inputs, our_inputs = make_inputs(case, "left")
    mask = our_inputs["attention_mask"]
    if case in CAUSAL:
        ids = our_inputs["input_ids"]

        def step(start, stop, **kwargs):
            return ours(ids[:, start:stop], mask[:, :stop], **kwargs)

        return native(**native_inputs).logits, mask.bool(), step

    ids = torch.randint(FIRST_REGULAR_ID, ours.config.vocab_size, mask.shape)
    encoded = ours.get_encoder()(**our_inputs)

    def step(start, stop, **kwargs):
        return ours(decoder_input_ids=ids[:, start:stop], encoder_outputs=encoded, attention_mask=mask, **kwargs)

    return native(**native_inputs, decoder_input_ids=ids).logits, torch.ones_like(mask).bool(), step


@pytest.mark.parametrize("case", GENERATING)
@torch.no_grad()
def test_decoding_token_by_token(case):
    """Ours through its cache, four tokens at once and then one by one; the native model in one pass over all."""
    expected, is_real, step = steps(case, *build(case))
    length = expected.shape[1]
    outputs = [step(0, 4, use_cache=True)]
    for start in range(4, length):
        outputs.append(step(start, start + 1, past_key_values=outputs[-1].past_key_values, use_cache=True))
    assert_same(torch.cat([output.logits for output in outputs], dim=1)[is_real], expected[is_real], "logits")


@pytest.mark.parametrize("case", GENERATING)
def test_greedy_generation(case):
    native, ours = build(case)
    native.generation_config = ours.generation_config
    # `generate` cannot be told an encoder's positions
    side = "right" if CASES[case][0] in COUNT_SLOTS else "left"
    _, inputs = make_inputs(case, side)
    inputs.pop("position_ids", None)
    options = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9}
    tokens = ours.generate(**inputs, **options)
    assert tokens.shape[1] >= 9
    assert tokens.tolist() == native.generate(**inputs, **options).tolist()
