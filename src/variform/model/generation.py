"""What generation asks of a form: where it ends, what it marks, and what its caches hold."""

from typing import Any

from torch import nn
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation import GenerationMixin, MaxLengthCriteria, StoppingCriteriaList
from transformers.utils import logging

from .outputs import CACHE

logger = logging.get_logger(__name__)


class VariformGenerationMixin(GenerationMixin):
    """Generation that stops, with the text so far, where a learned table of positions ends; what it writes is not global."""

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False, **kwargs) -> dict:
        model_kwargs = GenerationMixin._update_model_kwargs_for_generation(
            self, outputs, model_kwargs, is_encoder_decoder, **kwargs
        )
        marks = model_kwargs.get("global_attention_mask")
        if marks is not None and not is_encoder_decoder:
            model_kwargs["global_attention_mask"] = nn.functional.pad(marks, (0, kwargs.get("num_new_tokens", 1)))
        return model_kwargs

    def _get_stopping_criteria(self: Any, generation_config, *args, **kwargs) -> StoppingCriteriaList:
        criteria = GenerationMixin._get_stopping_criteria(self, generation_config, *args, **kwargs)
        config: Any = self.config.get_text_config(decoder=True)
        limit = config.longest_table
        longest = generation_config.max_length
        if limit is not None and (longest is None or longest > limit):
            field = "axial_shape" if config.position_embedding_type == "axial" else "max_position_embeddings"
            logger.warning_once(
                f"Generation stops at {limit} tokens, the end of the learned table of positions "
                f"(`{field}={getattr(config, field)}`); {longest} were asked for."
            )
            criteria.append(MaxLengthCriteria(limit))
        return criteria

    def _prepare_cache_for_generation(self: Any, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        """transformers gives the cache of the cross-attention the decoder's windows; it reads the whole source."""
        GenerationMixin._prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get(CACHE)
        if not isinstance(cache, EncoderDecoderCache):
            return
        layers = cache.cross_attention_cache.layers
        for number, layer in enumerate(layers):
            if layer.is_sliding and not layer.is_initialized:
                is_static = isinstance(layer, StaticSlidingWindowLayer)
                length = model_kwargs["encoder_outputs"][0].shape[1]
                layers[number] = StaticLayer(length) if is_static else DynamicLayer()
