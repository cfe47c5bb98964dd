"""What a task of lm-evaluation-harness asks of generation."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internlm.apis.sampling import Sampling
from internlm.utils.errors import UserError

MAX_NEW_TOKENS = 256  # where a task says nothing; as the harness has it
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_SAMPLING: dict[str, Any] = {"temperature": float, "top_k": int, "top_p": float, "repetition_penalty": float}


@dataclass(frozen=True)
class AnswerSettings:
    """How a task wants its answers made."""

    until: tuple[str, ...]
    sampling: Sampling
    limit: int

    @staticmethod
    def of(given: Mapping[str, Any], task: str) -> "AnswerSettings":
        """From generation_kwargs. Raises UserError for what `Sampling` lacks."""
        given = {key: value for key, value in given.items() if value is not None}
        unknown = given.keys() - {"until", "do_sample", "num_beams", *_LIMITS, *_SAMPLING}
        if unknown or given.get("num_beams", 1) != 1:
            unheeded = {key: given[key] for key in sorted(unknown | {"num_beams"} & given.keys())}
            raise UserError(
                f"task {task} asks for answers by generation_kwargs {unheeded}, which our generation lacks: copy the "
                "task's YAML without them into include_path, or leave the task out"
            )
        until = given.get("until", ())
        limit = next((given[key] for key in _LIMITS if key in given), MAX_NEW_TOKENS)
        chosen = {key: kind(given[key]) for key, kind in _SAMPLING.items() if key in given}
        if not given.get("do_sample", chosen.get("temperature", 0) > 0):
            chosen = {key: value for key, value in chosen.items() if key == "repetition_penalty"}  # greedy
        elif not chosen.get("temperature"):
            chosen["temperature"] = 1.0
        texts = (until,) if isinstance(until, str) else tuple(until)
        return AnswerSettings(tuple(filter(None, texts)), Sampling(**chosen), int(limit))
