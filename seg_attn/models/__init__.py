"""DeepLabv3 and its parts."""

from seg_attn.models.aspp import ASPP
from seg_attn.models.atrous import atrous_plan
from seg_attn.models.backbone import BACKBONES, AtrousBackbone
from seg_attn.models.deeplabv3 import DeepLabV3

__all__ = ["ASPP", "BACKBONES", "AtrousBackbone", "DeepLabV3", "atrous_plan"]
