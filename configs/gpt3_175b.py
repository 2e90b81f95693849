"""GPT-3 175B (Brown et al. 2020, table 2.1): 96 layers of width 12,288; settings in gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt3_175b.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Parameters and optimizer state are sharded over 512
devices. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt3


def pretrain() -> TrainConfig:
    return gpt3("175b")
