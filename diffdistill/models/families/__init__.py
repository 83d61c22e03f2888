"""One file per diffusers architecture. `FAMILIES` is the whole list: name of the network class -> how to call it."""

from diffdistill.models.families.dit import DiT
from diffdistill.models.families.flux import Flux
from diffdistill.models.families.pixart import PixArt
from diffdistill.models.families.sana import Sana
from diffdistill.models.families.sd3 import SD3
from diffdistill.models.families.unet2d import UNet2D
from diffdistill.models.families.unet2d_condition import UNet2DCondition
from diffdistill.models.network import Family

FAMILIES: dict[str, Family] = {
    "UNet2DModel": UNet2D(),
    "UNet2DConditionModel": UNet2DCondition(),
    "DiTTransformer2DModel": DiT(),
    "PixArtTransformer2DModel": PixArt(),
    "SD3Transformer2DModel": SD3(),
    "FluxTransformer2DModel": Flux(),
    "SanaTransformer2DModel": Sana(),
}
