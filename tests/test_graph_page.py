"""fp8-inspect graph: every plugin and every edge of a layer is on the page, which is self-contained and well-formed."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tiny_checkpoint as tiny

from fp8.builder import build, engine
from fp8.builder.build import Reporter, Request
from fp8.scripts import inspect
from fp8.scripts.layout import place

SVG = "{http://www.w3.org/2000/svg}"
LAYER = "model.layers.1"


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
