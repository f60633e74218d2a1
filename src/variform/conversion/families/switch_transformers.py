"""Switch Transformer (arXiv:2101.03961): T5 with experts in some layers, of which a token uses one.

An expert takes `expert_capacity` tokens of each text, the first ones; others pass by. The native class counts padding among
them, ours does not, so that under padding on the left they differ where an expert is full. It has the limit in evaluation, in
the decoder too, where a cache undoes it: text written token by token is another than the same text read at once. Our decoder
has the limit in training alone, and computes what the native one does as long as no expert is full.

Router jitter multiplies what the experts read as well, in float32; in half precision, and in ours, only what the router reads.
"""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from ..compare import mlp_type
from ..family import Head
from ..tables import Row
from . import t5
from .bart import STACKS, in_both

# How many layers each stack has, and each how many of them has experts
LAYERS = {"encoder": "num_layers", "decoder": "num_decoder_layers"}


def is_sparse(layer_idx: int, step: int) -> bool:
    return step == 1 or (step > 1 and layer_idx % step == 1)


def types(num_layers: int, step: int) -> list[str]:
    return ["sparse" if is_sparse(layer_idx, step) else "dense" for layer_idx in range(num_layers)]


def read(foreign) -> dict[str, Any]:
    values = t5.read_start(foreign) | {
        "tie_encoder_decoder_embeddings": foreign.tie_word_embeddings,
        "decoder.logit_scale": foreign.d_model**-0.5 if foreign.tie_word_embeddings else 1.0,
    }
    experts = {
        "router_type": "switch",
        "num_experts": foreign.num_experts,
        "expert_capacity": foreign.expert_capacity,
        "router_jitter_noise": foreign.router_jitter_noise,
        "router_bias": foreign.router_bias,
    }
    for side in STACKS:
        of_layers = types(getattr(foreign, LAYERS[side]), getattr(foreign, f"{side}_sparse_step"))
        stack = {"mlp_layer_types": of_layers, **(experts if "sparse" in of_layers else {})}
        values |= {f"{side}.{name}": value for name, value in stack.items()}
    return values


def write(form) -> dict[str, Any]:
    values = {
        "decoder_start_token_id": form.decoder_start_token_id,
        "tie_word_embeddings": form.decoder.logit_scale != 1.0,
    }
    for side in STACKS:
        step = step_of(getattr(form, side))
        num_layers = getattr(form, side).num_hidden_layers
        values |= {
            f"num_sparse_{side}_layers": num_layers // step if step else num_layers + 1,
            f"{side}_sparse_step": step,
        }
    sparse = next((stack for stack in (form.encoder, form.decoder) if stack.num_experts), None)
    if sparse is not None:
        values |= {"num_experts": sparse.num_experts, "router_bias": sparse.router_bias}
        values |= {"router_jitter_noise": float(sparse.router_jitter_noise)}
        # What is limited by a share of the text is refused when it is compared
        values |= {} if sparse.expert_capacity is None else {"expert_capacity": sparse.expert_capacity}
    return values


def step_of(stack: PreTrainedConfig) -> int:
    """Each how many layers of a stack has experts; where it is not so regular, 1, which is refused when it is compared."""
    num_layers = stack.num_hidden_layers
    wanted = [mlp_type(stack, layer_idx) for layer_idx in range(num_layers)]
    return next((step for step in range(num_layers + 1) if types(num_layers, step) == wanted), 1)


def rows(form) -> list[Row]:
    table = [row._replace(foreign=str(row.foreign).replace("DenseReluDense", "mlp")) for row in t5.rows(form)]
    for side, index in (("encoder", 1), ("decoder", 2)):
        stack = getattr(form, side)
        block, ours = f"{side}.block.{{i}}.layer.{index}.mlp", f"{side}.layers.{{i}}.mlp"
        table.append(Row(f"{block}.router.classifier.{{p}}", f"{ours}.gate.{{p}}"))
        for theirs, name in (("wi", "up_proj"), ("wo", "down_proj")):
            experts = [f"{block}.experts.expert_{number}.{theirs}.weight" for number in range(stack.num_experts)]
            if stack.experts_layout == "modulelist":
                table += [Row(each, f"{ours}.experts.{number}.{name}.weight") for number, each in enumerate(experts)]
            elif experts:
                table.append(Row(tuple(experts), f"{ours}.experts.{name}", ("stack",)))
    return table


FAMILY = replace(
    t5.FAMILY,
    model_type="switch_transformers",
    same={
        # Written from the experts' width, where there is another
        **{f"{side}.moe_intermediate_size": "d_ff" for side in STACKS},
        **t5.SAME,
        **{f"{side}.hidden_act": "dense_act_fn" for side in STACKS},
        "router_aux_loss_coef": "router_aux_loss_coef",
        "router_z_loss_coef": "router_z_loss_coef",
    },
    fixed=in_both(position_embedding_type="relative_bias", attention_scale=1.0, gated_mlp=False),
    read=read,
    write=write,
    inert=frozenset(
        [
            "initializer_factor",
            "add_router_probs",
            "router_ignore_padding_tokens",
            # Read layer by layer
            "num_sparse_encoder_layers",
            "num_sparse_decoder_layers",
            # Of no effect where all layers are dense
            "num_experts",
            "expert_capacity",
            "router_jitter_noise",
            "router_bias",
        ]
    ),
    rows=rows,
    heads={
        "AutoModel": Head("SwitchTransformersModel"),
        "AutoModelForSeq2SeqLM": replace(
            t5.FAMILY.heads["AutoModelForSeq2SeqLM"], foreign="SwitchTransformersForConditionalGeneration"
        ),
    },
    idle={"shared.weight": "encoder.embed_tokens.weight"},
)
