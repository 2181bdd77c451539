"""Sizes and durations that published weights know; see `media.resolutions`, which data use too."""

from grn_lightning.media.resolutions import FPS as FPS
from grn_lightning.media.resolutions import MAX_FRAMES as MAX_FRAMES
from grn_lightning.media.resolutions import PRESETS as PRESETS
from grn_lightning.media.resolutions import STRIDE as STRIDE
from grn_lightning.media.resolutions import TEMPLATES as TEMPLATES
from grn_lightning.media.resolutions import PictureSize as PictureSize
from grn_lightning.media.resolutions import frames_for as frames_for
from grn_lightning.media.resolutions import latent_size as latent_size
from grn_lightning.media.resolutions import nearest_template as nearest_template
from grn_lightning.media.resolutions import picture_size as picture_size
