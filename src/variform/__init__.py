"""Variform: one Transformer family for Hugging Face, in every form. Importing it registers the family.

`AutoConfig`, `AutoModel` and the `AutoModelFor...` classes then know the three model types, and PEFT knows which weights
to adapt.
"""

from . import surgery
from .conversion.convert import from_hf, to_hf
from .forms import from_config, list_forms, load_config
from .model.configuration_variform import (
    AUTO_MAP,
    VERSION,
    VariformDecoderConfig,
    VariformEncoderConfig,
    VariformEncoderDecoderConfig,
)
from .model.modeling_variform import (
    VariformDecoderForCausalLM,
    VariformDecoderForQuestionAnswering,
    VariformDecoderForSequenceClassification,
    VariformDecoderForTokenClassification,
    VariformDecoderModel,
    VariformEncoderDecoderForConditionalGeneration,
    VariformEncoderDecoderModel,
    VariformEncoderForMaskedLM,
    VariformEncoderForMultipleChoice,
    VariformEncoderForQuestionAnswering,
    VariformEncoderForSequenceClassification,
    VariformEncoderForTokenClassification,
    VariformEncoderModel,
)
from .registration import register
from .reshaping import reshape

__version__ = VERSION

register()

__all__ = [
    "AUTO_MAP",
    "VariformDecoderConfig",
    "VariformDecoderForCausalLM",
    "VariformDecoderForQuestionAnswering",
    "VariformDecoderForSequenceClassification",
    "VariformDecoderForTokenClassification",
    "VariformDecoderModel",
    "VariformEncoderConfig",
    "VariformEncoderDecoderConfig",
    "VariformEncoderDecoderForConditionalGeneration",
    "VariformEncoderDecoderModel",
    "VariformEncoderForMaskedLM",
    "VariformEncoderForMultipleChoice",
    "VariformEncoderForQuestionAnswering",
    "VariformEncoderForSequenceClassification",
    "VariformEncoderForTokenClassification",
    "VariformEncoderModel",
    "__version__",
    "from_config",
    "from_hf",
    "list_forms",
    "load_config",
    "reshape",
    "surgery",
    "to_hf",
]
