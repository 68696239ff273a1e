"""A server of a model made on the spot, in a process of its own, for benches that ask it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from star_elastic.layout import Layout
from star_elastic.model import ElasticModel
from star_elastic.submodel import ElasticSpace

NAME = "bench"
_TEMPLATE = (
    "{% for m in messages %}<turn>{{ m['content'] }}</turn>{% endfor %}"
    "{% if add_generation_prompt %}<turn>{% endif %}"
)
_DENSE: dict[str, Any] = dict(
    model_type="llama", num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=4096,
)  # fmt: skip
_HYBRID: dict[str, Any] = dict(
    model_type="nemotron_h", num_attention_heads=8,
    num_key_value_heads=4, mamba_num_heads=8, mamba_head_dim=32, n_groups=2, ssm_state_size=32,
    conv_kernel=4, chunk_size=64, max_position_embeddings=4096,
)  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and four special ones."""
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=260,
        special_tokens=["<pad>", "</s>", "<turn>", "</turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    made.chat_template = _TEMPLATE
    return made


def make_model(
    kind: str, width: int, layers: int, seed: int = 0, shares: Sequence[float] = (0.75, 0.5)
) -> ElasticModel:
    """A `dense` or `hybrid` parent of random weights, two sizes of these shares of its widths."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer()
    pattern = "".join("M*-"[n % 3] for n in range(layers))
    more = (
        {"num_hidden_layers": layers} if kind == "dense" else {"hybrid_override_pattern": pattern}
    )
    values: dict[str, Any] = (_DENSE if kind == "dense" else _HYBRID) | more
    config = AutoConfig.for_model(
        values.pop("model_type"),
        **values,
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        head_dim=width // 8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    parent = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # else every greedy answer is one token again and again
        parent.get_output_embeddings().weight.normal_()
    sizes = {
        name: {"hidden_size": int(width * share), "intermediate_size": int(3 * width * share)}
        for name, share in zip(("middle", "small"), shares, strict=True)
    }
    layout = Layout(config)
    space = ElasticSpace.of(layout, {"full": {}, **sizes}, trained=True)
    return ElasticModel(parent, space, tokenizer)


@dataclass
class Process:
    """A server that runs: where, and as which process."""

    url: str
    child: subprocess.Popen[bytes]

    @property
    def resident_bytes(self) -> int:
        """Of the server's process, now."""
        return int(Path(f"/proc/{self.child.pid}/statm").read_text().split()[1]) * 4096

    def status(self) -> dict[str, Any]:
        """What `/status` says."""
        return httpx2.get(f"{self.url}/status", timeout=30).json()


@contextlib.contextmanager
def serving(folder: Path, *options: str, policy: dict[str, Any] | None = None) -> Iterator[Process]:
    """`star-elastic serve` of a folder while the block runs; it must end with exit code 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "star_elastic", "serve", str(folder), "--port", port]
    if policy is not None:
        path = folder.parent / f"policy-{port}.yaml"
        path.write_text(json.dumps(policy))
        command += ["--policy", str(path)]
    child = subprocess.Popen([*command, "--name", NAME, *options], env=os.environ)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(child, url)
        yield Process(url, child)
        child.send_signal(signal.SIGTERM)
        if code := child.wait(60):
            raise RuntimeError(f"the server ended with exit code {code}")
    finally:
        child.kill()
        child.wait()


def _wait_ready(child: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and child.poll() is None:
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/ready").status_code == 200:
                return
        time.sleep(0.05)
    raise RuntimeError("the server did not start")
