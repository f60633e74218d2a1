"""What every class of the family tells transformers about itself: backends, how weights start, how a vocabulary is resized."""

import math
from typing import Any

import torch
import transformers
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .attention import SPELLED_OUT
from .checks import refuse, version_tuple
from .configuration_variform import VariformDecoderConfig, VariformEncoderConfig, VariformEncoderDecoderConfig
from .masks import is_plain_mask
from .moe import BiasedTokensChoose, Experts, Router
from .norms import LayerScale, RMSNorm
from .outputs import CACHE
from .patterns import parse
from .positions import AlibiBias, AxialPositions, LearnedPositions, RelativeBias, TransformerXlPositions, alibi_slopes

logger = logging.get_logger(__name__)

# They replace modules of the class nn.Linear and nothing else
LINEAR_ONLY_QUANTIZERS = ("bitsandbytes", "quanto", "hqq")


def backend_obstacle(config, implementation: str) -> str | None:
    """The field of a stack's config that an attention backend cannot express, as `field=value`; None if it can."""
    obstacles = {}
    if implementation == "sdpa":
        obstacles = {"attn_logit_softcapping": None, "attention_sinks": False}
    elif implementation.startswith("flash_attention"):
        obstacles = {"attention_sinks": False} if implementation == "flash_attention_2" else {}
        if config.position_embedding_type in ("relative_bias", "alibi", "transformer_xl"):
            return f"position_embedding_type={config.position_embedding_type!r}"
        if config.head_dim > 256:
            return f"head_dim={config.head_dim}"
    for entry in config.attention_patterns:
        is_window = entry["name"] in ("full", "sliding_window")
        if implementation.startswith("flash_attention") and not is_window:
            return f"attention_patterns={str(parse(entry))!r}"
        if implementation == "flex_attention" and (entry["name"] == "lsh" or entry.get("placement") == "first"):
            return f"attention_patterns={str(parse(entry))!r}"
    for name, harmless in obstacles.items():
        if getattr(config, name) != harmless:
            return f"{name}={getattr(config, name)}"
    return None


def check_expert_parallelism(config, sizes) -> None:
    """Refuses processes that cannot share out the experts of a stack: `sizes`, transformers' `DistributedConfig`."""
    size, processes = sizes.ep_size, sizes.fsdp_size * sizes.tp_size
    refuse(
        config.experts_layout == "modulelist",
        f"`ep_size={size}` shares out experts that are one tensor, and `experts_layout='modulelist'` keeps them apart; use "
        "`tp_size` alone, or build the form with `experts_layout='fused'`.",
    )
    refuse(config.num_experts % size != 0, f"`ep_size={size}` does not divide `num_experts={config.num_experts}`.")
    refuse(
        config.num_experts < processes,
        f"`ep_size={size}`: the {processes} processes (`fsdp_size` x `tp_size`) share out `num_experts={config.num_experts}`, "
        "and none may be left without; use fewer processes, or leave out `ep_size`.",
    )
    refuse(
        sizes.fsdp_size > 1 and size == processes and version_tuple(transformers.__version__) < (5, 23),
        f"`ep_size={size}` with `fsdp_size={sizes.fsdp_size}`: transformers {transformers.__version__} would divide the "
        "gradients of experts twice; install 5.23, or leave out `ep_size`.",
    )


def check_loss_of_trl(model: PreTrainedModel) -> None:
    """Refuses to train under trl what would be another model there, and names what its loss leaves out.

    trl's trainers compute the loss themselves: from the states of the base model and the weight of `lm_head`, or from logits.
    """
    form = model.config
    transform = getattr(model, "head_transform", None)
    if transform is not None and not isinstance(transform, nn.Identity):
        field = f"embedding_size={form.embedding_size}" if not form.lm_head_transform else "lm_head_transform=True"
        raise ValueError(
            f"trl takes the states of the base model for those that `lm_head` reads, and `{field}` puts a layer between: train "
            "with transformers' Trainer, or finetune/causal_lm.py."
        )
    has_routers = any(isinstance(module, Router) for module in model.modules())
    if has_routers and form.router_aux_loss_coef:
        raise ValueError(
            f"`router_aux_loss_coef={form.router_aux_loss_coef}`: trl would train without the balance loss of these routers; "
            "train with transformers' Trainer, or do without it: `model.config.router_aux_loss_coef = 0.0`."
        )
    left_out = ["label_smoothing", "z_loss_coef", *(["router_z_loss_coef"] if has_routers else [])]
    left_out = [f"{name}={getattr(form, name)}" for name in left_out if getattr(form, name, 0)]
    if left_out:
        logger.warning_once(f"trl computes the loss itself: `{'`, `'.join(left_out)}` takes no part in it.")


class VariformPreTrainedModel(PreTrainedModel):
    """What every class of the family tells transformers about itself, and how its weights start."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # transformers looks for its decorator in the file of the model, and would take the slow way
    _can_set_experts_implementation_cached_value = True

    def post_init(self) -> None:
        """Refuses a quantizer that would leave the experts as they are, without a word."""
        super().post_init()
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None or not any(isinstance(module, Experts) for module in self.modules()):
            return
        options = quantization if isinstance(quantization, dict) else quantization.to_dict()
        method = str(getattr(options["quant_method"], "value", options["quant_method"]))
        kept = options.get("llm_int8_skip_modules") or options.get("modules_to_not_convert") or []
        if method in LINEAR_ONLY_QUANTIZERS and "experts" not in kept:
            raise ValueError(
                f"`quantization_config` of {method} reaches `nn.Linear`s only, and `experts_layout='fused'` keeps experts as "
                "one tensor, which would stay in full precision: save `variform.surgery.change_experts_layout(model, "
                "'modulelist')` and load that, or name 'experts' among the modules to skip."
            )

    def add_model_tags(self, tags: list[str] | str) -> None:
        """As transformers'. trl's trainers put their tag on a model that they are going to train: the one sign they give."""
        if "trl" in ([tags] if isinstance(tags, str) else tags):
            check_loss_of_trl(self)
        super().add_model_tags(tags)

    @torch.no_grad()
    def _init_weights(self, module: Any) -> None:
        """Normal(0, initializer_range) for matrices and tables, 0 for biases, 1 for norms.

        The matrices that write into the residual stream start smaller by sqrt(2 x layers), so that its variance does not
        grow with depth (GPT-2). Each rule stands at the leaf that holds the tensor: containers without tensors of their own
        are not visited.
        """
        super()._init_weights(module)
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        if isinstance(module, nn.Linear) and getattr(module, "writes_residual", False):
            init.normal_(module.weight, mean=0.0, std=residual_std)
        elif isinstance(module, RMSNorm):
            init.constant_(module.weight, 0.0 if module.unit_offset else 1.0)
        elif isinstance(module, (LearnedPositions, RelativeBias)):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, AxialPositions):
            init.normal_(module.rows, mean=0.0, std=std)
            init.normal_(module.columns, mean=0.0, std=std)
        elif isinstance(module, TransformerXlPositions):
            init.normal_(module.u, mean=0.0, std=std)
            init.normal_(module.v, mean=0.0, std=std)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
            if isinstance(module, BiasedTokensChoose):
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("_bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=residual_std if name == "down_proj" else std)
        elif isinstance(module, LayerScale):
            init.constant_(module.weight, module.init_value)
        elif isinstance(module, AlibiBias):
            init.copy_(module.slopes, alibi_slopes(module.slopes.numel()))
        elif isinstance(module, nn.PReLU):
            init.constant_(module.weight, 0.25)
        elif isinstance(getattr(module, "sinks", None), nn.Parameter):
            init.normal_(module.sinks, mean=0.0, std=std)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args, **kwargs) -> str:
        """Refuses a backend that cannot express the form; left to choose, takes sdpa where it can, else our own."""
        stacks = [getattr(self.config, side) for side in ("encoder", "decoder") if hasattr(self.config, side)]
        obstacles = [backend_obstacle(config, attn_implementation or "sdpa") for config in stacks or [self.config]]
        obstacle = next(filter(None, obstacles), None)
        if obstacle is not None and attn_implementation is not None:
            raise ValueError(
                f"`attn_implementation={attn_implementation!r}` cannot express `{obstacle}`; use 'eager', or "
                "'sdpa' or 'flex_attention' where they can."
            )
        chosen = SPELLED_OUT if obstacle is not None else attn_implementation
        return super()._check_and_adjust_attn_implementation(chosen, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a module's. From transformers 5.24 on, `generate` says `cache` for `past_key_values`: the forward takes both."""
        if "cache" in kwargs:
            kwargs["past_key_values"] = kwargs.pop("cache")
        return super().__call__(*args, **kwargs)

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Refuses an expert parallelism that the form cannot have; then as transformers does."""
        stacks = [getattr(model.config, side) for side in ("encoder", "decoder") if hasattr(model.config, side)]
        if mesh_manager is not None and distributed_config.ep_size > 1:
            for config in stacks or [model.config]:
                if config.num_experts:
                    check_expert_parallelism(config, distributed_config)
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> torch.Tensor | None:
        """Generation with a static cache asks for masks in advance: the forward makes them itself, from a 2-D mask as long as
        the cache, so that its shape stays the same in every step."""
        if attention_mask is None or not is_plain_mask(attention_mask):
            return attention_mask
        cache: Cache = kwargs[CACHE]
        # One without layers, as `generate` begins with, has no length of its own
        missing = cache.get_max_length() - attention_mask.shape[1] if cache.layers else 0
        return nn.functional.pad(attention_mask, (0, max(missing, 0)))


class VariformEncoderPreTrainedModel(VariformPreTrainedModel):
    config: VariformEncoderConfig


class VariformDecoderPreTrainedModel(VariformPreTrainedModel):
    config: VariformDecoderConfig


class VariformEncoderDecoderPreTrainedModel(VariformPreTrainedModel):
    config: VariformEncoderDecoderConfig

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resizes the vocabulary of both stacks and the head; where the stacks have two vocabularies, the encoder's alone.

        Arguments and result as in `PreTrainedModel.resize_token_embeddings`.
        """
        if self.config.tie_encoder_decoder_embeddings:
            return super().resize_token_embeddings(*args, **kwargs)
        if self.config.encoder.vocab_size == self.config.decoder.vocab_size:
            self.resize_decoder_token_embeddings(*args, **kwargs)
        return self.get_encoder().resize_token_embeddings(*args, **kwargs)

    def resize_decoder_token_embeddings(self, *args, **kwargs) -> nn.Module:
        """Resizes the decoder's vocabulary and the head, of stacks that do not share their embeddings.

        Raises:
            ValueError: if the stacks share their embeddings.
        """
        if self.config.tie_encoder_decoder_embeddings:
            raise ValueError(
                "`tie_encoder_decoder_embeddings=True`: the decoder has no vocabulary of its own; use "
                "`resize_token_embeddings`."
            )
        embeddings = self.get_decoder().resize_token_embeddings(*args, **kwargs)
        self.vocab_size = embeddings.num_embeddings
        head = self.get_output_embeddings()
        if head is not None:
            self.set_output_embeddings(self._get_resized_lm_head(head, embeddings.num_embeddings))
            self.tie_weights()
        return embeddings
