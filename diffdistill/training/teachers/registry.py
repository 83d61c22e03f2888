"""The kinds of network by name: one visible table, and what a YAML file may say about them."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from diffdistill.mistakes import checked
from diffdistill.training.teachers import autoencoder, classifier, clip, diffusion, text_diffusion
from diffdistill.training.teachers.parts import Kind
from diffdistill.yaml_files import read_yaml

KINDS: dict[str, Kind] = {
    "diffusion": Kind(diffusion.DiffusionConfig, diffusion.train),
    "autoencoder": Kind(autoencoder.AutoencoderConfig, autoencoder.train),
    "text_diffusion": Kind(text_diffusion.TextDiffusionConfig, text_diffusion.train),
    "clip": Kind(clip.ClipConfig, clip.train),
    "classifier": Kind(classifier.ClassifierConfig, classifier.train),
}

TeacherConfig = Annotated[functools.reduce(operator.or_, (kind.config for kind in KINDS.values())), Field(discriminator="kind")]


def parse_teacher_config(values: Mapping[str, Any], where: str = "the config") -> TeacherConfig:
    """Check a mapping, as read from YAML, against the schema.

    Raises:
        UserError: every mistake, one line each: place, what is wrong, what to write instead.
    """
    return checked(TypeAdapter(TeacherConfig), values, where)


def load_teacher_config(path: str | Path) -> TeacherConfig:
    """Read and check a YAML file.

    Raises:
        UserError: no such file, not YAML, or not according to the schema.
    """
    return parse_teacher_config(read_yaml(path, example="kind: diffusion"), str(path))
