"""axe-core finds nothing on the page, in a real browser: on a desktop and a phone, light and dark, everything open."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.report.test_report import ATTACKS, CONFIG, method, results
from trace_jax.report.page import render

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
AXE = os.environ.get("AXE_CORE", "")  # the file axe.min.js of the package axe-core
INSIDE = "axe.run().then(r => parent.postMessage(JSON.stringify(r.violations.map(v => [v.id, v.nodes[0].html])), '*'))"
OUTSIDE = (
    '<iframe src="inside.html" width={} height=900></iframe><script>onmessage = e => document.title = e.data</script>'
)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
    pytest.mark.skipif(not Path(AXE).is_file(), reason="AXE_CORE does not name axe.min.js (npm install axe-core)"),
]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(tmp_path, width, dark):
    question = {"prompt": "Which?", "options": ["a", "b"], "truth": "b", "answers": {"trace": [0.8, 0.2]}}
    text = {"prompt": "It", "options": (), "truth": "is", "answers": {"trace": "was"}}
    losses = {"trace": {"step": [1, 2], "loss": [2.0, 1.0]}}
    methods = {"uniform": method(0, attacks=ATTACKS), "trace": method(1)}
    about = {"examples": [question, text], "losses": losses, "config": CONFIG | {"seed": 0}, "changed": {"unlearning"}}
    page = render(results(methods=methods, conclusion="At 0.5 trace is best.", **about))
    page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("<details>", "<details open>")
    if dark:
        page = page.replace("@media screen and (prefers-color-scheme: dark)", "@media screen")
    script = f"<script>{Path(AXE).read_text('utf-8')}</script><script>{INSIDE}</script></body>"
    (tmp_path / "inside.html").write_text(page.replace("</body>", script), "utf-8")
    (tmp_path / "outside.html").write_text(f"<title></title>{OUTSIDE.format(width)}", "utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--window-size={max(width, 600)},1000", "--virtual-time-budget=20000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "outside.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search("<title>(.*)</title>", done.stdout)
    assert found and json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")) == []
