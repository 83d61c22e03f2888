"""Training of the embedded teachers, their autoencoder and the feature network: from a config to a folder of weights.

Every draw comes from (seed, step), so a config, a machine and a thread count determine the weights.

The networks stay in eval mode while they train: a DiT's LabelEmbedding would drop labels by itself in train mode. They
are dropped here, with the step's own generator, and none of these networks has batch statistics. A dropout in
network_config would have no effect and is refused.

A kind of network is one file with its config and its `train`, and one line in `registry.KINDS`.
"""

from diffdistill.training.teachers.registry import TeacherConfig, load_teacher_config, parse_teacher_config
from diffdistill.training.teachers.run import RECORD, train_teacher

__all__ = ["RECORD", "TeacherConfig", "load_teacher_config", "parse_teacher_config", "train_teacher"]
