"""What a run's YAML may say, and what is said back where it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from diffdistill import recipes
from diffdistill.config import RunConfig, dump_config, load_config, parse_config, schema
from diffdistill.distillers import registry
from diffdistill.errors import UserError
from diffdistill.training.optimizers import OptimizerConfig
from diffdistill.yaml_files import read_yaml

RUN_RECIPES = [name for name in recipes.recipe_names() if not name.startswith("teachers/")]

PROGRESSIVE = """
teacher: digits-unet
output: runs/x
data: {kind: digits}
stages:
  - steps: 10
    method: {name: progressive, student_steps: 4}
"""
DMD2 = """
teacher: digits-unet
output: runs/x
data: {kind: labels}
roles: {layout: shared, lora: {rank: 4}}
stages:
  - steps: 10
    method: {name: dmd2}
    optimizers: {student: {lr: 1e-4}, fake: {lr: 3e-4}}
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


# What is right


@pytest.mark.parametrize("name", RUN_RECIPES)
def test_every_recipe_parses_and_comes_back_equal(name, write):
    config = load_config(recipes.recipe_path(name))
    assert load_config(write(dump_config(config))) == config
    assert config.output.parts[0] == "runs"


def test_a_run_that_reads_its_pairs_comes_back_equal(write):
    pairs = {
        "data": {"kind": "labels"},
        "pairs": {"path": "runs/first"},
        "stages": [{"steps": 1, "method": {"name": "dmd", "regression": {}}}],
    }
    config = parse_config({**yaml.safe_load(DMD2), **pairs})
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize("name", RUN_RECIPES)
def test_every_recipe_opens_with_what_paper_cost_result_and_command(name):
    said = recipes.describe_recipe(name)
    assert all(said), said
    assert said.command.endswith(f"configs/{name}.yaml") or "/" in name  # those in folders are run by other commands
    assert said.paper == registry.get(load_config(recipes.recipe_path(name)).stages[-1].method.name).paper


@pytest.mark.parametrize("name", sorted(set(recipes.recipe_names()) - set(RUN_RECIPES)))
def test_every_teacher_config_parses_and_opens_like_the_other_recipes(name):
    from diffdistill.training.teachers import load_teacher_config

    assert load_teacher_config(recipes.recipe_path(name)).seed >= 0
    assert all(recipes.describe_recipe(name)), recipes.describe_recipe(name)


def test_method_settings_are_the_methods_own_class(write):
    config = load_config(write(DMD2))
    method = config.stages[0].method
    assert isinstance(method, registry.get("dmd2").Config) and method.name == "dmd2"
    assert config.stages[0].needs.trained == ("student", "fake")


@pytest.mark.parametrize("name", registry.names())
def test_every_registered_method_is_chosen_by_its_name(name):
    values = {**yaml.safe_load(DMD2), "data": {"kind": "digits"}, "pairs": {"num": 8} if name == "dmd" else None}
    values["stages"] = [{"steps": 1, "method": {"name": name}}]
    values |= {"roles": {}} if name == "agd" else {}  # its adapters are trained in place of LoRA
    assert parse_config(values).stages[0].method.name == name


def test_roles_not_named_have_the_default_optimizer(write):
    stage = load_config(write(PROGRESSIVE)).stages[0]
    assert stage.optimizer("student") == OptimizerConfig()


def test_the_head_is_trained_where_the_method_has_one(write):
    config = load_config(write(DMD2), ["data.kind=digits", "stages.0.method.gan={}"])
    assert config.stages[0].trained == ("student", "fake", "head")


def test_overrides_reach_into_lists_and_make_what_is_missing(write):
    config = load_config(
        write(PROGRESSIVE),
        [
            "stages.0.steps=7",
            "stages.0.optimizers.student.lr=2e-3",
            "ema=null",
            "validation.steps=[1, 2]",
            "data={kind: folder, path: images, size: 8}",
        ],
    )
    assert config.stages[0].steps == 7 and config.stages[0].optimizer("student").lr == 2e-3
    assert config.ema is None and config.validation.steps == (1, 2) and config.data.path == Path("images")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5E7", 5e7),
        ("1.e3", 1e3),
        (".5", 0.5),
        ("-2.5", -2.5),
        ("10", 10),
        ("true", True),
        ("on", "on"),
        ("no", "no"),
        ("1.2.3", "1.2.3"),
        ("e5", "e5"),
    ],
)
def test_yaml_numbers_are_numbers_and_words_are_words(write, text, value):
    read = read_yaml(write(f"a: {text}"))["a"]
    assert read == value and type(read) is type(value)


def test_whole_floats_are_whole_numbers(write):
    assert load_config(write(PROGRESSIVE), ["stages.0.steps=1e4"]).stages[0].steps == 10_000


def test_config_does_not_change():
    config = parse_config(yaml.safe_load(PROGRESSIVE))
    with pytest.raises(ValidationError):
        config.seed = 3


def test_every_setting_is_described():
    def undescribed(node, place):
        for name, field in node.get("properties", {}).items():
            if "description" not in field:
                yield f"{place}.{name}"

    found = schema()
    own = ("Run", "Stage", "Roles", "Data", "Pairs", "Ema", "Checkpoint", "Logging", "Samples", "Guard", "Validation")
    models = {"RunConfig": found} | {name: node for name, node in found["$defs"].items() if name.startswith(own)}
    assert [place for name, node in models.items() for place in undescribed(node, name)] == []


# What is wrong


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("teacher:", "teecher:", ["teacher: is missing", "teecher: unknown key. Did you mean 'teacher'?"]),
        ("student_steps", "student_step", ["stages.0.method.student_step: unknown key. Did you mean 'student_steps'?"]),
        ("progressive", "progresive", ["stages.0.method: unknown name 'progresive'. Did you mean 'progressive'?", "dmd2"]),
        ("kind: digits", "kind: digit", ["data: unknown kind 'digit'. Did you mean 'digits'?"]),
        ("kind: digits", "path: x", ["data: has no kind", "folder"]),
        ("name: progressive, ", "", ["stages.0.method: has no name", "consistency"]),
        ("steps: 10", "steps: ten", ["stages.0.steps: ", "'ten'"]),
        ("steps: 10", "steps: -1", ["stages.0.steps: should be greater than 0; got -1"]),
        ("runs/x", "", ["output: ", "None"]),
        ("student_steps: 4", "student_steps: 0", ["stages.0.method.student_steps: "]),
        ("student_steps: 4", "weighting: unifrom", ["must be ", "got 'unifrom'. Did you mean 'uniform'?"]),
    ],
)
def test_a_mistake_is_named_with_its_place_and_the_way_out(write, old, new, said):
    assert old in PROGRESSIVE
    text = message(write(PROGRESSIVE.replace(old, new)))
    assert all(part in text for part in said), text
    assert "run.yaml" in text and "pydantic" not in text


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "stages.0.optimizers.student.name=adamv",
            ["stages.0.optimizers.student.name: unknown optimizer 'adamv'. Did you mean"],
        ),
        ("stages.0.optimizers.student.lr=.nan", ["stages.0.optimizers.student.lr: "]),
        ("stages.0.optimizers.student={learning_rate: 1}", ["student.learning_rate: unknown key"]),
        ("precision=fp61", ["precision: must be 'fp32', 'bf16' or 'fp16'; got 'fp61'. Did you mean 'fp16'?"]),
        ("ema.decay=2", ["ema.decay: should be less than 1; got 2"]),
        ("roles.lora.alhpa=1", ["roles.lora.alhpa: unknown key. Did you mean 'alpha'?"]),
        ("roles.lora.targets=3", ["roles.lora.targets: "]),
        ("stages=[]", ["stages: "]),
        ("batch_size=none", ["batch_size: ", "'none'"]),
    ],
)
def test_a_wrong_override_is_named(write, override, said):
    text = message(write(PROGRESSIVE), override)
    assert all(part in text for part in said), text


def test_all_mistakes_are_told_at_once(write):
    text = message(write(PROGRESSIVE), "outptu=x", "seed=[1]", "precision=fp61", "stages.0.steps=many", "validation.steps=[0]")
    assert text.splitlines()[0].endswith("has 5 mistakes:") and len(text.splitlines()) == 6


def test_a_list_of_wrong_elements_is_one_mistake(write):
    assert message(write(PROGRESSIVE), "validation.steps=[0]").splitlines()[0].endswith("has one mistake:")


@pytest.mark.parametrize(
    ("text", "overrides", "place", "said"),
    [
        (PROGRESSIVE, ["data.kind=labels"], "stages.0.method", "learns from images"),
        (DMD2, ["stages.0.method.gan={}"], "stages.0.method", "learns from images"),
        (DMD2, ["roles.lora=null"], "roles.lora", "shared layout"),
        (DMD2, ["roles.lora.ranks={fakr: 2}"], "roles.lora.ranks.fakr", "Did you mean 'fake'?"),
        (DMD2, ["roles={}", "teacher_options.quantize=int8"], "teacher_options.quantize", "adapters of one network"),
        (DMD2, ["roles={layout: copies, lora: {rank: 2}}", "teacher_options.quantize=nf4"], "teacher_options.quantize", "null"),
        (DMD2, ["roles={one_batch_up_to: 4}"], "roles.one_batch_up_to", "has no effect in layout copies"),
        (
            DMD2,
            ["roles={rows_at_once: 4}"],
            "roles.rows_at_once",
            "has no effect but in distribution matching in layout shared",
        ),
        (DMD2, ["parallel=fsdp", "teacher_options.quantize=int8"], "teacher_options.quantize", "parallel: fsdp cannot split"),
        (DMD2, ["parallel=fsdp", "precision=fp16"], "precision", "Set bf16"),
        (DMD2, ["parallel=fsdp", "memory=auto"], "memory", "set parallel: ddp"),
        (DMD2, ["parallel=fsdp", "compute.channels_last=true"], "compute.channels_last", "cuts them into rows"),
        (DMD2, ["parallel=fsdp", "stages.0.optimizers.fake={name: adamw8bit}"], "stages.0.optimizers.fake.name", "Set adamw"),
        (PROGRESSIVE, ["batch_size=10", "micro_batch_size=4"], "micro_batch_size", "Set it to 2"),
        (PROGRESSIVE, ["micro_batch_size=256"], "micro_batch_size", "Set it to 128"),
        (PROGRESSIVE, ["stages.0.optimizers.fake={}"], "stages.0.optimizers.fake", "trains no role 'fake'"),
        (DMD2, ["stages.0.optimizers.stutent={}"], "stages.0.optimizers.stutent", "Did you mean 'student'?"),
        (DMD2, ["stages.0.method={name: dmd}"], "stages.0.method", "reads stored pairs"),
        (DMD2, ["pairs={num: 8}"], "pairs", "has no effect"),
        (
            PROGRESSIVE,
            ["stages.0.method={name: progressive, guidance: [1, 4], guidance_input: 2}"],
            "stages.0.method.guidance_input",
            "Put a stage of method guidance before it",
        ),
        (
            PROGRESSIVE,
            [
                "stages.0.method={name: guidance, guidance: [1, 4], guidance_input: 2}",
                "roles={layout: shared, lora: {rank: 2}}",
            ],
            "stages.0.method.guidance_input",
            "Set copies",
        ),
        (
            PROGRESSIVE,
            [
                "stages=[{steps: 1, method: {name: guidance, guidance: [1, 4], guidance_input: 2}}, "
                "{steps: 1, method: {name: lcm}}]"
            ],
            "stages.1.method.guidance_input",
            "Set it in every stage",
        ),
    ],
)
def test_an_impossible_combination_is_one_clear_mistake(write, text, overrides, place, said):
    lines = message(write(text), *overrides).splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"  {place}: ") and said in lines[1], lines


@pytest.mark.parametrize(
    ("before", "steps", "fits"), [(8, 4, True), (16, 4, True), (8, 3, False), (6, 4, False), (4, 4, False)]
)
def test_a_stage_takes_twice_its_steps_of_the_stage_before(write, before, steps, fits):
    stages = (
        f"[{{steps: 1, method: {{name: progressive, student_steps: {before}}}}}, "
        f"{{steps: 1, method: {{name: progressive, student_steps: {steps}}}}}]"
    )
    if fits:
        assert len(load_config(write(PROGRESSIVE), [f"stages={stages}"]).stages) == 2
    else:
        text = message(write(PROGRESSIVE), f"stages={stages}")
        assert f"stages.1.method.student_steps: the student of {steps} steps" in text and "must divide" in text


def test_impossible_combinations_are_told_together(write):
    lines = message(write(DMD2), "roles.lora=null", "pairs={num: 4}", "micro_batch_size=100").splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["micro_batch_size", "roles.lora", "pairs"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.2.steps=3", "stages is a list of 1"),
        ("stages.first.steps=3", "stages is a list of 1"),
        ("teacher.name=3", "teacher is the value 'digits-unet'"),
        ("steps", "written place=value"),
        ("=3", "written place=value"),
        ("a..b=3", "written place=value"),
        ("seed=[1", "not valid YAML"),
    ],
)
def test_an_override_that_fits_nowhere_is_refused(write, override, said):
    assert said in message(write(PROGRESSIVE), override)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: [1", "line 1, column 6"),
        ("- 1", "holds a list"),
        ("", "holds nothing"),
        ("a: 1\na: 2", "'a' is given twice"),
        ("a:\n\tb: 1", "line 2"),
        ("just words", "holds a str"),
        ("a: !!python/object:os.system x", "not valid YAML"),
    ],
)
def test_what_is_not_a_yaml_mapping_is_refused(write, content, said):
    assert said in message(write(content))


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path):
    assert "no file" in message(tmp_path / "absent.yaml") and "init --list" in message(tmp_path / "absent.yaml")
    assert "is a folder" in message(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read" in message(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("pairs", [{}, {"num": 4, "path": "x"}, {"path": "x", "steps": 3}, {"num": 0}])
def test_pairs_are_read_or_made(pairs):
    with pytest.raises(UserError, match="pairs"):
        parse_config({**yaml.safe_load(DMD2), "pairs": pairs, "stages": [{"steps": 1, "method": {"name": "dmd"}}]})


def test_python_users_get_a_validation_error_with_the_same_text():
    with pytest.raises(ValidationError, match="shared layout"):
        RunConfig.model_validate({**yaml.safe_load(DMD2), "roles": {"layout": "shared"}})


# Recipes


def test_init_leaves_an_existing_file_alone(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        recipes.write_recipe("digits-dmd2", path)
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_an_unknown_recipe_is_named_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'digits-dmd2'"):
        recipes.recipe_text("digit-dmd2")
