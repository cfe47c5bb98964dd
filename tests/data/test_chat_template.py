"""Chat templates against the prompts that the models' publishers give, and against transformers' renderer."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from internlm.data.chat_template import BUILT_IN, ChatTemplate
from internlm.data.find_template import find_template, template_of
from internlm.data.message import Message, ToolCall
from internlm.utils.errors import UserError

USER = [Message("user", "hi")]
TALK = [Message("user", "hi"), Message("assistant", "hello"), Message("user", "  bye\n")]
SYSTEM = [Message("system", "Be brief.")]
WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": WEATHER}]
CALL = ToolCall("weather", {"city": "上海"})
TOOL_TALK = [
    Message("user", "Weather?"),
    Message("assistant", "I will look.", tool_calls=(CALL,)),
    Message("tool", '{"temperature": 22}', name="weather"),
    Message("assistant", "22 degrees"),
]

# What the 2023 frameworks and the model cards write, for TALK and the next answer's start.
PROMPTS = {
    "internlm": "<s><|User|>:hi<eoh>\n<|Bot|>:hello<eoa>\n<|User|>:  bye\n<eoh>\n<|Bot|>:",
    "internlm1.1": "<s><|User|>:hi\n<|Bot|>:hello<eoa>\n<|User|>:  bye\n\n<|Bot|>:",
    "internlm2": "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    "<|im_start|>user\n  bye\n<|im_end|>\n<|im_start|>assistant\n",
    "chatml": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    "<|im_start|>user\n  bye\n<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nbye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen2": "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello<|im_end|>\n"
    "<|im_start|>user\n  bye\n<|im_end|>\n<|im_start|>assistant\n",
}
SYSTEM_PROMPTS = {
    "internlm1.1": "<s><|System|>:Be brief.\n<|User|>:hi\n<|Bot|>:",
    "internlm2": "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "qwen2": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
}
ANSWERS = {
    "internlm": ["hello<eoa>"],
    "internlm1.1": ["hello<eoa>"],
    "llama3": ["hello<|eot_id|>"],
}


@pytest.mark.parametrize("name", BUILT_IN)
def test_prompts_are_the_published_ones(name: str) -> None:
    template = BUILT_IN[name]
    assert template.render(TALK, add_generation_prompt=True) == PROMPTS[name]
    if name in SYSTEM_PROMPTS:
        assert template.render(SYSTEM + USER, add_generation_prompt=True) == SYSTEM_PROMPTS[name]
    text, spans, _ = template.write(TALK)
    assert [text[slice(*span)] for span in spans] == ANSWERS.get(name, ["hello<|im_end|>"])
    assert template.marks_answers and template.stop[0] in text


@pytest.mark.parametrize("name", BUILT_IN)
def test_transformers_renders_the_same(name: str) -> None:
    template = BUILT_IN[name]
    talks = [TALK, TALK[:2], *([SYSTEM + TALK] if name != "internlm" else [])]
    talks += [TOOL_TALK, TOOL_TALK[:2]] if name in ("internlm2", "qwen2") else []
    for talk in talks:
        tools = TOOLS if talk[0].content == "Weather?" else None
        turns = [message.as_dict() for message in talk]
        texts, spans = render_jinja_template(
            [turns],
            chat_template=template.source,
            tools=tools,
            return_assistant_tokens_mask=True,
            add_generation_prompt=False,
            **template.tokens,
        )
        assert template.write(talk, tools=tools)[:2] == (texts[0], [tuple(span) for span in spans[0]])
        plain = ChatTemplate("plain", template.plain_source, tokens=template.tokens)
        assert plain.render(talk, tools=tools) == texts[0] and not plain.marks_answers


def test_internlm2_tools_as_published() -> None:
    """The function call of InternLM's page on its chat format."""
    text, spans, _ = BUILT_IN["internlm2"].write(SYSTEM + TOOL_TALK, tools=TOOLS)
    listing = json.dumps([WEATHER], indent=4)
    assert text == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>system name=<|plugin|>\n{listing}\n<|im_end|>\n"
        "<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\nI will look.<|action_start|><|plugin|>\n"
        '{"name": "weather", "parameters": {"city": "上海"}}<|action_end|><|im_end|>\n'
        '<|im_start|>environment name=<|plugin|>\n{"temperature": 22}<|im_end|>\n'
        "<|im_start|>assistant\n22 degrees<|im_end|>\n"
    )
    assert len(spans) == 2
    code = ToolCall("interpreter", {"code": "1 + 1"})
    turns = [
        Message("system", "Run code.", name="interpreter"),
        Message("user", "[data.csv]", name="file"),
        Message("assistant", tool_calls=(code,)),
        Message("tool", "2", name="interpreter"),
    ]
    assert BUILT_IN["internlm2"].render(turns) == (
        "<s><|im_start|>system name=<|interpreter|>\nRun code.<|im_end|>\n"
        "<|im_start|>user name=file\n[data.csv]<|im_end|>\n"
        "<|im_start|>assistant\n<|action_start|><|interpreter|>\n```python\n1 + 1\n```<|action_end|><|im_end|>\n"
        "<|im_start|>environment name=<|interpreter|>\n2<|im_end|>\n"
    )
    other = ToolCall("interpreter", {"code": "1 + 1", "timeout": 5})  # has more to say than a block of code
    assert '<|plugin|>\n{"name": "interpreter", "parameters": {"code": "1 + 1", "timeout": 5}}' in BUILT_IN[
        "internlm2"
    ].render([Message("user", "a"), Message("assistant", tool_calls=(other,))])


@pytest.mark.parametrize("name", BUILT_IN)
def test_tools_are_written_or_refused(name: str) -> None:
    """Also by a template that names them, and leaves them out in this conversation."""
    talk = [Message("user", "a"), Message("assistant", "b")]
    if "tools" in BUILT_IN[name].source:
        assert TOOLS[0]["function"]["name"] in BUILT_IN[name].render(talk, tools=TOOLS)
    else:
        with pytest.raises(UserError, match=r"writes no tools.*internlm2 and qwen2 do"):
            BUILT_IN[name].render(talk, tools=TOOLS)
    assert BUILT_IN[name].render(talk, tools=[]) == BUILT_IN[name].render(talk)
    late = ChatTemplate("late", "{% if tools and messages|length > 2 %}{{ tools }}{% endif %}{{ messages[0].content }}")
    with pytest.raises(UserError, match="chat template late writes no tools"):
        late.render(talk, tools=TOOLS)
    only = ChatTemplate("only", "{% if not tools %}{{ raise_exception('tools?') }}{% endif %}{{ messages[0].content }}")
    assert only.render(talk, tools=TOOLS) == "a"


def test_qwen2_tools_as_published() -> None:
    text = BUILT_IN["qwen2"].render(TOOL_TALK, tools=TOOLS, add_generation_prompt=True)
    head, talk = text.split("<|im_end|>\n", 1)
    form = '{"name": <function-name>, "arguments": <args-json-object>}'
    assert head.endswith(f"XML tags:\n<tool_call>\n{form}\n</tool_call>")
    assert f"<tools>\n{json.dumps(TOOLS[0])}\n</tools>" in head
    assert talk == (
        "<|im_start|>user\nWeather?<|im_end|>\n<|im_start|>assistant\nI will look.\n<tool_call>\n"
        '{"name": "weather", "arguments": {"city": "上海"}}\n</tool_call><|im_end|>\n'
        '<|im_start|>user\n<tool_response>\n{"temperature": 22}\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n22 degrees<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content + 1 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_templates_are_sandboxed(source: str) -> None:
    with pytest.raises(UserError, match="chat template crafted"):
        ChatTemplate("crafted", source).render(TALK)


def test_a_broken_template_names_the_line() -> None:
    with pytest.raises(UserError, match="chat template mine, line 2"):
        ChatTemplate("mine", "hello\n{% if %}")
    for name in ("internlm", "internlm1.1", "chatml", "llama3"):
        with pytest.raises(UserError, match="no tool calls"):
            BUILT_IN[name].render(TOOL_TALK[:2])
    with pytest.raises(UserError, match="user and assistant turns only, not system"):
        BUILT_IN["internlm"].render(SYSTEM + USER)


def test_nobody_can_write_a_mark() -> None:
    template = BUILT_IN["chatml"]
    turn = "{% generation %}x{% endgeneration %}\x00"
    text, spans, _ = template.write([Message("user", turn), Message("assistant", "y")])
    assert turn in text and [text[slice(*span)] for span in spans] == ["y<|im_end|>"]


def write(folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_template_of_a_folder(tmp_path: Path) -> None:
    settings = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "added_tokens_decoder": {"7": {"content": "<|im_end|>"}},
    }
    folder = write(tmp_path / "own", tokenizer_config=settings, generation_config={"eos_token_id": [2, 7]})
    write(folder, tokenizer={"added_tokens": [{"id": 2, "content": "</s>"}]})
    template = template_of(folder)
    assert template.render(USER) == "<s>hi" and template.stop == ("</s>", "<|im_end|>")
    named = {"chat_template": [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]}
    assert template_of(write(tmp_path / "named", tokenizer_config=named)).render(USER) == "d"
    (folder / "chat_template.jinja").write_text("{{ messages|length }}")
    assert find_template(str(folder)).render(TALK) == "3"
    for kind, name in (("internlm", "internlm1.1"), ("internlm2", "internlm2"), ("qwen2", "qwen2")):
        assert template_of(write(tmp_path / kind, config={"model_type": kind})) is BUILT_IN[name]
    with pytest.raises(UserError, match="model_type 'llama' has no built-in one"):
        template_of(write(tmp_path / "llama", config={"model_type": "llama"}))
    with pytest.raises(UserError, match="neither built in"):
        find_template("chatlm")


def test_messages_from_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "上海"}'}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert Message.of(turn) == Message("assistant", tool_calls=(CALL,))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert Message.of({"role": "user", "content": parts, "weight": 0}) == Message("user", "ab", trained=False)
    for wrong, reason in (
        ("hi", "expected an object"),
        ({"role": "human", "content": ""}, 'role "human" is unknown'),
        ({"role": "user", "content": [{"type": "image_url"}]}, "list of parts"),
        ({"role": "user", "content": "", "weight": 0.5}, "expected true or false"),
        ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}, "tool call"),
        ({"role": "assistant", "content": "a", "function_call": {"name": "f"}}, 'earlier form of "tool_calls"'),
    ):
        with pytest.raises(UserError, match=reason):
            Message.of(wrong)
