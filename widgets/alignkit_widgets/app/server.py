"""`alignkit app`: cockpit, comparer and frontier on one page, without code. One small Tornado server, no CDN.

The widgets' own modules run in the page; a channel replaces the Jupyter comm, over one websocket. The server listens
only on 127.0.0.1. Requests without the token of its URL, or from another host name or origin, get only a 403. Training
runs in a thread, one iteration at a time, so the page always gets an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, HTTPError, RequestHandler
from tornado.websocket import WebSocketClosedError, WebSocketHandler

from alignkit.errors import AlignkitError, RunError
from alignkit.exact.prompts import enumerate_world
from alignkit.exact.sweep import load_sweep
from alignkit.metrics import is_number
from alignkit.models.loading import load_policy
from alignkit.safe_text import visible
from alignkit.storage import parse_json
from alignkit.sweeps.results import Point
from alignkit.sweeps.sampled import run_frontier
from alignkit_widgets.app.measured import exact_points, measure_policies, measured_points
from alignkit_widgets.app.playground import LivePPO, Playground
from alignkit_widgets.boards.comparer import CheckpointComparer
from alignkit_widgets.cockpit.cockpit import TrainingCockpit
from alignkit_widgets.cockpit.ppo_run import GOLD_CHARTS, PPO_CHARTS
from alignkit_widgets.explorers.frontier import FrontierExplorer
from alignkit_widgets.explorers.own_plane import OwnPlane
from alignkit_widgets.explorers.view import view_config
from alignkit_widgets.looks import looks

WIDGETS = Path(__file__).parents[1]
FILES = {f"{name}.{kind}": WIDGETS / folder / f"{name}.{kind}" for folder, name in
         (("app", "dashboard"), ("cockpit", "cockpit"), ("boards", "board"), ("explorers", "explorer"))
         for kind in ("js", "css")}
TYPES = {".js": "text/javascript", ".css": "text/css"}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src {sockets}; "
          "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
HEADERS = {"Server": "alignkit", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff",
           "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin"}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>alignkit</title><link rel="stylesheet" href="/file/dashboard.css?token={token}">
<script type="module" src="/file/dashboard.js?token={token}"></script></head>
<body><header><h1>alignkit</h1><span id="run"></span><div role="tablist" aria-label="Views"></div></header>
<main></main><noscript>This page needs JavaScript.</noscript></body></html>
"""
HOSTS = ("127.0.0.1", "localhost")
MOST = 500  # maximum iterations of a run
SAVE_SECONDS = 60  # to finish the current iteration and save the policy when the app is ended


class PortTaken(AlignkitError, OSError):
    """The requested port is in use, or needs rights that this process does not have."""


class Channel:
    """The replacement for a widget's Jupyter comm: sends its messages to every page, and receives theirs."""

    def __init__(
        self, page: PageServer, tab: str, kind: str, config: dict, receive: Callable[[dict], None]
    ) -> None:
        self.page, self.receive = page, receive
        self.mount = {"mount": f"{tab}-{secrets.token_hex(4)}", "tab": tab, "kind": kind, "config": config}

    def send(self, message: dict) -> None:
        """Send one message of the widget to every page."""
        self.page.tell({"to": self.mount["mount"], "content": message})


class Cockpit(TrainingCockpit):
    """A cockpit with a channel as its panel."""

    def __init__(self, dashboard: Dashboard, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.dashboard = dashboard

    def open(self, mode: str, start: int = 0, unit: str = "iteration", goes_on: bool = False):
        remote = super().open(mode, start, unit, goes_on)
        config = remote.session.config | looks()
        remote.session.show_on(self.dashboard.mount("train", "cockpit", config, remote.receive))
        return remote


class PageServer:
    """A page of tabs with widgets, for those who have its token. `url` contains the token."""

    tabs: tuple[str, ...] = ()

    def __init__(self, token: str | None = None) -> None:
        self.token = token or secrets.token_urlsafe(24)
        self.pages: set[Socket] = set()
        self.widgets: dict[str, Channel] = {}  # tab -> the widget in it
        self.notes = dict.fromkeys(self.tabs, "")
        self.busy: dict[str, asyncio.Task] = {}  # tab -> the task that runs in it
        self.server = self.port = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def listen(self, port: int = 0) -> str:
        """Listen on 127.0.0.1 and return the URL; port 0 means any free port. Raises PortTaken if the port is not
        available."""
        try:
            (socket,) = bind_sockets(port, "127.0.0.1")
        except OSError as error:
            raise PortTaken(f"port {port} of 127.0.0.1 is not to be had ({error.strerror or error}): choose another "
                            "--port, or leave it out for one that is free") from None
        self.port = socket.getsockname()[1]
        routes = [(r"/", PageHandler), (r"/file/([a-z]+\.(?:js|css))", FileHandler), (r"/socket", Socket)]
        sockets = " ".join(f"ws://{name}:{self.port}" for name in HOSTS)
        self.server = HTTPServer(Application(
            [(path, handler, {"dashboard": self}) for path, handler in routes], default_handler_class=Nothing,
            default_handler_args={"dashboard": self}, websocket_max_message_size=2**20,
            policy=POLICY.format(sockets=sockets), log_function=lambda _: None,
        ))
        self.server.add_sockets([socket])
        return self.url

    async def close(self) -> None:
        """End the running tasks and the server."""
        tasks = list(self.busy.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for page in list(self.pages):
            page.close(1001, "ended")
        if self.server is not None:
            self.server.stop()

    # to and from the pages

    def tell(self, message: dict) -> None:
        """Send a message to every page."""
        text = json.dumps(message, allow_nan=False)
        for page in list(self.pages):
            page.post(text)

    def status(self) -> dict:
        """The text of the page around the widgets, with the tabs that it has."""
        return {"status": {"tabs": list(self.tabs), "said": {tab: visible(note) for tab, note in self.notes.items()},
                           "busy": list(self.busy), "shown": list(self.widgets)}}

    def mount(self, tab: str, kind: str, config: dict, receive: Callable[[dict], None]) -> Channel:
        """Put a widget in a tab and replace the previous one."""
        self.widgets[tab] = Channel(self, tab, kind, config, receive)
        self.tell(self.widgets[tab].mount)
        return self.widgets[tab]

    def unmount(self, tab: str) -> None:
        """Take the widget out of a tab, if it has one; the next status tells the pages."""
        self.widgets.pop(tab, None)

    def take(self, message: object) -> None:
        """Receive one message of a page; invalid messages are ignored."""
        if not isinstance(message, dict):
            return
        if isinstance(message.get("content"), dict):
            for widget in self.widgets.values():
                if widget.mount["mount"] == message.get("to"):
                    self._pass_on(widget, message["content"])
        else:
            self.do(message)

    def do(self, message: dict) -> None:
        """Do what a page asks for, beside what goes to its widgets."""
        raise NotImplementedError

    def _pass_on(self, widget: Channel, content: dict) -> None:
        """Pass a message to its widget; an error is shown on the page and has no other effect."""
        try:
            widget.receive(content)
        except Exception as error:
            self.notes[widget.mount["tab"]] = f"a message was not understood: {type(error).__name__}"
            self.tell(self.status())

    def _begin(self, tab: str, work) -> bool:
        if tab in self.busy:
            work.close()
            return False

        async def guarded() -> None:
            try:
                self.notes[tab] = ""
                self.tell(self.status())
                await work
            except Exception as error:  # show it on the page
                name = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
                self.notes[tab] = f"{name}{error}"
            finally:
                del self.busy[tab]
                self.tell(self.status())

        self.busy[tab] = asyncio.get_running_loop().create_task(guarded())
        return True


class Dashboard(PageServer):
    """The page for one run directory."""

    tabs = ("train", "compare", "frontier")

    def __init__(self, playground: Playground, token: str | None = None) -> None:
        super().__init__(token)
        self.playground = playground
        self.running = ""  # the name of the PPO run in progress
        self.known: dict[tuple, Point] = {}  # exact measurements of the run's policies

    def status(self) -> dict:
        """As `PageServer.status`, with the run's policies and its PPO runs."""
        playground, desk = self.playground, self.playground.task.world is not None
        preset = playground.config()
        return {
            "status": super().status()["status"] | {
                "run": visible(playground.run, 200),
                "about": visible(playground.about),
                "checkpoints": list(playground.checkpoints()),
                "runs": playground.runs(),
                "running": self.running,
                "settings": {"kl_coef": preset.kl_coef, "seed": preset.seed, "iterations": preset.iterations},
                "unmeasured": [] if desk else measured_points(playground)[1],
                "most": MOST,
                "desk": desk,
            }
        }

    def do(self, message: dict) -> None:
        if message.get("do") == "train":
            given = {"kl_coef": message.get("kl_coef"), "seed": _whole(message.get("seed"), 0, 2**31)}
            chosen = {name: value for name, value in given.items() if is_number(value)}
            self._begin("train", self._train(_whole(message.get("iterations"), 1, MOST), **chosen))
        elif message.get("do") == "continue" and message.get("name") in self.playground.unfinished():
            self._begin("train", self._continue(message["name"]))
        elif message.get("do") == "compare":
            named = message.get("names") if isinstance(message.get("names"), list) else []
            self._begin("compare", self._compare([n for n in self.playground.checkpoints() if n in named]))
        elif message.get("do") == "frontier":
            self._begin("frontier", self._frontier(message.get("recorded") is True, message.get("measure") is True))

    # the tabs

    async def _train(self, iterations: int | None, **chosen) -> None:
        await self._run(await _to_its_end(self.playground.start_ppo, iterations, **chosen))

    async def _continue(self, name: str) -> None:
        await self._run(await _to_its_end(self.playground.continue_ppo, name))

    async def _run(self, live: LivePPO) -> None:
        title = f"PPO · {live.folder.relative_to(self.playground.run)}"
        charts = PPO_CHARTS if self.playground.gold_scale is None else GOLD_CHARTS
        cockpit = Cockpit(self, title, charts, live.config.iterations, controls=live.controls,
                          log=live.folder / "metrics.jsonl")

        loop = asyncio.get_running_loop()

        def tell(words: str, share: float) -> None:  # from the training thread
            loop.call_soon_threadsafe(cockpit.session.tell_inside, words, share)

        async def step(controls: dict) -> dict:
            return await _to_its_end(live.step, controls, tell)

        self.running = live.folder.name
        try:
            await cockpit.run(step, state=live.state, checkpoints=live.checkpoints)
        finally:
            self.running = ""
            where = await _to_its_end(live.save)
            saved = f"Saved in {where}, with the log; it can be compared now."
            self.notes["train"] = saved if where else "Nothing was trained."

    async def _compare(self, names: list[str]) -> None:
        playground = self.playground
        folders = {name: playground.checkpoints()[name] for name in names}
        file = playground.run / "app" / f"votes-{'-'.join(name.replace('/', '.') for name in names)}.jsonl"
        board = await asyncio.to_thread(
            CheckpointComparer, folders, playground.prompts(), file, max_new_tokens=playground.task.max_new_tokens,
            world=playground.task.world, seed=playground.seed, title="Which checkpoint answers better?",
        )
        channel = self.mount("compare", "board", {"title": board.title}, board.receive)
        board.listeners = [channel.send]
        board.tell()

    async def _frontier(self, recorded: bool, measure: bool = False) -> None:
        playground = self.playground
        if measure and not recorded and playground.task.world is None:
            await self._measure()
        explorer = await asyncio.to_thread(FrontierExplorer, load_sweep()) if recorded else (
            await asyncio.to_thread(self._enumerated if playground.task.world is not None else self._sampled))
        if explorer is None:
            self.notes["frontier"] = "No policy of this run was measured yet."
            return
        explorer.view = self.mount("frontier", "explorer", view_config(explorer.config()), explorer.receive)
        explorer.send()

    def _enumerated(self) -> FrontierExplorer:
        """The exact frontier of eight held-out prompts, with the run's own policies."""
        playground = self.playground
        policy, tokenizer = load_policy(playground.run / "sft")
        prompts = [playground.task.world.find(text) for text in playground.prompts(8)]
        truth = enumerate_world(policy, tokenizer, playground.scorer, playground.task.world, prompts)
        points = exact_points(playground, truth, self.known)
        return FrontierExplorer(truth=truth, points=points, train=self._train_this)

    def _sampled(self) -> OwnPlane | None:
        """What was measured from samples; None if nothing was."""
        points, missing = measured_points(self.playground)
        return OwnPlane(points, run_frontier(self.playground.run), missing) if points else None

    async def _measure(self) -> None:
        loop = asyncio.get_running_loop()

        def say(note: str) -> None:
            self.notes["frontier"] = note
            self.tell(self.status())

        await asyncio.to_thread(measure_policies, self.playground, measured_points(self.playground)[1],
                                lambda note: loop.call_soon_threadsafe(say, note))
        self.notes["frontier"] = ""

    def _train_this(self, setting: dict) -> str:
        begun = self._begin("train", self._train(None, kl_coef=float(setting["kl_coef"])))
        return ("The run has started in the tab Train." if begun
                else "A run is in progress in the tab Train. Stop it first.")


class Guarded(RequestHandler):
    """A handler that answers only requests with the token, under this server's name, and from its own page."""

    def initialize(self, dashboard: PageServer) -> None:
        self.dashboard = dashboard

    def prepare(self) -> None:
        """Raises HTTPError 403."""
        hosts = [f"{name}:{self.dashboard.port}" for name in HOSTS]
        origin, token = self.request.headers.get("Origin"), self.get_query_argument("token", "")
        if (self.request.host not in hosts or origin not in (None, f"http://{self.request.host}")
                or not hmac.compare_digest(token.encode(), self.dashboard.token.encode())):
            raise HTTPError(403)

    def set_default_headers(self) -> None:
        """No other page may frame, read or cache the content, or learn the token."""
        self.set_header("Content-Security-Policy", self.settings["policy"])
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def log_exception(self, kind, error, traceback) -> None:
        """Log nothing: Tornado's own line would contain the address, which contains the token."""
        if not isinstance(error, HTTPError):
            logging.getLogger("tornado.application").error("%s in %s", kind.__name__, self.request.path)

    def write_error(self, status_code: int, **_) -> None:
        """The status in words: no traceback leaves this machine."""
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        words = "403: the address that `alignkit app` printed has a token; use that one"
        self.finish(words if status_code == 403 else f"{status_code}")


class PageHandler(Guarded):
    """The page."""

    def get(self) -> None:
        self.finish(PAGE.format(token=self.dashboard.token))


class FileHandler(Guarded):
    """The page's and the widgets' own scripts and styles."""

    def get(self, name: str) -> None:
        if name not in FILES:
            raise HTTPError(404)
        self.set_header("Content-Type", f"{TYPES[Path(name).suffix]}; charset=utf-8")
        self.finish(FILES[name].read_bytes())


class Nothing(Guarded):
    """Any other address."""

    def prepare(self) -> None:
        super().prepare()
        raise HTTPError(404)


class Socket(WebSocketHandler, Guarded):
    """The websocket of a page to the dashboard."""

    def check_origin(self, origin: str) -> bool:
        return origin == f"http://{self.request.host}"

    def open(self) -> None:
        self.dashboard.pages.add(self)
        for message in (self.dashboard.status(), *(widget.mount for widget in self.dashboard.widgets.values())):
            self.post(json.dumps(message))

    def on_message(self, message: str | bytes) -> None:
        """Receive a message of a page. Anything except a JSON object, or with NaN or too deep nesting, is ignored."""
        with contextlib.suppress(RunError):
            self.dashboard.take(parse_json(message, where="message"))

    def on_close(self) -> None:
        self.dashboard.pages.discard(self)

    def post(self, text: str) -> None:
        """Send text, if the page is still connected."""
        try:
            sent = asyncio.ensure_future(self.write_message(text))
            sent.add_done_callback(lambda done: done.cancelled() or done.exception())
        except WebSocketClosedError:
            self.dashboard.pages.discard(self)


async def _to_its_end(call: Callable, *arguments, **options):
    """Call in a thread. A cancellation waits until the call has ended, and comes at the next await: what an iteration
    did to the policy is then in the log too."""
    going = asyncio.ensure_future(asyncio.to_thread(call, *arguments, **options))
    try:
        return await asyncio.shield(going)
    except asyncio.CancelledError:
        result = await going
        asyncio.current_task().cancel()
        return result


def _whole(value: object, low: int, high: int) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool)
    return min(max(value, low), high) if good else None


async def serve(page: PageServer, port: int = 0, tell: Callable[[str], None] = print) -> None:
    """Serve a page until Ctrl-C (or SIGTERM, SIGHUP), which stops and saves a running training.

    A second Ctrl-C, or SAVE_SECONDS without completion, ends this process at once. Raises PortTaken.
    """
    ended, at_once = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def end(number: int) -> None:
        if ended.is_set() and number == signal.SIGINT:
            at_once.set()
        ended.set()

    restore = [_on_signal(loop, getattr(signal, name), end) for name in ("SIGINT", "SIGTERM", "SIGHUP")
               if hasattr(signal, name)]  # Windows has no SIGHUP
    try:
        tell(f"\n  {page.listen(port)}\n\nOpen this address in a browser on this machine. Ctrl-C ends it.")
        await ended.wait()
        tell("ending …")
        closing, second = loop.create_task(page.close()), loop.create_task(at_once.wait())
        await asyncio.wait([closing, second], timeout=SAVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not closing.done():
            tell("ended at once; training since the last checkpoint is lost")
            sys.stdout.flush()
            os._exit(130)  # any other exit waits for the training thread
        second.cancel()
        await closing
    finally:
        for undo in restore:
            undo()


def _on_signal(loop: asyncio.AbstractEventLoop, number: int, call: Callable[[int], None]) -> Callable[[], object]:
    """Call call(number) in the loop on a signal, unless the signal is ignored (nohup); returns a function that undoes
    this."""
    before = signal.getsignal(number)
    if before == signal.SIG_IGN:
        return lambda: None
    try:
        loop.add_signal_handler(number, call, number)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(call, number))
        return lambda: signal.signal(number, before)
    return lambda: (loop.remove_signal_handler(number), signal.signal(number, before))
