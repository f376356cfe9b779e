"""`agl view`: a local web page that shows runs, groups, rollouts and tokens. It only reads."""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import jinja2
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from agent_lightning.api.viewer import pages, rollout, tokens
from agent_lightning.api.viewer.charts import Line, line_chart, number_text
from agent_lightning.api.viewer.decode import Decode
from agent_lightning.api.viewer.folder import Library, RunFiles
from agent_lightning.api.viewer.pages import Context, Links
from agent_lightning.core.errors import AgentLightningError, UserError
from agent_lightning.core.text import error_line
from agent_lightning.credit.assign import CreditRules
from agent_lightning.launch.sweeps.plan import SweepFolder, best_of
from agent_lightning.run import index
from agent_lightning.run.index import Filters
from agent_lightning.run.report import duration

HERE: Final = Path(__file__).parent
COOKIE: Final = "agl_view"
POLICY: Final = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self' data:; connect-src 'self';"
    " form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The content security policy: what a rollout holds is shown as text, and no markup of it can run or load anything."""
LOOK_SECONDS: Final = 1.0
"""Seconds between two looks at the files of a run that a page follows."""

FindRules = Callable[[Path], tuple[CreditRules | None, Decode, str]]
"""From a run's config.yaml to what `command.find_rules` returns."""


class Viewer:
    """The pages of a folder of runs.

    Example: uvicorn.run(Viewer(Library(Path("runs")), find_rules, token="s3cret").app)
    """

    def __init__(self, library: Library, find_rules: FindRules, *, token: str, links: Links | None = None) -> None:
        """`token` is the secret of the first address; a browser that has used it holds a cookie."""
        self._library = library
        self._find_rules = lru_cache(maxsize=16)(find_rules)
        self._token = token
        self.links: Final = links or Links()
        self._templates = templates(self.links)
        page = self._page
        routes = [
            Route("/", page(lambda request: ("runs.html", self._home()))),
            Route("/compare", page(self._compare)),
            Route("/sweep/{name}", page(self._sweep)),
            Route("/run/{run}", page(self._run)),
            Route("/run/{run}/events", self._events),
            Route("/run/{run}/rollouts", page(self._rollouts)),
            Route("/run/{run}/group/{group}", page(self._group)),
            Route("/run/{run}/rollout/{rollout}", page(self._rollout)),
            Route("/run/{run}/tokens/{rollout}", page(self._tokens)),
            Route("/run/{run}/tools", page(self._tools)),
            Route("/run/{run}/tasks", page(self._tasks)),
            Route("/run/{run}/task/{task:path}", page(self._task)),
            Route("/static/{name}", self._static),
        ]
        self.app: Final = Starlette(
            routes=routes,
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
                Middleware(_Guard, token=token),
            ],
            exception_handlers={HTTPException: self._failed},
        )

    def prepare(self) -> None:
        """Do what the first page of each kind would wait for: import what reads rollouts, and compile the templates."""
        index.load_libraries()
        for name in self._templates.list_templates():
            self._templates.get_template(name)

    def render(self, template: str, context: Context) -> str:
        return self._templates.get_template(template).render(context)

    def _page(self, content: Callable[[Request], tuple[str, Context]]) -> Callable[[Request], Any]:
        """A handler that renders a template off the event loop; what cannot be read is a page that says so."""

        def render(request: Request) -> Response:
            try:
                return HTMLResponse(self.render(*content(request)))
            except AgentLightningError as error:
                return HTMLResponse(self.render("message.html", {"text": str(error)}), 404)
            except Exception as error:  # a file that is damaged, or was deleted under way
                return HTMLResponse(self.render("message.html", {"text": f"cannot be shown: {error_line(error)}"}), 500)

        async def handle(request: Request) -> Response:
            return await run_in_threadpool(render, request)

        return handle

    def _home(self) -> Context:
        return pages.runs_page(self._library)

    def _compare(self, request: Request) -> tuple[str, Context]:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if len(names) < 2:
            raise UserError("tick two or more runs to compare")
        return "compare.html", pages.compare_page(self._library, names[:8])

    def _sweep(self, request: Request) -> tuple[str, Context]:
        name = request.path_params["name"]
        folder = SweepFolder.open(self._library.sweep(name))
        records = folder.read()
        best = best_of(records)
        keys = list(dict.fromkeys(word.partition("=")[0] for record in records for word in record.words))
        rows = [(record, dict(word.partition("=")[::2] for word in record.words)) for record in records]
        lines = [Line(name=record.name, points=record.rewards, dots=True) for record in records[:12]]
        chart = line_chart("Held-out reward of each trial", lines)
        prefix = "" if name == "." else f"{name}/"
        values = {"name": name, "rows": rows, "keys": keys, "best": best, "chart": chart, "prefix": prefix}
        return "sweep.html", values | {"command": folder.command()}

    def _find(self, request: Request) -> tuple[str, RunFiles]:
        name = request.path_params["run"].replace("~", "/")
        return name, self._library.run(name)

    def run_context(self, name: str, run: RunFiles) -> Context:
        """What the templates of every page of a run read."""
        state, reason = run.state()
        return {"run": name, "path": run.directory.path, "state": state, "reason": reason}

    def _run(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        return "run.html", self.run_context(name, run) | pages.run_page(name, run, self.links)

    def _rollouts(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        filters, page = read_filters(request.query_params)
        values = pages.rollouts_page(name, run, self.links, filters, page)
        return "rollouts.html", self.run_context(name, run) | values

    def _group(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        group = run.group(f"{request.path_params['group']}-0")
        values = rollout.group_page(group, run.credits(group, self._find_rules(run.directory.config)[0]))
        return "group.html", self.run_context(name, run) | values

    def _rollout(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        group = run.group(rollout_id := request.path_params["rollout"])
        credits = run.credits(group, self._find_rules(run.directory.config)[0])
        values = rollout.rollout_page(group, rollout_id, credits)
        return "rollout.html", self.run_context(name, run) | values

    def _tokens(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        group = run.group(rollout_id := request.path_params["rollout"])
        rules, decode, problem = self._find_rules(run.directory.config)
        credits, colour = run.credits(group, rules), request.query_params.get("colour", "advantage")
        values = tokens.tokens_page(group, rollout_id, credits, decode, colour, problem)
        return "tokens.html", self.run_context(name, run) | values

    def _tools(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        values = pages.tools_page(run, lambda step: self.links.run(name, "rollouts", split="train", step=step))
        return "tools.html", self.run_context(name, run) | values

    def _tasks(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        rows = pages.tasks_of(run.index.table())
        return "tasks.html", self.run_context(name, run) | {"rows": rows[:500], "total": len(rows)}

    def _task(self, request: Request) -> tuple[str, Context]:
        name, run = self._find(request)
        split = request.query_params.get("split", "val")
        return "task.html", self.run_context(name, run) | pages.task_page(run, request.path_params["task"], split)

    async def _events(self, request: Request) -> Response:
        """Server-sent events: one whenever the run has written something that a page shows."""
        _, run = self._find(request)

        async def stream() -> AsyncIterator[str]:
            seen = run.versions()
            yield "retry: 2000\n\n"
            while not await request.is_disconnected():
                await asyncio.sleep(LOOK_SECONDS)
                versions = await run_in_threadpool(run.versions)
                yield "event: changed\ndata: 1\n\n" if versions != seen else ": alive\n\n"
                seen = versions

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _static(self, request: Request) -> Response:
        if (name := request.path_params["name"]) not in ("view.css", "view.js"):
            raise HTTPException(404)
        return FileResponse(HERE / "static" / name, headers={"Cache-Control": "max-age=3600"})

    async def _failed(self, request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return HTMLResponse(self.render("message.html", {"text": "there is no such page"}), status)


class _Guard:
    """Middleware that lets in who knows the token, only reads, and sends the headers that keep content harmless."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = {"content-security-policy": POLICY, "x-content-type-options": "nosniff"}
                headers |= {"referrer-policy": "no-referrer", "x-frame-options": "DENY"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in headers.items())]
            await send(message)

        response: ASGIApp = self._app
        if request.method not in ("GET", "HEAD"):
            response = Response("this page only reads\n", 405)
        elif secrets.compare_digest(request.query_params.get("token", "").encode(), self._token.encode()):
            response = RedirectResponse(str(request.url.remove_query_params("token").replace(scheme="", netloc="")))
            response.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
        elif not secrets.compare_digest(request.cookies.get(COOKIE, "").encode(), self._token.encode()):
            response = Response("open the address that `agl view` printed: it holds the key to this page\n", 403)
        await response(scope, receive, send_guarded)


def read_filters(query: Mapping[str, str]) -> tuple[Filters, int]:
    """The filters and the page number of a query; a number that is none is left out."""

    def number(name: str) -> float | None:
        try:
            return float(query.get(name, ""))
        except ValueError:
            return None

    texts = {field.name: query.get(field.name, "") for field in fields(Filters) if field.type == "str"}
    step, page = number("step"), number("page")
    filters = Filters(
        **texts | {"sort": texts["sort"] or "spread"},
        step=None if step is None else int(step),
        min_reward=number("min_reward"),
        max_reward=number("max_reward"),
    )
    return filters, int(page or 1)


def templates(links: Links) -> jinja2.Environment:
    """The templates: everything that they print is escaped."""
    loader = jinja2.FileSystemLoader(HERE / "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number_text, "seconds": duration}
    environment.globals |= {"links": links}
    return environment


async def serve(viewer: Viewer, port: int, show: Callable[[str], None]) -> None:
    """Serve the pages on a port of 127.0.0.1 (0: a free one) until Ctrl-C; `show` gets their address as soon as they
    answer. Raises UserError if the port is in use."""
    import uvicorn

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"port {port}: {error.strerror}; choose another, or leave --port out") from error
        viewer.prepare()
        config = uvicorn.Config(viewer.app, log_level="error", timeout_graceful_shutdown=1, server_header=False)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.02)
        show(f"http://127.0.0.1:{listener.getsockname()[1]}")
        await serving
