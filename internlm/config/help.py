"""Documents every key with type, default and meaning, for `train.py --help` and doc/configuration.md.

`python -m internlm.config.help > doc/configuration.md` updates the page.
"""

import textwrap
from collections.abc import Iterator
from itertools import groupby

from internlm.config.fields import Key, keys
from internlm.config.legacy import TABLE
from internlm.config.presets import PRESETS
from internlm.config.schema import Config

WIDTH = 120

INTRO = """\
# Configuration

<!-- Generated from the schema: python -m internlm.config.help > doc/configuration.md -->

One Python file describes a run. It is executed, and the names that it assigns are the sections and keys listed below;
[configs/](../configs) has examples. A key that the file leaves out has the default shown here or, in the section
`model`, the value of its family, `model_type`.

```python
_base_ = "_base_/default_runtime.py"  # one path or a list, relative to this file

model_type = "INTERNLM"
model = dict(num_layers=8, hidden_size=256, num_attention_heads=4, vocab_size=6144)
data = dict(train_folder="data/train", seq_len=256, micro_bsz=8, total_steps=400)
adam = dict(lr=2e-3)
```

* **`_base_`** names files to read first. Sections are merged key by key, and the file overrides its bases.
* **Other names** are ignored: modules, functions, classes, names that begin with an underscore, and constants in
  CAPITALS (`SEQ_LEN`). The file may import modules from its own folder or the working directory. InternEvo's
  `with read_base(): from configs._base_... import *` works too; with it, an assignment replaces a section as a whole.
* **Overrides** follow the file on the command line: `python train.py --config FILE model.num_layers=4
  data.train_folder=/data/en`. A value is read as a Python literal if it is one, otherwise as text.
* **`--seed` and `--run_dir`** set the keys of the same names.
* **Mistakes** are reported all at once, before any GPU is touched: unknown keys (with the nearest name), wrong types,
  sizes that contradict each other, missing files.
* **`--dry_run`** prints the resolved config, the number of parameters and the memory of each rank. Each run also
  stores the resolved config as `config.json`, in its folder and in every checkpoint; `--config` accepts this file too.
* **The config is frozen** once it is loaded.
"""

OLD_INTRO = """\
## Old spellings

Config files of InternLM (2023) and InternEvo (to 0.5.2) load unchanged. The old keys below are converted, and the log
has one line for each. A value that is not supported is refused with the reason. Some defaults differ from then:

* the loss is divided by the tokens of the whole step; `loss.reduction="micro_batch"` gives the mean of means of 2023;
* a model section without `dtype` means bfloat16, not float16;
* saving in the background and overlapped communication are on unless you turn them off.

A model section in the old spelling that doesn't mention biases or rotary order means what its family meant then
(INTERNLM2_PUBLIC with biases; LLAMA2 with biases and interleaved pairs), not what the family above means.

| old key | becomes |
|---|---|
"""


def render_help() -> str:
    """All keys as plain text, at most 120 columns wide."""
    lines = ["Keys of a config file, and of overrides (section.key=value): type, default, meaning."]
    for section, members in _sections():
        lines += ["", f"{section or 'top level'}: {_meaning(section)}"]
        for key in members:
            head = f"  {key.path}  ({key.type}; {_default(key)})"
            body = textwrap.wrap(_documented(key), WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
            lines += [*textwrap.wrap(head, WIDTH, initial_indent="  ", subsequent_indent=" " * 6), *body]
    return "\n".join(lines) + "\n"


def render_markdown() -> str:
    """The page doc/configuration.md."""
    parts = [INTRO]
    for section, members in _sections():
        parts.append(f"## {f'`{section}`' if section else 'Top level'}\n\n{_capital(_meaning(section))}.\n")
        rows = [
            f"| `{key.path}` | {_cell(key.type)} | {_cell(key.default, code=True)} | {_cell(_documented(key))} |"
            for key in members
        ]
        parts.append("\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
        if section == "model":
            parts.append(_families())
    rows = [f"| `{row.key}` | {_cell(row.becomes)} |" for row in TABLE]
    parts.append(OLD_INTRO + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, list[Key]]]:
    """(section, its keys), the top level first."""
    ordered = sorted(keys(), key=lambda key: key.section != "")
    for section, members in groupby(ordered, key=lambda key: key.section):
        yield section, list(members)


def _meaning(section: str) -> str:
    return (Config.model_fields[section].description or "") if section else "the run as a whole"


def _default(key: Key) -> str:
    return key.default if key.default == "required" else f"default {key.default}"


def _documented(key: Key) -> str:
    """The meaning, and the families that set the key."""
    section, _, name = key.path.partition(".")
    families = [family for family, preset in PRESETS.items() if section == "model" and name in preset]
    return f"{key.meaning} [{', '.join(families)}: see model_type]" if families else key.meaning


def _families() -> str:
    rows = [
        f"| `{family}` | {', '.join(f'`{key}={value!r}`' for key, value in preset.items())} |"
        for family, preset in PRESETS.items()
    ]
    return "\n".join(["Defaults by family:", "", "| `model_type` | values |", "|---|---|", *rows]) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _cell(text: str, code: bool = False) -> str:
    escaped = text.replace("|", "\\|")
    return f"`{escaped}`" if code and text != "required" else escaped


if __name__ == "__main__":
    print(render_markdown(), end="")
