"""Text for benchmarks, from what every machine has: the source of Python and of the packages installed."""

import json
import re
import sysconfig
from pathlib import Path


def write_source(target: Path, num_characters: int, prose: bool = False) -> None:
    """At most `num_characters` of source files, or of their docstrings (`prose`): each file the "text" of a line of the
    jsonl file `target`."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    with target.open("w", encoding="utf-8") as lines:
        for path in dict.fromkeys(path for folder in folders for path in sorted(folder.rglob("*.py"))):
            text = path.read_text(encoding="utf-8", errors="replace")
            if prose:
                text = "\n".join(doc for doc in re.findall(r'"""(.*?)"""', text, re.DOTALL) if len(doc) > 200)
            num_characters -= len(text)
            if num_characters < 0:
                return
            if text.strip():
                lines.write(json.dumps({"text": text}) + "\n")
