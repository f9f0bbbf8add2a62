"""Chat templates: rendering, malformed conversations, and templates that attack."""

import time
from datetime import datetime

import pytest

from jaxinfer.chat_template import MAX_MESSAGES, ChatTemplate
from jaxinfer.errors import InvalidRequestError, TokenizerError
from jaxinfer.tokenizer import from_gguf

TEMPLATE = (
    "{% for m in messages %}\n<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = [{"role": "user", "content": "Hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)


def test_default_model_renders_as_its_template_says(default_tokenizer):
    text = default_tokenizer.apply_chat_template(USER)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = default_tokenizer.encode(text, add_special_tokens=False)
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_rendering_equals_transformers(default_metadata, tmp_path):
    """The same template, the same conversations, the same text."""
    tokenizers = pytest.importorskip("transformers")
    backend = from_gguf(default_metadata).backend
    theirs = tokenizers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|im_start|>")
    sources = [
        default_metadata["tokenizer.chat_template"],
        TEMPLATE,
        "{{ bos_token }}{{ messages | tojson }}{{ tools | tojson(indent=2) }}",
        "{%- for m in messages -%}\n  {%- if loop.index > 1 %}{% break %}{% endif %}\n  "
        "{{- m['content'].split(' ')[0] | upper }}\n{%- endfor %}",
        "{% macro f(x) %}[{{ x }}]{% endmacro %}{% set ns = namespace(n=0) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m.content) }}{% endfor %}{{ ns.n }}"
        "{% generation %}out{% endgeneration %}{% for i in range(3) %}{{ i }}{% endfor %}",
    ]
    messages = [*USER, {"role": "assistant", "content": "<b> \u00e9 'q' & \"x\""}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    for source in sources:
        for prompt in (True, False):
            ours = ChatTemplate(source, {"bos_token": "<|im_start|>"}).render(
                messages, add_generation_prompt=prompt, tools=tools
            )
            assert ours == theirs.apply_chat_template(
                messages,
                chat_template=source,
                add_generation_prompt=prompt,
                tools=tools,
                tokenize=False,
            )


def test_message_text_is_never_evaluated():
    text = "{{ 7*7 }}{% for x in y %}{# no #}"
    assert f"<user>{text}</user>" in render(TEMPLATE, [{"role": "user", "content": text}])


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "<user>ab</user>" in render(TEMPLATE, [{"role": "user", "content": parts}])


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        (None, "messages"),
        ("hi", "messages"),
        ([], "messages"),
        (USER * (MAX_MESSAGES + 1), "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([*USER, {"role": "root", "content": "x"}], "messages[1].role"),
        ([{"role": 5, "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ],
)
def test_malformed_messages(messages, where):
    with pytest.raises(InvalidRequestError) as caught:
        render(TEMPLATE, messages)
    assert caught.value.param == where and where in str(caught.value)


def test_assistant_message_with_tool_calls_needs_no_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert "<assistant></assistant>" in render(TEMPLATE, [*USER, call])


def test_refusal_by_the_template_carries_its_text():
    source = "{% if messages[0].role != 'user' %}{{ raise_exception('x' * 900) }}{% endif %}ok"
    assert render(source) == "ok"
    with pytest.raises(InvalidRequestError, match=r"refuses these messages: x{500}$"):
        render(source, [{"role": "system", "content": "a"}])


def test_failure_in_the_template_is_a_request_error():
    with pytest.raises(InvalidRequestError, match="failed on these messages"):
        render("{{ messages[7].content.upper() }}")


def test_broken_templates():
    with pytest.raises(TokenizerError, match=r"m\.gguf.*not valid Jinja.*line 2"):
        ChatTemplate("a\n{% if %}", {}, "m.gguf")
    with pytest.raises(InvalidRequestError, match="chat_template is not valid Jinja"):
        ChatTemplate("{{", {}, request=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% set x = 9**(9**8) %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ '%1000000000d' % 1 }}",
        "{% for i in range(3000) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_templates_end_in_an_error(source):
    start = time.process_time()
    with pytest.raises((TokenizerError, InvalidRequestError)):
        render(source)
    assert time.process_time() - start < 5


def test_work_is_counted_per_rendering():
    template = ChatTemplate("{% for i in range(200000) %}{% endfor %}x", {})
    assert [template.render(USER) for _ in range(4)] == ["x"] * 4


def test_continue_final_message():
    messages = [*USER, {"role": "assistant", "content": "Once upon "}]
    text = render(TEMPLATE, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "<user>Hi</user>\n<assistant>Once upon "
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        render(TEMPLATE, messages, continue_final_message=True)
    with pytest.raises(InvalidRequestError, match="does not print"):
        render("x", messages, add_generation_prompt=False, continue_final_message=True)


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages", "_x", "a b", "range"])
def test_reserved_variables(name):
    with pytest.raises(InvalidRequestError, match="reserved"):
        render(TEMPLATE, variables={name: True})


def test_own_variables_tools_and_date():
    assert render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"
    assert render("{{ tools[0].name }}", tools=[{"name": "f"}]) == "f"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)
    with pytest.raises(InvalidRequestError, match="tools"):
        render(TEMPLATE, tools="f")


def test_no_template(bpe):
    tokenizer = from_gguf(bpe(pre="gpt-2"))
    assert tokenizer.chat_template is None
    with pytest.raises(InvalidRequestError, match="chat_template="):
        tokenizer.apply_chat_template(USER)
    assert tokenizer.apply_chat_template(USER, chat_template="{{ messages[0].content }}") == "Hi"
    tokenizer.chat_template = "set {{ messages[0].content }}"
    assert tokenizer.apply_chat_template(USER) == "set Hi"
