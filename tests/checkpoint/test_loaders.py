"""Other programs' own checks of exports; each is skipped where the program is not installed.

LMDeploy: its Python package alone, without a GPU. llama.cpp: LLAMA_CPP names a folder with convert_hf_to_gguf.py and
gguf-py, such as the source of llama-cpp-python holds in vendor/llama.cpp.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from internlm.checkpoint.hf import export_hf
from tests.checkpoint.hf_models import named, tiny_run

LAYOUTS = [
    ("internlm", None),
    ("internlm2", "internlm2"),
    ("internlm2", "internlm3"),
    ("llama3.1", None),
    ("qwen2", None),
    ("qwen3", None),
    ("mixtral", None),
    ("qwen3_moe", None),
]


def export(case: str, arch: str | None, folder: Path, **options: object) -> None:
    config, model = tiny_run(case, hidden_size=64, head_dim=16, intermediate_size=96, **options)  # type: ignore[arg-type]
    export_hf(named(model), config, folder, arch)


@pytest.mark.parametrize(("case", "arch"), LAYOUTS)
def test_lmdeploy_knows_the_architecture(case: str, arch: str | None, tmp_path: Path) -> None:
    pytest.importorskip("lmdeploy")
    from lmdeploy.archs import get_model_arch
    from lmdeploy.pytorch.models.module_map import MODULE_MAP
    from lmdeploy.turbomind.supported_models import is_supported

    export(case, arch, tmp_path)
    name, _ = get_model_arch(str(tmp_path))
    assert name in MODULE_MAP and is_supported(str(tmp_path))


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no folder of llama.cpp")
def test_llama_cpp_converts_biases_too(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """It puts query and key rows of a head into even/odd order, and keeps all values."""
    source = Path(os.environ["LLAMA_CPP"])
    config, model = tiny_run("internlm", vocab_size=512, hidden_size=64, head_dim=16, intermediate_size=96)
    export_hf(named(model), config, tmp_path / "hf", tokenizer=tiny_tokenizer)
    target = tmp_path / "model.gguf"
    command = [
        sys.executable,
        source / "convert_hf_to_gguf.py",
        tmp_path / "hf",
        "--outfile",
        target,
        "--outtype",
        "f32",
    ]
    subprocess.run(command, check=True, capture_output=True)
    sys.path.insert(0, str(source / "gguf-py"))
    from gguf import GGUFReader

    found = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in GGUFReader(target).tensors}
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert len(found) == len(ours)
    for kind in ("weight", "bias"):
        q = ours[f"model.layers.1.self_attn.q_proj.{kind}"]
        moved = q.view(4, 2, 8, -1).transpose(1, 2).reshape(q.shape)
        assert torch.equal(found[f"blk.1.attn_q.{kind}"], moved)
        assert torch.equal(found[f"blk.1.attn_output.{kind}"], ours[f"model.layers.1.self_attn.o_proj.{kind}"])
    assert torch.equal(found["output.weight"], ours["lm_head.weight"])
