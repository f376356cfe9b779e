"""From the tokens of a model to their text."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from agent_lightning.config.running import ModelConfig
from agent_lightning.core.errors import DataError
from agent_lightning.launch import hub
from agent_lightning.testing.model import ToyLanguage

Decode = Callable[[int], str]
"""From a token's id to its text."""


def decoder_of(model: ModelConfig) -> Decode:
    """What turns the tokens of a model into text. Raises UserError if the model cannot be found, and DataError."""
    if model.words:
        return ToyLanguage(model.words).text
    return decoder(Path(hub.find_model(model.path)) / "tokenizer.json")


@lru_cache(maxsize=4)
def decoder(tokenizer: Path) -> Decode:
    """A function from a token id to its text. Raises DataError if the file, a tokenizer.json, cannot be read."""
    from tokenizers import Tokenizer

    try:
        decode = Tokenizer.from_file(str(tokenizer)).decode
    except Exception as error:  # the library raises nothing more exact
        raise DataError(f"{tokenizer}: cannot be read as a tokenizer ({error})") from error

    @lru_cache(maxsize=65536)
    def text(token: int) -> str:
        return str(decode([token], skip_special_tokens=False)) or f"⟨{token}⟩"

    return text
