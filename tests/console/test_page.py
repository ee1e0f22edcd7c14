"""The console's page in a real browser, over a simulated guest's screen."""

from __future__ import annotations

import httpx
import pytest

from tests.console.conftest import ConsoleRig
from tests.support.browser import Browser, is_installed
from tests.support.console_viewer import ask

pytestmark = [
    pytest.mark.skipif(not is_installed(), reason="there is no chromium"),
    pytest.mark.timeout(180),
]

STATUS = "(document.getElementById('status')?.textContent ?? '')"
MIDDLE_PIXEL = """
(() => {
  const canvas = document.querySelector("#screen canvas");
  const pixel = canvas.getContext("2d").getImageData(canvas.width / 2, canvas.height / 2, 1, 1);
  return Array.from(pixel.data.slice(0, 3));
})()
"""


def test_a_browser_shows_the_screen_and_sends_keys(rig: ConsoleRig, http: httpx.Client) -> None:
    with Browser() as page:
        page.open(ask(http, rig.uuid)["page_url"])
        page.until(f"{STATUS} === 'Connected'")
        page.until(f"{MIDDLE_PIXEL}.join() === '32,64,96'")
        assert page.evaluate("location.hash") == "", "the ticket is out of the address"
        page.type("a")
        page.until(f"{MIDDLE_PIXEL}.join() === '0,97,159'")
        rig.cloud.wait(http.post(f"/instances/{rig.uuid}/stop").json()["operation"]["uuid"])
        page.until(f"{STATUS}.startsWith('Closed: the instance')")
        assert page.complaints == []


def test_a_page_without_a_good_ticket_says_so(rig: ConsoleRig, http: httpx.Client) -> None:
    with Browser() as page:
        page.open(f"{rig.live.origin}/console")
        page.until(f"{STATUS}.startsWith('Open this page with')")
        page.open("about:blank")
        page.open(ask(http, rig.uuid)["page_url"].replace("token=", "token=x"))
        page.until(f"{STATUS}.startsWith('The console could not be opened')")
