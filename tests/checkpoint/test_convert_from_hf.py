"""Hugging Face folders become checkpoints of ours, or of 2023 as the generator of those writes them."""

import re
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import IO

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from internlm.apis.generate import load_model
from internlm.checkpoint import lease, native_writer
from internlm.checkpoint.lease import Lease, claim_folder
from internlm.checkpoint.legacy.writer import write_legacy
from internlm.checkpoint.native import NativeReader
from internlm.checkpoint.storage import Storage
from internlm.config.schema import ModelConfig
from internlm.utils.errors import UserError
from tests.checkpoint import folders_2023 as old
from tests.checkpoint.fake import full, make_config
from tests.checkpoint.hf_models import SMALL
from tests.checkpoint.test_legacy import of_transformers
from tests.model.tiny import random_batch
from tests.utils.holder import held
from tools.convert_from_hf import main


@torch.no_grad()
def test_a_checkpoint_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True))
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "hf")
    assert main(["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / "ckpt")]) == 0
    assert f"ckpt.load_ckpt_info.path={tmp_path / 'ckpt' / '0'}" in capsys.readouterr().out
    model, config = load_model(tmp_path / "ckpt", "cpu")  # verifies the manifest
    assert NativeReader(tmp_path / "ckpt").config.model_type == "QWEN3" and config.dtype == "torch.float32"
    batch = random_batch((23,), 67)
    torch.testing.assert_close(model(batch), theirs(batch.tokens[None]).logits[0], atol=1e-5, rtol=1e-5)
    assert main(["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / "ckpt")]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    assert main(["--src", str(tmp_path / "ckpt"), "--tgt", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    reader = NativeReader(tmp_path / "half")
    assert reader.read("layers.1.attention.wo.weight").dtype == torch.bfloat16
    (tmp_path / "half/0").rename(tmp_path / "half/0.tmp-removed")
    with pytest.raises(UserError, match=r"half/0 was removed while it was read, probably by its run \(ckpt.keep_last"):
        reader.read("layers.1.attention.wo.weight")


def test_a_value_too_large_for_float16_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": 4}))
    with torch.no_grad():
        theirs.model.layers[1].mlp.down_proj.weight[3, 5] = -1e5
    theirs.save_pretrained(tmp_path / "hf")
    for kind in ("native", "2023"):
        command = ["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / kind), "--format", kind]
        assert main([*command, "--dtype", "float16"]) == 2
        problem = (
            "layers.1.feed_forward.w2.weight holds 100000, float16 ends at 65504: convert it with --dtype bfloat16"
        )
        assert problem in capsys.readouterr().err
        assert {file.name for file in (tmp_path / kind).glob("*")} <= {".lock"}
        assert main([*command, "--dtype", "bfloat16"]) == 0
        assert "parameters" in capsys.readouterr().err  # how many were read


@pytest.mark.parametrize(
    ("generation", "options"),
    [
        (old.V021.at(tp=2), ["--version", "1", "--embed_split", "--tp_size", "2"]),
        (old.EVO033.at(tp=4, split_hidden=False), ["--tp_size", "4", "--use_flash"]),
        (old.V021_MOE.at(tp=2), ["--version", "1", "--embed_split", "--tp_size", "2"]),
        (old.EVO_MOE, ["--embed_split", "--format", "2023"]),
        (old.EVO_INTERNLM2, ["--format", "2023", "--embed_split"]),
        (old.EVO_INTERNLM2.at(tp=2, bias=True), ["--family", "INTERNLM2_PUBLIC", "--embed_split", "--tp_size", "2"]),
        (old.EVO_LLAMA2.at(tp=2), ["--family", "LLAMA2", "--embed_split", "--tp_size", "2", "--safetensors"]),
    ],
)
def test_the_layout_of_2023(generation: old.Generation, options: list[str], tmp_path: Path) -> None:
    weights = old.random_weights(generation)
    of_transformers(generation, weights).save_pretrained(tmp_path / "hf")
    old.write(tmp_path / "expected", generation, weights)
    arguments = ["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main([*arguments, *options]) == 0
    names = {file.name for file in (tmp_path / "expected").glob("model_*.pt")} - {"model_config.pt"}
    assert names == {file.name for file in (tmp_path / "out").glob("model_*.pt")} - {"model_config.pt"}
    for name in names:
        expected, found = (torch.load(tmp_path / folder / name, weights_only=True) for folder in ("expected", "out"))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    config = torch.load(tmp_path / "out" / "model_config.pt", weights_only=True)
    assert config.get("num_experts", 1) == generation.num_experts
    assert config["num_attention_heads"] == old.HEADS and config["mlp_ratio"] * old.HIDDEN == old.FFN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tp_size", "3"], "--tp_size 3 does not divide key/value heads 2"),
        (["--tp_size", "0"], "--tp_size 0 must be positive"),
        (["--format", "native", "--tp_size", "2"], "belongs to --format 2023"),
        (["--tp_size", "1", "--family", "INTERNLM"], "no place for num_kv_attention_heads=2|no place for"),
        (["--dtype", "int8"], "--dtype int8 is not known"),
        (["--embed_split"], "belong to --format 2023"),
        (["--top_k", "2"], "--top_k is for sources of 2023"),
        (["--top_k", "0"], "--top_k 0 must be positive"),
        (["--tgt", "/dev/null/out"], "/dev/null"),
        (["--src", "nowhere"], "is no checkpoint and holds none"),
    ],
)
def test_mistakes(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "hf")
    assert main(["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert any(part in error for part in message.split("|"))
    assert not (tmp_path / "out").exists()


def test_what_no_folder_can_be_renamed_to_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=1, vocab_size=8)
    (tmp_path / "a").touch()
    (tmp_path / "b").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "b")
    for name, problem in (("a", "a is a file"), ("b", "b is where a file system is mounted; give a new folder in it")):
        with pytest.raises(UserError, match=problem):
            write_legacy(pytest.fail, model, tmp_path / name)


@pytest.mark.parametrize("options", [[], ["--format", "2023"]])
def test_a_full_disk_leaves_nothing(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "hf")
    monkeypatch.setattr(Storage, "writer", full)
    assert main(["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert re.search(r"out.*/model.*can't be written: .* No space left on device", error), error
    assert [path.name for path in tmp_path.rglob("out*/*")] in ([], [".lock"])
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", "out"}


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(tmp_path / "hf")
    (tmp_path / "out").mkdir()
    with held(tmp_path / "out"):
        assert main(["--src", str(tmp_path / "hf"), "--tgt", str(tmp_path / "out")]) == 2
    assert f"target folder = '{tmp_path / 'out'}' is in use by process" in capsys.readouterr().err


def test_one_that_ends_just_before_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()

    def claim_of_the_second(storage: Storage, key: str) -> IO[bytes] | Lease:
        storage.make_folder("0")
        return claim_folder(storage, key)

    monkeypatch.setattr(native_writer, "claim_folder", claim_of_the_second)
    with pytest.raises(UserError, match="holds checkpoints already"):
        native_writer.write_native(pytest.fail, config, tmp_path / "out")


def test_a_folder_of_an_object_store_is_claimed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.02)
    monkeypatch.setattr(lease, "SILENCE", 0.5)
    storage = Storage(f"memory://{tmp_path.name}/out")
    with (
        closing(claim_folder(storage, "ckpt.save_ckpt_folder")),
        pytest.raises(UserError, match=rf"target folder = '{storage.url}' is in use by process"),
    ):
        native_writer.write_native(pytest.fail, make_config(), storage.url)


MEASURE = """
import resource, sys
from internlm.checkpoint.hf import HFReader
from tools.convert2hf import main as out
from tools.convert_from_hf import main as into
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert into(["--src", sys.argv[1], "--tgt", sys.argv[2]]) == 0
assert out(["--src", sys.argv[2], "--tgt", sys.argv[3], "--dtype", "bfloat16", "--max_shard", "20MB"]) == 0
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path, repo_root: Path) -> None:
    """200 MB of weights pass both converters within 60 MB; the largest tensor has 8 MB in bf16."""
    sizes = {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 12}
    config = LlamaConfig(**sizes, num_attention_heads=8, max_position_embeddings=128, dtype=torch.bfloat16)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) > 95e6
    model.save_pretrained(tmp_path / "hf", max_shard_size="40MB")
    del model
    folders = [str(tmp_path / name) for name in ("hf", "ckpt", "out")]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, check=False, cwd=repo_root
    )
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.split("grown ")[1])
    assert grown < 60, f"{grown} MB"
