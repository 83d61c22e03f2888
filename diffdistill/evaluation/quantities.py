"""How the values of an evaluation are called, written and drawn: one place for tables, charts and pages."""

from __future__ import annotations

import typing

Better = typing.Literal["lower", "higher"]
ARROWS: dict[Better | None, str] = {"lower": " ↓", "higher": " ↑", None: ""}


class Quantity(typing.NamedTuple):
    """What a reader must know of a value.

    Attributes:
        title: as tables and axes call it.
        better: which way is better; None where that depends on the real images.
        form: format of the number.
        is_distance: whether it is positive and spans decades, so that its axis is logarithmic.
        is_detail: whether it stands in the table of all values only, without a chart and a column of its own.
        part_of: the value that it is a part of, e.g. obeyed_colours of obeyed.
    """

    title: str
    better: Better | None = None
    form: str = ".4g"
    is_distance: bool = False
    is_detail: bool = False
    part_of: str | None = None

    @property
    def heading(self) -> str:
        """Return the title with an arrow that points to better."""
        return self.title + ARROWS[self.better]

    def text(self, value: float) -> str:
        """Return a value as tables write it."""
        return format(value, self.form)


def _distance(title: str, form: str) -> Quantity:
    return Quantity(title, "lower", form, is_distance=True)


def _share(title: str, **fields: typing.Any) -> Quantity:
    return Quantity(title, "higher", ".1%", **fields)


QUANTITIES: dict[str, Quantity] = {
    "fid": _distance("FID", ".2f"),
    "sfid": _distance("sFID", ".2f"),
    "fd_dinov2": _distance("FD-DINOv2", ".2f"),
    "clip_fid": _distance("CLIP-FID", ".2f"),
    "patch_fid": _distance("patch FID", ".2f"),
    "fid_dmd2": Quantity("FID by DMD2's script", "lower", ".2f", is_distance=True, is_detail=True),
    "kid": _distance("KID", ".3g"),
    "kid_subset_sd": Quantity("KID, sd of subsets", None, ".3g", is_detail=True),
    "cmmd": _distance("CMMD", ".3f"),
    "precision": Quantity("precision", "higher", ".3f"),
    "recall": Quantity("recall", "higher", ".3f"),
    "density": Quantity("density", "higher", ".3f"),
    "coverage": Quantity("coverage", "higher", ".3f"),
    "vendi": Quantity("Vendi", "higher", ".2f"),
    "inception_score": Quantity("IS", "higher", ".2f"),
    "accuracy": _share("accuracy"),
    "diversity": Quantity("diversity", None, ".3f"),
    "saturated": Quantity("saturated pixels", None, ".2%", is_detail=True),
    "contrast": Quantity("contrast", None, ".3f", is_detail=True),
    "prompt_diversity": Quantity("diversity within a prompt", None, ".3f"),
    "lpips_diversity": Quantity("LPIPS within a prompt", None, ".3f"),
    "clip_score": Quantity("CLIP", "higher"),
    "pickscore": Quantity("PickScore", "higher"),
    "hps_v2.0": Quantity("HPS v2.0", "higher"),
    "hps_v2.1": Quantity("HPS v2.1", "higher"),
    "image_reward": Quantity("ImageReward", "higher"),
    "aesthetic": Quantity("aesthetic", "higher"),
    "obeyed": _share("obeyed"),
    "obeyed_colours": _share("colours", is_detail=True, part_of="obeyed"),
    "obeyed_shapes": _share("and shapes", is_detail=True, part_of="obeyed"),
    "obeyed_sizes": _share("and sizes", is_detail=True, part_of="obeyed"),
}
JACKKNIFE = "_jackknife"


def quantity(name: str) -> Quantity:
    """Return what is known of a value; of one that nobody described, its name and no direction."""
    if name in QUANTITIES:
        return QUANTITIES[name]
    if name.endswith(JACKKNIFE):
        whole = quantity(name.removesuffix(JACKKNIFE))
        return whole._replace(title=f"{whole.title} without bias", is_detail=True)
    return Quantity(name.replace("_", " "))
