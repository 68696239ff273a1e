"""`star-elastic chat` with a folder, and with a real server."""

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from byte_level import tokenizer
from serving import THINKING, Server, model, served
from typer.testing import CliRunner, Result
from waiting import until

from star_elastic.cli import build_app
from star_elastic.cli.talk import Account
from star_elastic.cli.talk_here import _Streamer
from star_elastic.serve.client import Client, ServerError, printable
from star_elastic.serve.keys import Key, Keys
from star_elastic.serve.opening import Capacity
from star_elastic.serve.settings import Settings
from star_elastic.serve.text import Parts

KEY = "STAR_ELASTIC_API_KEY"
COMMAND = [sys.executable, "-m", "star_elastic", "chat"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Of a model that never ends an answer by itself."""
    made = model()
    made.tokenizer.eos_token = None
    made.parent.config.max_position_embeddings = 16384
    with served(made, Capacity(slots=2, max_length=16000, step_tokens=64)) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "elastic"
    model().save_pretrained(path)
    return path


def chat(where: object, said: str, *words: str, **environment: str) -> str:
    """All that was printed, of a chat that ended well."""
    done = run(where, said, *words, **environment)
    assert done.exit_code == 0, done.exception
    return done.stdout


def run(where: object, said: str, *words: str, **environment: str) -> Result:
    """A chat in this process, whose input is `said`."""
    return CliRunner().invoke(
        build_app(), ["chat", str(where), *words], input=said, env=environment
    )


def test_a_server_changes_its_size_in_mid_conversation(server: Server) -> None:
    said = "hello\n/size small\nagain\n/size nope\n/sizes\n/size auto\n/help\n/quit\n"
    shown = chat(server.url, said, "--max-new-tokens", "5")
    assert shown.count("auto>") == 4 and shown.count("small>") == 4
    assert "full · 5 tokens · " in shown and "tokens/s · cut: no more tokens allowed" in shown
    assert "small · 5 tokens" in shown and "pinned: the request names small" in shown
    assert "sizes: auto, full, prefix, small" in shown and "/size NAME" in shown
    tokens = {name: each for name, each in server.opened.service.tokens.items()}
    assert tokens["full"] >= 5 and tokens["small"] >= 5


def test_the_address_of_the_api_will_do_as_well(server: Server) -> None:
    shown = chat(f"{server.url}/v1", "hi\n", "--size", "prefix", "--max-new-tokens", "2")
    assert "prefix · 2 tokens" in shown


def test_a_refused_turn_never_was(server: Server) -> None:
    long = "word " * 20000
    shown = chat(server.url, f"{long}\nhi\n/quit\n", "--max-new-tokens", "3")
    assert shown.count("error: ") == 1 and "full · 3 tokens" in shown


def test_reasoning_comes_first() -> None:
    settings = Settings.model_validate({"thinking": {"default": 4}})
    made = model(template=THINKING)
    made.tokenizer.eos_token = None
    with served(made, settings=settings) as server:
        shown = chat(server.url, "hi\n", "--max-new-tokens", "40")
        assert "</think>" not in shown and "full · 40 tokens" in shown


def test_ctrl_c_stops_an_answer_and_nothing_else(server: Server) -> None:
    process = subprocess.Popen(
        [*COMMAND, server.url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    process.stdin.write(b"go on for ever\n")
    process.stdin.flush()
    status = server.client
    until(lambda: any(r["tokens"] > 5 for r in status.get("/status").json()["requests"]))
    process.send_signal(signal.SIGINT)
    assert server.wait_idle() < 2000  # of 16,000
    out, err = process.communicate(b"/sizes\n/quit\n", timeout=20)
    assert process.returncode == 0, err
    assert b"stopped" in out and b"auto, full, prefix, small" in out and b"Traceback" not in err


def test_a_key_comes_from_the_environment() -> None:
    key = "se-only-for-this-test"
    keys = Keys([Key(name="me", sha256=hashlib.sha256(key.encode()).hexdigest())])
    with served(model(), keys=keys) as server:
        refused = str(run(server.url, "hi\n", **{KEY: "wrong"}).exception)
        assert "\n" not in refused and KEY in refused and "wrong" not in refused
        assert "full · 2 tokens" in chat(
            server.url, "hi\n", "--max-new-tokens", "2", "--size", "full", **{KEY: key}
        )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--size", "huge"], "--size huge: there are auto, full, prefix, small"),
        (["--bits", "4"], "--bits 4: the server has chosen already"),
    ],
)
def test_what_a_server_cannot_do_is_one_line(
    server: Server, words: list[str], complaint: str
) -> None:
    done = run(server.url, "", *words)
    assert done.exit_code == 1 and str(done.exception) == complaint


def test_a_folder_answers_too(folder: Path) -> None:
    said = "hello\n/size small\nagain\n/size auto\n/quit\n"
    shown = chat(folder, said, "--max-new-tokens", "4")
    assert shown.count("full>") == 2 and shown.count("small>") == 3
    assert "full · " in shown and "small · " in shown and "sizes: full, small, prefix" in shown


def test_no_server_is_one_line() -> None:
    done = subprocess.run(
        [*COMMAND, "http://127.0.0.1:1"], input="", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: http://127.0.0.1:1: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("opened", [True, False])
def test_a_folders_reasoning_is_told_apart(opened: bool) -> None:
    speaker = tokenizer()
    speaker.chat_template = THINKING + "{# </think> #}"
    heard: list[Parts] = []
    account = Account()
    streamer = _Streamer(speaker, "<think>" if opened else "", account, heard.append)
    streamer.put(torch.tensor([[5, 6]]))
    text = ("" if opened else "<think>") + "a b</think>c d"
    ids = speaker(text, add_special_tokens=False)["input_ids"] + [speaker.eos_token_id]
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    whole = sum(heard, Parts())
    assert whole == Parts("a b", "c d") and account.tokens == len(ids)


def test_a_client_says_what_is_wrong(server: Server) -> None:
    client = Client(server.url)
    with pytest.raises(ServerError, match="404|not served") as raised:
        list(client.ask({"model": "other", "messages": [{"role": "user", "content": "x"}]}))
    assert raised.value.status == 404
    client.close()
    with pytest.raises(ServerError, match="no address"):
        Client("127.0.0.1:8000").status()


def test_text_cannot_steer_the_terminal() -> None:
    assert (
        printable("a\x1b]52;c;x\x07\r\nb\tc\u200dé\x9b")
        == "a\ufffd]52;c;x\ufffd\nb\tc\u200dé\ufffd"
    )
