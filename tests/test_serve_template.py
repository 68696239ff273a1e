"""Chat templates: the text that transformers makes, and no way past the budgets."""

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from byte_level import tokenizer

from star_elastic.serve.template import ChatTemplate, TemplateFailed

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{#- The system's turn is set apart #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Today Date: " + date_string + "\n\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"""  # noqa: E501
THINKING = """{%- set ns = namespace(enable_thinking=true, last=-1) %}
{%- if enable_thinking is defined %}{%- set ns.enable_thinking = enable_thinking %}{%- endif %}
{%- for message in messages %}{% if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- macro turn(role, text) %}
{{- '<|im_start|>' + role + '\n' + text.lstrip('\n').rstrip() + '<|im_end|>\n' }}
{%- endmacro %}
{%- for message in messages %}
    {%- if message.role == "tool" %}{% continue %}{% endif %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- elif message.content is iterable %}
        {%- set content = message.content | map(attribute='text') | join(' ') %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {%- set content = '<think>\n' ~ reasoning.strip('\n') ~ '\n</think>\n\n' ~ content %}
        {%- endif %}
        {%- generation %}{{ turn('assistant', content) }}{% endgeneration %}
        {%- for call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n' }}{{ call.function.arguments | tojson(ensure_ascii=True) }}
        {%- endfor %}
    {%- else %}
        {{- turn(message['role'], content) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if ns.enable_thinking %}{{- '<think>\n' }}{% else %}{{- '<think></think>' }}{% endif %}
{%- endif %}"""  # noqa: E501
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "日本語 😀 <b>&amp;</b> {{ 7 * 7 }} {% raw %}"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes", "tool_calls": None},
        {"role": "user", "content": "and\nthen?\n\n"},
    ],
    [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning": "easy"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"b": 1, "a": "<x>"}}}]
HOSTILE = {  # each must fail
    "range": "{{ range(10**9)|list|length }}",
    "times": "{{ 'x' * 2**30 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "precision": "{{ '%.1000000000f' % 1 }}",
    "percent-filter": "{{ '%1000000000d'|format(1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "format-nested": "{{ '{:>{w}}'.format(1, w=10**9) }}",
    "center": "{{ 'x'|center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**9) }}",
    "zfill": "{{ 'x'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "indent": "{{ ('\n' * 10**5)|indent(10**6, blank=true) }}",
    "join": "{{ ('x' * 10**5)|list|join('y' * 10**5) }}",
    "replace": "{{ ('x' * 10**5)|replace('x', 'y' * 10**5) }}",
    "replace-method": "{{ ('x' * 10**5).replace('x', 'y' * 10**5) }}",
    "wordwrap": "{{ ('x' * 10**5)|wordwrap(1, wrapstring='y' * 10**5) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list|length }}",
    "slice": "{{ [1]|slice(10**9)|list|length }}",
    "list": "{{ ([0] * 10**9)|length }}",
    "sum": "{{ ([[0] * 99999] * 99999)|sum(start=[])|length }}",
    "concat": "{% set x = 'x' * 10**7 %}{{ (x ~ x ~ x ~ x ~ x ~ x ~ x ~ x) * 10 }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big')|length }}",
    "tojson": "{{ [1]|tojson(indent=10**9) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "power-late": "{{ (messages|length + 8) ** (9 ** 9) }}",
    "shift": "{% set n = namespace(x=3) %}"
    "{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling": "{% set n = namespace(x='x') %}"
    "{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "tree": "{% macro f(n) %}"
    "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursive-loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "flood": "{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}",
    "nested-source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "item": "{{ ''['__class__']['__base__'] }}",
    "attr": "{{ (''|attr('__class__')).__base__ }}",
    "map-attribute": "{{ ['']|map(attribute='__class__.__base__.__subclasses__')|first }}",
    "map-attr": "{{ (['']|map('attr', '__class__')|first)() }}",
    "format-chain": "{{ '{0.__class__.__base__}'.format('') }}",
    "format-map": "{{ '{x.__class__.__base__}'.format_map({'x': ''}) }}",
    "format-reference": "{{ ['{0.__class__}']|map('format', '')|first }}{{ ''.__class__.x }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "lipsum-globals": "{{ lipsum.__globals__.os.popen('id').read() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ | tojson }}",
    "namespace": "{{ namespace.__init__.__globals__ | tojson }}",
    "namespace-set": "{% set n = namespace() %}{% set n['__class__'] = dict %}",
    "exception": "{{ raise_exception.__globals__ | tojson }}",
    "self": "{{ self.__init__.__globals__ | tojson }}{{ self._TemplateReference__context.x }}",
    "generator": "{% macro f() %}{% endmacro %}{{ ([1]|map('upper')).gi_frame.f_globals }}",
    "mutable": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "extends": "{% extends '/etc/passwd' %}",
}


@pytest.fixture(scope="module", params=["chatml", "llama", "thinking"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, ChatTemplate]]:
    """The stock tokenizer and ours, with one template."""
    stock = tokenizer()
    stock.chat_template = {"chatml": CHATML, "llama": LLAMA, "thinking": THINKING}[request.param]
    ours = ChatTemplate.of(stock)
    assert ours is not None
    yield stock, ours
    ours.close()


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["", "tools"])
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False}, {"add_generation_prompt": False}])
@pytest.mark.parametrize("chat", CHATS, ids=["one", "several", "reasoning"])
def test_the_text_is_that_of_transformers(
    pair: tuple[Any, ChatTemplate], chat: list[dict[str, Any]], more: dict[str, Any], tools: Any
) -> None:
    stock, ours = pair
    said = {"add_generation_prompt": True, "tools": tools, **more}
    expected = stock.apply_chat_template(chat, tokenize=False, **said)
    assert asyncio.run(ours.render(chat, **said)) == expected
    assert len(expected) > 20


def test_parts_of_a_message() -> None:
    stock = tokenizer()
    stock.chat_template = {"other": "x", "default": THINKING}
    parts = [{"type": "text", "text": text} for text in ("a", "b\ud800")]
    chat = [{"role": "user", "content": parts}]
    ours = ChatTemplate.of(stock)
    assert ours is not None
    expected = stock.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asyncio.run(ours.render(chat)) == expected
    ours.close()


def test_which_template_a_tokenizer_has() -> None:
    class Some:
        special_tokens_map = {"bos_token": "<s>"}
        chat_template: Any = None

    some = Some()
    assert ChatTemplate.of(some) is None
    some.chat_template = [{"name": "default", "template": "{{ bos_token }}{{ pad_token }}!"}]
    ours = ChatTemplate.of(some)
    assert ours and asyncio.run(ours.render([{"role": "user"}])) == "<s>!"
    ours.close()
    some.chat_template = {"rag": "", "tool_use": ""}
    with pytest.raises(TemplateFailed, match="none is called default, there are: rag, tool_use"):
        ChatTemplate.of(some)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "chat template: line 2: Expected an expression"),
        ("{{ raise_exception('Roles must\n alternate') }}", "chat template: Roles must alternate$"),
        ("{{ nothing.there }}", "chat template: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{% for a in range(99) %}x{% endfor %}", "more than 90 characters"),
        ("{{ 'x' * 2**30 }}", "needs more than 512 MiB"),
        ("{% for a in range(10**5) %}{% for b in range(10**5) %}{% endfor %}{% endfor %}", "0.2 s"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(source: str, message: str) -> None:
    with pytest.raises(TemplateFailed, match=message) as caught:
        ours = ChatTemplate(source, {}, max_seconds=0.2, max_characters=90)
        try:
            asyncio.run(ours.render([{"role": "user"}]))
        finally:
            ours.close()
    assert "\n" not in str(caught.value)


def test_no_messages() -> None:
    ours = ChatTemplate("", {})
    with pytest.raises(TemplateFailed, match="no messages"):
        asyncio.run(ours.render([]))
    ours.close()


_PROGRAM = """
import asyncio, json, resource, sys, time
from star_elastic.serve.template import ChatTemplate, TemplateFailed

for name, source in json.load(sys.stdin).items():
    begin, ours = time.monotonic(), None
    try:
        ours = ChatTemplate(source, {}, max_seconds=0.3, max_characters=2**20)
        begin = time.monotonic()
        text = asyncio.run(ours.render([{"role": "user", "content": "x"}]))
        said = "RENDERED " + text[:60]
    except TemplateFailed as error:
        said = str(error)
    print(json.dumps([name, said, time.monotonic() - begin]))
    if ours:
        ours.close()
own = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([int(own.split()[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


def test_nothing_escapes_the_budgets() -> None:
    """Time a template takes, and memory of the renderers and of who asked them."""
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps(HOSTILE),
        capture_output=True,
        text=True,
        timeout=120,
    )
    *lines, (own, children) = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line[0] for line in lines] == list(HOSTILE), run.stderr
    assert not [line for line in lines if not line[1].startswith("chat template: ")]
    for name, said, seconds in lines:
        assert said.startswith("chat template: "), f"{name}: {said}"
        assert "Too many open files" not in said, f"{name}: {said}"
        assert seconds < 3, f"{name}: {seconds}"  # 0.3 s, and slack for a busy machine
    assert children < 640 * 1024  # KiB
    assert own < 200 * 1024


def test_a_slow_rendering_does_not_hold_up_others_nor_the_loop() -> None:
    source = "{% if messages[0].slow %}{% for a in range(99999) %}{% for b in range(99999) %}"
    ours = ChatTemplate(source + "{% endfor %}{% endfor %}{% else %}ok{% endif %}", {}, 2.0)

    async def both() -> Any:
        slow = asyncio.ensure_future(ours.render([{"role": "user", "slow": True}]))
        await asyncio.sleep(0.05)
        for _ in range(2):  # by a second process
            assert await ours.render([{"role": "user"}]) == "ok"
        assert not slow.done()
        return (await asyncio.gather(slow, return_exceptions=True))[0]

    assert isinstance(asyncio.run(both()), TemplateFailed)
    assert asyncio.run(ours.render([{"role": "user"}])) == "ok"  # of a new process
    ours.close()


def test_many_at_once_each_get_their_own() -> None:
    ours = ChatTemplate(CHATML, {})

    async def all_of_them() -> list[str]:
        chats = [[{"role": "user", "content": f"nonce {i}"}] for i in range(300)]
        tasks = [asyncio.ensure_future(ours.render(chat)) for chat in chats]
        await asyncio.sleep(0.01)
        for task in tasks[::3]:
            task.cancel()
        return [str(text) for text in await asyncio.gather(*tasks, return_exceptions=True)]

    texts = asyncio.run(all_of_them())
    for i, text in enumerate(texts):
        assert f"nonce {i}<" in text or (i % 3 == 0 and not text)
    ours.close()


def test_a_short_chat_is_quick() -> None:
    ours = ChatTemplate(CHATML, {})

    async def typical() -> float:
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            await ours.render(CHATS[1])
            times.append(time.perf_counter() - begin)
        return sorted(times)[20]  # others may have the processors now and then

    assert asyncio.run(typical()) < 2e-3
    ours.close()


def renderers_of(parent: int) -> list[int]:
    """Living processes that a process started."""
    living = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, ppid = path.read_text().rpartition(") ")[2].split()[:2]
            if int(ppid) == parent and state != "Z":
                living.append(int(path.parent.name))
    return living


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False


def test_a_killed_renderer_is_replaced_and_close_ends_them() -> None:
    gc.collect()
    before = set(renderers_of(os.getpid()))
    ours = ChatTemplate("ok", {})
    started = [pid for pid in renderers_of(os.getpid()) if pid not in before]
    os.kill(started[-1], signal.SIGKILL)
    time.sleep(0.2)
    assert asyncio.run(ours.render([{"role": "user"}])) == "ok"
    ours.close()
    assert not [pid for pid in renderers_of(os.getpid()) if pid in started]


def test_renderers_die_with_their_parent_and_of_nothing_less() -> None:
    code = (
        "import asyncio, sys, time; from star_elastic.serve.template import ChatTemplate\n"
        "c = ChatTemplate('ok', {})\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print(asyncio.run(c.render([{'role': 'user'}])), flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin and parent.stdout and parent.stdout.readline() == "ready\n"
    (child,) = renderers_of(parent.pid)
    for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal sends them to a whole group
        os.kill(child, number)
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == "ok\n"
    assert renderers_of(parent.pid) == [child]
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while is_there(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_there(child)


def test_the_program_imports_little() -> None:
    code = "import sys; sys.argv = ['x']; import runpy; runpy.run_path(sys.stdin.read()); "
    from star_elastic.serve import template

    code += "print(sorted({'torch', 'transformers', 'star_elastic', 'asyncio'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        input=str(template._PROGRAM),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() in ("[]", "['asyncio']")  # jinja2's own
