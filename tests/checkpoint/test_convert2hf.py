"""The converter on checkpoints in our own format, by its 2023 and its later command line."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from internlm.apis.generate import load_model
from internlm.checkpoint.commit import Save, commit, open_folder, write_rank
from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.shards import key_of
from internlm.checkpoint.storage import Storage
from internlm.data.chat_template import BUILT_IN
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from tests.checkpoint.fake import full
from tests.checkpoint.hf_models import named, tiny_run
from tests.model.tiny import random_batch
from tools.convert2hf import main, template_for


def write_checkpoint(
    folder: Path, case: str, step: int = 1, data: dict[str, str] | None = None, **options: object
) -> Transformer:
    """A checkpoint of two ranks, each of which holds a part of every parameter, by the house's own writer."""
    config, model = tiny_run(case, **options)
    config = config.model_copy(update={"seed": step, "data": config.data.model_copy(update=data or {})})
    storage, token = Storage(str(folder)), f"token{step}"
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    metadata = {"token": token, "step": str(step), "shapes": json.dumps(shapes)}
    texts = {"config.json": config.model_dump_json(), "state.json": "{}"}
    open_folder(storage, step, token)
    saves = [
        Save(
            *(storage, step, "normal", token, rank, {"ranks": 2}, parts_of(model, rank), metadata),
            *(texts if rank == 0 else {}, None, frozenset()),
        )
        for rank in range(2)
    ]
    for save in saves:
        write_rank(save)
    commit(saves[0], timeout=10)
    return model


def parts_of(model: Transformer, rank: int) -> dict[str, dict[str, Tensor]]:
    tensors = {}
    for name, parameter in model.named_parameters():
        cut = (len(parameter) + 1) // 3
        start, stop = ((0, cut), (cut, len(parameter)))[rank]
        box = ((start, stop), *((0, size) for size in parameter.shape[1:]))
        tensors[key_of(name, "param", box)] = parameter.detach()[start:stop].clone()
    return {f"model-{rank:05d}.safetensors": tensors}


@pytest.mark.parametrize("names", [("--src_folder", "--tgt_folder"), ("--src", "--tgt")])
@torch.no_grad()
def test_newest_checkpoint_of_a_run(names: tuple[str, str], tiny_tokenizer: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints", "internlm", step=2, vocab_size=512)
    model = write_checkpoint(tmp_path / "run" / "checkpoints", "internlm", step=10, vocab_size=512, num_layers=3)
    arguments = [names[0], str(tmp_path / "run"), names[1], str(tmp_path / "hf"), "--tokenizer", str(tiny_tokenizer)]
    rotary = ["--rotary_type", "dynamic", "--scaling_factor", "2.0"] if names[0] == "--src" else []  # InternEvo's names
    assert main([*arguments, "--dtype", "float32", "--max_shard", "50KB", "--max_pos", "4096", *rotary]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    scaling = {key: theirs.config.rope_parameters.get(key) for key in ("rope_type", "factor")}
    assert scaling == ({"rope_type": "dynamic", "factor": 2.0} if rotary else {"rope_type": "default", "factor": None})
    assert theirs.config.num_hidden_layers == 3 and theirs.config.max_position_embeddings == 4096
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 2
    batch = random_batch((30,), 512)
    torch.testing.assert_close(model(batch), theirs(batch.tokens[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_float16_is_the_default_and_auto_keeps_the_bits(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "ckpt", "llama2", dtype="torch.bfloat16")
    assert main(["--src", str(tmp_path / "ckpt" / "1"), "--tgt", str(tmp_path / "half")]) == 0
    assert main(["--src", str(tmp_path / "ckpt" / "1"), "--tgt", str(tmp_path / "own"), "--dtype", "auto"]) == 0
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "float16"
    again, config = load_model(tmp_path / "own", "cpu")
    assert config.dtype == "torch.bfloat16"
    for (name, ours), value in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours.view(torch.int16), value.view(torch.int16)), name


def test_a_broken_newest_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path / "ckpt", "llama2", step=1)
    write_checkpoint(tmp_path / "ckpt", "llama2", step=2)
    shard = tmp_path / "ckpt" / "2" / "model-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    with caplog.at_level("INFO", "internlm"):
        assert main(["--src", str(tmp_path / "ckpt"), "--tgt", str(tmp_path / "hf")]) == 0
    assert "model-00001.safetensors was changed" in caplog.text
    assert main(["--src", str(tmp_path / "ckpt" / "2"), "--tgt", str(tmp_path / "hf2")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--src", "nowhere"], "is no checkpoint and holds none"),
        (["--tokenizer", "none.model"], "none.model does not exist"),
        (["--dtype", "int8"], "--dtype int8 is not known"),
        (["--max_shard", "big"], "10GB"),
        (["--max_pos", "0"], "--max_pos 0"),
        (["--scaling_factor", "2"], "beside --rotary_type dynamic"),
        (["--arch", "qwen3"], "use the layout llama"),
        (["--tgt", "."], "not empty"),
        (["--version", "1"], "this checkpoint is ours"),
        (["--chat_template", "chatml"], "give the tokenizer with --tokenizer"),
        (["--tgt", "ckpt/file/hf"], "ckpt/file/hf: Not a directory"),
        (["--tgt", "ckpt/1", "--force"], "holds manifest.json, which is no export"),
        (["--tgt", "ckpt", "--force"], "holds 1/manifest.json, which is no export"),
    ],
)
def test_mistakes_end_with_code_2_and_a_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "ckpt", "internlm")
    (tmp_path / "ckpt" / "file").touch()
    assert main(["--src", "ckpt", "--tgt", "hf", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert (tmp_path / "ckpt" / "1" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], "chatml"), (["--chat_template", "internlm2"], "internlm2"), (["--chat_template", "none"], None)],
)
def test_an_export_has_the_template_of_the_run(
    options: list[str], expected: str | None, tiny_tokenizer: Path, tmp_path: Path
) -> None:
    data = {"type": "chat", "chat_template": "chatml", "tokenizer_path": str(tiny_tokenizer)}
    write_checkpoint(tmp_path / "ckpt", "internlm", data=data, vocab_size=512)
    assert main(["--src", str(tmp_path / "ckpt"), "--tgt", str(tmp_path / "hf"), *options]) == 0
    found = tmp_path / "hf" / "chat_template.jinja"
    assert (found.read_text() if found.exists() else None) == (expected and BUILT_IN[expected].plain_source)


def test_a_template_that_is_gone_is_named(
    tiny_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"type": "chat", "chat_template": str(tmp_path / "gone.jinja"), "tokenizer_path": str(tiny_tokenizer)}
    write_checkpoint(tmp_path / "ckpt", "internlm", data=data, vocab_size=512)
    assert main(["--src", str(tmp_path / "ckpt"), "--tgt", str(tmp_path / "hf")]) == 2
    error = capsys.readouterr().err
    assert "the run's own chat template" in error and "gone.jinja" in error and "--chat_template none" in error


def test_a_tokenizer_that_has_moved_brings_its_template(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("moved")
    data = {"type": "chat", "chat_template": None, "tokenizer_path": str(tmp_path / "gone")}
    ours = tiny_run("internlm")[0].data.model_copy(update=data)
    template = template_for(None, ours, str(tmp_path))
    assert template is not None and template.source == "moved"
    with pytest.raises(UserError, match=r"gone is not there.* as --tokenizer the run's folder with both"):
        template_for(None, ours, None)


def test_an_export_is_no_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, model = tiny_run("llama2")
    export_hf(named(model), config, tmp_path)
    assert main(["--src", str(tmp_path), "--tgt", str(tmp_path / "hf")]) == 2
    assert "is a Hugging Face folder already" in capsys.readouterr().err


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "ckpt", "internlm")
    monkeypatch.setattr(Storage, "writer", full)
    assert main(["--src", str(tmp_path / "ckpt"), "--tgt", str(tmp_path / "hf")]) == 2
    size = r"hf/model.safetensors, which needs \d+ bytes, can't be written: .* No space left on device"
    assert re.search(size, capsys.readouterr().err)
