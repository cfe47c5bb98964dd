"""Word problems solved by programs that the model writes (program-aided language models, Gao et al., 2022).

    python tools/pal_inference.py MODEL OUT_DIR --run_code [--dataset FILE.jsonl]

The model is asked for a Python function solution(), which is run and its value compared with the answer. This runs code
that no person has read: only with --run_code, and in a child process with limits on time, memory and output. That is
no jail.

--dataset is a jsonl file with "question" and "answer" (a number, or a text whose number stands behind ####), or gsm8k,
which the datasets package fetches. OUT_DIR/NAME.json gets a line of JSON for each question: question, target, answer,
score, generation, error.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout, not installed

from internlm.apis.chat import ChatModel, ReplyOptions
from internlm.apis.sampling import Sampling
from internlm.apis.sandbox import Result, run_python
from internlm.apis.terminal import add_model_arguments, load_with_progress
from internlm.apis.tool_calls import INTERPRETER, code_block, parse_tool_calls
from internlm.data.message import Message
from internlm.utils.errors import UserError, exit_code
from internlm.utils.logger import get_logger, setup_logging

logger = get_logger("pal_inference")

TASK = """Write a Python function solution() that computes the answer to the question and returns it as a number. \
Name what the question gives, step by step. Reply with one block of code."""
EXAMPLES = (
    (
        "A baker fills 7 trays with 12 rolls each and sells 59 rolls before noon. How many rolls are left?",
        "trays = 7\n    rolls_per_tray = 12\n    sold = 59\n    return trays * rolls_per_tray - sold",
    ),
    (
        "Lin walks 3 km to school and back, five days a week. How many kilometres is that in four weeks?",
        "one_way = 3\n    days = 5\n    weeks = 4\n    return 2 * one_way * days * weeks",
    ),
    (
        "A coat costs 80 euros. Its price rises by 25 percent and then falls by 10 percent. What does it cost now?",
        "price = 80\n    price = price * 1.25\n    return price * 0.90",
    ),
)
LEAST_MEMORY = 64  # megabytes; Python alone takes about 20
TOLERANCE = 1e-3  # absolute, as in 2023
_RESULT = "value of solution(): "


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", help="a run, a checkpoint, or a folder in Hugging Face format")
    add("out_dir", type=Path, help="folder of the results; made if missing")
    add("--run_code", action="store_true", help="run what the model writes; without it nothing is done")
    add("--dataset", default="gsm8k", help="jsonl file, or gsm8k (default)")
    add("--top_p", type=float, default=0.8, help="share of probability kept (default %(default)s)")
    add("-t", "--temperature", type=float, default=1.0, help="0: always the likeliest (default %(default)s)")
    add("--max_new_tokens", type=int, default=512, help="longest program (default %(default)s)")
    add("--time_out", type=int, default=100, help="seconds for one program (default %(default)s)")
    add("--memory", type=int, default=512, help="megabytes for one program (default %(default)s)")
    add("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    add("-a", "--append", action="store_true", help="go on behind the results that are there")
    add("-v", "--verbose", action="store_true", help="print each question, program and value")
    add_model_arguments(parser)
    return parser.parse_args(arguments)


def questions_of(dataset: str) -> list[tuple[str, float]]:
    """(question, answer) of all lines. Raises UserError naming the line."""
    if dataset == "gsm8k":
        return [(row["question"], target_of(row["answer"], "gsm8k")) for row in _gsm8k()]
    path = Path(dataset)
    if not path.is_file():
        raise UserError(f"--dataset {dataset}: no such file; give a jsonl file, or gsm8k")
    found = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
                found.append((str(row["question"]), target_of(row["answer"], place)))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f'{place}: expected an object with "question" and "answer" ({error!r})') from error
    if not found:
        raise UserError(f"{path} holds no question")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text ({error}): convert it") from error


def _gsm8k() -> Iterator[dict[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UserError('--dataset gsm8k needs the package datasets: pip install "internlm[eval]"') from error
    return iter(datasets.load_dataset("gsm8k", "main", split="test"))


def target_of(answer: object, place: str) -> float:
    """The number of an answer: itself, or what stands behind the last ####."""
    text = str(answer).rsplit("####", 1)[-1].replace(",", "").strip()
    try:
        number = float(text)
    except ValueError as error:
        raise UserError(f"{place}: the answer {text[:40]!r} is no number") from error
    if not math.isfinite(number):
        raise UserError(f"{place}: no program can answer {text[:40]!r}")
    return number


def prompt_of(question: str) -> list[Message]:
    """The task with three examples, and the question."""
    turns = []
    for number, (asked, body) in enumerate(EXAMPLES):
        turns.append(Message("user", f"{TASK}\n\n{asked}" if number == 0 else asked))
        turns.append(Message("assistant", f"```python\ndef solution():\n    {body}\n```"))
    return [*turns, Message("user", question)]


def program_of(text: str) -> str | None:
    """The code in an answer: of a call of the interpreter, or a fenced block."""
    codes = [call.arguments["code"] for call in parse_tool_calls(text)[1] if call.name == INTERPRETER]
    return codes[0] if codes else code_block(text)


def solve(program: str, seconds: int, memory_mb: int) -> tuple[float | None, str | None]:
    """The value of solution(), or what went wrong."""
    result: Result = run_python(f"{program}\n\nprint({_RESULT!r} + repr(float(solution())))", seconds, memory_mb)
    last = (result.output.strip().splitlines() or [""])[-1]
    if result.error is not None or not last.startswith(_RESULT):
        return None, result.error or "no value"
    try:
        value = float(last.removeprefix(_RESULT))
    except ValueError:  # the program printed such a line itself
        return None, "no value"
    return (value, None) if math.isfinite(value) else (None, f"the value is {value}")


def infer(given: argparse.Namespace) -> None:
    """Answers the questions; prints the share of right answers among all lines of the results. Raises UserError."""
    if not given.run_code:
        raise UserError(
            "this runs code that the model writes, in a child process with limits but with your rights: "
            "say --run_code if that is what you want, best inside a container"
        )
    if given.time_out < 1 or given.memory < LEAST_MEMORY:
        raise UserError(
            f"--time_out {given.time_out} --memory {given.memory}: a program needs 1 s and {LEAST_MEMORY} megabytes"
        )
    options = ReplyOptions(Sampling(given.temperature, top_p=given.top_p), given.max_new_tokens, given.seed)
    questions = questions_of(given.dataset)
    given.out_dir.mkdir(parents=True, exist_ok=True)
    file = given.out_dir / f"{Path(given.dataset).stem}.json"
    done = _results(file, [question for question, _ in questions]) if given.append else []
    with (
        load_with_progress(given.model, given) as chat,
        file.open("a" if given.append else "w", encoding="utf-8") as out,
    ):
        for number in track(range(len(done), len(questions)), description="questions"):
            try:
                line = _answered(chat, *questions[number], options, given)
            except UserError as error:
                raise UserError(f"question {number + 1} of {given.dataset}: {error}") from error
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
            out.flush()
            done.append(line)
            if given.verbose:
                logger.info(json.dumps(line, ensure_ascii=False, indent=2))
    print(f"{given.model}: Accuracy - {sum(line['score'] for line in done) / len(done)}")


def _answered(
    chat: ChatModel, question: str, target: float, options: ReplyOptions, given: argparse.Namespace
) -> dict[str, object]:
    text = "".join(chat.reply(prompt_of(question), options))
    program = program_of(text)
    value, error = (None, "no code") if program is None else solve(program, given.time_out, given.memory)
    score = float(value is not None and abs(value - target) < TOLERANCE)
    return {
        "question": question,
        "target": target,
        "answer": value,
        "score": score,
        "generation": text,
        "error": error,
    }


def _results(file: Path, questions: list[str]) -> list[dict[str, float]]:
    """The lines that are there already, which must be answers to the first questions."""
    if not file.is_file():
        return []
    try:
        lines = [json.loads(line) for line in _lines(file)]
        answered = [(line["question"], float(line["score"]))[0] for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file} can't be continued, a line is broken ({error!r}): fix it, or leave out --append"
        ) from error
    if answered != questions[: len(answered)]:
        raise UserError(f"{file} has answers to other questions: give another OUT_DIR, or leave out --append")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 when all questions are answered, 2 for a mistake that the user can fix."""
    setup_logging(rank=0, world_size=1)
    return exit_code(lambda: infer(parse_arguments(arguments)))


if __name__ == "__main__":
    sys.exit(main())
