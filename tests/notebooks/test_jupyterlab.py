"""`./run_all.sh --lab` as people use it: notebooks driven through the JupyterLab server's REST and websocket API.

The server is the one that the command starts. Notebooks are read through its contents API and never saved; what they
write goes to a folder of the test.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import websocket

from lib import registry
from lib.paths import ROOT

pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif(not registry.organisms(), reason="needs a shipped organism under data/organisms"),
]
TOKEN = uuid.uuid4().hex
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE = 240.0  # seconds; a cell takes far less unless the machine is busy
WIDGET = "application/vnd.jupyter.widget-view+json"


class Lab:
    """A running JupyterLab server: its address, and requests to it."""

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"

    def __call__(self, verb: str, path: str, /, **content: Any) -> Any:
        headers = {"Authorization": f"token {TOKEN}"}
        reply = requests.request(
            verb, f"http://{self.address}{path}", json=content or None, headers=headers, timeout=PATIENCE
        )
        reply.raise_for_status()
        return reply.json() if reply.content else None

    def cells(self, notebook: str) -> list[str]:
        """Sources of the code cells of a notebook."""
        content = self("GET", f"/api/contents/notebooks/{notebook}")["content"]
        return [cell["source"] for cell in content["cells"] if cell["cell_type"] == "code"]


class Kernel:
    """A notebook's kernel as a browser tab sees it: requests and messages over one websocket."""

    def __init__(self, lab: Lab, notebook: str) -> None:
        path = f"notebooks/{notebook}"
        session = lab("POST", "/api/sessions", path=path, name=path, type="notebook", kernel={"name": "python3"})
        self.lab, self.session, self.id = lab, session["id"], session["kernel"]["id"]
        address = f"ws://{lab.address}/api/kernels/{self.id}/channels?session_id={self.session}&token={TOKEN}"
        self.socket = websocket.create_connection(address, timeout=PATIENCE)

    def send(self, kind: str, content: dict[str, Any]) -> str:
        header = {"msg_id": uuid.uuid4().hex, "msg_type": kind, "session": self.session, "username": ""}
        message = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
        self.socket.send(json.dumps(message))
        return header["msg_id"]

    def receive(self) -> dict[str, Any]:
        """The next message. One with a picture is binary: how many parts, their offsets, then the message itself."""
        frame = self.socket.recv()
        if isinstance(frame, str):
            return json.loads(frame)
        frame = bytes(frame)
        start, end = (int.from_bytes(frame[place : place + 4], "big") for place in (4, 8))
        return json.loads(frame[start:end])

    def execute(self, code: str, meanwhile: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
        """Runs a cell; its messages until the kernel has replied and is idle. `meanwhile` is called throughout."""
        asked, messages, waiting = self.send("execute_request", {"code": code}), [], {"execute_reply", "idle"}
        self.socket.settimeout(0.2)
        deadline = time.monotonic() + PATIENCE
        while waiting:
            meanwhile()
            assert time.monotonic() < deadline, f"no answer to {code[:60]!r}"
            try:
                message = self.receive()
            except websocket.WebSocketTimeoutException:
                continue
            if message["parent_header"].get("msg_id") == asked:
                messages.append(message)
                waiting -= {message["msg_type"], message["content"].get("execution_state")}
        return messages

    def run(self, code: str) -> list[dict[str, Any]]:
        """`execute` for a cell that must not fail."""
        messages = self.execute(code)
        assert reply(messages)["status"] == "ok", reply(messages).get("evalue")
        return messages


def reply(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return next(message["content"] for message in messages if message["msg_type"] == "execute_reply")


def shown(messages: list[dict[str, Any]]) -> set[str]:
    """The kinds of data that a cell displayed."""
    return {kind for message in messages for kind in message["content"].get("data", {}) if "data" in message["content"]}


def printed(messages: list[dict[str, Any]]) -> str:
    return "".join(message["content"]["text"] for message in messages if message["msg_type"] == "stream")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lab")


@pytest.fixture(scope="module")
def lab(folder: Path) -> Iterator[Lab]:
    """What `./run_all.sh --lab` starts, without opening a browser, with an own configuration and own results."""
    (folder / "config").mkdir()
    settings = {"open_browser": False, "port": 0, "ip": "127.0.0.1"}
    settings_file = {"ServerApp": settings, "IdentityProvider": {"token": TOKEN}}
    (folder / "config" / "jupyter_server_config.json").write_text(json.dumps(settings_file))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {f"JUPYTER_{name}_DIR": str(folder / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    environment |= {f"APPROX_{name}": str(folder / name.lower()) for name in ("RESULTS", "CACHE", "FIGURES")}
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-P", "-m", "lib.run", "--lab"]
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield started(server, folder)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # kernels are in sessions of their own and end with their server
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def started(server: subprocess.Popen[bytes], folder: Path) -> Lab:
    deadline = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < deadline:
        for file in (folder / "runtime").glob("jpserver-*.json"):
            lab = Lab(json.loads(file.read_text())["port"])
            lab("GET", "/api/status")
            return lab
        time.sleep(0.2)
    raise AssertionError((folder / "log").read_text()[-2000:])


def test_an_interrupted_sweep_keeps_what_was_finished(lab: Lab, folder: Path):
    kernel = Kernel(lab, "02_sparsification.ipynb")
    cells = lab.cells("02_sparsification.ipynb")
    imports, parameters, opening = cells[:3]
    sweep = next(cell for cell in cells if "study.sweep" in cell)
    kernel.run(imports)
    kernel.run(parameters)
    kernel.run("model = 'tiny-lama'")
    failed = reply(kernel.execute(opening))
    assert failed["ename"] == "ModelError" and failed["evalue"].startswith("unknown model 'tiny-lama'; choose one of")
    assert failed["traceback"] == [f"ModelError: {failed['evalue']}"] and "\n" not in failed["evalue"]
    kernel.run("model, n_prompts, max_new_tokens, levels = 'tiny-llama', 4, 12, [0.4, 0.5]")
    kernel.run("from lib.conditions import grid")
    kernel.run("grids.sparsification = lambda levels, layers: grid('teal', '', layers, sparsity=levels)")
    kernel.run(opening)

    def records() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("results/tiny-llama/records/*.json")}

    interrupted: dict[str, int] = {}

    def interrupt_after_the_first_condition() -> None:
        if len(records()) >= 2 and not interrupted:  # the exact model's and the first condition's
            interrupted.update(records())
            lab("POST", f"/api/kernels/{kernel.id}/interrupt")

    messages = kernel.execute(sweep, interrupt_after_the_first_condition)
    assert WIDGET in shown(messages)  # the progress bar
    assert any(message["msg_type"] == "comm_msg" for message in messages)  # and its updates
    assert reply(messages)["ename"] == "KeyboardInterrupt"
    kernel.run(sweep)
    assert printed(kernel.run("print(len(table))")).strip() == "3"
    assert {name: records()[name] for name in interrupted} == interrupted and len(records()) == 3


def test_the_explorer_answers_to_its_widgets(lab: Lab):
    kernel = Kernel(lab, "00_explore.ipynb")
    *cells, panel = lab.cells("00_explore.ipynb")
    for cell in cells:
        messages = kernel.run(cell)
        if '"tiny-llama"' in cell:
            kernel.run("n_prompts, max_new_tokens = 8, 12")
        if "explorer.figure" in cell:
            assert "image/png" in shown(messages)
    assert WIDGET in shown(kernel.run(panel))

    ids = "json.dumps([panel.request.model_id, panel.go.model_id, panel.result.model_id, explorer.requests[1]])"
    request, button, result, text = json.loads(printed(kernel.run(f"import json\nprint({ids})")))
    chosen = {"method": "update", "state": {"value": text}, "buffer_paths": []}
    kernel.send("comm_msg", {"comm_id": request, "data": chosen})
    kernel.send("comm_msg", {"comm_id": button, "data": {"method": "custom", "content": {"event": "click"}}})
    updates: list[str] = []
    kernel.socket.settimeout(PATIENCE)
    while not any("verdict" in update for update in updates):
        message = kernel.receive()
        if message["msg_type"] == "comm_msg" and message["content"]["comm_id"] == result:
            updates.append(json.dumps(message["content"]["data"]))
    assert printed(kernel.run("print(panel.reply.value == '', panel.ask.disabled)")).split() == ["True", "False"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_launcher_opens_in_a_real_browser(lab: Lab, tmp_path: Path):
    """Headless, with an empty profile: the document after the page's scripts have run."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --user-data-dir={tmp_path} --virtual-time-budget=60000"
    address = f"http://{lab.address}/lab?reset&token={TOKEN}"
    command = [str(CHROMIUM), *flags.split(), "--dump-dom", address]
    document = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout
    assert document.count("jp-LauncherCard-label") >= 4 and "Python 3 (ipykernel)" in document
    assert ">notebooks<" in document  # the file browser shows this project
