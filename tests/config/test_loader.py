"""Files, bases, overrides, and how mistakes are told."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from internlm.config.checks import ConfigError
from internlm.config.loader import load_config
from internlm.config.schema import Config

SMALL = """
model = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 128}
data = {"type": "synthetic", "seq_len": 32, "total_steps": 10}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def problems_of(*args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_importing_the_loader_does_not_import_torch():
    code = "import sys, internlm.config.loader, internlm.config.help; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_file_with_constants_helpers_and_a_module_beside_it(tmp_path):
    write(tmp_path / "a" / "sizes_beside.py", "HIDDEN = 64\n")
    write(tmp_path / "b" / "sizes_beside.py", "HIDDEN = 128\n")
    text = """
import math
from sizes_beside import HIDDEN
SEQ_LEN = 32
JOB_NAME = "named"
_layers = 2
def double(x):
    return 2 * x
model = {"num_layers": double(_layers), "hidden_size": HIDDEN, "num_attention_heads": 4, "vocab_size": 128}
data = {"type": "synthetic", "seq_len": SEQ_LEN, "total_steps": math.floor(10.5)}
"""
    path_before = list(sys.path)
    first = load_config(write(tmp_path / "a" / "config.py", text))
    second = load_config(write(tmp_path / "b" / "config.py", text))
    assert (first.JOB_NAME, first.model.num_layers, first.data.total_steps) == ("named", 4, 10)
    assert (first.model.hidden_size, second.model.hidden_size) == (64, 128)  # not the first one's cached module
    assert sys.path == path_before


def test_bases_merge_section_by_section_and_the_file_wins(tmp_path):
    write(tmp_path / "base" / "first.py", SMALL + "adam = {'lr': 1.0, 'weight_decay': 0.5}\n")
    write(tmp_path / "base" / "second.py", "_base_ = 'first.py'\nadam = {'lr': 2.0}\n")
    path = write(tmp_path / "run.py", "_base_ = ['base/second.py']\nmodel = {'num_layers': 3}\n")
    config = load_config(path)
    assert (config.adam.lr, config.adam.weight_decay) == (2.0, 0.5)
    assert (config.model.num_layers, config.model.hidden_size) == (3, 64)


def test_bases_in_a_circle_are_refused(tmp_path):
    write(tmp_path / "one.py", "_base_ = 'two.py'\n")
    write(tmp_path / "two.py", "_base_ = 'one.py'\n")
    assert "leads back" in problems_of(tmp_path / "one.py")[0]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.py", "_base_ = 5\n", "_base_ = 5: expected a path or a list of paths"),
        ("a.py", "_base_ = ['b.py', 5]\n", "_base_ = ['b.py', 5]: expected"),
        ("a.py", "import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        ("a.json", "[1, 2]", "holds a list, expected a JSON object"),
    ],
)
def test_files_that_are_no_config(tmp_path, name, text, told):
    (problem,) = problems_of(write(tmp_path / name, text))
    assert told in problem


def test_read_base_of_internevo_files(tmp_path, monkeypatch):
    write(tmp_path / "shapes" / "_base_" / "tiny.py", SMALL)
    text = """
from internlm.utils.utils import read_base
with read_base():
    from shapes._base_.tiny import *
JOB_NAME = "evo"
data = {"type": "synthetic", "seq_len": 16, "total_steps": 5}
"""
    write(tmp_path / "shapes" / "run.py", text)
    monkeypatch.chdir(tmp_path)
    config = load_config("shapes/run.py")
    assert (config.JOB_NAME, config.model.hidden_size, config.data.seq_len) == ("evo", 64, 16)


def test_stored_json_gives_the_same_config(tmp_path, small):
    config = load_config({**small, "adam": {"no_decay": ["*bias"]}})
    path = write(tmp_path / "config.json", config.model_dump_json())
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = 1\nmodel = dict(\n", "line 2"),
        ("x = 1\ny = undefined_name\n", "line 2: NameError"),
        ("import no_such_module_here\n", "line 1: ModuleNotFoundError"),
    ],
)
def test_a_broken_file_names_the_line(tmp_path, text, expected):
    assert expected in problems_of(write(tmp_path / "broken.py", text))[0]


def test_a_missing_file_names_its_neighbour(tmp_path):
    write(tmp_path / "demo_model.py", SMALL)
    assert "demo_model.py" in problems_of(tmp_path / "demo_mdoel.py")[0]
    assert "ends in .py" in problems_of(write(tmp_path / "run.yaml", ""))[0]


def test_overrides(small):
    config = load_config(
        small,
        [
            "model.num_layers=3",
            "adam.lr=1e-3",
            "data.skip_batches=3",
            "data.tokenizer_path=None",
            "ckpt.save_ckpt_folder=s3://bucket/key=1",
            "grad_scaler.fp16.initial_scale=8",
            "model.dtype=torch.float32",
            "ckpt.auto_resume=false",
            "data.mixture.en=0.5",
            "data.train_folder=" + str(Path(__file__).parent),
            "adam.no_decay=['*bias']",
            "parallel.weight.size=2",
        ],
        seed=7,
        run_dir=None,
    )
    assert config.model.num_layers == 3
    assert config.adam.lr == 1e-3
    assert config.data.skip_batches == "3"  # a str key takes the text
    assert config.data.tokenizer_path is None
    assert config.ckpt.save_ckpt_folder == "s3://bucket/key=1"
    assert config.grad_scaler.fp16.initial_scale == 8
    assert config.ckpt.auto_resume is False
    assert config.data.mixture == {"en": 0.5}
    assert config.adam.no_decay == ("*bias",)
    assert config.parallel.gradient.size == 2  # follows weight.size
    assert (config.seed, config.run_dir) == (7, None)


def test_a_start_without_a_path_is_no_start_from_nothing(small):
    assert "ckpt.load_ckpt_info.path: missing" in problems_of(small, ["ckpt.load_ckpt_info.ckpt_type=hf"])[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_layer=3", "did you mean model.num_layers?"),
        ("modle.num_layers=3", "did you mean model?"),
        ("data.lr=3", "did you mean adam.lr?"),
        ("seq_len=3", "did you mean data.seq_len?"),
        ("parallel.zero1.sise=3", "did you mean parallel.zero1.size?"),
        ("grad_scaler.fp16.min_scael=3", "did you mean grad_scaler.fp16.min_scale?"),
        ("SEQ_LEN=3", "constant of the file"),
        ("data.train_folder=", "override 'data.train_folder=': there is no value; write data.train_folder=None or"),
        ("model.num_layers", "expected section.key=value"),
        ("model=3", "model = 3: int; expected a dict"),
        ("model.num_layers=3.5", "model.num_layers = 3.5: float; expected int > 0"),
        ("model.num_layers=0", "model.num_layers = 0: int; expected int > 0"),
        ("model.dtype=bf16", "'torch.bfloat16'"),
        ("adam.lr=fast", "adam.lr = 'fast': str; expected float"),
        ("model.qk_norm=1", "expected bool"),
        ("ckpt.load_ckpt_info.content=['modle']", "expected list of 'model' | 'optimizer'"),
        ("model_type=INTERNLM3", "did you mean 'INTERNLM'?"),
        ("model_type=LLAVA", "image input is not available yet"),
    ],
)
def test_a_wrong_override_names_key_value_and_fix(small, override, expected):
    problems = problems_of(small, [override, "ckpt.load_ckpt_info.path=" + str(Path(__file__).parent)])
    assert len(problems) == 1, problems
    assert expected in problems[0]


def test_missing_keys_are_named_with_their_meaning():
    problems = problems_of({"model": {"hidden_size": 64}})
    assert any(problem.startswith("model.num_layers: missing (transformer blocks)") for problem in problems)
    assert any(problem.startswith("data: missing") for problem in problems)


def test_all_problems_at_once(tmp_path, small):
    small["model"] |= {"hidden_size": 65, "num_layer": 3, "num_layers": "two", "drop_rate": 0.1}
    small["data"] |= {"type": "tokenized", "train_folder": str(tmp_path / "nowhere")}
    small["parallel"] = {"weight": {"size": 4}, "zero1": {"size": 6}}
    problems = problems_of(small)
    for expected in (
        "model.num_layer: unknown key; did you mean model.num_layers?",
        "model.num_layers = 'two': str; expected int > 0",
        "65 = 16 * 4 + 1",
        "no such folder",
        "model.drop_rate = 0.1",
        "6 = 1 * 4 + 2",
    ):
        assert any(expected in problem for problem in problems), (expected, problems)
    assert len(problems) == 6, problems


def test_a_config_is_read_only(small):
    config = load_config(small)
    with pytest.raises(ValidationError):
        config.adam.lr = 1.0
    with pytest.raises(ValidationError):
        Config(model={}, data={}, bogus=1)


def test_validation_without_data_is_told(small, caplog):
    with caplog.at_level(logging.INFO, logger="internlm"):
        load_config(small, ["data.valid_every=37"])
    assert "data.valid_every = 37 has no effect" in caplog.text
