"""LoRA through PEFT: what it adapts in each shape, adapters that are loaded whole or refused, and merging with a check."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..model.checks import one_of
from ..model.layers import TransformerLayer
from ..model.moe import Experts, MixtureOfExperts

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

logger = logging.get_logger(__name__)

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_base.json"
PREFIX = "base_model.model."  # of the names in WEIGHTS_FILE
# How the name of a class ends -> PEFT's name of its task; the other heads have none
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
TASK_HEADS = ("classifier", "qa_outputs")  # start from random weights, so that they are trained whole
LABELS = ("id2label", "label2id", "problem_type")
SAMPLES = 64  # values of a tensor that enter the fingerprint, at most twice as many
SHOWN = 4  # names in a message


@dataclass
class LoraArguments:
    """Whether and how LoRA trains in place of the model (arXiv:2106.09685); the names are trl's."""

    use_peft: bool = field(
        default=False, metadata={"help": "Train LoRA adapters; the model's weights stay as they are."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Adapters are scaled by alpha / rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "What is adapted; default: every projection of the layers, experts too. Or `all-linear`."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "What is trained whole, besides the head of a classifier."}
    )
    use_dora: bool = field(default=False, metadata={"help": "Train lengths apart from directions (arXiv:2402.09353)."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(rank) (arXiv:2312.03732)."})


def adapters_in_words(model: Any) -> dict[str, str]:
    """`{method: what it adapts, and how much is trained}` of a model, for its card; empty for one without adapters."""
    found = {}
    for config in getattr(model, "peft_config", {}).values():
        trained, _ = model.get_nb_trainable_parameters()
        names = [name.rsplit(".", 1)[-1] for name in (*config.target_modules, *(config.target_parameters or ()))]
        targets = ", ".join(sorted(set(names)))
        method = "DoRA" if config.use_dora else "LoRA"
        head = f", {', '.join(sorted(config.modules_to_save))} whole" if config.modules_to_save else ""
        found[method] = f"rank {config.r} on {targets}; {trained:,} parameters trained{head}"
    return found


def lora_targets(model: nn.Module) -> dict[str, Any]:
    """Names every projection of the layers: attention, dense feed-forward, shared and routed experts. Routers are left alone,
    and so are heads and embeddings.

        peft.LoraConfig(r=8, **lora_targets(model))

    Experts in the layout "modulelist" are `nn.Linear`s like the others. Those in the layout "fused" are parameters, which PEFT
    adapts by parametrization (`target_parameters`), a pair of factors an expert; for them it refuses a `lora_dropout` other
    than 0, `use_dora` and `lora_bias`.

    Returns:
        Keyword arguments: `target_modules` and, with fused experts, `target_parameters`.

    Raises:
        ValueError: for a model without Variform's layers.
    """
    modules: set[str] = set()
    parameters: set[str] = set()
    for layer in model.modules():
        if not isinstance(layer, TransformerLayer):
            continue
        gates = {id(block.shared_expert_gate) for block in layer.modules() if isinstance(block, MixtureOfExperts)}
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and id(module) not in gates:
                modules.add(name.rsplit(".", 1)[-1])
            elif isinstance(module, Experts):
                weights = [key for key, _ in module.named_parameters(recurse=False) if not key.endswith("_bias")]
                parameters |= {f"{name}.{key}" for key in weights}
    if not modules:
        raise ValueError(f"`model` has no layers of Variform: {type(model).__name__}.")
    targets: dict[str, Any] = {"target_modules": sorted(modules)}
    if parameters:
        targets["target_parameters"] = sorted(parameters)
    return targets


def lora_config(model: PreTrainedModel, options: Any) -> "LoraConfig":
    """The `peft.LoraConfig` for a model of any shape and head.

    Args:
        options: has the fields of `LoraArguments`. `lora_dropout` becomes 0, with a warning, where fused experts are adapted.

    Raises:
        ValueError: for a rank below 1, a dropout outside [0, 1), a name that the model does not have, weights that are tied,
            and DoRA on fused experts.
    """
    from peft import LoraConfig

    if options.lora_r < 1:
        raise ValueError(f"`lora_r={options.lora_r}` is no rank: give 1 or more.")
    if not 0 <= options.lora_dropout < 1:
        raise ValueError(f"`lora_dropout={options.lora_dropout}` is no share: give 0 or more, and less than 1.")
    targets = lora_targets(model)
    if options.lora_target_modules:
        targets = named_targets(model, options.lora_target_modules)
    dropout = options.lora_dropout
    if "target_parameters" in targets:
        if options.use_dora:
            raise ValueError(
                '`use_dora` does not work on experts in the layout "fused": leave it out, or the experts out of '
                "`lora_target_modules`."
            )
        if dropout:
            logger.warning(f"`lora_dropout={dropout}` is taken as 0: fused experts are adapted without dropout.")
            dropout = 0.0
    whole = [name for name in TASK_HEADS if isinstance(getattr(model, name, None), nn.Module)]
    for name in options.lora_modules_to_save or []:
        one_of("lora_modules_to_save", name, {path.rsplit(".", 1)[-1] for path, _ in model.named_modules()} - {""})
        whole.append(name)
    return LoraConfig(
        task_type=task_of(type(model).__name__),
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=dropout,
        use_dora=options.use_dora,
        use_rslora=options.use_rslora,
        modules_to_save=whole or None,
        **targets,
    )


def task_of(architecture: str) -> str | None:
    """PEFT's name of the task of a class."""
    return next((task for ending, task in TASKS.items() if architecture.endswith(ending)), None)


def named_targets(model: PreTrainedModel, names: list[str]) -> dict[str, Any]:
    """The targets that a user names, modules and parameters of fused experts told apart."""
    if names == ["all-linear"]:
        return {"target_modules": "all-linear"}
    fused = set(lora_targets(model).get("target_parameters", []))
    modules = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    for name in names:
        if name not in fused and not any(ends_with(path, name) for path in modules):
            one_of("lora_target_modules", name, fused | {path.rsplit(".", 1)[-1] for path in modules})
    refuse_tied(model, names)
    targets: dict[str, Any] = {"target_modules": [name for name in names if name not in fused]}
    if fused & set(names):
        targets["target_parameters"] = sorted(fused & set(names))
    return targets


def ends_with(path: str, name: str) -> bool:
    """Whether a target `name` means the module or parameter at `path`, as PEFT takes it."""
    return path == name or path.endswith(f".{name}")


def refuse_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError for a target that shares its weight with another module: an adapter on one would untie them."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            owners.setdefault(id(module.weight), []).append(path)
    for paths in owners.values():
        found = [path for path in paths if any(ends_with(path, name) for name in names)]
        if found and len(paths) > 1:
            others = ", ".join(f"`{path}`" for path in paths if path != found[0])
            raise ValueError(
                f"`{found[0]}` is adapted and shares its weight with {others}, so that merging would untie them: leave it "
                "out of the targets, or set `tie_word_embeddings: false`."
            )


def save_adapter(model: "PeftModel", folder: str | Path, *, base_name: str | None = None) -> None:
    """Save an adapter as PEFT does, and beside it `adapter_base.json`, which says what it belongs to: the class and config of
    the base, and a fingerprint of those of its weights that the adapter does not bring.

    Args:
        base_name: the folder or repo of the base; default: where it was loaded from, which a converted model does not know.
    """
    from peft import get_base_model_state_dict

    base: Any = model.get_base_model()
    for config in model.peft_config.values():
        config.base_model_name_or_path = base.config.name_or_path or None
    model.save_pretrained(str(folder))
    if base_name is not None:  # PEFT would read a native config of that name as one of ours while it saves
        path = Path(folder) / CONFIG_FILE
        saved = {**json.loads(path.read_text(encoding="utf-8")), "base_model_name_or_path": base_name}
        path.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")
    record = {
        "architecture": type(base).__name__,
        "config": json.loads(base.config.to_json_string()),
        "fingerprint": fingerprint(get_base_model_state_dict(model), read_shapes(Path(folder))),
    }
    (Path(folder) / BASE_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def fingerprint(weights: Mapping[str, torch.Tensor], brought: Iterable[str]) -> str:
    """A digest of the weights of a base: names, shapes, and some values of each, the same in float32 and in bfloat16.

    Args:
        weights: of the model without adapters. brought: names in the adapter's file; the base's tensors of these are left out.
    """
    left_out = {name.removeprefix(PREFIX).replace("base_layer.", "") for name in brought}
    digest = hashlib.sha256()
    for name in sorted(weights.keys() - left_out):
        values = weights[name].detach().flatten()
        sampled = values[:: max(1, values.numel() // SAMPLES)].to("cpu", torch.bfloat16)
        digest.update(f"{name} {tuple(weights[name].shape)}".encode() + sampled.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the tensors of an adapter.

    Raises:
        FileNotFoundError: if the folder holds no weights of one. ValueError: if the file is damaged.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: {WEIGHTS_FILE} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (no mapping)
    except Exception as error:  # safetensors' own error type says neither which file nor what to do
        raise ValueError(f"{path} is not a whole safetensors file ({error}); copy or save it again.") from error


def read_config(folder: Path) -> "PeftConfig":
    """The config of an adapter.

    Raises:
        FileNotFoundError: if the folder holds none.
    """
    from peft import PeftConfig

    if not (folder / CONFIG_FILE).is_file():
        hint = "; it holds a whole model, merged perhaps" if (folder / "config.json").is_file() else ""
        raise FileNotFoundError(f"{folder} holds no adapter: {CONFIG_FILE} is missing{hint}.")
    return PeftConfig.from_pretrained(str(folder))


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `save_adapter` wrote of the base; None for an adapter that PEFT alone saved."""
    path = folder / BASE_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_adapter_strictly(model: PreTrainedModel, folder: str | Path, *, is_trainable: bool = False) -> "PeftModel":
    """Load an adapter onto the model that it was trained on; PEFT takes some others, with a warning or without.

    Args:
        model: the base, without adapters; left as it is if the adapter is refused.
        folder: what `save_adapter` wrote. Of what PEFT alone saved, the weights of the base are not checked.
        is_trainable: go on training.

    Raises:
        ValueError: for a model that carries an adapter already, a base of another class, vocabulary, size or weights, targets
            that it does not have or that are tied, and tensors that are missing or left over.
        FileNotFoundError: where there is no adapter.
    """
    from peft import PeftModel

    folder = Path(folder)
    if isinstance(model, PeftModel) or hasattr(model, "peft_config"):
        raise ValueError(f"`model` carries an adapter already: load {folder} onto the model without it.")
    config, shapes, record = read_config(folder), read_shapes(folder), read_record(folder)
    if record is not None:
        check_form(model, record, folder)
    check_targets(model, config, folder)
    check_tensors(model, config, shapes, folder)
    if record is not None and fingerprint(model.state_dict(), shapes) != record["fingerprint"]:
        raise ValueError(
            f"{folder} was trained on other weights than those of `model`{name_of(model)}: load its base, "
            f"{config.base_model_name_or_path!r}, as it was then. A model that the adapter is merged into already is not that "
            "base."
        )
    return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)


def name_of(model: PreTrainedModel) -> str:
    return f" ({model.config.name_or_path})" if model.config.name_or_path else ""


def check_form(model: PreTrainedModel, record: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError for another class of model, and for another vocabulary."""
    if type(model).__name__ != record["architecture"]:
        raise ValueError(f"{folder} is an adapter for {record['architecture']}, `model` is a {type(model).__name__}.")
    known = type(model.config).from_dict(dict(record["config"])).get_text_config(decoder=True).vocab_size
    size = model.config.get_text_config(decoder=True).vocab_size
    if size != known:
        raise ValueError(
            f"{folder} was trained with `vocab_size={known}`, `model` has {size}: call "
            f"`model.resize_token_embeddings({known})` first."
        )


def check_targets(model: PreTrainedModel, config: "PeftConfig", folder: Path) -> None:
    """Raises ValueError where the adapter names what the model does not have, or what is tied in it."""
    modules = getattr(config, "target_modules", None) or []
    if isinstance(modules, str):  # a pattern
        return
    paths = {
        "target_modules": (modules, [path for path, _ in model.named_modules()]),
        "target_parameters": (
            getattr(config, "target_parameters", None) or [],
            [path for path, _ in model.named_parameters()],
        ),
    }
    for field_name, (names, known) in paths.items():
        absent = sorted(name for name in names if not any(ends_with(path, name) for path in known))
        if absent:
            raise ValueError(f"{folder} adapts {shown(absent)} (`{field_name}`), which `model` does not have.")
    refuse_tied(model, modules)


def check_tensors(
    model: PreTrainedModel, config: "PeftConfig", shapes: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raises ValueError for tensors that are missing, left over or of another shape; asks a twin without memory."""
    from peft import get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        nameless = copy.deepcopy(config)
        nameless.base_model_name_or_path = None  # or PEFT warns that the twin has another name
        twin = get_peft_model(type(model)(model.config), nameless)  # type: ignore[arg-type]
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(twin, save_embedding_layers=False).items()
    }
    # Embeddings come along where there are new tokens
    own = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    plain = {name: name.replace("base_layer.", "") for name in shapes}
    embeddings = {name: own[plain[name]] for name in shapes if plain[name] in own}
    missing = sorted(expected.keys() - shapes.keys())
    left_over = sorted(shapes.keys() - expected.keys() - embeddings.keys())
    if missing:
        raise ValueError(f"{folder} lacks {shown(missing)}: the file is not whole; copy or train the adapter again.")
    if left_over:
        raise ValueError(f"{folder} holds {shown(left_over)}, which have no place in `model`: it has another base.")
    for name, shape in (embeddings | expected).items():
        if shapes[name] != shape:
            raise ValueError(f"{folder} has another base: `{name}` is {shapes[name]} there and {shape} in `model`.")


def shown(names: list[str]) -> str:
    """The first names of a list, and how many there are beyond."""
    rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(f"`{name}`" for name in names[:SHOWN]) + rest
