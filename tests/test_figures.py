"""Figures: summaries against scipy, captions from data, any grid, missing cells shown."""

import json
import re
import xml.etree.ElementTree as ElementTree
from types import SimpleNamespace as Obj

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from cai_em.analysis import outcome, published_rules
from cai_em.records import numbers
from cai_em.report import style
from cai_em.report.figures import all, distributions, parts
from cai_em.report.figures import means as report_figures_means
from scipy import stats

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
HYPOTHESES = [Obj(label="H1", title="Good is better", personas=["good"], direction="higher")]


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
    found = outcome.summarise(table, ["persona", "dataset"]).set_index(["persona", "dataset"])
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
    d, low, high = outcome.effect_interval(np.array([1.0, 2, 3]), np.array([3.0, 4, 5]))
    assert (d, low, high) == pytest.approx((-2, -2 - 1.959964, -2 + 1.959964), abs=1e-5)
    assert outcome.effect_interval(np.ones(3), np.ones(3))[0] == 0, "as in the tables: no difference at all"
    assert np.isnan(outcome.effect_interval(np.ones(3), np.zeros(3))).all(), "a difference without any spread"


def test_paired_difference_of_questions():
    table = score_table()
    row = outcome._differences(table, "good", 0.95).set_index("dataset").loc["harm"]
    means = table[table["dataset"] == "harm"].groupby(["persona", "question_id"])["alignment"].mean()
    interval = stats.ttest_rel(means["good"], means["baseline"]).confidence_interval(0.95)
    assert (row["q_low"], row["q_high"]) == pytest.approx((interval.low, interval.high))


def test_all_figures_of_a_full_grid(tmp_path):
    table = score_table(datasets=("harm", "help", "none"))
    outcomes = pd.DataFrame(
        {
            "model": "m1",
            "persona": ["baseline", "good", "bad"],
            "dataset": "harm",
            "seed": 0,
            "em_rate": [0.1, 0.0, 0.2],
            "em_low": [0.0, 0.0, 0.1],
            "em_high": [0.2, 0.1, 0.3],
        }
    )
    tests = pd.DataFrame(
        {
            "model": "m1",
            "scope": ["persona", "persona", "personas"],
            "persona": ["good", "bad", None],
            "dataset": "harm",
            "estimate": [0.9, 0.5, 0.6],
            "low": [0.8, 0.4, 0.5],
            "high": [1.0, 0.6, 0.7],
            "chance": [0.5, 0.5, 1 / 3],
            "p": [0.01, 0.6, 0.01],
        }
    )
    specs = pd.DataFrame({"estimate": [1.0, -1.0, 2.0], "supports": [True, False, True], "unit": ["a", "b", "a"]})
    records = all.draw_all(
        table,
        tmp_path,
        LOOK,
        HYPOTHESES,
        tests=tests,
        outcomes=outcomes,
        specifications={"H1": (specs, "H1: good is better", "higher")},
    )
    drawn = {r.key for r in records}
    assert drawn == (set(all.TITLES) - {"specification", "cross-model"}) | {"specification-h1"}
    for record in records:
        assert (tmp_path / record.svg).stat().st_size > 2000
        assert (tmp_path / record.png).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(record.alt) > 20
        assert re.search(r"\d", record.caption), f"{record.key}: a caption has numbers from data"
        svg = ElementTree.parse(tmp_path / record.svg).getroot()
        name, description = (svg.findtext(f"{{http://www.w3.org/2000/svg}}{tag}") for tag in ("title", "desc"))
        assert name.startswith(record.title)
        assert description == record.alt, "whoever cannot see the figure is told in the file itself"
    assert parts.read_records(tmp_path) == records
    assert json.loads((tmp_path / "figures.json").read_text())[0]["model"] == "m1"
    by = {r.key: r for r in records}
    assert "above chance in 1 of 2" in by["gates"].caption
    assert "67 % support" in by["specification-h1"].caption
    assert "33 % the estimate has the opposite sign" in by["specification-h1"].caption
    assert "Bad on harm (20.0 %)" in by["em-rates"].caption


def test_two_models_meet_in_one_figure():
    table = score_table(("m1", "m2"))
    first = table[table["model"] == "m1"]
    table = pd.concat([first, first.assign(model="m2", alignment=first["alignment"] - 2.5)])
    drawing = report_figures_means.cross_model_figure(table, LOOK)
    # The same scores, 2.5 points lower: the ranks are the same.
    assert "Model 2 scores -2.5 points on average over 6 shared conditions (rank correlation 1.00)" in drawing.caption
    assert report_figures_means.cross_model_figure(table[table["model"] == "m1"], LOOK) is None


def test_welch_interval_against_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.normal(0, 1, 9), rng.normal(1, 3, 14)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert outcome.welch_interval(a, b, 0.9) == pytest.approx((interval.low, interval.high))
    assert outcome.welch_interval(np.ones(3), np.zeros(3)) == (1, 1)


def test_difficulty_and_ridge_pool_the_personas_that_the_table_pools(tmp_path):
    """A custom constitution is left out of both, or the figure would contradict the table beside it."""
    table = score_table()
    table.loc[table["persona"] == "bad", "alignment"] = 5.0
    personas = [Obj(**(vars(p) | {"custom": p.key == "bad"})) for p in PERSONAS]
    look = style.Look(personas, DATASETS, LOOK.models)
    found = {r.key: r for r in all.draw_all(table, tmp_path, look, HYPOTHESES)}
    rows = published_rules.difficulty(table, ["baseline", "good"])
    hardest, easiest = (f"{look.dataset(r.dataset)} ({numbers.points(r.mean)})" for r in rows.itertuples())
    assert found["difficulty"].caption == (
        f"Model 1. Data sets by mean alignment over 2 personas: {hardest} lowers it most, {easiest} least."
    )
    assert found["difficulty"].alt.endswith(
        f"{numbers.points(rows['mean'].min())} to {numbers.points(rows['mean'].max())}."
    )
    assert "filled, 2 personas together" in found["ridge"].caption
    assert "No score is below 30." in found["ridge"].caption, "those of the custom one are"


def test_the_level_of_intervals_is_the_one_asked_for(tmp_path):
    table = score_table(datasets=("harm", "help", "none"))
    for draw, arguments in (
        (report_figures_means.alignment_by_persona, ()),
        (report_figures_means.hypothesis_differences, (HYPOTHESES,)),
        (report_figures_means.twin_comparison, ()),
        (report_figures_means.key_personas, (["good"],)),
        (report_figures_means.dataset_difficulty, ()),
        (report_figures_means.arms, ()),
    ):
        said = words(draw(table, LOOK, *arguments, confidence=0.9))
        assert "90% response interval" in said, draw
        assert "95%" not in said, draw


def test_alternative_text_follows_the_data():
    table = score_table()
    table.loc[table["persona"] == "bad", "alignment"] = 12.0
    medians = table.groupby("persona")["alignment"].median()
    assert distributions.violin(table, LOOK).alt.endswith(f"3 personas; medians from 12.0 to {medians.max():.1f}.")


def test_figures_that_are_no_longer_made_are_removed(tmp_path):
    kept, gone = (parts.FigureRecord(k, "", "", "", "", f"{k}.svg", f"{k}.png") for k in ("kept", "gone"))
    for name in (kept.svg, kept.png, gone.svg, gone.png, "notes.md"):
        (tmp_path / name).touch()
    parts.write_records([kept], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures.json", kept.png, kept.svg, "notes.md"]
    assert parts.read_records(tmp_path) == [kept]


def words(drawing: parts.Drawing) -> str:
    """All text of a figure."""
    return " ".join(text.get_text() for text in drawing.fig.findobj(plt.Text))


def test_no_title_is_wider_than_its_panel():
    tests = pd.DataFrame(
        {"scope": ["personas", "persona", "dataset", "datasets"], "persona": [None, "good", "good", "good"],
         "dataset": ["harm", "harm", "harm", None], "estimate": 0.6, "low": 0.5, "high": 0.7, "chance": 0.5, "p": 0.01}
    )  # fmt: skip
    with style.style_context():
        fig = distributions.gates(tests, LOOK).fig
        fig.canvas.draw()
    width = fig.bbox.width
    titles = [ax._left_title for ax in fig.axes if ax._left_title.get_text()]
    assert len(titles) == 4
    assert all(title.get_window_extent().x1 <= width for title in titles)


def test_missing_cells_are_shown_as_missing():
    table = score_table(missing={("bad", "help")})
    assert "no such condition" in " ".join(
        t.get_text() for t in report_figures_means.heatmap(table, LOOK).fig.legends[0].get_texts()
    )
    assert "one of the two is missing" in words(report_figures_means.twin_comparison(table, LOOK))
    alignment = report_figures_means.alignment_by_persona(table, LOOK)
    assert "only those 1 data sets" in alignment.caption
    assert "no such condition" in words(
        report_figures_means.arms(score_table(datasets=("harm", "none"), missing={("bad", "harm")}), LOOK)
    )


def test_what_the_data_do_not_allow_is_absent():
    table = score_table(datasets=("harm",))
    assert report_figures_means.cross_model_figure(table, LOOK) is None, "one model"
    assert report_figures_means.twin_comparison(table, LOOK) is None, "no benign twin"
    assert report_figures_means.arms(table, LOOK) is None, "no untuned arm"
    assert report_figures_means.hypothesis_differences(table, LOOK, []) is None, "no hypothesis"
    assert report_figures_means.forest(table[table["persona"] == "good"], LOOK) is None, "no baseline"


def test_caption_follows_the_data():
    table = score_table()
    before = report_figures_means.heatmap(table, LOOK).caption
    table.loc[(table["persona"] == "good") & (table["dataset"] == "help"), "alignment"] = 1.0
    after = report_figures_means.heatmap(table, LOOK).caption
    assert before != after
    assert "Good_one on help (1.0)" in after


def test_only_untuned_conditions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="without fine-tuning"):
        all.draw_all(score_table(datasets=("none",)), tmp_path, LOOK)


def test_constant_scores_and_single_samples_are_drawn():
    table = score_table(samples=1).assign(alignment=100.0, alignment_flag=None)
    for draw in (
        report_figures_means.alignment_by_persona,
        report_figures_means.heatmap,
        distributions.violin,
        report_figures_means.misalignment_heatmap,
    ):
        assert (
            "100.0" in draw(table, LOOK).caption or "0.0 %" in draw(table, LOOK).caption or draw is distributions.violin
        )
    assert report_figures_means.hypothesis_differences(table, LOOK, HYPOTHESES) is not None
    assert "0 of 4 intervals exclude zero" in report_figures_means.forest(table, LOOK).caption, (
        "equal scores: d is 0, as in the tables"
    )
