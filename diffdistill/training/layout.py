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
PARTS_OF_LOOKS = ".look-*.parts"


def parts_of_look(*what: str | int) -> str:
    """Return where several processes put together what they have made of samples or of a validation.

    Args:
        what: is made, and at which step, so that the name is new: on another machine a shared disk may show for a while what is
            deleted already.
    """
    return PARTS_OF_LOOKS.replace("*", "-".join(map(str, what)))
