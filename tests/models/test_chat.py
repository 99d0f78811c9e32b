"""Chat templates: what `transformers` would ask, limits that hold, and settings that are no settings."""

from __future__ import annotations

import json

import pytest

from dynamo_jax.models import chat, template

ASK = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SAME = {
    "plain": ASK,
    "the answer's begin": ASK + "{% if add_generation_prompt %}[assistant]{% endif %}",
    "tools that are not none": "{% if tools != none %}[TOOLS]{% endif %}" + ASK,
    "tools as JSON": "{% if tools is not none %}{{ tools | tojson }}{% endif %}" + ASK,
    "tools defined": "{% if tools is defined %}defined{% endif %}" + ASK,
    "documents": "{{ documents is none }}{{ documents is defined }}" + ASK,
    "generation": "{% for m in messages %}{% generation %}[{{ m.role }}]{{ m.content }}{% endgeneration %}{% endfor %}",
    "generation with white space": "{% generation %}\n  {{ messages[0].content }}\n{% endgeneration %}\n|",
    "generation trimmed": "a\n{%- generation -%}\n b \n{%- endgeneration -%}\n c",
    "generation keeps what it sets": "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}[{{ x }}]",
    "generation sees a loop": "{% for m in messages %}{% generation %}{{ loop.index }}{% endgeneration %}{% endfor %}",
    "JSON": "{{ messages | tojson }}{{ 'ö' | tojson }}",
    "JSON in ASCII": "{{ 'ö' | tojson(ensure_ascii=True) }}{{ 'ö' | tojson(ensure_ascii=False) }}",
    "JSON indented": "{{ messages | tojson(indent=2) }}",
    "JSON sorted": "{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true, separators=(',', ':')) }}",
    "white space": "  {% if true %}\n  x\n  {% endif %}\ny\n",
    "break": "{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "continue": "{% for i in range(5) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
    "namespace": "{% set n = namespace(a=0) %}{% for i in range(4) %}{% set n.a = n.a + i %}{% endfor %}{{ n.a }}",
    "macro": "{% macro f(x) %}<{{ x | trim | upper }}>{% endmacro %}{{ f(messages[0].content) }}",
    "tokens": "{{ bos_token }}" + ASK + "{{ eos_token }}{{ pad_token }}",
    "date": "{{ strftime_now('%Y') | length }}",
    "slices": "{{ messages[0]['content'][::-1] }}{{ messages[1:] | length }}",
    "undefined": "{{ nothing }}{% if nothing is defined %}x{% endif %}" + ASK,
}


@pytest.mark.parametrize("case", SAME)
def test_a_template_asks_what_transformers_would(case):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    special, messages = {"bos_token": "<s>", "eos_token": "</s>"}, ["hi ö <b>", "two\nlines"]
    want = [
        utils.render_jinja_template(
            [[{"role": "user", "content": message}]],
            chat_template=SAME[case],
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **special,
        )[0][0]
        for message in messages
    ]
    assert template.rendered(SAME[case], [[chat.user(message)] for message in messages], special) == want


def test_a_template_in_its_own_process_is_the_same_one():
    source = SAME["generation"] + SAME["tokens"] + SAME["JSON in ASCII"]
    chats = [[chat.user(message)] for message in ("hi ö 🙂", "", "\ufffd" * 1000)]
    given = (source, chats, {"bos_token": "<s>"})
    assert template.run(*given) == template.rendered(*given)


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}" + (
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("last", ["The answer is", "The answer is ", "  The answer is", ""])
@pytest.mark.parametrize("content", ["m.content", "m.content | trim"])
def test_a_chat_of_several_turns_is_what_transformers_makes_of_it(last, content):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = TURNS.replace("m.content", content)
    messages = [{"role": "system", "content": "Be short."}, chat.user("2 + 2?"), {"role": "assistant", "content": last}]

    def theirs(messages, answering):
        options = {"add_generation_prompt": answering, "continue_final_message": not answering}
        return utils.render_jinja_template([messages], chat_template=source, **options)[0][0]

    files = {"chat_template.jinja": source.encode()}
    assert chat.chat_text(files, messages[:2]) == theirs(messages[:2], True)
    if last:
        assert chat.chat_text(files, messages, False) == theirs(messages, False)
    assert chat.chat_prompt(files, "hi") == chat.chat_text(files, [chat.user("hi")])


def test_a_chat_that_cannot_go_on_is_named():
    with pytest.raises(ValueError, match="the model has no chat template"):
        chat.chat_text({}, [chat.user("hi")])
    with pytest.raises(ValueError, match="does not show the last message"):
        chat.chat_text({"chat_template.jinja": b"no"}, [chat.user("hi")], False)
    with pytest.raises(ValueError, match="fails: no such role"):
        chat.chat_text({"chat_template.jinja": b"{{ raise_exception('no such role') }}"}, [chat.user("hi")])


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a long text": "{{ 'x' * 10**9 * 9 }}",
    "a large number": "{{ 10 ** (10 ** 9) % 3 }}",
    "a format": "{{ '%5000000000d' % 5 }}",
    "doubling": "{% set n = namespace(x='12345678') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "much text": "{% for i in range(99999) %}{% for j in range(99999) %}abcdefgh{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_template_that_would_not_end_or_fill_memory_is_stopped(case, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 2)
    with pytest.raises(ValueError, match=r"^chat_template\.jinja: the chat template fails: it .*--raw") as caught:
        chat.chat_prompt({"chat_template.jinja": ENDLESS[case].encode()}, "hi")
    assert len(str(caught.value)) < 1000


FAILING = {
    "division": "{{ 1 / 0 }}",
    "index": "{{ messages[7].content }}",
    "range": "{{ range(10**9) | length }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nesting": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "break outside": "{% break %}",
    "unknown tag": "{% nothing %}",
    "half a generation": "{% generation %}",
    "include": "{% include '/etc/passwd' %}",
    "a long complaint": "{{ raise_exception('a' * 10**7) }}",
    "no filter": "{{ 1 | nothing }}",
    "not JSON": "{{ nothing | tojson }}",
    "a class": "{{ ''.__class__.__mro__ }}",
    "assertion": "{{ messages | map(attribute=1, x=2) | list }}",
    "a digit too many": "{{ ('9' * 5000) | int + 1 }}{{ 10 ** 5000 }}",
}


@pytest.mark.parametrize("case", FAILING)
def test_whatever_a_template_raises_is_a_short_error(case):
    with pytest.raises(ValueError, match=r"^the chat template fails: .") as caught:
        template.rendered(FAILING[case], [[chat.user("hi")]], {})
    assert len(str(caught.value)) < 1000


def settings(**values):
    return {"tokenizer_config.json": json.dumps(values).encode()}


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("a", "a"),
        ({"default": "a", "tool_use": "b"}, "a"),
        ({"tool_use": "b"}, "b"),
        ([{"name": "x", "template": "b"}, {"name": "default", "template": "a"}], "a"),
        (None, None),
        ([], None),
        ({}, None),
    ],
)
def test_a_template_may_have_a_name(value, want):
    found = chat.chat_template(settings(chat_template=value))
    assert (found and found.source) == want


@pytest.mark.parametrize(
    "value", [1, True, [1], ["x"], [{"name": 1, "template": "a"}], [{}], {"default": 3}, {"a": "x", "b": "y"}, [[]]]
)
def test_something_else_than_templates_is_named(value):
    with pytest.raises(ValueError, match=r"^tokenizer_config\.json: chat_template "):
        chat.chat_prompt(settings(chat_template=value), "hi")


def test_files_that_cannot_be_read_are_named():
    with pytest.raises(ValueError, match=r"^chat_template\.jinja: not UTF-8 at byte 3"):
        chat.chat_prompt({"chat_template.jinja": b"caf\xe9"}, "hi")
    for content in (b"{", b"[" * 100_000, b'{"a": ' * 100_000, b"\xff", b"9" * 5000, b""):
        with pytest.raises(ValueError, match=r"^tokenizer_config\.json: not JSON"):
            chat.chat_prompt({"tokenizer_config.json": content}, "hi")
        with pytest.raises(ValueError, match=r"^generation_config\.json: not JSON"):
            chat.stop_tokens({"generation_config.json": content})


@pytest.mark.parametrize("value", [{}, 3, True, ["<s>"], {"content": None}])
def test_a_special_token_that_is_no_text_is_named(value):
    with pytest.raises(ValueError, match=r"^tokenizer_config\.json: bos_token is "):
        chat.chat_prompt(settings(chat_template="a", bos_token=value), "hi")
    assert chat.special_tokens(settings(add_bos_token=True, bos_token=None, eos_token={"content": "e"})) == {
        "eos_token": "e"
    }


@pytest.mark.parametrize("value", ["2", -1, 2.0, True, [1, "2"], [[1]], {"a": 1}, 10**20, [None], "9" * 10**6])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_stop_token_that_is_no_id_is_named(file, value):
    with pytest.raises(ValueError, match=f"^{file}: eos_token_id is ") as caught:
        chat.stop_tokens({file: json.dumps({"eos_token_id": value}).encode()})
    assert len(str(caught.value)) < 300
