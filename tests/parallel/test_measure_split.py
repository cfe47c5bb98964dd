"""The cut of a pipeline by measured cost."""

from itertools import combinations, pairwise

import pytest

from internlm.core.launch import launch
from internlm.utils.errors import UserError
from tests.parallel.oracle import make_config
from tools import measure_split
from tools.measure_split import NUM_BLOCKS, main, measured_head, seconds_of, slowest, splits

COMMAND = ["--config", "configs/demo.py", "data.type=synthetic", "data.train_folder=None", "data.valid_folder=None"]
COMMAND += ["data.valid_every=0", "data.micro_num=4", "model.num_layers=9"]


def fake_times(monkeypatch: pytest.MonkeyPatch, block: float, head: float) -> None:
    monkeypatch.setattr(measure_split, "seconds_of", lambda _, count, *rest: block * (count + head))


@pytest.mark.parametrize("head", [0.0, 0.4, 1.6, 3.1])
def test_no_other_cut_has_a_faster_slowest_chunk(
    head: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_times(monkeypatch, 0.05, head)
    assert main([*COMMAND, "parallel.pipeline.size=4"]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    setting, _, numbers = shown.partition("=")
    assert setting == "parallel.pipeline.split"
    found = tuple(int(number) for number in numbers.strip("()").split(","))
    assert sum(found) == 9 and min(found) > 0
    cuts = (tuple(b - a for a, b in pairwise((0, *places, 9))) for places in combinations(range(1, 9), 3))
    assert slowest(found, head) == pytest.approx(min(slowest(sizes, head) for sizes in cuts))


def test_a_model_is_timed() -> None:
    """A few real steps; more blocks than the config has."""
    config = make_config({"pipeline": {"size": 2}}, model={"num_layers": 4})
    with launch() as world:
        assert seconds_of(config, NUM_BLOCKS[1], world, repeats=1) > 0
    assert splits(config, 1.2) == {"as configured": [2, 2], "flops": [2, 2], "measured": [3, 1]}


def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(COMMAND) == 2 and "there is nothing to split" in capsys.readouterr().err
    assert main([*COMMAND, "--repeats", "0", "parallel.pipeline.size=2"]) == 2
    fake_times(monkeypatch, 0.0, 1.0)
    with pytest.raises(UserError, match="took no longer"), launch() as world:
        measured_head(make_config(), world, 1)
