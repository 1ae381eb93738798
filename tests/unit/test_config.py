"""Configurations: what is read, where it comes from, and the sentence for each mistake."""

from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from horovod_megdet.config import Config, Section, as_config, load_config, merge, override, section_type
from horovod_megdet.errors import EXIT_USER_ERROR, UserError

PROJECT = Path(__file__).resolve().parent.parent.parent


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    """The sentence for a file with this text, without the folder's name."""
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path / "run.yaml", text), list(overrides))
    assert caught.value.exit_code == EXIT_USER_ERROR
    return str(caught.value).replace(f"{tmp_path}/", "")


# Where values come from


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "empty.yaml", "# nothing\n")) == Config()
    assert load_config(write(tmp_path / "sections.yaml", "solver:\n  # base_lr: 1\nmodel:\n")) == Config()


def test_a_base_is_overridden_key_by_key_and_the_command_line_overrides_both(tmp_path: Path) -> None:
    write(
        tmp_path / "bases" / "base.yaml", "solver: {base_lr: 0.5, epochs: 3, momentum: 0.5}\nmodel: {fpn_channels: 8}"
    )
    path = write(tmp_path / "run.yaml", "base: bases/base.yaml\nsolver: {epochs: 5, momentum: 0.6}")
    config = load_config(path, ["solver.momentum=0.7", "solver.momentum=0.8", "runtime.seed=3"])
    assert (config.solver.base_lr, config.solver.epochs, config.solver.momentum) == (0.5, 5.0, 0.8)
    assert (config.model.fpn_channels, config.runtime.seed) == (8, 3)


def test_the_demo_is_a_base_by_its_name(tmp_path: Path) -> None:
    demo = load_config(PROJECT / "configs" / "demo.yaml")
    mine = override(demo, ["solver.epochs=3"])
    assert load_config(write(tmp_path / "run.yaml", "base: demo\nsolver: {epochs: 3}")) == mine
    assert as_config({"base": "demo", "solver": {"epochs": 3}}) == mine


def test_a_configuration_in_python_is_a_path_a_dict_or_made(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "solver: {epochs: 5, momentum: 0.6}")
    config = load_config(path)
    assert as_config(path) == as_config(str(path)) == as_config(config) == config
    assert as_config({"solver": {"epochs": 5, "momentum": 0.6}}) == config
    values = {"base": path, "solver": {"epochs": 6}, "output": {"run_dir": tmp_path / "run"}}
    assert as_config(values) == override(config, ["solver.epochs=6", f"output.run_dir={tmp_path / 'run'}"])
    assert values["base"] == path, "the dict is left as it is"
    assert merge(config, {}) == config
    with pytest.raises(
        UserError, match=r"the configuration: `solver\.epochs`: input should be greater than 0, not -1\."
    ):
        merge(config, {"solver": {"epochs": -1}})


def test_a_list_replaces_the_list_of_the_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "data: {shorter_side_train: [640, 800]}")
    path = write(tmp_path / "run.yaml", "base: base.yaml\ndata: {shorter_side_train: [320]}")
    assert load_config(path).data.shorter_side_train == (320,)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("solver.milestones=[1, 2.5]", (1.0, 2.5)),
        ("solver.clip_gradient_norm=null", None),
        ("solver.base_lr=1e-5", 1e-5),
        ("output.run_dir=runs/a=b c", "runs/a=b c"),
        ("runtime.channels_last=false", False),
        (" batch_norm.bn_size =32", 32),
        ("model.weights=", None),
    ],
)
def test_override_values_are_yaml(tmp_path: Path, text: str, value: Any) -> None:
    path = write(tmp_path / "run.yaml", "solver: {clip_gradient_norm: 3}")
    if text == "model.weights=":
        with pytest.raises(UserError, match=r"--set model\.weights=: `model\.weights`: input should be a valid string"):
            load_config(path, [text])
        return
    section, key = text.partition("=")[0].strip().split(".")
    assert getattr(getattr(load_config(path, [text]), section), key) == value


def test_a_loaded_configuration_can_be_overridden(tmp_path: Path) -> None:
    config = load_config(write(tmp_path / "run.yaml", "solver: {epochs: 5}"))
    changed = override(config, ["solver.base_lr=0.5"])
    assert (changed.solver.epochs, changed.solver.base_lr) == (5.0, 0.5)
    assert override(config, []) == config
    with pytest.raises(UserError, match=r"--set solver\.base_rl=1: unknown key `solver\.base_rl`"):
        override(config, ["solver.base_rl=1"])


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_configurations_of_the_project_are_valid(path: Path) -> None:
    load_config(path)


# Mistakes


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        # Unknown keys, with the nearest valid one.
        ("solver: {base_rl: 0.1}", "run.yaml: unknown key `solver.base_rl`; did you mean `solver.base_lr`?"),
        ("modle: {}", "run.yaml: unknown key `modle`; did you mean `model`?"),
        ("base_lr: 1", "run.yaml: unknown key `base_lr`; did you mean `solver.base_lr`?"),
        ("data: {base_lr: 1}", "run.yaml: unknown key `data.base_lr`; did you mean `solver.base_lr`?"),
        (
            "batch_norm: {qqq: 1}",
            "run.yaml: unknown key `batch_norm.qqq`; valid keys here are bn_size, algorithm, momentum, eps.",
        ),
        # Wrong types and values.
        (
            "solver: {epochs: x}",
            "run.yaml: `solver.epochs`: input should be a valid number, unable to parse string as a number, not 'x'.",
        ),
        (
            "runtime: {seed: 1.5}",
            "run.yaml: `runtime.seed`: input should be a valid integer, got a number with a fractional part, not 1.5.",
        ),
        ("runtime: {device: gpu}", "run.yaml: `runtime.device`: input should be 'auto', 'cpu' or 'cuda', not 'gpu'."),
        ("solver: {base_lr: 0}", "run.yaml: `solver.base_lr`: input should be greater than 0, not 0."),
        ("solver: {base_lr: .nan}", "run.yaml: `solver.base_lr`: input should be a finite number, not nan."),
        (
            "data: {horizontal_flip: 1.5}",
            "run.yaml: `data.horizontal_flip`: input should be less than or equal to 1, not 1.5.",
        ),
        (
            "data: {shorter_side_train: [640, 0]}",
            "run.yaml: `data.shorter_side_train`: input should be greater than 0, not 0.",
        ),
        ("solver: {milestones: 8}", "run.yaml: `solver.milestones`: should be a list such as [8, 10], not 8."),
        ("data: {shorter_side_train: []}", "run.yaml: `data.shorter_side_train`: the list must not be empty."),
        ("solver: 5", "run.yaml: `solver`: should be a section with keys below it, not 5."),
        ("output: {run_dir: }", "run.yaml: `output.run_dir`: input should be a valid string, not None."),
        ("batch_norm: {bn_size: 0}", "run.yaml: `batch_norm.bn_size`: input should be greater than 0, not 0."),
        # Combinations.
        (
            "solver: {milestones: [8, 9, 10]}",
            "run.yaml: `solver`: milestones has 3 entries and gammas 2: give one gamma for each milestone.",
        ),
        ("solver: {milestones: [9, 8]}", "run.yaml: `solver`: milestones must rise."),
        (
            "solver: {mini_batch: 32, accumulation: 2}",
            "run.yaml: `solver`: give mini_batch or accumulation, not both: accumulation follows from mini_batch.",
        ),
        (
            "model: {anchor_sizes: [1, 2]}",
            "run.yaml: `model`: anchor_sizes needs five sizes, one for each pyramid level P2 to P6.",
        ),
        (
            "solver:\n  epochs: 3\n  momentum: 0.5\n  epochs: 4",
            "run.yaml, line 4: duplicate key `epochs`: remove one of the two.",
        ),
        (
            "solver: {epochs: 3}\ndata: {}\nsolver: {epochs: 4}",
            "run.yaml, line 3: duplicate key `solver`: remove one of the two.",
        ),
        # Files.
        ("base: missing.yaml", "missing.yaml: no such configuration file."),
        ("base: 5", "run.yaml: base must be the path of a YAML file, not 5."),
        ("- 1\n- 2", "run.yaml: the top level must be sections such as `solver:` with keys below them."),
        ("1: 2", "run.yaml: the top level must be sections such as `solver:` with keys below them."),
    ],
)
def test_each_mistake_has_its_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    assert sentence in mistake(tmp_path, text).splitlines()


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    assert len(mistake(tmp_path, "solver: {base_rl: 1, epochs: x}\nmodle: {}").splitlines()) == 3


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("solver.base_rl=1", "--set solver.base_rl=1: unknown key `solver.base_rl`; did you mean `solver.base_lr`?"),
        ("solver.epochs=x", "--set solver.epochs=x: `solver.epochs`: input should be a valid number, unable to parse"),
        ("solver=1", "--set solver=1: `solver`: should be a section with keys below it, not 1."),
        ("solver.base_lr", "--set solver.base_lr: write section.key=value, for example --set solver.base_lr=0.01."),
        ("solver..base_lr=1", "--set solver..base_lr=1: write section.key=value, for example"),
        ("=1", "--set =1: write section.key=value, for example"),
        ("solver.milestones=[8", "--set solver.milestones=[8: '[8' is not a valid YAML value."),
        ("base=other.yaml", "--set base=other.yaml: unknown key `base`; valid keys here are model, batch_norm, data,"),
    ],
)
def test_a_mistake_on_the_command_line_names_the_override(tmp_path: Path, overrides: str, sentence: str) -> None:
    assert mistake(tmp_path, "", overrides).startswith(sentence)


def test_a_mistake_in_a_base_names_the_base_unless_the_file_has_the_key_too(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "solver: {base_lr: -1, epochs: 3}")
    assert mistake(tmp_path, "base: base.yaml").startswith("base.yaml: `solver.base_lr`: ")
    assert mistake(tmp_path, "base: base.yaml\nsolver: {base_lr: -2}").startswith("run.yaml: `solver.base_lr`: ")


def test_a_base_may_have_a_base_whose_values_it_overrides(tmp_path: Path) -> None:
    write(tmp_path / "first.yaml", "solver: {base_lr: 0.5, epochs: 3, milestones: [1]}")
    write(tmp_path / "second.yaml", "base: first.yaml\nsolver: {base_lr: 0.25, epochs: 4}")
    solver = load_config(write(tmp_path / "run.yaml", "base: second.yaml\nsolver: {epochs: 5, gammas: [0.1]}")).solver
    assert (solver.base_lr, solver.epochs, solver.milestones) == (0.25, 5, (1,))
    write(tmp_path / "first.yaml", "solver: {base_lr: -1}")
    write(tmp_path / "second.yaml", "base: first.yaml")
    assert mistake(tmp_path, "base: second.yaml").startswith("first.yaml: `solver.base_lr`: ")


def test_no_file_is_based_on_itself(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "base: run.yaml")
    assert mistake(tmp_path, "base: base.yaml") == "base.yaml: its base is run.yaml, which is based on this file."


def test_files_that_are_not_yaml_or_not_there(tmp_path: Path) -> None:
    assert mistake(tmp_path, "solver: [").startswith("run.yaml: not valid YAML: while parsing a flow node")
    assert "line 1, column 10" in mistake(tmp_path, "solver: [")
    assert mistake(tmp_path, "solver: !!python/object/apply:os.getcwd []").startswith("run.yaml: not valid YAML: ")
    with pytest.raises(UserError, match=r"missing\.yaml: no such configuration file\."):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="cannot be read: "):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: cannot be read: .*utf-8"):
        load_config(tmp_path / "binary.yaml")


# The tree itself

relaxed = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # machines of the tests are slow at times


def test_values_cannot_change_after_validation() -> None:
    with pytest.raises(ValidationError):
        Config().solver.base_lr = 3.0  # type: ignore[misc]


def sections() -> dict[str, type[Section]]:
    return {name: section_type(name) for name in Config.model_fields}


def test_every_key_is_explained() -> None:
    for name, section in sections().items():
        for key, field in section.model_fields.items():
            assert field.description, f"{name}.{key}"


def values(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Valid values of a field's type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(arguments[0], [bound for field in arguments[1:] for bound in field.metadata])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0], []), min_size=1, max_size=4).map(tuple)
    if type(None) in arguments or origin is Union:
        return st.one_of([values(argument, []) for argument in arguments])
    if annotation is type(None):
        return st.none()
    bounds = {key: getattr(bound, key) for bound in metadata for key in ("gt", "ge", "lt", "le") if hasattr(bound, key)}
    if annotation is int:
        return st.integers(bounds.get("ge", bounds.get("gt", -1) + 1), bounds.get("le", 10**6))
    if annotation is float:
        return st.floats(
            bounds.get("gt", bounds.get("ge", 0.0)),
            bounds.get("lt", bounds.get("le", 1e6)),
            exclude_min="gt" in bounds,
            exclude_max="lt" in bounds,
        )
    return {bool: st.booleans(), str: st.text(st.characters(exclude_categories=("Cs",)), max_size=9)}[annotation]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Any valid configuration."""
    tree: dict[str, dict[str, Any]] = {}
    for name, section in sections().items():
        fields = section.model_fields
        chosen = draw(st.lists(st.sampled_from(sorted(fields)), unique=True, max_size=5))
        tree[name] = {key: draw(values(fields[key].annotation, fields[key].metadata)) for key in chosen}
    solver, model = tree["solver"], tree["model"]
    if "milestones" in solver or "gammas" in solver:
        solver["milestones"] = sorted(set(solver.get("milestones", (1.0,))))
        solver["gammas"] = [0.5] * len(solver["milestones"])
    if solver.get("mini_batch"):
        solver["accumulation"] = 1
    if solver.get("lr_modulation") == "agvm":
        solver.pop("measure_noise", None)  # it has to be measured
    if "anchor_sizes" in model:
        model["anchor_sizes"] = (model["anchor_sizes"] * 5)[:5]
    return Config.model_validate(tree)


@relaxed
@given(configs())
def test_what_is_written_as_yaml_is_read_as_the_same_configuration(config: Config) -> None:
    text = config.to_yaml()
    assert Config.model_validate(yaml.safe_load(text)) == config
    assert Config.model_validate(yaml.safe_load(text)).fingerprint() == config.fingerprint()


def test_the_written_configuration_is_complete_and_read_from_a_file(tmp_path: Path) -> None:
    config = load_config(PROJECT / "configs" / "coco" / "megdet_r50_fpn_256.yaml", ["solver.base_lr=0.03"])
    path = write(tmp_path / "config.yaml", config.to_yaml())
    assert load_config(path) == config
    assert {name: set(keys) for name, keys in yaml.safe_load(path.read_text()).items()} == {
        name: set(section.model_fields) for name, section in sections().items()
    }


@settings(relaxed, max_examples=30)
@given(st.data())
def test_fingerprints_differ_exactly_when_the_value_of_a_key_does(data: st.DataObject) -> None:
    defaults = Config()
    for name, section in sections().items():
        for key, field in section.model_fields.items():
            old = getattr(defaults, name)
            value = data.draw(values(field.annotation, field.metadata), key)
            changed = defaults.model_copy(update={name: old.model_copy(update={key: value})})
            assert (changed.fingerprint() == defaults.fingerprint()) == (value == getattr(old, key)), f"{name}.{key}"
