"""Models on the Hugging Face hub, for every process that loads one: each node has its own cache."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from agent_lightning.core.errors import UserError
from agent_lightning.core.text import error_line

ENVIRONMENT: Final = (
    *("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN", "HF_TOKEN_PATH"),
    *("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DOWNLOAD_TIMEOUT"),
)
"""The variables that say how the hub is reached: every process that loads a model has those of the driver."""
_FILES: Final = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]


def model_folder(model: str, revision: str | None = None) -> str:
    """The folder of a model on this machine. A model that is named by its hub id is downloaded, in its commit
    `revision`, unless the cache has it. Raises UserError."""
    if Path(model).is_dir():
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    errors = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)
    try:
        return str(snapshot_download(model, revision=revision, allow_patterns=_FILES))
    except errors as error:
        with suppress(*errors):  # what an earlier run has downloaded
            return str(snapshot_download(model, revision=revision, local_files_only=True))
        message = f"model.path={model}: no local folder, and not reachable on the hub ({error_line(error)})"
        raise UserError(message) from error
