"""The page in recipes/browser, in Chromium.

Needs node, Chromium, and NODE_PATH naming a folder with puppeteer-core and onnxruntime-web; run with pytest -m slow.
"""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from cakd_cli.recipe import shipped

onnxruntime = pytest.importorskip("onnxruntime")
MODULES = Path(os.environ.get("NODE_PATH", "none"))
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and shutil.which("node"))
        or not all((MODULES / name).is_dir() for name in ("puppeteer-core", "onnxruntime-web")),
        reason="needs Chromium, node, and NODE_PATH with puppeteer-core and onnxruntime-web",
    ),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the page, which takes its runtime from this machine, and the address where it is served."""
    folder = tmp_path_factory.mktemp("site")
    page = (shipped.folder() / "browser" / "index.html").read_text()
    start = page.index('"https://cdn.jsdelivr.net/npm/onnxruntime-web@')
    end = page.index('"', start + 1) + 1
    (folder / "index.html").write_text(f'{page[:start]}"./dist/"{page[end:]}')
    (folder / "dist").symlink_to(MODULES / "onnxruntime-web" / "dist")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def opened(url, *pictures):
    command = ["node", str(Path(__file__).with_name("browser.cjs")), url, *map(str, pictures)]
    environment = os.environ | {"CHROMIUM": CHROMIUM}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["problems"] == []
    return said


def export(cakd, run, site, kind):
    folder, url = site
    result = cakd("export", run, "--format", kind, "--out", folder / "model.onnx", "--overwrite")
    assert result.code == 0, result.err
    return folder / "model.onnx", url


def test_it_says_what_python_says(cakd, toy_teacher, toy_file, site, tmp_path):
    file, url = export(cakd, toy_teacher, site, "onnx-uint8")
    images_NCHW = load_file(toy_file)["test_images"][:6]
    (probabilities_NC,) = onnxruntime.InferenceSession(file).run(
        None, {"images": images_NCHW.permute(0, 2, 3, 1).contiguous().numpy()}
    )
    pictures = [tmp_path / f"{number} ä.png" for number in range(len(images_NCHW))]
    for path, image in zip(pictures, images_NCHW, strict=True):
        Image.fromarray(image[0].numpy()).save(path)

    said = opened(url, *pictures)

    assert said["status"] == "The network tells 4 classes apart."
    found = {name: lines for name, lines, _ in said["figures"]}
    for path, probabilities_C in zip(pictures, probabilities_NC, strict=True):
        for line in found[path.name]:
            name, share = line.removesuffix("%").split(": ")
            expected = probabilities_C[["class 0", "class 1", "class 2", "class 3"].index(name)]
            assert float(share) == pytest.approx(100 * expected, abs=0.06)
        assert found[path.name][0].startswith(f"class {probabilities_C.argmax()}: ")
        assert len(found[path.name]) == 4


def test_what_it_cannot_show_is_said(cakd, toy_teacher, site, tmp_path):
    folder, url = site
    (folder / "model.onnx").unlink(missing_ok=True)
    assert "there is no model.onnx beside this page; cakd export" in opened(url)["status"]

    export(cakd, toy_teacher, site, "onnx")
    assert "model.onnx does not take pixels; write it with cakd export" in opened(url)["status"]

    export(cakd, toy_teacher, site, "onnx-uint8")
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    found = {name: text for name, _, text in opened(url, tmp_path / "wide.png", tmp_path / "text.png")["figures"]}
    assert "the network takes pictures of 8 x 8, not 9 x 8" in found["wide.png"]
    assert found["text.png"].startswith("text.png: ")
