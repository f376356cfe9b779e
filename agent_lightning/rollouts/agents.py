"""What an agent is: a function or a command, which a name locates and which is run in one of four modes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import json
import operator
import os
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, SupportsFloat, cast
from urllib.parse import urlsplit

import numpy as np

from agent_lightning.core.errors import AgentProcessError, ConfigError
from agent_lightning.core.processes import run_child
from agent_lightning.core.text import last_line
from agent_lightning.core.threads import run_cancellable, start_thread
from agent_lightning.core.types import Policy, Task
from agent_lightning.rollouts.client import Rollout, current_rollout, flush, inside, install
from agent_lightning.rollouts.evidence import Printed, described, frames_of

if TYPE_CHECKING:  # the process of an agent starts faster without the config
    from agent_lightning.config.running import Agent, AgentMode

BY_VALUE = "pickle:"
"""Begins a target that holds the function itself."""
_PACKAGE = Path(__file__).resolve().parents[1]
_RESULT = "AGL_RESULT "  # begins the line on which a child process prints its result
_ERROR = "AGL_ERROR "  # begins the line on which it prints its error, and the frames of it
_LONGEST_VARIABLE = 100_000  # characters; a longer payload is on stdin only: Linux refuses variables of 128 KiB
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def load(target: str) -> Agent:
    """The function that a target names. Raises ConfigError if there is none.

    load("json:dumps")({"a": 1})            # '{"a": 1}'
    load("examples/calc_x/agent.py:solve")  # from the working folder, the project, or the package
    load("mypkg.agent:Solver.solve")        # the working folder is on the path, and first
    load("pickle:gAWV…")                    # a function by value, as `agent_lightning.train` writes it
    """
    if target.startswith(BY_VALUE):
        return _unpickled(target.removeprefix(BY_VALUE))
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise ConfigError(f"{target!r} names no function: write package.module:function or path/to/file.py:function")
    _put_on_path(Path.cwd())
    try:
        module = _load_file(_find(where)) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's module does while it is imported
        top = where.replace("/", ".").lstrip(".").partition(".")[0]
        hint = f"; Python has a module {top!r} of its own: rename yours" if top in sys.stdlib_module_names else ""
        raise ConfigError(f"{target!r} cannot be imported: {described(error)}{hint}") from error
    try:
        function = operator.attrgetter(name)(module)
    except AttributeError:
        function = None
    if not callable(function):
        close = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{target!r}: there is no function {name!r} in {where}{hint}")
    return cast("Agent", function)


def _unpickled(text: str) -> Agent:
    """The function that cloudpickle wrote, in URL-safe base64 without padding. Raises ConfigError."""
    try:
        return cast("Agent", pickle.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))))
    except Exception as error:  # whatever a module does that the function needs
        raise ConfigError(f"the function cannot be loaded here: {described(error)}") from error


def check(agent: str | Agent, mode: AgentMode) -> None:
    """Raise ConfigError if `agent` cannot be run in this mode, as far as this can be known without starting it."""
    if not isinstance(agent, str):
        if mode in ("process", "command"):
            raise ConfigError(f"mode {mode} needs the agent's name, not a function object")
        function = agent
    elif mode == "command":
        words = shlex.split(agent)
        if not words or shutil.which(words[0]) is None:
            raise ConfigError(f"there is no executable for the command {agent!r}")
        return
    elif mode == "process":  # not loaded here: a process keeps the agent's imports out of the worker
        where = agent.rpartition(":")[0]
        if where.endswith(".py"):
            _find(where)
        return
    else:
        function = load(agent)
    if mode == "async" and not _is_async(function):
        raise ConfigError(f"mode async needs an `async def`: {agent!r} would block every other rollout; use thread")
    if mode == "thread" and _is_async(function):
        raise ConfigError(f"mode thread needs a plain `def`: {agent!r} is async; use mode async or process")


async def run_agent(
    agent: str | Agent,
    mode: AgentMode,
    task: Task,
    policy: Policy,
    rollout: Rollout,
    instrumentors: Sequence[str] = (),
    printed: Printed | None = None,
) -> object:
    """Run the agent on a task and return its result: an object, or in mode command a line of text.

        mode     what an agent is                   how it is stopped              may it block
        async    async def agent(payload, policy)   cancellation                   no: it shares the worker's event loop
        thread   def agent(payload, policy)         not at all: it is abandoned    yes
        process  either of the two                  SIGKILL to its process tree    yes
        command  any executable                     SIGKILL to its process tree    yes

    A thread cannot be killed in Python: an agent that may hang forever belongs in a process.
    Processes and commands get the policy in AGL_MODEL and the variables that client libraries read
    (`Policy.environment`); their rollout in AGL_ROLLOUT_ID and AGL_ATTEMPT; and the address for traces in
    OpenTelemetry's own variables. A function may therefore take `payload` alone. A command reads the payload as JSON
    from stdin and from AGL_TASK, and its result is the last line that it prints.
    `instrumentors` are turned on in mode process; in the other modes the caller turns them on. `printed` gets what a
    process or command prints. Whatever proxy is set, HTTP clients reach the policy without it (`bypass_proxies`).

    Raises what the agent raises, and AgentProcessError if its process fails or ends without a result. Cancelling this
    call stops the agent: when it returns, a process and all its descendants are gone (`core.processes`).
    """
    payload = dict(task.payload)
    if mode in ("async", "thread"):
        function = load(agent) if isinstance(agent, str) else agent
        with inside(rollout):
            return await call(function, *_arguments(function, payload, policy))
    env = os.environ | policy.environment() | rollout.environment() | {"AGL_MODEL": policy.model}
    env |= bypass_proxies(env, policy.base_url)
    printed = printed or Printed(rollout.rollout_id)
    if mode == "command":
        text = _to_json(payload)
        shown = {"show": printed.write_error, "show_stdout": printed.write}
        env |= {"AGL_TASK": text} if len(text) <= _LONGEST_VARIABLE else {}
        return last_line(await run_child(shlex.split(str(agent)), stdin=text, env=env, **shown))
    job = {"payload": payload, "policy": dataclasses.asdict(policy), "instrumentors": list(instrumentors)}
    command = [sys.executable, "-m", "agent_lightning.rollouts.agents", str(agent)]
    output = await run_child(command, stdin=_to_json(job), env=env, show=printed.write)
    line = next((line for line in reversed(output.split("\n")) if line.startswith((_RESULT, _ERROR))), None)
    if line is None:
        raise AgentProcessError("the agent's process ended without a result")
    if line.startswith(_ERROR):
        raise AgentProcessError(*json.loads(line.removeprefix(_ERROR)))
    return cast(object, json.loads(line.removeprefix(_RESULT)))


async def call(function: Agent, *arguments: object) -> object:
    """Call a function: await it if it is async, else run it in a thread of its own. Raises what the function raises;
    `sys.exit` becomes AgentProcessError, since it would end the worker. If this call is cancelled, an async function is
    cancelled too; if it swallows every cancellation, it is abandoned."""

    async def run() -> object:
        try:
            if _is_async(function):
                result = function(*arguments)
            else:
                result = await asyncio.wrap_future(start_thread(functools.partial(function, *arguments), "agent"))
            return await cast(Awaitable[object], result) if inspect.isawaitable(result) else result
        except SystemExit as error:
            raise AgentProcessError(f"sys.exit({error.code!r}) was called") from error

    return await run_cancellable(run())


def bypass_proxies(env: Mapping[str, str], url: str) -> dict[str, str]:
    """The variables that make HTTP clients reach `url` without a proxy: NO_PROXY and no_proxy, with their values and
    the URL's host; none if no proxy is set. httpx, below the clients of OpenAI and Anthropic, fails on any proxy that
    it cannot use, such as SOCKS without the package socksio: a further "*" makes httpx alone ignore all proxies.

    Example: bypass({"HTTP_PROXY": "http://proxy:3128", "no_proxy": "intranet"}, "http://127.0.0.1:8000/v1")
    -> both names with "intranet,127.0.0.1,localhost"
    """
    proxies = [value for name, value in env.items() if name.lower() in _PROXIES and value]
    if not proxies:
        return {}
    given = [host.strip() for name in ("NO_PROXY", "no_proxy") for host in env.get(name, "").split(",")]
    if given in (["*", ""], ["", "*"], ["*", "*"]):
        return {"NO_PROXY": "*", "no_proxy": "*"}
    host = urlsplit(url).hostname or ""
    hosts = [*filter(None, given), host, *(("localhost",) if host.startswith("127.") else ())]
    if not all(_is_usable(proxy) for proxy in proxies):
        hosts.append("*")
    text = ",".join(dict.fromkeys(hosts))
    return {"NO_PROXY": text, "no_proxy": text}


def _is_usable(proxy: str) -> bool:
    """Whether httpx can be created with this proxy in the environment."""
    scheme = urlsplit(proxy if "://" in proxy else f"http://{proxy}").scheme
    if scheme in ("socks5", "socks5h"):
        return importlib.util.find_spec("socksio") is not None
    return scheme in ("http", "https")


def _find(path: str) -> Path:
    folders = (Path.cwd(), _PACKAGE.parent, _PACKAGE)
    for folder in folders:
        if (folder / path).is_file():
            return (folder / path).resolve()
    raise ConfigError(f"there is no file {path!r} in {', '.join(str(folder) for folder in folders)}")


@functools.cache
def _load_file(path: Path) -> ModuleType:
    """Import a file: by its name in its package if its folder is one, or if it imports relatively; else as a module
    under a name made of its path, since two agent.py of different folders are two modules."""
    root = path.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    if root != path.parent:
        return _import_from(root, path)
    _put_on_path(path.parent)  # its siblings can be imported, as if it were run as a script
    name = re.sub(r"\W", "_", path.stem) + "_" + hashlib.sha256(str(path).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look their module up by name
    with contextlib.ExitStack() as undo:
        undo.callback(sys.modules.pop, name, None)
        try:
            spec.loader.exec_module(module)
        except ImportError as error:
            if "relative import" not in str(error):
                raise
            # A package without __init__.py: it begins below the folder where agl runs, or is the file's folder.
            here = Path.cwd()
            inside = path.is_relative_to(here) and path.parent != here
            return _import_from(here if inside else path.parent.parent, path)
        undo.pop_all()
    return module


def _import_from(root: Path, path: Path) -> ModuleType:
    """Import a file by its dotted name below `root`. Raises ConfigError if this name is another module's."""
    _put_on_path(root)
    name = ".".join(path.relative_to(root).with_suffix("").parts)
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    if Path(module.__file__ or "").resolve() != path:
        raise ConfigError(f"{path} is the module {name}, but {module.__file__} has this name too: rename its package")
    return module


def _put_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _is_async(function: Agent) -> bool:
    """Whether a function is async, also under functools.wraps, or is an object whose `__call__` is async."""
    unwrapped = inspect.unwrap(function)
    return inspect.iscoroutinefunction(unwrapped) or inspect.iscoroutinefunction(unwrapped.__call__)


def _arguments(function: Agent, payload: Mapping[str, Any], policy: Policy) -> tuple[object, ...]:
    """The arguments for a function: (payload, policy), or (payload,) if it has a single parameter."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    positional = kinds.count(inspect.Parameter.POSITIONAL_ONLY) + kinds.count(inspect.Parameter.POSITIONAL_OR_KEYWORD)
    takes_policy = positional >= 2 or inspect.Parameter.VAR_POSITIONAL in kinds
    return (payload, policy) if takes_policy else (payload,)


def _to_json(value: object) -> str:
    """The value as JSON text. NumPy numbers and arrays, which rows of Parquet files hold, become plain values."""

    def plain(item: object) -> object:
        if isinstance(item, np.generic | np.ndarray):
            return cast(object, item.tolist())
        if isinstance(item, SupportsFloat):  # a torch scalar
            return float(item)
        raise TypeError(f"a {type(item).__name__} cannot be handed to or from another process as JSON")

    return json.dumps(value, default=plain)


def _main() -> None:
    """Run the child process of mode "process": it reads a job from stdin and writes the result to stdout."""

    async def wait_for(awaitable: Awaitable[object]) -> object:
        return await awaitable

    job, result_pipe = json.loads(sys.stdin.read()), os.dup(1)
    os.dup2(2, 1)  # what the agent prints does not mix with its result
    rollout = current_rollout()
    line = ""

    def note_error(kind: type[BaseException] | None, error: BaseException | None, frames: object) -> bool:
        nonlocal line
        if isinstance(error, Exception):
            line = _ERROR + json.dumps([described(error), frames_of(error)])
        return bool(line)

    with contextlib.ExitStack() as stack:
        stack.push(note_error)
        install(job["instrumentors"])
        function = load(sys.argv[1])
        result = function(*_arguments(function, job["payload"], Policy(**job["policy"])))
        if inspect.isawaitable(result):
            result = asyncio.run(wait_for(result))
        line = _RESULT + _to_json(result)
    if rollout is not None:
        flush(rollout)
    with open(result_pipe, "w") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    _main()
