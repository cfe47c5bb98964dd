"""Preference tuning: losses, gradients and updates as by TRL; every ZeRO class as one rank; exact resume."""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.native import NativeReader
from internlm.checkpoint.peft import export_adapter
from internlm.config.checks import find_problems
from internlm.config.schema import Config
from internlm.data.loader import build_train_loader, build_valid_loaders
from internlm.data.sources import open_train
from internlm.model.batch import IGNORE_INDEX, Batch
from internlm.ops.cross_entropy import LossOutput
from internlm.train.preference import margin_sum
from internlm.utils.errors import UserError
from tests.checkpoint.runs import contents, run_config, train
from tests.config.told import Told, assert_told
from tests.pool import run_ranks

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo_sft" / "tokenizer.model"
BETA, STEPS, LR = 0.5, 3, 0.02
MODEL = {"vocab_size": 1024, "qkv_bias": False, "num_layers": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a model to start from."""
    folder = tmp_path_factory.mktemp("preference")
    pairs = [
        {
            "prompt": f"What is {n}?",
            "chosen": [{"role": "assistant", "content": f"a number {n}" + " yes" * max(0, n - 13)}],
            "rejected": [{"role": "assistant", "content": "no " * (n % 5 + 1)}],
        }
        for n in range(19)
    ]
    for name, part in (("data", pairs[:12]), ("held_out", pairs[12:])):
        (folder / name).mkdir()
        write(folder / name, part)
    run_ranks(1, train, run_config((1, 1, 1), 1, 1, model=MODEL, adam={"lr": LR}), folder / "base")
    return folder


def write(folder: Path, pairs: list[dict[str, Any]]) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


def config_of(folder: Path, chain: tuple[int, int, int] = (1, 1, 1), world_size: int = 1, **sections: Any) -> Config:
    data = {
        "type": "preference",
        "train_folder": str(folder / "data"),
        "valid_folder": str(folder / "held_out"),
        "valid_every": STEPS,
        "tokenizer_path": str(DEMO),
        "chat_template": "chatml",
        "seq_len": 64,
        "micro_bsz": 2,
    }
    defaults: dict[str, Any] = {
        "model": MODEL,
        "data": data,
        "dpo": {"beta": BETA},
        "adam": {"lr": LR, "weight_decay": 0.0},
        "lr_scheduler": {"type": "constant", "warmup_ratio": 0.0},
        "beta2_scheduler": {"init_beta2": 0.95, "c": 0.0},
        "hybrid_zero_optimizer": {"clip_grad_norm": 0.0},
        "ckpt": {"load_ckpt_info": {"path": str(folder / "base" / "checkpoints" / "1")}},
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section} if isinstance(section, dict) else section
    return run_config(chain, world_size, STEPS, **defaults)


def pairs_of(row: Batch) -> dict[str, Tensor]:
    """The input of TRL's trainer: all chosen samples of a row, then all rejected ones, padded."""
    lengths = row.segments.lengths
    parts = zip(row.tokens.split(lengths), row.labels.split(lengths), strict=True)
    samples = [(ids, labels) for ids, labels in parts if (labels != IGNORE_INDEX).any()]
    assert len(samples) == 2 * row.num_trained
    samples = samples[::2] + samples[1::2]
    # our label of a position is the next id; their mask stands at the id itself
    masks = [torch.cat((torch.zeros(1), (labels != IGNORE_INDEX)[:-1])).long() for _, labels in samples]
    return {
        "input_ids": pad_sequence([ids for ids, _ in samples], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids, _ in samples], batch_first=True),
        "completion_mask": pad_sequence(masks, batch_first=True),
    }


@pytest.fixture(scope="module")
def by_trl(folder: Path) -> dict[str, list[float]]:
    """Losses and gradient norms of the steps of `config_of(folder)` by TRL's trainer and AdamW, and then of held-out
    pairs loss, accuracy and margin."""
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    reader = NativeReader(folder / "base")
    export_hf(reader.read, reader.config, folder / "hf", dtype="float32", force=True)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32) for _ in range(2))
    trainer = trl.DPOTrainer(
        policy,
        reference,
        trl.DPOConfig(str(folder / "trl"), beta=BETA, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2})), eos_token="a", unk_token="a"
        ),
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    found: dict[str, list[float]] = {"losses": [], "norms": []}
    for batch in list(build_train_loader(config_of(folder), 0, 1))[:STEPS]:
        optimizer.zero_grad()
        num_pairs = sum(row.num_trained for row in batch.micro_batches)
        loss = 0.0
        for row in batch.micro_batches:
            part = trainer.compute_loss(policy, pairs_of(row)) * row.num_trained / num_pairs  # theirs: mean of a row
            part.backward()
            loss += part.item()
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in policy.parameters()]))
        optimizer.step()
        found["losses"].append(loss)
        found["norms"].append(norm.item())
    policy.eval()
    (held_out,) = build_valid_loaders(config_of(folder), 0, 1).values()
    rows, sums = list(held_out), torch.zeros(3)
    for row in rows:
        loss = trainer.compute_loss(policy, pairs_of(row)).item()
        said = (trainer._metrics["eval"][f"rewards/{name}"][-1] for name in ("accuracies", "margins"))
        sums += row.num_trained * torch.tensor([loss, *said])
    assert len(rows) > 1 and sum(row.num_trained for row in rows) == 7
    found["held out"] = (sums / 7).tolist()
    return found


LAYOUTS: list[tuple[int, tuple[int, int, int], dict[str, Any]]] = [
    (1, (1, 1, 1), {}),
    (2, (1, 1, 1), {}),
    (2, (1, 1, 2), {}),
    (2, (1, 2, 2), {}),
    (2, (2, 2, 2), {}),
    (2, (1, 1, 1), {"tensor": {"size": 2}}),
    (2, (2, 2, 2), {"context": {"ulysses": 2}}),
    (4, (1, 1, 1), {"context": {"ulysses": 2, "ring": 2}}),
]
PIPELINES: list[tuple[int, tuple[int, int, int], dict[str, Any]]] = [
    (2, (1, 1, 1), {"pipeline": {"size": 2}}),
    (2, (1, 1, 1), {"pipeline": {"size": 2, "schedule": "zbv"}}),
    (4, (2, 2, 2), {"pipeline": {"size": 2}}),
    (4, (1, 1, 1), {"pipeline": {"size": 2}, "tensor": {"size": 2, "mode": "msp"}}),
    (4, (1, 1, 1), {"pipeline": {"size": 2}, "context": {"ring": 2}}),
]


@pytest.mark.parametrize(
    ("world_size", "chain", "parallel", "reference"),
    [*((*layout, "each_step") for layout in LAYOUTS), *((*layout, "once") for layout in LAYOUTS + PIPELINES)],
)
def test_losses_and_gradients_are_those_of_trl(
    folder: Path,
    tmp_path: Path,
    by_trl: dict[str, list[float]],
    world_size: int,
    chain: tuple[int, int, int],
    parallel: dict[str, Any],
    reference: str,
) -> None:
    ranks = prod(number for axis in parallel.values() for number in axis.values() if isinstance(number, int))
    readers = world_size // ranks
    config = config_of(folder, chain, readers, parallel=parallel, dpo={"reference": reference})
    found = run_ranks(world_size, train, config, tmp_path)[0]
    assert found["losses"][0] == pytest.approx(0.693147, rel=1e-5)  # the model is its own reference
    assert found["losses"] == pytest.approx(by_trl["losses"], rel=1e-4)
    assert [float.fromhex(norm) for norm in found["norms"]] == pytest.approx(by_trl["norms"], rel=1e-4)
    assert found["losses"][-1] < 0.6
    ((name, *means),) = found["validation"]
    assert name == "held_out" and means == pytest.approx(by_trl["held out"], rel=1e-4)


def test_experts_learn_from_pairs_as_on_one_rank(folder: Path, tmp_path: Path) -> None:
    model = {**MODEL, "num_layers": 2, "num_experts": 4, "moe": {"top_k": 2, "intermediate_size": 16}}
    run_ranks(1, train, run_config((1, 1, 1), 1, 1, model=model), tmp_path / "base")
    start = {"load_ckpt_info": {"path": str(tmp_path / "base" / "checkpoints" / "1")}}
    sections: dict[str, Any] = {"model": model, "ckpt": start, "loss": {"moe_loss_coeff": 0.1}}
    (alone,) = run_ranks(1, train, config_of(folder, dpo={"reference": "once"}, **sections), tmp_path / "alone")
    assert alone["losses"][-1] < 0.6
    for parallel in ({"expert": {"size": 2}, "tensor": {"size": 2}}, {"expert": {"size": 2}, "pipeline": {"size": 2}}):
        ranks, reference = (4, "once") if "pipeline" in parallel else (2, "each_step")
        config = config_of(folder, (1, 1, 1), ranks // 2, parallel=parallel, dpo={"reference": reference}, **sections)
        (found, *_) = run_ranks(ranks, train, config, tmp_path / reference)
        assert found["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert [float.fromhex(norm) for norm in found["norms"]] == pytest.approx(
            [float.fromhex(norm) for norm in alone["norms"]], rel=1e-4
        )
        for ours, theirs in zip(found["validation"], alone["validation"], strict=True):
            assert ours[1:] == pytest.approx(theirs[1:], rel=1e-4)


def test_a_margin_of_a_loss_without_digits_counts() -> None:
    expected = torch.tensor([-200.0, -1.0, 1e-3, 30.0, 300.0])
    losses, none = torch.nn.functional.softplus(-expected), torch.zeros(3)
    assert losses[-1] == 0
    told_apart = torch.cat((expected > 0, none.bool()))
    found = margin_sum(LossOutput(losses.sum(), torch.cat((losses, none)), told_apart))
    assert found == pytest.approx(-200 - 1 + 1e-3 + 30 + 103.279, abs=1e-3)


def test_resume_keeps_the_reference(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, (2, 2, 2), 2, ckpt={"checkpoint_every": 1})
    whole = run_ranks(2, train, config, tmp_path / "whole")[0]
    run_ranks(2, train, config, tmp_path / "parts", 1)
    rest = run_ranks(2, train, config, tmp_path / "parts")[0]
    assert rest["losses"] == whole["losses"][1:]
    last = [tmp_path / name / "checkpoints" / str(STEPS) for name in ("whole", "parts")]
    assert contents(last[0]) == contents(last[1])


@pytest.mark.parametrize(
    ("chain", "readers", "parallel"), [((2, 2, 2), 2, {}), ((1, 1, 1), 1, {"pipeline": {"size": 2}})]
)
def test_what_was_computed_once_is_kept(
    folder: Path, tmp_path: Path, chain: tuple[int, int, int], readers: int, parallel: dict[str, Any]
) -> None:
    """A resumed run needs no reference but for what is new or damaged, and trains as one that was never stopped."""
    each_step = run_ranks(2, train, config_of(folder, (2, 2, 2), 2), tmp_path / "each_step")[0]["losses"]
    once = config_of(folder, chain, readers, parallel=parallel, dpo={"reference": "once"}, ckpt={"checkpoint_every": 1})
    whole = run_ranks(2, train, once, tmp_path / "whole")[0]
    assert whole["losses"] == pytest.approx(each_step, rel=1e-6)
    expected = load_file(tmp_path / "whole" / "checkpoints" / "reference.safetensors")
    assert set(expected) == {"train", "valid/held_out"} and len(expected["valid/held_out"]) == 14
    short = once.model_copy(update={"data": once.data.model_copy(update={"total_steps": 1})})
    run_ranks(2, train, short, tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "damaged")
    file, damaged = (tmp_path / name / "checkpoints" / "reference.safetensors" for name in ("parts", "damaged"))
    assert load_file(file)["train"].isnan().any()  # of pairs that one step doesn't need
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")  # the last value is another one
    for name, steps, is_new in (("parts", (1, 2), True), ("parts", (2, 3), False), ("damaged", (1, 3), True)):
        file = tmp_path / name / "checkpoints" / "reference.safetensors"
        before = file.stat().st_mtime_ns
        rest = run_ranks(2, train, once, tmp_path / name, steps[1])[0]
        assert (file.stat().st_mtime_ns != before) == is_new
        assert rest["losses"] == whole["losses"][slice(*steps)]
        for key, values in load_file(file).items():
            known = ~values.isnan()
            assert known.any() and (name == "damaged" or known.all())
            torch.testing.assert_close(values[known], expected[key][known], atol=1e-9, rtol=0.0)
    assert rest["validation"] == whole["validation"]


@pytest.mark.parametrize("reference", ["each_step", "once"])
def test_the_reference_of_adapters_is_what_the_run_starts_from(folder: Path, tmp_path: Path, reference: str) -> None:
    """The base alone where adapters are new; the adapters as well where the start has some, ours or in PEFT's files."""
    sections: dict[str, Any] = {"lora": {"rank": 4}, "dpo": {"reference": reference}}
    first = run_ranks(1, train, config_of(folder, **sections), tmp_path / "first")[0]["losses"]
    assert first[0] == pytest.approx(0.693147, rel=1e-5) and first[-1] < first[0]
    start = {"load_ckpt_info": {"path": str(tmp_path / "first" / "checkpoints" / str(STEPS))}}
    second = run_ranks(1, train, config_of(folder, **sections, ckpt=start), tmp_path / "second")[0]["losses"]
    assert second[0] == pytest.approx(0.693147, rel=1e-5)
    assert abs(second[1] - first[1]) > 1e-3  # had both lost the adapters, the two runs would be one
    reader = NativeReader(folder / "base")
    export_hf(reader.read, reader.config, tmp_path / "hf", dtype="float32")
    export_adapter(NativeReader(tmp_path / "first"), tmp_path / "adapter", str(tmp_path / "hf"))
    start = {"load_ckpt_info": {"path": str(tmp_path / "adapter"), "ckpt_type": "hf"}}
    third = run_ranks(1, train, config_of(folder, **sections, ckpt=start), tmp_path / "third")[0]["losses"]
    assert third == pytest.approx(second, rel=1e-5)


REFUSALS: list[tuple[dict[str, Any], Told]] = [
    ({"dpo": None}, ('data.type = "preference"', "with no dpo section", "set both or neither")),
    ({"data": {"type": "chat"}}, ('data.type = "chat"', "with a dpo section", "set both or neither")),
    ({"data": {"micro_bsz": 1}}, ("data.micro_bsz", "= 1: a row holds whole pairs", "set 2 or more")),
    ({"data": {"packing": "fit"}}, ("dpo: ", "packing and min_length", "leave them out")),
    ({"data": {"long_samples": "split"}}, ("dpo: ", "long_samples = split", "leave them out")),
    ({"loss": {"label_smoothing": 0.1}}, ("dpo: ", "loss.label_smoothing", "leave them out")),
    ({"loss": {"z_loss": 1e-4}}, ("dpo: ", "z_loss", "leave them out")),
    ({"ckpt": {"load_ckpt_info": None}}, ("dpo: ", "ckpt.load_ckpt_info, which is not set", "set it")),
    (
        {"parallel": {"pipeline": {"size": 2}}},
        ("dpo.reference", '"each_step" with parallel.pipeline.size = 2', 'set dpo.reference = "once"'),
    ),
]


@pytest.mark.parametrize(("change", "told"), REFUSALS)
def test_what_does_not_go_with_pairs_is_refused(folder: Path, change: dict[str, Any], told: Told) -> None:
    assert_told(find_problems(config_of(folder, **change)), told)


ASKED, SAID = {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}
BAD_PAIRS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": "a", "chosen": "b"}, r'a.jsonl, line 2: preference data needs "chosen" and "rejected"'),
    ({"prompt": "a", "chosen": "b", "rejected": [SAID]}, 'line 2: one of "chosen" and "rejected" is a text'),
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, 'line 2: "chosen" and "rejected" are the same'),
    ({"prompt": "a", "chosen": [SAID], "rejected": [ASKED, SAID]}, 'line 2: "rejected" has turns of a user'),
    ({"chosen": [ASKED, SAID], "rejected": [SAID]}, "line 2: .* differ before their last turns"),
    ({"chosen": [ASKED, SAID], "rejected": [{**ASKED, "content": "?"}, SAID]}, "line 2: .* different questions"),
    ({"prompt": "a", "chosen": 3, "rejected": "b"}, 'line 2: "prompt" and "chosen" must be'),
    ({"prompt": "a", "chosen": "b " * 200, "rejected": "b"}, "line 2: .* more than data.seq_len = 64"),
]


@pytest.mark.parametrize(("pair", "problem"), BAD_PAIRS)
def test_a_broken_pair_is_named(folder: Path, tmp_path: Path, pair: dict[str, Any], problem: str) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", [{"prompt": "a", "chosen": "b", "rejected": "c"}, pair])
    config = config_of(folder, data={"train_folder": str(tmp_path / "data")})
    with pytest.raises(UserError, match=problem):
        build_train_loader(config, 0, 1)


def test_pairs_that_are_cut_to_the_same_are_left_out(folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": "a", "chosen": "b " * 99 + end, "rejected": "b " * 99 + "?"} for end in ("", "c")]
    write(tmp_path, [*pairs, {"prompt": "a", "chosen": "b", "rejected": "c " * 99}])
    data = config_of(folder, data={"train_folder": str(tmp_path), "long_samples": "cut"}).data
    (file,) = open_train(data, 1024).files
    assert len(file) == 2


def test_a_missing_reference_is_named(folder: Path, tmp_path: Path) -> None:
    config = config_of(folder, ckpt={"load_ckpt_info": {"path": str(tmp_path / "nothing")}})
    with pytest.raises(AssertionError, match=r"ckpt\.load_ckpt_info\.path: .*nothing"):
        run_ranks(1, train, config, tmp_path)
