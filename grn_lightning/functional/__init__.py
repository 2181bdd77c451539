"""Ground floor: pure functions on tensors. No module, no file, no device, no hidden randomness.

Signs and ranges, here and in the whole package:

    images, clips   float in [-1, 1], RGB; an image is a clip of one frame. uint8 exists only where
                    files are read and written.
    t               0 is noise, 1 is data.
    x_1, x_t, x_0   clean, corrupted, purely random elements.
    guidance        uncond + scale * (cond - uncond); a scale of 1 is the plain conditional.
    masks           boolean; True means keep, or attend.
    codes           long, in [0, 2^M).
    randomness      comes in as uniform numbers ``u`` in [0, 1); `counter_uniform` makes them.

Shapes:

    clips           (b, 3, f, h, w)             pixels
    z, z_hat        (b, d, f', h', w')          latents in (-1, 1), and quantized ones
    codes           (b, d, f', h', w')          HBQ codes of M bits
    bits            (b, M d, f', h', w')        round-major: channel r d + c, r = 0 the coarsest
    elements        (b, c, *grid)               what a generator sees, integers in [0, k):
                                                target "index": c = d,   k = 2^M
                                                target "bit":   c = M d, k = 2
                                                grid is (f, h, w), or (h, w) for the class model
    logits          (b, c, *grid, k)            alphabet last
    t               (b,)                        one time per sample

Axes: ``b`` batch, ``c`` channels, ``f`` frames, ``h w`` grid, ``l`` sequence, ``d`` width, ``n``
heads, ``e`` head width, ``p`` rotary pairs, ``k`` alphabet, ``m`` rounds.
"""

from grn_lightning.functional.adversarial import adaptive_weight as adaptive_weight
from grn_lightning.functional.adversarial import discriminator_loss as discriminator_loss
from grn_lightning.functional.adversarial import generator_loss as generator_loss
from grn_lightning.functional.adversarial import lecam_penalty as lecam_penalty
from grn_lightning.functional.adversarial import r1_penalty as r1_penalty
from grn_lightning.functional.categorical import draw as draw
from grn_lightning.functional.categorical import entropy as entropy
from grn_lightning.functional.categorical import log_prob_of as log_prob_of
from grn_lightning.functional.categorical import log_probs as log_probs
from grn_lightning.functional.categorical import mean_entropy as mean_entropy
from grn_lightning.functional.clusters import cluster_members as cluster_members
from grn_lightning.functional.clusters import gather_member_logits as gather_member_logits
from grn_lightning.functional.clusters import mask_fine_logits as mask_fine_logits
from grn_lightning.functional.clusters import member_mask as member_mask
from grn_lightning.functional.corruption import corrupt as corrupt
from grn_lightning.functional.corruption import keep_mask as keep_mask
from grn_lightning.functional.corruption import random_codes as random_codes
from grn_lightning.functional.distances import frechet_distance as frechet_distance
from grn_lightning.functional.distances import is_within_radii as is_within_radii
from grn_lightning.functional.distances import neighbour_radii as neighbour_radii
from grn_lightning.functional.distances import (
    polynomial_kernel_distance as polynomial_kernel_distance,
)
from grn_lightning.functional.diversity import pairwise_difference as pairwise_difference
from grn_lightning.functional.guidance import GUIDANCE_SCHEDULES as GUIDANCE_SCHEDULES
from grn_lightning.functional.guidance import guidance_scale_at as guidance_scale_at
from grn_lightning.functional.guidance import guide as guide
from grn_lightning.functional.hbq import TARGETS as TARGETS
from grn_lightning.functional.hbq import BitStatistics as BitStatistics
from grn_lightning.functional.hbq import ElementSizes as ElementSizes
from grn_lightning.functional.hbq import bit_statistics as bit_statistics
from grn_lightning.functional.hbq import bits_to_codes as bits_to_codes
from grn_lightning.functional.hbq import codes_to_bits as codes_to_bits
from grn_lightning.functional.hbq import codes_to_elements as codes_to_elements
from grn_lightning.functional.hbq import element_sizes as element_sizes
from grn_lightning.functional.hbq import elements_to_codes as elements_to_codes
from grn_lightning.functional.hbq import hbq_decode as hbq_decode
from grn_lightning.functional.hbq import hbq_encode as hbq_encode
from grn_lightning.functional.hbq import hbq_straight_through as hbq_straight_through
from grn_lightning.functional.hbq import pack_codes as pack_codes
from grn_lightning.functional.hbq import unpack_codes as unpack_codes
from grn_lightning.functional.losses import accuracy_by_time as accuracy_by_time
from grn_lightning.functional.losses import round_accuracy as round_accuracy
from grn_lightning.functional.losses import token_accuracy as token_accuracy
from grn_lightning.functional.losses import token_cross_entropy as token_cross_entropy
from grn_lightning.functional.lr import lr_multiplier as lr_multiplier
from grn_lightning.functional.masks import feather as feather
from grn_lightning.functional.masks import latent_mask as latent_mask
from grn_lightning.functional.orthogonalize import orthogonalize as orthogonalize
from grn_lightning.functional.packing import document_index as document_index
from grn_lightning.functional.packing import document_mask as document_mask
from grn_lightning.functional.packing import document_means as document_means
from grn_lightning.functional.packing import place_in_document as place_in_document
from grn_lightning.functional.packing import ragged_uniform as ragged_uniform
from grn_lightning.functional.patches import patchify as patchify
from grn_lightning.functional.patches import unpatchify as unpatchify
from grn_lightning.functional.quantize import CodeEntropies as CodeEntropies
from grn_lightning.functional.quantize import fsq_decode as fsq_decode
from grn_lightning.functional.quantize import fsq_encode as fsq_encode
from grn_lightning.functional.quantize import fsq_squash as fsq_squash
from grn_lightning.functional.quantize import sign_decode as sign_decode
from grn_lightning.functional.quantize import sign_encode as sign_encode
from grn_lightning.functional.quantize import sign_entropies as sign_entropies
from grn_lightning.functional.quantize import straight_through as straight_through
from grn_lightning.functional.random import Stream as Stream
from grn_lightning.functional.random import counter_uniform as counter_uniform
from grn_lightning.functional.random import philox_4x32 as philox_4x32
from grn_lightning.functional.rope import ASPECT_TEMPLATES as ASPECT_TEMPLATES
from grn_lightning.functional.rope import Rotary as Rotary
from grn_lightning.functional.rope import apply_rotary as apply_rotary
from grn_lightning.functional.rope import axis_frequencies as axis_frequencies
from grn_lightning.functional.rope import nearest_aspect_template as nearest_aspect_template
from grn_lightning.functional.rope import rope_1d as rope_1d
from grn_lightning.functional.rope import rope_2d_class as rope_2d_class
from grn_lightning.functional.rope import text_rotary as text_rotary
from grn_lightning.functional.rope import time_token_rotary as time_token_rotary
from grn_lightning.functional.rope import visual_extent as visual_extent
from grn_lightning.functional.rope import visual_rotary as visual_rotary
from grn_lightning.functional.timesteps import SCHEDULES as SCHEDULES
from grn_lightning.functional.timesteps import bend as bend
from grn_lightning.functional.timesteps import logit_normal as logit_normal
from grn_lightning.functional.timesteps import shift as shift
from grn_lightning.functional.timesteps import step_grid as step_grid
from grn_lightning.functional.truncation import truncate_logits as truncate_logits
