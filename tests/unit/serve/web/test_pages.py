"""The page's files: complete, apart from the world, and sent with headers that keep them so."""

from __future__ import annotations

import asyncio
import re
from html.parser import HTMLParser

import httpx
import pytest
from fastapi import FastAPI

from abyssal.serve.web.pages import HEADERS, page_files, page_router

FILES = {name: body.decode() for name, body in page_files().items()}
SCRIPTS = {name: text for name, text in FILES.items() if name.endswith(".js")}


def get(path: str, **headers: str) -> httpx.Response:
    app = FastAPI()
    app.include_router(page_router())

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html"),
        ("/web/main.js", "text/javascript"),
        ("/web/style.css", "text/css"),
        ("/web/icon.svg", "image/svg+xml"),
    ],
)
def test_files_are_sent_with_their_kind_and_a_strict_policy(path: str, kind: str) -> None:
    answer = get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(kind)
    assert {name.lower(): value for name, value in HEADERS.items()}.items() <= dict(answer.headers).items()
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert get(path, **{"if-none-match": answer.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("path", ["/web/pages.py", "/web/nothing.js", "/web/..%2Fapp.py", "/web/__init__.py"])
def test_nothing_else_is_sent(path: str) -> None:
    assert get(path).status_code == 404


class Parts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.lasttag in ("script", "style") and data.strip():
            self.inline.append(data)


@pytest.fixture(scope="module")
def page() -> Parts:
    parts = Parts()
    parts.feed(FILES["index.html"])
    return parts


def test_the_page_holds_no_code_and_no_style(page: Parts) -> None:
    assert page.inline == []
    assert [
        name for _, attributes in page.tags for name in attributes if name == "style" or name.startswith("on")
    ] == []


def test_nothing_comes_from_elsewhere(page: Parts) -> None:
    """Whatever a file names is a file here; XML's namespaces are names alone."""
    named = [
        attributes.get("src") or attributes.get("href")
        for tag, attributes in page.tags
        if tag in ("script", "link", "img")
    ]
    assert named and all(name and name.removeprefix("/web/") in FILES for name in named)
    for name, text in FILES.items():
        hosts = re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]+", text.replace("http://www.w3.org/2000/svg", ""))
        assert hosts == [], name
        assert "@import" not in text and "url(" not in text, name


def test_modules_import_files_that_there_are() -> None:
    for name, text in SCRIPTS.items():
        for imported in re.findall(r'^(?:import|export) .* from "([^"]+)";$', text, re.MULTILINE):
            assert imported.removeprefix("./") in SCRIPTS, f"{name} imports {imported}"


def test_all_modules_are_asked_for_at_once(page: Parts) -> None:
    """Else each would be asked for only when the one that imports it has come."""
    loaded = {attributes.get("src") or attributes.get("href") for _, attributes in page.tags}
    assert {f"/web/{name}" for name in SCRIPTS} <= loaded


MARKUP = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|setHTML"


def test_text_never_becomes_markup() -> None:
    for name, text in SCRIPTS.items():
        found = re.findall(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|setHTML", text
        )
        assert found == [], name


def test_the_key_is_kept_in_the_tab_alone() -> None:
    users = [name for name, text in SCRIPTS.items() if re.search(r"\b(?:tab|browser)\.(?:set|get)\(\"key\"", text)]
    assert users == ["api.js"]
    assert 'browser.set("key"' not in SCRIPTS["api.js"] and "localStorage" not in SCRIPTS["api.js"]


def test_ids_that_scripts_ask_for_are_on_the_page(page: Parts) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    asked = {name for text in SCRIPTS.values() for name in re.findall(r'byId\("([\w-]+)"\)', text)}
    assert asked <= set(ids)
    referred = ("aria-labelledby", "aria-describedby", "aria-controls", "for")
    for tag, attributes in page.tags:
        for name in referred:
            assert all(one in ids for one in (attributes.get(name) or "").split()), (tag, name)
