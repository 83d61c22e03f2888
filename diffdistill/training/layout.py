"""What lies in the folder of a run, by name; loads nothing, so that who only looks need not load torch."""

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
SAMPLES = "samples"
CHECKPOINTS = "checkpoints"
PAIRS = "pairs.safetensors"
TRAJECTORIES = "trajectories.safetensors"
LOCK = "lock"
OUTCOME = "outcome.json"
VALIDATION_PARTS = ".validation-*.parts"


def validation_parts(step: int, num_steps: int) -> str:
    """Return where several processes put together what they have made of the validation at a step, in `num_steps` of the student.

    The name is new at each step: on another machine a shared disk may show for a while what is deleted already.
    """
    return VALIDATION_PARTS.replace("*", f"{step}-{num_steps}")
