"""Faults that other servers of language models had, one test each: here they are refusals."""

import ast
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from folders import edit_header, edit_json
from serving import NAME, Server, model, served
from test_serve_life import address, request_bytes
from waiting import until

from star_elastic.folder import CheckpointError
from star_elastic.model import ElasticModel

SRC = Path(__file__).parent.parent / "src" / "star_elastic"
CANARY = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\nclass Canary: pass\n"
INTEGERS = [-(2**63), -1, 2**63, 2**64, 10**400]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(model(), body_seconds=0.5) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model().save_pretrained(tmp_path / "nano")
    return tmp_path / "nano"


def refused(server: Server, **fields: Any) -> str:
    """The message of a 400 to a chat with these fields."""
    reply = server.chat(**fields)
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["message"]


@pytest.mark.parametrize("key", ["auto_map", "model_file", "custom_pipelines"])
def test_cve_2026_22807_and_5843_code_beside_the_weights_is_not_run(folder: Path, key: str) -> None:
    (folder / "canary.py").write_text(CANARY)
    named = {"auto_map": {"AutoModelForCausalLM": "canary.Canary"}, "model_file": "canary.py"}
    value = named.get(key, {"text-generation": {"impl": "canary.Canary"}})
    edit_json(folder / "config.json", lambda config: config.update({key: value}))
    with served(ElasticModel.from_pretrained(folder)) as server:
        assert server.chat().status_code == 200
    assert not list(folder.rglob("ran"))


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ messages|attr('__class__')|attr('__base__') }}",
])  # fmt: skip
def test_cve_2026_5760_a_template_cannot_reach_out(template: str) -> None:
    with served(model(template=template)) as server:
        reply = server.chat()
        assert reply.status_code == 400 or "__" not in reply.text
        assert "uid=" not in reply.text and "subclasses" not in reply.text
        assert server.complete().status_code == 200


def test_cve_2026_3059_nothing_is_unpickled() -> None:
    """Nor is torch.load called (CVE-2025-32434, CVE-2026-24747), but for our own training state."""
    for path in SRC.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert not imported & {"pickle", "cloudpickle", "dill", "shelve", "marshal"}, path
        assert "torch.load(" not in path.read_text("utf-8"), path


def test_cve_2025_62164_no_tensors_of_clients(server: Server) -> None:
    assert "prompt_embeds" in refused(server, prompt_embeds="gASVAAAA")


def test_cve_2025_32434_weights_that_are_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        ElasticModel.from_pretrained(folder)


@pytest.mark.parametrize("n", [10**6, 2**63, 0, -1])
def test_cve_2026_34756_how_many_answers(server: Server, n: int) -> None:
    assert refused(server, n=n).startswith("n: ")


def test_cve_2025_62426_arguments_of_the_template(server: Server) -> None:
    for name in ("tokenize", "chat_template", "return_tensors", "messages"):
        assert name in refused(server, chat_template_kwargs={name: True})


def test_cve_2025_61620_templates_of_clients(server: Server) -> None:
    assert "chat_template" in refused(
        server, chat_template="{% for i in range(10**9) %}{% endfor %}"
    )


@pytest.mark.parametrize("function", [
    {"name": "f", "parameters": {"type": "string", "pattern": "(?=("}},
    {"name": "f", "parameters": {"type": "nonsense"}},
])  # fmt: skip
def test_cve_2025_48944_tools_that_make_no_sense(server: Server, function: Any) -> None:
    assert "tools" in refused(server, tools=[{"type": "function", "function": function}])


@pytest.mark.parametrize("headers", [
    {"x-large": "a" * 2**20},
    {f"x-{n}": "a" for n in range(5000)},
])  # fmt: skip
def test_cve_2025_48956_headers_without_end(server: Server, headers: dict[str, str]) -> None:
    try:
        status = server.client.get("/health", headers=headers).status_code
    except Exception:  # the door was closed before all had come
        status = 431
    assert status in (400, 431)
    assert server.client.get("/health").status_code == 200


@pytest.mark.parametrize("k", [-1, 154_880, 2**31])
def test_log_probabilities_are_bounded_by_what_they_cost(server: Server, k: int) -> None:
    assert "logprobs" in refused(server, prompt_logprobs=k)
    assert "logprobs" in refused(server, logprobs=True, top_logprobs=k)


def test_cve_2026_5497_and_22773_parts_that_are_no_text(server: Server) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [part]}]
    assert "only parts of text are read" in refused(server, messages=messages)


@pytest.mark.parametrize("name", ["nano.gguf", "model.pt"])
def test_cve_2026_53923_files_that_are_not_read_here(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 64)
    with pytest.raises((CheckpointError, OSError)):
        ElasticModel.from_pretrained(tmp_path)


INTEGER_FIELDS = [
    "n", "max_tokens", "max_completion_tokens", "top_k", "seed", "priority", "top_logprobs",
    "thinking_token_budget",
]  # fmt: skip


@pytest.mark.parametrize("field", INTEGER_FIELDS)
@pytest.mark.parametrize("value", INTEGERS)
def test_cve_2026_21869_integers_out_of_range(server: Server, field: str, value: int) -> None:
    reply = server.chat(**{field: value, "logprobs": True})
    assert reply.status_code in (200, 400), reply.text
    if reply.status_code == 200:
        allowed = {"top_k", "thinking_token_budget", "priority"} if value == -1 else set()
        assert field in allowed | ({"seed"} if -(2**63) <= value < 2**63 else set())


def test_cve_2026_27940_sizes_that_overflow_together(folder: Path) -> None:
    def overflow(header: dict[str, Any]) -> None:
        for entry in [each for name, each in header.items() if name != "__metadata__"][:2]:
            entry.update(dtype="U8", shape=[2**63 - 64], data_offsets=[0, 2**63 - 64])

    edit_header(folder, overflow)
    with pytest.raises(CheckpointError, match="safetensors"):
        ElasticModel.from_pretrained(folder)


@pytest.mark.parametrize("fields", [
    {"temperature": 999_999}, {"temperature": -1}, {"top_p": -1}, {"top_p": 0}, {"min_p": 7},
    {"repetition_penalty": 0}, {"repetition_penalty": -1}, {"frequency_penalty": 1e308},
    {"presence_penalty": "NaN"}, {"temperature": "Infinity"}, {"logit_bias": {"3": 1e9}},
])  # fmt: skip
def test_floats_that_hung_llama_cpp(server: Server, fields: dict[str, Any]) -> None:
    assert next(iter(fields)) in refused(server, **fields)


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_literals_that_are_no_json(server: Server, literal: str) -> None:
    body = json.dumps({"model": NAME, "prompt": "hi", "temperature": 7}).replace("7", literal)
    reply = server.client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 400


@pytest.mark.parametrize("where", ["../stolen.safetensors", "/etc/passwd", "a/../../b"])
def test_weights_of_foreign_files(folder: Path, where: str) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as opened:
        index = {"metadata": {}, "weight_map": dict.fromkeys(opened.keys(), where)}
    (folder / "model.safetensors").rename(folder.parent / "stolen.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json"):
        ElasticModel.from_pretrained(folder)


def test_a_byte_at_a_time_is_not_waited_for(server: Server) -> None:
    raw = request_bytes(server, {"model": NAME, "prompt": "hi"})
    began = time.monotonic()
    with socket.create_connection(address(server)) as connection:
        connection.settimeout(5)
        connection.sendall(raw[:-10])
        answer = b""
        while time.monotonic() - began < 5:
            try:
                connection.sendall(b" ")
                connection.settimeout(0.1)
                answer += connection.recv(4096)
                break
            except TimeoutError:
                continue
    assert b"408" in answer.splitlines()[0]


def test_an_aborted_request_kills_nobody(server: Server) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": NAME, "messages": messages, "max_tokens": 150, "logit_bias": {"2": -100}}
    for _ in range(3):
        with socket.create_connection(address(server)) as connection:
            connection.sendall(request_bytes(server, body))
            until(lambda: server.opened.service.live)
    server.wait_idle()
    assert server.complete().status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null"])
def test_pages_of_other_origins_may_not_ask(server: Server, origin: str) -> None:
    """DNS rebinding: the name that the browser asked for is not ours."""
    assert server.client.get("/v1/models", headers={"origin": origin}).status_code == 403
    assert server.client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
    plain = server.client.get("/v1/models")
    assert "access-control-allow-origin" not in plain.headers
