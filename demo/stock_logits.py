"""Logits of stock folders by stock transformers alone: this file imports nothing of ours.

python demo/stock_logits.py IDS.safetensors OUT.safetensors FOLDER...
"""

import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(ids_path: str, out_path: str, *folders: str) -> None:
    """Load each folder with `AutoModelForCausalLM` and store its logits under the folder's name."""
    input_ids = load_file(ids_path)["input_ids"]
    logits = {}
    for folder in folders:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        model, info = loaded
        if info["missing_keys"] or info["unexpected_keys"]:
            sys.exit(f"{folder}: {info}")
        with torch.no_grad():
            logits[folder] = model.eval()(input_ids).logits
    if "star_elastic" in sys.modules:
        sys.exit("star_elastic was imported")
    save_file(logits, out_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
