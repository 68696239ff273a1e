"""`star-elastic chat`: talk to a checkpoint, changing its size in mid-conversation."""

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from star_elastic.model import ElasticModel


def chat(
    checkpoint: Annotated[str, typer.Argument(help="a folder, or a hub id")],
    size: Annotated[str | None, typer.Option(help="the size to begin with")] = None,
    bits: Annotated[
        int | None, typer.Option(help="read codes of eight bits in groups at fewer: 2 to 8")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="per answer")] = 256,
) -> None:
    """Ask and answer; `/size NAME` changes the size, `/sizes` lists them, `/quit` ends."""
    from star_elastic import stock
    from star_elastic.model import ElasticModel

    stock.quiet()
    console = Console()
    model = ElasticModel.from_pretrained(checkpoint, bits=bits)
    if model.tokenizer is None:
        raise ValueError(f"{checkpoint}: no tokenizer_config.json; chat needs a tokenizer")
    name = size or next(iter(model.sizes))
    if name not in model.sizes:
        raise ValueError(f"--size {name}: there are {', '.join(model.sizes)}")
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = console.input(f"[bold]{name}>[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        match text.split():
            case []:
                continue
            case ["/quit"]:
                return
            case ["/sizes"]:
                console.print(", ".join(model.sizes))
            case ["/size", wanted] if wanted in model.sizes:
                name = wanted
            case ["/size", *_]:
                console.print(f"sizes: {', '.join(model.sizes)}")
            case _:
                messages.append({"role": "user", "content": text})
                answer = _answer(model, name, messages, max_new_tokens)
                messages.append({"role": "assistant", "content": answer})


def _answer(
    model: "ElasticModel", name: str, messages: list[dict[str, str]], max_new_tokens: int
) -> str:
    """Stream one answer to the terminal, and return it."""
    from transformers import TextStreamer

    tokenizer = model.tokenizer
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        text = messages[-1]["content"]
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    generate: Any = model[name].generate
    output = generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        streamer=streamer,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
