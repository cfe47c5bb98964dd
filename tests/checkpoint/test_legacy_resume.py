"""Runs that go on from folders of 2023: every tensor and counter arrives, on any layout."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm.checkpoint.inputs import find_checkpoint_problems
from internlm.checkpoint.legacy.reader import LegacyReader
from internlm.checkpoint.legacy.resume import check_batches
from internlm.checkpoint.native import NativeReader, open_checkpoint
from internlm.config.schema import Config, LoraConfig
from internlm.utils.errors import UserError
from tests.checkpoint import folders_2023 as old
from tests.checkpoint.numbers_2023 import numbered, under_generators_names
from tests.checkpoint.runs import contents, edited, global_tensors, train
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


ISP = old.EVO_ISP.at(tp=4, wp=1, pp=4, fp32_norm=True)  # the last norm belongs to a rank that is not tp0
OFFSETS = {"master": 0, "exp_avg": 2**20, "exp_avg_sq": 2**21}


@pytest.mark.parametrize(
    ("ranks", "generation"),
    [
        (1, old.V021_MOE),
        (2, GENERATION),
        (1, old.V01.at(zero=3)),
        (1, old.V021.at(pp=2, chunks=2, zero=2, overlap=True)),
        (2, old.EVO_INTERNLM2.at(tp=2, adapt_hf=False, fp32_norm=True, zero=2)),
        (1, old.EVO_LLAMA2.at(tp=2, zero=2, dtype=torch.float32, fp32_apart=False)),
        (1, ISP),
        (1, old.EVO_ISP.at(tp=2, wp=2, dp=4, zero=2, bias=True, fp32_norm=True)),
    ],
)
def test_every_element_arrives(ranks: int, generation: old.Generation, tmp_path: Path) -> None:
    """Masters and moments say which element of which parameter they belong to; a run has each where it belongs."""
    numbers = numbered(generation)
    kinds = [under_generators_names(numbers, offset) for offset in OFFSETS.values()]
    old.write(tmp_path / "old", generation, kinds[0], (kinds[1], kinds[2]), step=STEP)
    config = config_of(
        generation, tmp_path / "old", ranks=ranks, use_fp32_norm=generation.fp32_norm, model={"qk_interleaved": False}
    )
    # no step is trained: what was loaded is saved again at once
    run_ranks(ranks, save_what_was_loaded, config, tmp_path / "new")
    saved = tmp_path / "new" / "checkpoints" / str(STEP + (not generation.has_step))
    found = global_tensors(saved)
    assert {name for name, _ in found} == numbers.keys()
    for name, value in numbers.items():
        for kind, offset in OFFSETS.items():
            # an fp32 parameter is its own master
            bits = found.get((name, kind), found[name, "param"] if kind == "master" else None)
            assert bits is not None and np.array_equal(bits.view(np.float32), (value + offset).astype(np.float32)), name
    state = contents(saved)["state"]
    if not generation.has_step:
        return
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

    adapters = config.model_copy(update={"lora": LoraConfig(rank=2)})  # beside the same model
    run_ranks(1, save_what_was_loaded, adapters, tmp_path / "adapted")
    adapted = contents(tmp_path / "adapted" / "checkpoints" / "0")["tensors"]
    assert any("lora_a" in name for name, _ in adapted)
    assert {key: adapted[key] for key in saved["tensors"] if key[1] == "param"}.items() <= saved["tensors"].items()
    adapters = config_of(GENERATION, tmp_path / "old", lora={"rank": 2})
    with pytest.raises(AssertionError, match=r"no optimizer states for the adapters(.|\n)*content=..model"):
        run_ranks(1, save_what_was_loaded, adapters, tmp_path / "refused")


def _shorten(state: Any) -> None:
    state["base_optim_states"]["state"][0]["exp_avg"] = torch.ones(3)


def _reverse(state: Any) -> None:
    state["flat_fp32_weights"][0] = state["flat_fp32_weights"][0].flip(0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edited("context.pt", lambda s: s.pop("batch_count")), r"context\.pt: batch_count is missing"),
        (edited("context.pt", lambda s: s.update(step_count="7")), r"context\.pt: step_count is a str"),
        (lambda folder: (folder / "context.pt").unlink(), "has no context.pt, .* leave sampler and scheduler out"),
        (edited("optimizer_tp1_pp0_zo0.pt", lambda s: s.pop("flat_fp32_weights")), "flat_fp32_weights is missing"),
        (edited("optimizer_tp0_pp0_zo0.pt", lambda s: s["grad_scaler"].clear()), "grad_scaler: _scale is missing"),
        (edited("optimizer_tp0_pp0_zo1.pt", lambda s: s["zero_devide_optim_plan"].pop()), "plan is of 1 groups"),
        (edited("optimizer_tp0_pp0_zo1.pt", _shorten), r"exp_avg of group 0 is not as long as its masters"),
        (  # in another order: nothing else would tell
            edited("optimizer_tp1_pp1_zo0.pt", _reverse),
            r"master of .* is not what model_tp1_pp1\.pt holds in torch\.bfloat16(.|\n)*of different steps",
        ),
    ],
)
def test_damage_beside_the_model_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    written(tmp_path / "old", GENERATION)
    damage(tmp_path / "old")
    with pytest.raises(AssertionError, match=message):
        run_ranks(1, save_what_was_loaded, config_of(GENERATION, tmp_path / "old"), tmp_path / "new")


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
    (problem,) = find_checkpoint_problems(config)  # before there are ranks
    assert re.search(message, problem)
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
