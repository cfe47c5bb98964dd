"""A model of 0.3 M parameters that has learnt a few conversations by heart, as a Hugging Face folder."""

import json
from pathlib import Path

import sentencepiece
import torch

from internlm.checkpoint.commit import Save, commit, open_folder, write_rank
from internlm.checkpoint.hf import export_hf
from internlm.checkpoint.shards import key_of
from internlm.checkpoint.storage import Storage
from internlm.config.presets import PRESETS
from internlm.config.schema import Config, ModelConfig
from internlm.data.chat_template import BUILT_IN
from internlm.data.message import Message, ToolCall
from internlm.data.tokenizer import INTERNLM2_NAMES, open_tokenizer
from internlm.model.batch import IGNORE_INDEX, Batch, Segments
from internlm.model.transformer import Transformer
from tests.model.tiny import random_model

TEMPLATE = BUILT_IN["internlm2"]
HELLO, COUNT, CODE, HTML, WEATHER, PLOT = "hello", "count", "show code", "show html", "weather?", "plot"
ANSWERS = {
    HELLO: "Hello, I am a tiny model.",
    COUNT: " ".join(map(str, range(1, 60))),
    CODE: "Here:\n\n```python\nprint('it works')\n```\n",
    HTML: "<b>bold</b> <img src=x onerror=alert(1)> ![i](http://127.0.0.1:9/i.png)",
}
CALLS = {
    WEATHER: ToolCall("get_weather", {"city": "Shanghai"}),
    PLOT: ToolCall("interpreter", {"code": "print(6 * 7)"}),
}
# Imported by every Python process that finds it: a token takes long enough for an answer to be stopped.
SLOW = """
import time
from internlm.apis.sampling import Sampling
choose = Sampling.choose
Sampling.choose = lambda *given: (time.sleep(0.02), choose(*given))[1]
"""
SECOND = ("and again?", "Hello once more.")  # after HELLO


def conversations() -> list[list[Message]]:
    turns = {question: Message("assistant", answer) for question, answer in ANSWERS.items()}
    turns |= {question: Message("assistant", tool_calls=(call,)) for question, call in CALLS.items()}
    found = [[Message("user", question), answer] for question, answer in turns.items()]
    first = next(turns for turns in found if turns[0].content == HELLO)
    return [*found, [*first, Message("user", SECOND[0]), Message("assistant", SECOND[1])]]


def make_tokenizer(folder: Path) -> Path:
    texts = [turn.content for turns in conversations() for turn in turns] + [json.dumps(dict(CALLS[WEATHER].arguments))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines() if line] * 3),
        model_prefix=str(folder / "tiny"),
        vocab_size=384,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=list(INTERNLM2_NAMES),
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder / "tiny.model"


def make_chat_folder(folder: Path, steps: int = 120) -> Path:
    """Trains for a few seconds; `folder`/hf is the export, with the template in it, `folder`/native a checkpoint."""
    torch.manual_seed(0)
    tokenizer_file = make_tokenizer(folder)
    tokenizer = open_tokenizer(tokenizer_file)
    sizes = {"num_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "num_kv_attention_heads": 2}
    sizes |= {"intermediate_size": 192, "vocab_size": tokenizer.size, "max_position_embeddings": 512}
    model_config = ModelConfig(**{**PRESETS["INTERNLM2_PUBLIC"], **sizes, "dtype": "torch.float32"})
    model = random_model(model_config)
    train(model, [tokenizer.encode(TEMPLATE.render(turns)) for turns in conversations()], steps)
    data = {"seq_len": 64, "total_steps": 1, "tokenizer_path": str(tokenizer_file)}
    config = Config(model_type="INTERNLM2_PUBLIC", model=model_config, data=data)
    write_native(folder / "native", config, model)
    named = dict(model.named_parameters())
    export_hf(named.__getitem__, config, folder / "hf", dtype="float32", tokenizer=tokenizer_file, template=TEMPLATE)
    return folder / "hf"


def write_native(folder: Path, config: Config, model: Transformer) -> None:
    """A checkpoint of one rank, by the house's own writer."""
    storage, token = Storage(str(folder)), "token"
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    metadata = {"token": token, "step": "1", "shapes": json.dumps(shapes)}
    tensors = {
        key_of(name, "param", tuple((0, size) for size in parameter.shape)): parameter.detach()
        for name, parameter in model.named_parameters()
    }
    open_folder(storage, 1, token)
    save = Save(
        *(storage, 1, "normal", token, 0, {"ranks": 1}, {"model-00000.safetensors": tensors}, metadata),
        *({"config.json": config.model_dump_json(), "state.json": "{}"}, None, frozenset()),
    )
    write_rank(save)
    commit(save, timeout=10)


def train(model: Transformer, rows: list[list[int]], steps: int) -> None:
    tokens = torch.tensor([token for row in rows for token in row])
    ends = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    labels = tokens.roll(-1)
    labels[ends] = IGNORE_INDEX
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    batch = Batch(tokens, labels, positions, Segments.of(tuple(map(len, rows))), num_trained=len(tokens) - len(rows))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.mul_(0.2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = model.loss(batch).loss_sum / batch.num_trained
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2, f"the tiny model has not learnt its sentences: loss {loss:.3f}"
