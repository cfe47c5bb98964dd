"""Evaluates a model while it trains: answers to prompts, and scores on tasks of lm-evaluation-harness.

It is the model that trains, with its parameters where Hybrid ZeRO keeps them. So all ranks of the run compute the same
texts, call by call, and gather parameters as they do in training. All choose tokens by rank 0's logits: otherwise one
rank might end an answer earlier than another, which would then wait for it for ever.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from internlm.apis.generate import check_prompt
from internlm.apis.harness import Scorer, check_tasks, open_tasks, run_tasks
from internlm.apis.sampling import Sampling
from internlm.config.schema import Config
from internlm.core.collectives import all_gather
from internlm.core.mesh import Mesh
from internlm.data.chat import prompt_ids, template_of_data
from internlm.data.message import Message
from internlm.data.tokenizer import Tokenizer, check_tokenizer, open_tokenizer
from internlm.model.transformer import Transformer
from internlm.parallel.parallelize import whole_answers
from internlm.parallel.sequence import uncut
from internlm.solver.hybrid_zero import HybridZero
from internlm.train.metrics import Answer, StepReport

# The harness would seed the generators that training draws from.
_LEAVE_SEEDS = {"random_seed": None, "numpy_random_seed": None, "torch_random_seed": None}


def evaluated(
    reports: Iterator[StepReport], model: Transformer, engine: HybridZero, config: Config, mesh: Mesh
) -> Iterator[StepReport]:
    """`reports`, with answers and scores in every `evaluation.every`-th. Collective.

    Raises UserError, before the first step, for prompts that the model can't read, unknown tasks, and tasks that want
    longer answers than the model was made for.
    """
    asked = config.evaluation
    if not asked.every:
        return reports
    exam = _Exam(model, engine, config, mesh)
    return (exam.result(report) if report.step % asked.every == 0 else report for report in reports)


class _Exam:
    """Prompts and tasks of a run, and how the model is asked."""

    def __init__(self, model: Transformer, engine: HybridZero, config: Config, mesh: Mesh) -> None:
        self.model, self.engine, self.config, self.mesh = model, engine, config, mesh
        self.asked = config.evaluation
        assert config.data.tokenizer_path is not None  # config/checks.py
        tokenizer = open_tokenizer(config.data.tokenizer_path)
        check_tokenizer(tokenizer, config.model)
        self.prompts, stops = _prompts(config, tokenizer)
        for number, prompt in enumerate(self.prompts):
            check_prompt(prompt, self.asked.max_new_tokens, config.model, f"evaluation.prompts[{number}]")
        max_length = config.model.max_position_embeddings
        self.scorer = Scorer(model, tokenizer, max_length, stop_ids=stops, show_progress=False)
        self.tasks = open_tasks(self.asked.tasks, self.asked.include_path) if self.asked.tasks else None
        if self.tasks is not None:
            check_tasks(self.asked.tasks, self.tasks, max_length)

    def result(self, report: StepReport) -> StepReport:
        """The report, with what the model says now."""
        self.model.eval()
        with (
            whole_answers(self.model, self.config, self.mesh),
            uncut(self.model, self.mesh),
            _logits_of_rank_0(self.model, self.mesh),
            _eager(),
        ):
            answers, scores = self._answers(), self._scores()
        self.model.train()
        self.engine.wait()  # drops what was gathered
        return replace(report, answers=answers, scores=scores)

    def _answers(self) -> tuple[Answer, ...]:
        if not self.prompts:
            return ()
        sampling = Sampling(temperature=self.asked.temperature)
        texts = self.scorer.continuations(self.prompts, (), sampling, self.asked.max_new_tokens)
        return tuple(map(Answer, self.asked.prompts, texts))

    def _scores(self) -> dict[str, float]:
        """By TASK_MEASURE; on rank 0, whose monitor writes them, and maybe on others."""
        asked = self.asked
        if self.tasks is None:
            return {}
        settings: dict[str, Any] = {"limit": asked.limit, "bootstrap_iters": 0, **_LEAVE_SEEDS}
        results = run_tasks(self.scorer, asked.tasks, self.tasks, **settings) or {"results": {}}
        return {
            f"{task}_{name.removesuffix(',none')}": value
            for task, scores in results["results"].items()
            for name, value in scores.items()
            if isinstance(value, float) and "_stderr" not in name
        }


def _prompts(config: Config, tokenizer: Tokenizer) -> tuple[list[list[int]], Sequence[int]]:
    """The ids of `evaluation.prompts` and those that end an answer."""
    if config.data.type not in ("chat", "preference"):
        begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return [[*begin, *tokenizer.encode(text)] for text in config.evaluation.prompts], ()
    template = template_of_data(config.data)
    questions = [[Message("user", text)] for text in config.evaluation.prompts]
    prompts = [prompt_ids(tokenizer, template, turns) for turns in questions]
    stops = [tokenizer.id_of(text) for text in template.stop]
    return prompts, [index for index in stops if index is not None]


def _eager() -> AbstractContextManager[Any]:
    """Runs compiled blocks eagerly, as they are compiled for rows of training. Doesn't import an unused compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


@contextmanager
def _logits_of_rank_0(model: Transformer, mesh: Mesh) -> Iterator[None]:
    """All ranks see the logits of rank 0, whole where tensor ranks share the vocabulary."""

    def send(head: Any, args: Any, output: Any) -> Any:
        if not isinstance(output, Tensor):  # the loss of a row, as often on every rank
            return output
        if mesh.sizes["tensor"] > 1:
            output = all_gather(output.T, mesh.group("tensor")).wait().T.contiguous()
        dist.broadcast(output, 0, group=mesh.world_group)
        return output

    hook = model.head.register_forward_hook(send)
    try:
        yield
    finally:
        hook.remove()
