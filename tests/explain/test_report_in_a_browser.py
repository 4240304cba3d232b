"""The report in a headless browser without a network: every picture is shown, and nothing is wider than the window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.tiny_runs import TINY_MODEL, tiny_config
from vim.explain.report import write_report
from vim.training.run_folder import RunFolder
from vim.training.trainer import Trainer

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OFFLINE = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
# Appended to the page: what the browser made of it.
PROBE = """<script>
addEventListener("load", () => {
  const pictures = [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.getBoundingClientRect().width]);
  const bars = [...document.querySelectorAll("td.bar div")].map(d => d.getBoundingClientRect().width);
  const facts = {pictures, bars, page: document.documentElement.scrollWidth, window: innerWidth,
                 fetched: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length};
  document.body.innerHTML = '<p id="facts"></p>';
  document.getElementById("facts").textContent = JSON.stringify(facts);
});
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no browser: chromium or google-chrome")
@pytest.mark.parametrize("width", [500, 1100])
def test_the_report_is_shown(page, width, tmp_path):
    command = [BROWSER, *OFFLINE, f"--user-data-dir={tmp_path}", f"--window-size={width},900", "--dump-dom", str(page)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    facts = json.loads(html.unescape(re.search(r'<p id="facts">(.*?)</p>', shown)[1]))
    assert len(facts["pictures"]) == 2 + 2 * 12
    assert all(loaded and 40 < wide < width for loaded, wide in facts["pictures"])
    assert len(facts["bars"]) == 10
    assert facts["page"] <= facts["window"], "the page scrolls down only"
    assert facts["fetched"] == 0


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("report") / "run")
    Trainer(tiny_config(data__dataset="digits", model__args=TINY_MODEL), folder).fit()
    text = write_report(folder.path).read_text(encoding="utf-8")
    page = folder.path / "probed.html"
    page.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    return page
