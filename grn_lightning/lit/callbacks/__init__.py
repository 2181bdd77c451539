"""Callbacks: averaged weights, sheets for TensorBoard, judges, speed."""

from grn_lightning.lit.callbacks.checkpoint import Checkpoint as Checkpoint
from grn_lightning.lit.callbacks.codes import WatchCodes as WatchCodes
from grn_lightning.lit.callbacks.ema import EMA as EMA
from grn_lightning.lit.callbacks.evaluate import DigitFeatures as DigitFeatures
from grn_lightning.lit.callbacks.evaluate import EvaluateSamples as EvaluateSamples
from grn_lightning.lit.callbacks.inspector import Inspector as Inspector
from grn_lightning.lit.callbacks.keys import KeyHash as KeyHash
from grn_lightning.lit.callbacks.predictions import WritePredictions as WritePredictions
from grn_lightning.lit.callbacks.preflight import Preflight as Preflight
from grn_lightning.lit.callbacks.sheets import ReconstructionSheet as ReconstructionSheet
from grn_lightning.lit.callbacks.sheets import SampleSheet as SampleSheet
from grn_lightning.lit.callbacks.stop import StopOnSignal as StopOnSignal
from grn_lightning.lit.callbacks.throughput import Throughput as Throughput
