"""Requests that share a model get what each would get alone."""

import threading

import pytest
import torch

from internlm.apis.batching import Batcher, BusyError
from internlm.apis.generate import generate
from internlm.apis.sampling import Sampling
from internlm.model.transformer import Transformer
from internlm.utils.errors import UserError
from tests.checkpoint.hf_models import tiny_run

PROMPTS = [[1, 5, 9, 12, 33, 2, 41], [1], [1, 60, 3], [7, 7], [1, 2, 3, 4]]
SAMPLINGS = [Sampling(), Sampling(temperature=1.0, top_p=0.9), Sampling(repetition_penalty=1.3), Sampling(), Sampling()]


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Made for longer answers than a test waits for."""
    model = tiny_run("internlm2")[1].requires_grad_(False)
    model.config = model.config.model_copy(update={"max_position_embeddings": 10_000})
    return model


@pytest.mark.parametrize("num_rows", [1, 3])
def test_together_as_alone(model: Transformer, num_rows: int) -> None:
    """More requests than rows, of different lengths, settings and limits, from threads of their own."""
    limits = [30, 7, 19, 1, 25]
    expected = [
        generate(model, [prompt], limit, sampling, stop_ids=[3], seed=seed)[0]
        for seed, (prompt, limit, sampling) in enumerate(zip(PROMPTS, limits, SAMPLINGS, strict=True))
    ]
    found: list[list[int]] = [[] for _ in PROMPTS]
    with Batcher(model, num_rows, max_length=40) as batcher:

        def ask(index: int) -> None:
            found[index] = list(batcher.stream(PROMPTS[index], limits[index], SAMPLINGS[index], [3], seed=index))

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert found == expected


def test_rows_are_decoded_together(model: Transformer) -> None:
    """Two answers of 20 tokens take about 20 steps and not 40."""
    steps = []
    handle = model.embedding.register_forward_hook(lambda module, given, out: steps.append(len(out)))
    with Batcher(model, 2, max_length=40) as batcher:
        answers = [batcher.stream([1], 20), batcher.stream([2], 20)]
        assert [len(list(answer)) for answer in answers] == [20, 20]
    handle.remove()
    assert len(steps) <= 30


def test_a_closed_answer_frees_its_row(model: Transformer) -> None:
    with Batcher(model, 1, max_length=10_000) as batcher:
        endless = batcher.stream([1], 9_000)
        next(endless)
        endless.close()  # type: ignore[attr-defined]
        assert len(list(batcher.stream([2], 3))) == 3  # long before 9000 tokens


def test_a_queue_has_an_end(model: Transformer) -> None:
    with Batcher(model, 1, max_length=10_000, max_waiting=1) as batcher:
        endless = batcher.stream([1], 9_000)
        next(endless)
        waiting = batcher.stream([2], 3)
        with pytest.raises(BusyError, match="2 requests are being answered or wait already"):
            batcher.stream([3], 3)
        endless.close()  # type: ignore[attr-defined]
        assert len(list(waiting)) == 3


def test_without_a_queue_free_rows_answer(model: Transformer) -> None:
    with Batcher(model, 2, max_length=10_000, max_waiting=0) as batcher:
        for _ in range(20):
            assert len(list(batcher.stream([2], 2))) == 2
        endless = [batcher.stream([1], 9_000) for _ in range(2)]
        with pytest.raises(BusyError, match="2 requests are being"):
            batcher.stream([3], 3)
        endless[0].close()
        assert len(list(batcher.stream([3], 3))) == 3


def test_who_left_gives_his_place_back(model: Transformer) -> None:
    """Also where another thread waits for the first token: it comes back."""
    with Batcher(model, 1, max_length=10_000, max_waiting=1) as batcher:
        endless = batcher.stream([1], 9_000)
        next(endless)
        waiting = batcher.stream([2], 3)
        found: list[list[int]] = []
        reader = threading.Thread(target=lambda: found.append(list(waiting)))
        reader.start()
        waiting.close()
        reader.join(60)
        assert found == [[]]
        batcher.stream([3], 3).close()  # there is a place


def test_mistakes_are_named_at_once(model: Transformer) -> None:
    with Batcher(model, 1, max_length=20) as batcher:
        with pytest.raises(UserError, match="15 tokens of prompt and 6 of answer are 21, the limit is 20"):
            batcher.stream([1] * 15, 6)
        with pytest.raises(UserError, match="token id 67"):
            batcher.stream([67], 6)
        with pytest.raises(UserError, match="max_new_tokens=0"):
            batcher.stream([1], 0)


def test_a_failure_ends_its_answers_and_not_the_worker(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Batcher(model, 1, max_length=40) as batcher:

        def fail(*_: object) -> None:
            raise torch.OutOfMemoryError("no memory left")

        with monkeypatch.context() as patched:
            patched.setattr(model, "decode", fail)
            with pytest.raises(RuntimeError, match="broken off: no memory left"):
                list(batcher.stream([1], 5))
        assert list(batcher.stream([1], 5)) == generate(model, [[1]], 5)[0]


def test_one_failing_request_leaves_the_others(model: Transformer) -> None:
    class Broken(Sampling):
        def choose(self, *_: object) -> torch.Tensor:
            raise ValueError("no such probability")

    with Batcher(model, 2, max_length=40) as batcher:
        answer = batcher.stream([1], 30)
        first = next(answer)
        with pytest.raises(RuntimeError, match="broken off: no such probability"):
            list(batcher.stream([2], 5, Broken()))
        assert [first, *answer] == generate(model, [[1]], 30)[0]


def test_closing_ends_answers_with_an_error(model: Transformer) -> None:
    batcher = Batcher(model, 1, max_length=10_000)
    endless = batcher.stream([1], 9_000)
    next(endless)
    batcher.close()
    with pytest.raises(RuntimeError, match="was closed"):
        list(endless)
    with pytest.raises(RuntimeError, match="is closed"):
        batcher.stream([1], 5)
