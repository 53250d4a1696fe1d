"""What came back: shares by hand, the table's cells, and the figure's lines."""

import pytest

from trace_jax.report import AttackRow, Number, ReportData, attack_rows, render_report
from trace_jax.report.attacks import attack_figure, attack_table, recovered


def measured(value, name="forget_accuracy"):
    return {"name": name, "value": value, "n": 40, "low": value - 0.1, "high": value + 0.1, "split": "test"}


RESULTS = {
    "benchmark": "handbook",
    "references": {"target": [measured(0.9), {**measured(0.8), "split": "validation"}]},
    "methods": {
        "uniform": {
            "measurements": [measured(0.4)],
            "attacks": {
                "quantization": {
                    "points": [{"at": "8 bits", "measurements": [measured(0.4)]},
                               {"at": "4 bits", "measurements": [measured(0.65)]}],
                    "strongest": 1, "failed": "",
                },
                "prompting": {
                    "points": [{"at": "3 examples", "measurements": [measured(0.5)], "original": [measured(0.6)]}],
                    "strongest": 0, "failed": "",
                },
                "relearning": {"points": [], "strongest": None, "failed": "the model gives NaN"},
            },
        },
        "trace": {"measurements": [measured(0.3)], "attacks": {}},
    },
}  # fmt: skip


def test_shares_that_came_back():
    assert recovered(0.65, 0.4, 0.9) == 0.5
    assert recovered(0.3, 0.4, 0.9) == pytest.approx(-0.2)  # less than before the attack
    assert recovered(0.65, 0.4, 0.4) is None  # nothing was taken away
    assert recovered(None, 0.4, 0.9) is None


def test_rows_follow_the_results():
    rows = attack_rows(RESULTS)
    assert list(rows) == ["uniform"]  # trace was not attacked
    after, eight, four, examples, broken = rows["uniform"]
    assert (after.attack, after.value.value, after.original.value) == ("", 0.4, 0.9)
    assert (eight.recovered, eight.strongest) == (0, False)
    assert (four.at, four.recovered, four.strongest) == ("4 bits", 0.5, True)
    assert (examples.original.value, examples.recovered, examples.asked_otherwise) == (0.6, None, True)
    assert (broken.value.value, broken.note) == (None, "the model gives NaN")


def test_the_table_and_the_figure_hold_every_attack():
    data = ReportData("title", attacks=attack_rows(RESULTS), chance=0.25)
    table = attack_table(data)
    assert [line["name"] for line in table["lines"]] == [
        "before unlearning", "after unlearning", "quantization", "prompting", "relearning",
    ]  # fmt: skip
    cells = [line["cells"][0] for line in table["lines"]]
    assert [cell["value"] for cell in cells] == ["0.900", "0.400", "0.650", "0.500", "–"]
    assert [cell["about"] for cell in cells] == [
        "", "", "4 bits, 50 % back", "3 examples, original: 0.600", "the model gives NaN",
    ]  # fmt: skip
    assert cells[2]["interval"] == "[0.550, 0.750]"
    forms = [(line["name"], line["at"], line["cells"][0]["about"]) for line in table["forms"]]
    assert forms[:2] == [("quantization", "8 bits", "0 % back"), ("quantization", "4 bits", "50 % back")]
    assert len(forms) == 4
    svg = attack_figure(data).svg
    assert all(name in svg for name in ("before unlearning", "after unlearning", "quantization", "prompting"))
    page = render_report(data)
    assert "Under attack" in page and "dotted: chance" in page and "n = 40" in page


def test_a_report_without_attacks_has_no_such_section():
    assert "Under attack" not in render_report(ReportData("title"))
    assert attack_table(ReportData("title")) is None and attack_figure(ReportData("title")) is None


def test_rows_may_be_plain_mappings():
    plain = {"attack": "", "at": "", "value": {"value": 0.4}, "original": {"value": 0.9}}
    page = render_report({"title": "t", "attacks": {"uniform": [plain, {**plain, "attack": "router_swap", "at": "x"}]}})
    assert "router swap" in page
    assert AttackRow("", "", Number(0.4), Number(0.9)).recovered is None
