"""Mistakes in the files of a run are told together, before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.inputs import check_files, find_checkpoint_problems, open_files
from internlm.config.checks import ConfigError
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.data.checks import find_name_problems
from tests.checkpoint.hf_models import named, tiny_run
from tests.data.helpers import make_config, write_bin


def rank_of(rank: int, size: int) -> World:
    return World(rank, rank, size, torch.device("cpu"))


def config_with(**ckpt: Any) -> Config:
    config = make_config(type="synthetic")
    return Config.model_validate({**config.model_dump(), "ckpt": ckpt})


def test_too_few_rows_for_a_step_of_all_ranks(tmp_path: Path) -> None:
    write_bin(tmp_path / "en/a.bin", [[1] * 64] * 4)  # 8 rows of 32 tokens
    config = make_config(train_folder=str(tmp_path))  # 2 rows a rank and step
    check_files(config, rank_of(0, 4))
    for look, world in ((check_files, rank_of(0, 5)), (open_files, rank_of(0, 5)), (open_files, rank_of(3, 5))):
        with pytest.raises(ConfigError) as caught:
            look(config, world)
        (problem,) = caught.value.problems
        assert "8 packed rows, but one batch takes data.micro_num = 2 x 5 data ranks = 10 rows" in problem


def test_ranks_read_what_the_mesh_will_give_them(tmp_path: Path) -> None:
    """Two tensor-parallel ranks are one reader."""
    write_bin(tmp_path / "en/a.bin", [[1] * 64] * 4)
    sections = make_config(train_folder=str(tmp_path), micro_num=1).model_dump()
    config = Config.model_validate({**sections, "parallel": {"tensor": {"size": 2}}})
    loaders = [open_files(config, rank_of(rank, 4))[0] for rank in range(4)]
    assert [(loader.dp_rank, loader.dp_size) for loader in loaders] == [(0, 2), (0, 2), (1, 2), (1, 2)]


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_tokenizer_and_names_where_lengths_are_not_known_yet(kind: str, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"not one")
    (tmp_path / "train").mkdir()
    options = {"chat_template": "chatml"} if kind == "chat" else {}
    config = make_config(type=kind, train_folder=f"{tmp_path}/train", tokenizer_path=f"{tmp_path}/t.model", **options)
    first, second = find_name_problems(config)
    assert "t.model: not a sentencepiece model" in first
    assert f"data.train_folder = {tmp_path}/train: no ." in second


def test_the_checkpoint_to_start_from(tmp_path: Path) -> None:
    config, model = tiny_run("llama2")
    export_hf(named(model), config, tmp_path / "hf", max_shard="100KB")
    start = {"path": str(tmp_path / "hf"), "ckpt_type": "hf"}
    right = Config.model_validate({**config.model_dump(), "ckpt": {"load_ckpt_info": start}})
    assert find_checkpoint_problems(right) == []
    (tmp_path / "hf" / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
    (problem,) = find_checkpoint_problems(right)
    assert "model-00002-of-00002.safetensors is missing" in problem
    (tmp_path / "elsewhere").rename(tmp_path / "hf" / "model-00002-of-00002.safetensors")
    (problem,) = find_checkpoint_problems(config_with(load_ckpt_info=start))
    assert "num_layers" in problem
    (problem,) = find_checkpoint_problems(config_with(load_ckpt_info={"path": str(tmp_path / "hf")}))
    assert "is a Hugging Face folder: set ckpt.load_ckpt_info.ckpt_type=hf" in problem
    (problem,) = find_checkpoint_problems(config_with(load_ckpt_info={"path": str(tmp_path), "ckpt_type": "hf"}))
    assert "no config.json" in problem
    (problem,) = find_checkpoint_problems(config_with(snapshot_ckpt_folder="s4://b/x"))
    assert problem == "ckpt.snapshot_ckpt_folder = 's4://b/x': Protocol not known: s4"
