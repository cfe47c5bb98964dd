"""On one GPU in 16 bits: fine-tuning that answers as it goes, its export, serving, DPO, LoRA on 4 bits.

The oracle is that the model has learnt the answers by heart: whoever reads it wrongly on the way says something else.
"""

import json
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from internlm.apis.chat import ReplyOptions, load_chat
from internlm.apis.sampling import Sampling
from internlm.data.message import Message
from tests.checkpoint.runs import global_tensors
from tools import convert2hf

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).resolve().parents[2]
FEW, STEPS = 12, 60  # questions, with four answers
SMALL = ("model.num_layers=2", "model.hidden_size=128", "model.dtype=torch.bfloat16", "monitor.enable_tb=False")
GREEDY = ReplyOptions(Sampling(), max_new_tokens=60)


@pytest.fixture(scope="module")
def talks() -> dict[str, str]:
    lines = (ROOT / "configs" / "demo_sft" / "train" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line)["messages"] for line in lines[:FEW]]
    return {question["content"]: answer["content"] for question, answer in pairs}


def others(talks: dict[str, str]) -> dict[str, str]:
    """To each question the answer of another."""
    answers = list(talks.values())
    return dict(zip(talks, answers[3:] + answers[:3], strict=True))


def run(folder: Path, records: list[dict[str, Any]], *options: object) -> list[dict[str, Any]]:
    """Trains in `folder`/run on `records`; what each step reported."""
    (folder / "data").mkdir()
    (folder / "data" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    places = (f"data.train_folder={folder / 'data'}", "data.valid_folder=None", f"data.total_steps={STEPS}")
    every = (*SMALL, *places, f"ckpt.checkpoint_every={STEPS}")
    arguments = ["--config", str(ROOT / "configs" / "demo_sft.py"), "--run_dir", str(folder / "run")]
    assert train.main([*arguments, *every, *map(str, options)]) == 0
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def turns(talks: dict[str, str]) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in talks.items()
    ]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, talks: dict[str, str]) -> Path:
    """A run, and its export in `hf`."""
    folder = tmp_path_factory.mktemp("tuned")
    asked = tuple(list(talks)[:2])
    run(folder, turns(talks), f"evaluation.prompts={asked}", f"evaluation.every={STEPS // 2}")
    command = ["--src", folder / "run" / "checkpoints", "--tgt", folder / "hf", "--dtype", "auto"]
    assert convert2hf.main([*map(str, command), "--chat_template", "chatml"]) == 0
    return folder


def test_the_model_in_training_answers(tuned: Path, talks: dict[str, str]) -> None:
    lines = [json.loads(line) for line in (tuned / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [STEPS // 2] * 2 + [STEPS] * 2
    assert all(line["text"] == talks[line["prompt"]] for line in lines[2:])


def answered(folder: Path, talks: dict[str, str]) -> int:
    """How many questions a folder's model answers as `talks` do, in a chat."""
    with load_chat(folder) as chat:
        assert chat.batcher.device.type == "cuda"
        texts = ["".join(chat.reply([Message("user", asked)], GREEDY)) for asked in talks]
    return sum(text == said for text, said in zip(texts, talks.values(), strict=True))


def test_chat_with_the_checkpoint_and_with_its_export(tuned: Path, talks: dict[str, str]) -> None:
    assert answered(tuned / "run", talks) >= FEW - 1
    assert answered(tuned / "hf", talks) >= FEW - 1


def test_transformers_answers_as_the_export_does(tuned: Path, talks: dict[str, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tuned / "hf", dtype="auto").cuda()
    tokenizer = AutoTokenizer.from_pretrained(tuned / "hf")
    right = 0
    for asked, said in talks.items():
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to("cuda")
        found = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
        right += tokenizer.decode(found, skip_special_tokens=True).removesuffix("<|im_end|>").strip() == said
    assert right >= FEW - 1


@contextmanager
def served(folder: Path, num_rows: int) -> Iterator[str]:
    """The address of an OpenAI server with the model of a folder."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("fastapi")
    from internlm.apis.openai_server import build_app

    with load_chat(folder, num_rows=num_rows) as chat, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # from here on clients wait
        server = uvicorn.Server(uvicorn.Config(build_app(chat), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1/chat/completions"
        finally:
            server.should_exit = True
            thread.join(20)


def test_requests_at_once_are_answered_together(tuned: Path, talks: dict[str, str]) -> None:
    with served(tuned / "hf", num_rows=5) as address, ThreadPoolExecutor(FEW) as pool:

        def ask(text: str) -> str:
            body = {"model": "hf", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 60}
            request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as reply:
                return str(json.load(reply)["choices"][0]["message"]["content"])

        texts = list(pool.map(ask, talks))
    assert sum(text == said for text, said in zip(texts, talks.values(), strict=True)) >= FEW - 1


def test_dpo_prefers_what_it_is_told(tuned: Path, tmp_path: Path, talks: dict[str, str]) -> None:
    pairs = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": said}],
            "rejected": [{"role": "assistant", "content": talks[asked]}],
        }
        for asked, said in others(talks).items()
    ]
    load = {"path": str(tuned / "hf"), "ckpt_type": "hf", "content": ("model",)}
    options = ("dpo.beta=0.1", "data.type=preference", "adam.lr=5e-4", "adam.weight_decay=0.0", "evaluation.every=0")
    lines = run(tmp_path, pairs, *options, "evaluation.prompts=()", f"ckpt.load_ckpt_info={load}")
    assert lines[0]["loss"] == pytest.approx(0.693147, abs=1e-4)  # the model is its own reference
    assert lines[-1]["loss"] < 0.1 and lines[-1]["acc"] == 1.0


def test_adapters_learn_on_a_base_in_4_bits(tuned: Path, tmp_path: Path, talks: dict[str, str]) -> None:
    library = pytest.importorskip("bitsandbytes.functional")
    new, start = others(talks), tuned / "run" / "checkpoints" / str(STEPS)
    options = ("lora.rank=16", "lora.alpha=32", "lora.base=nf4", "adam.lr=1e-2", "adam.weight_decay=0.0")
    quiet = ("evaluation.every=0", "evaluation.prompts=()")
    lines = run(tmp_path, turns(new), *options, *quiet, f"ckpt.load_ckpt_info={ {'path': str(start)} }")
    assert lines[-1]["loss"] < 0.1 * lines[0]["loss"]
    assert answered(tmp_path / "run", new) >= FEW - 2  # by the merged weights, in full precision
    before, after = (global_tensors(folder) for folder in (start, tmp_path / "run" / "checkpoints" / str(STEPS)))
    packed = [key for key in before if key[1] == "param" and fnmatch(key[0], "layers.*.w*.weight")]
    assert len(packed) == 2 * 4
    for key in packed:
        value, found = (torch.from_numpy(bits[key]).view(torch.bfloat16).cuda() for bits in (before, after))
        codes, state = library.quantize_4bit(value, blocksize=64, quant_type="nf4", compress_statistics=False)
        assert torch.equal(found, library.dequantize_4bit(codes, state).view_as(value)), key
