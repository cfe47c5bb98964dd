"""configs/demo_sft.py in a shortened form: a smaller model on the first questions learns to answer them."""

import shutil
import subprocess
import sys
from pathlib import Path

import internlm
from internlm.data.chat_template import BUILT_IN
from internlm.data.records import Conversation, parse_line, record_of
from internlm.data.tokenizer import open_tokenizer
from tests.house.pages import ROOT, environment

FEW = 12  # questions, of four answers: one row
SMALL = ("model.num_layers=2", "model.hidden_size=128", "data.total_steps=60", "ckpt.checkpoint_every=60")


def test_it_learns_to_answer(tmp_path: Path) -> None:
    lines = (ROOT / "configs" / "demo_sft" / "train" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.jsonl").write_text("\n".join(lines[:FEW]), encoding="utf-8")
    command = [sys.executable, str(ROOT / "train.py"), "--config", "configs/demo_sft.py", "--run_dir", tmp_path / "run"]
    few = (f"data.train_folder={tmp_path / 'data'}", "data.valid_folder=None")
    env = {**environment(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([*command, *SMALL, *few], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model, _ = internlm.load_model(tmp_path / "run")
    tokenizer = open_tokenizer(ROOT / "configs" / "demo_sft" / "tokenizer.model")
    end = tokenizer.id_of("<|im_end|>")
    assert end is not None
    records = [record_of(parse_line(line)) for line in lines[:FEW]]
    talks = [record.messages for record in records if isinstance(record, Conversation)]
    prompts = [tokenizer.encode(BUILT_IN["chatml"].render(talk[:1], add_generation_prompt=True)) for talk in talks]
    answers = internlm.generate(model, prompts, max_new_tokens=50, stop_ids=[end])
    texts = [tokenizer.decode(answer) for answer in answers]
    right = sum(text == talk[1].content + "<|im_end|>" for text, talk in zip(texts, talks, strict=True))
    assert right >= FEW - 1, texts
    shutil.rmtree(tmp_path / "run")
