"""Build an index, or serve it; from examples/musique, or with that folder on PYTHONPATH.

python -m retrieval build --kind bm25 --out INDEX corpus.jsonl.gz
python -m retrieval build --kind dense --encoder BAAI/bge-base-en-v1.5 --out INDEX wiki/*.parquet
python -m retrieval serve INDEX --port 8100
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from pathlib import Path

from agent_lightning.core.actors import init_ray, shutdown_ray
from agent_lightning.core.errors import AgentLightningError

from .build import BGE_QUERY, Settings, build


def main() -> int:
    """Exit codes as agl's: 0 done, 2 bad input."""
    args = _parser().parse_args()
    # Ray runs its workers at nice 15, and they find this package as this process does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    package = str(Path(__file__).resolve().parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        if args.command == "build":
            return _build(args)
        return _serve(args)
    except AgentLightningError as error:
        _say(f"retrieval: {error}")
        return 2
    finally:
        shutdown_ray()


def _build(args: argparse.Namespace) -> int:
    settings = Settings(
        kind=args.kind,
        files=tuple(args.files),
        shard_lines=args.shard_lines,
        encoder=args.encoder,
        query_prefix=args.query_prefix,
    )
    settings.check()
    init_ray(args.address, args.workers)
    done = build(settings, args.out, workers=args.workers, gpus=args.gpus, report=_say)
    sys.stdout.write(json.dumps(done) + "\n")
    return 0


def _serve(args: argparse.Namespace) -> int:
    from .service import start

    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    init_ray(args.address)
    start(args.index, host=args.host, port=args.port, replicas=args.replicas)
    _say(f"serving {args.index} at http://{args.host}:{args.port}/search; stop with Ctrl-C")
    stopped.wait()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="retrieval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="build an index, or go on with one")
    building.add_argument("files", nargs="+", help=".jsonl, .jsonl.gz or .parquet with doc_id, title, text")
    building.add_argument("--kind", choices=("bm25", "dense"), required=True)
    building.add_argument("--out", type=Path, required=True)
    building.add_argument("--shard-lines", type=int, default=500_000)
    building.add_argument("--encoder", default="", help="dense: a folder or hub id, such as BAAI/bge-base-en-v1.5")
    building.add_argument("--query-prefix", default=BGE_QUERY, help="dense: what the encoder wants before a query")
    building.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="shards at a time")
    building.add_argument("--gpus", type=float, default=0, help="of each worker")
    serving = commands.add_parser("serve", help="serve a finished index")
    serving.add_argument("index", type=Path)
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=int, default=8100)
    serving.add_argument("--replicas", type=int, default=1)
    for command in (building, serving):
        command.add_argument("--address", help="of a running Ray cluster; default: this machine alone")
    return parser


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
