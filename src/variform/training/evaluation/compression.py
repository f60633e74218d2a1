"""What general compressors need for a text: what a language model of it is to beat."""

import gzip
import lzma
from collections.abc import Sequence

# Of `xz -9`: what lies further back than that is forgotten
XZ_DICTIONARY = 2**26


def compress(train: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """Bits that general compressors need for a byte of the held-out texts.

    `xz -9e, trained` is what the held-out texts add to an archive of the training texts, as a model too has read those; left
    out where there are none, or they are longer than what xz looks back to.
    """
    seen, text = ("".join(texts).encode() for texts in (train, held_out))
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9e": xz_size(text)}
    if seen and len(seen) + len(text) <= XZ_DICTIONARY:
        sizes["xz -9e, trained"] = xz_size(seen + text) - xz_size(seen)
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def xz_size(text: bytes) -> int:
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
