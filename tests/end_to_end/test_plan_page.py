"""The page of `plan --html` opens in a real browser: a pipeline's memory and its timeline are drawn, and nothing fails."""

import shutil
import subprocess
from dataclasses import replace

import pytest
from PIL import Image

from polymodal import recipe as recipes
from polymodal.plan import accelerators, command, page, planner
from tests.models import tiny

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--v=0",
]  # fmt: skip


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here: the page was not opened in a browser")
def test_a_browser_draws_a_pipeline(tmp_path):
    config = tiny.config("qwen2.5-vl", text_config__num_hidden_layers=2, vision_config__depth=2, vision_config__fullatt_block_indexes=[1])  # fmt: skip
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(tmp_path / "model")
    made = recipes.validate({
        "name": "drawn", "model": {"source": str(tmp_path / "model")}, "data": {"max_length": 256},
        "parallel": {"pp": 2, "offload": ["activations"]}, "train": {"global_batch_size": 4},
    })  # fmt: skip
    small = replace(accelerators.named("h100"), memory=4 * 2**20)  # bars of a tiny model are to be seen
    asked = planner.Question(2, small, 0.25, 64)
    file = tmp_path / "plan.html"
    assert command.main(made, asked, html=file) == 0
    counts = "['svg','svg rect','svg polygon'].map(s=>document.querySelectorAll(s).length).join('|')"
    probe = tmp_path / "probe.html"
    probe.write_text(file.read_text().replace("</body>", f"<script>document.title={counts}</script></body>"))
    shot, profile = tmp_path / "shot.png", f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *FLAGS, profile, f"--screenshot={shot}", "--window-size=1100,1600", file.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    picture = list(Image.open(shot).convert("RGB").getdata())
    for kind in ("forward", "backward"):
        wanted = tuple(int(page.ACTIONS[kind][i : i + 2], 16) for i in (1, 3, 5))
        seen = sum(1 for pixel in picture if max(abs(a - b) for a, b in zip(pixel, wanted, strict=True)) < 8)
        assert seen > 2000, f"no {kind} passes are drawn"
    dom = subprocess.run(
        [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=2000", "--dump-dom", probe.as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    title = dom.partition("<title>")[2].partition("</title>")[0]
    pictures, bars, areas = map(int, title.split("|"))
    assert pictures == 4, "memory, timeline, and the course of two stages"
    assert bars >= 2 * 2 * 4 + 8 and areas > 2 * 4, (
        "passes of 2 ranks and 4 micro-batches, and kinds of memory"
    )
