"""Tokenizers without a training of their own: for two alphabets side by side, and for bytes."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]
# In the vocabulary of bytes
DOCUMENT_START, DOCUMENT_START_ID = "<s>", 256


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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a vocabulary of the 256 bytes, each under its own number, and `<s>`, 256, which begins and ends a document.

    "\u00e9" becomes `<s>` and the two bytes of its UTF-8, 195 and 169. It is a plain fast tokenizer, like GPT-2's without
    merges: what `save_pretrained` writes, `AutoTokenizer` loads. It pads on the left, as generation wants it.
    """
    # ByteLevel shows a printable byte as the character of that number and the others, in order, from number 256 on
    shown = sorted(ByteLevel.alphabet())
    printable = {ord(character): character for character in shown if ord(character) < 256}
    others = zip((byte for byte in range(256) if byte not in printable), shown[len(printable) :])
    vocabulary = {character: byte for byte, character in (*printable.items(), *others)}
    tokenizer = Tokenizer(BPE(vocabulary, merges=[]))
    tokenizer.add_special_tokens([DOCUMENT_START])
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{DOCUMENT_START} $A", special_tokens=[(DOCUMENT_START, DOCUMENT_START_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT_START,
        eos_token=DOCUMENT_START,
        pad_token=DOCUMENT_START,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
