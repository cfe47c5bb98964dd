"""Preference tuning: the loss of a pair computed from transformers' logits; every ZeRO class as one rank."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from internlm.checkpoint.checkpointer import Checkpointer
from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.native import NativeReader
from internlm.checkpoint.reference import build_reference
from internlm.config.checks import find_problems
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.data.loader import build_train_loader
from internlm.model.batch import IGNORE_INDEX
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.parallel.parallelize import parallelize
from internlm.parallel.schedule import build_schedule
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.preference import PreferenceLoss
from internlm.train.state import TrainState
from internlm.train.trainer import Trainer
from tests.checkpoint.runs import run_config, train
from tests.pool import run_ranks

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo_sft" / "tokenizer.model"
BETA, STEPS, LR = 0.5, 3, 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a model to start from."""
    folder = tmp_path_factory.mktemp("preference")
    (folder / "data").mkdir()
    pairs = [
        {
            "prompt": f"What is {n}?",
            "chosen": [{"role": "assistant", "content": f"a number {n}"}],
            "rejected": [{"role": "assistant", "content": "no " * (n % 5 + 1)}],
        }
        for n in range(12)
    ]
    (folder / "data" / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    base = run_config((1, 1, 1), 1, 1, model={"vocab_size": 1024}, adam={"lr": 0.02, "weight_decay": 0.0})
    run_ranks(1, train, base, folder / "base")
    return folder


def config_of(folder: Path, chain: tuple[int, int, int], world_size: int, **sections: Any) -> Config:
    data = {
        "type": "preference",
        "train_folder": str(folder / "data"),
        "tokenizer_path": str(DEMO),
        "chat_template": "chatml",
    }
    data |= {"seq_len": 64, "micro_bsz": 2, "micro_num": 4 // world_size}
    defaults: dict[str, Any] = {
        "model": {"vocab_size": 1024},
        "data": data,
        "dpo": {"beta": BETA},
        "adam": {"lr": LR, "weight_decay": 0.0},
        "lr_scheduler": {"type": "constant", "warmup_ratio": 0.0},
        "hybrid_zero_optimizer": {"clip_grad_norm": 0.0},
        "ckpt": {"load_ckpt_info": {"path": str(folder / "base" / "checkpoints" / "1")}, "auto_resume": False},
    }
    return run_config(chain, world_size, STEPS, **{**defaults, **sections})


def tune(rank: int, world_size: int, config: Config, folder: Path) -> dict[str, Any]:
    """What train.py does."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, torch.device("cpu")))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    optimizer = HybridZero(model, config, mesh, partial(initial_value, config=config.model, seed=1), placements)
    assert config.dpo is not None
    objective = PreferenceLoss(config.dpo, build_reference(config, mesh, optimizer.lanes))
    schedule = build_schedule(model, optimizer, config, mesh, objective)
    state = TrainState()
    Checkpointer(config, folder, optimizer, state, mesh).resume()
    loader = build_train_loader(config, mesh.dp_rank, mesh.dp_size)
    reports = list(Trainer(schedule, optimizer, loader, state, config, mesh, {}).steps())
    return {
        "losses": [r.loss for r in reports],
        "acc": [r.acc for r in reports],
        "norms": [r.grad_norm for r in reports],
    }


def expected(folder: Path, config: Config, steps: int) -> dict[str, list[float]]:
    """From transformers' logits and torch's AdamW, one pair after the other."""
    from transformers import AutoModelForCausalLM

    reader = NativeReader(folder / "base")
    export_hf(reader.read, reader.config, folder / "hf", dtype="float32", force=True)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=LR, weight_decay=0.0, betas=(0.9, 0.95), eps=config.adam.adam_eps
    )
    found: dict[str, list[float]] = {"losses": [], "acc": [], "norms": []}

    def log_p(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(ids[None]).logits[0]
        return -F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")

    for batch in list(build_train_loader(config, 0, 1))[:steps]:
        losses, right = [], []
        for row in batch.micro_batches:
            parts = list(
                zip(row.tokens.split(row.segments.lengths), row.labels.split(row.segments.lengths), strict=True)
            )
            parts = [part for part in parts if (part[1] != IGNORE_INDEX).any()]
            assert len(parts) == 2 * row.num_trained
            for chosen, rejected in zip(parts[::2], parts[1::2], strict=True):
                with torch.no_grad():
                    fixed = log_p(reference, *chosen) - log_p(reference, *rejected)
                margin = log_p(policy, *chosen) - log_p(policy, *rejected) - fixed
                losses.append(-F.logsigmoid(BETA * margin))
                right.append(float(margin > 0))
        optimizer.zero_grad()
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in policy.parameters()]))
        optimizer.step()
        found["losses"].append(loss.item())
        found["acc"].append(sum(right) / len(right))
        found["norms"].append(norm.item())
    return found


@pytest.mark.parametrize(("world_size", "chain"), [(1, (1, 1, 1)), (2, (1, 1, 2)), (2, (2, 2, 2)), (4, (2, 2, 4))])
def test_loss_gradient_and_update_are_those_of_the_formula(
    folder: Path, tmp_path: Path, world_size: int, chain: tuple[int, int, int]
) -> None:
    constant = {"beta2_scheduler": {"init_beta2": 0.95, "c": 0.0}}
    config = config_of(folder, chain, world_size, **constant)
    found = run_ranks(world_size, tune, config, tmp_path)[0]
    wanted = expected(folder, config_of(folder, (1, 1, 1), 1, **constant), STEPS)
    assert found["losses"][0] == pytest.approx(0.693147, rel=1e-5)  # the model is its own reference
    assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-3)
    assert found["norms"] == pytest.approx(wanted["norms"], rel=2e-3)
    assert found["acc"][1:] == wanted["acc"][1:]
    assert found["losses"][-1] < 0.6


def test_adapters_have_their_base_as_reference(folder: Path, tmp_path: Path) -> None:
    losses = run_ranks(1, tune, config_of(folder, (1, 1, 1), 1, lora={"rank": 4}), tmp_path)[0]["losses"]
    assert losses[0] == pytest.approx(0.693147, rel=1e-5) and losses[-1] < losses[0]


def test_refusals(folder: Path) -> None:
    wrong = config_of(folder, (1, 1, 1), 1, data={"type": "preference", "micro_bsz": 1, "packing": "fit"}, ckpt={})
    problems = "\n".join(find_problems(wrong))
    for text in ("a row holds whole pairs", "do not go with pairs", "ckpt.load_ckpt_info, which is not set"):
        assert text in problems
    alone = config_of(folder, (1, 1, 1), 1, dpo=None)
    assert any("belong together" in problem for problem in find_problems(alone))
