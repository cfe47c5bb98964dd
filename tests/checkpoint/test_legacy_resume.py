"""Runs that go on from folders of 2023: every tensor and counter arrives, on any layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.legacy.reader import LegacyReader
from internlm.checkpoint.legacy.resume import check_batches
from internlm.checkpoint.native import NativeReader, open_checkpoint
from internlm.config.schema import Config
from internlm.utils.errors import UserError
from tests.checkpoint import folders_2023 as old
from tests.checkpoint.runs import contents, global_tensors, train
from tests.pool import run_ranks
from tools.convert2hf import main

STEP = 7
DATA = {"type": "synthetic", "seq_len": 8, "total_steps": STEP + 2, "num_worker": 0}
GENERATION = old.V021.at(tp=2, pp=2, zero=2, dtype=torch.bfloat16)


def config_of(
    generation: old.Generation, folder: Path, content: Any = ("all",), ranks: int = 1, **sections: Any
) -> Config:
    model = {
        "num_layers": old.LAYERS,
        "hidden_size": old.HIDDEN,
        "vocab_size": old.VOCAB,
        "num_attention_heads": old.HEADS,
        "num_kv_attention_heads": generation.kv_heads,
        "intermediate_size": old.FFN,
        "dtype": str(generation.dtype),
        "qkv_bias": generation.bias,
        "out_bias": generation.bias,
        "num_experts": generation.num_experts,
        **sections.pop("model", {}),
    }
    load = {"path": str(folder), "content": content, "ckpt_type": "internlm"}
    defaults: dict[str, Any] = {
        "model": model,
        "data": {**DATA, "micro_num": 4 // ranks},
        "lr_scheduler": {"total_steps": 20, "warmup_ratio": 0.2},
        "ckpt": {"load_ckpt_info": load},
    }
    return Config.model_validate({**defaults, **sections})


def written(folder: Path, generation: old.Generation) -> list[old.Weights]:
    kinds = [old.random_weights(generation, seed) for seed in range(3)]
    kinds[2] = {key: value.abs() for key, value in kinds[2].items()}  # second moments
    old.write(folder, generation, kinds[0], (kinds[1], kinds[2]), step=STEP)
    return kinds


def under_llamas_names(folder: Path, config: Config, kind: str, target: Path) -> old.Weights:
    """A kind of tensors of a checkpoint of ours, joined by the safetensors library and renamed by the export."""
    whole = {}
    for (name, kind_), bits in global_tensors(folder).items():
        # an fp32 parameter, such as a router, is its own master
        if kind_ == kind or (kind == "master" and kind_ == "param" and bits.itemsize == 4):
            whole[name] = torch.from_numpy(bits.copy()).view({2: torch.bfloat16, 4: torch.float32}[bits.itemsize])
    model = config.model.model_copy(update={"dtype": "torch.float32"})
    arch = "llama" if model.num_experts == 1 else "granitemoe"
    export_hf(whole.__getitem__, config.model_copy(update={"model": model}), target, arch)
    return load_file(target / "model.safetensors")


@pytest.mark.parametrize(("ranks", "generation"), [(1, old.V021_MOE), (2, GENERATION)])
def test_everything_arrives(ranks: int, generation: old.Generation, tmp_path: Path) -> None:
    masters, exp_avg, exp_avg_sq = written(tmp_path / "old", generation)
    config = config_of(generation, tmp_path / "old", ranks=ranks)
    # no step is trained: what was loaded is saved again at once
    run_ranks(ranks, save_what_was_loaded, config, tmp_path / "new")
    saved = tmp_path / "new" / "checkpoints" / str(STEP)
    for kind, weights in {"master": masters, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}.items():
        found = under_llamas_names(saved, config, kind, tmp_path / kind)
        assert all(torch.equal(found[key], value) for key, value in weights.items()), kind
    found = under_llamas_names(saved, config, "param", tmp_path / "param")
    for key, value in masters.items():  # a master halfway between two bf16 numbers may go either way
        torch.testing.assert_close(found[key], value, rtol=2**-8, atol=0)
    state = contents(saved)["state"]
    assert state["train"] == {
        "step_count": STEP,
        "batch_count": STEP + 2,
        "place": None,
        "num_rows": None,
        "num_consumed_tokens": 32 * (STEP + 2),
        "inf_nan_skip_batches": 1,
    }
    assert state["optimizer"]["num_updates"] == STEP


def save_what_was_loaded(rank: int, world_size: int, config: Config, folder: Path) -> None:
    from functools import partial

    from internlm.checkpoint.checkpointer import Checkpointer
    from internlm.core.launch import World
    from internlm.core.mesh import build_mesh
    from internlm.model.init import initial_value
    from internlm.model.transformer import build_model
    from internlm.parallel.parallelize import parallelize
    from internlm.solver.hybrid_zero import HybridZero
    from internlm.train.state import TrainState

    mesh = build_mesh(config.parallel, World(rank, rank, world_size, torch.device("cpu")))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    optimizer = HybridZero(model, config, mesh, partial(initial_value, config=config.model, seed=1), placements)
    checkpointer = Checkpointer(config, folder, optimizer, TrainState(), mesh)
    checkpointer.resume()
    checkpointer.save()
    checkpointer.close()


def test_training_goes_on_and_saves_in_our_format(tmp_path: Path) -> None:
    """From the same folder as the run's own save folder: auto_resume finds it, as that of 2023 did."""
    folder = tmp_path / "run" / "checkpoints"
    written(folder / str(STEP), GENERATION)
    written(folder / "3", GENERATION)
    (folder / "9").mkdir()
    (folder / "9" / "model_tp0_pp0.pt").touch()  # without a .step file: never completed
    config = config_of(
        GENERATION,
        Path("unused"),
        data={**DATA, "micro_num": 4, "total_steps": STEP + 4},
    )
    config = config.model_copy(update={"ckpt": config.ckpt.model_copy(update={"load_ckpt_info": None})})
    (seen,) = run_ranks(1, train, config, tmp_path / "run")
    assert len(seen["losses"]) == 2  # batches 9 and 10 of 11
    assert NativeReader(folder).path.endswith(str(STEP + 2))
    assert (folder / str(STEP) / "model_tp0_pp0.pt").exists()
    again = config.model_copy(update={"data": config.data.model_copy(update={"total_steps": STEP + 5})})
    (seen,) = run_ranks(1, train, again, tmp_path / "run")
    assert len(seen["losses"]) == 1  # from our checkpoint, the newest


def test_batches_that_were_made_otherwise_are_refused(tmp_path: Path) -> None:
    written(tmp_path / "old", GENERATION)
    config = config_of(GENERATION, tmp_path / "old")
    reader = LegacyReader(str(tmp_path / "old"), run=config)
    check_batches(reader, config, readers=1)
    with pytest.raises(UserError, match=r"rows of a batch \(data.micro_num \* data ranks\): 4 in .*, 8 in this run"):
        check_batches(reader, config, readers=2)
    data = config.data.model_copy(update={"seed": 5, "rampup_batch_size": "1 1 1"})
    for no_ramp in ("", None):
        sampler = torch.load(tmp_path / "old" / "sampler.pt", weights_only=False)
        torch.save({**sampler, "raw_rampup_batch_size": no_ramp}, tmp_path / "old" / "sampler.pt")
        with pytest.raises(UserError, match=r"seed: 1024 in .*, 5 in(.|\n)*rampup_batch_size: '' in .*, '1 1 1' in"):
            check_batches(reader, config.model_copy(update={"data": data}), readers=1)


def test_content_is_what_is_taken(tmp_path: Path) -> None:
    written(tmp_path / "old", GENERATION)
    config = config_of(GENERATION, tmp_path / "old", content=("model",))
    run_ranks(1, save_what_was_loaded, config, tmp_path / "new")
    saved = contents(tmp_path / "new" / "checkpoints" / "0")
    assert saved["state"]["train"]["batch_count"] == saved["state"]["optimizer"]["num_updates"] == 0
    assert not any(any(data) for (_, kind), data in saved["tensors"].items() if kind == "exp_avg")


def test_the_first_version_counted_behind(tmp_path: Path) -> None:
    written(tmp_path / "old", old.V01)
    config = config_of(old.V01, tmp_path / "old")
    run_ranks(1, save_what_was_loaded, config, tmp_path / "new")
    assert (tmp_path / "new" / "checkpoints" / str(STEP + 1)).exists()


def test_rotary_order_becomes_that_of_the_run(tmp_path: Path) -> None:
    generation = old.EVO_INTERNLM2.at(adapt_hf=False)
    masters, *_ = written(tmp_path / "old", generation)
    config = config_of(generation, tmp_path / "old", model={"qk_interleaved": False})
    run_ranks(1, save_what_was_loaded, config, tmp_path / "new")
    found = under_llamas_names(tmp_path / "new" / "checkpoints" / str(STEP), config, "master", tmp_path / "hf")
    assert all(torch.equal(found[key], value) for key, value in masters.items())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_layers": 3}}, "model.num_layers: 4 in the checkpoint, 3 in this run"),
        ({"model": {"num_attention_heads": 2, "num_kv_attention_heads": 2}}, "model.num_attention_heads: 4"),
        ({"model": {"out_bias": False}}, "model.out_bias: True in the checkpoint"),
    ],
)
def test_another_model_is_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    written(tmp_path / "old", GENERATION)
    config = config_of(GENERATION, tmp_path / "old", **sections)
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, save_what_was_loaded, config, tmp_path / "new")


@torch.no_grad()
def test_the_converter_takes_such_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation = GENERATION.at(dtype=torch.float32)
    weights = written(tmp_path / "old" / "7", generation)[0]
    arguments = ["--src_folder", str(tmp_path / "old"), "--tgt_folder", str(tmp_path / "hf"), "--dtype", "float32"]
    assert main(arguments) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert theirs.keys() == weights.keys() and all(torch.equal(theirs[key], weights[key]) for key in weights)
    square = old.random_weights(old.V02, ffn=old.HIDDEN)
    old.write(tmp_path / "square", old.V02, square)
    assert main(["--src", str(tmp_path / "square"), "--tgt", str(tmp_path / "out")]) == 2
    assert "--version 1 (w3) or --version 2 (w2), and train on what that writes" in capsys.readouterr().err
    assert main(["--src", str(tmp_path / "square"), "--tgt", str(tmp_path / "out"), "--version", "1"]) == 0


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no checkpoint and holds none"):
        open_checkpoint(tmp_path)
