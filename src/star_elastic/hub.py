"""Hub ids wherever a folder does: downloads that resume, and are what their digests say."""

from pathlib import Path

from huggingface_hub import snapshot_download

from star_elastic.folder import CheckpointError, one_line

_WANTED = ("*.json", "*.safetensors", "tokenizer*", "chat_template*", "vocab.*", "merges.txt")


def local(path: str | Path) -> Path:
    """The folder itself, or where a repository of the Hugging Face hub has been downloaded to.

    Raises:
        CheckpointError: neither.
    """
    if Path(path).exists():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=[*_WANTED, "LICENSE*"]))
    except Exception as error:
        raise CheckpointError(
            f"{path}: neither a folder nor a reachable repository ({one_line(error)})"
        ) from None
