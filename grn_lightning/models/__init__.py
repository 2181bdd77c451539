"""Complete networks: one family per file, readable alone; published sizes are rows of tables."""

from grn_lightning.models.convert import load_official as load_official
from grn_lightning.models.grn_class import GRNClass as GRNClass
from grn_lightning.models.grn_class import GRNClassConfig as GRNClassConfig
from grn_lightning.models.grn_text import FirstFrameCondition as FirstFrameCondition
from grn_lightning.models.grn_text import GRNText as GRNText
from grn_lightning.models.grn_text import GRNTextConfig as GRNTextConfig
from grn_lightning.models.grn_text import TextCache as TextCache
from grn_lightning.models.grn_text import TextCondition as TextCondition
from grn_lightning.models.text_encoder import OpenClipTextEncoder as OpenClipTextEncoder
from grn_lightning.models.text_encoder import TextEncoder as TextEncoder
from grn_lightning.models.text_encoder import TextEncoderConfig as TextEncoderConfig
from grn_lightning.models.text_encoder import build_text_encoder as build_text_encoder
from grn_lightning.models.tokenizer import HBQTokenizer as HBQTokenizer
from grn_lightning.models.tokenizer import TokenizerConfig as TokenizerConfig
from grn_lightning.models.tokenizer import TokenizerOutput as TokenizerOutput
from grn_lightning.models.umt5 import UMT5TextEncoder as UMT5TextEncoder
from grn_lightning.models.variants import GRN_CLASS as GRN_CLASS
from grn_lightning.models.variants import GRN_TEXT as GRN_TEXT
from grn_lightning.models.variants import TOKENIZERS as TOKENIZERS
from grn_lightning.models.variants import get_variant as get_variant
