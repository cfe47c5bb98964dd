"""Tables of conversations: parquet files, and arrow files as Hugging Face's `datasets` saves them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from internlm.utils.errors import UserError

TABLE_SUFFIXES = (".parquet", ".arrow")
ROWS = 1000  # of a table that are read at once


def json_rows(path: Path) -> Iterator[tuple[str, ...]]:
    """The rows of a table, each as an object in JSON, some at a time. Raises UserError for a file that is no table."""
    for rows in _rows(path):
        yield tuple(json.dumps(_without_nulls(row), ensure_ascii=False) for row in rows)


def _without_nulls(value: Any) -> Any:
    """A table's value as it was before: all objects of a column have the keys of each, null where one had none."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _rows(path: Path) -> Iterator[Sequence[Mapping[str, Any]]]:
    """Rows of a parquet file, or of an arrow file as Hugging Face's `datasets` saves it, some at a time."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f'{path} is read by a package that is missing: pip install "internlm[data]"') from error
    try:
        if path.suffix == ".parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(ROWS)
        else:
            batches = iter(pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))))
        for batch in batches:
            yield batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as a table ({error}).") from error
