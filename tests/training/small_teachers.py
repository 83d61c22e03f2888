"""The shipped configs of teachers with short trainings."""

from pathlib import Path

from diffdistill.training.teachers import load_teacher_config, parse_teacher_config

CONFIGS = Path(__file__).parents[2] / "configs" / "teachers"


def small(name: str, steps: int = 3, **changes):
    """The shipped config with a short training."""
    values = load_teacher_config(CONFIGS / f"{name}.yaml").model_dump(mode="json")
    values["fit"] |= {"steps": steps, "batch_size": 16, "warmup_steps": 1}
    return parse_teacher_config(values | changes)
