"""Scores of a native model equal those of its export under the harness's own `hf` model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from internlm.apis.generate import open_model, read_model, tokenizer_of
from internlm.apis.harness import Scorer, harness_model
from internlm.checkpoint.native import NativeReader
from internlm.utils.errors import UserError
from tests.apis.tiny_chat import ANSWERS, COUNT, HELLO
from tests.apis.tiny_chat import write_native as write_checkpoint
from tests.checkpoint.test_hf_reader import edit
from tools.evaluate import main

CHOICES = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
"""


class Request:
    task_name = "mine"

    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture(scope="module")
def ours(chat_folder: Path) -> Any:
    reader = open_model(chat_folder.parent / "native")
    scorer = Scorer(read_model(reader, "cpu"), tokenizer_of(reader, chat_folder), max_length=100, row_tokens=120)
    return harness_model(scorer, num_rows=2)


@pytest.fixture(scope="module")
def theirs(chat_folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    # Without logits_cache: with it, a request that continues another one's context gets that one's score.
    made = HFLM(str(chat_folder), device="cpu", dtype="float32", batch_size=1, max_length=100, logits_cache=False)
    made.model.generation_config.eos_token_id = 2  # the checkpoint knows of no other end
    return made


def assert_scores_agree(found: Any, expected: Any) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=2e-3, rel=1e-5)


def test_loglikelihoods(ours: Any, theirs: Any) -> None:
    start = "<|im_start|>user\ncount<|im_end|>\n<|im_start|>assistant\n"
    pairs = [
        (start, "1 2 3"),
        (start + "1 2", " 3"),
        ("1 2 ", "3"),
        ("", "Hello"),
        ("<s>Hello", ", I am"),
        ("naïve 书", " 🦙"),
        (ANSWERS[COUNT] * 2, " and more"),  # beyond max_length: the beginning is cut off
    ]
    requests = [Request(*pair) for pair in pairs]
    found = ours.loglikelihood(requests)
    assert_scores_agree(found, theirs.loglikelihood(requests))
    assert [greedy for _, greedy in found][:2] == [True, True] and not all(greedy for _, greedy in found)


def test_rolling_loglikelihoods(ours: Any, theirs: Any) -> None:
    requests = [Request(text) for text in ("Hello, I am a tiny model.", ANSWERS[COUNT] * 3, "x")]
    expected = theirs.loglikelihood_rolling(requests)
    assert ours.loglikelihood_rolling(requests) == pytest.approx(expected, abs=2e-3, rel=1e-5)


def test_generation(ours: Any, theirs: Any) -> None:
    start = "<|im_start|>user\ncount<|im_end|>\n<|im_start|>assistant\n"
    settings = [
        {"until": ["\n"], "max_gen_toks": 12},
        {"until": [" 7", " 5"], "max_gen_toks": 60},
        {"until": [], "max_gen_toks": 8},
    ]
    requests = [Request(prompt, given) for given in settings for prompt in (start, start + "1 2 3", "Hello")]
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_stop_texts_that_overlap_or_are_control_tokens(ours: Any, theirs: Any) -> None:
    start = "<|im_start|>user\ncount<|im_end|>\n<|im_start|>assistant\n"
    hello = start.replace("count", "hello")
    theirs.model.generation_config.eos_token_id = 2  # so that <|im_end|> is none, but for `until`
    settings = [
        {"until": ["4", " 4"], "max_gen_toks": 30},
        {"until": [" 4", "4"], "max_gen_toks": 30},
        {"until": ["<|im_end|>"], "max_gen_toks": 60},
        {"until": "tiny", "max_completion_tokens": 40, "do_sample": None},
        {"until": [], "max_tokens": 7, "do_sample": False, "temperature": 0.7, "repetition_penalty": 1.3},
    ]
    requests = [Request(prompt, given) for given in settings for prompt in (start, hello)]
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests)
    assert (found[0], found[2]) == ("1 2 3 ", "1 2 3") and found[5] == ANSWERS[HELLO] and found[7].endswith("I am a ")


def test_settings_that_generation_lacks_are_refused(ours: Any) -> None:
    for given in ({"num_beams": 4, "max_gen_toks": 8}, {"min_p": 0.1, "num_beams": 1, "max_gen_toks": 8}):
        with pytest.raises(
            UserError, match=r"task mine asks for answers by generation_kwargs \{'(num_beams': 4|min_p)"
        ):
            ours.generate_until([Request("Hello", given)])


def test_a_context_may_have_no_tokens(ours: Any) -> None:
    """hf fails there; what it takes for an empty context is taken."""
    (found,) = ours._loglikelihood_tokens([(("\u200b", "Hello"), [], ours.tok_encode("Hello", False))])
    assert found == ours.loglikelihood([Request("", "Hello")])[0]


def test_texts_begin_with_the_token_that_is_named_for_it(chat_folder: Path, tmp_path: Path) -> None:
    """Also where nothing puts it before a text, as in Hugging Face folders that only name it."""
    from lm_eval.models.huggingface import HFLM

    folder = shutil.copytree(chat_folder, tmp_path / "hf")
    (folder / "special_tokens_map.json").unlink()
    edit(folder / "tokenizer.json", post_processor=None)
    edit(folder / "tokenizer_config.json", bos_token="<|im_start|>", add_bos_token=False)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=1, max_length=100)
    reader = open_model(folder)
    ours = harness_model(Scorer(read_model(reader, "cpu"), tokenizer_of(reader, folder), max_length=100))
    assert ours.prefix_token_id == theirs.prefix_token_id == theirs.tokenizer.bos_token_id
    assert ours.tok_encode("Hello") == theirs.tok_encode("Hello")
    requests = [Request("", "Hello, I am"), Request("Hello", ", I am")]
    assert_scores_agree(ours.loglikelihood(requests), theirs.loglikelihood(requests))


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], kind: str, rest: str) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, data=data, kind=kind) + rest)


def test_mistakes_are_found_before_the_model_is_read(
    chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rest = "doc_to_text: q\ndoc_to_target: a\nmetric_list: [{metric: acc}]\n"
    rows = [{"q": str(number), "a": "b"} for number in range(3)]
    write_task(tmp_path, "few", rows, "loglikelihood", f"{rest}fewshot_split: test\n")
    write_task(tmp_path, "beams", rows, "generate_until", f"{rest}generation_kwargs: {{num_beams: 2, until: [x]}}\n")
    for arguments, problem in (
        (["--tasks", ","], "--tasks ',' names none"),
        (["--tasks", "few", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--tasks", "few", "--row_tokens", "0"], "--row_tokens 0: must be at least 1"),
        (["--tasks", "few", "--num_fewshot", "-1"], "--num_fewshot -1: must be at least 0"),
        (["--tasks", "few", "--num_fewshot", "3"], "--num_fewshot 3: task few has 2 examples"),
        (["--tasks", "few", "--output", str(tmp_path)], "is a folder; give the file to write"),
        (["--tasks", "beams"], "task beams asks for answers by generation_kwargs {'num_beams': 2}, which"),
    ):
        assert main([str(chat_folder), "--include_path", str(tmp_path), "--device", "cpu", *arguments]) == 2
        assert problem in capsys.readouterr().err
    command = [str(chat_folder), "--include_path", str(tmp_path), "--device", "cpu", "--tasks", "few"]
    assert main([*command, "--num_fewshot", "2"]) == 0


def test_questions_as_conversations(chat_folder: Path, tmp_path: Path) -> None:
    """In the model's chat template, with examples and a system text, against the harness by itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    said = [{"q": question, "a": ANSWERS[question], "choices": list(ANSWERS.values())} for question in ANSWERS]
    write_task(
        *(tmp_path, "said", said, "generate_until"),
        "doc_to_text: q\ndoc_to_target: a\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: [], max_gen_toks: 40}\n",
    )
    write_task(
        *(tmp_path, "chosen", said, "multiple_choice"),
        "doc_to_text: q\ndoc_to_target: a\ndoc_to_choice: choices\ngen_prefix: 'It says:'\n"
        "fewshot_split: test\nmetric_list: [{metric: acc}]\n",
    )
    for system, num_fewshot in ((None, 0), ("be brief", 1)):
        hf = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(chat_folder), "dtype": "float32", "max_length": 512},
            tasks=["said", "chosen"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            apply_chat_template=True,
            system_instruction=system,
            num_fewshot=num_fewshot,
            device="cpu",
        )
        for folder in (chat_folder, chat_folder.parent / "native"):
            output = tmp_path / "scores.json"
            command = [str(folder), "--tasks", "said,chosen", "--include_path", str(tmp_path), "--output", str(output)]
            command += ["--num_fewshot", str(num_fewshot), "--apply_chat_template", "--log_samples", "--device", "cpu"]
            assert main([*command, *(["--system_instruction", system] if system else [])]) == 0
            found = json.loads(output.read_text())
            for task in ("said", "chosen"):
                assert_samples_agree(found["samples"][task], hf["samples"][task])
            for task, measure in (("said", "exact_match,none"), ("chosen", "acc,none")):
                assert found["results"][task][measure] == hf["results"][task][measure]
        if system is None:
            assert found["results"]["said"]["exact_match,none"] >= 0.5  # as learnt


def test_a_chat_ends_its_answers_whatever_it_is_asked(chat_folder: Path, tmp_path: Path) -> None:
    """A run on conversations, asked in plain text: as its export, whose generation_config.json names the ends."""
    native = tmp_path / "native"
    reader = NativeReader(chat_folder.parent / "native")
    data = reader.config.data.model_copy(update={"type": "chat", "chat_template": "internlm2"})
    config = reader.config.model_copy(update={"data": data})
    write_checkpoint(native, config, read_model(reader, "cpu"))
    start = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    rows = [{"q": start.format(question), "a": answer} for question, answer in ANSWERS.items()]
    write_task(
        *(tmp_path, "plain", rows, "generate_until"),
        "doc_to_text: q\ndoc_to_target: a\nmetric_list: [{metric: exact_match}]\n"
        "generation_kwargs: {until: [], max_gen_toks: 60}\n",
    )
    texts = []
    for folder in (native, chat_folder):
        output = tmp_path / "scores.json"
        command = [str(folder), "--tasks", "plain", "--include_path", str(tmp_path), "--output", str(output)]
        assert main([*command, "--log_samples", "--device", "cpu"]) == 0
        texts.append([sample["filtered_resps"][0] for sample in json.loads(output.read_text())["samples"]["plain"]])
    assert texts[0] == texts[1] and texts[0][0] == ANSWERS[HELLO]


def assert_samples_agree(found: Any, expected: Any) -> None:
    assert len(found) == len(expected) == len(ANSWERS)
    for ours, theirs in zip(found, expected, strict=True):
        assert [given[0] for given in ours["arguments"]] == [given[0] for given in theirs["arguments"]]
        if "acc" in theirs:
            scores = [[float(score[0]) for score in sample["filtered_resps"]] for sample in (ours, theirs)]
            assert scores[0] == pytest.approx(scores[1], abs=2e-3, rel=1e-5)
        else:
            assert ours["filtered_resps"] == theirs["filtered_resps"]


def test_the_command(chat_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A task of one's own, on a checkpoint and on its export, against the harness by itself."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [{"q": f"{n} {n + 1}", "right": n % 2, "choices": [str(n + 5), str(n + 2)]} for n in range(1, 9)]
    write_task(
        *(tmp_path, "next_number", rows, "multiple_choice"),
        'doc_to_text: "{{q}}"\ndoc_to_target: right\ndoc_to_choice: choices\nmetric_list: [{metric: acc}]\n',
    )
    for length, problem in (("100000", "the model was made for 512"), ("1", "must be at least 2")):
        command = [str(chat_folder), "--tasks", "next_number", "--include_path", str(tmp_path), "--max_length", length]
        assert main(command) == 2 and problem in capsys.readouterr().err
    scores = []
    for folder in (chat_folder, chat_folder.parent / "native"):
        output = tmp_path / "scores.json"
        command = [str(folder), "--tasks", "next_number", "--include_path", str(tmp_path), "--output", str(output)]
        assert main([*command, "--device", "cpu"]) == 0
        assert "next_number" in capsys.readouterr().out
        scores.append(json.loads(output.read_text())["results"]["next_number"]["acc,none"])
    hf = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(chat_folder), "dtype": "float32"},
        tasks=["next_number"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
    )
    assert scores == [hf["results"]["next_number"]["acc,none"]] * 2
    assert 0 < scores[0] < 1
