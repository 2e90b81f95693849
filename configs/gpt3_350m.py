"""GPT-3 350M (Brown et al. 2020, table 2.1): 24 layers of width 1,024; settings in gptjax/scaling/ladders.py.

gptjax pretrain configs/gpt3_350m.py --data.source FOLDER

FOLDER is a corpus made by `gptjax prepare` with 50,257 token ids. One copy a device. Not yet trained to its end by
us: no loss is claimed.
"""

from gptjax.config import TrainConfig
from gptjax.model.ladders import gpt3


def pretrain() -> TrainConfig:
    return gpt3("350m")
