"""One file per diffusers architecture. `FAMILIES` is the whole list: name of the network class -> how to call it."""

from diffdistill.models.families.dit import DiT
from diffdistill.models.families.unet2d import UNet2D
from diffdistill.models.network import Family

FAMILIES: dict[str, Family] = {"UNet2DModel": UNet2D(), "DiTTransformer2DModel": DiT()}
