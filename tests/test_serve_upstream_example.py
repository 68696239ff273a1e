"""`examples/front-end`: what the script starts and ends; its compose file fits together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from star_elastic.serve.upstream import Spec

EXAMPLE = Path(__file__).parent.parent / "examples" / "front-end"
STUB = """
import os, signal, sys, time
def say(*words):  # in one piece
    os.write(1, ("\\t".join(map(str, words)) + "\\n").encode())
name, code, *args = sys.argv[1:]
def end(*_):
    say("end of " + name)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
say(name, os.getpid(), *args)
time.sleep(0.5 if code != "-" else 60)
sys.exit(int(code))
"""

pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


def started(folder: Path, front_code: str, *sizes: str) -> subprocess.Popen[str]:
    """The script with programs that only say how they were called."""
    stub = folder / "stub.py"
    stub.write_text(STUB)
    environ = {
        "VLLM": f"{sys.executable} {stub} vllm -",
        "STAR_ELASTIC": f"{sys.executable} {stub} front {front_code}",
        "VLLM_ARGS": "--dtype float32",
        "PORT": "9100",
    }
    command = [str(EXAMPLE / "run.sh"), "/models/elastic", *sizes]
    return subprocess.Popen(
        command,
        env=os.environ | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines_of(script: subprocess.Popen[str], count: int) -> list[list[str]]:
    assert script.stdout is not None
    return [script.stdout.readline().rstrip("\n").split("\t") for _ in range(count)]


def test_a_server_for_each_size_and_one_for_all(tmp_path: Path) -> None:
    script = started(tmp_path, "-", "12b", "30b")
    said = lines_of(script, 3)
    servers = sorted(args for name, _, *args in said if name == "vllm")
    front = next(args for name, _, *args in said if name == "front")
    shared = ["--host", "127.0.0.1", "--port"]
    assert servers == [
        ["/models/elastic", "--hf-overrides", f'{{"elastic_size": "{size}"}}']
        + ["--served-model-name", f"elastic-{size}", *shared, port, "--dtype", "float32"]
        for size, port in (("12b", "9101"), ("30b", "9102"))
    ]
    assert front == ["serve", "/models/elastic", "--port", "9100"] + [
        "--upstream",
        "12b=http://127.0.0.1:9101",
        "--upstream",
        "30b=http://127.0.0.1:9102",
    ]
    script.send_signal(signal.SIGTERM)
    out, _ = script.communicate(timeout=20)
    assert script.returncode == 0
    ends = [line for line in out.splitlines() if line.startswith("end of")]
    assert ends == ["end of front", "end of vllm", "end of vllm"]
    assert not [words[1] for words in said if alive(int(words[1]))]


def test_servers_do_not_outlive_the_front_end(tmp_path: Path) -> None:
    script = started(tmp_path, "3")
    said = lines_of(script, 3)
    script.communicate(timeout=20)
    assert script.returncode == 3
    assert not [words[1] for words in said if alive(int(words[1]))]


def alive(pid: int) -> bool:
    for _ in range(20):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def test_the_compose_file_fits_together() -> None:
    services = yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    front = services.pop("front-end")
    said = [word.removeprefix("--upstream=") for word in front["command"] if "upstream" in word]
    specs = {spec.size: spec.url for spec in map(Spec.read, said)}
    assert specs == {name: f"http://{name}:8000" for name in services}
    for name, service in services.items():
        assert f'--hf-overrides={{"elastic_size": "{name}"}}' in service["command"]
