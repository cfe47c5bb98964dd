"""Generation equal to transformers' on the export, for any mix of prompt lengths."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from internlm.apis import generate as generate_module
from internlm.apis.generate import generate, load_model, stream
from internlm.apis.sampling import Sampling
from internlm.checkpoint.hf import export_hf
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from tests.checkpoint.hf_models import CASES, named, tiny_run

PROMPTS = [[1, 5, 9, 12, 33, 2, 41], [1], [1, 60, 3]]


@pytest.fixture
def model() -> Transformer:
    return tiny_run("internlm2")[1].requires_grad_(False)


@pytest.mark.parametrize(
    ("case", "penalty"), [*((case, 1.0) for case in CASES), ("internlm", 1.3), ("qwen2_tied", 1.3)]
)
def test_greedy_equals_transformers(case: str, penalty: float, tmp_path: Path) -> None:
    config, model = tiny_run(case)
    export_hf(named(model), config, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = generate(model.requires_grad_(False), PROMPTS, 64, Sampling(repetition_penalty=penalty))
    for prompt, output in zip(PROMPTS, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, repetition_penalty=penalty, pad_token_id=0
        )
        assert [*prompt, *output] == expected[0].tolist()
    # not one token over and over, as an untrained model does whose head is its embedding
    assert len(set(ours[0])) > 5 or config.model.tie_word_embeddings


@pytest.mark.parametrize("case", CASES)
def test_load_model_computes_the_same(case: str, tmp_path: Path) -> None:
    config, model = tiny_run(case)
    export_hf(named(model), config, tmp_path)
    loaded, loaded_config = load_model(tmp_path, "cpu")
    assert loaded_config.num_layers == 2
    assert generate(loaded, PROMPTS, 20) == generate(model.requires_grad_(False), PROMPTS, 20)
    half, half_config = load_model(tmp_path, "cpu", torch.bfloat16)
    assert half_config.dtype == "torch.bfloat16"
    dtypes = {parameter.dtype for name, parameter in half.named_parameters() if "router" not in name}  # may be fp32
    assert dtypes == {torch.bfloat16}
    assert len(generate(half, PROMPTS, 5)[2]) == 5


def test_a_prompt_does_not_feel_its_neighbours(model: Transformer) -> None:
    together = generate(model, PROMPTS, 30, Sampling(repetition_penalty=1.2))
    assert together == [generate(model, [prompt], 30, Sampling(repetition_penalty=1.2))[0] for prompt in PROMPTS]


def test_a_long_prompt_is_fed_in_pieces(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [torch.randint(67, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (21, 4, 9, 8)]
    whole = generate(model, prompts, 15)
    monkeypatch.setattr(generate_module, "_PREFILL", 4)
    assert generate(model, prompts, 15) == whole


def test_stop_ids_end_a_row_alone(model: Transformer) -> None:
    free = generate(model, PROMPTS, 30)
    stop = free[0][4]
    stopped = generate(model, PROMPTS, 30, stop_ids=[stop, 66_000_000])
    for output, whole in zip(stopped, free, strict=True):
        assert output == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    assert len(stopped[0]) <= 5


def test_stream_yields_what_generate_collects(model: Transformer) -> None:
    sampling = Sampling(temperature=1.0, top_p=0.9)
    steps = list(stream(model, PROMPTS, 12, sampling, stop_ids=[3, 4, 5], seed=2))
    rows = [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
    assert rows == generate(model, PROMPTS, 12, sampling, stop_ids=[3, 4, 5], seed=2)
    for row in zip(*steps, strict=True):  # None only after the end
        end = row.index(None) if None in row else len(row)
        assert all(token is None for token in row[end:])


def test_a_stream_starts_before_it_ends(model: Transformer) -> None:
    tokens = stream(model, [[1]], 255)
    first = [next(tokens)[0] for _ in range(3)]
    assert first == generate(model, [[1]], 3)[0]


def test_a_seed_repeats_and_another_differs(model: Transformer) -> None:
    hot = Sampling(temperature=2.0)
    state = torch.get_rng_state()
    first = generate(model, PROMPTS, 20, hot, seed=1)
    assert first == generate(model, PROMPTS, 20, hot, seed=1)
    assert first != generate(model, PROMPTS, 20, hot, seed=2)
    assert torch.equal(state, torch.get_rng_state())  # the global stream is left alone


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([], 5, "no prompt"),
        ([[1], []], 5, "prompt 1 is empty"),
        ([[1, 67]], 5, "token id 67, the model has ids 0 to 66"),
        ([[1]], 0, "max_new_tokens=0"),
        ([[1], [1, 2, 3]], 254, "prompt 1 has 3 tokens, its answer 254 at most: the model was made for 256"),
    ],
)
def test_mistakes_are_named(model: Transformer, prompts: list[list[int]], max_new_tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        stream(model, prompts, max_new_tokens)
