"""What a model is trained on: shards on disk, the order of their samples, and samples as tensors.

=============  =====================================================================
manifest       shards and the list of all of a split: write, count, read
build          a folder of files -> shards
digits         the embedded data set
tars           what lies where in a shard, by its headers or its stored index
shards         random access to the bytes of a sample
codes          packed codes and text features, with what they mean
encoding       shards of pixels -> shards of codes
order          which sample comes when: a function of (seed, samples seen)
samples        bytes -> tensors -> batches; what happens to bad samples
=============  =====================================================================
"""

from grn_lightning.datasets.order import EndlessBatchSampler as EndlessBatchSampler
from grn_lightning.datasets.order import OrderedSource as OrderedSource
from grn_lightning.datasets.order import Position as Position
from grn_lightning.datasets.order import SampleOrder as SampleOrder
from grn_lightning.datasets.order import SampleRequest as SampleRequest
from grn_lightning.datasets.order import TrainingOrder as TrainingOrder
from grn_lightning.datasets.order import ValidationBatchSampler as ValidationBatchSampler
from grn_lightning.datasets.samples import Batch as Batch
from grn_lightning.datasets.samples import SampleFormat as SampleFormat
from grn_lightning.datasets.samples import SampleReader as SampleReader
from grn_lightning.datasets.samples import ShardDataset as ShardDataset
from grn_lightning.datasets.samples import collate as collate
from grn_lightning.datasets.shards import ShardSet as ShardSet
