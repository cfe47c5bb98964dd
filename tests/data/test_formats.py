"""Readers against files written from the format descriptions; damaged files are refused by name."""

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm.data import formats
from internlm.data.formats import MegatronFile, TokenizedFile, min_length_of
from internlm.data.loader import build_train_loader
from internlm.data.sources import open_train, open_valid
from internlm.data.synthetic import DummyFile, SyntheticFile
from internlm.utils.errors import UserError
from tests.data.helpers import make_config, random_samples, write_bin, write_megatron


def _all(file: formats.SampleFile) -> list[list[int]]:
    return [file.tokens(i).tolist() for i in range(len(file))]


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("extra_columns", [0, 2])
def test_reads_what_was_written(tmp_path: Path, dtype: type, extra_columns: int) -> None:
    samples = random_samples(30, 20)
    file = TokenizedFile(write_bin(tmp_path / "a.bin", samples, dtype, extra_columns))
    assert _all(file) == samples
    assert file.lengths.tolist() == [len(sample) for sample in samples]
    assert _all(pickle.loads(pickle.dumps(file))) == samples


def test_reference_example_of_offsets(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "a.bin", [[1, -2], [3], [4, 5, 6]])
    assert np.load(f"{path}.meta").tolist() == [[0, 2], [20, 1], [36, 3]]  # the helper writes what the page says
    assert TokenizedFile(path).offsets.tolist() == [0, 20, 36]


def test_any_json_is_read(tmp_path: Path) -> None:
    lines = ['{"tokens":[1,2,3]}', '{"text": "x, y", "tokens": [ 4,5 ]}', ' {"tokens": [6, 7], "n": [1, 2, 3]}']
    offsets = np.cumsum([0, *(len(line) + 1 for line in lines[:-1])])
    (tmp_path / "a.bin").write_text("\n".join(lines))  # without a newline at the end
    np.save(tmp_path / "m.npy", np.stack([offsets, [3, 2, 2]], axis=1))
    (tmp_path / "m.npy").rename(tmp_path / "a.bin.meta")
    assert _all(TokenizedFile(tmp_path / "a.bin")) == [[1, 2, 3], [4, 5], [6, 7]]


def test_min_length_keeps_equal_and_renumbers(tmp_path: Path) -> None:
    file = TokenizedFile(write_bin(tmp_path / "a.bin", [[1], [2, 3], [], [4, 5, 6]]), min_length=2)
    assert _all(file) == [[2, 3], [4, 5, 6]]
    assert file.place(1).startswith("line 4 ")
    assert file.num_short == 2


def test_min_length_dict(tmp_path: Path) -> None:
    assert min_length_of("/d/en/a.bin", 3, {"/cn/": 9}) == 3
    assert min_length_of("/d/cn/a.bin", 3, {"/cn/": 9}) == 9
    with pytest.raises(UserError, match="several of its keys"):
        min_length_of("/d/cn/a.bin", 3, {"/cn/": 9, "a.bin": 1})


def test_damaged_pairs_are_refused(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "a.bin", [[1, 2], [3, 4], [5, 6]])
    whole, meta = path.read_bytes(), Path(f"{path}.meta").read_bytes()
    Path(f"{path}.meta").unlink()
    with pytest.raises(UserError, match=r"a\.bin\.meta: no such file"):
        TokenizedFile(path)
    Path(f"{path}.meta").write_bytes(meta[:50])
    with pytest.raises(UserError, match="not a numpy array file"):
        TokenizedFile(path)
    Path(f"{path}.meta").write_bytes(meta)
    for size in (len(whole) - 4, 45):  # in the middle of the last line
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.bin, line 3"):
            TokenizedFile(path)
    path.write_bytes(whole[:30])
    with pytest.raises(UserError, match="row 2 says 2 tokens at byte 38"):
        TokenizedFile(path)


BROKEN = [
    '{"tokens": [3, x]}',
    '{"tokens": [3, 4.',
    '{"tokens": [3, 4.5]}',
    '{"tokens": [3 4, 5]}',
    '{"tokens": [3, "4"]}',
    '{"tokens": [3, true]}',
    '{"other": [3, 4]}',
    "[3, 4]",
]


@pytest.mark.parametrize("line", BROKEN)
def test_broken_line_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = write_bin(tmp_path / "a.bin", [[1, 2], [3, 4], [5, 6]])
    lines = path.read_text().splitlines(keepends=True)
    lines[1] = line + "\n"
    path.write_text("".join(lines))
    with open(f"{path}.meta", "wb") as meta:
        np.save(meta, np.array([(0, 2), (19, 2), (20 + len(line), 2)]))
    file = TokenizedFile(path)
    with pytest.raises(UserError, match=r"a\.bin, line 2 \(byte 19\)"):
        file.tokens(1)
    assert file.tokens(0).tolist() == [1, 2]


def test_wrong_length_in_the_meta(tmp_path: Path) -> None:
    path = write_bin(tmp_path / "a.bin", [[1, 2], [3, 4], [5, 6]])
    for wrong in (1, 3):
        with open(f"{path}.meta", "wb") as file:
            np.save(file, np.array([(0, 2), (19, wrong), (38, 2)]))
        with pytest.raises(UserError, match=rf"line 2 .*holds 2 tokens, its \.meta says {wrong}"):
            TokenizedFile(path).tokens(1)


def _sparse_pair(path: Path, offsets: list[int], break_last: bool = False) -> None:
    """Lines of two tokens at far apart places of a sparse file; the meta's offsets overflow as int32 does."""
    line = b'{"tokens": [1, 2]}\n'
    with path.open("wb") as file:
        for number, offset in enumerate(offsets):
            if offset:
                file.seek(offset - 1)
                file.write(b"x" if break_last and number == len(offsets) - 1 else b"\n")
            file.write(line)
    meta = np.array([(offset, 2) for offset in offsets]).astype(np.int32)
    assert meta[:, 0].min() < 0
    with open(f"{path}.meta", "wb") as file:
        np.save(file, meta)


def test_int32_offsets_past_2gib_are_repaired(tmp_path: Path) -> None:
    offsets = [0, 2**31 - 100, 2**31 + 5, 2**32 - 50, 2**32 + 7, 2**33 + 1]
    _sparse_pair(tmp_path / "a.bin", offsets)
    file = TokenizedFile(tmp_path / "a.bin")
    assert file.offsets.tolist() == offsets
    assert _all(file) == [[1, 2]] * 6
    _sparse_pair(tmp_path / "b.bin", offsets, break_last=True)
    with pytest.raises(UserError, match="int32 offsets overflowed"):
        TokenizedFile(tmp_path / "b.bin")


@pytest.mark.parametrize("code", [4, 8])
def test_megatron(tmp_path: Path, code: int) -> None:
    documents = [[[1, 2, 0]], [[3], [4, 5]], [], [[6]]]
    prefix = write_megatron(tmp_path / "a", documents, code)
    file = MegatronFile(f"{prefix}.idx")
    assert _all(file) == [[1, 2, 0], [3, 4, 5], [], [6]]
    assert _all(MegatronFile(prefix, min_length=2)) == [[1, 2, 0], [3, 4, 5]]
    assert MegatronFile(prefix, min_length=1).place(2) == "document 3"
    assert not file.masks_zero


def test_damaged_megatron_is_refused(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", [[[1, 2, 3]], [[4]]])
    index, body = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(body[:-1])
    with pytest.raises(UserError, match=r"15 bytes, .* needs 16"):
        MegatronFile(prefix)
    Path(f"{prefix}.bin").write_bytes(body)
    for broken, reason in ((b"x" + index, "must begin"), (index[:-3], "truncated"), (index[:20], "must begin")):
        Path(f"{prefix}.idx").write_bytes(broken)
        with pytest.raises(UserError, match=reason):
            MegatronFile(prefix)
    Path(f"{prefix}.idx").unlink()
    with pytest.raises(UserError, match=r"a\.idx: no such file"):
        MegatronFile(prefix)


def test_data_that_goes_while_it_is_read_is_named(tmp_path: Path) -> None:
    prefix = write_megatron(tmp_path / "a", [[[1, 2, 3]], [[4]]])
    file = MegatronFile(prefix)
    os.truncate(f"{prefix}.bin", 12)
    with pytest.raises(UserError, match=r"a\.bin, sequence 1: 0 of its 4 bytes are there"):
        file.tokens(1)  # less would silently shift what follows
    path = write_bin(tmp_path / "en/b.bin", [[5] * 60] * 20)
    loader = build_train_loader(make_config(train_folder=str(tmp_path / "en")), 0, 1)
    path.unlink()
    formats._handles.cache_clear()
    with pytest.raises(UserError, match=r"the data can't be read any more: .*b\.bin"):
        next(iter(loader))


def test_dummy_data_is_that_of_2023() -> None:
    file = DummyFile(seq_len=64, num_samples=1000)
    random = np.random.RandomState(1999)
    numbers, repeats = random.randint(1, 30, size=1000), random.randint(10, 200, size=1000)
    for i in range(0, 1000, 7):
        n, r = int(numbers[i]), int(repeats[i])
        assert file.tokens(i).tolist() == ([n, r] + list(range(n)) * r)[:64]
        assert file.lengths[i] == len(file.tokens(i))


def test_synthetic_depends_on_seed_and_index_only() -> None:
    a, b, c = SyntheticFile(50, 100, 1), SyntheticFile(50, 100, 1), SyntheticFile(50, 100, 2)
    assert a.tokens(7).tolist() == b.tokens(7).tolist() != c.tokens(7).tolist()
    assert a.tokens(7).tolist() != a.tokens(8).tolist()
    ids = np.concatenate([a.tokens(i) for i in range(200)])
    assert ids.min() == 1 and ids.max() == 99


def test_walk_order_and_types(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    for place, name in enumerate(["en/z.bin", "en/b/a.bin", "en/a/c.bin", "cn/x.bin", "z_code/deep/er/y.bin"]):
        write_bin(folder / name, [[place + 1] * 4])
    write_bin(folder / "cn/short.bin", [[1], [2]])
    write_bin(tmp_path / "elsewhere/l.bin", [[9] * 4])
    (folder / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (folder / "README").write_text("counts as an entry, as in the reference")
    sources = open_train(make_config(train_folder=str(folder), min_length=2).data, 512)
    names = [str(Path(file.name).relative_to(folder)) for file in sources.files]
    assert names == ["cn/x.bin", "en/z.bin", "en/a/c.bin", "en/b/a.bin", "linked/l.bin", "z_code/deep/er/y.bin"]
    assert sources.type_names == ["README", "cn", "en", "linked", "z_code"]
    assert sources.type_ids == [1, 2, 2, 2, 3, 4]
    (folder / "en/loop").symlink_to(folder, target_is_directory=True)
    with pytest.raises(UserError, match="leads back"):
        open_train(make_config(train_folder=str(folder)).data, 512)


def test_missing_folders(tmp_path: Path) -> None:
    for key in ("train_folder", "valid_folder"):
        open_ = {"train_folder": open_train, "valid_folder": open_valid}[key]
        with pytest.raises(UserError, match="no such folder"):
            open_(make_config(**{key: str(tmp_path / "no")}).data, 512)
        (tmp_path / key).mkdir()
        with pytest.raises(UserError, match=rf"{key}.*no \.bin file"):
            open_(make_config(**{key: str(tmp_path / key)}).data, 512)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may list any folder, so the system call is made to fail."""
    write_bin(tmp_path / "en/a.bin", [[1] * 4])
    write_bin(tmp_path / "en/shut/b.bin", [[2] * 4])
    listing = os.scandir

    def refusing(folder: str) -> Any:
        if Path(folder).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return listing(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"en/shut: .* can't be listed \(Permission denied\)"):
        open_train(make_config(train_folder=str(tmp_path)).data, 512)


def test_all_damaged_files_are_told_at_once(tmp_path: Path) -> None:
    for number in range(14):
        write_bin(tmp_path / f"{number:02}.bin", [[1] * 60])
    (tmp_path / "03.bin.meta").unlink()
    with (tmp_path / "05.bin.meta").open("wb") as file:
        np.savez(file, [[0, 60]])
    with (tmp_path / "07.bin").open("r+b") as file:
        file.truncate(5)
    for open_, key in ((open_train, "train_folder"), (open_valid, "valid_folder")):
        with pytest.raises(UserError) as caught:
            open_(make_config(**{key: str(tmp_path)}).data, 512)
        lines = str(caught.value).splitlines()
        assert len(lines) == 3 and "03.bin.meta: no such file" in lines[0] and "07.bin" in lines[2]
        assert "05.bin.meta: holds several arrays" in lines[1]
    for meta in tmp_path.glob("*.meta"):
        meta.unlink()
    with pytest.raises(UserError, match="the other 4 files were not looked at"):
        open_train(make_config(train_folder=str(tmp_path)).data, 512)


def test_validation_sets_are_folders_by_base_name(tmp_path: Path) -> None:
    for name in ("en/a.bin", "en/b.bin", "x/en/a.bin", "x/cn/a.bin"):
        write_bin(tmp_path / name, [[1] * 49, [2] * 50])
    sets = open_valid(make_config(valid_folder=str(tmp_path), min_length=0).data, 512)
    assert {name: sum(map(len, files)) for name, files in sets.items()} == {"en": 2, "x/en": 1, "cn": 1}
