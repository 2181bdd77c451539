"""Networks, sampler and media joined to what people ask for; without Lightning."""

from grn_lightning.pipelines.conditions import Condition as Condition
from grn_lightning.pipelines.conditions import prepare_text as prepare_text
from grn_lightning.pipelines.conditions import trim_text as trim_text
from grn_lightning.pipelines.conditions import with_first_frame as with_first_frame
from grn_lightning.pipelines.fit import check_text_channels as check_text_channels
from grn_lightning.pipelines.fit import target_of as target_of
from grn_lightning.pipelines.generator import Drawn as Drawn
from grn_lightning.pipelines.generator import GeneratorPipeline as GeneratorPipeline
from grn_lightning.pipelines.prompts import PromptStyle as PromptStyle
from grn_lightning.pipelines.prompts import Task as Task
from grn_lightning.pipelines.resolutions import frames_for as frames_for
from grn_lightning.pipelines.resolutions import nearest_template as nearest_template
from grn_lightning.pipelines.resolutions import picture_size as picture_size
