"""Networks, sampler and media joined to what people ask for; without Lightning."""

from grn_lightning.pipelines.conditions import Condition as Condition
from grn_lightning.pipelines.conditions import prepare_text as prepare_text
from grn_lightning.pipelines.conditions import trim_text as trim_text
from grn_lightning.pipelines.conditions import with_first_frame as with_first_frame
from grn_lightning.pipelines.generator import Drawn as Drawn
from grn_lightning.pipelines.generator import GeneratorPipeline as GeneratorPipeline
from grn_lightning.pipelines.generator import target_of as target_of
