"""For an agent's own code: functions to emit rewards, record tool calls, and read which rollout the code runs in.

    @tool
    def search(query: str) -> str: ...

    with tool("sql", {"query": query}) as span:
        span.result = connection.execute(query).fetchall()
    emit_reward(0.2, name="found", about=span)

Rewards and tools are spans of OpenTelemetry's SDK. They are sent over OTLP to the URL of the rollout, together with the
spans of any instrumentor in the process. Outside a run nothing is sent, so an agent behaves as without this module.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import numbers
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast, overload

from opentelemetry import context, propagate, trace
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider

from agent_lightning.core.errors import ConfigError, RewardError
from agent_lightning.core.text import hide_attempt_secrets
from agent_lightning.core.threads import await_with_timeout, call_with_timeout
from agent_lightning.core.types import LARGEST_REWARD, is_reward
from agent_lightning.rollouts.evidence import frames_of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_ROLLOUT = context.create_key("agent_lightning.rollout")
_UNSENT = 4096  # most spans of a rollout that wait to be sent; if there are more, all are dropped
_SEND_TIMEOUT = 30.0  # seconds that sending may take: a gateway of hundreds of agents is slow, not gone
_LAST_RETRY = 2.0
"""Seconds for which a process that ends tries again to reach a gateway that is gone."""
_LAST_SPANS = 0.25  # seconds for which `close` waits for spans that have not ended
_LOGGERS_WITH_URLS = (
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "httpx",
    "httpx2",
    "openai._base_client",
    "anthropic._base_client",
    "urllib3.connectionpool",
)
"""Loggers whose messages contain the URL that is called, and so the attempt's secret."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """The attempt that the calling code is part of."""

    rollout_id: str
    attempt: int
    base_url: str = field(repr=False)  # OpenAI base URL, ending in /v1. It contains the attempt's secret.

    @property
    def traces_url(self) -> str:
        """The URL that accepts spans as OTLP over HTTP."""
        return f"{self.base_url}/traces"

    def environment(self) -> dict[str, str]:
        """Environment variables that make a process part of this rollout, and of the span that is open now.
        Example: subprocess.run(command, env=os.environ | current_rollout().environment())"""
        carrier: dict[str, str] = {}
        propagate.inject(carrier)
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": self.traces_url,
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "AGL_ROLLOUT_ID": self.rollout_id,
            "AGL_ATTEMPT": str(self.attempt),
            **{name.upper(): value for name, value in carrier.items()},
        }


def current_rollout() -> Rollout | None:
    """The rollout that this code runs in, or None outside a run. It is known in coroutines, in threads that carry their
    creator's context (`asyncio.to_thread`, and all threads in a rollout worker), and in processes that were started
    with `Rollout.environment`."""
    rollout = context.get_value(_ROLLOUT)
    return rollout if isinstance(rollout, Rollout) else _rollout_of_process()


def emit_reward(
    value: float | Mapping[str, float], *, name: str = "reward", about: ToolSpan | str | None = None
) -> None:
    """Emit a reward for the rollout, or for an event in it.

    `about` is a tool's span, the id of such a span, or the id of a model's reply; the reward is credited to the model
    call that caused the event. With None the reward is about the rollout: if there is no reward function and the agent
    returns None, it is the final reward. A mapping gives several named rewards at once, the parts of the final reward
    (`rollouts.rewards.to_reward`). Raises RewardError for a value that is not a finite number up to LARGEST_REWARD.

        emit_reward({"format": 1.0, "answer": 0.0})
        emit_reward(0.1, name="found", about=reply.id)
    """
    dimensions = value if isinstance(value, Mapping) else {name: value}
    for dimension, number in dimensions.items():
        if not isinstance(number, numbers.Real) or not is_reward(number):
            raise RewardError(f"the reward {dimension!r} is {number!r}, not a finite number up to {LARGEST_REWARD:g}")
    if current_rollout() is None:
        return
    target = about.span_id if isinstance(about, ToolSpan) else about or ""
    for dimension, number in dimensions.items():
        subject = {"agl.reward.name": dimension, "agl.reward.about": target}
        _tracer().start_span("reward", attributes={**subject, "agl.reward.value": float(number)}).end()


class ToolSpan:
    """One use of a tool, as a context manager or a decorator; made by `tool`."""

    def __init__(
        self, name: str, arguments: Mapping[str, Any], call_id: str = "", timeout_s: float | None = None
    ) -> None:
        self._name, self._arguments, self._call_id, self._timeout_s = name, arguments, call_id, timeout_s
        self._stack = ExitStack()
        self.span_id = ""  # 16 hex digits once the block has been entered; "" outside a run
        self.result: object = None  # what the tool returned; set it before the block ends

    def __enter__(self) -> Self:
        if self._timeout_s is not None:
            raise TypeError("tool(…, timeout_s=…) is a decorator: the deadline of a block cannot be kept")
        if current_rollout() is not None:
            attributes = {
                "gen_ai.operation.name": "execute_tool",
                "gen_ai.tool.name": self._name,
                "gen_ai.tool.call.id": self._call_id,
                "gen_ai.tool.call.arguments": _text(self._arguments),
            }
            span = self._stack.enter_context(
                _tracer().start_as_current_span(f"execute_tool {self._name}", attributes=attributes)
            )
            self.span_id = trace.format_span_id(span.get_span_context().span_id)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.span_id and error is None:
            trace.get_current_span().set_attribute("gen_ai.tool.call.result", _text(self.result))
        if self.span_id and isinstance(error, Exception):  # the agent may catch it, and nobody would see where it was
            sys.stderr.write(f"tool {self._name} failed: {frames_of(error)}\n")
        self._stack.__exit__(kind, error, traceback)

    def __call__(self, function: Callable[P, T]) -> Callable[P, T]:
        signature, name = inspect.signature(function), self._name or function.__name__
        timeout_s, label = self._timeout_s, f"tool {name}"

        def opened(*args: P.args, **kwargs: P.kwargs) -> ToolSpan:
            try:
                arguments: Mapping[str, Any] = signature.bind(*args, **kwargs).arguments
            except TypeError:  # the call below raises it with a better message
                arguments = {}
            return ToolSpan(name, arguments)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                with opened(*args, **kwargs) as span:
                    work = function(*args, **kwargs)
                    span.result = await (work if timeout_s is None else await_with_timeout(work, timeout_s, label))
                    return span.result

            return cast(Callable[P, T], run_async)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> T:
            with opened(*args, **kwargs) as span:
                work = functools.partial(function, *args, **kwargs)
                result = span.result = work() if timeout_s is None else call_with_timeout(work, timeout_s, label)
                return result

        return run


@overload
def tool(what: Callable[P, T], /) -> Callable[P, T]: ...
@overload
def tool(
    what: str, /, arguments: Mapping[str, Any] | None = None, *, call_id: str = "", timeout_s: float | None = None
) -> ToolSpan: ...
def tool(
    what: Callable[P, T] | str,
    /,
    arguments: Mapping[str, Any] | None = None,
    *,
    call_id: str = "",
    timeout_s: float | None = None,
) -> Callable[P, T] | ToolSpan:
    """Show a use of a tool: `@tool`, `@tool("name", timeout_s=10)`, or `with tool("name", arguments) as span`.
    `call_id` is the id of the model's tool call, if the code knows it. An exception is recorded as the tool's error and
    propagates. `timeout_s` is for decorated functions: the seconds until TimeoutError is raised. An async function is
    then cancelled; a plain function runs in a thread, which cannot be stopped and is abandoned."""
    if isinstance(what, str):
        return ToolSpan(what, arguments or {}, call_id, timeout_s)
    return ToolSpan("", {})(what)


# What a rollout worker does -------------------------------------------------------------------------------------------


@contextmanager
def inside(rollout: Rollout) -> Iterator[None]:
    """Make whatever runs in the block, and whatever it starts, part of the rollout."""
    token = context.attach(context.set_value(_ROLLOUT, rollout))
    try:
        yield
    finally:
        context.detach(token)


def install(instrumentors: Iterable[str] = ()) -> None:
    """Send the spans of this process to their rollouts from now on, and turn on instrumentors, each once. The names are
    entry points of OpenTelemetry's own group or OpenInference's, e.g. "langchain". Raises ConfigError if an
    instrumentor is not installed."""
    _processor()
    for name in ("threading", *instrumentors):
        _instrument(name)


def check_instrumentors(names: Iterable[str]) -> None:
    """Raise ConfigError if an instrumentor is not installed."""
    for name in names:
        _entry_point(name)


@functools.cache
def _instrument(name: str) -> None:
    _entry_point(name).load()().instrument()


def _entry_point(name: str) -> EntryPoint:
    groups = ("opentelemetry_instrumentor", "openinference_instrumentor")
    points = [point for group in groups for point in entry_points(group=group, name=name)]
    if not points:
        raise ConfigError(f"agent.instrument: no instrumentor {name!r} is installed in this environment")
    return points[0]


def flush(rollout: Rollout) -> None:
    """Send the rollout's waiting spans. This blocks; spans that cannot be sent are dropped, and this is logged."""
    _processor().send(rollout)


async def close(rollout: Rollout) -> None:
    """Send the waiting spans at the end of a rollout; spans that end later are not part of it."""
    spans = _processor()
    try:  # a coroutine's last spans may end a moment after it: the event loop closes its asynchronous generators
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_SPANS):
                while spans.has_open(rollout):  # ends with the spans, or the timeout
                    await asyncio.sleep(0.005)
        if spans.has_waiting(rollout):
            await asyncio.to_thread(flush, rollout)
    finally:  # also if this is cancelled
        spans.forget(rollout)


@functools.cache
def _rollout_of_process() -> Rollout | None:
    """The rollout that this process is part of, by the variables of `Rollout.environment`."""
    rollout_id, base_url = os.environ.get("AGL_ROLLOUT_ID"), os.environ.get("OPENAI_BASE_URL")
    if not rollout_id or not base_url:
        return None
    fields = propagate.get_global_textmap().fields
    if parent := {name: os.environ[name.upper()] for name in fields if name.upper() in os.environ}:
        context.attach(propagate.extract(parent))
    return Rollout(rollout_id=rollout_id, attempt=int(os.environ.get("AGL_ATTEMPT", "0")), base_url=base_url)


def _tracer() -> trace.Tracer:
    _processor()
    return trace.get_tracer("agent_lightning")


@functools.cache
def _processor() -> _RolloutSpans:
    """The processor of this process's spans, added to the user's tracer provider, or else to a new one."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    spans = _RolloutSpans()
    provider.add_span_processor(spans)
    for name in _LOGGERS_WITH_URLS:
        logging.getLogger(name).addFilter(_hide_secrets)
    return spans


def _hide_secrets(record: logging.LogRecord) -> bool:
    """Hide the attempt's secret in a log record: client libraries log the URLs of requests and of failed exports."""
    record.msg, record.args = hide_attempt_secrets(record.getMessage()), None
    return True


class _RolloutSpans(SpanProcessor):
    """Keeps the ended spans of each rollout until they are sent. Spans outside a rollout are not kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Rollout] = {}
        self._ended: dict[Rollout, list[ReadableSpan]] = {}

    def has_waiting(self, rollout: Rollout) -> bool:
        return rollout in self._ended

    def has_open(self, rollout: Rollout) -> bool:
        with self._lock:
            return rollout in self._open.values()

    def forget(self, rollout: Rollout) -> None:
        with self._lock:
            self._open = {span: other for span, other in self._open.items() if other != rollout}
            self._ended.pop(rollout, None)

    def on_start(self, span: Span, parent_context: context.Context | None = None) -> None:
        inherited = context.get_value(_ROLLOUT, parent_context)
        rollout = inherited if isinstance(inherited, Rollout) else current_rollout()
        if rollout is not None:
            with self._lock:
                self._open[span.get_span_context().span_id] = rollout

    def on_end(self, span: ReadableSpan) -> None:
        with self._lock:
            rollout = self._open.pop(span.context.span_id, None) if span.context else None
            if rollout is None:
                return
            waiting = self._ended.setdefault(rollout, [])
            waiting.append(span)
        if len(waiting) > _UNSENT:
            waiting.clear()
            logger.warning("rollout %s: %d spans were not sent: too many", rollout.rollout_id, _UNSENT)

    def send(self, rollout: Rollout, *, retry_s: float = _SEND_TIMEOUT) -> None:
        """Send the rollout's waiting spans. A gateway that is gone is tried again for `retry_s` seconds; one that is
        slow has all of `_SEND_TIMEOUT` to answer."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        with self._lock:
            waiting = self._ended.pop(rollout, [])
        if waiting:
            exporter = OTLPSpanExporter(endpoint=rollout.traces_url, timeout=_SEND_TIMEOUT)
            patience = threading.Timer(retry_s, exporter.shutdown)  # ends the pause before the next try
            patience.daemon = True
            patience.start()
            exporter.export(waiting)
            patience.cancel()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        for rollout in list(self._ended):
            self.send(rollout)
        return True

    def shutdown(self) -> None:
        """Send all waiting spans when the process of an agent ends, which a gateway that is gone must not hold up."""
        for rollout in list(self._ended):
            self.send(rollout, retry_s=_LAST_RETRY)


def _text(value: object) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, default=str, ensure_ascii=False)
