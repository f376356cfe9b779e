"""`agl view`, below the command line."""

from __future__ import annotations

import secrets
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

from rich.console import Console

from agent_lightning.api.viewer.app import Viewer, serve
from agent_lightning.api.viewer.decode import Decode, decoder, decoder_of
from agent_lightning.api.viewer.export import write_file
from agent_lightning.api.viewer.folder import Library, RunFiles, is_run
from agent_lightning.config.load import reload
from agent_lightning.core.errors import AgentLightningError, UserError
from agent_lightning.credit.assign import CreditRules
from agent_lightning.run import storage
from agent_lightning.run.state import credit_rules

FETCH_SECONDS = 15.0
"""Seconds between two looks at a remote place."""


async def view(place: str, port: int, out: Path | None) -> int:
    """Serve the pages of a run, a sweep, or a folder of them until Ctrl-C, or write a run's pages to the file `out`.
    Raises UserError."""
    with ExitStack() as stack:
        root, console = Path(place), Console()
        if storage.is_remote(place):
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agl-view-")))
            root = storage.fetch(place, root, without="checkpoints")
            _follow(place, root.parent)
        library = Library(root.absolute())  # "." has no name
        if out is not None:
            if not is_run(root):
                raise UserError(f"--out writes the pages of one run, and {place} is no run")
            write(root, out)
            console.print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, opens in any browser", highlight=False)
            return 0
        token = secrets.token_urlsafe(16)

        def show(address: str) -> None:
            console.print(f"{address}/?token={token}", soft_wrap=True, highlight=False)
            if is_run(root):
                run = library.run(library.root.name)
                for name, (rollout, reward) in zip(("best", "worst"), run.index.best_and_worst(), strict=False):
                    page = f"{address}/run/{quote(run.name)}/tokens/{rollout}?token={token}"
                    console.print(f"{name} of the last step ({reward:.3f}): {page}", soft_wrap=True, highlight=False)
            console.print("Only this machine can open it; Ctrl-C ends it. It reads, and never writes.", style="dim")

        await serve(Viewer(library, find_rules, token=token), port, show)
    return 0


def write(run: Path, out: Path) -> None:
    """Write the pages of a run's folder to one file. Raises UserError."""
    try:
        write_file(RunFiles(run), find_rules, out)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error


def find_rules(config_file: Path) -> tuple[CreditRules | None, Decode, str]:
    """The rules of credit of a run, None if its config cannot be read; what turns its tokens into text, or into their
    ids if there is no tokenizer; and why something is missing."""
    rules, saved = None, sorted(config_file.parent.glob("checkpoints/*/**/tokenizer.json"))
    try:
        config = reload(config_file, [])
        rules = credit_rules(config)
        return rules, decoder(saved[-1]) if saved else decoder_of(config.model), ""
    except AgentLightningError as error:
        return rules, decoder(saved[-1]) if saved else "⟨{}⟩".format, str(error)


def _follow(place: str, root: Path) -> None:
    """Fetch again and again, in the background, what changes at a remote place."""

    def fetch_forever() -> None:
        while root.exists():
            threading.Event().wait(FETCH_SECONDS)
            try:
                storage.fetch(place, root, without="checkpoints")
            except (UserError, OSError):
                continue  # the place may answer again, and the folder may be gone at the end

    threading.Thread(target=fetch_forever, daemon=True, name="fetch").start()
