"""Judges: reconstruction, code usage, Frechet distances, and the digits of the embedded set."""

from grn_lightning.metrics.codes import CodeAlarms as CodeAlarms
from grn_lightning.metrics.codes import CodeReport as CodeReport
from grn_lightning.metrics.codes import CodeStatistics as CodeStatistics
from grn_lightning.metrics.digits import DIRECTIONS as DIRECTIONS
from grn_lightning.metrics.digits import DigitJudge as DigitJudge
from grn_lightning.metrics.features import FeatureExtractor as FeatureExtractor
from grn_lightning.metrics.features import Features as Features
from grn_lightning.metrics.fid import FrechetDistance as FrechetDistance
from grn_lightning.metrics.fid import fid_tag as fid_tag
from grn_lightning.metrics.inception import InceptionFeatures as InceptionFeatures
from grn_lightning.metrics.protocols import CONVENTIONS as CONVENTIONS
from grn_lightning.metrics.protocols import METRICS as METRICS
from grn_lightning.metrics.protocols import Measurement as Measurement
from grn_lightning.metrics.protocols import Protocol as Protocol
from grn_lightning.metrics.reconstruction import FrameMean as FrameMean
from grn_lightning.metrics.reconstruction import FramePSNR as FramePSNR
from grn_lightning.metrics.reconstruction import FrameSSIM as FrameSSIM
from grn_lightning.metrics.reconstruction import reconstruction_metrics as reconstruction_metrics
from grn_lightning.metrics.reference import FeatureSums as FeatureSums
from grn_lightning.metrics.reference import Moments as Moments
from grn_lightning.metrics.reference import ReferenceStatistics as ReferenceStatistics
