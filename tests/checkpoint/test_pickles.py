"""Pickles of 2023: known data comes back as plain data, and a crafted file is refused without being run."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internlm.checkpoint.legacy.pickles import read_pickle
from internlm.checkpoint.storage import Storage
from internlm.utils.errors import UserError
from tests.checkpoint.side_files_2023 import fake_classes


def read(file: Path) -> Any:
    return read_pickle(Storage(str(file.parent)), file.name)


def test_known_classes_come_back_as_plain_data(tmp_path: Path) -> None:
    with fake_classes() as classes:
        inner = classes["Config"](a=1, dtype=torch.bfloat16)
        torch.save({"config": classes["Config"](inner=inner), "mode": classes["ParallelMode"].ZERO1}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found == {"config": {"inner": {"a": 1, "dtype": torch.bfloat16}}, "mode": "zero1"}
    assert type(found["config"]) is type(found["config"]["inner"]) is dict


def test_arrays_and_random_states(tmp_path: Path) -> None:
    state = np.random.RandomState(3).get_state()
    torch.save({"rng_state": state, "indices": np.arange(5), "number": np.float64(2.5)}, tmp_path / "a.pt")
    found = read(tmp_path / "a.pt")
    assert found["rng_state"][0] == "MT19937" and np.array_equal(found["rng_state"][1], state[1])  # type: ignore[index]
    assert found["indices"].tolist() == [0, 1, 2, 3, 4] and found["number"] == 2.5


def test_the_form_of_torch_before_1_6_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(4.0)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    assert read(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("data", [b"\x80\x02.", b"\x80\x02K\x01s.", b"\x80\x04\x95", b"\x80\x02}K\x01\x85R.", b""])
def test_damaged_bytes_are_refused_whatever_they_make_the_unpickler_raise(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"a\.pt can't be read: it is damaged"):
        read(tmp_path / "a.pt")


class Call:
    """What an attacker stores: unpickling it calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("what", ["system", "open", "exec", "getattr", "run", "load", "file"])
def test_a_crafted_payload_never_runs(what: str, hidden: bool, zipped: bool, tmp_path: Path) -> None:
    import subprocess

    mark = tmp_path / "mark"
    calls = {
        "system": Call(os.system, f"touch {mark}"),
        "open": Call(open, str(mark), "w"),
        "exec": Call(exec, f"open({str(mark)!r}, 'w')"),
        "getattr": Call(getattr, os, "system"),
        "run": Call(subprocess.run, ["touch", str(mark)]),
        "load": Call(pickle.loads, pickle.dumps(Call(os.system, f"touch {mark}"))),
        "file": Call(np.ndarray.tofile, np.arange(3), str(mark)),
    }
    payload = {"model.norm.weight": torch.ones(3), "x": [calls[what]]} if hidden else calls[what]
    if what == "getattr":  # a module can't be pickled, its name can
        data = b"\x80\x02cbuiltins\ngetattr\ncposix\nsystem\n\x86R."
        (tmp_path / "a.pt").write_bytes(data)
    else:
        torch.save(payload, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="nothing of it was run"):
        read(tmp_path / "a.pt")
    assert not mark.exists()


def test_a_plain_pickle_is_refused_too(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "a.pt").write_bytes(pickle.dumps(Call(os.system, f"touch {mark}")))
    with pytest.raises(UserError, match="nothing of it was run"):
        read(tmp_path / "a.pt")
    assert not mark.exists()
    with pytest.raises(UserError, match="is missing"):
        read(tmp_path / "none.pt")
