"""The demo itself, with a model and a number of steps that take seconds."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from internlm.utils.errors import UserError
from tests.house.pages import ROOT, environment
from tools.demo import check_figures

SMALL = (
    "model.num_layers=2",
    "model.hidden_size=64",
    "data.total_steps=24",  # 17 from where it is killed: a look at its files that comes late is early enough
    "data.valid_every=12",
    "ckpt.checkpoint_every=4",
)


def test_demo_goes_all_the_way(tmp_path: Path) -> None:
    run_dir = tmp_path / "demo"
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--run_dir", str(run_dir), *SMALL]
    done = subprocess.run(
        command, env=environment(ROOT), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    assert report["resumed"] is True
    assert 5000 < report["perplexity_before"] < 8000  # initial weights know nothing of the 6144 pieces
    assert report["perplexity_after"] < 0.9 * report["perplexity_before"]
    assert report["logits_max_diff"] < 1e-5
    assert report["tokens_per_second"] > 0 and report["seconds"] > 0
    assert (Path(report["hf_folder"]) / "config.json").exists()
    assert (run_dir / "loss.png").exists()


def test_a_job_that_went_wrong_is_no_success() -> None:
    good = {"resumed": True, "logits_max_diff": 1e-6, "perplexity_before": 6000.0, "perplexity_after": 300.0}
    check_figures(good, factor=10)
    for key, value in (("resumed", False), ("logits_max_diff", math.nan), ("perplexity_after", 601.0)):
        with pytest.raises(UserError):
            check_figures({**good, key: value}, factor=10)


def test_demo_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "--run_dir", str(tmp_path)]
    done = subprocess.run(command, env=environment(ROOT), capture_output=True, text=True)
    assert done.returncode == 2 and "not an earlier demo" in done.stdout
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"
