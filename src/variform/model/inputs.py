"""What a stack refuses to read, naming it, and what it warns of. On an accelerator and in a graph no value is read: the host
would wait, and a graph would break."""

import difflib
import inspect
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs, is_torchdynamo_compiling, logging

from .masks import is_plain_mask, is_traced, seen_tokens

logger = logging.get_logger(__name__)

# What the classes of the family read. Generation and wrappers hand to one what another reads: it passes
ARGUMENTS = frozenset(
    {"input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds", "past_key_values", "use_cache"}
    | {"labels", "shift_labels", "start_positions", "end_positions", "logits_to_keep", "skip_logits"}
    | {"encoder_outputs", "encoder_hidden_states", "encoder_attention_mask", "encoder_position_ids"}
    | {"decoder_input_ids", "decoder_attention_mask", "decoder_position_ids", "decoder_inputs_embeds"}
    | {"global_attention_mask", "prefix_lengths"}
)
# What the platform, or the attention function, reads: FlexAttention reads `kernel_options` without naming it
PASSED_ON = frozenset(TransformersKwargs.__annotations__) | {
    "return_dict",
    "cache_position",
    "debug_io",
    "kernel_options",
}
KNOWN = ARGUMENTS | PASSED_ON


def refuse_unknown(kwargs: dict[str, Any], model: Any) -> None:
    """Refuses keywords that nothing reads: no class of the family, not the platform, not the model's attention function.

    Raises:
        TypeError: naming the keyword and the argument that it resembles.
    """
    if is_torchdynamo_compiling() or kwargs.keys() <= KNOWN:
        return
    attend = ALL_ATTENTION_FUNCTIONS.get(model.config._attn_implementation)
    taken = set() if attend is None else inspect.signature(attend).parameters.keys()
    for key in sorted(kwargs.keys() - KNOWN - taken):
        near = difflib.get_close_matches(key, sorted(KNOWN), n=1, cutoff=0.8)
        hint = f"did you mean `{near[0]}`?" if near else f"{type(model).__name__} does not read it."
        raise TypeError(f"forward() got an unexpected keyword `{key}`; {hint}")


def check_inputs(input_ids: Any, inputs_embeds: Any, position_ids: Any, embedding_size: int, side: str = "") -> None:
    """Refuses ids, embeddings and positions of a wrong kind or shape; costs no kernel.

    Args: side: what the caller's names begin with, such as "decoder_".

    Raises:
        ValueError: naming the argument, its shape or dtype, and the one expected.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"Give exactly one of `{side}input_ids` and `{side}inputs_embeds`.")
    name, inputs = (
        (f"{side}input_ids", input_ids) if inputs_embeds is None else (f"{side}inputs_embeds", inputs_embeds)
    )
    if not isinstance(inputs, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {type(inputs).__name__}; use `torch.tensor(...)`.")
    if inputs_embeds is None:
        expected, fits = "(batch, sequence)", inputs.ndim == 2
    else:
        expected = f"(batch, sequence, {embedding_size})"
        fits = inputs.ndim == 3 and inputs.shape[2] == embedding_size
    if not fits:
        raise ValueError(f"`{name}` has shape {tuple(inputs.shape)}; expected {expected}.")
    batch, length = inputs.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError(f"`{name}` is empty: shape {tuple(inputs.shape)}; give at least one sequence of one token.")
    if inputs_embeds is None and inputs.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"`{name}` must hold integer ids, got dtype {inputs.dtype}; use `.long()` or pass `{side}inputs_embeds`."
        )
    if inputs_embeds is not None and not inputs.is_floating_point():
        raise ValueError(
            f"`{name}` must hold vectors of floats, got dtype {inputs.dtype}; pass ids as `{side}input_ids`."
        )
    if position_ids is None or is_traced():
        return
    if tuple(position_ids.shape) not in ((batch, length), (1, length)):
        raise ValueError(
            f"`{side}position_ids` has shape {tuple(position_ids.shape)}, expected {(batch, length)}: one position a token."
        )
    if position_ids.is_floating_point():
        raise ValueError(f"`{side}position_ids` must hold integers, got dtype {position_ids.dtype}; use `.long()`.")


def check_mask(
    mask: Any, inputs: torch.Tensor, past_key_values: Cache | None = None, name: str = "attention_mask"
) -> None:
    """Refuses a mask that has not one entry, 0 or 1, for each cached and each given token.

    Masks as a backend takes them, 4-D or its own kind, pass. Values are read on the CPU and in the first call alone.

    Raises:
        ValueError: naming the mask, its shape and the one expected, or the first value that is neither 0 nor 1.
    """
    if mask is None or is_traced():
        return
    batch, length = inputs.shape[:2]
    if isinstance(mask, (list, tuple)):
        raise ValueError(f"`{name}` must be a tensor, got {type(mask).__name__}; use `torch.tensor(...)`.")
    if isinstance(mask, torch.Tensor) and mask.ndim not in (2, 4):
        raise ValueError(
            f"`{name}` has shape {tuple(mask.shape)}, expected {(batch, length)}, one entry a token, or 4-D as the attention "
            "function takes it."
        )
    is_static = past_key_values is not None and past_key_values.is_compileable
    # A static cache's count stays on its device; its mask may be as long as the cache
    past_length = 0 if is_static else seen_tokens(past_key_values)
    total = past_length + length
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        # Layers that slide keep fewer keys than were seen
        fits = mask.shape[0] in (1, batch) and (past_length > 0 or is_static or mask.shape[3] == length)
        if not fits:
            raise ValueError(
                f"`{name}` has shape {tuple(mask.shape)}, expected ({batch} or 1, heads or 1, queries, {length} keys)."
            )
    if not is_plain_mask(mask):
        return
    fits = mask.shape[1] >= total if is_static else mask.shape[1] == total
    if mask.shape[0] != batch or not fits:
        raise ValueError(
            f"`{name}` has shape {tuple(mask.shape)}, expected {(batch, total)}: one entry for each of the {past_length} "
            f"cached and {length} given tokens of {batch} sequences."
        )
    if past_length > 0 or mask.dtype == torch.bool or mask.device.type != "cpu":
        return
    is_wrong = (mask != 0) & (mask != 1)
    if is_wrong.any():
        row, column = is_wrong.nonzero()[0].tolist()
        raise ValueError(
            f"`{name}[{row}, {column}] = {mask[row, column].item():g}` is neither 1, a real token, nor 0, padding; a mask to "
            "be added to the scores is 4-D."
        )


def warn_beyond_training(config: Any, cache: Cache | None, length: int) -> None:
    """Says once where rotary positions go beyond the length that the model is made for, which changes what it computes.

    Windows do not care: what they see lies near. Nor does "dynamic" scaling, which begins there.

    Args: length: tokens of this call, after those of `cache`.
    """
    if config.position_embedding_type != "rope" or is_traced():
        return
    seen = seen_tokens(cache)
    limit = config.max_position_embeddings
    if not isinstance(seen, int) or seen + length <= limit or "full_attention" not in config.layer_types:
        return
    if (config.rope_parameters_of("full_attention") or {}).get("rope_type") != "dynamic":
        logger.warning_once(
            f"The sequence is longer than the {limit} tokens that the model is made for (`max_position_embeddings={limit}`): "
            "its rotary positions are new to it. Shorten the text, or scale them, such as by `rope_parameters={'rope_type': "
            "'yarn', 'factor': 2.0, ...}`."
        )
