"""Makes the family known to transformers' Auto classes, to Trainer's label smoothing and to PEFT."""

import importlib.util

import transformers
from transformers.models.auto import modeling_auto

from .model import configuration_variform, modeling_variform
from .model.configuration_variform import AUTO_MAP

# What LoRA and its relatives adapt when a user names nothing: every projection of the layers, heads and tables left alone
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
PEFT_TARGETS = {
    "IA3_TARGET": ["k_proj", "v_proj", "down_proj"],
    "IA3_FEEDFORWARD": ["down_proj"],
    "LNTUNING_TARGET": ["input_norm", "branch_norm", "output_norm", "norm"],
}


def register() -> None:
    """Registers every class of `AUTO_MAP`; may be called again."""
    for model_type, entries in AUTO_MAP.items():
        config_class = getattr(configuration_variform, entries["AutoConfig"].split(".")[1])
        transformers.AutoConfig.register(model_type, config_class, exist_ok=True)
        config_class.register_for_auto_class()
        for auto_name, reference in entries.items():
            if auto_name == "AutoConfig":
                continue
            model_class = getattr(modeling_variform, reference.split(".")[1])
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
            # Saved checkpoints carry the code of the class, so that they load without this package
            model_class.register_for_auto_class(auto_name)
    # Trainer shifts labels before smoothing them only for the causal classes that this table names
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["variform_decoder"] = "VariformDecoderForCausalLM"
    register_with_peft()


def register_with_peft() -> None:
    """Gives every PEFT method default targets for the three model types, if PEFT is installed."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft.utils import constants

    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("MODULES_MAPPING"):
            method = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("MODULES_MAPPING").strip("_")
            targets = PEFT_TARGETS.get(method, ATTENTION + FEED_FORWARD)
            table.update({model_type: list(targets) for model_type in AUTO_MAP})
