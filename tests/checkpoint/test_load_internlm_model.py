"""The 2023 helper: a folder in, text out while it is generated."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch

from internlm.utils.errors import UserError
from tests.checkpoint import folders_2023 as old
from tools.load_internlm_model import get_model_device, initialize_internlm_model, internlm_interactive_generation

MODEL = {
    "num_layers": old.LAYERS,
    "hidden_size": old.HIDDEN,
    "num_attention_heads": old.HEADS,
    "vocab_size": 512,
    "mlp_ratio": 1.5,
    "multiple_of": 16,
    "embed_split_hidden": True,
    "num_chunks": 1,
    "nonsense": 1,
}


def options(**changes: object) -> SimpleNamespace:
    defaults = {"max_length": 24, "do_sample": False, "temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.0}
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize("device", ["cpu"])
def test_text_grows(device: str, tiny_tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tests.checkpoint.test_legacy import of_transformers

    generation = old.V021.at(tp=2, pp=2)
    weights = old.random_weights(generation, vocab=512)
    old.write(tmp_path / "7", generation, weights)
    (tmp_path / "7" / "model_config.pt").unlink()
    with caplog.at_level("WARNING", "internlm"):
        path = f"local:{tmp_path / '7'}"
        model = initialize_internlm_model("INTERNLM", path, MODEL, True, param_dtype="torch.float32")
    assert "nonsense" in caplog.text and get_model_device(model) == torch.device(device) and not model.training
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tiny_tokenizer))
    texts = list(internlm_interactive_generation(model, tokenizer, "def f(", options(), [511]))

    rounded = {key: value.bfloat16().float() for key, value in weights.items()}
    theirs = of_transformers(generation, rounded)
    ids = [1, *tokenizer.encode("def f(")]
    found = theirs.generate(torch.tensor([ids]), max_length=24, do_sample=False, eos_token_id=[2, 511], pad_token_id=2)
    answer = [token for token in found[0, len(ids) :].tolist() if token not in (2, 511)]
    assert len(texts) == len(answer) and texts[-1] == tokenizer.decode(answer)
    assert len(list(internlm_interactive_generation(model, tokenizer, "x", options(do_sample=True, max_length=9)))) <= 9
    long = options(max_length=32768)  # as 2023's demo had it
    assert len(list(internlm_interactive_generation(model, tokenizer, "def f(", long))) < 2048
    with pytest.raises(UserError, match="leaves none for an answer"):
        list(internlm_interactive_generation(model, tokenizer, "def f(" * 9, options()))


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="AWS_ENDPOINT_URL"):
        initialize_internlm_model("INTERNLM", "boto3:s3://bucket.1.2.3.4/key", MODEL)
    with pytest.raises(UserError, match="is no checkpoint"):
        initialize_internlm_model("INTERNLM", f"local:{tmp_path}", MODEL)
