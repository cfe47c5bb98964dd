"""Mistakes in the files of a run are told together, before anything starts."""

from pathlib import Path
from typing import Any

import pytest

from internlm.checkpoint.checks import find_checkpoint_problems
from internlm.checkpoint.hf import export_hf
from internlm.config.schema import Config
from internlm.data.checks import find_data_problems
from tests.checkpoint.hf_models import named, tiny_run
from tests.data.helpers import make_config, write_bin


def config_with(**ckpt: Any) -> Config:
    config = make_config(type="synthetic")
    return Config.model_validate({**config.model_dump(), "ckpt": ckpt})


def test_too_few_rows_for_a_step_of_all_ranks(tmp_path: Path) -> None:
    write_bin(tmp_path / "en/a.bin", [[1] * 64] * 4)  # 8 rows of 32 tokens
    config = make_config(train_folder=str(tmp_path))  # 2 rows a rank and step
    assert find_data_problems(config, 4) == []
    (problem,) = find_data_problems(config, 5)
    assert "8 packed rows, but one batch takes data.micro_num = 2 x 5 data ranks = 10 rows" in problem


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_tokenizer_and_names_where_lengths_are_not_known_yet(kind: str, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(b"not one")
    (tmp_path / "train").mkdir()
    options = {"chat_template": "chatml"} if kind == "chat" else {}
    config = make_config(type=kind, train_folder=f"{tmp_path}/train", tokenizer_path=f"{tmp_path}/t.model", **options)
    first, second = find_data_problems(config, 1)
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
    assert "manifest.json is missing" in problem
    (problem,) = find_checkpoint_problems(config_with(load_ckpt_info={"path": str(tmp_path), "ckpt_type": "hf"}))
    assert "no config.json" in problem
    (problem,) = find_checkpoint_problems(config_with(snapshot_ckpt_folder="s4://b/x"))
    assert problem == "ckpt.snapshot_ckpt_folder = 's4://b/x': Protocol not known: s4"
