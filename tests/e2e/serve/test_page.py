"""The page in a real browser: Debian's Chromium through Playwright, a server with a script for a model behind it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, expect, sync_playwright

from abyssal.serve.accounts.desk import Desk
from abyssal.serve.accounts.store import Store
from tests.support.page_server import BusyService, page_server
from tests.support.serving import MODEL

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("there is no Chromium on this machine (apt-get install chromium): the page is not tested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def scripted() -> Iterator[tuple[str, BusyService]]:
    with page_server(minutes=3) as running:
        yield running


@dataclass
class Opener:
    """Opens pages, and keeps what they ask of other servers and what the browser complains about."""

    browser: Browser
    address: str
    contexts: list[BrowserContext] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def __call__(self, view: str = "", address: str | None = None, **options: Any) -> Page:
        """A page in a context of its own.

        Args:
            options: of the context.
        """
        own = address or self.address
        context = self.browser.new_context(**options)
        self.contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda asked: None if asked.url.startswith(own) else self.strangers.append(asked.url))
        page.on(
            "console", lambda said: self.complaints.append(said.text) if said.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.goto(f"{own}/{view}")
        return page

    def _said(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


@pytest.fixture
def opened(browser: Browser, scripted: tuple[str, BusyService]) -> Iterator[Opener]:
    opener = Opener(browser, scripted[0])
    yield opener
    for context in opener.contexts:
        context.close()
    assert opener.strangers == []
    assert opener.complaints == []


def ask(page: Page, text: str) -> None:
    expect(page.locator("#served-name")).to_have_text(MODEL)
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def finished(page: Page) -> None:
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_an_answer_streams_in_with_its_reasoning_folded(
    opened: Opener, scripted: tuple[str, BusyService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scripted[1], "pause", 0.02)  # a second of thinking, which a busy browser still sees
    page = opened()
    ask(page, "How does attention work?")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    expect(page.locator(".reasoning summary")).to_contain_text("Thinking")
    finished(page)
    reasoning = page.locator(".reasoning-text")
    expect(reasoning).to_be_hidden()
    page.locator(".reasoning summary").click()
    expect(reasoning).to_contain_text("Let me check the sizes")
    expect(page.locator(".reasoning summary")).to_contain_text("Thought for")
    answer = page.locator(".answer-text")
    expect(answer.locator("strong").first).to_have_text("one small vector a token")
    expect(answer.locator("ol > li")).to_have_count(3)
    expect(answer.locator("pre code")).to_contain_text("def scores(query, latent, rotary):")
    expect(answer.locator("td.align-right").first).to_have_text("32,768")
    expect(answer.get_by_role("link", name="paper")).to_have_attribute("rel", "noopener noreferrer")
    expect(page.locator(".figures")).to_contain_text(
        re.compile(r"\d+ tokens · .* a second · first after .* from cache")
    )
    assert "think" not in answer.inner_text()
    told = page.get_by_role("log", name="Answer as it comes")
    expect(told).to_contain_text("Multi-head latent attention keeps")
    expect(told.locator("p").last).to_have_text("End of the answer.")


def test_what_a_model_writes_is_text(opened: Opener) -> None:
    page = opened()
    ask(page, "something nasty")
    finished(page)
    answer = page.locator(".answer-text")
    expect(answer).to_contain_text('<script>document.title="broken"</script>')
    expect(answer.locator("strong")).to_have_text("safe")
    for name in ("img", "script", "a"):
        expect(answer.locator(name)).to_have_count(0)
    assert "broken" not in page.title()


def test_stop_ends_the_work_and_a_new_chat_begins(opened: Opener, scripted: tuple[str, BusyService]) -> None:
    page = opened()
    ask(page, "a long answer")
    expect(page.locator(".answer-text")).to_contain_text("latent")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".fate")).to_have_text("Stopped.")
    page.wait_for_timeout(300)
    assert scripted[1].running == 0 and scripted[1].ran[-1].cancelled
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.get_by_text("What would you like to ask?")).to_be_visible()


def test_an_error_amid_an_answer_is_told(opened: Opener) -> None:
    page = opened()
    ask(page, "please break")
    finished(page)
    expect(page.locator(".fate.failed")).to_have_text("The script breaks off here")
    expect(page.locator(".answer-text")).to_contain_text("the KV cache of V3")
    page.get_by_role("button", name="Try again").click()
    finished(page)
    expect(page.locator(".turn")).to_have_count(2)


def test_settings_reach_the_request(opened: Opener, scripted: tuple[str, BusyService]) -> None:
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("You are brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Max tokens").fill("77")
    page.get_by_label("Seed").fill("5")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("button", name="Settings")).to_be_focused()
    ask(page, "hello")
    finished(page)
    params = scripted[1].ran[-1].prepared.params
    assert (params.temperature, params.max_tokens, params.seed) == (0.25, 77, 5)
    sent = page.evaluate("sessionStorage.getItem('abyssal.turns')")
    assert "hello" in sent and "You are brief" not in sent
    page.reload()
    expect(page.locator(".bubble")).to_have_text("hello")
    expect(page.get_by_label("System prompt")).to_have_value("You are brief.")


@pytest.mark.slow
def test_a_value_that_cannot_be_is_told_at_its_field(opened: Opener) -> None:
    page = opened()
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("9")
    ask(page, "hello")
    expect(page.locator("#chat-error")).to_contain_text("Temperature")
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.get_by_label("Message")).to_have_value("hello")


def test_all_of_it_works_by_keyboard(opened: Opener) -> None:
    page = opened("", reduced_motion="reduce")
    expect(page.locator("#served-name")).to_have_text(MODEL)
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("a long answer")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("please")
    page.keyboard.press("Enter")
    expect(page.locator(".bubble")).to_have_text("a long answer\nplease")
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator(".answer-text")).to_contain_text("latent")
    page.keyboard.press("Escape")
    expect(page.locator(".fate")).to_have_text("Stopped.")
    reached: list[str] = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        reached.append(page.evaluate("(document.activeElement.textContent || document.activeElement.id).trim()"))
    for name in ("Try again", "Copy", "API key", "Board", "Chat"):
        assert name in reached, reached
    page.get_by_role("link", name="Board").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Board")).to_be_visible()
    page.locator("#heat").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#heat-read")).to_have_text(re.compile(r"Layer 2, expert 0: [\d.]+ × its even share"))


def test_the_board_shows_numbers_that_move(opened: Opener, scripted: tuple[str, BusyService]) -> None:
    page = opened("#board")
    expect(page.locator("#board-state")).to_contain_text(f"Ready · {MODEL} · up 3 min")
    for name in ("output", "running", "pages", "hits", "saved"):
        expect(page.locator(f"#tile-{name}")).to_have_text(re.compile(r"[1-9]"))
    expect(page.locator("#tile-saved")).to_contain_text("USD")
    before = page.locator("#tile-output").inner_text()
    expect(page.locator("#tile-output")).not_to_have_text(before, timeout=8000)
    lines = page.locator("#charts path.line").evaluate_all(
        "all => all.map(one => (one.getAttribute('d') || '').length)"
    )
    assert len(lines) > 8 and max(lines) > 1000
    expect(page.locator(".bars b")).to_have_text([re.compile(r"^8[4-7]\s%$"), re.compile(r"^5[6-9]\s%$")])
    expect(page.locator("#experts-rows tr")).to_have_count(len(scripted[1].expert_layers))
    told = page.locator("#charts svg[role=img]").first.get_attribute("aria-label")
    assert told is not None and re.search(r"output: now [\d.k]+, between [\d.k]+ and", told)


@pytest.mark.slow
def test_the_board_says_when_it_pauses_and_when_the_server_is_gone(opened: Opener) -> None:
    with page_server(minutes=1) as (address, _):
        page = opened("#board", address)
        expect(page.locator("#board-state")).to_contain_text("Ready")
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#board-state")).to_have_text("Paused")
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#board-state")).to_contain_text("Ready")
    expect(page.locator("#board-error")).to_contain_text("Trying again", timeout=8000)
    page.close()
    opened.complaints.clear()  # the browser tells of refused connections as well


def test_light_and_dark_follow_the_system_and_the_button(opened: Opener) -> None:
    def background(page: Page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = opened("", color_scheme="light"), opened("", color_scheme="dark")
    assert (background(light), background(dark)) == ("rgb(250, 251, 251)", "rgb(12, 18, 23)")
    light.get_by_role("button", name="Use the dark theme").click()
    assert background(light) == background(dark)
    light.reload()
    assert background(light) == background(dark)
    light.get_by_role("button", name="Use the light theme").click()
    assert background(light) == "rgb(250, 251, 251)"


def test_where_there_are_keys_one_is_asked_for_and_kept_in_the_tab(opened: Opener, tmp_path: Path) -> None:
    with Store(tmp_path / "accounts.sqlite") as store:
        desk = Desk(store)
        secret = desk.keys.create("ada")
        with page_server(desk=desk) as (address, service):
            page = opened("", address)
            expect(page.get_by_role("dialog", name="API key")).to_be_visible()
            page.get_by_label("Key", exact=True).fill("sk-wrong")
            page.get_by_role("button", name="Use it").click()
            expect(page.get_by_role("dialog", name="API key")).to_be_visible()
            page.get_by_label("Key", exact=True).fill(secret)
            page.keyboard.press("Enter")
            ask(page, "hello")
            finished(page)
            assert service.ran[-1].origin.namespace
            assert page.evaluate("Object.values({...localStorage}).join()").find(secret) < 0
            assert page.evaluate("sessionStorage.getItem('abyssal.key')") == secret
            page.goto(f"{address}/#board")
            expect(page.locator("#board-state")).to_contain_text("Ready")
            page.get_by_role("button", name="API key").click()
            page.get_by_role("button", name="Forget it").click()
            expect(page.locator("#board-error")).to_contain_text("wants an API key")
            page.close()
        desk.close()
    opened.complaints.clear()  # the browser tells of every 401 as well


@pytest.mark.slow
def test_nothing_is_cut_off_on_narrow_screens(opened: Opener) -> None:
    for view in ("", "#board"):
        page = opened(view)
        expect(page.locator("#board-state" if view else "#served-name")).to_contain_text(MODEL)
        for width in (320, 390, 820):
            page.set_viewport_size({"width": width, "height": 700})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            right = "[...document.querySelectorAll('button')].map((one) => one.getBoundingClientRect().right)"
            assert max(page.evaluate(right)) <= width, (view, width)
