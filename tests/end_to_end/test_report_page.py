"""The report opens in a real browser: charts are drawn, pictures load, nothing fails on the console."""

import math
import shutil
import subprocess

import pytest
from PIL import Image

from polymodal import pages
from polymodal.core.errors import PolymodalError
from polymodal.evaluate import run_page
from polymodal.evaluate.thumbnails import thumbnail

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--v=0",
]


@pytest.fixture
def page(tmp_path):
    metrics = [
        {"step": s, "loss": 3 * math.exp(-s / 60) + 0.1, "tokens_per_second": 4000 + s, "memory_gib": 1.0}
        for s in range(1, 200)
    ]
    picture = Image.new("RGB", (56, 56), "white")
    shown = [
        pages.Card(
            "Which digit <b>is</b> this?",
            [("before", "3", 0.0), ("after", "7", 1.0)],
            "7",
            [thumbnail(picture)],
        )
    ]
    text = run_page.page(
        "Digits",
        "A small model.",
        {"right after": "94%"},
        run_page.curves(metrics, 150),
        shown,
        [("Talk to it.", "polymodal chat x")],
    )
    return pages.write(tmp_path / "report.html", text)


def test_the_page_holds_everything_itself(page):
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "") and "https://" not in text
    assert "&lt;b&gt;is&lt;/b&gt;" in text and text.count("<svg") == 3 and "stopped and resumed" in text


def test_sheets_of_samples_stand_by_step_and_are_not_too_many(tmp_path):
    for step in range(1, 41):
        (tmp_path / "samples" / f"step-{step:08d}").mkdir(parents=True)
        Image.new("RGB", (80, 80), "red").save(tmp_path / "samples" / f"step-{step:08d}" / "sheet.png")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 40, "loss": 0.25}\n')
    steps = [step for step, _ in run_page.sheets(tmp_path)]
    assert len(steps) == run_page.SHEETS and steps[0] == 1 and steps[-1] == 40 and steps == sorted(steps)
    text = run_page.of_generation(tmp_path, ["a <cat>"])
    assert text.count("<figure>") == run_page.SHEETS and "a &lt;cat&gt;" in text and "step 40<" in text


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: the page was not opened in a browser")
def test_a_browser_draws_it(page, tmp_path):
    shot = tmp_path / "shot.png"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, profile, f"--screenshot={shot}", "--window-size=1100,1400", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    picture = Image.open(shot).convert("RGB")
    blue = sum(1 for r, g, b in picture.getdata() if b > 180 and r < 110 and g < 150)
    assert blue > 300, "the curves are not drawn"
    script = (
        "[document.title, document.querySelectorAll('svg path').length, "
        "[...document.images].every(i=>i.naturalWidth>0)].join('|')"
    )
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", f"<script>document.title={script}</script></body>"))
    dom = subprocess.run(
        [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=2000", "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert "<title>Digits|5|true</title>" in dom, dom[:300]


def test_a_directory_without_metrics_is_reported(tmp_path):
    with pytest.raises(PolymodalError, match="metrics.jsonl cannot be read: No such file"):
        run_page.read_metrics(tmp_path)
