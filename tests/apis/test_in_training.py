"""A model in training answers as its checkpoint does in transformers, on every ZeRO class, and trains on as before."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from internlm.apis.chat import ReplyOptions, load_chat
from internlm.apis.in_training import evaluated
from internlm.apis.sampling import Sampling
from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.native import NativeReader
from internlm.config.checks import find_problems
from internlm.config.schema import Config
from internlm.core.launch import World
from internlm.core.mesh import build_mesh
from internlm.data.chat_template import BUILT_IN
from internlm.data.message import Message
from internlm.data.tokenizer import open_tokenizer
from internlm.model.init import initial_value
from internlm.model.transformer import build_model
from internlm.monitor.monitor import Monitor
from internlm.parallel.parallelize import parallelize
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.metrics import Answer, StepReport
from tests.checkpoint.runs import run_config, train
from tests.pool import run_ranks
from tools import evaluate

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo_sft" / "tokenizer.model"
PROMPTS = ("What is Hybrid ZeRO?", "A")
STEPS, NEW = 4, 12


def config_of(chain: tuple[int, int, int] = (1, 1, 1), world_size: int = 1, **sections: Any) -> Config:
    defaults: dict[str, Any] = {
        "model": {"vocab_size": 1024, "qkv_bias": False},
        "data": {"tokenizer_path": str(DEMO)},
        "evaluation": {"every": 2, "prompts": PROMPTS, "max_new_tokens": NEW},
    }
    for name, section in sections.items():
        defaults[name] = {**defaults.get(name, {}), **section}
    return run_config(chain, world_size, STEPS, **defaults)


def by_transformers(folder: Path, prompts: list[list[int]], stop: int | None = None) -> list[str]:
    """Greedy answers of a checkpoint."""
    from transformers import AutoModelForCausalLM

    reader = NativeReader(folder)
    export_hf(reader.read, reader.config, folder / "hf", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=stop, pad_token_id=0)
        tokens = [token for token in found[0, len(prompt) :].tolist() if token != stop]
        answers.append(open_tokenizer(DEMO).decode(tokens))
    return answers


@pytest.mark.parametrize(
    ("world_size", "chain", "parallel"),
    [
        (1, (1, 1, 1), {}),
        (2, (1, 1, 1), {}),
        (2, (1, 1, 2), {}),
        (2, (1, 2, 2), {}),
        (2, (2, 2, 2), {}),
        (2, (2, 2, 2), {"context": {"ulysses": 2}}),
        (2, (1, 1, 1), {"tensor": {"size": 2}}),
        (2, (1, 1, 1), {"tensor": {"size": 2, "mode": "msp"}}),
        (4, (1, 1, 1), {"pipeline": {"size": 2}, "tensor": {"size": 2, "mode": "fsp"}}),
    ],
)
def test_answers_are_those_of_the_checkpoint_and_training_goes_on_as_before(
    tmp_path: Path, world_size: int, chain: tuple[int, int, int], parallel: dict[str, Any]
) -> None:
    config = config_of(chain, 1 if parallel else world_size, parallel=parallel)
    asked = run_ranks(world_size, train, config, tmp_path / "asked")
    plain = run_ranks(
        world_size,
        train,
        config.model_copy(update={"evaluation": Config.model_fields["evaluation"].default}),
        tmp_path / "plain",
    )
    assert [seen["losses"] for seen in asked] == [seen["losses"] for seen in plain]
    assert [seen["random"] for seen in asked] == [seen["random"] for seen in plain]
    tokenizer = open_tokenizer(DEMO)
    prompts = [[tokenizer.bos_id or 0, *tokenizer.encode(text)] for text in PROMPTS]
    expected = by_transformers(tmp_path / "asked" / "checkpoints" / str(STEPS), prompts)
    assert len(set(expected)) == 2
    for seen in asked:
        assert len(seen["answers"]) == 2 * len(PROMPTS) and seen["answers"][2:] == expected


def test_questions_to_a_chat_are_written_by_its_template(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "a fox"}]
    (tmp_path / "data" / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 24)
    data = {"type": "chat", "train_folder": str(tmp_path / "data"), "chat_template": "chatml", "seq_len": 64}
    config = config_of(data=data, adam={"lr": 0.1}, evaluation={"every": STEPS})
    found = run_ranks(1, train, config, tmp_path)[0]["answers"]
    tokenizer, template = open_tokenizer(DEMO), BUILT_IN["chatml"]
    texts = [template.render([Message("user", text)], add_generation_prompt=True) for text in PROMPTS]
    stop = tokenizer.id_of("<|im_end|>")
    folder = tmp_path / "checkpoints" / str(STEPS)
    assert found == by_transformers(folder, [tokenizer.encode(text) for text in texts], stop)
    with load_chat(tmp_path, device="cpu") as chat:  # afterwards, too
        assert chat.template.name == "chatml"
        options = ReplyOptions(Sampling(), max_new_tokens=NEW)
        assert ["".join(chat.reply([Message("user", text)], options)) for text in PROMPTS] == found


def train_under_torchrun(rank: int, world_size: int, config: Config, folder: Path) -> dict[str, list[Any]]:
    """With the variable by which the harness knows who is to have results."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        return train(rank, world_size, config, folder)


@pytest.mark.parametrize("axis", [{"pipeline": {"size": 2}}, {"context": {"ring": 2}}])
def test_tasks_are_scored_as_on_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], axis: dict[str, Any]
) -> None:
    rows = [{"q": f"{n} and", "right": n % 2, "choices": ["zero", "one"]} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_target: right\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n'
    )
    asked = {"every": STEPS, "prompts": (), "tasks": ("mine",), "include_path": str(tmp_path)}
    config = config_of((2, 2, 2), 2, evaluation=asked, parallel=axis)
    seen = run_ranks(4, train_under_torchrun, config, tmp_path / "run")
    command = [str(tmp_path / "run"), "--tasks", "mine", "--include_path", str(tmp_path), "--device", "cpu"]
    assert evaluate.main([*command, "--output", str(tmp_path / "scores.json")]) == 0
    expected = json.loads((tmp_path / "scores.json").read_text())["results"]["mine"]["acc,none"]
    assert [one["scores"] for one in seen] == [[("mine_acc", expected)], [], [], []]


def test_answers_and_scores_are_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = StepReport(2, 2, loss=1.0, answers=(Answer("Who?", "书 me"),), scores={"mine_acc": 0.5})
    with Monitor(config_of(), tmp_path) as monitor:
        monitor.report(StepReport(1, 1, loss=2.0))
        monitor.report(report)
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == [
        {"step": 2, "prompt": "Who?", "text": "书 me"}
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["eval/mine_acc"] == 0.5
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("eval/mine_acc")] == [0.5]
    assert events.Tensors("answers/0/text_summary")[0].step == 2


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"evaluation": {"every": 0}}, "evaluation.every = 0: it goes with"),
    ({"evaluation": {"prompts": ()}}, "evaluation.every = 2: it goes with"),
    ({"data": {"tokenizer_path": None}}, "texts need data.tokenizer_path"),
]


@pytest.mark.parametrize(("change", "problem"), REFUSALS)
def test_what_cannot_answer_is_refused(change: dict[str, Any], problem: str) -> None:
    assert problem in "\n".join(find_problems(config_of(**change)))


def exam(rank: int, world_size: int, config: Config) -> None:
    """Only what comes before the first step."""
    mesh = build_mesh(config.parallel, World(rank, rank, world_size, torch.device("cpu")))
    model = build_model(config)
    placements = parallelize(model, config, mesh)
    engine = HybridZero(model, config, mesh, partial(initial_value, config=config.model, seed=1), placements)
    evaluated(iter(()), model, engine, config, mesh)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"model": {"vocab_size": 48}}, "the tokenizer has 1024 ids"),
        ({"data": {"type": "chat"}}, "no chat template"),
        ({"evaluation": {"prompts": ("who " * 3000,)}}, r"evaluation.prompts\[0\] has .* the model was made for"),
    ],
)
def test_mistakes_are_found_before_the_first_step(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        run_ranks(1, exam, config_of(**change))


def test_a_task_with_too_long_answers_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "1 and", "a": "2"}\n')
    (tmp_path / "long.yaml").write_text(
        f"task: long\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        'test_split: test\noutput_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: a\n'
        "metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: [x], max_gen_toks: 4096}\n"
    )
    asked = {"prompts": (), "tasks": ("long",), "include_path": str(tmp_path)}
    with pytest.raises(AssertionError, match="task long asks for answers of 4096 tokens"):
        run_ranks(1, exam, config_of(evaluation=asked))
