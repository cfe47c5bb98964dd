"""The web page: by Streamlit's own AppTest, and in a headless Chromium where there is one."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from tests.apis.tiny_chat import ANSWERS, CODE, COUNT, HELLO, HTML, SECOND, SLOW, WEATHER

# Readers of Markdown differ on whether the images of the first three are code.
IMAGES = r"""`\`![x](http://127.0.0.1:9/1.png)`

foo ```![x](http://127.0.0.1:9/2.png)

`` ` `` ![x](http://127.0.0.1:9/3.png) `q`

```rust
let x = vec![1](2);
```"""
BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.fixture(autouse=True)
def main_module() -> Iterator[None]:
    """Streamlit makes its page the main module, which new processes of other tests would then import."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


def opened(monkeypatch: pytest.MonkeyPatch, repo_root: Path, *arguments: object) -> AppTest:
    monkeypatch.setattr(sys, "argv", ["web_demo.py", *map(str, arguments)])
    return AppTest.from_file(str(repo_root / "web_demo.py"), default_timeout=60).run()


def shown(page: AppTest) -> list[str]:
    return [element.value for message in page.chat_message for element in message.markdown]


def button(page: AppTest, label: str) -> Any:
    return next(element for element in page.button if element.label == label)


def test_the_page(monkeypatch: pytest.MonkeyPatch, repo_root: Path, chat_folder: Path) -> None:
    page = opened(monkeypatch, repo_root, "--model", chat_folder, "--device", "cpu")
    assert not page.exception and shown(page) == []
    next(slider for slider in page.slider if slider.label == "Temperature").set_value(0.0)
    page.chat_input[0].set_value(HELLO).run()
    page.chat_input[0].set_value(SECOND[0]).run()
    assert shown(page) == [HELLO, ANSWERS[HELLO], *SECOND]
    button(page, "Regenerate").click().run()
    assert shown(page) == [HELLO, ANSWERS[HELLO], *SECOND]
    page.text_area[0].set_value("be kind").run()
    button(page, "Clear Chat History").click().run()
    assert shown(page) == [] and page.text_area[0].value == "be kind"
    page.text_area[0].set_value("").run()
    page.chat_input[0].set_value(WEATHER).run()
    assert "asks for get_weather" in page.caption[0].value and "Shanghai" in page.code[0].value
    page.chat_input[0].set_value(IMAGES).run()
    assert page.code[1].value == "let x = vec![1](2);"
    assert not any("![" in text for text in shown(page))
    page.chat_input[0].set_value("x" * 600).run()
    assert "the limit is 512" in page.error[0].value and not page.exception
    assert "Stop" not in [element.label for element in page.button]
    page.chat_input[0].set_value(HELLO).run()
    assert "x" * 600 not in shown(page)  # it could not be asked, so others can


@pytest.mark.parametrize(
    ("arguments", "text"),
    [((), "--model"), (("--help",), "--num_rows"), (("--model", "nowhere"), "nowhere is no checkpoint")],
)
def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, repo_root: Path, arguments: tuple[str, ...], text: str
) -> None:
    page = opened(monkeypatch, repo_root, *arguments)
    assert not page.exception and page.error and text in page.code[0].value


def started(port: int, folder: Path, repo_root: Path, chat_folder: Path) -> subprocess.Popen[bytes] | None:
    """A server of the page that answers, or None where another process has the port by now."""
    command = [sys.executable, "-m", "streamlit", "run", str(repo_root / "web_demo.py"), "--server.port", str(port)]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--", "--model", str(chat_folder), "--device", "cpu"],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(folder), str(repo_root)))},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    end = time.monotonic() + 300
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=10)
            return server
        except OSError:
            time.sleep(0.2)
    server.kill()
    server.wait()
    told = (folder / "log").read_text()
    assert f"Port {port} is not available" in told, told
    return None


@pytest.fixture(scope="module")
def address(repo_root: Path, chat_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A served page, started from another folder as a user might."""
    folder, server = tmp_path_factory.mktemp("web"), None
    (folder / "sitecustomize.py").write_text(SLOW)
    while server is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = started(port, folder, repo_root, chat_folder)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)
    assert "Traceback" not in (folder / "log").read_text()


def listeners(port: int) -> set[str]:
    """Addresses on which something listens at `port`, in the kernel's spelling."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {line[1].split(":")[0] for line in lines if int(line[1].split(":")[1], 16) == port and line[3] == "0A"}


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="asks Linux")
def test_only_this_machine_is_served(address: str) -> None:
    assert listeners(int(address.rpartition(":")[2])) == {"0100007F"}  # 127.0.0.1


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser(address: str, tmp_path: Path) -> None:
    """Send, stream, stop, regenerate, reload, clear; nothing that the model wrote becomes a tag."""
    playwright = pytest.importorskip("playwright.sync_api")
    expect = playwright.expect
    expect.set_options(timeout=30_000)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        answers = page.get_by_test_id("stChatMessage")
        write = page.get_by_test_id("stChatInputTextArea")

        def send(text: str) -> None:
            """In a new conversation, because the model has learnt no other."""
            page.get_by_role("button", name="Clear Chat History").click()
            expect(answers).to_have_count(0)
            expect(write).to_be_enabled()
            write.fill(text)
            write.press("Enter")

        expect(page.get_by_role("heading", name="hf")).to_be_visible()
        slider = page.get_by_role("slider", name="Temperature")
        slider.focus()
        slider.press("Home")
        send(CODE)
        expect(page.locator("code .token", has_text="print").first).to_be_visible()  # highlighted as Python
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()

        send(COUNT)
        expect(answers.nth(1)).to_contain_text("1 2 3")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
        said = answers.nth(1).get_by_test_id("stMarkdown").inner_text()
        assert ANSWERS[COUNT].startswith(said.strip()) and len(said) < len(ANSWERS[COUNT])
        page.get_by_role("button", name="Regenerate").click()
        expect(answers.nth(1)).to_contain_text("57 58 59")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible()

        send(HTML)
        expect(answers.nth(1)).to_contain_text("<b>bold</b> <img src=x onerror=alert(1)>")
        write.fill(IMAGES)
        write.press("Enter")
        expect(answers.nth(2)).to_contain_text("vec![1](2)")
        assert page.locator("[data-testid=stChatMessage] img").count() == 0
        assert not [url for url in requests if not re.match(r"(https?|wss?)://127\.0\.0\.1:(?!9/)|data:|blob:", url)]
        page.screenshot(path=str(tmp_path / "web_demo.png"))

        page.reload()
        expect(answers.nth(1)).to_be_visible()
        page.get_by_role("button", name="Clear Chat History").click()
        expect(answers).to_have_count(0)
        browser.close()
