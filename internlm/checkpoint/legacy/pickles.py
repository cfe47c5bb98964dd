"""Files of 2023 are pickles: their data is read, nothing in them is run.

torch's `weights_only` unpickler knows tensors and plain containers and refuses every other class. The few more that the
frameworks of 2023 wrote are listed here: their attribute dict comes back as a dict, their enum as its text, and numpy's
arrays as they are. There is no fallback.
"""

import io
import zipfile
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from internlm.checkpoint.storage import Storage
from internlm.utils.errors import UserError

_CONTEXT = "internlm.core.context"
_DICTS = (f"{_CONTEXT}.parallel_context.Config", f"{_CONTEXT}.Config")
_TEXTS = (f"{_CONTEXT}.process_group_initializer.ParallelMode", f"{_CONTEXT}.parallel_context.ParallelMode")
# Of the order of samples and its random generator. numpy 1 and 2 call the same functions by different names.
_ARRAY_DTYPES = tuple({type(np.dtype(kind)) for kind in ("u1", "i4", "u4", "i8", "u8", "f4", "f8", "b1")})
_ALLOWED: list[Any] = [
    *((dict, name) for name in _DICTS),
    *((str, name) for name in _TEXTS),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *_ARRAY_DTYPES,
]


def read_pickle(storage: Storage, path: str) -> Any:
    """What `torch.save` wrote to a file, tensors on the CPU; on a local disk they are mapped, not read.

    Raises:
        UserError: the file is damaged, or names a class or function that a checkpoint of 2023 has no use for.
    """
    file = storage.join(path) if storage.is_local else io.BytesIO(storage.read(path))
    try:
        mapped = storage.is_local and zipfile.is_zipfile(file)  # torch before 1.6 wrote another form
        with safe_globals(_ALLOWED):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError as error:
        raise UserError(f"{storage.show(path)} is missing") from error
    except Exception as error:  # damaged bytes make the unpickler raise whatever its next instruction meets
        reason = " ".join(str(error).split())
        raise UserError(
            f"{storage.show(path)} can't be read: it is damaged, or holds something beside tensors, numbers and texts. "
            f"Such a file could run any code, so it is refused and nothing of it was run ({reason[:400]})"
        ) from error
