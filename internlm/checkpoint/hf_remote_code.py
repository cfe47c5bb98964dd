"""The Python files beside an export whose model class transformers lacks.

Those that we have lie in remote_code/, named *.py.in, since they are part of an export and not of this package.
"""

import shutil
from pathlib import Path

from internlm.checkpoint.hf_names import REMOTE_CODE
from internlm.utils.errors import writing
from internlm.utils.logger import get_logger

logger = get_logger(__name__)

_CODE = Path(__file__).parent / "remote_code"
REMOTE_CODE_FILES = tuple(source.name.removesuffix(".in") for source in _CODE.glob("*.py.in"))


def write_remote_code(layout: str, folder: Path) -> None:
    """The classes of a layout that transformers lacks, where we have them."""
    sources = sorted(_CODE.glob(f"*_{layout}.py.in"))
    for source in sources:
        target = folder / source.name.removesuffix(".in")
        with writing(str(target)):
            shutil.copyfile(source, target)
    if layout in REMOTE_CODE and not sources:
        logger.warning(
            f"transformers has no class for the layout {layout}: loading {folder} needs the published "
            f"modeling_{layout}.py and configuration_{layout}.py beside config.json, and trust_remote_code=True"
        )
