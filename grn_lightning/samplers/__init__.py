"""Loops over "a callable that returns logits"; a sampler knows a model only by its call."""

from grn_lightning.samplers.batches import RefinedBatch as RefinedBatch
from grn_lightning.samplers.batches import refine_in_batches as refine_in_batches
from grn_lightning.samplers.conditions import Condition as Condition
from grn_lightning.samplers.conditions import concatenate_conditions as concatenate_conditions
from grn_lightning.samplers.conditions import expand_rows as expand_rows
from grn_lightning.samplers.conditions import num_rows as num_rows
from grn_lightning.samplers.conditions import select_rows as select_rows
from grn_lightning.samplers.config import RefineConfig as RefineConfig
from grn_lightning.samplers.config import Step as Step
from grn_lightning.samplers.constraints import Constraint as Constraint
from grn_lightning.samplers.edit import EditConfig as EditConfig
from grn_lightning.samplers.edit import EditResult as EditResult
from grn_lightning.samplers.edit import EditStep as EditStep
from grn_lightning.samplers.edit import edit as edit
from grn_lightning.samplers.refine import refine as refine
from grn_lightning.samplers.results import ForwardCount as ForwardCount
from grn_lightning.samplers.results import Generator as Generator
from grn_lightning.samplers.results import RefineResult as RefineResult
from grn_lightning.samplers.results import StepInfo as StepInfo
from grn_lightning.samplers.stopping import AdaptiveSteps as AdaptiveSteps
from grn_lightning.samplers.trace import ElementMasks as ElementMasks
from grn_lightning.samplers.trace import SampleTrace as SampleTrace
from grn_lightning.samplers.trace import Trace as Trace
from grn_lightning.samplers.trace import element_masks as element_masks
