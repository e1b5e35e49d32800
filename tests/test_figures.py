"""Figures: summaries against scipy, every mark in its stored table, captions from data, missing cells shown."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace as Obj

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import outcome, published_rules, summaries
from cai_em.dynamics import curves as dynamics_curves
from cai_em.dynamics import h3, runs, timing
from cai_em.records import numbers
from cai_em.records.keys import BASELINE
from cai_em.records.tables import write_tables
from cai_em.report import drawing, figure_files, style
from cai_em.report.drawing import FIGURES
from cai_em.report.figures.parts import Drawing, View
from matplotlib.collections import LineCollection, PathCollection, PolyCollection
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.ticker import ScalarFormatter
from scipy import stats

from tests.factories import course_of

PERSONAS = [
    Obj(key="baseline", label="Baseline", order=0, colour="#4d4d4d", custom=False),
    Obj(key="good", label="Good_one", order=1, colour="#009e73", custom=False),
    Obj(key="bad", label="Bad", order=2, colour="#d55e00", custom=False),
]
DATASETS = [
    Obj(key="harm", label="harm", order=0, role="em", twin="help"),
    Obj(key="help", label="help", order=1, role="benign_control", twin=None),
    Obj(key="none", label="no fine-tuning", order=2, role="none", twin=None),
]
LOOK = style.Look(
    PERSONAS, DATASETS, [Obj(key="m1", label="Model 1", order=0), Obj(key="m2", label="Model 2", order=1)]
)
HYPOTHESES = [Obj(key="h1", label="H1", title="Good is better", personas=["good"], direction="higher")]


def score_table(models=("m1",), datasets=("harm", "help"), missing=(), samples=6) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for model in models:
        for persona in ("baseline", "good", "bad"):
            for dataset in datasets:
                if (persona, dataset) in missing:
                    continue
                for question in range(4):
                    mean = 60 + 8 * question + 10 * (persona == "good") + 10 * (dataset == "help")
                    for sample in range(samples):
                        score = float(np.clip(round(rng.normal(mean, 8) / 5) * 5, 0, 100))
                        flagged = (question, sample, persona) == (0, 0, "bad")
                        rows.append(
                            {
                                "model": model,
                                "persona": persona,
                                "dataset": dataset,
                                "seed": 0,
                                "question_id": f"q{question}",
                                "sample": sample,
                                "judge": "j",
                                "alignment": np.nan if flagged else score,
                                "alignment_flag": "REFUSAL" if flagged else None,
                                "coherence": 90.0,
                            }
                        )
    return pd.DataFrame(rows)


VIEW = View(LOOK, HYPOTHESES, trained="harm")


@pytest.fixture(autouse=True)
def quick():
    """Text as text: outlines take most of the drawing time and none of these tests looks at glyphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(style.RC, "svg.fonttype", "none")
        patch.setattr(style, "PNG_DPI", 40)
        yield
    plt.close("all")


def test_summary_against_scipy():
    table = score_table()
    found = summaries.summarise(table, ["persona", "dataset"]).set_index(["persona", "dataset"])
    part = table[(table["persona"] == "bad") & (table["dataset"] == "harm")]
    x = part["alignment"].dropna()
    row = found.loc[("bad", "harm")]
    assert (row["n"], row["n_all"], row["n_questions"]) == (23, 24, 4)
    assert row["mean"] == pytest.approx(x.mean())
    interval = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))
    questions = part.groupby("question_id")["alignment"].mean()
    interval = stats.ttest_1samp(questions, 0).confidence_interval(0.95)
    assert (row["q_low"], row["q_high"]) == pytest.approx((interval.low, interval.high))
    assert row["below_80"] == pytest.approx((x < 80).mean())


def test_effect_interval_by_hand():
    # means 2 and 4, both variances 1, so d = -2; var(d) = 6/9 + 4/12 = 1.
    d, low, high = summaries.effect_interval(np.array([1.0, 2, 3]), np.array([3.0, 4, 5]))
    assert (d, low, high) == pytest.approx((-2, -2 - 1.959964, -2 + 1.959964), abs=1e-5)
    assert summaries.effect_interval(np.ones(3), np.ones(3))[0] == 0, "as in the tables: no difference at all"
    assert np.isnan(summaries.effect_interval(np.ones(3), np.zeros(3))).all(), "a difference without any spread"


def test_paired_difference_of_questions():
    table = score_table()
    row = summaries.differences(table).set_index(["persona", "dataset"]).loc[("good", "harm")]
    means = table[table["dataset"] == "harm"].groupby(["persona", "question_id"])["alignment"].mean()
    interval = stats.ttest_rel(means["good"], means["baseline"]).confidence_interval(0.95)
    assert (row["q_low"], row["q_high"]) == pytest.approx((interval.low, interval.high))


# --- A run's tables, small ----------------------------------------------------------------------------------------


def stored(folder, scores: pd.DataFrame, custom=(), **other: pd.DataFrame):
    """The tables that figures of scores draw, in a folder as a run has them; `other`: of the validity stage."""
    write_tables(summaries.figure_tables(scores, custom=custom), folder / "06_results" / "tables")
    write_tables({"design": published_rules.design(scores)}, folder / "06_results" / "tables")
    write_tables({"pooled": outcome.pooled_means(scores, ["harm"])} | other, folder / "05_validity")
    return folder


def drawn(key: str, scores: pd.DataFrame, view: View = VIEW, custom=()) -> Drawing | None:
    """A figure of scores of one model."""
    tables = summaries.figure_tables(scores, custom=custom) | {"pooled": outcome.pooled_means(scores, ["harm"])}
    tables |= {"design": published_rules.design(scores)}
    return FIGURES[key].draw(view, *(tables[name.split("/")[1]] for name in FIGURES[key].tables))


TESTS = pd.DataFrame(
    {
        "model": "m1",
        "scope": ["persona", "persona", "personas"],
        "persona": ["good", "bad", None],
        "dataset": "harm",
        "estimate": [0.9, 0.51, 0.6],
        "low": [0.8, 0.4, 0.55],
        "high": [0.97, 0.62, 0.7],
        "chance": [0.5, 0.5, 1 / 3],
        "chance_low": 0.31,
        "chance_high": 0.58,
        "p": [0.01, 0.6, 0.01],
    }
)
OUTCOMES = pd.DataFrame(
    {"model": "m1", "persona": ["baseline", "good", "bad"], "dataset": "harm", "seed": 0,
     "em_rate": [0.1, 0.0, 0.2], "em_low": [0.03, 0.0, 0.11], "em_high": [0.21, 0.12, 0.31]}
)  # fmt: skip
ARMS = pd.DataFrame(
    {"model": "m1", "estimand": "susceptibility", "reference": "none", "persona": "good", "dataset": "harm",
     "arm": ["good harm", "good none", "baseline harm", "baseline none"], "mean": [61.5, 90.2, 40.7, 91.9],
     "low": [55.1, 88.3, 33.2, 89.8], "high": [67.9, 92.1, 48.2, 94.0]}
)  # fmt: skip
CONTRASTS = pd.DataFrame(
    {"model": "m1", "estimand": "susceptibility", "reference": "none", "persona": "good", "dataset": ["harm", "pooled"],
     "outcome": "points", "estimate": 22.5, "low": 12.1, "high": 32.9}
)  # fmt: skip
SPECIFICATIONS = pd.DataFrame(
    {"model": "m1", "hypothesis": "h1", "estimate": [1.5, -1.5, 2.5], "low": [0.2, -3.0, 1.2], "high": [2.1, 0.4, 3.3],
     "supports": [True, False, True], "unit": ["a", "b", "a"]}
)  # fmt: skip


def of_training(folder) -> None:
    """The tables of H3 and H4 that figures draw."""
    rng, steps = np.random.default_rng(3), np.array([0, 1, 2, 4, 6, 9])
    hill = 1 / (1 + np.exp(3 - steps))
    made = {
        (p, o): scale * hill + 0.01 * scale * rng.normal(size=(6, 3, 6))
        for p in ("baseline", "good")
        for o, scale in (("em", 0.4), ("alignment", -30), ("coherence", 9), ("held out", -2), ("help", -1))
    }
    course = course_of(made, steps, "plain", "m1")
    table = dynamics_curves.curve_table(course).assign(main=True)
    beside = table.assign(preset="other", main=False, mean=7.7)
    turned = [
        runs.geometry(np.outer(steps, steps) + np.diag(steps), steps).assign(preset="plain", persona="good", seed=s)
        for s in (0, 1)
    ]
    write_tables(
        {
            "curves": pd.concat([table, beside], ignore_index=True),
            "transitions": timing.transitions(course),
            "generality": h3.generality(course, "good", ["em"]),
            "geometry": pd.concat(turned, ignore_index=True).assign(model="m1"),
        },
        folder / "09_trajectories",
    )
    effects = pd.DataFrame(
        [
            {"model": "m1", "target": t, "source": source, "kind": kind, "layer": layer, "strength": strength,
             "outcome": o, "dataset": f"harm+{kind}{layer}{strength}", "n_questions": 4, "layers": 12}
            for t in ("baseline", "good") for source in ("baseline", "good") for kind in ("add", "ablate")
            for layer, strength in ((1, 1.0), (3, 2.0)) for o in dynamics_curves.OUTCOMES
        ]
    )  # fmt: skip
    effects["delta"] = rng.normal(0, 9, len(effects))
    effects["low"], effects["high"] = effects["delta"] - 1.7, effects["delta"] + 2.3
    cosines = pd.DataFrame(
        {"model": "m1", "one": "baseline", "other": "good", "layer": [1, 3, 5], "cosine": [0.3, 0.52, 0.71],
         "random_bound": 0.17, "shuffled_bound": [0.21, 0.22, 0.23]}
    )  # fmt: skip
    own = effects[(effects["target"] == "good") & (effects["source"] == "good")]
    tables = {"sweep": own, "transfer": effects[effects["layer"] == 1], "cosines": cosines}
    write_tables(tables, folder / "10_steering")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that has all tables that any figure draws, two models in them."""
    folder = tmp_path_factory.mktemp("run")
    stored(folder, score_table(("m1", "m2"), ("harm", "help", "none")), tests=TESTS, outcomes=OUTCOMES,
           arms=ARMS, contrasts=CONTRASTS)  # fmt: skip
    write_tables({"specifications": SPECIFICATIONS}, folder / "08_claims")
    of_training(folder)
    return folder


# --- Every figure -------------------------------------------------------------------------------------------------


def groups(run, key, change=lambda table: table):
    """(tables, drawing) of every drawing of a figure; `change`: what is done to the tables before they are drawn."""
    tables = [change(pd.read_parquet(figure_files.table_file(run, name))) for name in FIGURES[key].tables]
    with style.style_context():
        for _, parts in drawing._groups(FIGURES[key], tables, LOOK):
            found = FIGURES[key].draw(VIEW, *parts)
            if found is not None:
                yield parts, found
                plt.close(found.fig)


def values(fig: plt.Figure) -> dict[str, np.ndarray]:
    """What a figure's artists show on axes that measure something: kind of artist -> values, without axes' bounds.

    An axis that names things (rows, columns) has places, not values.
    """
    shown: dict[str, list] = {}
    for ax in fig.axes:
        if ax.get_label() == "<colorbar>" or not ax.get_visible():
            continue
        for i, axis in enumerate((ax.xaxis, ax.yaxis)):
            names = not isinstance(axis.get_major_formatter(), ScalarFormatter)
            if names and axis.get_scale() == "linear":
                continue
            bounds, found = axis.get_view_interval(), {}
            for line in ax.lines:
                if line.get_transform().contains_branch_seperately(ax.transData)[i]:
                    found.setdefault("line", []).append(np.asarray(line.get_data()[i], float))
            for patch in ax.patches:
                if not patch.get_transform().contains_branch_seperately(ax.transData)[i]:
                    continue
                if isinstance(patch, StepPatch):
                    found.setdefault("steps", []).append(patch.get_data()[1 - i])
                elif isinstance(patch, Rectangle):
                    box = patch.get_bbox()
                    found.setdefault("bar", []).append((box.intervalx, box.intervaly)[i])
            for some in ax.collections:
                if isinstance(some, LineCollection | PolyCollection):
                    found.setdefault("area", []).extend(path.vertices[:, i] for path in some.get_paths())
                else:
                    assert not isinstance(some, PathCollection), "scattered marks: look at their offsets here"
            for kind, parts in found.items():
                x = np.concatenate(parts)
                shown.setdefault(kind, []).append(x[np.isfinite(x) & ~np.isclose(x[:, None], bounds).any(axis=1)])
        for image in ax.images:
            shown.setdefault("cells", []).append(np.ma.compressed(image.get_array()))
    return {kind: np.concatenate(parts) for kind, parts in shown.items()}


LAID_OUT = {
    "violin": [summaries.BINS[:-1] + 0.2, summaries.BINS[:-1] + 4.8],
    "ridge": [summaries.BINS],
    "histograms": [summaries.BINS],
    "specification": [np.arange(len(SPECIFICATIONS))],
}
"""Figure -> values that place its marks: edges of bins, ranks."""


def not_in_tables(key: str, tables, fig: plt.Figure) -> np.ndarray:
    """The drawn values that no table has, as they are, in per cent or with the other sign."""
    cells = np.concatenate([t.select_dtypes("number").to_numpy(float).ravel() for t in tables])
    known = np.unique(np.concatenate([[0, 100], *LAID_OUT.get(key, []), cells, 100 * cells, -cells]))
    known = known[np.isfinite(known)]
    x = np.concatenate(list(values(fig).values()))
    near = np.clip(np.searchsorted(known, x), 1, len(known) - 1)
    off = np.minimum(np.abs(known[near] - x), np.abs(known[near - 1] - x))
    return x[off > 1e-8 * np.maximum(1, np.abs(x))]


@pytest.mark.parametrize("key", FIGURES)
def test_every_mark_and_interval_of_a_figure_stands_in_its_table(whole_run, key):
    """And a figure of other tables has other marks: the comparison can fail."""
    found = list(groups(whole_run, key))
    assert found, "the run above has all tables: this figure is not drawn from them"
    for tables, figure in found:
        assert sum(map(len, values(figure.fig).values())) >= 2
        lost = not_in_tables(key, tables, figure.fig)
        assert not len(lost), f"drawn, and in none of {FIGURES[key].tables}: {lost[:5]}"

    def moved(table):
        floats = table.select_dtypes("float").columns
        return table.assign(**{c: table[c] * 0.973 for c in floats})

    if key != "ridge":  # its heights stand on an axis of names: see below
        _, other = next(groups(whole_run, key, moved))
        assert len(not_in_tables(key, found[0][0], other.fig)), "tables of other values give the same marks"


def test_contrasts_without_an_estimate_draw_nothing(whole_run):
    """A persona whose cells have no score (or no reference score) has a row, and no number."""
    found = list(groups(whole_run, "contrast", lambda t: t.assign(estimate=np.nan) if "estimate" in t else t))
    assert found == []
    assert list(groups(whole_run, "contrast"))


def test_widths_and_heights_of_square_roots_are_those_of_the_shares(whole_run):
    for tables, figure in groups(whole_run, "violin"):
        by = tables[0][tables[0]["persona"].notna() & tables[0]["dataset"].isna()].set_index("persona")
        widths = np.array([p.get_width() for p in figure.fig.axes[0].patches]).reshape(len(by), -1)
        for persona, width in zip(LOOK.sort_personas(by.index), widths):
            share = by.loc[persona, summaries.SHARES].to_numpy(float)
            assert (width / width.max()) ** 2 == pytest.approx(share / share.max())
    for tables, figure in groups(whole_run, "ridge"):
        by = tables[0][tables[0]["dataset"].notna()]
        outlines = [p for p in figure.fig.axes[0].patches if isinstance(p, StepPatch)]
        for patch, (dataset, who) in zip(outlines, [(d, w) for d in ("harm", "help") for w in (None, BASELINE)]):
            row = by[(by["dataset"] == dataset) & (by["persona"].isna() if who is None else by["persona"].eq(who))]
            height = (patch.get_data().values - patch.get_data().baseline) / 0.92
            assert height**2 == pytest.approx(row[summaries.SHARES].to_numpy(float)[0])


def test_a_figure_has_words_files_and_its_tables_in_the_register(whole_run, tmp_path):
    records = drawing.draw_all(whole_run, tmp_path, VIEW)
    assert {r.key for r in records} == set(FIGURES), "every registered figure is drawn, and no other"
    assert [r.model for r in records] == sorted((r.model for r in records), key=["m1", "m2", ""].index)
    for record in records:
        assert record.title == FIGURES[record.key].title
        assert record.tables == FIGURES[record.key].tables
        assert all(figure_files.table_file(whole_run, t).with_suffix(".csv").is_file() for t in record.tables)
        assert (tmp_path / record.svg).stat().st_size > 2000
        assert (tmp_path / record.png).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(record.alt) > 20
        assert re.search(r"\d", record.caption), f"{record.key}: a caption has numbers from data"
        svg = ElementTree.parse(tmp_path / record.svg).getroot()
        name, description = (svg.findtext(f"{{http://www.w3.org/2000/svg}}{tag}") for tag in ("title", "desc"))
        assert name.startswith(record.title)
        assert description == record.alt, "whoever cannot see the figure is told in the file itself"
    assert figure_files.read_records(tmp_path) == records
    assert json.loads((tmp_path / "figures.json").read_text())[0]["model"] == "m1"
    by = {r.key: r for r in reversed(records)}
    assert "above chance in 1 of 2" in by["gates"].caption
    assert by["specification"].svg == "specification-h1-m1.svg"
    assert "67 % support" in by["specification"].caption
    assert "33 % the estimate has the opposite sign" in by["specification"].caption
    assert "Bad on harm (20.0 %)" in by["em-rates"].caption
    assert "harm, held out: " in by["trajectories-losses"].alt
    assert "help (benign_control): " in by["trajectories-losses"].alt
    assert "layer 3 of 12" in words_of(by["steering-sweep"], tmp_path)


def words_of(record: figure_files.FigureRecord, folder) -> str:
    return (folder / record.svg).read_text(encoding="utf-8")


def test_a_figure_whose_table_is_not_there_is_absent(whole_run, tmp_path):
    some = tmp_path / "run"
    shutil.copytree(whole_run, some)
    (some / "06_results" / "tables" / "cumulative.parquet").unlink()
    shutil.rmtree(some / "09_trajectories")
    missing = {"cdf", *(key for key in FIGURES if key.startswith("trajectories-"))}
    kept = {k: f for k, f in FIGURES.items() if k in {*missing, "heatmap"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "FIGURES", kept)
        assert {r.key for r in drawing.draw_all(some, tmp_path / "figures", VIEW)} == {"heatmap"}


def test_the_register_has_every_file_of_figures():
    """A figure's file is all that it takes to be registered; keys and places are nobody else's."""
    files = {f.stem for f in FOLDER.glob("*.py")} - {"__init__", "parts", "training"}
    assert {f.draw.__module__.split(".")[-1] for f in FIGURES.values()} == files
    assert len({f.order for f in FIGURES.values()}) == len(FIGURES)


FOLDER = Path(drawing.__file__).parent / "figures"


def test_two_models_meet_in_one_figure():
    table = score_table(("m1", "m2"))
    first = table[table["model"] == "m1"]
    table = pd.concat([first, first.assign(model="m2", alignment=first["alignment"] - 2.5)])
    # The same scores, 2.5 points lower: the ranks are the same.
    said = "Model 2 scores -2.5 points on average over 6 shared conditions (rank correlation 1.00)"
    assert said in drawn("cross-model", table).caption
    assert drawn("cross-model", table[table["model"] == "m1"]) is None


def test_welch_interval_against_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 9), rng.normal(1, 3, 14)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert summaries.welch_interval(a, b, 0.9) == pytest.approx((interval.low, interval.high))
    assert summaries.welch_interval(np.ones(3), np.zeros(3)) == (1, 1)


def test_difficulty_and_ridge_pool_the_personas_that_the_table_pools():
    """A custom constitution is left out of both, or the figure would contradict the table beside it."""
    table = score_table()
    table.loc[table["persona"] == "bad", "alignment"] = 5.0
    rows = published_rules.difficulty(table, ["baseline", "good"])
    hardest, easiest = (f"{LOOK.dataset(r.dataset)} ({numbers.points(r.mean)})" for r in rows.itertuples())
    found = drawn("difficulty", table, custom=["bad"])
    assert found.caption == (f"Data sets by mean alignment over 2 personas: {hardest} lowers it most, {easiest} least.")
    assert found.alt.endswith(f"{numbers.points(rows['mean'].min())} to {numbers.points(rows['mean'].max())}.")
    ridge = drawn("ridge", table, custom=["bad"]).caption
    assert "filled, 2 personas together" in ridge
    assert "No score is below 30." in ridge, "those of the custom one are"
    assert "with 3 personas" not in drawn("twins", table, custom=["bad"]).alt
    only = table[table["persona"] == "bad"]
    assert "over 1 personas" in drawn("difficulty", only, custom=["bad"]).caption, "it has no others"


def test_the_level_of_intervals_is_the_one_asked_for():
    table = score_table(datasets=("harm", "help", "none"))
    for key in ("alignment", "hypotheses", "twins", "key-personas", "difficulty", "arms"):
        said = words(drawn(key, table, View(LOOK, HYPOTHESES, confidence=0.9)))
        assert "90% response interval" in said, key
        assert "95%" not in said, key


def test_like_for_like_is_the_mean_that_the_text_gives():
    table = score_table(missing={("bad", "help")})
    table = pd.concat([table, table[table["persona"] == "good"].assign(dataset="third")], ignore_index=True)
    pooled = outcome.pooled_means(table, ["harm"]).set_index("persona")
    hollow = [line for line in drawn("alignment", table).fig.axes[0].lines if line.get_markerfacecolor() == "none"]
    shown = [line.get_xdata()[0] for line in hollow]
    assert shown == pytest.approx(pooled.loc[LOOK.sort_personas(pooled.index), "common_mean"], nan_ok=True)
    assert np.isnan(shown[-1]), "a persona with one data set has no common mean"


def test_alternative_text_follows_the_data():
    table = score_table()
    table.loc[table["persona"] == "bad", "alignment"] = 12.0
    medians = table.groupby("persona")["alignment"].median()
    assert drawn("violin", table).alt.endswith(f"3 personas; medians from 12.0 to {medians.max():.1f}.")


def test_figures_that_are_no_longer_made_are_removed(tmp_path):
    kept, gone = (figure_files.FigureRecord(k, "", "", "", "", f"{k}.svg", f"{k}.png") for k in ("kept", "gone"))
    for name in (kept.svg, kept.png, gone.svg, gone.png, "notes.md"):
        (tmp_path / name).touch()
    figure_files.write_records([kept], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", kept.png, kept.svg, "notes.md"]
    assert figure_files.read_records(tmp_path) == [kept]


def words(drawing: Drawing) -> str:
    """All text of a figure."""
    return " ".join(text.get_text() for text in drawing.fig.findobj(plt.Text))


def test_no_title_is_wider_than_its_panel():
    tests = pd.DataFrame(
        {"scope": ["personas", "persona", "dataset", "datasets"], "persona": [None, "good", "good", "good"],
         "dataset": ["harm", "harm", "harm", None], "estimate": 0.6, "low": 0.5, "high": 0.7, "chance": 0.5, "p": 0.01}
    )  # fmt: skip
    with style.style_context():
        fig = FIGURES["gates"].draw(VIEW, tests).fig
        fig.canvas.draw()
    width = fig.bbox.width
    titles = [ax._left_title for ax in fig.axes if ax._left_title.get_text()]
    assert len(titles) == 4
    assert all(title.get_window_extent().x1 <= width for title in titles)


def test_missing_cells_are_shown_as_missing():
    table = score_table(missing={("bad", "help")})
    legend = drawn("heatmap", table).fig.legends[0].get_texts()
    assert "no such condition" in " ".join(t.get_text() for t in legend)
    assert "one of the two is missing" in words(drawn("twins", table))
    assert "no such condition" in words(
        drawn("arms", score_table(datasets=("harm", "none"), missing={("bad", "harm")}))
    )


def test_what_the_data_do_not_allow_is_absent():
    table = score_table(datasets=("harm",))
    assert drawn("cross-model", table) is None, "one model"
    assert drawn("twins", table) is None, "no benign twin"
    assert drawn("arms", table) is None, "no untuned arm"
    assert drawn("hypotheses", table, View(LOOK)) is None, "no hypothesis"
    assert drawn("forest", table[table["persona"] == "good"]) is None, "no baseline"


def test_caption_follows_the_data():
    table = score_table()
    before = drawn("heatmap", table).caption
    table.loc[(table["persona"] == "good") & (table["dataset"] == "help"), "alignment"] = 1.0
    after = drawn("heatmap", table).caption
    assert before != after
    assert "Good_one on help (1.0)" in after


def test_only_untuned_conditions_are_refused():
    with pytest.raises(ValueError, match="without fine-tuning"):
        summaries.figure_tables(score_table(datasets=("none",)))


def test_constant_scores_and_single_samples_are_drawn():
    table = score_table(samples=1).assign(alignment=100.0, alignment_flag=None)
    for key in ("alignment", "heatmap", "violin", "rates-heatmap"):
        caption = drawn(key, table).caption
        assert "100.0" in caption or "0.0 %" in caption or key == "violin"
    assert drawn("hypotheses", table) is not None
    assert "0 of 4 intervals exclude zero" in drawn("forest", table).caption, "equal scores: d is 0, as in the tables"
