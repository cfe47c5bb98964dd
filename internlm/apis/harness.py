"""A model of ours under EleutherAI's lm-evaluation-harness, for tools/evaluate.py and runs that score themselves.

The only place that needs lm_eval (requirements/eval.txt). Texts become the ids that the harness's own `hf` model
makes of an export, so that scores agree. Requests are packed into rows without padding; a row's logits are never held.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from rich.progress import track

from internlm.apis.answer_settings import AnswerSettings
from internlm.apis.generate import stream
from internlm.apis.sampling import Sampling
from internlm.apis.text_stream import TextStream
from internlm.data.chat_template import ChatTemplate
from internlm.data.message import messages_of
from internlm.data.tokenizer import Tokenizer
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError


@dataclass(frozen=True)
class Scored:
    """A text to score: `ids` are fed, the last `num_scored` of their followers count."""

    ids: Sequence[int]  # with the last one, which is only predicted
    num_scored: int


class Scorer:
    """Log-likelihoods and continuations of one model."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        max_length: int,
        row_tokens: int = 4096,
        stop_ids: Sequence[int] = (),
        show_progress: bool = True,
    ) -> None:
        """`max_length`: tokens the model sees of a text, the last ones; `row_tokens`: of a packed row, about.

        `stop_ids` end a generated text, beside the tokenizer's own end token.
        """
        self.model, self.tokenizer, self.max_length, self.row_tokens = model, tokenizer, max_length, row_tokens
        self.show_progress = show_progress
        self.stop_ids = {*stop_ids} | ({tokenizer.eos_id} if tokenizer.eos_id is not None else set())

    def score(self, texts: Sequence[Scored], description: str) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would have said it) of each text, longest first, packed."""
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index].ids))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        for row in self.track(list(self._rows(texts, order)), description):
            for index, score in zip(row, self._score_row([texts[index] for index in row]), strict=True):
                found[index] = score
        return found

    def track(self, rows: list[list[int]], description: str) -> Iterable[list[int]]:
        """`rows`, with a bar of how many are done."""
        return track(rows, description=description, disable=not self.show_progress)

    def _rows(self, texts: Sequence[Scored], order: Sequence[int]) -> Iterator[list[int]]:
        row: list[int] = []
        room = self.row_tokens
        for index in order:
            size = len(texts[index].ids) - 1
            if row and size > room:
                yield row
                row, room = [], self.row_tokens
            row.append(index)
            room -= size
        if row:
            yield row

    @torch.no_grad()
    def _score_row(self, texts: Sequence[Scored]) -> list[tuple[float, bool]]:
        lengths = [len(text.ids) - 1 for text in texts]
        labels = [
            [IGNORE_INDEX] * (length - text.num_scored) + list(text.ids[1 + length - text.num_scored :])
            for text, length in zip(texts, lengths, strict=True)
        ]
        batch = Batch(
            torch.tensor([token for text in texts for token in text.ids[:-1]]),
            torch.tensor([token for row in labels for token in row]),
            torch.cat([torch.arange(length) for length in lengths]),
            Segments.of(tuple(lengths)),
            num_trained=sum(text.num_scored for text in texts),
        )
        output = self.model.loss(batch.to(self.model.device))
        ignored = (batch.labels == IGNORE_INDEX).to(output.correct.device)
        losses = output.token_losses.double().split(lengths)
        correct = (output.correct | ignored).split(lengths)
        return [(-float(loss.sum()), bool(right.all())) for loss, right in zip(losses, correct, strict=True)]

    def continuations(
        self, prompts: Sequence[Sequence[int]], until: Sequence[str], sampling: Sampling, limit: int
    ) -> list[str]:
        """The text behind each prompt, up to one of `until` or a stop id, without special tokens.

        Of texts in `until` that overlap the one named first is cut off first, as the harness does it.
        """
        unseen = self.stop_ids | self.tokenizer.special_ids
        stop_ids = self.stop_ids | {index for text in until if (index := self.tokenizer.id_of(text)) in unseen}
        streams = [TextStream(self.tokenizer) for _ in prompts]
        texts = [""] * len(prompts)
        for tokens in stream(self.model, prompts, limit, sampling, tuple(stop_ids)):
            for index, token in enumerate(tokens):
                if token is not None and token not in unseen:
                    texts[index] += streams[index].add(token)
            if all(
                token is None or any(stop in text for stop in until) for text, token in zip(texts, tokens, strict=True)
            ):
                break
        texts = [text + row.finish() for text, row in zip(texts, streams, strict=True)]
        for stop in until:
            texts = [text.partition(stop)[0] for text in texts]
        return texts


def harness_model(scorer: Scorer, num_rows: int = 8, template: ChatTemplate | None = None) -> Any:
    """The object that `lm_eval.simple_evaluate(model=...)` takes. Raises UserError where lm_eval is missing.

    `template` writes the conversations of `apply_chat_template=True`.
    """
    _lm_eval()
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer, max_length = scorer.tokenizer, scorer.max_length

    class InternLM(TemplateLM):  # type: ignore[misc]
        @property
        def eot_token_id(self) -> int:
            return _end(tokenizer)

        @property
        def prefix_token_id(self) -> int:
            named = tokenizer.id_of(tokenizer.ends[0])  # also where nothing puts it before a text
            return _end(tokenizer) if named is None else named

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            ids = tokenizer.encode(string)
            begins = tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]
            return [tokenizer.bos_id, *ids] if begins and add_special_tokens is not False else ids  # type: ignore[list-item]

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **_: Any) -> Any:
            texts = []
            for (_, continuation), before, ids in requests:
                if not ids or len(ids) > max_length:
                    raise UserError(f"{continuation[:40]!r}: {len(ids)} tokens to score, 1 to {max_length} can be")
                before = before or [self.prefix_token_id]  # a context that the tokenizer drops, such as blanks
                texts.append(Scored([*before, *ids][-(max_length + 1) :], len(ids)))
            return scorer.score(texts, "log-likelihoods")

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts, owners = [], []
            for owner, request in enumerate(requests):
                ids = self.tok_encode(request.args[0])  # begins as a text does, behind the prefix: as `hf` has it
                windows = get_rolling_token_windows(ids, self.prefix_token_id, max_length, context_len=1)
                for before, counted in map(make_disjoint_window, windows):
                    texts.append(Scored([*before, *counted], len(counted)))
                    owners.append(owner)
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, scorer.score(texts, "rolling log-likelihoods"), strict=True):
                totals[owner] += value
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            found = [""] * len(requests)
            order = sorted(range(len(requests)), key=lambda index: repr(requests[index].args[1]))
            groups = [list(group) for _, group in groupby(order, lambda index: repr(requests[index].args[1]))]
            rows = [group[start : start + num_rows] for group in groups for start in range(0, len(group), num_rows)]
            for row in scorer.track(rows, "generation"):
                settings = AnswerSettings.of(requests[row[0]].args[1], requests[row[0]].task_name)
                room = max_length - settings.limit
                _check_room(requests[row[0]].task_name, settings.limit, max_length)
                prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in row]
                texts = scorer.continuations(prompts, settings.until, settings.sampling, settings.limit)
                for index, text in zip(row, texts, strict=True):
                    found[index] = text
            return found

        def chat_template(self, chat_template: bool | str = False) -> str:
            return "" if template is None else template.source

        @property
        def tokenizer_name(self) -> str:
            return "" if template is None else template.name

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            assert template is not None
            return _chat_text(template, chat_history, add_generation_prompt)

    return InternLM()


def _chat_text(template: ChatTemplate, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """The conversation as text; without `add_generation_prompt` it ends within the last turn, which is to go on."""
    messages = messages_of(turns)
    if add_generation_prompt:
        return template.render(messages, add_generation_prompt=True)
    cut = secrets.token_hex(16)
    return template.render([*messages[:-1], replace(messages[-1], content=messages[-1].content + cut)]).partition(cut)[
        0
    ]


def open_tasks(tasks: Sequence[str], include_path: str | None = None) -> Any:
    """The harness's manager of tasks: its own, or those defined by YAML files in `include_path`.

    Raises UserError where one of `tasks` is neither, or lm_eval is missing.
    """
    _lm_eval()
    from lm_eval.tasks import TaskManager

    # The harness's own tasks are thousands of files, which take it many seconds to look at.
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if not include_path or not all(manager.match_tasks([name]) for name in tasks):
        manager = TaskManager(include_path=include_path)
    unknown = sorted(name for name in tasks if not manager.match_tasks([name]))
    if unknown:
        raise UserError(f"tasks {', '.join(unknown)}: not known to lm_eval, nor in include_path {include_path}")
    return manager


def check_tasks(tasks: Sequence[str], manager: Any, max_length: int, num_fewshot: int | None = None) -> None:
    """Raises UserError for one of `tasks` whose answers may take all of `max_length` tokens, or which has fewer than
    `num_fewshot` examples. Reads the tasks' data."""
    for name, task in manager.load(list(tasks))["tasks"].items():
        if task.OUTPUT_TYPE == "generate_until":
            _check_room(name, AnswerSettings.of(task.config.generation_kwargs or {}, name).limit, max_length)
        if num_fewshot:
            found = len(list(task.fewshot_docs())) - (task.config.fewshot_split == task.config.test_split)
            if found < num_fewshot:  # of the split that is asked, the question itself is none
                raise UserError(f"--num_fewshot {num_fewshot}: task {name} has {found} examples, give fewer")


def _check_room(task: str, limit: int, max_length: int) -> None:
    if limit >= max_length:
        raise UserError(
            f"task {task} asks for answers of {limit} tokens (generation_kwargs: max_gen_toks), and a text has at most "
            f"{max_length} with its prompt: copy the task's YAML with fewer into include_path, or leave the task out"
        )


def run_tasks(
    scorer: Scorer, tasks: Sequence[str], manager: Any, template: ChatTemplate | None = None, **settings: Any
) -> dict[str, Any] | None:
    """The harness's results of `tasks`, known to `manager` (see `open_tasks`).

    With a `template`, questions are asked as conversations. Under torchrun the harness has results on the first process
    of a node alone: None on the others. `settings` are those of `lm_eval.simple_evaluate`, such as num_fewshot and
    limit. Raises UserError.
    """
    return _lm_eval().simple_evaluate(
        model=harness_model(scorer, template=template),
        tasks=list(tasks),
        task_manager=manager,
        apply_chat_template=template is not None,
        **{"log_samples": False, **settings},
    )


def _lm_eval() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        import lm_eval
    except ImportError as error:
        raise UserError('evaluation needs lm-evaluation-harness: pip install "internlm[eval]"') from error
    return lm_eval


def _end(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer names no end token (eos_token), which the harness asks for")
    return tokenizer.eos_id
