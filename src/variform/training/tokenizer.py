"""Tokenizers: trained on text, or without a training of their own, for two alphabets side by side and for bytes."""

from collections.abc import Iterable
from typing import Literal

from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>"]
MASK = "<mask>"
Frame = Literal["both", "end", "start", "none"]
# How a text is framed: encoders read `<s> text </s>`, encoder-decoders `text </s>`, decoders `<s> text`
FRAMES: dict[Frame, tuple[str, str | None]] = {
    "both": ("<s> $A </s>", "<s> $A </s> $B:1 </s>:1"),
    "end": ("$A </s>", "$A </s> $B:1 </s>:1"),
    "start": ("<s> $A", None),
    "none": ("$A", None),
}
# In the vocabulary of bytes
DOCUMENT_START, DOCUMENT_START_ID = "<s>", 256


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, frame: Frame = "both", sentinels: int = 0, max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE (arXiv:1508.07909, over bytes as GPT-2 does): no text is unknown to it, and decoding is exact.

    It is a plain fast tokenizer: what `save_pretrained` writes, `AutoTokenizer` loads. Padding has a token of its own, so that
    a model learns where to stop. A decoder's tokenizer (`frame="start"` or "none") pads on the left, as generation wants it.

    Args:
        texts: to count pairs in.
        vocab_size: tokens in all, the 256 bytes and the special ones included.
        frame: which special tokens stand around a text.
        sentinels: so many tokens `<extra_id_0>` ... for span corruption (T5).
        max_length: tokens that the model reads at most, for `model_max_length`.

    Raises:
        ValueError: for a vocabulary without room for the bytes and the special tokens.
    """
    special = [*SPECIAL_TOKENS, MASK, *(f"<extra_id_{number}>" for number in range(sentinels))]
    if vocab_size < len(special) + 256:
        raise ValueError(
            f"`vocab_size={vocab_size}` must be at least {len(special) + 256}: 256 bytes and {len(special)} special tokens."
        )
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    single, pair = FRAMES[frame]
    tokenizer.post_processor = TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token=MASK,
        additional_special_tokens=special[len(SPECIAL_TOKENS) + 1 :],
        padding_side="left" if frame in ("start", "none") else "right",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **({"model_max_length": max_length} if max_length else {}),
    )


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
