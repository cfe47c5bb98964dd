"""Adapters that the peft library made: read, merged, trained on and exported with the logits of `PeftModel`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from internlm.apis.generate import load_model
from internlm.checkpoint.hf import HFReader, export_hf
from internlm.checkpoint.inputs import find_checkpoint_problems
from internlm.checkpoint.native import NativeReader
from internlm.checkpoint.peft import export_adapter
from internlm.model.batch import Batch, Segments
from internlm.utils.errors import UserError
from tests.checkpoint.runs import run_config, train
from tests.pool import run_ranks
from tools import convert2hf, convert_from_hf

pytest.importorskip("peft")

IDS = [1, 5, 9, 40, 3, 3, 7, 22]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # PEFT's config, and the lora section that goes on with it
    "all": (
        {"r": 2, "lora_alpha": 6, "target_modules": ALL},
        {"rank": 6, "alpha": 18.0, "target": ("*.attention.w*", "*.feed_forward.w*")},
    ),
    "some": (
        {"r": 3, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"rank": 6, "alpha": 6.0, "target": ("*.attention.wqkv", "*.feed_forward.w2")},
    ),
    "one layer, rslora": (
        {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["o_proj"], "layers_to_transform": [1]},
        {"rank": 4, "alpha": 12.0, "target": ("layers.1.attention.wo",)},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in the layout qwen2, and adapters of each kind."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("peft")
    run_ranks(1, train, run_config((1, 1, 1), 1, 1), folder / "native")
    reader = NativeReader(folder / "native")
    export_hf(reader.read, reader.config, folder / "base", dtype="float32")
    for seed, (kind, (settings, _)) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)  # B is random as well
        get_peft_model(base, lora).save_pretrained(folder / kind)
    return folder


def by_peft(folder: Path, adapter: Path) -> Tensor:
    """Logits with and without the adapter differ, so those with it say something."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    with torch.no_grad():
        alone = model(torch.tensor([IDS])).logits[0]
        logits: Tensor = PeftModel.from_pretrained(model, str(adapter))(torch.tensor([IDS])).logits[0]
    assert (logits - alone).abs().max() > 0.01
    return logits


def by_us(folder: Path) -> Tensor:
    row = torch.tensor(IDS)
    with torch.no_grad():
        return load_model(folder, "cpu")[0](Batch(row, row, torch.arange(len(IDS)), Segments.of((len(IDS),))))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def starting_at(adapter: Path, lora: dict[str, Any] | None, **sections: Any) -> Any:
    sections.setdefault("adam", {"lr": 0.0})
    start = {"load_ckpt_info": {"path": str(adapter), "ckpt_type": "hf"}}
    return run_config((1, 1, 1), 1, 2, lora=lora, ckpt=start, **sections)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_computes_what_peft_computes(folder: Path, tmp_path: Path, kind: str) -> None:
    """Read for chat, merged into a Hugging Face folder and into a checkpoint, trained on, and exported again."""
    expected = by_peft(folder, folder / kind)
    close(by_us(folder / kind), expected)
    arguments = ["--src_folder", str(folder / kind), "--tgt_folder", str(tmp_path / "merged"), "--dtype", "float32"]
    assert convert2hf.main(arguments) == 0
    close(by_us(tmp_path / "merged"), expected)
    assert convert_from_hf.main(["--src", str(folder / kind), "--tgt", str(tmp_path / "native")]) == 0
    close(by_us(tmp_path / "native"), expected)

    lora = KINDS[kind][1]
    losses = run_ranks(1, train, starting_at(folder / kind, lora), tmp_path / "on")[0]["losses"]
    whole = starting_at(tmp_path / "merged", None)
    assert losses == pytest.approx(run_ranks(1, train, whole, tmp_path / "whole")[0]["losses"], rel=1e-5)
    close(by_us(tmp_path / "on"), expected)
    export_adapter(NativeReader(tmp_path / "on"), tmp_path / "again", str(folder / kind))
    again = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert again["base_model_name_or_path"] == str(folder / "base") and again["r"] == lora["rank"]
    close(by_peft(folder, tmp_path / "again"), expected)


def test_an_adapter_of_equal_starts_keeps_its_rank(folder: Path, tmp_path: Path) -> None:
    """Ours share A between q, k and v: what was exported goes on with the lora section that it was trained with."""
    lora = {"rank": 4, "alpha": 8.0}
    trained = starting_at(folder / "base", lora, adam={"lr": 0.05})
    run_ranks(1, train, trained, tmp_path / "first")
    export_adapter(NativeReader(tmp_path / "first"), tmp_path / "adapter", str(folder / "base"))
    close(by_us(tmp_path / "adapter"), by_us(tmp_path / "first"))
    from_files = run_ranks(1, train, starting_at(tmp_path / "adapter", lora, adam={"lr": 0.05}), tmp_path / "a")[0]
    load = {"load_ckpt_info": {"path": str(tmp_path / "first" / "checkpoints" / "2")}}
    trained = run_config((1, 1, 1), 1, 2, lora=lora, ckpt=load, adam={"lr": 0.05})
    assert run_ranks(1, train, trained, tmp_path / "b")[0]["losses"] == from_files["losses"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_every_layout_trains_on_an_adapter_as_one_rank(folder: Path, tmp_path: Path, interleaved: bool) -> None:
    """Rows and columns of zeros stay zero, so that projections of one piece keep PEFT's rank."""
    model, lora = {"qk_interleaved": interleaved}, KINDS["all"][1]
    sections = {"model": model, "adam": {"lr": 0.05, "weight_decay": 0.1}}
    expected = run_ranks(1, train, starting_at(folder / "all", lora, **sections), tmp_path / "1")[0]["losses"]
    convert2hf.main(["--src", str(folder / "all"), "--tgt", str(tmp_path / "merged"), "--dtype", "float32"])
    whole = run_ranks(1, train, starting_at(tmp_path / "merged", None, model=model), tmp_path / "whole")[0]["losses"]
    assert expected[0] == pytest.approx(whole[0], rel=1e-5)
    sections |= {"lora": lora, "ckpt": {"load_ckpt_info": {"path": str(folder / "all"), "ckpt_type": "hf"}}}
    found = run_ranks(2, train, run_config((2, 2, 2), 2, 2, **sections), tmp_path / "2")[0]["losses"]
    assert found == pytest.approx(expected, rel=1e-5) and expected[0] != expected[1]
    reader = NativeReader(tmp_path / "2")
    for name, rows in (("layers.0.attention.wo", 2), ("layers.0.attention.wqkv", 6), ("layers.1.feed_forward.w13", 4)):
        assert reader.read(f"{name}.lora_a").any(dim=1).sum() == rows


FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    ({"use_dora": True}, "use_dora = True: not computed here"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ({"a_feature_of_tomorrow": 1}, "a_feature_of_tomorrow = 1"),
    ({"r": 0}, "r = 0; expected a positive number"),
    ({"r": 4}, r"lora_A.weight is \[2, 16\], expected \[4, 16\]"),
    ({"base_model_name_or_path": "Qwen/Qwen2-7B"}, "names Qwen/Qwen2-7B as base .* write there where the base lies"),
    ({"base_model_name_or_path": None}, "names no model as base"),
]


@pytest.mark.parametrize(("change", "problem"), FEATURES)
def test_what_is_not_computed_is_refused_by_name(
    folder: Path, tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    shutil.copytree(folder / "all", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=problem):
        load_model(tmp_path / "adapter", "cpu")


def test_tensors_without_a_place_are_refused(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    get_peft_model(base, LoraConfig(target_modules=["q_proj", "lm_head"])).save_pretrained(tmp_path / "head")
    with pytest.raises(UserError, match=r"lm_head\.lora_A\.weight.* belong to no projection"):
        HFReader(tmp_path / "head")
    shutil.copytree(folder / "all", tmp_path / "old")
    (tmp_path / "old" / "adapter_model.safetensors").rename(tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.safetensors is missing; in pickles"):
        HFReader(tmp_path / "old")
    shutil.copytree(folder / "base", tmp_path / "both")
    shutil.copy(folder / "all" / "adapter_config.json", tmp_path / "both")
    with pytest.raises(UserError, match="holds both a model and an adapter"):
        HFReader(tmp_path / "both")
    assert convert2hf.main(["--src", str(folder / "all"), "--tgt", str(tmp_path / "x"), "--adapter"]) == 2


def test_tokenizer_and_template_are_those_beside_the_adapter_or_of_its_base(folder: Path, tmp_path: Path) -> None:
    assert HFReader(folder / "all").text_folder == str(folder / "base")
    shutil.copytree(folder / "all", tmp_path / "adapter")
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    reader = HFReader(tmp_path / "adapter")
    assert (reader.folder, reader.text_folder) == (str(folder / "base"), str(tmp_path / "adapter"))


def test_another_lora_section_is_refused_and_the_right_one_told(folder: Path) -> None:
    for lora in (None, {"rank": 2, "alpha": 6.0}, {**KINDS["all"][1], "alpha": 6.0}, KINDS["some"][1]):
        (problem,) = find_checkpoint_problems(starting_at(folder / "all", lora))
        assert "{'rank': 6, 'alpha': 18.0, 'target': ('*.attention.wo', '*.attention.wqkv', '*.feed_forward" in problem
    assert find_checkpoint_problems(starting_at(folder / "all", KINDS["all"][1])) == []
    for kind in ("all", "base"):
        load = {"load_ckpt_info": {"path": str(folder / kind)}}
        (problem,) = find_checkpoint_problems(run_config((1, 1, 1), 1, lora={}, ckpt=load))
        assert "is a Hugging Face folder: set ckpt.load_ckpt_info.ckpt_type=hf" in problem
    (problem,) = find_checkpoint_problems(starting_at(folder / "one layer, rslora", None))
    assert "'alpha': 12.0, 'target': ('layers.1.attention.wo',)" in problem
