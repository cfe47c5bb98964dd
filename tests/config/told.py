"""What a refusal must say: the key, the numbers, and at the end what to do."""

import re
from collections.abc import Sequence

ASKS = re.compile(
    r"(?<!not )\b(set|raise|lower|change|give|name|start|write|choose|leave|keep|turn|expected|must|let)\b",
    re.IGNORECASE,
)
Told = tuple[str, str, str]  # key, numbers, and the fix, with which the message ends


def assert_told(problems: Sequence[str], told: Told) -> None:
    """One of `problems` names the key and shows the numbers; then comes the fix, in the last clause."""
    key, numbers, fix = told
    assert key and numbers and fix, told
    telling = [one for one in problems if key in one and one.endswith(fix) and numbers in one.removesuffix(fix)]
    assert telling, (told, problems)
    assert ASKS.search(last_clause(telling[0])), telling


def last_clause(problem: str) -> str:
    return re.split(r"[;:.] ", problem)[-1]
