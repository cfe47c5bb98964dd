"""Our safetensors files against the safetensors library."""

import hashlib
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from internlm.checkpoint.storage import Storage
from internlm.checkpoint.tensor_file import read_header, read_slice, read_tensors, write_tensors

TENSORS = {
    "a": torch.randn(3, 5, 4),
    "b": torch.randn(7).bfloat16(),
    "c": torch.tensor(3.5, dtype=torch.float16),
    "d": torch.arange(11, dtype=torch.uint8),
    "e": torch.empty(0, 3),
    "f": torch.tensor([[True, False]]),
    "g": torch.arange(4),
}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    record = write_tensors(Storage(str(tmp_path)), "x.safetensors", TENSORS, {"token": "t"})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (record.size, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == TENSORS.keys()
    for key, tensor in TENSORS.items():
        assert theirs[key].dtype == tensor.dtype and torch.equal(theirs[key], tensor), key
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"token": "t"}


@pytest.mark.parametrize("url", ["{tmp}", "memory://slices"])
def test_we_read_what_the_library_writes(url: str, tmp_path: Path) -> None:
    tensor = torch.randn(6, 5, 4)
    content = safetensors.torch.save({"w": tensor, "v": torch.ones(2)})
    storage = Storage(url.format(tmp=tmp_path))
    with storage.writer("y.safetensors") as write:
        write(content)
    entries, _ = read_header(storage, "y.safetensors")
    generator = random.Random(0)
    for _ in range(50):
        box = tuple(tuple(sorted(generator.sample(range(size + 1), 2))) for size in tensor.shape)
        expected = tensor[tuple(slice(*span) for span in box)]
        assert torch.equal(read_slice(storage, entries["w"], box), expected), box  # type: ignore[arg-type]
    assert torch.equal(read_tensors(storage, "y.safetensors")["w"], tensor)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "z").write_bytes(b"PK\x03\x04" + bytes(100) + b"\xff" * 8)
    with pytest.raises(ValueError):
        read_header(Storage(str(tmp_path)), "z")
