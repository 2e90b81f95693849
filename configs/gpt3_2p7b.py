"""GPT-3 2.7B (Brown et al. 2020, table 2.1): 32 layers of width 2,560; settings in gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt3_2p7b.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. Parameters and optimizer state are sharded over 16
devices. Not yet trained to its end by us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt3


def pretrain() -> TrainConfig:
    return gpt3("2p7b")
