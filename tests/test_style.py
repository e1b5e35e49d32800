"""Looks: known colours, simulated vision, and redundancy where colour alone would not do."""

import ast
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from cai_em.records import code
from cai_em.report import style
from cai_em.study import labels, loading
from cai_em.study.depends import settings


@pytest.fixture(scope="module")
def look():
    registries = loading.load("demo")._registries
    return style.Look(
        list(registries["personas"].values()),
        list(registries["datasets"].values()),
        list(registries["models"].values()),
    )


def test_lab_of_known_colours():
    # Reference values: CIE L*a*b* (D65) of the sRGB primaries, e.g. brucelindbloom.com's calculator.
    assert style.lab(style.linear_rgb("#ffffff")) == pytest.approx([100, 0, 0], abs=0.02)
    assert style.lab(style.linear_rgb("#000000")) == pytest.approx([0, 0, 0], abs=1e-9)
    assert style.lab(style.linear_rgb("#ff0000")) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert style.lab(style.linear_rgb("#0000ff")) == pytest.approx([32.30, 79.19, -107.86], abs=0.05)


def test_contrast_of_black_on_white_is_21():
    assert style.contrast_ratio("#000000") == pytest.approx(21)
    assert style.contrast_ratio("#767676") == pytest.approx(4.54, abs=0.01)  # the greyest grey that passes for text


def test_simulation_keeps_grey_and_confuses_red_with_green():
    for matrix in style.DEFICIENCY.values():
        assert matrix.sum(axis=1) == pytest.approx([1, 1, 1], abs=1e-3)  # greys stay grey
    red_green = style.colour_differences("#c03000", "#6c6a00")
    assert red_green["deuteranopia"] < red_green["normal"] / 2
    blue_yellow = style.colour_differences("#0072b2", "#e69f00")
    assert min(blue_yellow.values()) > 10


def test_confusable_names_the_pair_and_the_vision():
    assert style.confusable({"a": "#777777", "b": "#777777"})[0] == ("a", "b", "normal")
    assert style.confusable({"a": "#000000", "b": "#ffffff"}) == []


def test_no_pair_of_personas_relies_on_colour_alone(look):
    """Whoever cannot tell two personas' colours apart, in greyscale or with a colour deficiency, has another sign."""
    colours = {p.key: p.colour for p in look.personas}
    pairs = {(a, b) for a, b, _ in style.confusable(colours)}
    for a, b in pairs:
        signs = [getattr(look, sign)(a) != getattr(look, sign)(b) for sign in ("marker", "linestyle", "hatch")]
        assert any(signs), f"{a} and {b} look alike"
    usual = [p.key for p in look.personas if not p.custom and p.kind != "random_control"]
    markers = [look.marker(p) for p in usual]
    assert len(set(markers)) == len(markers), "the study's personas have a marker each"


def test_key_personas_differ_for_every_colour_vision(look):
    """The personas that the hypotheses compare in one panel: told apart by colour in all four kinds of vision."""
    keys = ["baseline", "sycophancy", "goodness", "loving"]
    for a, b in itertools.combinations(keys, 2):
        seen = style.colour_differences(look.colour(a), look.colour(b))
        assert min(d for vision, d in seen.items() if vision != "greyscale") > 12, (a, b, seen)


def test_roles_are_legible_and_have_signs(look):
    for role, colour in style.ROLE_COLOUR.items():
        assert style.contrast_ratio(colour) >= 4.5, f"{role}: too pale for text"
    assert len(set(labels.ROLE_SIGN.values())) == len(labels.ROLE_SIGN)
    assert labels.ROLE_SIGN.keys() == style.ROLE_MARKER.keys()
    assert look.signed("insecure").endswith("●")


def test_order_and_unknown_keys(look):
    assert look.sort_personas(["loving", "zzz", "baseline", "loving"]) == ["baseline", "loving", "zzz"]
    assert look.sort_datasets(["good_medical", "insecure"]) == ["insecure", "good_medical"]
    assert look.persona("zzz") == "zzz"
    assert look.colour("zzz") == style.MUTED
    assert look.role("zzz") != "em", "an undeclared data set must not count towards a verdict"


def test_a_saved_figure_has_no_date_and_the_same_bytes_twice(tmp_path):
    written = []
    for number in range(2):
        with style.style_context():
            fig, ax = plt.subplots(figsize=style.figure_size(2))
            ax.plot(np.arange(5), label="x")
            ax.legend()
        svg, png = style.save_figure(fig, tmp_path / str(number) / "a.b")
        assert svg.name == "a.b.svg"
        written.append((svg.read_bytes(), png.read_bytes()))
    assert written[0] == written[1]
    assert b"dc:date" not in written[0][0]
    assert not list(tmp_path.rglob(".*")), "temporary files are gone"


def test_markers_with_little_ink_are_drawn_larger():
    """A star's area is about a third of a circle's of the same nominal size: on a line nobody would see it."""
    star, circle = style.marker_size("*", 4), style.marker_size("o", 4)
    assert circle == 4
    assert star > 1.5 * circle
    look = style.Look([SimpleNamespace(key="a", label="A", order=style.MARKERS.index("*"), colour="#123456")], [])
    assert look.line("a")["markersize"] == style.marker_size("*", style.RC["lines.markersize"])


def test_context_leaves_no_trace():
    before = plt.rcParams["font.size"]
    with style.style_context():
        assert plt.rcParams["font.size"] == style.RC["font.size"]
    assert plt.rcParams["font.size"] == before


def test_look_accepts_any_named_objects():
    look = style.Look([SimpleNamespace(key="a", label="A", order=0, colour="#123456")], [], [])
    assert look.line("a")["label"] == "A"


def test_a_saved_figure_says_what_it_is(tmp_path):
    with style.style_context():
        fig, _ = plt.subplots(figsize=style.figure_size(2))
    svg, _ = style.save_figure(fig, tmp_path / "a", "Means < & >", "Dots from 1 to 2.")
    text = svg.read_text()
    assert (
        text.index("<svg") < text.index("<title>Means &lt; &amp; &gt;</title>") < text.index("<desc>Dots from 1 to 2.")
    )
    assert text.index("<desc>") < text.index("<path"), "before anything that is drawn"
    assert 'role="img"' in text


def test_a_saved_drawing_is_matplotlibs_in_fewer_letters(tmp_path):
    with style.style_context():
        fig, axes = plt.subplots(1, 2, figsize=style.figure_size(2))
        axes[0].plot([0, 1, 2], [0.1234567, -1, 3], "o-", label="A line, $x^2$")
        axes[0].legend(title="Which one")
        axes[1].imshow(np.arange(12).reshape(3, 4), rasterized=True)
        axes[1].set_title("Bold", fontweight="bold")
        fig.savefig(tmp_path / "own.svg", metadata={"Date": None})
    svg, _ = style.save_figure(fig, tmp_path / "lean")
    own, lean = (tmp_path / "own.svg").read_text(), svg.read_text()
    assert len(lean) < 0.7 * len(own)
    named = re.findall(r' id="([^"]+)"', lean)
    assert sorted(set(named)) == sorted(named)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', lean)) <= set(named)
    assert "matplotlib" not in lean

    def drawn(text):
        """Each path's commands and numbers; where each glyph and marker is put."""
        paths = [d for d in re.findall(r' d="([^"]+)"', text, re.S)]
        places = re.findall(r'<use [^>]*(?:translate\(|x=")(-?[\d.]+)', text)
        return ["".join(re.findall("[A-Za-z]", d)) for d in paths], np.array(
            [float(x) for d in paths for x in re.findall(r"-?\d+\.?\d*", d)] + [float(x) for x in places if float(x)]
        )

    (commands, numbers), (leaner, fewer) = drawn(own), drawn(lean)
    assert commands == leaner
    assert len(numbers) > 500
    np.testing.assert_allclose(fewer, numbers, atol=0.0051)


REPORT = Path(style.__file__).parent


@pytest.mark.parametrize("module", sorted(str(p.relative_to(REPORT)) for p in REPORT.rglob("*.py")))
def test_only_this_module_has_colours(module):
    """A colour typed elsewhere is one that nobody tests for contrast and confusion."""
    source = (REPORT / module).read_text(encoding="utf-8")
    found = {
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and COLOUR.fullmatch(node.value)
    }
    assert bool(found) == (module == "style.py"), f"{module}: move to style.py: {sorted(found)}"


COLOUR = re.compile(r"#(?:[0-9a-fA-F]{3}){1,2}")


def test_a_colour_concerns_the_stage_that_draws_and_no_other(root):
    """Neither the palette's code nor a persona's colour makes a stage stale that trains, judges or computes."""
    stages = sorted((root / "notebooks").glob("[0-9]*.ipynb"))
    drawing = {n.stem[:2] for n in stages if any(f.name == "style.py" for f in used_by(n))}
    assert drawing == {"00", "11"}
    study = loading.load("micro")
    cell = {"model": next(iter(study.models)), "persona": study.used_personas()[1].key}
    stages = {"01_personas": cell} | {s.stem: {} for s in stages if s.stem[:2] in ("05", "06", "08", "09", "10", "11")}
    before = {s: settings(study, s, **some) for s, some in stages.items()}
    study.personas.update({k: p.model_copy(update={"colour": "#123456"}) for k, p in study.personas.items()})
    assert [s for s, some in stages.items() if settings(study, s, **some) != before[s]] == ["11_report"]


def used_by(notebook):
    return code.modules_of(code._without_unused_imports(code.code_cells(notebook)), code.library_folder())
