"""Numbers in 4 bits: NF4, for frozen weights (Dettmers et al., QLoRA, 2023). The only place that imports bitsandbytes.

Blocks of 64 numbers share a scale, their largest magnitude in fp32, so a number takes 4.5 bits. The largest number of a
block is kept exactly. So packing unpacked numbers gives the same bits again, and a resumed run has the same weights.
"""

from typing import Any, NamedTuple

from torch import Tensor

from internlm.utils.errors import UserError

BLOCK = 64
BITS = 4 + 32 / BLOCK


class Packed(NamedTuple):
    """A flat tensor in 4 bits."""

    codes: Tensor  # uint8 [size / 2, 1]
    state: Any  # scales and dtype, as the library has them

    @property
    def num_bytes(self) -> int:
        return self.codes.nbytes + self.state.absmax.nbytes


def require_nf4() -> Any:
    """The library's functions. Raises UserError where it is missing."""
    try:
        import bitsandbytes.functional as library
    except ImportError as error:
        raise UserError('lora.base = "nf4" needs a package that is missing: pip install bitsandbytes') from error
    return library


def pack(values: Tensor) -> Packed:
    """values [size], in any floating dtype."""
    options = {"blocksize": BLOCK, "quant_type": "nf4", "compress_statistics": False}
    return Packed(*require_nf4().quantize_4bit(values, **options))


def unpack(packed: Packed) -> Tensor:
    """[size], in the dtype that the numbers had before packing."""
    return require_nf4().dequantize_4bit(*packed).view(-1)
