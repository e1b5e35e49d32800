"""The explorer as a reader meets it: JupyterLab on loopback, driven in headless Chromium over its DevTools protocol."""

import asyncio
import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.test_explore import tables

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WITHOUT_NETWORK = [
    "--disable-background-networking", "--disable-sync", "--disable-component-update", "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]  # fmt: skip
"""Nothing but loopback can be reached: a table or widget that needs a content delivery network fails here."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def process(command: list[str | Path], log: Path, **where) -> Iterator[None]:
    """A process with children of its own, ended with them."""
    with log.open("wb") as out:
        started = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True, **where)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
        try:
            started.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def fetched(url: str, log: Path, seconds: float = 600) -> bytes:
    """What a server answers, once it is up."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                return answer.read()
        except OSError as error:
            if time.monotonic() > end:
                raise TimeoutError(f"{url}: {error}\n{log.read_text(errors='replace')[-2000:]}") from error
            time.sleep(0.2)


class Page:
    """A browser page: evaluate JavaScript in it, wait for what it shows."""

    def __init__(self, socket) -> None:
        self.socket, self.number = socket, 0

    async def call(self, method: str, **params) -> dict:
        self.number += 1
        await self.socket.write_message(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            answer = json.loads(await self.socket.read_message())
            if answer.get("id") == self.number:
                return answer["result"]

    async def get(self, script: str):
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, script: str, what: str, seconds: float = 600):
        """The first value of a script that is true in JavaScript."""
        end = time.monotonic() + seconds
        while not (value := await self.get(script)):
            assert time.monotonic() < end, f"{what}: not within {seconds} s; the page shows: {await self.get(SHOWN)}"
            await asyncio.sleep(0.2)
        return value


SHOWN = "document.body.innerText.slice(0, 2000)"
HEADS = "[...document.querySelectorAll('.cai-head')].slice(0, 2).map(x => x.textContent)"

NOTEBOOK = """
import pickle
import itables
from cai_em import report
from tests.test_figures import LOOK
itables.init_notebook_mode(connected=False)  # as in 00_explore
explorer = report.Explorer(*pickle.load(open("tables.pickle", "rb")), LOOK)
explorer.view()
"""


@pytest.fixture
def lab(tmp_path, root) -> Iterator[tuple[str, Path]]:
    """JupyterLab on loopback with a notebook that shows the explorer: its address, and its log."""
    import pickle

    (tmp_path / "tables.pickle").write_bytes(pickle.dumps(tables()))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK.strip())])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "explore.ipynb")
    port, token, log = free_port(), secrets.token_hex(8), tmp_path / "lab.log"
    folders = {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = {**os.environ, **folders, "PYTHONPATH": f"{root / 'lib'}{os.pathsep}{root}"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={tmp_path}",
               "--LabApp.expose_app_in_browser=True"]  # fmt: skip
    with process(command, log, cwd=tmp_path, env=environment):
        fetched(f"http://127.0.0.1:{port}/api/status?token={token}", log)
        yield f"http://127.0.0.1:{port}/lab/tree/explore.ipynb?reset&token={token}", log


@pytest.fixture
def browser(tmp_path) -> Iterator[str]:
    """Headless Chromium with a profile of its own: the address of its page's debugger."""
    port, log = free_port(), tmp_path / "chromium.log"
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", *WITHOUT_NETWORK, "--window-size=1400,1000",
               f"--remote-debugging-port={port}", f"--user-data-dir={tmp_path / 'profile'}", "about:blank"]  # fmt: skip
    with process(command, log):
        pages = json.loads(fetched(f"http://127.0.0.1:{port}/json", log))
        yield next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")


async def visit(address: str, debugger: str, picture: Path) -> None:
    """Connect to the browser, and look at the notebook in it."""
    from tornado.websocket import websocket_connect

    connection = await websocket_connect(debugger, max_message_size=10**9)
    try:
        await look(Page(connection), address, picture)
    finally:
        connection.close()
        while await connection.read_message() is not None:
            pass  # what was still on its way; None: the browser has closed, too


async def look(page: Page, address: str, picture: Path) -> None:
    """Open the notebook, run it, press cells of the heat map, search, open the table."""
    await page.call("Page.enable")
    await page.call("Page.navigate", url=address)
    await page.until("!!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell'))", "the notebook")
    notebook = "[...jupyterapp.shell.widgets('main')].find(x => x.sessionContext)"
    await page.until(f"{notebook}?.sessionContext.session?.kernel?.connectionStatus === 'connected'", "a kernel")
    await page.get(f"jupyterapp.shell.activateById({notebook}.id)")
    await page.get("jupyterapp.commands.execute('notebook:run-all-cells').then(() => 1)")
    cells = await page.until("document.querySelectorAll('.cai-cell').length", "the heat map")
    assert cells == 4, "a button for every condition"

    # A press on a cell shows the responses behind it, beside those of the baseline.
    press = "(t => [...document.querySelectorAll('.cai-cell')].find(x => x.title.startsWith(t)).click())"
    await page.get(f"{press}('Good_one × help')")
    await page.until(f"{HEADS}[0]?.startsWith('Good_one on help: 10 responses')", "the responses of the pressed cell")
    assert (await page.get(HEADS))[1].startswith("Baseline on help: 10 responses, 8 scored")

    # What a model wrote is shown as text: no script of a response has run, no markup of it became an element.
    assert await page.get("[...document.querySelectorAll('.cai-text')].some(x => x.textContent.includes('<script>'))")
    assert (
        await page.get("document.querySelectorAll('.cai-text script, .cai-text img, .cai-text .MathJax').length") == 0
    )

    # Searching leaves the responses that contain the words.
    await page.get(
        "(box => { box.value = 'emoji'; box.dispatchEvent(new Event('change', {bubbles: true})); })"
        "(document.querySelector('input[placeholder=\"words of a response\"]'))"
    )
    await page.until(f"{HEADS}[0]?.startsWith('Good_one on help: 2 responses')", "the search")

    # The table widget works without a network.
    await page.get("document.querySelector('.jupyter-widget-Collapse-header').click()")
    await page.until(
        "document.querySelectorAll('.dt-container tbody tr').length > 1", "the table of all selected responses"
    )
    errors = "[...document.querySelectorAll('.jp-OutputArea-output[data-mime-type*=error], [data-mime-type*=stderr]')]"
    assert await page.get(f"{errors}.map(x => x.textContent)") == []
    shot = await page.call("Page.captureScreenshot", format="png")
    picture.write_bytes(base64.b64decode(shot["data"]))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to show JupyterLab in")
def test_the_explorer_in_a_real_browser(lab, browser, tmp_path):
    address, _ = lab
    picture = tmp_path / "explorer.png"
    asyncio.run(visit(address, browser, picture))
    assert picture.stat().st_size > 20_000
