"""Settings: their origins, what is refused, and that a run's file reproduces it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

from pairtune.cli import app
from pairtune.config import ColumnPart, RunConfig, flag_of
from pairtune.errors import BadInput
from pairtune.flags import COLUMN_PARTS
from pairtune.options import OPTIONS
from pairtune.resolve_config import resolve
from pairtune.sweep.search import open_search

DOCS = Path(__file__).parents[1] / "docs"


def test_the_defaults_are_the_assignments_grid_in_its_order():
    trials = RunConfig(data="x").trials()
    assert [(trial.learning_rate, trial.beta) for trial in trials] == [
        (3e-5, 0.1),
        (1e-5, 0.1),
        (3e-5, 0.2),
        (1e-5, 0.2),
    ]
    assert [trial.name for trial in trials][:2] == ["lr-3e-05-beta-0.1", "lr-1e-05-beta-0.1"]
    assert {(trial.epochs, trial.batch_size) for trial in trials} == {(3, 2)}


def test_values_that_differ_in_a_late_digit_have_different_folders():
    names = {trial.name for trial in RunConfig(data="x", learning_rate=[1e-5, 1.0000001e-5]).trials()}
    assert len(names) == 4


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("data: a.jsonl\nepochs: 7\nlearning_rate: [0.001]\n")
    resolved = resolve(file, {"epochs": 2, "beta": None})
    assert (resolved.config.epochs, resolved.config.learning_rate, resolved.config.beta) == (2, [0.001], [0.1, 0.2])
    assert resolved.origins["epochs"] == "flag --epochs"
    assert resolved.origins["data"] == str(file)
    assert resolved.origins["beta"].startswith("default: ")


def test_every_default_has_its_reason():
    reasons = resolve(None, {"data": "x"}).origins
    assert [name for name, origin in reasons.items() if origin == "default"] == []


def test_the_written_file_reads_back_to_the_same_configuration(tmp_path):
    resolved = resolve(
        None, {"data": "a: b.jsonl # x", "learning_rate": [1e-5, 2e-4], "out": tmp_path / "r", "limit": 3}
    )
    file = tmp_path / "config.yaml"
    file.write_text(resolved.to_yaml())
    assert resolve(file, {}).config == resolved.config
    assert "learning_rate: [1.0e-05, 0.0002]  # flag --lr" in file.read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"learning_rate": [-1e-5]}, "--lr: must be greater than 0, not -1e-05"),
        ({"learning_rate": [float("nan")]}, "--lr: must be a finite number|--lr: must be greater than 0"),
        ({"learning_rate": [1e-5, 1e-5]}, "--lr: the same value is given twice"),
        ({"beta": [0.0]}, "--beta: must be greater than 0, not 0"),
        ({"epochs": 0}, "--epochs: must be greater than 0, not 0"),
        ({"batch_size": -2}, "--batch-size: must be greater than 0"),
        ({"method": "qlora"}, "--method: should be 'lora' or 'full'"),
        ({"data": None}, "--data: is required"),
        ({"data": ""}, "--data: "),
        ({"seed": -1}, "--seed: "),
    ],
)
def test_a_value_that_is_not_allowed_names_its_flag(flags, message):
    with pytest.raises(BadInput, match=message) as caught:
        resolve(None, {"data": "x", **flags})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epochs: many\ndata: x", "c.yaml: epochs: "),
        ("lr: 3\ndata: x", "c.yaml: lr: is not a setting; the settings are .*learning_rate"),
        ("- a", "c.yaml: should contain settings"),
        ("a: [", "c.yaml: is not valid YAML"),
    ],
)
def test_a_file_that_is_not_right_names_itself(tmp_path, content, message):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(BadInput, match=message) as caught:
        resolve(file, {})
    assert "\n" not in str(caught.value)


def test_every_setting_is_in_the_written_file():
    written = yaml.safe_load(resolve(None, {"data": "x"}).to_yaml())
    assert list(written) == list(RunConfig.model_fields)


def test_flag_names():
    assert [flag_of(name) for name in ("learning_rate", "batch_size", "data")] == ["--lr", "--batch-size", "--data"]


def test_points_of_a_grid_are_checked_too(tmp_path):
    """Each value is allowed, but not the combination: a one-line error, no traceback."""
    file = tmp_path / "run.yaml"
    file.write_text("data: bundled:concise\nloss: [sigmoid, exo_pair]\nlabel_smoothing: [0.0, 0.1]\n")
    with pytest.raises(BadInput, match=r"label_smoothing: must be above 0 for the loss exo_pair"):
        resolve(file, {})


@pytest.mark.parametrize("search", [{}, {"search": "random", "trial_count": 3}, {"search": "tpe", "trial_count": 3}])
def test_no_patience_and_some_are_a_grid(tmp_path, search):
    file = tmp_path / "run.yaml"
    file.write_text("data: bundled:concise\npatience: [null, 2]\nlearning_rate: 1.0e-4\nbeta: 0.1\n")
    config = resolve(file, {"learning_rate": [1e-4], "beta": [0.1], **search}).config
    assert {trial.patience for trial in config.trials()} == {None, 2}
    assert {trial.patience for trial in open_search(config).ask()} <= {None, 2}


SETTINGS = st.dictionaries(
    st.sampled_from(sorted(RunConfig.model_fields)),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-3, 3)
        | st.floats()
        | st.sampled_from(["", "lora", "exo_pair", "tpe", "x"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=6,
)


@given(SETTINGS)
def test_settings_are_taken_or_refused_in_one_line(settings):
    try:
        config = resolve(None, {"data": "bundled:concise", **settings}).config
    except BadInput as error:
        assert "\n" not in str(error)
    else:
        assert config.trials()


def test_every_setting_has_a_flag_help_and_a_place_in_the_reference():
    command = get_command(app).commands["tune"]
    params = {param.name: param for param in command.get_params(command.make_context("tune", []))}
    written = (DOCS / "settings.md").read_text()
    assert list(OPTIONS) == list(RunConfig.model_fields)
    for option in OPTIONS.values():
        assert option.help.endswith("."), option.name
        assert option.default or option.why or option.name == "data", option.name
        assert params[option.name].opts == [option.flag]
        assert params[option.name].help == option.full_help
        assert params[option.name].rich_help_panel == option.group
        assert f"| `{option.name}` | `{option.flag}` | {option.help} |" in written


def test_options_tell_types_ranges_and_grids():
    assert [OPTIONS[name].type for name in ("beta", "epochs", "loss", "prune", "out", "patience")] == [
        float,
        int,
        str,
        bool,
        Path,
        int,
    ]
    assert (OPTIONS["beta"].limits, OPTIONS["label_smoothing"].limits) == ("> 0", ">= 0 and < 0.5")
    assert OPTIONS["method"].choices == ("lora", "full")
    assert [name for name, option in OPTIONS.items() if option.repeats and not option.varies] == [
        "lora_targets",
        "data",
        "eval_data",
        "test_data",
        "columns",
        "track",
    ]
    assert not OPTIONS["max_length"].varies


def test_the_flags_know_every_part_that_a_column_can_hold():
    """They are listed twice, because `--help` should not import pydantic."""
    assert set(COLUMN_PARTS) == set(get_args(ColumnPart))
