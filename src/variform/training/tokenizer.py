"""A tokenizer for two alphabets: letters that stand side by side, and symbols that stand apart."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]


def letters_and_symbols_tokenizer(letters: Iterable[str], symbols: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build one vocabulary for both sides: "cat" becomes `c a t </s>`, "K AE T" becomes `K AE T </s>`.

    Symbols are runs of capitals; any other character is a letter. Decoding puts spaces between the tokens. It is a
    plain fast tokenizer: what `save_pretrained` writes, `AutoTokenizer` loads.

    Args:
        letters: single characters, none of them a capital.
        symbols: runs of the capitals A to Z.
    """
    tokens = [*SPECIAL_TOKENS, *sorted(letters), *sorted(symbols)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Sequence([WhitespaceSplit(), Split(Regex("[A-Z]+|[^A-Z]"), behavior="isolated")])
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
