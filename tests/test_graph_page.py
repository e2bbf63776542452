"""fp8-inspect graph: every plugin and every edge of a layer is on the page, which is self-contained and well-formed."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint as tiny

from fp8.builder import build, engine
from fp8.builder.checkpoint import Checkpoint
from fp8.builder.request import Reporter, Request, Source
from fp8.models import config as models
from fp8.scripts import inspect, quantize
from fp8.scripts.layout import place

SVG = "{http://www.w3.org/2000/svg}"
LAYER = "model.layers.1"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; on Debian: apt install chromium"
)
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COLORS = {"fp8": (21, 128, 61), "high": (220, 38, 38), "plugin": (219, 234, 254)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("page") / "checkpoint", tiny.qformat("fp8", "fp8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page_engine")
    source = tiny.source(root / "checkpoint", tiny.qformat("fp8", "fp8"))
    build.write(build.compile(source, Request(4, 128, 64, "cpu"), Reporter()), source, root / "engine", Reporter())
    return root / "engine"


def page(directory: Path, output: Path, layer: int = 1) -> str:
    assert inspect.main(["graph", str(directory), "--layer", str(layer), "--output", str(output)]) == 0
    return output.read_text()


def svgs(text: str) -> list[ET.Element]:
    return [ET.fromstring(found) for found in re.findall(r"<svg .*?</svg>", text, re.DOTALL)]


def boxes(svg: ET.Element, kind: str) -> list[str]:
    return [g.get("data-node", "") for g in svg.iter(f"{SVG}g") if g.get("class") == f"box {kind}"]


def edges(svg: ET.Element, kind: str) -> set[tuple[str | None, str | None, str | None]]:
    paths = [p for p in svg.iter(f"{SVG}path") if p.get("class") == f"edge {kind}"]
    return {(p.get("data-tensor"), p.get("data-source"), p.get("data-target")) for p in paths}


def test_an_engine_s_layer_has_every_plugin_and_edge(built, tmp_path):
    (svg,) = svgs(page(built, tmp_path / "page.html"))
    plan = engine.load(built).plan
    steps = [s for s in plan.steps if s.name.startswith(f"{LAYER}.")]
    assert sorted(boxes(svg, "plugin")) == sorted(s.name for s in steps) and len(steps) == 7
    home = {t: s.name for s in plan.steps for t in s.outputs}
    for kind, wanted in (("fp8", ("float8_e4m3fn",)), ("high", ("bfloat16", "float32"))):
        found = edges(svg, kind)
        for step in steps:
            flowing = [t for t in step.inputs if t and plan.buffer(t).kind in ("activation", "kv_cache")]
            for tensor in (t for t in flowing if plan.buffer(t).dtype in wanted):
                source = home.get(tensor, "") if home.get(tensor, "").startswith(LAYER) else f"from {tensor}"
                assert (tensor, source, step.name) in found


def test_a_checkpoint_is_drawn_before_and_after_fusion(checkpoint, tmp_path):
    before, after = svgs(page(checkpoint, tmp_path / "page.html"))
    assert len(boxes(after, "plugin")) == 7 and not boxes(after, "op")
    assert not boxes(before, "plugin") and f"{LAYER}.mlp.down_proj/quantize" in boxes(before, "op")
    quantized = (
        f"{LAYER}.mlp.gate_proj/quantize",
        f"{LAYER}.mlp.gate_proj/quantize",
        f"{LAYER}.mlp.up_proj/dequantize",
    )
    assert quantized in edges(before, "fp8")
    labels = {"".join(t.itertext()) for t in after.iter(f"{SVG}text") if t.get("class") == "label fp8"}
    assert "e4m3 [T,320]320 B/token" in labels and "e4m3 [blocks,64,2,64]8192 B/block" in labels
    assert any("w e4m3 [640,192]" in (t.text or "") for t in after.iter(f"{SVG}text"))


def test_the_page_is_well_formed_and_loads_nothing(checkpoint, tmp_path):
    text = page(checkpoint, tmp_path / "page.html", 0)
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            assert not {"src", "href"} & {name for name, _ in attrs} and tag not in ("script", "link")
            if tag not in ("meta", "path", "rect"):
                opened.append(tag)

        def handle_endtag(self, tag):
            if tag not in ("path", "rect"):
                assert opened.pop() == tag

        def handle_startendtag(self, tag, attrs):
            assert tag == "rect"

    Reader().feed(text)
    assert not opened and "url(" not in text


def test_boxes_do_not_overlap_and_edges_go_down(checkpoint, tmp_path):
    for svg in svgs(page(checkpoint, tmp_path / "page.html")):
        rects = [tuple(float(r.get(k, 0)) for k in ("x", "y", "width", "height")) for r in svg.iter(f"{SVG}rect")]
        for i, (x, y, w, h) in enumerate(rects):
            assert x >= 0 and x + w <= float(svg.get("width", 0))
            assert not any(x < a + c and a < x + w and y < b + d and b < y + h for a, b, c, d in rects[:i])


def test_the_drawings_alone_are_one_svg(checkpoint, tmp_path):
    assert inspect.main(["graph", str(checkpoint), "--svg", str(tmp_path / "flow.svg")]) == 0
    outer = ET.parse(tmp_path / "flow.svg").getroot()
    assert len([e for e in outer if e.tag == f"{SVG}svg"]) == 2


def test_what_cannot_be_drawn_is_refused(checkpoint, tmp_path, capsys):
    assert inspect.main(["graph", str(checkpoint), "--layer", "7", "--output", str(tmp_path / "p.html")]) == 1
    assert "layer 7 does not exist; the model has layers 0 to 1" in capsys.readouterr().err
    assert inspect.main(["graph", str(tmp_path / "nowhere"), "--svg", str(tmp_path / "p.svg")]) == 1
    with pytest.raises(SystemExit):
        inspect.main(["graph", str(checkpoint)])


def test_a_long_edge_passes_between_the_boxes_of_a_rank():
    placed = place({"a": 100, "b": 100, "c": 100}, [("a", "b"), ("b", "c"), ("a", "c")], 40)
    (x, y) = placed.routes[2][1]
    assert y == placed.centers["b"][1] and abs(x - placed.centers["b"][0]) >= 70


def screenshot(page: Path, width: int, height: int) -> np.ndarray:
    """The page as Chromium paints it, uint8 [height, width, 3]."""
    picture = page.with_suffix(".png")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    command = [CHROMIUM, *flags, f"--user-data-dir={page.parent / 'profile'}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return png(picture.read_bytes())


def png(data: bytes) -> np.ndarray:
    """An 8-bit RGB or RGBA image without interlacing."""
    width, height, depth, color = (int.from_bytes(data[a:b]) for a, b in ((16, 20), (20, 24), (24, 25), (25, 26)))
    assert depth == 8 and color in (2, 6)
    at, packed, channels = 8, b"", 3 if color == 2 else 4
    while at < len(data):
        size = int.from_bytes(data[at : at + 4])
        packed += data[at + 8 : at + 8 + size] if data[at + 4 : at + 8] == b"IDAT" else b""
        at += size + 12
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + width * channels)
    image, above = np.zeros((height, width, channels), np.uint8), np.zeros((width, channels), np.int64)
    for y, row in enumerate(rows):
        above = image[y] = _unfiltered(int(row[0]), row[1:].reshape(width, channels).astype(np.int64), above)
    return image[:, :, :3]


def _unfiltered(kind: int, row: np.ndarray, above: np.ndarray) -> np.ndarray:
    if kind in (0, 2):
        return (row + (above if kind else 0)) % 256
    if kind == 1:
        return row.cumsum(0) % 256
    left = upper_left = np.zeros(row.shape[1], np.int64)
    for x, up in enumerate(above):
        if kind == 3:
            guess = (left + up) // 2
        else:
            near = np.abs([up - upper_left, left - upper_left, left + up - 2 * upper_left])
            guess = np.where(
                (near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], up, upper_left)
            )
        row[x] = left = (row[x] + guess) % 256
        upper_left = up
    return row


def painted(image: np.ndarray, x: float, y: float, color: str) -> bool:
    """Whether that colour is within 3 pixels."""
    around = image[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4].astype(int)
    return bool((np.abs(around - COLORS[color]).max(-1) <= 12).any())


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    """The example in FP8 with FP8 KV, built for the CPU."""
    root = tmp_path_factory.mktemp("page_example")
    calibration = ["--calib_dataset", str(EXAMPLES / "calibration.txt"), "--calib_size", "2"]
    model = ["--model_dir", str(EXAMPLES / "tiny-python-llama"), "--qformat", "fp8", "--kv_cache_dtype", "fp8"]
    assert quantize.main([*model, *calibration, "--output_dir", str(root / "checkpoint"), "--device", "cpu"]) == 0
    found = Checkpoint(root / "checkpoint")
    source = Source(models.load(found.config), found)
    build.write(build.compile(source, Request(4, 128, 64, "cpu"), Reporter()), source, root / "engine", Reporter())
    return root / "engine"


@in_chromium
def test_chromium_shows_the_page_of_the_example(example, tmp_path):
    (svg,) = svgs(page(example, tmp_path / "page.html"))
    image = screenshot(tmp_path / "page.html", int(svg.get("width", 0)) + 100, int(svg.get("height", 0)) + 300)
    seen = {name: int((np.abs(image.astype(int) - rgb).max(-1) <= 12).sum()) for name, rgb in COLORS.items()}
    rects = [g.find(f"{SVG}rect") for g in svg.iter(f"{SVG}g") if g.get("class") == "box plugin"]
    area = sum(float(r.get("width")) * float(r.get("height")) for r in rects)
    assert len(rects) == 7 and 0.5 * area < seen["plugin"] < area, "boxes are filled, but for their text"
    assert seen["fp8"] > 200 and seen["high"] > 200 and edges(svg, "fp8") and edges(svg, "high")


@in_chromium
@pytest.mark.parametrize("engine_dir", ["built", "example"])
def test_chromium_paints_the_boxes_and_the_edges_in_their_colours(engine_dir, request, tmp_path):
    directory = request.getfixturevalue(engine_dir)
    assert inspect.main(["graph", str(directory), "--layer", "1", "--svg", str(tmp_path / "flow.svg")]) == 0
    (svg,) = ET.parse(tmp_path / "flow.svg").getroot()
    image = screenshot(tmp_path / "flow.svg", int(svg.get("width", 0)) + 60, int(svg.get("height", 0)) + 60)
    plugins = [g.find(f"{SVG}rect") for g in svg.iter(f"{SVG}g") if g.get("class") == "box plugin"]
    assert len(plugins) == 7
    for rect in plugins:
        assert painted(image, float(rect.get("x")) + 8, float(rect.get("y")) + 8, "plugin")
    paths = [p for p in svg.iter(f"{SVG}path")]
    assert {p.get("class") for p in paths} == {"edge fp8", "edge high"}
    for path in paths:
        x, y = map(float, path.get("d").rsplit("M", 1)[0].rsplit(" ", 1)[1].split(","))
        assert painted(image, x, y - 3, path.get("class").removeprefix("edge "))
